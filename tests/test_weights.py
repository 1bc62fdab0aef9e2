"""Weights from safetensors: every tensor used once, any sharding and type, little memory, and errors that help."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import FAMILIES, GOLDENS, assert_same, copy_of, load, targets_of, tensors_in
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from grm_jax.weights import names, placement
from grm_jax.weights.load import load_params, read_config


def test_llama_tensors_fill_the_parameters_they_name() -> None:
    """The table by hand for one block; the logits' goldens hold all the others."""
    stored, params = tensors_in(GOLDENS / "llama"), load(GOLDENS / "llama")
    block = "model.layers.1."
    for path, name in {
        "embed": "model.embed_tokens.weight",
        "head": "lm_head.weight",
        "norm": "model.norm.weight",
        "layers.1.norm_attention": block + "input_layernorm.weight",
        "layers.1.norm_mlp": block + "post_attention_layernorm.weight",
        "layers.1.mlp.down": block + "mlp.down_proj.weight",
    }.items():
        np.testing.assert_array_equal(params[path], stored[name].astype(np.float32), err_msg=path)
    q, o = params["layers.1.attention.q"], params["layers.1.attention.o"]
    assert q.shape == (4, 16, 32)
    assert o.shape == (32, 4, 16)
    np.testing.assert_array_equal(q[3, 5], stored[block + "self_attn.q_proj.weight"][3 * 16 + 5].astype(np.float32))
    np.testing.assert_array_equal(o[7, 2], stored[block + "self_attn.o_proj.weight"][7, 32:48].astype(np.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_the_file_is_loaded_once(family: str) -> None:
    stored, params = tensors_in(GOLDENS / family), load(GOLDENS / family)
    assert sum(p.size for p in params.values()) == sum(t.size for t in stored.values())
    assert sum(float(np.abs(p).sum()) for p in params.values()) == pytest.approx(
        sum(float(np.abs(t.astype(np.float64)).sum()) for t in stored.values()), rel=1e-5
    )


def test_shards_and_single_file_agree(tmp_path: Path) -> None:
    assert len(list((GOLDENS / "qwen2").glob("*.safetensors"))) == 3
    assert_same(load(copy_of("qwen2", tmp_path)), load(GOLDENS / "qwen2"))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_floats_convert_to_nearest(dtype) -> None:
    found, stored = load(GOLDENS / "qwen3", dtype), tensors_in(GOLDENS / "qwen3")
    assert {p.dtype for p in found.values()} == {jnp.dtype(dtype)}
    down = stored["model.layers.0.mlp.down_proj.weight"].astype(dtype)
    np.testing.assert_array_equal(np.asarray(found["layers.0.mlp.down"]), down)


def test_parameters_arrive_in_the_sharding_asked_for(tmp_path: Path) -> None:
    """Rows, columns, both, and replicas over 2 x 4 devices; a head axis split where it divides."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
    config, plain = read_config(GOLDENS / "gemma2"), load(GOLDENS / "gemma2")
    specs = {
        "embed": PartitionSpec(("x", "y"), None),
        "norm": PartitionSpec("y"),
        "layers.0.attention.q": PartitionSpec("y", None, "x"),
        "layers.0.attention.k": PartitionSpec("x", "y"),
        "layers.0.attention.o": PartitionSpec(None, "y", "x"),
        "layers.1.mlp.down": PartitionSpec("x", "y"),
    }
    targets = {
        path: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=NamedSharding(mesh, specs.get(path, PartitionSpec())))
        for path, t in targets_of(config).items()
    }
    found = load_params(GOLDENS / "gemma2", targets)
    assert_same(found, plain)
    for path, target in targets.items():
        assert found[path].sharding == target.sharding
    assert found["layers.0.attention.q"].addressable_shards[0].data.shape == (1, 16, 16)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), slab=st.integers(1, 200))
def test_place_equals_device_put(data: st.DataObject, slab: int) -> None:
    """Any shape, any sharding, any slab size: the same array as jax makes from the whole, each row read once."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    shape = tuple(data.draw(st.lists(st.integers(1, 3).map(lambda n: 4 * n), min_size=1, max_size=3)))
    axes = data.draw(st.permutations(["x", "y", None, None]))[: len(shape)]
    whole = np.random.default_rng(0).standard_normal(shape, np.float32)
    target = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
    read = []

    def rows(start: int, stop: int) -> np.ndarray:
        read.extend(range(start, stop))
        return whole[start:stop]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "SLAB_BYTES", slab)
        found = placement.place(target, rows)
    assert read == list(range(shape[0]))
    assert found.sharding == target.sharding
    np.testing.assert_array_equal(np.asarray(found), whole.astype(ml_dtypes.bfloat16))


# ---- what must fail, and say so ----


def add(name: str, value: np.ndarray) -> Callable[[dict, dict], None]:
    return lambda config, tensors: tensors.update({name: value})


def drop(name: str) -> Callable[[dict, dict], None]:
    return lambda config, tensors: tensors.pop(name)


ONE = np.ones((1, 32), np.float32)


@pytest.mark.parametrize(
    ("family", "edit", "message"),
    [
        ("gemma2", add("score.weight", ONE), r"no parameter takes score\.weight"),
        ("qwen3", add("model.layers.2.mlp.up_proj.weight", ONE), r"no parameter takes model\.layers\.2\.mlp"),
        ("qwen3", drop("model.layers.1.self_attn.k_norm.weight"), r"has no model\.layers\.1\.self_attn\.k_norm"),
        ("llama", drop("lm_head.weight"), r"has no lm_head\.weight"),
        ("qwen3", add("model.norm.weight", np.ones(31, np.float32)), r"model\.norm\.weight has shape \(31,\).*\(32,\)"),
        ("qwen3", add("model.norm.weight", np.ones(32, np.int32)), r"model\.norm\.weight is I32, known are F64"),
        ("qwen3", add("lm_head.weight", np.ones((96, 32), np.float32)), r"lm_head\.weight differs from model\.embed"),
        ("llama", lambda config, tensors: config.update(num_hidden_layers=3), r"has no model\.layers\.2\..*and 4 more"),
    ],
)
def test_single_file_errors(tmp_path: Path, family: str, edit: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(copy_of(family, tmp_path, edit))


def test_identical_output_head_of_a_tied_model_and_old_buffers_are_accepted(tmp_path: Path) -> None:
    def edit(config: dict, tensors: dict) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    assert_same(load(copy_of("qwen3", tmp_path, edit)), load(GOLDENS / "qwen3"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDENS / "qwen2", tmp_path / "qwen2"))


def test_identical_output_head_in_another_shard(sharded: Path) -> None:
    """Tied, with the head stored in the last file and the embedding in the first: compared across files."""
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["lm_head.weight"] != index["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(sharded)
    last = sharded / index["lm_head.weight"]
    embedding = tensors_in(sharded)["model.embed_tokens.weight"]
    save_file(load_file(last) | {"lm_head.weight": embedding}, last)
    np.testing.assert_array_equal(load(sharded)["embed"], embedding)


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-00002-of-00003\.safetensors, not there"):
        load(sharded)


def test_shard_and_index_that_disagree(sharded: Path) -> None:
    file = sharded / "model-00003-of-00003.safetensors"
    whole = load_file(file)
    save_file(whole | {"extra": ONE}, file)
    with pytest.raises(ValueError, match=r"00003\.safetensors holds \['extra'\] that .* does not list"):
        load(sharded)
    name = sorted(whole)[0]
    save_file({k: v for k, v in whole.items() if k != name}, file)
    with pytest.raises(ValueError, match=rf"lacks \['{name}'\]"):
        load(sharded)


def test_index_that_names_other_tensors(sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["score.weight"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: no parameter takes score\.weight"):
        load(sharded)
    file.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load(sharded)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is not JSON"):
        load(sharded)


def test_files_that_are_absent_or_cut_short(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_config(tmp_path)
    folder = copy_of("qwen3", tmp_path)
    targets = targets_of(read_config(folder))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is no complete safetensors file"):
        load_params(folder, targets)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor"):
        load_params(folder, targets)


def test_parameters_asked_for_must_be_the_models() -> None:
    targets = targets_of(read_config(GOLDENS / "qwen3"))
    norm = targets.pop("norm")
    with pytest.raises(ValueError, match="has parameters norm and lacks nothing of those asked for"):
        load_params(GOLDENS / "qwen3", targets)
    with pytest.raises(ValueError, match="norm is wanted as int8: weights convert between floats only"):
        load_params(GOLDENS / "qwen3", targets | {"norm": jax.ShapeDtypeStruct(norm.shape, jnp.int8)})
    with pytest.raises(ValueError, match=r"asks for \(32,\) to fill norm \(16,\)"):
        load_params(GOLDENS / "qwen3", targets | {"norm": jax.ShapeDtypeStruct((16,), jnp.float32)})


# ---- host memory ----

BIG = {"vocab_size": 49152, "hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": True}


def write_big(folder: Path, numbers: dict) -> None:
    """A random llama whose largest tensor is its embedding."""
    config = json.loads((GOLDENS / "llama" / "config.json").read_text()) | numbers
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    slots = names.hugging_face(read_config(folder)).slots
    save_file({k: rng.standard_normal(s.shape, np.float32) for k, s in slots.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_python_allocates_no_more_than_the_model_and_a_fifth_of_a_tensor(tmp_path: Path, dtype) -> None:
    """numpy's allocations, as tracemalloc counts them; a loader that reads, then converts, peaks at twice as much."""
    write_big(tmp_path, BIG)
    targets = targets_of(read_config(tmp_path), dtype)
    sizes = [t.size * jnp.dtype(dtype).itemsize for t in targets.values()]
    tracemalloc.start()
    params = load_params(tmp_path, targets)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(params) == len(sizes)
    stored = 4 * max(t.size for t in targets.values())
    assert peak < sum(sizes) + 0.2 * stored


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_stays_under_the_model_and_its_largest_tensor(tmp_path: Path) -> None:
    """The process's own (anonymous) memory while a 200 MB checkpoint is loaded, sampled every millisecond."""
    write_big(tmp_path, {**BIG, "hidden_size": 896, "num_hidden_layers": 8})
    program = """
        import sys, threading, time
        import jax, jax.numpy as jnp
        from grm_jax.models.decoder import split_abstract
        from grm_jax.weights.load import load_params, read_config

        def anonymous():
            lines = open("/proc/self/status").read().splitlines()
            return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

        _, shapes = split_abstract(read_config(sys.argv[1]))
        targets = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, (s, _) in shapes.items()}
        jnp.zeros(1).block_until_ready()
        before, peak, done = anonymous(), 0, False

        def watch():
            global peak
            while not done:
                peak = max(peak, anonymous())
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        params = load_params(sys.argv[1], targets)
        done = True
        watcher.join()
        sizes = [p.nbytes for p in params.values()]
        print(peak - before, sum(sizes), max(sizes))
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True, check=True
    )
    peak, model, largest = map(int, out.stdout.split())
    assert model > 190e6
    assert peak < model + 1.2 * largest


# ---- remote files ----


class Remote:
    """A path elsewhere that can only be copied."""

    name = "model.safetensors"

    def __str__(self) -> str:
        return "gs://bucket/model.safetensors"

    def copy(self, to: Path) -> None:
        to.write_text("weights")


def test_remote_files_are_copied_while_they_are_read() -> None:
    with placement.local_file(Remote()) as file:
        assert file.read_text() == "weights"
    assert not file.exists()
    with placement.local_file(GOLDENS / "llama" / "config.json") as file:
        assert file == GOLDENS / "llama" / "config.json"
