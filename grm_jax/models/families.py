"""A Hugging Face config becomes a `DecoderConfig`: with GGUF's, the one look-up by string in the system.

What happens:
1. `from_hf` looks up `model_type` of a config.json (`gguf_families` does the same for a GGUF file);
2. numbers that the config leaves out are the defaults of transformers' config class of that family (5.x sources);
3. rotary scaling, windows per layer and the query scale are worked out into numbers;
4. whatever the decoder cannot represent (other biases, other activations, YaRN, experts, quantised weights) is an
   error that names the key, its value and the way out: a number that is silently ignored gives wrong logits;
5. `to_hf` goes the other way: the config.json with which a trained model is saved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grm_jax.models.config import DecoderConfig, RopeScaling

_CLASSIFIER = "ForSequenceClassification"
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
    found = _HF_FAMILIES[model_type](dict(config))
    return dataclasses.replace(found, scalar=True) if _classifies(config) else found


def _classifies(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint has a classification head, which must be of one label."""
    if not any(name.endswith(_CLASSIFIER) for name in config.get("architectures") or ()):
        return False
    # transformers writes num_labels only as the labels' names, and leaves them out where there are two.
    labels = config.get("num_labels", len(config.get("id2label") or (0, 1)))
    if labels != 1:
        raise ValueError(
            f"a classification head of {labels} labels: one number a text is what is built, give a checkpoint with "
            "num_labels = 1"
        )
    return True


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
    if c.scalar:
        written = with_scalar(written)
    _check_read_back(c, written)
    return written


def with_scalar(config: Mapping[str, Any]) -> dict[str, Any]:
    """A language model's config.json as that of a classifier of one label, transformers' form of a scalar head."""
    architectures = [name.replace("ForCausalLM", _CLASSIFIER) for name in config["architectures"]]
    return {**config, "architectures": architectures, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def _hf_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling == linear_scaling(scaling.factor):
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
        return theta, linear_scaling(rope["factor"])
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
        return theta, RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_positions=int(config.get("original_max_position_embeddings") or original),
        )
    raise ValueError(f"rope type {kind!r}: known are 'default', 'linear' and 'llama3'; give a checkpoint without it")


def linear_scaling(factor: float) -> RopeScaling:
    """Every frequency divided by `factor`: Llama's rule with a low bound that lies above all frequencies."""
    return RopeScaling(float(factor), low_freq_factor=1e9, high_freq_factor=2e9, original_max_positions=1)
