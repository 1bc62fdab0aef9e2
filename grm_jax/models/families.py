"""A checkpoint's own config becomes a `DecoderConfig`: the one look-up by string in the system.

What happens:
1. `from_hf` looks up `model_type` of a config.json, `from_gguf` looks up `general.architecture` of a GGUF file;
2. numbers that the config leaves out are the defaults of transformers' config class of that family (5.x sources);
3. rotary scaling, windows per layer and the query scale are worked out into numbers;
4. whatever the decoder cannot represent (other biases, other activations, YaRN, experts, quantised weights) is an
   error that names the key, its value and the way out: a number that is silently ignored gives wrong logits;
5. `to_hf` goes the other way: the config.json with which a trained model is saved.

GGUF conventions are those of llama.cpp's converter and of its loader's defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grm_jax.models.config import DecoderConfig, RopeScaling

_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as query heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_MISTRAL = _LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN2 = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN3 = _QWEN2 | {"head_dim": 128}
_GEMMA2 = _LLAMA | {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """The numbers of a Hugging Face config.json, written by transformers 4 or 5.

    Raises ValueError for a model_type that is not known, and for values that the decoder cannot represent.
    """
    model_type = config.get("model_type")
    if model_type not in _HF_FAMILIES:
        known = ", ".join(sorted(_HF_FAMILIES))
        raise ValueError(f"model_type = {model_type!r}: known are {known}; give a checkpoint of one of these families")
    return _HF_FAMILIES[model_type](dict(config))


def _llama(given: dict[str, Any]) -> DecoderConfig:
    return _decoder(given, _LLAMA)


def _mistral(given: dict[str, Any]) -> DecoderConfig:
    config = _MISTRAL | given
    return _decoder(given, _MISTRAL, windows=(config["sliding_window"],) * config["num_hidden_layers"])


def _qwen2(given: dict[str, Any]) -> DecoderConfig:
    # The biases of q, k and v are part of Qwen2's architecture: no key of its config switches them.
    return _decoder(given, _QWEN2, windows=_qwen_windows(_QWEN2 | given), qkv_bias=True)


def _qwen3(given: dict[str, Any]) -> DecoderConfig:
    return _decoder(given, _QWEN3, windows=_qwen_windows(_QWEN3 | given), qk_norm=True)


def _gemma2(given: dict[str, Any]) -> DecoderConfig:
    config = _GEMMA2 | given
    _refuse_other(config, "use_bidirectional_attention", (None, False), "only causal attention is built")
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(config["num_hidden_layers"])]
    return _decoder(
        given,
        _GEMMA2,
        windows=_windows(config.get("layer_types") or alternating, config["sliding_window"]),
        activation_key="hidden_activation",
        activation=("gelu_pytorch_tanh", "gelu_tanh"),
        query_scale=config["query_pre_attn_scalar"] ** -0.5,
        norm_offset=1.0,
        embed_scale=math.sqrt(config["hidden_size"]),
        attention_softcap=config["attn_logit_softcapping"],
        logit_softcap=config["final_logit_softcapping"],
        post_norms=True,
    )


_HF_FAMILIES: dict[str, Callable[[dict[str, Any]], DecoderConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
}


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """A Hugging Face config.json of these numbers: `from_hf(to_hf(config)) == config`.

    The family is the plainest whose architecture has them; the rotary embedding is written as transformers 4 does, which
    5 reads too. Raises ValueError, naming the numbers, where no family has them all.
    """
    c = config
    family = "gemma2" if c.post_norms else "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else None
    windowed = [i for i, window in enumerate(c.windows) if window is not None]
    family = family or ("mistral" if windowed else "llama")
    window = max((c.windows[i] for i in windowed), default=None)
    written: dict[str, Any] = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": _hf_scaling(c.rope_scaling),
        "tie_word_embeddings": c.tied,
        "attention_bias": False,
        "hidden_act": {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[c.activation],
    }
    if family == "llama":
        written["mlp_bias"] = False
    else:
        written["sliding_window"] = window
    if family in ("qwen2", "qwen3"):
        written |= {"use_sliding_window": bool(windowed), "max_window_layers": min(windowed, default=c.layers)}
    if family in ("qwen2", "qwen3", "gemma2"):
        written["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in c.windows]
    if family == "gemma2":
        scalar = c.query_scale**-2
        whole = round(scalar)
        written |= {
            "hidden_activation": written["hidden_act"],
            "query_pre_attn_scalar": whole if abs(scalar - whole) < 1e-9 * scalar else scalar,
            "attn_logit_softcapping": c.attention_softcap,
            "final_logit_softcapping": c.logit_softcap,
        }
    _check_read_back(c, written)
    return written


def _hf_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling == _linear_scaling(scaling.factor):
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def _check_read_back(config: DecoderConfig, written: Mapping[str, Any]) -> None:
    read = from_hf(written)
    differing = [name for name, value in vars(config).items() if getattr(read, name) != value]
    if differing:
        told = "; ".join(f"{name} = {getattr(config, name)} would be {getattr(read, name)}" for name in differing)
        raise ValueError(
            f"no family of {', '.join(sorted(_HF_FAMILIES))} has these numbers: as {written['model_type']}, {told}. "
            "Build the model with a family's own numbers"
        )


def _decoder(
    given: dict[str, Any],
    defaults: dict[str, Any],
    windows: tuple[int | None, ...] | None = None,
    activation_key: str = "hidden_act",
    activation: tuple[str, str] = ("silu", "silu"),
    query_scale: float | None = None,
    **numbers: Any,
) -> DecoderConfig:
    """The numbers that all families read alike. `activation` is (transformers' name, ours)."""
    config = defaults | given
    dim, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    head_dim = config["head_dim"] or dim // heads
    for key in ("attention_bias", "mlp_bias"):
        _refuse_other(config, key, (None, False), "these biases are not built; only Qwen2's on q, k and v are")
    _refuse_other(config, activation_key, (None, activation[0]), "give a checkpoint with the family's own activation")
    _refuse_other(config, "quantization_config", (None,), "give the unquantised checkpoint, or a GGUF file")
    theta, scaling = _hf_rope(config)
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=config["num_key_value_heads"] or heads,
        head_dim=head_dim,
        mlp_dim=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        query_scale=head_dim**-0.5 if query_scale is None else query_scale,
        max_positions=config["max_position_embeddings"],
        tied=config["tie_word_embeddings"],
        windows=(None,) * layers if windows is None else windows,
        activation=activation[1],
        **numbers,
    )


def _refuse_other(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...], way_out: str) -> None:
    value = config.get(key)
    if value not in allowed:
        wanted = " or ".join("absent" if a is None else repr(a) for a in allowed)
        raise ValueError(f"config has {key} = {value!r}, it must be {wanted}: {way_out}")


def _qwen_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Qwen's first `max_window_layers` layers see everything, the others a window, if windows are used at all."""
    window = config["sliding_window"] if config["use_sliding_window"] else None
    kinds = [
        "sliding_attention" if window and i >= config["max_window_layers"] else "full_attention"
        for i in range(config["num_hidden_layers"])
    ]
    return _windows(config.get("layer_types") or kinds, window)


def _windows(layer_types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """One window a layer; transformers' sliding_window counts the query's own token, as `windows` does."""
    sizes = {"full_attention": None, "sliding_attention": window}
    for kind in layer_types:
        if kind not in sizes:
            raise ValueError(f"layer_types has {kind!r}: known are {', '.join(sizes)}; other attention is not built")
    return tuple(sizes[kind] for kind in layer_types)


def _hf_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling; transformers 4 writes rope_theta and rope_scaling, 5 both in one `rope_parameters`."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"rope_parameters = {rope}: one rotary embedding must serve all layers, more are not built")
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor = {partial}: whole heads are rotated, so it must be 1 or absent")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, _linear_scaling(rope["factor"])
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
        return theta, RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_positions=int(config.get("original_max_position_embeddings") or original),
        )
    raise ValueError(f"rope type {kind!r}: known are 'default', 'linear' and 'llama3'; give a checkpoint without it")


def _linear_scaling(factor: float) -> RopeScaling:
    """Every frequency divided by `factor`: Llama's rule with a low bound that lies above all frequencies."""
    return RopeScaling(float(factor), low_freq_factor=1e9, high_freq_factor=2e9, original_max_positions=1)


def from_gguf(
    fields: Mapping[str, Any], vocab_size: int, tied: bool, rope_factors: Sequence[float] | None = None
) -> DecoderConfig:
    """The numbers of a GGUF file's metadata.

    fields: the file's key-value pairs. What the metadata does not hold comes from the tensors: `vocab_size` is the
    embedding's rows, `tied` the absence of an output matrix, `rope_factors` the values of `rope_freqs.weight`.
    Raises ValueError for an architecture that is not known, and for values that the decoder cannot represent.
    """
    arch = fields.get("general.architecture")
    if arch not in _GGUF_FAMILIES:
        known = ", ".join(sorted(_GGUF_FAMILIES))
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
    family = {"query_scale": head_dim**-0.5, "windows": (None,) * layers} | _GGUF_FAMILIES[arch](f, head_dim)
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
        rope_scaling=_gguf_scaling(f, head_dim, theta, rope_factors),
        max_positions=f["context_length"],
        tied=tied,
        **family,
    )


def _gguf_gemma2(f: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
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
_GGUF_FAMILIES: dict[str, Callable[[Mapping[str, Any], int], dict[str, Any]]] = {
    "llama": lambda f, head_dim: {},
    "qwen2": lambda f, head_dim: {"qkv_bias": True},
    "qwen3": lambda f, head_dim: {"qk_norm": True},
    "gemma2": _gguf_gemma2,
}


def _gguf_scaling(
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
    linear = None if kind == "none" or factor == 1.0 else _linear_scaling(factor)
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
