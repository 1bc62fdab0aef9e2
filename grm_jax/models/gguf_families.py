"""A GGUF file's metadata becomes a `DecoderConfig`, as `families` makes one of a Hugging Face config.

The conventions are those of llama.cpp's converter and of its loader's defaults. Whatever the decoder cannot represent is
an error that names the key, its value and the way out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grm_jax.models.config import DecoderConfig, RopeScaling
from grm_jax.models.hf_numbers import linear_scaling


def from_gguf(
    fields: Mapping[str, Any], vocab_size: int, tied: bool, rope_factors: Sequence[float] | None = None
) -> DecoderConfig:
    """The numbers of a GGUF file's metadata.

    fields: the file's key-value pairs. What the metadata does not hold comes from the tensors: `vocab_size` is the
    embedding's rows, `tied` the absence of an output matrix, `rope_factors` the values of `rope_freqs.weight`.
    Raises ValueError for an architecture that is not known, and for values that the decoder cannot represent.
    """
    arch = fields.get("general.architecture")
    if arch not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise ValueError(f"general.architecture = {arch!r}: known are {known}; give a file of one of these families")
    f = {key.removeprefix(f"{arch}."): value for key, value in fields.items()}
    required = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")
    for key in (*required, "attention.layer_norm_rms_epsilon"):
        if not isinstance(f.get(key), int | float):
            raise ValueError(f"{arch}.{key} = {f.get(key)!r}: it must be one number; convert the model to GGUF again")
    dim, heads, layers = f["embedding_length"], f["attention.head_count"], f["block_count"]
    head_dim = f.get("attention.key_length", dim // heads)
    for key, allowed in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim), ("expert_count", 0)):
        if f.get(key, allowed) != allowed:
            raise ValueError(f"{arch}.{key} = {f[key]}: it must be {allowed}, other layouts are not built")
    theta = float(f.get("rope.freq_base", 10_000.0))
    family = {"query_scale": head_dim**-0.5, "windows": (None,) * layers} | _FAMILIES[arch](f, head_dim)
    return DecoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=f.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_dim=f["feed_forward_length"],
        # The epsilon is stored in float32: 1e-5 comes back as 9.999999747e-06, and seven digits are all it has.
        norm_eps=float(f"{f['attention.layer_norm_rms_epsilon']:.7g}"),
        rope_theta=theta,
        rope_scaling=_scaling(f, head_dim, theta, rope_factors),
        max_positions=f["context_length"],
        tied=tied,
        **family,
    )


def _gemma2(f: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """llama.cpp's constants for Gemma-2: GGUF has no key for the query scale, 46 layers mean the 27B."""
    layers, dim, heads = f["block_count"], f["embedding_length"], f["attention.head_count"]
    window = f.get("attention.sliding_window", 4096)
    return {
        "query_scale": (dim / heads if layers == 46 else head_dim) ** -0.5,
        "windows": tuple(None if i % 2 else window for i in range(layers)),
        "attention_softcap": f.get("attn_logit_softcapping", 50.0),
        "logit_softcap": f.get("final_logit_softcapping", 30.0),
        "norm_offset": 1.0,
        "embed_scale": math.sqrt(dim),
        "post_norms": True,
        "activation": "gelu_tanh",
    }


# Windows of other families than Gemma-2 are not written by the converter, and llama.cpp attends to everything there.
_FAMILIES: dict[str, Callable[[Mapping[str, Any], int], dict[str, Any]]] = {
    "llama": lambda f, head_dim: {},
    "qwen2": lambda f, head_dim: {"qkv_bias": True},
    "qwen3": lambda f, head_dim: {"qk_norm": True},
    "gemma2": _gemma2,
}


def _scaling(
    f: Mapping[str, Any], head_dim: int, theta: float, rope_factors: Sequence[float] | None
) -> RopeScaling | None:
    """Rotary scaling of a GGUF file: linear in its metadata, or Llama 3.1's as a divisor for each frequency.

    The converter writes the divisors only, not the four numbers that they were computed from. All released Llama 3.x
    share three of these (low 1, high 4, original context 8192) and the largest divisor is the fourth, so the numbers
    are read back and checked against every divisor.
    """
    kind = f.get("rope.scaling.type", "linear")
    factor = float(f.get("rope.scaling.factor", f.get("rope.scale_linear", 0.0)) or 1.0)
    if kind not in ("none", "linear"):
        raise ValueError(f"rope.scaling.type = {kind!r}: known are 'none' and 'linear'; give a file without it")
    linear = None if kind == "none" or factor == 1.0 else linear_scaling(factor)
    if rope_factors is None:
        return linear
    found = np.asarray(rope_factors, np.float64)
    scaling = RopeScaling(float(found.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    turns = scaling.original_max_positions * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clip(0.0, 1.0)
    expected = 1 / (smooth + (1 - smooth) / scaling.factor)
    if linear or found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        raise ValueError(
            f"rope_freqs.weight = {found.tolist()} is not Llama 3.1's scaling by {scaling.factor} over 8192 positions, "
            "the only divisors that the decoder can represent; give the model as a Hugging Face folder"
        )
    return scaling
