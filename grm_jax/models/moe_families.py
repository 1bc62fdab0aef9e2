"""Configs with experts or latent attention: Qwen3 MoE, DeepSeek-V2 (V2-Lite, V2.5) and DeepSeek-V3, read and written.

What the released configs say of routing:

| | experts | a token's | shared | dense layers | affinity | groups | weights |
|---|---|---|---|---|---|---|---|
| V2-Lite | 64 | 6 | 2 | 1 | softmax | none | as they are |
| V2, V2.5 | 160 | 6 | 2 | 1 | softmax | 3 of 8 by their best expert | times 16 |
| V3 | 256 | 8 | 1 | 3 | sigmoid, bias in the choice | 4 of 8 by their two best experts | of sum 1, times 2.5 |
| Qwen3 30B-A3B, 235B-A22B | 128 | 8 | none | none | softmax | none | of sum 1 |

Sources: arXiv 2405.04434, 2412.19437, 2505.09388, and transformers 5.x for what they leave open.
"""

from __future__ import annotations

import math
from typing import Any

from grm_jax.models.config import DecoderConfig, Experts, Latent, Yarn
from grm_jax.models.hf_numbers import LLAMA, decoder_of, hf_scaling, refuse_other, rope_section, yarn_temperature

_QWEN3_MOE = LLAMA | {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "mlp_only_layers": None,
}
_DEEPSEEK_V2 = LLAMA | {
    "vocab_size": 102400,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": None,
    "moe_intermediate_size": 1407,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_DEEPSEEK_V3 = _DEEPSEEK_V2 | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "rope_interleave": True,
}


def qwen3_moe(given: dict[str, Any]) -> DecoderConfig:
    """Qwen3's attention, with experts in every layer that `mlp_only_layers` does not name."""
    config = _QWEN3_MOE | given
    refuse_other(config, "decoder_sparse_step", (1,), "experts in every layer behind the dense ones are what is built")
    dense = config["mlp_only_layers"] or []
    if list(dense) != list(range(len(dense))):
        raise ValueError(f"mlp_only_layers = {dense}: dense layers come first, so it must be 0, 1, 2, ... or empty")
    experts = Experts(
        routed=config.get("num_local_experts") or config["num_experts"],
        per_token=config["num_experts_per_tok"],
        mlp_dim=config["moe_intermediate_size"],
        dense_layers=len(dense),
        normalised=bool(config["norm_topk_prob"]),
    )
    window = config["sliding_window"] if config["use_sliding_window"] else None
    windows = (window,) * config["num_hidden_layers"]
    return decoder_of(given, _QWEN3_MOE, windows=windows, qk_norm=True, experts=experts)


def deepseek_v2(given: dict[str, Any]) -> DecoderConfig:
    """Latent attention and a softmax router: the best experts of all, or of the groups with the best single expert."""
    config = _DEEPSEEK_V2 | given
    refuse_other(config, "scoring_func", (None, "softmax"), "DeepSeek-V2's router is a softmax")
    refuse_other(config, "topk_method", ("greedy", "group_limited_greedy"), "no other choice of experts is built")
    refuse_other(
        config, "norm_topk_prob", (None, False), "weights of sum 1 are of V3's router; no released V2 has them"
    )
    grouped = config["topk_method"] == "group_limited_greedy"
    groups = {"groups": config["n_group"], "groups_kept": config["topk_group"]} if grouped else {}
    return _deepseek(given, _DEEPSEEK_V2, interleaved=True, **groups)


def deepseek_v3(given: dict[str, Any]) -> DecoderConfig:
    """Latent attention and a sigmoid router with a bias: the best experts of the groups with the best two."""
    config = _DEEPSEEK_V3 | given
    refuse_other(config, "scoring_func", (None, "sigmoid"), "DeepSeek-V3's router is a sigmoid")
    refuse_other(config, "topk_method", ("noaux_tc",), "no other choice of experts is built")
    router = {"sigmoid": True, "bias": True, "normalised": bool(config["norm_topk_prob"])}
    if config["n_group"] > 1:
        router |= {"groups": config["n_group"], "groups_kept": config["topk_group"], "group_top": 2}
    return _deepseek(given, _DEEPSEEK_V3, interleaved=bool(config["rope_interleave"]), **router)


def _deepseek(given: dict[str, Any], defaults: dict[str, Any], interleaved: bool, **router: Any) -> DecoderConfig:
    config = defaults | given
    refuse_other(config, "moe_layer_freq", (None, 1), "experts in every layer behind the dense ones are what is built")
    head_dim = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    rope = rope_section(config)
    of_all = yarn_temperature(rope.get("factor") or 1.0, rope.get("mscale_all_dim") or 0.0)
    latent = Latent(
        kv_rank=config["kv_lora_rank"],
        rope_dim=config["qk_rope_head_dim"],
        value_dim=config["v_head_dim"],
        q_rank=config["q_lora_rank"],
        interleaved=interleaved,
    )
    dense, inner = config["first_k_dense_replace"] or 0, config["moe_intermediate_size"]
    experts = None
    if config["n_routed_experts"] and dense < config["num_hidden_layers"]:
        if not config["num_experts_per_tok"]:
            raise ValueError("config has no num_experts_per_tok: how many experts a token goes to has no default")
        experts = Experts(
            routed=config["n_routed_experts"],
            per_token=config["num_experts_per_tok"],
            mlp_dim=inner,
            shared_dim=inner * (config["n_shared_experts"] or 0),
            dense_layers=dense,
            scale=float(config["routed_scaling_factor"]),
            **router,
        )
    # Heads' keys are all made from the latent: num_key_value_heads and head_dim of these configs say nothing of it.
    heads = {"head_dim": head_dim, "num_key_value_heads": config["num_attention_heads"]}
    return decoder_of(
        given | heads, defaults, query_scale=head_dim**-0.5 * of_all * of_all, latent=latent, experts=experts
    )


def family_of(c: DecoderConfig) -> str | None:
    """The plainest of these families whose architecture has the numbers; None for one without experts and latents."""
    if c.latent is None:
        return "qwen3_moe" if c.experts else None
    return "deepseek_v3" if not c.latent.interleaved or (c.experts and c.experts.sigmoid) else "deepseek_v2"


def written(c: DecoderConfig) -> dict[str, Any]:
    """What a config.json says of latents and experts, nothing for a model without."""
    return (_written_latent(c) if c.latent else {}) | _written_experts(c)


def _written_latent(c: DecoderConfig) -> dict[str, Any]:
    of = c.latent
    found = {
        "head_dim": of.rope_dim,  # transformers takes it for the rotary embedding
        "kv_lora_rank": of.kv_rank,
        "q_lora_rank": of.q_rank,
        "qk_nope_head_dim": c.head_dim - of.rope_dim,
        "qk_rope_head_dim": of.rope_dim,
        "v_head_dim": of.value_dim,
    }
    if family_of(c) == "deepseek_v3":
        found["rope_interleave"] = of.interleaved
    if isinstance(c.rope_scaling, Yarn) and c.rope_scaling.factor > 1:
        found["rope_scaling"] = hf_scaling(c.rope_scaling) | _written_scales(c, c.rope_scaling)
    return found


def _written_scales(c: DecoderConfig, yarn: Yarn) -> dict[str, float]:
    """mscale and mscale_all_dim, worked back from the query scale and the temperature; released ones have few digits."""
    of_all = math.sqrt(c.query_scale * c.head_dim**0.5)
    scales = ((x - 1) / (0.1 * math.log(yarn.factor)) for x in (yarn.attention_factor * of_all, of_all))
    return dict(zip(("mscale", "mscale_all_dim"), (round(scale, 9) for scale in scales), strict=True))


def _written_experts(c: DecoderConfig) -> dict[str, Any]:
    of = c.experts
    if of is None:  # DeepSeek's architecture without experts is dense in every layer
        return {"first_k_dense_replace": c.layers, "num_experts_per_tok": 1} if c.latent else {}
    shared = {
        "num_experts_per_tok": of.per_token,
        "moe_intermediate_size": of.mlp_dim,
        "norm_topk_prob": of.normalised,
    }
    if c.latent is None:
        dense = list(range(of.dense_layers))
        windowed = c.windows[0] is not None
        return shared | {"num_experts": of.routed, "mlp_only_layers": dense, "use_sliding_window": windowed}
    shared |= {
        "n_routed_experts": of.routed,
        "n_shared_experts": of.shared_dim // of.mlp_dim,
        "first_k_dense_replace": of.dense_layers,
        "routed_scaling_factor": of.scale,
        "n_group": of.groups,
        "topk_group": of.groups_kept,
    }
    if family_of(c) == "deepseek_v2":
        shared["topk_method"] = "group_limited_greedy" if of.groups > 1 else "greedy"
    return shared
