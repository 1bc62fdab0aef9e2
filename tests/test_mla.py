"""Latent attention: what a cache of it holds, that decoding on it is a forward pass, and the numbers of its families."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import GOLDENS, load
from test_forward import COUNTS, LENGTHS, each_alone, texts
from test_sampler import KEY, assert_drawn, prompts_of
from tiny import DEEPSEEK, tiny_model

from grm_jax.models.attention import Keys
from grm_jax.models.config import Experts, Latent, Yarn
from grm_jax.models.decoder import Cache, bind, split_abstract
from grm_jax.models.families import from_hf, to_hf
from grm_jax.models.flops import attention_flops, matrix_weights
from grm_jax.models.rope import rope_frequencies
from grm_jax.sampler import Sampling, generate, rollout
from grm_jax.sharding import make_mesh
from grm_jax.train.forward import REMATS, of_samples_with_loads
from grm_jax.weights import names
from grm_jax.weights.load import read_config

YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
V2_LITE = {
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V2 = V2_LITE | {  # V2.5's are the same
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
V3 = V2 | {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}


# ---- numbers ----


def test_v2_lite_by_hand() -> None:
    config = from_hf(V2_LITE)
    assert config.latent == Latent(512, 64, 128, q_rank=None, interleaved=True, norm_eps=1e-6)
    assert config.experts == Experts(64, 6, 1408, 2816, 1)
    assert (config.head_dim, config.heads, config.kv_heads, config.layers) == (192, 16, 16, 27)
    assert config.rope_scaling == Yarn(40.0, 4096, 1.0, 32.0, 1.0)
    temperature = 0.1 * 0.707 * math.log(40) + 1
    assert config.query_scale == pytest.approx(192**-0.5 * temperature**2)
    assert config.mixes(1)
    assert not config.mixes(0)


def test_v2_and_v3_routers_by_hand() -> None:
    assert from_hf(V2).experts == Experts(160, 6, 1536, 3072, 1, groups=8, groups_kept=3, scale=16.0)
    assert from_hf(V2).latent.q_rank == 1536
    router = {"sigmoid": True, "bias": True, "groups": 8, "groups_kept": 4, "group_top": 2, "normalised": True}
    assert from_hf(V3).experts == Experts(256, 8, 2048, 2048, 3, scale=2.5, **router)


@pytest.mark.parametrize(
    ("numbers", "total", "active"),
    [(V2_LITE, 15.7e9, 2.7e9), (V2, 236e9, 21.4e9), (V3, 671e9, 37.6e9)],  # as the papers count, embeddings in both
)
def test_parameters_are_as_many_as_the_papers_say(numbers: dict, total: float, active: float) -> None:
    config = from_hf(numbers)
    stored = sum(math.prod(slot.shape) for slot in names.hugging_face(config).slots.values())
    assert stored == pytest.approx(total, rel=2e-3)
    assert matrix_weights(config) + config.vocab_size * config.dim == pytest.approx(active, rel=0.02)
    assert attention_flops(config, 10) == 2 * config.layers * config.heads * (192 + 128) * 10


@pytest.mark.parametrize("numbers", [V2_LITE, V2, V3, V2_LITE | {"first_k_dense_replace": 27}])
def test_configs_are_read_back(numbers: dict) -> None:
    assert from_hf(to_hf(from_hf(numbers))) == from_hf(numbers)


def test_other_yarn_and_other_pairs_are_read_back() -> None:
    qwen = {"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 32768}
    found = from_hf(qwen)
    assert found.rope_scaling == Yarn(4.0, 32768, 0.1 * math.log(4) + 1)
    assert from_hf(to_hf(found)) == found
    halves = from_hf(V3 | {"rope_interleave": False, "rope_scaling": None})
    assert not halves.latent.interleaved
    assert from_hf(to_hf(halves)) == halves


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid', it must be absent or 'softmax'"),
        ({"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc', it must be 'greedy' or 'group_limited_greedy'"),
        ({"norm_topk_prob": True}, "norm_topk_prob = True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"num_experts_per_tok": None}, "no num_experts_per_tok"),
        ({"topk_method": "group_limited_greedy", "n_group": 7}, "64 experts in 7 groups, 1 kept"),
        ({"topk_method": "group_limited_greedy", "n_group": 16}, "per_token = 6, .* have 1 x 4 experts"),
        ({"qk_nope_head_dim": 0}, "head_dim = 64, rope_dim = 64"),
    ],
)
def test_configs_that_cannot_be_represented(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(V2_LITE | change)


def test_yarn_by_hand() -> None:
    """64 numbers, base 10,000, 4,096 positions: pairs to 10 are kept, from 23 on divided by 40, 16 is 6/13 of the way."""
    plain, found = (np.asarray(rope_frequencies(64, 1e4, s)) for s in (None, Yarn(40.0, 4096, 1.0)))
    np.testing.assert_allclose(found[:11], plain[:11], rtol=1e-6)
    np.testing.assert_allclose(found[23:], plain[23:] / 40, rtol=1e-6)
    np.testing.assert_allclose(found[16], plain[16] * (7 / 13 + 6 / 13 / 40), rtol=1e-5)


# ---- the cache ----


def test_a_cache_holds_the_latents_alone() -> None:
    """576 numbers a token and layer of V2-Lite: 31,104 bytes a token in bfloat16; of its 16 heads they were 276,480."""
    config = from_hf(V2_LITE)
    assert config.stored == ((1, 576),)
    two = dataclasses.replace(config, layers=2, windows=(None, None))
    part = rollout.empty(two, make_mesh(), jnp.dtype("bfloat16"), (3,), 7)
    assert [k.shape for k in part.k] == [(3, 1, 7, 576)] * 2
    assert sum(x.size for x in jax.tree.leaves((part.k, part.v))) == 2 * 3 * 7 * 576
    assert 27 * 576 * 2 == 31_104


def test_head_prompts_and_decode_steps_are_one_forward_pass() -> None:
    """transformers' checkpoint: a head for all, two prompts, two samples each that decode on the latents themselves."""
    family = GOLDENS / "deepseek_v3"
    config, params = read_config(family), load(family)
    graph, _ = split_abstract(config)
    run = jax.jit(lambda *args: bind(graph, params)(*args))
    rng = np.random.default_rng(0)
    head, prompts, samples = (rng.integers(3, 96, shape) for shape in ((5,), (2, 6), (2, 2, 4)))
    parts = np.broadcast_to(head, (2, 2, 5)), np.repeat(prompts[:, None], 2, axis=1), samples
    whole = np.concatenate(parts, axis=2).reshape(4, 15)
    expected, _ = run(whole, np.broadcast_to(np.arange(15), whole.shape))
    shared = rollout.prefill(graph, params, None, head[None], np.array([5]))
    shared = Keys(tuple(k[0] for k in shared.k), (), shared.positions[0])
    mine = rollout.prefill(graph, params, shared, prompts, np.array([6, 6]))
    assert mine.v == ()
    assert mine.k[0].shape == (2, 1, 6, 16 + 8)
    cache = Cache((shared, mine), rollout.empty(config, make_mesh(), jnp.dtype("float32"), (4,), 4), 0)
    for step in range(4):
        hidden, cache = run(samples[:, :, step], np.full((2, 2), 11 + step), cache)
        np.testing.assert_allclose(hidden.reshape(4, -1), expected[:, 11 + step], atol=2e-5, rtol=0)
    assert cache.loads.shape == (1, 8)


@pytest.mark.slow
def test_samples_equal_the_reference_token_for_token() -> None:
    """The sampler with its heads, buckets, refills and rings, on a model of latents and experts."""
    model = tiny_model(DEEPSEEK)
    prompts, sampling = prompts_of(1, 33, shared=66), Sampling(eos_ids=(5, 9))
    found = generate(model, prompts, 2, KEY, max_new_tokens=16, sampling=sampling, slots=2)
    for item, sample in ((0, 0), (1, 1)):
        assert_drawn(found[item][sample], model, 16, sampling)


# ---- training ----


@pytest.mark.slow
def test_samples_behind_shared_prompts_are_each_alone() -> None:
    """In value and in gradient of every parameter but the router's bias, which has none; recomputed layers included."""
    model = tiny_model(DEEPSEEK)
    head, prompts, samples, weights = texts(5)
    real = np.asarray(weights != 0)

    def shared(params):
        arrays = map(jnp.asarray, (head, prompts, LENGTHS, samples, COUNTS))
        found, _, loads = of_samples_with_loads(bind(model.graph, params), *arrays, 1.0, REMATS["block"])
        return jnp.sum(jnp.where(real, weights * found, 0)), (found, loads)

    def alone(params):
        found, _ = each_alone(bind(model.graph, params), head, prompts, samples, 1.0)
        return jnp.sum(weights * found), found

    (_, expected), wanted = jax.jit(jax.value_and_grad(alone, has_aux=True))(model.params)
    (_, (found, loads)), grads = jax.jit(jax.value_and_grad(shared, has_aux=True))(model.params)
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(expected)[real], atol=2e-5)
    assert loads.shape == (1, 8)
    assert loads.sum() == 3 * COUNTS.sum()
    for name in wanted:
        np.testing.assert_allclose(grads[name], wanted[name], atol=1e-4, err_msg=name)
        assert name.endswith("router_bias") != (np.abs(np.asarray(wanted[name])).max() > 1e-3), name
