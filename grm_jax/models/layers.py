"""What a decoder's blocks are made of: products, norms, drawn parameters, grouped-query attention and the MLP.

Activations are FEATURES FIRST, [D, R], as `decoder` says, which also names the shapes' letters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from grm_jax.models.config import DecoderConfig
from grm_jax.models.rope import rotate


def linear(w: jax.Array, x_IR: jax.Array) -> jax.Array:
    """Weights [O..., I] times activations [I, R] to [O..., R], in the dtype of `w`, accumulated in float32.

    The matrix is flattened first: with several output axes XLA would copy it, transposed, at every call.
    """
    flat = w.reshape(-1, w.shape[-1])
    y = jnp.einsum("OI,IR->OR", flat, x_IR.astype(w.dtype), preferred_element_type=jnp.float32)
    return y.reshape(*w.shape[:-1], -1)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float) -> jax.Array:
    """x / rms(x) * (offset + weight) over the last axis but one (features), in float32."""
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-2, keepdims=True) + eps)
    weight = (offset + weight.astype(jnp.float32)).reshape((1,) * (x.ndim - 2) + (-1, 1))
    return x * scale * weight


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int) -> nnx.Param:
    """A matrix drawn with standard deviation fan_in ** -0.5; `axes` are the logical names that sharding maps."""
    value = jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5
    return nnx.Param(value, axes=axes)


def vector(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


@dataclasses.dataclass(frozen=True)
class Form:
    """How a kind of attention uses what it stores: functions around `attention.attend`, each an identity by default.

    queries: [R, K, Q, H] as `project` gives them, to those that meet the keys; keys: what is stored of some tokens, to
    keys and values [..., K, S, H]; mixed: what `attend` gave each query [R, K, Q, H], to what `output` takes.
    """

    queries: Callable[[jax.Array], jax.Array] = lambda q: q
    keys: Callable[..., tuple[jax.Array, ...]] = lambda *stored: stored
    mixed: Callable[[jax.Array], jax.Array] = lambda mixed: mixed


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; q, k, v, o keep the layout of released checkpoints."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        c = config
        self.config = config
        self.q = param(rngs, (c.heads, c.head_dim, c.dim), ("heads", "head", "embed"), c.dim)
        self.k = param(rngs, (c.kv_heads, c.head_dim, c.dim), ("kv_heads", "head", "embed"), c.dim)
        self.v = param(rngs, (c.kv_heads, c.head_dim, c.dim), ("kv_heads", "head", "embed"), c.dim)
        self.o = param(rngs, (c.dim, c.heads, c.head_dim), ("embed", "heads", "head"), c.heads * c.head_dim)
        if c.qkv_bias:
            self.q_bias = vector(0.0, (c.heads, c.head_dim), ("heads", "head"))
            self.k_bias = vector(0.0, (c.kv_heads, c.head_dim), ("kv_heads", "head"))
            self.v_bias = vector(0.0, (c.kv_heads, c.head_dim), ("kv_heads", "head"))
        if c.qk_norm:
            self.q_norm = vector(1.0 - c.norm_offset, (c.head_dim,), ("head",))
            self.k_norm = vector(1.0 - c.norm_offset, (c.head_dim,), ("head",))

    def project(self, x_DR: jax.Array, angles: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [R, K, Q, H] rotated and scaled; keys (rotated) and values [R, K, H] in the weights' dtype."""
        c = self.config
        q, k, v = (linear(w[...], x_DR) for w in (self.q, self.k, self.v))
        if c.qkv_bias:
            pairs = ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias))
            q, k, v = (y + b[...].astype(jnp.float32)[..., None] for y, b in pairs)
        if c.qk_norm:
            q = rms_norm(q, self.q_norm[...], c.norm_eps, c.norm_offset)
            k = rms_norm(k, self.k_norm[...], c.norm_eps, c.norm_offset)
        q = rotate(q, angles) * c.query_scale
        q = q.reshape(c.kv_heads, c.heads // c.kv_heads, c.head_dim, -1).transpose(3, 0, 1, 2)
        dtype = self.k[...].dtype
        return q, rotate(k, angles).astype(dtype).transpose(2, 0, 1), v.astype(dtype).transpose(2, 0, 1)

    def for_many(self) -> Form:
        """Keys and values are stored as they are used, by many new tokens and by few."""
        return Form()

    def for_few(self) -> Form:
        return Form()

    def output(self, mixed_RKQH: jax.Array) -> jax.Array:
        """Heads back to the model's width: [D, R]."""
        return linear(self.o[...].reshape(self.config.dim, -1), mixed_RKQH.reshape(mixed_RKQH.shape[0], -1).T)


def activated(x: jax.Array, activation: str) -> jax.Array:
    return jax.nn.silu(x) if activation == "silu" else jax.nn.gelu(x, approximate=True)


class Mlp(nnx.Module):
    """down(activation(gate x) * up x)."""

    def __init__(self, config: DecoderConfig, mlp_dim: int, rngs: nnx.Rngs) -> None:
        self.config = config
        self.gate = param(rngs, (mlp_dim, config.dim), ("mlp", "embed"), config.dim)
        self.up = param(rngs, (mlp_dim, config.dim), ("mlp", "embed"), config.dim)
        self.down = param(rngs, (config.dim, mlp_dim), ("embed", "mlp"), mlp_dim)

    def __call__(self, x_DR: jax.Array) -> jax.Array:
        gate = activated(linear(self.gate[...], x_DR), self.config.activation)
        return linear(self.down[...], gate * linear(self.up[...], x_DR))
