"""Numbers of configs: the figures of released config.json files, and what cannot be represented."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from grm_jax.models.config import DecoderConfig
from grm_jax.models.decoder import rope_frequencies
from grm_jax.weights.load import read_config

GEMMA2_27B = {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}  # tie_word_embeddings is absent in the released file, and true
LLAMA31_8B = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN25_05B = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def config_of(tmp_path: Path, numbers: dict) -> DecoderConfig:
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    return read_config(tmp_path)


def test_gemma2_27b_by_hand(tmp_path: Path) -> None:
    config = config_of(tmp_path, GEMMA2_27B)
    assert config.query_scale == pytest.approx(1 / 12)  # 144 ** -0.5, not head_dim ** -0.5
    assert config.embed_scale == pytest.approx(4608**0.5)
    assert config.windows == (4096, None) * 23
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    assert config.tied
    assert config.post_norms
    assert config.norm_offset == 1.0
    assert config.activation == "gelu_tanh"
    assert (config.heads, config.kv_heads, config.head_dim, config.layers) == (32, 16, 128, 46)


def test_llama31_8b_by_hand_in_old_and_new_style(tmp_path: Path) -> None:
    config = config_of(tmp_path, LLAMA31_8B)
    assert config.head_dim == 128
    assert config.query_scale == pytest.approx(128**-0.5)
    assert config.rope_theta == 500_000.0
    assert dataclasses.astuple(config.rope_scaling) == (8.0, 1.0, 4.0, 8192)
    assert not config.tied
    assert config.windows == (None,) * 32
    new = {k: v for k, v in LLAMA31_8B.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**LLAMA31_8B["rope_scaling"], "rope_theta": 500000.0}
    assert config_of(tmp_path, new) == config


def test_qwen_windows_and_defaults(tmp_path: Path) -> None:
    config = config_of(tmp_path, QWEN25_05B)
    assert config.qkv_bias
    assert not config.qk_norm
    assert config.tied
    assert config.head_dim == 64
    assert config.windows == (None,) * 24
    used = {**QWEN25_05B, "use_sliding_window": True}
    assert config_of(tmp_path, used).windows == (None,) * 21 + (32768,) * 3
    qwen3 = config_of(tmp_path, {"model_type": "qwen3", "hidden_size": 1024})
    assert (qwen3.heads, qwen3.kv_heads, qwen3.head_dim) == (32, 32, 128)  # defaults of the family; not 1024 / 32
    assert (qwen3.qk_norm, qwen3.qkv_bias) == (True, False)


def test_linear_rope_divides_every_frequency(tmp_path: Path) -> None:
    config = config_of(tmp_path, {**LLAMA31_8B, "rope_scaling": {"type": "linear", "factor": 4.0}})
    plain = rope_frequencies(config.head_dim, config.rope_theta, None)
    np.testing.assert_allclose(
        rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling), plain / 4, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2': known are deepseek_v2, deepseek_v3, gemma2, llama, mistral"),
        ({"model_type": None}, "model_type = None"),
        ({"attention_bias": True}, "attention_bias = True, it must be absent or False"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu', it must be absent or 'silu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "unquantised"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope type 'longrope': known are"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"num_key_value_heads": 5}, "no multiple of kv_heads = 5"),
    ],
)
def test_configs_that_cannot_be_represented(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, LLAMA31_8B | change)
