"""A Hugging Face config becomes a `DecoderConfig`: with GGUF's, the one look-up by string in the system.

What happens:
1. `from_hf` looks up `model_type` of a config.json (`gguf_families` does the same for a GGUF file);
2. rotary scaling, windows per layer and the query scale are worked out into numbers (`hf_numbers`; mixtures of experts
   and latent attention: `moe_families`);
3. whatever the decoder cannot represent (other biases, other activations, other routers, quantised weights) is an
   error that names the key, its value and the way out: a number that is silently ignored gives wrong logits;
4. `to_hf` goes the other way: the config.json with which a trained model is saved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from grm_jax.models import moe_families
from grm_jax.models.config import DecoderConfig
from grm_jax.models.hf_numbers import LLAMA, decoder_of, hf_scaling, refuse_other, windows_of

_CLASSIFIER = "ForSequenceClassification"
_MISTRAL = LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN2 = LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN3 = _QWEN2 | {"head_dim": 128}
_GEMMA2 = LLAMA | {
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
    return decoder_of(given, LLAMA)


def _mistral(given: dict[str, Any]) -> DecoderConfig:
    config = _MISTRAL | given
    return decoder_of(given, _MISTRAL, windows=(config["sliding_window"],) * config["num_hidden_layers"])


def _qwen2(given: dict[str, Any]) -> DecoderConfig:
    # The biases of q, k and v are part of Qwen2's architecture: no key of its config switches them.
    return decoder_of(given, _QWEN2, windows=_qwen_windows(_QWEN2 | given), qkv_bias=True)


def _qwen3(given: dict[str, Any]) -> DecoderConfig:
    return decoder_of(given, _QWEN3, windows=_qwen_windows(_QWEN3 | given), qk_norm=True)


def _gemma2(given: dict[str, Any]) -> DecoderConfig:
    config = _GEMMA2 | given
    refuse_other(config, "use_bidirectional_attention", (None, False), "only causal attention is built")
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(config["num_hidden_layers"])]
    return decoder_of(
        given,
        _GEMMA2,
        windows=windows_of(config.get("layer_types") or alternating, config["sliding_window"]),
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
    "qwen3_moe": moe_families.qwen3_moe,
    "deepseek_v2": moe_families.deepseek_v2,
    "deepseek_v3": moe_families.deepseek_v3,
}


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """A Hugging Face config.json of these numbers: `from_hf(to_hf(config)) == config`.

    The family is the plainest whose architecture has them; the rotary embedding is written as transformers 4 does, which
    5 reads too. Raises ValueError, naming the numbers, where no family has them all.
    """
    c = config
    family = moe_families.family_of(c)
    family = family or ("gemma2" if c.post_norms else "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else None)
    windowed = [i for i, window in enumerate(c.windows) if window is not None]
    family = family or ("mistral" if windowed else "llama")
    window = max((c.windows[i] for i in windowed), default=None)
    written: dict[str, Any] = {
        "architectures": [_architecture(family)],
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
        "rope_scaling": hf_scaling(c.rope_scaling),
        "tie_word_embeddings": c.tied,
        "attention_bias": False,
        "hidden_act": {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[c.activation],
    }
    if family == "llama":
        written["mlp_bias"] = False
    elif c.latent is None:
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
    written |= moe_families.written(c)
    if c.scalar:
        written = with_scalar(written)
    _check_read_back(c, written)
    return written


def _architecture(model_type: str) -> str:
    return f"{''.join(word.capitalize() for word in model_type.split('_'))}ForCausalLM"


def with_scalar(config: Mapping[str, Any]) -> dict[str, Any]:
    """A language model's config.json as that of a classifier of one label, transformers' form of a scalar head."""
    causal = config.get("architectures") or [_architecture(config["model_type"])]
    architectures = [name.replace("ForCausalLM", _CLASSIFIER) for name in causal]
    return {**config, "architectures": architectures, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def _check_read_back(config: DecoderConfig, written: Mapping[str, Any]) -> None:
    read = from_hf(written)
    differing = [name for name, value in vars(config).items() if getattr(read, name) != value]
    if differing:
        told = "; ".join(f"{name} = {getattr(config, name)} would be {getattr(read, name)}" for name in differing)
        raise ValueError(
            f"no family of {', '.join(sorted(_HF_FAMILIES))} has these numbers: as {written['model_type']}, {told}. "
            "Build the model with a family's own numbers"
        )


def _qwen_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Qwen's first `max_window_layers` layers see everything, the others a window, if windows are used at all."""
    window = config["sliding_window"] if config["use_sliding_window"] else None
    kinds = [
        "sliding_attention" if window and i >= config["max_window_layers"] else "full_attention"
        for i in range(config["num_hidden_layers"])
    ]
    return windows_of(config.get("layer_types") or kinds, window)
