"""What the families' configs have in common: the numbers of a config.json that all of them read and write alike.

Numbers that a config leaves out are the defaults of transformers' config class of its family (5.x sources).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grm_jax.models.config import DecoderConfig, RopeScaling, Yarn

LLAMA = {
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


def decoder_of(
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
        refuse_other(config, key, (None, False), "these biases are not built; only Qwen2's on q, k and v are")
    refuse_other(config, activation_key, (None, activation[0]), "give a checkpoint with the family's own activation")
    refuse_other(config, "quantization_config", (None,), "give the unquantised checkpoint, or a GGUF file")
    theta, scaling = rope_of(config)
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


def refuse_other(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...], way_out: str) -> None:
    value = config.get(key)
    if value not in allowed:
        wanted = " or ".join("absent" if a is None else repr(a) for a in allowed)
        raise ValueError(f"config has {key} = {value!r}, it must be {wanted}: {way_out}")


def windows_of(layer_types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """One window a layer; transformers' sliding_window counts the query's own token, as `windows` does."""
    sizes = {"full_attention": None, "sliding_attention": window}
    for kind in layer_types:
        if kind not in sizes:
            raise ValueError(f"layer_types has {kind!r}: known are {', '.join(sizes)}; other attention is not built")
    return tuple(sizes[kind] for kind in layer_types)


def rope_of(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling; transformers 4 writes rope_theta and rope_scaling, 5 both in one `rope_parameters`."""
    rope = rope_section(config)
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
    if kind == "yarn":
        return theta, _yarn(rope, config)
    known = "'default', 'linear', 'llama3' and 'yarn'"
    raise ValueError(f"rope type {kind!r}: known are {known}; give a checkpoint without it")


def rope_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says of its rotary embedding: transformers 4 writes `rope_scaling`, 5 `rope_parameters`."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def yarn_temperature(factor: float, scale: float) -> float:
    """arXiv 2309.00071, Eq. 22 with the weight that DeepSeek gives its logarithm."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _yarn(rope: Mapping[str, Any], config: Mapping[str, Any]) -> Yarn:
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    original = int(original or config["max_position_embeddings"])
    factor = float(rope.get("factor") or config["max_position_embeddings"] / original)
    temperature, scales = rope.get("attention_factor"), [rope.get(key) for key in ("mscale", "mscale_all_dim")]
    if temperature is None:
        of_keys, of_all = (yarn_temperature(factor, scale) for scale in scales) if all(scales) else (1.0, 1.0)
        temperature = of_keys / of_all if all(scales) else yarn_temperature(factor, 1.0)
    return Yarn(
        factor=factor,
        original_max_positions=original,
        attention_factor=float(temperature),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        whole=bool(rope.get("truncate", True)),
    )


def linear_scaling(factor: float) -> RopeScaling:
    """Every frequency divided by `factor`: Llama's rule with a low bound that lies above all frequencies."""
    return RopeScaling(float(factor), low_freq_factor=1e9, high_freq_factor=2e9, original_max_positions=1)


def hf_scaling(scaling: RopeScaling | Yarn | None) -> dict[str, Any] | None:
    """A rotary scaling as transformers writes it."""
    if scaling is None:
        return None
    if isinstance(scaling, Yarn):
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_positions,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.whole,
        }
    if scaling == linear_scaling(scaling.factor):
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
