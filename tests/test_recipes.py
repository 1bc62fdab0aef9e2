"""Recipes of training runs: the files in configs/, single fields changed on the command line, and every rule's error."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_floors import HEAVY

from grm_jax import recipes
from grm_jax.recipes import (
    Checkpoints,
    CloudConfig,
    Fresh,
    Items,
    Lora,
    MetaConfig,
    Optimizer,
    PairsConfig,
    RftConfig,
    RlConfig,
    SampleConfig,
)

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if "def config()" in path.read_text())
ITEMS = Items(files=("items.jsonl",))


OTHERS = {"meta": MetaConfig, "bradley_terry": PairsConfig, "pair_rm": PairsConfig, "cloud": CloudConfig}


def kind_of(path: Path) -> type:
    """Which command's recipe a file is, by its name."""
    name = path.stem.removeprefix("tiny_")
    if name in OTHERS:
        return OTHERS[name]
    return RlConfig if name.endswith("_rl") or name == "rl" else RftConfig


def fields_of(recipe: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """(names down to a field, its value), nested recipes opened."""
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, (*path, field.name))
        else:
            yield (*path, field.name), value


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_its_json_has_every_field(path):
    recipe = recipes.read(kind_of(path), str(path))
    assert recipe == recipes.load(kind_of(path), ["--config", str(path)], "test")
    text = recipes.as_json(recipe)
    recipes.check_same(text, recipe)
    saved = json.loads(text)
    assert saved.keys() == {field.name for field in dataclasses.fields(recipe)}
    for names, value in fields_of(recipe):
        found = saved
        for name in names:
            found = found[name]
        assert found == (list(value) if isinstance(value, tuple) else value)
    names = {RftConfig: "rft", RlConfig: "rl", MetaConfig: "meta_rm"}
    command = names.get(kind_of(path), path.stem.removeprefix("tiny_"))
    assert f"grm_jax.main {command} --config configs/{path.name}" in path.read_text()


def test_there_are_configs():
    assert {"tiny_base", "tiny_rft", "tiny_rl"} <= {path.stem for path in CONFIGS}


def test_a_run_that_differs_in_one_field_is_another():
    recipe = RlConfig(items=ITEMS)
    text = recipes.as_json(recipe)
    for changed in (replace(recipe, kl_coef=0.1), replace(recipe, optimizer=Optimizer(b2=0.99))):
        (name,) = (f.name for f in dataclasses.fields(recipe) if getattr(recipe, f.name) != getattr(changed, f.name))
        with pytest.raises(ValueError, match=f"started otherwise: {name} was .*, is .*Give another output"):
            recipes.check_same(text, changed)
        recipes.check_same(text, changed, free=(name,))
    older = json.loads(text)
    del older["kl_coef"]
    with pytest.raises(ValueError, match=r"kl_coef was None, is 0\.08"):
        recipes.check_same(json.dumps(older), recipe)


# ---------------------------------------------------------------- the command line


TINY_RL = str(ROOT / "configs/tiny_rl.py")


@pytest.mark.parametrize("given", [["--config", TINY_RL], [f"--config={TINY_RL}"]])
def test_single_fields_are_changed(given):
    default = recipes.read(RlConfig, TINY_RL)
    args = ["--optimizer.learning-rate", "1", "--items.n-choices", "2", "3", "--seed", "7", "--lora.rank=4"]
    for order in (given + args, args + given):
        recipe = recipes.load(RlConfig, order, "test")
        assert recipe.optimizer == replace(default.optimizer, learning_rate=1.0)
        assert recipe.items == replace(default.items, n_choices=(2, 3))
        assert recipe.lora == replace(default.lora, rank=4)
        assert recipe == replace(
            default, optimizer=recipe.optimizer, items=recipe.items, lora=recipe.lora, seed=7
        )  # and nothing else


def test_without_a_config_the_defaults_are_changed():
    recipe = recipes.load(SampleConfig, ["--items.files", "a.jsonl", "b.jsonl", "--votes", "5", "--hinted"], "test")
    assert recipe == SampleConfig(items=Items(files=("a.jsonl", "b.jsonl")), votes=5, hinted=True)
    assert recipes.load(RlConfig, ["--items.files", "a", "--profile", "3,4"], "test").profile == (3, 4)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--optimizer.learning-rat", "1"], ["--optimizer.learning-rat", "--optimizer.learning-rate FLOAT"]),
        (["--kl-coeff", "1"], ["--kl-coeff", "--kl-coef FLOAT"]),
        (["--items.n-choices", "two"], ["--items.n-choices", "two"]),
        (["--objective", "ppo"], ["grpo", "dapo", "ppo"]),
    ],
)
def test_a_field_that_is_not_there_and_a_value_of_another_type_are_named(args, said, capsys):
    with pytest.raises(SystemExit) as stop:
        recipes.load(RlConfig, ["--config", TINY_RL, *args], "grm_jax.main rl")
    assert stop.value.code == 2
    printed = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert [part for part in said if part not in printed] == []


def test_files_that_are_no_recipe_are_named(tmp_path):
    cases = {
        "empty.py": ("", "defines no config(): add a function of that name that returns RlConfig"),
        "number.py": ("config = 3", "defines no config()"),
        "other.py": ("from grm_jax.recipes import *\ndef config(): return RftConfig(items=Items(files=('x',)), "
                     "general_share=0.0)", "returns RftConfig(...), this command needs RlConfig(...)"),
    }  # fmt: skip
    for name, (text, said) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name) as error:
            recipes.read(RlConfig, str(tmp_path / name))
        assert said in str(error.value)
    with pytest.raises(ValueError, match=r"no config 'absent\.py': give a Python file"):
        recipes.load(RlConfig, ["--config", "absent.py"], "test")
    with pytest.raises(ValueError, match="--config without a file"):
        recipes.load(RlConfig, ["--config"], "test")


COMMANDS = ("sample", "rft", "rl")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_without_anything_heavy(command):
    code = f"""
import sys
from grm_jax.main import main
assert main([{command!r}, "--help"]) == 0
print("heavy:", *sorted({{name.split(".")[0] for name in sys.modules}} & {HEAVY!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--items.n-choices" in done.stdout
    assert ("--kl-coef" in done.stdout) == (command == "rl")
    assert ("--general-share" in done.stdout) == (command == "rft")
    assert done.stdout.splitlines()[-1] == "heavy:"


# ---------------------------------------------------------------- the rules


def rft(**fields) -> RftConfig:
    return RftConfig(**({"items": ITEMS, "general_share": 0.0} | fields))


def rl(**fields) -> RlConfig:
    return RlConfig(**({"items": ITEMS} | fields))


def sample(**fields) -> SampleConfig:
    return SampleConfig(**({"items": ITEMS} | fields))


LEAST = [
    (Fresh, 1, ("dim", "layers", "heads", "mlp_dim", "max_positions")),
    (Optimizer, 0, ("learning_rate", "warmup_steps", "weight_decay")),
    (Lora, 0, ("rank",)),
    (Checkpoints, 1, ("every", "keep_last", "keep_every")),
    (Items, 0, ("held_out",)),
    (Items, 1, ("per_example", "limit")),
    (rl, 1, ("steps", "votes", "devices", "prompts_per_step", "max_new_tokens", "updates_per_step")),
    (rl, 1, ("microbatch_prompts", "slots")),
    (rl, 2, ("group", "max_prompt_tokens")),
    (rl, 0, ("clip_low", "clip_high", "kl_coef", "log_samples_every", "eval_every")),
    (rft, 0, ("trajectories", "hinted")),
    (rft, 1, ("steps", "max_new_tokens", "slots", "microbatch_rows")),
    (rft, 2, ("sequence_tokens",)),
    (sample, 1, ("votes", "max_new_tokens", "slots", "devices")),
]


@pytest.mark.parametrize(
    ("make", "least", "name"), [(make, least, name) for make, least, names in LEAST for name in names]
)
def test_numbers_have_a_least(make, least, name):
    with pytest.raises(ValueError, match=rf"\.{name} = {least - 1}: it has to be at least {least}$"):
        make(**{name: least - 1})


@pytest.mark.parametrize(
    ("make", "fields", "said"),
    [
        (Fresh, {"dim": 32, "heads": 5}, "dim = 32 in heads = 5: each head has to get the same even number"),
        (Fresh, {"dim": 12, "heads": 4}, "dim = 12 in heads = 4"),
        (Optimizer, {"clip_norm": 0.0}, "clip_norm = 0.0: it has to be above 0; inf never clips"),
        (Optimizer, {"clip_norm": float("nan")}, "clip_norm = nan"),
        (
            Lora,
            {"targets": ("q", "embed")},
            "lora.targets has 'embed'; known are q, k, v, q_a, q_b, kv_a, kv_b, o, gate",
        ),
        (Lora, {"rank": 2, "targets": ()}, "lora.rank = 2 without targets: name some of q, k"),
        (Items, {"n_choices": ()}, "n_choices = (): give numbers of at least 2"),
        (Items, {"n_choices": (3, 1)}, "n_choices = (3, 1): give numbers of at least 2, such as 2 3 4"),
        (rl, {"seed": -1}, "seed = -1: it has to be 0 to 2^32 - 1"),
        (rft, {"seed": 2**32}, "seed = 4294967296: it has to be 0 to 2^32 - 1"),
        (sample, {"seed": -1}, "seed = -1"),
        (rl, {"eval_temperature": -0.5}, "temperature = -0.5: it has to be 0 (greedy) or more"),
        (rl, {"temperature": -1.0}, "temperature = -1.0: it has to be 0 (greedy) or more"),
        (rl, {"temperature": 0.0}, "temperature = 0: greedy rollouts of a prompt are all alike"),
        (rft, {"temperature": float("inf")}, "temperature = inf"),
        (sample, {"temperature": -1.0}, "temperature = -1.0"),
        (rl, {"prompts_per_step": 12}, "prompts_per_step = 12 is no multiple of microbatch_prompts = 8"),
        (rl, {"items": Items()}, "items.files names no file: give labelled examples to learn from"),
        (sample, {"items": Items()}, "items.files names no file: give labelled examples, such as --items.files"),
        (rft, {"general_share": 1.5}, "general_share = 1.5: it has to be 0 to 1"),
        (rft, {"general_share": 0.5}, "general has 0 files and general_share is 0.5: name files for a share above 0"),
        (rft, {"general": ("chat.jsonl",)}, "general has 1 files and general_share is 0.0"),
        (rft, {"items": Items()}, "neither items.files nor general names a file: there is nothing to train on"),
        (rft, {"trajectories": 0, "hinted": 0}, "trajectories = 0 and hinted = 0: nothing is sampled"),
        (rft, {"batch_tokens": 5000}, "batch_tokens = 5000 is 2 rows of sequence_tokens = 2048 and 904 tokens"),
        (rft, {"microbatch_rows": 3}, "batch_tokens = 8192 is 4 rows of sequence_tokens = 2048 and 0 tokens"),
        (rft, {"batch_tokens": 0}, "batch_tokens = 0 is 0 rows"),
    ],
)
def test_what_breaks_a_rule_is_named(make, fields, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make(**fields)


def test_numbers_at_their_bounds_pass():
    for make, least, names in LEAST:
        for name in names:
            if name in ("dim", "sequence_tokens", "prompts_per_step"):
                continue  # bound to other fields, as below
            assert getattr(make(**{name: least}), name) == least
    assert rl(prompts_per_step=1, microbatch_prompts=1).prompts_per_step == 1
    assert rft(sequence_tokens=2, batch_tokens=2).sequence_tokens == 2
    assert Fresh(dim=8, heads=4).dim == 8
    assert Lora(rank=0, targets=()).targets == ()
    assert Optimizer(clip_norm=float("inf")).clip_norm == float("inf")
    assert rft(items=Items(), general=("chat.jsonl",), general_share=1.0, trajectories=0, hinted=0).general_share == 1
    assert rl(seed=2**32 - 1, eval_temperature=0.0).seed == 2**32 - 1
