"""Trained models and adapters written out: what is loaded again is what was saved, bit for bit, tokenizer included."""

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
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from checkpoints import FAMILIES, GOLDENS, assert_same, load, targets_of, tensors_in
from safetensors.numpy import load_file, save_file
from test_tokenizer import GOLDEN, package_file, small_gguf, write_gguf
from tiny import GEMMA, LLAMA, QWEN3

import grm_jax
from grm_jax.datatypes import Message
from grm_jax.models import lora
from grm_jax.models.config import RopeScaling
from grm_jax.models.decoder import split_abstract
from grm_jax.models.families import from_hf, to_hf
from grm_jax.recipes import Lora
from grm_jax.sharding import make_mesh, parameter_sharding
from grm_jax.tokenizer import ByteTokenizer, Tokenizer, from_folder, from_gguf
from grm_jax.weights import save, write
from grm_jax.weights.adapters import checkpoint_of, load_adapters, merge_into, save_adapters
from grm_jax.weights.embedded import find_embedded
from grm_jax.weights.load import read_config
from grm_jax.weights.save import save_hf

TALK = [Message("system", "Be fair."), Message("user", "Hé 世界"), Message("assistant", "A"), Message("user", " 12")]


def drawn(config, dtype=jnp.float32) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    targets = targets_of(config, dtype)
    return {name: jnp.asarray(rng.standard_normal(t.shape), dtype) for name, t in targets.items()}


def config_in(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


# ---- configs ----


@pytest.mark.parametrize(
    "config",
    [
        *(LLAMA, GEMMA, QWEN3),
        dataclasses.replace(LLAMA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), rope_theta=5e5, tied=False),
        dataclasses.replace(LLAMA, qkv_bias=True, windows=(None, 8)),
        dataclasses.replace(LLAMA, windows=(16, 16)),
        dataclasses.replace(GEMMA, query_scale=144**-0.5, attention_softcap=None),
        *(read_config(GOLDENS / family) for family in FAMILIES),
    ],
)
def test_configs_are_read_back_as_they_were(config) -> None:
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


def test_linear_scaling_and_the_golden_families() -> None:
    linear = {**to_hf(LLAMA), "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    assert to_hf(from_hf(linear))["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    for family in FAMILIES:
        given, found = config_in(GOLDENS / family), to_hf(read_config(GOLDENS / family))
        assert found["architectures"] == given["architectures"]
        shared = found.keys() & given.keys() - {"max_window_layers"}  # says nothing where no layer has a window
        assert {key: found[key] for key in shared} == {key: given[key] for key in shared}
        assert len(shared) >= 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": (8, 16)}, r"as mistral, windows = \(8, 16\) would be \(16, 16\)"),
        ({"qkv_bias": True, "qk_norm": True}, "as qwen3, qkv_bias = True would be False"),
        (
            {"logit_softcap": 3.0},
            r"no family of .*gemma2, .*, qwen3_moe has these numbers: as llama, logit_softcap = 3\.0",
        ),
    ],
)
def test_configs_of_no_family(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_hf(dataclasses.replace(LLAMA, **change))


# ---- weights ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_source", [True, False])
def test_saved_and_loaded_again_bit_for_bit(tmp_path: Path, family: str, with_source: bool) -> None:
    golden = GOLDENS / family
    config, params = read_config(golden), load(golden)
    save_hf(tmp_path / "new", config, params, None, golden if with_source else None, jnp.float32)
    assert read_config(tmp_path / "new") == config
    assert_same(load(tmp_path / "new"), params)
    given, written = config_in(golden), config_in(tmp_path / "new")
    if with_source:
        assert written == given | {"dtype": "float32"}
    else:
        assert written["torch_dtype"] == "float32"


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_that_transformers_wrote(tmp_path: Path, family: str) -> None:
    """In the golden's own dtype: the same names, shapes and bits as in the file that transformers saved."""
    dtype = config_in(GOLDENS / family)["dtype"]
    save_hf(tmp_path, read_config(GOLDENS / family), load(GOLDENS / family), None, None, dtype)
    found, expected = tensors_in(tmp_path), tensors_in(GOLDENS / family)
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].view(np.uint8), tensor.view(np.uint8), err_msg=name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_large_models_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "SHARD_BYTES", 8000)
    params = drawn(LLAMA)
    save_hf(tmp_path, LLAMA, params, None, None, "bfloat16")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, 9)]
    assert index["metadata"]["total_size"] == 2 * sum(value.size for value in params.values())
    for file in files:
        tensors = load_file(file)
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 8000
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
    found = load(tmp_path, jnp.bfloat16)
    assert_same(found, {name: np.asarray(value).astype(ml_dtypes.bfloat16) for name, value in params.items()})


def test_weights_spread_over_devices(tmp_path: Path) -> None:
    config = dataclasses.replace(QWEN3, vocab_size=260)
    _, shapes = split_abstract(config)
    mesh, params = make_mesh(data=2, fsdp=2, tensor=2), drawn(config)
    spread = {name: jax.device_put(v, parameter_sharding(mesh, name, *shapes[name])) for name, v in params.items()}
    save_hf(tmp_path, config, spread, None, None, jnp.float32)
    assert_same(load(tmp_path), params)


def test_an_older_model_goes_and_other_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(save, "SHARD_BYTES", 8000)
        save_hf(tmp_path, LLAMA, drawn(LLAMA), ByteTokenizer(), None, "float32")
    (tmp_path / "README.md").write_text("mine")
    save_hf(tmp_path, QWEN3, drawn(QWEN3), None, None, "float32")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert_same(load(tmp_path), drawn(QWEN3))


def test_a_folder_cut_short_has_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hf(tmp_path, LLAMA, drawn(LLAMA), ByteTokenizer(), None, "float32")
    to_host, seen = write.to_host, []

    def failing(value: jax.Array, dtype: jnp.dtype) -> np.ndarray:
        seen.append(value)
        if len(seen) == 5:
            raise RuntimeError("device lost")
        return to_host(value, dtype)

    monkeypatch.setattr(write, "to_host", failing)
    with pytest.raises(RuntimeError, match="device lost"):
        save_hf(tmp_path, LLAMA, drawn(LLAMA), ByteTokenizer(), None, "float32")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_config(tmp_path)


def test_what_cannot_be_saved_touches_nothing(tmp_path: Path) -> None:
    golden = Path(shutil.copytree(GOLDENS / "llama", tmp_path / "llama"))
    params = load(golden)
    config = read_config(golden)
    new = tmp_path / "new"
    faults = [
        (config, params, golden, new, "int8", r"dtype = int8: weights are saved as float32, bfloat16, float16"),
        (config, params, golden, golden, "float32", r"is the model that is being trained from: give another output"),
        (config, {"embed": params["embed"]}, golden, new, "float32", r"parameters \['head', .* are missing, \[\] are"),
        (config, params | {"norm": jnp.ones(31)}, golden, new, "float32", r"norm has shape \(31,\), .* \(32,\)"),
        (LLAMA, drawn(LLAMA), golden, new, "float32", r"config\.json describes another model than the one to save"),
        (dataclasses.replace(LLAMA, logit_softcap=3.0), drawn(LLAMA), None, new, "float32", "no family of"),
    ]
    for numbers, weights, source, folder, dtype, message in faults:
        with pytest.raises(ValueError, match=message):
            save_hf(folder, numbers, weights, None, source, dtype)
        assert not new.exists()
    assert_same(load(golden), params)


# ---- tokenizers ----


def saved(folder: Path, tokenizer: Tokenizer, source: Path | None = None) -> Tokenizer:
    """The tokenizer of a tiny model that was saved with this one."""
    save_hf(folder, LLAMA, drawn(LLAMA), tokenizer, source, "float32")
    return from_folder(folder)


def assert_same_tokenizer(found: Tokenizer, expected: Tokenizer, texts: list[str], talk: list[Message]) -> None:
    for name in ("vocab_size", "bos_id", "eos_ids", "specials", "chat_template", "start", "names"):
        assert getattr(found, name) == getattr(expected, name), name
    for text in [*texts, *expected.specials, "".join(expected.specials), f"x{expected.specials[-1]} y"]:
        assert found.encode(text) == expected.encode(text), ascii(text)
        assert found.encode_plain(text) == expected.encode_plain(text), ascii(text)
    assert found.token_bytes() == expected.token_bytes()
    assert found.chat(talk) == expected.chat(talk)


def test_the_embedded_models_tokenizer(tmp_path: Path) -> None:
    path = find_embedded()
    tokenizer = from_gguf(path)
    assert_same_tokenizer(saved(tmp_path, tokenizer, path), tokenizer, GOLDEN["texts"], TALK)
    described = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert described["bos_token"] == "<|im_start|>"
    assert described["eos_token"] == "<|im_end|>"
    assert config_in(tmp_path)["eos_token_id"] == [2, 0]
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0]}


def test_the_byte_tokenizer(tmp_path: Path) -> None:
    texts = [*GOLDEN["texts"], "".join(map(chr, range(256))), "<|bos|>a<|eos|><|pad|>"]
    assert_same_tokenizer(saved(tmp_path, ByteTokenizer()), ByteTokenizer(), texts, TALK)


def test_byte_level_files_that_begin_texts(tmp_path: Path) -> None:
    """Llama 3's kind: the begin token is in the file's settings, and other readers find it in the post-processor."""
    fields = {"tokenizer_pre": "llama-bpe", "bos_token_id": 257, "chat_template": "{{ bos_token }}{{ messages }}"}
    tokenizer = from_gguf(small_gguf(tmp_path / "m.gguf", **fields))
    assert tokenizer.start == "<|im_end|>"
    found = saved(tmp_path / "new", tokenizer, tmp_path / "m.gguf")
    assert_same_tokenizer(found, tokenizer, [*GOLDEN["texts"], "he<tool>he"], TALK)
    assert found.vocab.starts_with(257)


def test_sentencepiece_files(tmp_path: Path) -> None:
    model_file = package_file("mistral_common", "data/tokenizer.model.v1", "pip install mistral-common")
    proto = sentencepiece.sentencepiece_model_pb2.ModelProto.FromString(model_file.read_bytes())
    lists = [[piece.piece for piece in proto.pieces], [piece.type for piece in proto.pieces]]
    for text in ("<start_of_turn>", "<end_of_turn>", "\n\n"):
        lists[0].append(text)
        lists[1].append(4)
    fields = {"token_scores": [*(p.score for p in proto.pieces), 0.0, 0.0, 0.0], "bos_token_id": 1, "eos_token_id": 2}
    path = write_gguf(tmp_path / "m.gguf", "llama", *lists, **fields)
    tokenizer = from_gguf(path)
    assert tokenizer.start == "<s>"
    texts = [*GOLDEN["texts"], "</s>x <s>\n\n<start_of_turn> y"]
    assert_same_tokenizer(saved(tmp_path / "new", tokenizer, path), tokenizer, texts, TALK)
    # Read from a folder with strings beside the model, and saved without a source.
    config = tmp_path / "new" / "tokenizer_config.json"
    more = {"legacy": True, "added_tokens_decoder": {"32004": {"content": "<|eot_id|>", "special": True}}}
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    (tmp_path / "new" / "added_tokens.json").write_text('{"<new>": 32003}')
    tokenizer = from_folder(tmp_path / "new")
    assert_same_tokenizer(saved(tmp_path / "again", tokenizer), tokenizer, [*texts, "<new>x<|eot_id|> x"], TALK)
    beside = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert beside == {
        "32003": {"content": "<new>", "special": False},
        "32004": {"content": "<|eot_id|>", "special": True},
    }


def test_a_name_that_is_no_control_token_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Named in the files, "he" would become a control token when they are read, and "hehe" other ids."""
    tokenizer = from_gguf(small_gguf(tmp_path / "m.gguf", bos_token_id=256))
    assert tokenizer.names["bos_token"] == "he"
    found = saved(tmp_path / "new", tokenizer, tmp_path / "m.gguf")
    assert found.encode("hehe") == tokenizer.encode("hehe") == [256, 256]
    assert (found.bos_id, found.eos_ids, found.specials) == (256, (257,), ("<|im_end|>",))
    assert "['bos_token'] are no control tokens" in caplog.text


def test_a_source_folders_files_are_kept(tmp_path: Path) -> None:
    first = tmp_path / "first"
    save_hf(first, LLAMA, drawn(LLAMA), ByteTokenizer(), None, "float32")
    (first / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (first / "optimizer.bin").write_text("not the tokenizer's")
    save_hf(tmp_path / "second", LLAMA, drawn(LLAMA), ByteTokenizer(), first, "bfloat16")
    assert from_folder(tmp_path / "second").chat(TALK[1:2]) == "Hé 世界!"
    assert config_in(tmp_path / "second") == config_in(first) | {"torch_dtype": "bfloat16"}
    assert not (tmp_path / "second" / "optimizer.bin").exists()


@pytest.mark.slow
def test_the_embedded_model_as_a_folder_gives_the_same_logits(tmp_path: Path) -> None:
    grm = grm_jax.load("smollm2-135m", dtype="float32")
    save_hf(tmp_path, grm.model.config, grm.model.params, grm.tokenizer, find_embedded(), "float32")
    again = grm_jax.load(str(tmp_path), dtype="float32")
    assert again.model.config == grm.model.config
    assert_same(again.model.params, grm.model.params)
    assert_same_tokenizer(again.need_tokenizer(), grm.need_tokenizer(), GOLDEN["texts"], TALK)
    ids = np.array([grm.need_tokenizer().encode(grm.need_tokenizer().chat(TALK))])
    np.testing.assert_array_equal(again.logits(ids), grm.logits(ids))


# ---- adapters ----

SOME = Lora(rank=3, alpha=6.0, targets=("q", "o", "down"))


def adapters_of(config, settings: Lora = SOME) -> dict[str, jax.Array]:
    _, shapes = split_abstract(config)
    rng = np.random.default_rng(1)
    return {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, (s, _) in lora.axes(shapes, settings).items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_hf(tmp_path / "base", LLAMA, drawn(LLAMA), ByteTokenizer(), None, "float32")
    return tmp_path / "base"


@pytest.fixture
def adapted(tmp_path: Path, base: Path) -> Path:
    save_adapters(tmp_path / "adapters", LLAMA, adapters_of(LLAMA), SOME, str(base))
    return tmp_path / "adapters"


def test_adapters_are_in_pefts_format(adapted: Path, base: Path) -> None:
    """Names, shapes and keys as PEFT's checkpoint format documents them."""
    described = json.loads((adapted / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(base)
    assert (described["peft_type"], described["task_type"], described["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert (described["r"], described["lora_alpha"]) == (3, 6)
    assert described["target_modules"] == ["down_proj", "o_proj", "q_proj"]
    tensors = load_file(adapted / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"base_model.model.model.layers.{i}.{module}.lora_{side}.weight": (3, size) if side == "A" else (size, 3)
        for i in (0, 1)
        for module, sizes in (
            ("self_attn.q_proj", (32, 32)),
            ("self_attn.o_proj", (32, 32)),
            ("mlp.down_proj", (64, 32)),
        )
        for side, size in zip("AB", sizes, strict=True)
    }
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float32")}


def test_adapters_are_read_back(adapted: Path, base: Path) -> None:
    found_base, settings, found = load_adapters(adapted)
    assert (found_base, settings) == (str(base), SOME)
    assert_same(found, adapters_of(LLAMA))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_products_are_those_of_the_files_matrices(tmp_path: Path, family: str) -> None:
    """PEFT adds alpha / r * B A to the matrix as the Hugging Face file has it; in every family ours is the same."""
    config = read_config(GOLDENS / family)
    everything = Lora(rank=2, alpha=3.0)
    save_adapters(tmp_path, config, adapters_of(config, everything), everything, str(GOLDENS / family))
    _, settings, adapters = load_adapters(tmp_path)
    merged = merge_into(load(GOLDENS / family), adapters, settings)
    save_hf(tmp_path / "merged", config, merged, None, tmp_path, "float32")
    stored, found = tensors_in(GOLDENS / family), tensors_in(tmp_path / "merged")
    pairs = load_file(tmp_path / "adapter_model.safetensors")
    changed = 0
    for name, tensor in stored.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        product = 0.0
        if f"{path}.lora_A.weight" in pairs:
            product = 1.5 * pairs[f"{path}.lora_B.weight"].astype(np.float64) @ pairs[f"{path}.lora_A.weight"]
            changed += 1
        np.testing.assert_allclose(found[name], tensor.astype(np.float64) + product, rtol=1e-5, atol=1e-5, err_msg=name)
    assert changed == sum("_proj" in name and name.endswith("weight") for name in stored)


def test_a_judge_over_adapters_is_the_merged_model(adapted: Path, tmp_path: Path) -> None:
    grm = grm_jax.load(str(adapted))
    expected = lora.merge(drawn(LLAMA), adapters_of(LLAMA), SOME)
    assert_same(grm.model.params, expected)
    assert grm.name == str(adapted)
    assert not grm.demos
    assert_same_tokenizer(grm.need_tokenizer(), ByteTokenizer(), ["é<|eos|>"], TALK)
    save_hf(tmp_path / "merged", LLAMA, grm.model.params, grm.tokenizer, adapted, "float32")
    again = grm_jax.load(str(tmp_path / "merged"))
    ids = np.arange(20).reshape(1, 20)
    np.testing.assert_array_equal(again.logits(ids), grm.logits(ids))
    spread = grm_jax.load(str(adapted), mesh=make_mesh(data=2))
    assert spread.model.params["embed"].sharding.mesh.size == 2
    assert_same(spread.model.params, expected)
    for name, shape in split_abstract(LLAMA)[1].items():
        assert spread.model.params[name].sharding == parameter_sharding(spread.model.mesh, name, *shape), name
    rounded = grm_jax.load(str(adapted), dtype="bfloat16")
    assert {value.dtype for value in rounded.model.params.values()} == {jnp.dtype("bfloat16")}


IN_A_BUCKET = """
import sys
import numpy as np
from etils import epath
import grm_jax
from grm_jax.weights.adapters import save_adapters
from grm_jax.weights.save import save_hf
folder, adapted = sys.argv[1:]
for dtype in ("bfloat16", "float32"):  # the second time over the first
    found = grm_jax.load(folder, dtype="float32")
    save_hf("gs://judge/base", found.model.config, found.model.params, found.tokenizer, folder, dtype)
again = grm_jax.load("gs://judge/base", dtype="float32")
for name, value in found.model.params.items():
    np.testing.assert_array_equal(again.model.params[name], value, err_msg=name)
base, lora, adapters = grm_jax.weights.adapters.load_adapters(adapted)
save_adapters("gs://judge/adapters", found.model.config, adapters, lora, "gs://judge/base")
expected, merged = grm_jax.load(adapted, dtype="float32"), grm_jax.load("gs://judge/adapters", dtype="float32")
for name, value in expected.model.params.items():
    np.testing.assert_array_equal(merged.model.params[name], value, err_msg=name)
print(*sorted(file.name for file in epath.Path("gs://judge/base").iterdir()), merged.tokenizer.eos_ids)
"""


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the emulator's sockets
def test_models_and_adapters_in_a_bucket(base: Path, adapted: Path, bucket: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_BUCKET, str(base), str(adapted)],
        capture_output=True, text=True, env=os.environ | bucket, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json"
    assert done.stdout.strip() == f"{files} (257,)"


def edit(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_where_the_base_is(adapted: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to the adapters, whatever the working directory; under other adapters; a shipped model's name."""
    edit(adapted, base_model_name_or_path="../base")
    monkeypatch.chdir("/")
    assert_same(grm_jax.load(str(adapted)).model.params, lora.merge(drawn(LLAMA), adapters_of(LLAMA), SOME))
    monkeypatch.chdir(tmp_path)
    save_adapters(tmp_path / "more", LLAMA, adapters_of(LLAMA), SOME, "adapters")
    assert load_adapters(tmp_path / "more")[0] == str(adapted)
    assert checkpoint_of(tmp_path / "more").resolve() == base
    edit(adapted, base_model_name_or_path="smollm2-135m")
    assert checkpoint_of(adapted) == find_embedded()
    edit(adapted, base_model_name_or_path="HuggingFaceTB/SmolLM2-135M")
    with pytest.raises(FileNotFoundError, match=r"adapts 'HuggingFaceTB/SmolLM2-135M', which is not there: set base"):
        grm_jax.load(str(adapted))
    edit(adapted, base_model_name_or_path="../more")
    with pytest.raises(ValueError, match="names itself as its base, through 2 folders"):
        checkpoint_of(adapted)


def test_rank_stabilised_scale(adapted: Path) -> None:
    """use_rslora divides alpha by the rank's square root: 6 / sqrt(3) = alpha / 3."""
    edit(adapted, use_rslora=True)
    _, settings, _ = load_adapters(adapted)
    assert settings.alpha / settings.rank == pytest.approx(6 / 3**0.5)


LAYER = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}.lora_B.weight": None}, r"layers\.1\.attention\.q\.lora_a: .* with the other beside it"),
        ({f"{LAYER}.lora_magnitude_vector": (32,)}, r"takes \['base.*magnitude_vector'\], 1 of 13 tensors; every"),
        ({"base_model.model.model.layers.2.mlp.up_proj.lora_A.weight": (3, 32)}, r"takes \['base.*layers\.2\.mlp"),
        ({"base_model.model.score.weight": (1, 32)}, r"no matrix of the base .* takes \['base_model\.model\.score"),
        ({f"{LAYER}.lora_A.weight": (3, 31)}, r"q: lora_a is \(3, 31\) and lora_b \(32, 3\)"),
        ({f"{LAYER}.lora_A.weight": (4, 32)}, r"q\.lora_a has shape \(4, 32\), but its config says r = 3"),
    ],
)
def test_tensors_of_other_adapters(adapted: Path, change: dict, message: str) -> None:
    file = adapted / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = np.zeros(shape, np.float32)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        grm_jax.load(str(adapted))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, r"adapter_config\.json: peft_type = 'IA3', known is 'LORA'"),
        ({"use_dora": True}, "use_dora = True is not built; merge these adapters with PEFT itself"),
        ({"bias": "all"}, "bias = 'all' is not built"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern = {'q_proj': 8} is not built"),
        ({"modules_to_save": ["score"]}, r"modules_to_save = \['score'\] is not built"),
        ({"r": None}, "gives no number for r"),
    ],
)
def test_adapters_of_other_kinds(adapted: Path, change: dict, message: str) -> None:
    edit(adapted, **change)
    with pytest.raises(ValueError, match=message):
        load_adapters(adapted)


def test_adapter_files_that_are_absent_or_cut_short(adapted: Path) -> None:
    file = adapted / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is no complete safetensors file"):
        load_adapters(adapted)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors; save the adapters with"):
        load_adapters(adapted)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        load_adapters(adapted.parent)


def test_adapters_that_are_not_the_configs(tmp_path: Path) -> None:
    adapters = adapters_of(LLAMA)
    del adapters["layers.0.mlp.down.lora_b"]
    with pytest.raises(ValueError, match=r"adapters \['layers\.0\.mlp\.down\.lora_b'\] are missing, \[\] are not"):
        save_adapters(tmp_path / "new", LLAMA, adapters, SOME, "smollm2-135m")
    assert not (tmp_path / "new").exists()
