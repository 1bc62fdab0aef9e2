"""FLOPs: counted from a decoder's config, two for each weight and token, and reached by this machine's products."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from grm_jax.models.config import DecoderConfig


def matrix_weights(c: DecoderConfig) -> int:
    """Weights that every token is multiplied with, the head included; of a mixture's experts, those that it goes to."""
    mlps = sum(_mixture(c) if c.mixes(layer) else 3 * c.dim * c.mlp_dim for layer in range(c.layers))
    return c.layers * _attention(c) + mlps + c.vocab_size * c.dim


def _attention(c: DecoderConfig) -> int:
    if c.latent is None:
        return 2 * c.dim * c.head_dim * (c.heads + c.kv_heads)
    of, queries = c.latent, c.heads * c.head_dim
    down = c.dim * (of.kv_rank + of.rope_dim) + (c.dim * of.q_rank if of.q_rank else 0)
    keys_values = of.kv_rank * c.heads * (c.head_dim - of.rope_dim + of.value_dim)
    return down + (of.q_rank or c.dim) * queries + keys_values + c.dim * c.heads * of.value_dim


def _mixture(c: DecoderConfig) -> int:
    of = c.experts
    return of.routed * c.dim + 3 * c.dim * (of.per_token * of.mlp_dim + of.shared_dim)


def attention_flops(c: DecoderConfig, context: float) -> float:
    """FLOPs of one token's attention over `context` tokens, all layers; of latents multiplied out, as in training."""
    return 2 * c.layers * c.heads * (c.head_dim + c.value_dim) * context


def model_flops(c: DecoderConfig, forward_tokens: float, trained_tokens: float, context: float) -> float:
    """FLOPs that a step needs: each token of a forward pass once, each token trained on three times as many.

    `context` is the mean number of tokens that one attends to. A backward pass takes two products for each of the
    forward's (arXiv 2001.08361, section 2.1); what is computed a second time to save memory does not count.
    """
    forward = 2 * matrix_weights(c) + attention_flops(c, context)
    return forward_tokens * forward + trained_tokens * 3 * forward


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after one that compiles."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return seconds


def product_flops(dtype: jnp.dtype, size: int | None = None) -> float:
    """FLOP/s that a product of two [size, size] matrices of random numbers reaches, the best of five.

    size: by default 2048 on a CPU, and 8192 on accelerators, which need longer to start a smaller product than to do it.
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)  # zeros and ones take less power, and so less time
    product = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.float32))
    return 2 * size**3 / min(timed(lambda: product(a, a), 5))
