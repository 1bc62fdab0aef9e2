"""Tiny random models for the tests: two layers, a byte tokenizer's vocabulary, every feature that a family can have."""

import dataclasses

import jax
import jax.numpy as jnp

from grm_jax.models.config import DecoderConfig, Experts, Latent
from grm_jax.models.decoder import Model, random_params, split_abstract
from grm_jax.sharding import make_mesh

LLAMA = DecoderConfig(
    vocab_size=259,
    dim=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    query_scale=8**-0.5,
    max_positions=1024,
    tied=True,
    windows=(None, None),
)
GEMMA = dataclasses.replace(
    LLAMA,
    windows=(8, None),
    activation="gelu_tanh",
    norm_offset=1.0,
    embed_scale=32**0.5,
    attention_softcap=5.0,
    logit_softcap=3.0,
    post_norms=True,
)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, tied=False)
# One layer, which compiles in half the time; queries from a latent too.
DEEPSEEK = dataclasses.replace(
    LLAMA,
    layers=1,
    windows=(None,),
    kv_heads=4,
    head_dim=12,
    query_scale=12**-0.5,
    latent=Latent(kv_rank=8, rope_dim=4, value_dim=6, q_rank=16),
    experts=Experts(
        *(8, 3, 16, 24), sigmoid=True, bias=True, groups=2, groups_kept=1, group_top=2, normalised=True, scale=2.5
    ),
)


def tiny_model(config: DecoderConfig = LLAMA, seed: int = 0, devices: int = 1, sharpness: float = 1.0) -> Model:
    """A random model; `sharpness` scales the embedding, and so how peaked its next-token distributions are."""
    graph, _ = split_abstract(config)
    params = random_params(config, seed)
    params["embed"] = params["embed"] * jnp.float32(sharpness)
    mesh = make_mesh(data=devices)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return Model(config, graph, jax.device_put(params, everywhere) if devices > 1 else params, mesh)
