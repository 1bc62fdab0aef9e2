"""Whole training runs, tiny: what they write, and that a run which was cut off ends like one that was not.

A base model is fine-tuned first (it writes boxes with random scores), everything else starts from it. `whole` and
`tuned` are runs that nothing interrupted; the others have to end in the same rows and the same bytes.
"""

import contextlib
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file

import grm_jax
from grm_jax import judging, prompts
from grm_jax.checkpoint import Saver
from grm_jax.data import items as labelled
from grm_jax.data.chat import Chat
from grm_jax.data.jsonl import parse_row
from grm_jax.datatypes import Message
from grm_jax.log import logger
from grm_jax.main import COMMANDS, main
from grm_jax.metrics import Metrics
from grm_jax.processes import LOST
from grm_jax.recipes import Checkpoints, Fresh, Items, Lora, Optimizer, RftConfig, RlConfig, as_json
from grm_jax.spct import meta, rft, rl, runs, start
from grm_jax.spct.measure import worth_of
from grm_jax.spct.rft import mixture
from grm_jax.spct.rl import hard_enough
from grm_jax.spct.sample import Sample, read_samples, row_of
from grm_jax.tokenizer import ByteTokenizer, Tokenizer
from grm_jax.train import policy as training
from grm_jax.vocab import ByteVocab

TEMPLATE = str(Path(__file__).parents[1] / "configs/tiny_template.txt")
HINT = " Best: "
SPEED = {"seconds", "tokens_per_second", "mfu", "memory_gb"}  # of the machine, not of the run
EASY = [f"item-{i}" for i in range(0, 30, 3)]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def item(i: int, rng: random.Random) -> dict:
    """Which price is higher?"""
    prices = rng.sample(range(10), 2)
    return {
        "id": f"item-{i}",
        "messages": [{"role": "user", "content": f"{i}: which costs most?"}],
        "responses": [f"{price} euros" for price in prices],
        "scores": [float(price == max(prices)) for price in prices],
        "source": "even" if i % 2 == 0 else "odd",
    }


def sampled(row: dict, *right: bool) -> list[dict]:
    """Rows of `sample` on an item: so many judgments, right or wrong."""
    example = parse_row(row, row["id"])
    scores = {True: tuple(9 if label else 1 for label in example.scores), False: (5, 5)}
    return [
        row_of(
            Sample(
                *(example.id, example.source, example.messages, example.responses, example.scores, None, None, (0, 1)),
                *("text", scores[correct], None, correct, False, j, 4, True, TEMPLATE),
            )
        )
        for j, correct in enumerate(right)
    ]


def judgment(row: dict, rng: random.Random) -> dict:
    """A prompt and a box of random scores: all that the base model learns is the format."""
    example, order = parse_row(row, row["id"]), tuple(rng.sample(range(2), 2))
    hint = rng.choice([labelled.hint_of(example), None])
    (turn,) = prompts.render(example, order, prompts.load_template(TEMPLATE), hint)
    return {"prompt": turn.content, "completion": "\\boxed{{{}, {}}}".format(*rng.sample(range(1, 10), 2))}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of data and runs; programs compiled for one run are there for the next."""
    folder = tmp_path_factory.mktemp("runs")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    settings = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in settings}
    rng = random.Random(0)
    rows = [item(i, rng) for i in range(30)]
    write_rows(folder / "items.jsonl", rows)
    write_rows(folder / "base.jsonl", [judgment(rng.choice(rows), rng) for _ in range(100)])
    right = {True: (True, True), False: (True, False)}
    write_rows(folder / "samples.jsonl", [row for r in rows for row in sampled(r, *right[r["id"] in EASY])])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cache.items():
            patch.setenv(name, value)
        for name, value in zip(settings, (cache["JAX_COMPILATION_CACHE_DIR"], 0.0), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def base(place: Path) -> str:
    """A model folder: the base, from a random decoder by general instructions alone."""
    recipe = RftConfig(
        output=str(place / "base"),
        model="fresh",
        fresh=Fresh(dim=32, layers=2, heads=2, mlp_dim=64, max_positions=512),
        general=(str(place / "base.jsonl"),),
        general_share=1.0,
        trajectories=0,
        hinted=0,
        steps=80,
        batch_tokens=640,
        sequence_tokens=320,
        microbatch_rows=2,
        compute_dtype="float32",
        optimizer=Optimizer(learning_rate=2e-2, warmup_steps=5),
        remat="none",
    )
    rft.run(recipe)
    losses = [row["loss"] for row in rows_of(place / "base/metrics.jsonl")]
    assert len(losses) == 80
    assert losses[0] > np.log(259) - 0.5, "a random model's loss is that of a uniform draw or worse"
    assert max(losses[-10:]) < 1.0, "two digits of a box of twelve bytes cost 2 * log(9) / 13 = 0.34"
    return str(place / "base/model")


def rl_recipe(place: Path, base: str, output: str, **fields) -> RlConfig:
    defaults = {
        "items": Items(files=(str(place / "items.jsonl"),), held_out=3),
        "samples": str(place / "samples.jsonl"),
        "template": TEMPLATE,
        "steps": 6,
        "prompts_per_step": 4,
        "group": 2,
        "microbatch_prompts": 2,
        "max_prompt_tokens": 400,
        "max_new_tokens": 14,
        "compute_dtype": "float32",
        "optimizer": Optimizer(learning_rate=1e-3, warmup_steps=2, schedule="cosine"),
        "checkpoints": Checkpoints(every=2, keep_last=3),
        "log_samples_every": 1,
        "eval_every": 2,
        "remat": "none",
    }
    return RlConfig(output=str(place / output), model=base, **(defaults | fields))


def rft_recipe(place: Path, base: str, output: str, **fields) -> RftConfig:
    defaults = {
        "items": Items(files=(str(place / "items.jsonl"),), held_out=3, limit=12),
        "template": TEMPLATE,
        "trajectories": 2,
        "hinted": 1,
        "max_new_tokens": 14,
        "slots": 8,
        "general": (str(place / "base.jsonl"),),
        "general_share": 0.25,
        "steps": 6,
        "batch_tokens": 640,
        "sequence_tokens": 320,
        "microbatch_rows": 1,
        "compute_dtype": "float32",
        "optimizer": Optimizer(learning_rate=1e-3),
        "checkpoints": Checkpoints(every=2, keep_last=3),
        "eval_every": 2,
        "remat": "none",
    }
    return RftConfig(output=str(place / output), model=base, **(defaults | fields))


@pytest.fixture(scope="module")
def whole(place, base) -> RlConfig:
    """An RL run from begin to end."""
    recipe = rl_recipe(place, base, "whole")
    rl.run(recipe)
    return recipe


@pytest.fixture(scope="module")
def tuned(place, base) -> RftConfig:
    """An RFT run from begin to end."""
    recipe = rft_recipe(place, base, "tuned")
    rft.run(recipe)
    return recipe


@pytest.fixture
def lines():
    """The package's log lines."""
    found, handler, level = [], logging.Handler(), logger.level
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def command(recipe: RlConfig | RftConfig) -> list[str]:
    """The command line of a run: its recipe as a file."""
    file = Path(recipe.output).with_suffix(".py")
    file.write_text(
        f"from grm_jax.config import MeshSizes\nfrom grm_jax.recipes import *\n\ndef config():\n    return {recipe!r}\n"
    )
    return ["rl" if isinstance(recipe, RlConfig) else "rft", "--config", str(file)]


def outcome(output: str) -> dict:
    """All that a run leaves which is not of the machine: its rows, and the bytes of its model."""
    folder = Path(output)
    rows = {path.name: rows_of(path) for path in sorted(folder.glob("*.jsonl"))}
    rows["metrics.jsonl"] = [
        {name: value for name, value in row.items() if name not in SPEED} for row in rows["metrics.jsonl"]
    ]
    return {"rows": rows, "model": {path.name: path.read_bytes() for path in (folder / "model").iterdir()}}


def test_a_run_writes_a_row_a_step_and_measures_when_due(whole):
    found = outcome(whole.output)
    assert [row["step"] for row in found["rows"]["metrics.jsonl"]] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in found["rows"]["held_out.jsonl"]] == [0, 2, 4, 6]
    assert [row["step"] for row in found["rows"]["samples.jsonl"]] == [step for step in range(1, 7) for _ in range(4)]
    assert sorted(int(path.name) for path in (Path(whole.output) / "checkpoints").iterdir()) == [2, 4, 6]
    names = {name for row in rows_of(Path(whole.output) / "metrics.jsonl") for name in row}
    assert names >= SPEED | {"reward", "reward/even", "reward/odd", "kl", "loss", "grad_norm", "drift_max"}
    for row in found["rows"]["metrics.jsonl"]:
        assert row["reward"] == pytest.approx(2 * row["accuracy"] - 1)  # +1 and -1
        assert 0 <= row["drift_max"] < 1e-3, "sampler and trainer compute the same log-probabilities"
        assert row["length"] <= 14
    assert {row["parse_failures"] for row in found["rows"]["metrics.jsonl"]} != {1.0}, "the base writes boxes"
    assert sum(row["grad_norm"] > 0 for row in found["rows"]["metrics.jsonl"]) >= 3, "there is something to learn"


def test_logged_judgments_are_rewarded_by_their_labels(whole):
    found = rows_of(Path(whole.output) / "samples.jsonl")
    for row in found:
        scores, labels = row["scores"], row["labels"]
        right = scores is not None and scores[labels.index(1.0)] > scores[labels.index(0.0)]
        assert row["reward"] == (1 if right else -1)
        written = re.findall(r"-?\d+", row["text"].rpartition("boxed")[2])
        assert scores is None or scores == [min(max(int(number), 1), 10) for number in written]
    assert {row["reward"] for row in found} == {1, -1}


def test_items_that_are_too_easy_are_left_out(whole, place, lines):
    seen = {row["id"] for row in rows_of(Path(whole.output) / "samples.jsonl")}
    assert len(seen) > 5
    assert not seen & set(EASY)
    items = labelled.load(Items(files=(str(place / "items.jsonl"),)), 0).train
    assert [e.id for e in hard_enough(items, whole.samples)] == [e.id for e in items if e.id not in EASY]
    assert lines[-1] == f"10 of 30 items are too easy by {whole.samples}"
    assert hard_enough(items, None) == items
    with pytest.raises(ValueError, match="all 10 items are right every time"):
        hard_enough([e for e in items if e.id in EASY], whole.samples)


KILLED = """
import os, signal, sys
from grm_jax.main import main
from grm_jax.metrics import Metrics
write = Metrics.write
def until_five(self, step, *rest):
    write(self, step, *rest)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
Metrics.write = until_five
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(whole):
    recipe = replace(whole, output=f"{whole.output}-killed")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *command(recipe)], env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [row["step"] for row in rows_of(Path(recipe.output) / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert not (Path(recipe.output) / "model").exists()
    assert main(command(recipe)) == 0
    assert outcome(recipe.output) == outcome(whole.output)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 3), (signal.SIGINT, 3), (signal.SIGTERM, 5)])
def test_a_signal_saves_ends_the_command_with_130_and_it_goes_on(whole, number, step, monkeypatch, capsys):
    """130 as for every interrupted command: a script must not go on to the next stage with no model to start from.

    The row of a step is written during the next one: here steps 4 and 6, after which a measurement is due too.
    """
    recipe = replace(whole, output=f"{whole.output}-{number.name}-{step}")
    real = Metrics.write

    def write(self, at, *rest):
        real(self, at, *rest)
        if at == step:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", write)
        code = main(command(recipe))
    said = capsys.readouterr().err
    folder = Path(recipe.output)
    assert code == 130
    assert f"asked to stop: step {step + 1} is saved, the same command goes on there" in said
    assert max(int(path.name) for path in (folder / "checkpoints").iterdir()) == step + 1
    assert not (folder / "model").exists()
    assert main(command(recipe)) == 0
    assert outcome(recipe.output) == outcome(whole.output)


def test_a_signal_during_a_measurement_saves_the_step_before_it(whole, monkeypatch, capsys):
    """No checkpoint is due where it comes, and the measurement may be longer than the time that is left."""
    recipe = replace(whole, output=f"{whole.output}-measured", checkpoints=Checkpoints(every=3, keep_last=3))
    real, seen = runs.Run.heeded, []

    def heeded(self, verdicts, done):
        if done == 4:
            signal.raise_signal(signal.SIGTERM)
        for verdict in real(self, verdicts, done):
            seen.append(done)
            yield verdict

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "heeded", heeded)
        assert main(command(recipe)) == 130
    assert "asked to stop: step 4 is saved, the same command goes on there" in capsys.readouterr().err
    assert set(seen) == {0, 2}
    assert max(int(path.name) for path in (Path(recipe.output) / "checkpoints").iterdir()) == 4
    assert main(command(recipe)) == 0
    assert outcome(recipe.output) == outcome(whole.output)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_fine_tuning_goes_on_after_an_error(tuned, step, monkeypatch):
    """At step 1 nothing is saved yet but the trajectories."""
    recipe = replace(tuned, output=f"{tuned.output}-{step}")
    real = Metrics.write

    def write(self, at, *rest):
        real(self, at, *rest)
        if at == step:
            raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", write)
        with pytest.raises(OSError, match="the disk is full"):
            rft.run(recipe)
    rft.run(recipe)
    assert outcome(recipe.output) == outcome(tuned.output)


def copied(recipe: RlConfig, name: str) -> RlConfig:
    shutil.copytree(recipe.output, f"{recipe.output}-{name}")
    return replace(recipe, output=f"{recipe.output}-{name}")


def test_a_run_that_is_over_changes_nothing_when_it_is_started_again(whole):
    recipe = copied(whole, "again")
    rl.run(replace(recipe, checkpoints=Checkpoints(every=3), log_samples_every=0))
    assert outcome(recipe.output) == outcome(whole.output)


def test_a_damaged_checkpoint_is_skipped(whole, lines):
    recipe = copied(whole, "damaged")
    steps = Path(recipe.output) / "checkpoints"
    os.truncate(steps / "6/run/metadata", 50)
    shutil.rmtree(Path(recipe.output) / "model")
    rl.run(recipe)
    (said,) = [line for line in lines if "does not restore" in line]
    assert said.startswith(f"step 6 does not restore, moved to {steps}/damaged-6: ")
    assert f"going on behind step 4 of {recipe.output}" in lines
    assert outcome(recipe.output) == outcome(whole.output)


def test_fewer_steps_than_are_done_are_refused(tuned):
    recipe = replace(copied(tuned, "fewer"), steps=2)
    with pytest.raises(ValueError, match=r"has a checkpoint of step 6, steps = 2: give 6 or more, or another output"):
        rft.run(recipe)


def test_a_trace_holds_a_whole_step(monkeypatch):
    """A step is dispatched, and done later: the trace begins when the one before is, and ends when this one is."""
    seen = []

    @contextlib.contextmanager
    def trace(folder):
        seen.append(folder)
        yield
        seen.append("written")

    monkeypatch.setattr(jax, "block_until_ready", lambda state: seen.append(state))
    monkeypatch.setattr(jax.profiler, "trace", trace)
    run = SimpleNamespace(state="before", recipe=SimpleNamespace(profile=(3,), output="out"))
    for step in (2, 3):
        with runs.Run.traced(run, step):
            run.state = f"after {step}"
    assert seen == ["after 2", "out/profile/step-3", "after 3", "written"]


def test_another_recipe_does_not_go_on(whole):
    recipe = copied(whole, "other")
    with pytest.raises(ValueError, match=r"started otherwise: kl_coef was 0\.08, is 0\.5\. Give another output"):
        rl.run(replace(recipe, kl_coef=0.5))
    with pytest.raises(ValueError, match="seed was 0, is 1; steps was 6, is 7"):
        rl.run(replace(recipe, seed=1, steps=7))
    assert outcome(recipe.output) == outcome(whole.output)


def last_weights(recipe: RlConfig | RftConfig, reference: bool) -> tuple[start.Start, dict[str, jax.Array]]:
    """What the run began with, and what its last checkpoint holds."""
    begun = start.load(recipe, reference)
    state = training.start(begun.params, training.make_optimizer(recipe.optimizer, recipe.steps), begun.policy.mesh)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with Saver.open(recipe.output, recipe.checkpoints, as_json(recipe)) as saver:
        step, state, _ = saver.restore(target)
    assert step == int(state.step) == recipe.steps
    return begun, state.params


def assert_converts(output: str) -> None:
    """The last checkpoint, converted, is the model that the run wrote, and an earlier one is not."""
    folder = Path(output)
    for name, more in (("last", []), ("early", ["--step", "2"])):
        assert main(["convert", "--model", output, "--output", str(folder / name), *more]) == 0
    written, last, early = (
        {file.name: file.read_bytes() for file in (folder / name).iterdir()} for name in ("model", "last", "early")
    )
    assert last == written
    assert early.keys() == written.keys()
    assert early["model.safetensors"] != written["model.safetensors"]


TOKENS = np.random.default_rng(0).integers(3, 259, (2, 40))


def test_fine_tuning_keeps_right_trajectories_and_saves_what_it_learned(tuned, base):
    folder = Path(tuned.output)
    unhinted, hinted = (read_samples(str(folder / f"trajectories{end}.jsonl")) for end in ("", "-hinted"))
    assert (len(unhinted), len(hinted)) == (24, 12)
    assert {s.hinted for s in unhinted} == {False}
    assert {s.hinted for s in hinted} == {True}
    assert {s.correct for s in unhinted} == {True, False}
    assert [row["step"] for row in rows_of(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    begun, params = last_weights(tuned, reference=False)
    saved = grm_jax.load(str(folder / "model"), dtype="float32")
    np.testing.assert_array_equal(saved.logits(TOKENS), begun.judge(params).logits(TOKENS))
    assert not np.array_equal(saved.logits(TOKENS), grm_jax.load(base, dtype="float32").logits(TOKENS))
    assert saved.tokenizer.encode("a\\boxed{1}") == ByteTokenizer().encode("a\\boxed{1}")
    assert_converts(tuned.output)


def test_nothing_kept_is_an_error_with_a_way_out(place, base):
    recipe = rft_recipe(place, base, "nothing", hinted=0, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"all 24 trajectories were rejected \(24 unparsed\): .* \(sample_template = "):
        rft.run(recipe)


def test_templates_are_held_against_the_items_before_a_model_is_loaded(place, tmp_path):
    bare = tmp_path / "bare.txt"
    bare.write_text(Path(TEMPLATE).read_text().partition("{%- if hint %}")[0])
    for fields, said in (
        ({"template": str(bare)}, r"\d+ items do not fit their template:.*does not show 'hint'"),
        ({"template": str(tmp_path / "typo.txt"), "sample_template": TEMPLATE}, "typo.txt"),
    ):
        recipe = rft_recipe(place, str(tmp_path / "no model"), "early", **fields)
        with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){said}"):
            rft.run(recipe)
        assert not Path(recipe.output).exists()


def test_a_folder_of_another_run_is_refused_before_a_model_is_loaded(place, tuned, tmp_path):
    recipe = replace(tuned, model=str(tmp_path / "no model"), seed=5)
    with pytest.raises(ValueError, match="was started otherwise"):
        rft.run(recipe)


def test_conversations_that_the_chat_template_refuses_are_named_before_sampling():
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    tokenizer = Tokenizer(ByteVocab(), 256, (257,), template + "{% for m in messages %}{{ m.content }}{% endfor %}")
    good = Chat("good", (Message("user", "a"), Message("assistant", "b")))
    bad = Chat("bad-7", (Message("assistant", "a"), Message("user", "b"), Message("assistant", "c")))
    rft._check_turns([good, good], tokenizer)
    with pytest.raises(ValueError, match=r"general instruction 'bad-7': turns .* user first.*, or leave such out"):
        rft._check_turns([good, bad], tokenizer)


def test_a_measurement_of_a_scalar_model_looks_whether_to_stop(monkeypatch):
    """Before each batch of texts, and what it finds is the run's own: saved, and left."""
    heeded = []
    run = SimpleNamespace(
        recipe=SimpleNamespace(steps=4, eval_every=2), known=(), reported=lambda write: None, begun=None,
        state=SimpleNamespace(params=None), heed=heeded.append,
    )  # fmt: skip

    def logits(begun, params, encoded, heed):
        heed()
        raise KeyboardInterrupt

    monkeypatch.setattr("grm_jax.spct.scalar.logits_of", logits)
    with pytest.raises(KeyboardInterrupt):
        meta._measure([None], [([1], [2])], run, 2)
    assert heeded == [2]


def test_storage_that_fails_is_no_bad_input(monkeypatch, capsys):
    """2 is what a supervisor does not try again; 75 it does."""
    for said, code in (("UNAVAILABLE: Error writing", LOST), ("OUT_OF_RANGE: Error writing", LOST), ("steps = 0", 2)):

        def fails(argv, said=said):
            raise ValueError(said)

        monkeypatch.setitem(COMMANDS, "score", fails)
        assert main(["score"]) == code
        assert said in capsys.readouterr().err


def test_hinted_trajectories_are_trained_under_the_prompt_without_a_hint(place, base, monkeypatch):
    recipe = rft_recipe(place, base, "hinted", trajectories=0, hinted=4, general=(), general_share=0.0)
    found = labelled.load(recipe.items, recipe.seed)
    begun, asked, real = start.load(recipe, reference=False), {}, judging.sample

    def watched(model, requests, *rest):
        for completion in real(model, requests, *rest):
            asked[completion.item, completion.sample] = begun.tokenizer.decode(completion.request.prompt)
            yield completion

    monkeypatch.setattr(judging, "sample", watched)
    kept = rft.collect(recipe, found, begun)
    trajectories, _ = mixture(recipe, begun.tokenizer, kept, [], lambda _: prompts.load_template(TEMPLATE))
    assert len(kept) > 0
    assert (trajectories.records, trajectories.share) == (kept, 1.0)
    for sample in kept:
        ids, answer = trajectories.encode(sample)
        prompt, told = begun.tokenizer.decode(ids), asked[judging.stable_hash(sample.id), sample.sample]
        best = sample.order.index(sample.labels.index(1.0)) + 1  # as shown
        assert told == prompt.replace("}", f"}}{HINT}{best}") != prompt
        assert HINT not in prompt
        assert begun.tokenizer.decode(answer[:-1]) == sample.text
        assert answer[-1] in begun.tokenizer.eos_ids


@pytest.mark.slow
def test_adapters_are_trained_beside_a_base_that_stays(place, base):
    before = {path.name: path.read_bytes() for path in Path(base).iterdir()}
    recipe = rl_recipe(
        place, base, "lora", lora=Lora(rank=2, alpha=4.0), samples=None, steps=4, eval_every=0, kl_coef=0.0
    )
    rl.run(recipe)
    assert {path.name: path.read_bytes() for path in Path(base).iterdir()} == before
    folder = Path(recipe.output)
    adapters = load_file(folder / "adapters/adapter_model.safetensors")
    assert len(adapters) == 2 * 2 * 7  # A and B of seven matrices of two layers
    assert {min(a.shape) for a in adapters.values()} == {2}
    assert any(np.abs(a).max() > 0 for name, a in adapters.items() if "lora_B" in name), "B begins at zero"
    begun, params = last_weights(recipe, reference=False)
    assert all(".lora_" in name for name in params)
    last = begun.judge(params).logits(TOKENS)
    np.testing.assert_array_equal(grm_jax.load(str(folder / "model"), dtype="float32").logits(TOKENS), last)
    np.testing.assert_array_equal(grm_jax.load(str(folder / "adapters"), dtype="float32").logits(TOKENS), last)
    assert not np.array_equal(grm_jax.load(base, dtype="float32").logits(TOKENS), last)
    assert_converts(recipe.output)


def test_measurements_hold_verdicts_against_labels(whole, place):
    """Worked out again from the same judge's verdicts."""
    held_out = labelled.load(whole.items, whole.seed).held_out
    grm = grm_jax.load(str(Path(whole.output) / "model"), dtype="float32")
    settings = {"temperature": 0.5, "max_new_tokens": 14, "force_scores": False, "slots": 64, "template": TEMPLATE}
    verdicts = grm.score(held_out, votes=1, **settings)
    row = rows_of(Path(whole.output) / "held_out.jsonl")[-1]
    assert row["examples"] == len(held_out) == 3
    assert row["accuracy"] == pytest.approx(np.mean([worth_of(*pair) for pair in zip(held_out, verdicts, strict=True)]))
    assert row["failures"] == pytest.approx(1 - np.mean([v.valid for v in verdicts]))
    assert row["ties"] == pytest.approx(np.mean([v.tie for v in verdicts]))
    assert row["longer"] == 0.5  # all responses are as long
    assert row["low"] <= row["accuracy"] <= row["high"]
