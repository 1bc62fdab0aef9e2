"""Rotary positions (arXiv 2104.09864): the angle of each pair of a query's or a key's numbers, and the turn itself.

Shapes: N heads, H rotated numbers of a head, R tokens, features first as in the decoder.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grm_jax.models.config import RopeScaling, Yarn


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | Yarn | None) -> Float[Array, "H/2"]:
    """Angular frequency of each rotated pair, in radians a token, with the config's scaling."""
    freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return freq
    if isinstance(scaling, Yarn):
        return _yarn(freq, theta, scaling)
    turns = scaling.original_max_positions * freq / (2 * math.pi)  # rotations within the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return freq * (smooth + (1 - smooth) / scaling.factor)


def _yarn(freq: Float[Array, "H/2"], theta: float, scaling: Yarn) -> Float[Array, "H/2"]:
    """YaRN's "NTK-by-parts" (arXiv 2309.00071, section 3.2), its ramp over the pairs' indices as released code has it."""
    size = 2 * freq.shape[0]

    def index(turns: float) -> float:
        """Of the pair, a fraction, that turns so often within the original context."""
        return size * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    divided = (jnp.arange(size // 2, dtype=jnp.float32) - low) / ((high - low) or 1e-3)
    divided = jnp.clip(divided, 0.0, 1.0)
    return freq * (1 - divided + divided / scaling.factor)


def rotate(x_NHR: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding, halves layout: pairs are (i, i + H/2); cos and sin of the angles are [H/2, R]."""
    cos, sin = (a[None] for a in angles)
    return _turned(*jnp.split(x_NHR, 2, axis=1), cos, sin)


def rotate_interleaved(x_NHR: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of pairs (2i, 2i + 1); they come out as (i, i + H/2), in queries and keys alike."""
    cos, sin = (a[None] for a in angles)
    return _turned(x_NHR[:, 0::2], x_NHR[:, 1::2], cos, sin)


def _turned(first: jax.Array, second: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
