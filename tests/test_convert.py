"""`convert`: what goes in comes out bit for bit, through every format; steps of training runs; what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 - safetensors looks bfloat16 up in numpy
import numpy as np
import pytest
from checkpoints import FAMILIES, GOLDENS, assert_same, copy_of, load, tensors_in
from test_gguf import QuantType, pad_rows_to, write_gguf
from test_save import SOME, adapters_of, drawn
from tiny import LLAMA

import grm_jax
from grm_jax import convert, scalar_rm, steps
from grm_jax.checkpoint import Saver
from grm_jax.main import main
from grm_jax.models.decoder import split_abstract
from grm_jax.recipes import Checkpoints, Fresh, Lora, Optimizer, RftConfig, as_json
from grm_jax.sharding import make_mesh
from grm_jax.spct import start
from grm_jax.tokenizer import ByteTokenizer
from grm_jax.train import policy as training
from grm_jax.weights import orbax, write
from grm_jax.weights.adapters import load_adapters, save_adapters
from grm_jax.weights.load import read_config, stored_dtype
from grm_jax.weights.save import save_hf

EVERYTHING = [*FAMILIES, "gemma2_classifier"]


def converted(model: Path | str, output: Path, *more: str) -> Path:
    assert main(["convert", "--model", str(model), "--output", str(output), *more]) == 0
    return output


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def assert_same_tensors(found: Path, expected: Path) -> None:
    """Names, shapes, dtypes and bits."""
    one, other = tensors_in(found), tensors_in(expected)
    assert {n: (t.shape, t.dtype) for n, t in one.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}
    for name, tensor in other.items():
        np.testing.assert_array_equal(one[name].view(np.uint8), tensor.view(np.uint8), err_msg=name)


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer."""
    folder = tmp_path_factory.mktemp("judge")
    save_hf(folder, LLAMA, drawn(LLAMA), ByteTokenizer(), None, "float32")
    return folder


# ---- formats ----


@pytest.mark.parametrize("family", EVERYTHING)
def test_in_and_out_and_in_again_bit_for_bit(tmp_path: Path, family: str) -> None:
    """Hugging Face -> Orbax -> Hugging Face in several files -> one file: each has the tensors that transformers wrote."""
    golden = GOLDENS / family
    kept = converted(golden, tmp_path / "orbax", "--to", "orbax")
    cut = converted(kept, tmp_path / "cut", "--shard-gb", "2e-5")
    again = converted(cut, tmp_path / "again")
    dtype = json.loads((golden / "config.json").read_text())["dtype"]
    for folder in (kept, cut, again):
        assert stored_dtype(folder) == dtype
        assert json.loads((folder / "config.json").read_text()) == json.loads((golden / "config.json").read_text())
        assert_same(load(folder, dtype), load(golden, dtype))
    assert_same_tensors(cut, golden)
    assert_same_tensors(again, golden)
    assert len(list(cut.glob("*.safetensors"))) > 2
    weight_map = json.loads((cut / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == tensors_in(golden).keys()
    assert sorted(file.name for file in again.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    first = converted(GOLDENS / "qwen3", tmp_path / "first", "--dtype", dtype)
    expected = {n: np.asarray(v).astype(jnp.dtype(dtype)) for n, v in load(GOLDENS / "qwen3").items()}
    assert_same(load(first, dtype), expected)
    assert json.loads((first / "config.json").read_text())["dtype"] == dtype
    kept = converted(first, tmp_path / "orbax", "--to", "orbax")
    assert stored_dtype(kept) == dtype
    assert_same_tensors(converted(kept, tmp_path / "again"), first)


def test_the_default_dtype_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed types and quantised blocks are float32; rotary frequencies of old checkpoints say nothing of the weights."""

    def mixed(config: dict, tensors: dict) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32) + np.float32(2**-20)

    def with_frequencies(config: dict, tensors: dict) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    assert stored_dtype(copy_of("gemma2", tmp_path / "old", with_frequencies)) == "bfloat16"
    folder = copy_of("gemma2", tmp_path / "mixed", mixed)
    assert_same(load(converted(folder, tmp_path / "whole")), load(folder))
    monkeypatch.setattr(convert, "tokenizer_of", lambda path: None)
    plain = copy_of("llama", tmp_path / "llama", pad_rows_to(32))
    for kind in (QuantType.F32, QuantType.Q8_0):
        file = write_gguf(tmp_path / f"{kind.name}.gguf", plain, {"rope.dimension_count": 16}, kind)
        assert_same(load(converted(file, tmp_path / kind.name)), load(file))
    assert_same(load(tmp_path / "F32"), load(plain))


def test_tokenizers_go_along(judge: Path, tmp_path: Path) -> None:
    kept = converted(judge, tmp_path / "orbax", "--to", "orbax")
    again = converted(kept, tmp_path / "again")
    assert bytes_in(again) == bytes_in(judge)
    assert {name: text for name, text in bytes_in(judge).items() if name != "model.safetensors"} == bytes_in(kept)


def test_an_orbax_folder_is_a_model(judge: Path, tmp_path: Path) -> None:
    """For --model, on several devices too, and as the base of adapters."""
    kept = converted(judge, tmp_path / "orbax", "--to", "orbax")
    ids = np.arange(20).reshape(1, 20)
    found, expected = grm_jax.load(str(kept)), grm_jax.load(str(judge))
    np.testing.assert_array_equal(found.logits(ids), expected.logits(ids))
    spread = grm_jax.load(str(kept), mesh=make_mesh(data=2))
    assert spread.model.params["embed"].sharding.mesh.size == 2
    assert_same(spread.model.params, expected.model.params)
    save_adapters(tmp_path / "adapters", LLAMA, adapters_of(LLAMA), SOME, str(kept))
    assert len(load_adapters(tmp_path / "adapters")[2]) == 12


def test_a_scalar_models_template_goes_along(tmp_path: Path) -> None:
    folder = copy_of("gemma2_classifier", tmp_path / "first")
    (folder / scalar_rm.TEMPLATE_FILE).write_text("mine")
    kept = converted(folder, tmp_path / "orbax", "--to", "orbax")
    again = converted(kept, tmp_path / "again")
    assert (again / scalar_rm.TEMPLATE_FILE).read_text() == "mine"
    assert read_config(again).scalar
    converted(GOLDENS / "gemma2_classifier", again, "--overwrite")
    assert not (again / scalar_rm.TEMPLATE_FILE).exists()


@pytest.mark.slow
def test_the_embedded_model(tmp_path: Path) -> None:
    kept = converted("smollm2-135m", tmp_path / "orbax", "--to", "orbax")
    again = converted(kept, tmp_path / "hf", "--shard-gb", "0.1")
    ids = np.arange(1, 40).reshape(1, 39)
    found, expected = (grm_jax.load(str(model), dtype="float32") for model in (again, "smollm2-135m"))
    assert_same(found.model.params, expected.model.params)
    np.testing.assert_array_equal(found.logits(ids), expected.logits(ids))


# ---- adapters ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_merged_as_a_judge_merges_them(judge: Path, tmp_path: Path, dtype: str) -> None:
    adapted = tmp_path / "adapters"
    save_adapters(adapted, LLAMA, adapters_of(LLAMA), SOME, str(judge))
    merged = converted(adapted, tmp_path / "merged", "--dtype", dtype)
    assert_same(load(merged, dtype), grm_jax.load(str(adapted), dtype=dtype).model.params)
    # Whichever base they name.
    described = json.loads((adapted / "adapter_config.json").read_text())
    (adapted / "adapter_config.json").write_text(json.dumps(described | {"base_model_name_or_path": "org/elsewhere"}))
    other = converted(judge, tmp_path / "other", "--adapters", str(adapted), "--dtype", dtype)
    assert bytes_in(other) == bytes_in(merged)


# ---- training runs ----

SMALL = Fresh(dim=32, layers=1, heads=2, mlp_dim=64, max_positions=128)


def trained(output: Path, model: str, lora: Lora, scale: float = 1.0) -> dict[int, Path]:
    """A run's folder as `rft` leaves it, its weights drawn instead of trained: a checkpoint and the model of each step."""
    recipe = RftConfig(
        *(str(output), model), general=("x.jsonl",), general_share=1.0, lora=lora, fresh=SMALL,
        compute_dtype="float32",
    )  # fmt: skip
    begun = start.load(recipe, reference=False)
    optimizer = training.make_optimizer(Optimizer(), 4)
    found = {}
    with Saver.open(str(output), Checkpoints(keep_last=9), as_json(recipe)) as saver:
        for count in (2, 4):
            rng = np.random.default_rng(count)
            params = {
                name: jax.device_put(jnp.asarray(scale * rng.standard_normal(value.shape), jnp.float32), value.sharding)
                for name, value in begun.params.items()
            }
            state = training.start(params, optimizer, begun.policy.mesh)
            saver.save(count, state, {"batches": 0})
            start.save(begun, state, str(output / f"at-{count}"))
            found[count] = output / f"at-{count}" / "model"
    return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh models are drawn by numpy: nothing is compiled."""

    def drawn(config, seed, dtype):
        rng = np.random.default_rng(seed)
        shapes = split_abstract(config)[1]
        return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, (shape, _) in shapes.items()}

    for module in (start, convert):
        monkeypatch.setattr(module, "random_params", drawn)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("rank", "fresh"), [(0, False), (2, False), (2, True)])
def test_a_step_is_the_model_that_the_run_wrote_then(judge: Path, tmp_path: Path, rank: int, fresh: bool) -> None:
    run = tmp_path / "run"
    models = trained(run, "fresh" if fresh else str(judge), Lora(rank=rank, targets=("q", "down")))
    assert bytes_in(models[2]) != bytes_in(models[4])
    assert bytes_in(converted(run, tmp_path / "last")) == bytes_in(models[4])
    assert bytes_in(converted(run, tmp_path / "early", "--step", "2")) == bytes_in(models[2])
    if not fresh:
        one = Path(shutil.move(run / "checkpoints" / "2", tmp_path / "elsewhere"))
        kept = converted(one, tmp_path / "kept", "--to", "orbax")
        assert bytes_in(converted(kept, tmp_path / "again")) == bytes_in(models[2])


def test_a_runs_base_that_has_moved(judge: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    base = Path(shutil.copytree(judge, tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    models = trained(tmp_path / "run", "base", Lora())
    base.rename(tmp_path / "moved")
    assert main(["convert", "--model", "run", "--output", "out"]) == 2
    said = capsys.readouterr().err
    assert "run was trained from base, which is not there: go to the folder that the run was started in, or" in said
    assert not (tmp_path / "out").exists()
    assert bytes_in(converted("run", tmp_path / "out", "--base", "moved")) == bytes_in(models[4])
    assert main(["convert", "--model", "run", "--output", "other", "--base", str(GOLDENS / "llama")]) == 2
    assert "holds weights of another model than" in capsys.readouterr().err
    assert main(["convert", "--model", "run", "--output", "moved", "--base", "moved", "--overwrite"]) == 2
    assert "output = moved is what is read from" in capsys.readouterr().err
    assert bytes_in(tmp_path / "moved") == bytes_in(judge)


@pytest.mark.usefixtures("quick")
def test_damaged_steps_are_named(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    trained(run, "fresh", Lora())
    command = ["convert", "--model", str(run), "--output", str(tmp_path / "out")]
    assert main([*command, "--step", "3"]) == 2
    assert "has no step 3: it has 2, 4" in capsys.readouterr().err
    step = steps.find(run, None)
    digests = {name: (*kind[:2], kind[2] ^ (name == "norm")) for name, kind in step._arrays.items()}
    with pytest.raises(ValueError, match=r"step 4, .*the values of norm are not .* Give another --step: 2"):
        dataclasses.replace(step, _arrays=digests).read(jnp.dtype("float32"), jax.devices()[0])
    for file in (run / "checkpoints" / "4" / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-50])
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "error: step 4," in said
    assert said.count("\n") < 4
    record = run / "checkpoints" / "4" / "run" / "metadata"
    record.write_text(record.read_text().replace('"general_share": 1.0', '"general_share": 0.5'))
    assert main(command) == 2
    assert "is not what was saved. Give another --step: 2" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    (run / "recipe.json").write_text("{}")
    assert main(command) == 2
    assert "holds no finished step: the run has saved nothing yet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- what is refused, and what is left of it ----


def test_bad_input_is_named(judge: Path, tmp_path: Path, capsys) -> None:
    save_adapters(tmp_path / "adapters", LLAMA, adapters_of(LLAMA), SOME, str(judge))
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    new = str(tmp_path / "new")
    for args, said in (
        (["nowhere", new], "nowhere does not exist; give a Hugging Face model folder"),
        ([str(tmp_path / "full"), new], "has no config.json"),
        ([str(judge), str(tmp_path / "file")], "is a file: give a folder"),
        (
            [str(judge), str(tmp_path / "full")],
            "is not empty (no whole model: it has no config.json): give another folder",
        ),
        ([str(judge), str(judge), "--overwrite"], "is what is read from: give another folder"),
        ([str(tmp_path / "adapters"), str(judge), "--overwrite"], "is made from: give another folder"),
        ([str(judge), str(tmp_path / "adapters"), "--overwrite"], "holds LoRA adapters: give another folder"),
        ([str(judge), new, "--step", "3"], "step = 3, but"),
        ([str(judge), new, "--base", "x"], "is no training run: leave it out"),
        ([str(judge), new, "--step", "-1"], "step = -1: it has to be at least 0"),
        ([str(judge), new, "--shard-gb", "0"], "shard_gb = 0.0: it has to be above 0"),
        ([str(judge), new, "--adapters", str(judge)], "has no adapter_config.json"),
        (
            [str(GOLDENS / "llama"), new, "--adapters", str(tmp_path / "adapters")],
            "these adapters are of another model",
        ),
    ):
        model, output, *more = args
        assert main(["convert", "--model", model, "--output", output, *more]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
        assert not Path(new).exists()
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert (judge / "config.json").exists()


def test_it_is_one_process(judge: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    for name, value in (("COORDINATOR_ADDRESS", "127.0.0.1:9"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
        monkeypatch.setenv(f"JAX_{name}", value)
    assert main(["convert", "--model", str(judge), "--output", str(tmp_path / "out")]) == 2
    assert "convert is one process, which writes everything" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("kind", ["hf", "orbax"])
@pytest.mark.parametrize("old", [True, False])
def test_nothing_is_left_of_a_conversion_cut_short(judge, tmp_path, monkeypatch, error, kind, old) -> None:
    output, seen = tmp_path / "out", []
    if old:
        converted(judge, output, "--to", "hf" if kind == "orbax" else "orbax")
        (output / "README.md").write_text("mine")
    if kind == "hf":
        to_host = write.to_host

        def failing(*args):
            seen.append(args)
            if len(seen) == 5:
                raise error
            return to_host(*args)

        monkeypatch.setattr(write, "to_host", failing)
    else:
        written = orbax.write

        def failing(*args):
            written(*args)
            raise error

        monkeypatch.setattr(orbax, "write", failing)
    asked = convert.ConvertConfig(str(judge), str(output), kind, shard_gb=1e-5, overwrite=True)
    with pytest.raises(type(error)):
        convert.run(asked)
    assert (sorted(file.name for file in output.iterdir()) if old else output.exists()) == (
        ["README.md"] if old else False
    )


def test_an_orbax_folder_cut_off(judge: Path, tmp_path: Path, capsys) -> None:
    """As a killed process leaves it, or a copy of half of it: it does not load, and --overwrite takes it away."""
    kept = converted(judge, tmp_path / "orbax", "--to", "orbax")
    whole = shutil.copytree(kept, tmp_path / "whole")
    (kept / "config.json").unlink()
    (kept / "params").rename(kept / "params.orbax-checkpoint-tmp")
    (kept / ".model-00001-of-00009.safetensors.writing").write_text("half")
    assert main(["convert", "--model", str(kept), "--output", str(tmp_path / "x")]) == 2
    assert "has no config.json" in capsys.readouterr().err
    converted(judge, kept, "--overwrite")
    assert bytes_in(kept) == bytes_in(judge)
    assert {file.name for file in kept.iterdir()} == bytes_in(judge).keys()
    for file in (whole / "params" / "d").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"params is no complete Orbax checkpoint: .*; write it again"):
        load(whole)


def test_orbax_weights_of_another_config(judge: Path, tmp_path: Path) -> None:
    kept = converted(judge, tmp_path / "orbax", "--to", "orbax")
    config = json.loads((kept / "config.json").read_text())
    for change, message in (
        ({"intermediate_size": 65}, r"mlp\.down has shape \(32, 64\), its config asks for \(32, 65\)"),
        ({"num_hidden_layers": 1}, r"parameters \[\] are missing, \['layers\.1\."),
    ):
        (kept / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load(kept)


IN_A_BUCKET = """
import sys
from grm_jax.main import main
model, output = sys.argv[1:]
asked = ["convert", "--model", model, "--output", "gs://judge/orbax", "--to", "orbax"]
assert [main(asked), main(asked)] == [0, 2]
assert main(["convert", "--model", "gs://judge/orbax", "--output", output]) == 0
"""


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the emulator's sockets
def test_conversions_in_a_bucket(judge: Path, tmp_path: Path, bucket: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_BUCKET, str(judge), str(tmp_path / "again")],
        capture_output=True, text=True, env=os.environ | bucket, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert bytes_in(tmp_path / "again") == bytes_in(judge)
    assert "gs://judge/orbax is not empty: give another folder" in done.stderr
