"""One decoder for every family: a Flax NNX module whose numbers come from a `DecoderConfig`.

What happens in a call `hidden, cache = model(tokens, positions, cache)`:
1. tokens become embeddings, positions become rotary angles and one mask a kind of layer (full or windowed);
2. each block attends over PARTS, one softmax over all of them: the cache's parts (keys and values computed before, seen
   by every row or by one) and either the new tokens themselves or each query's own suffix;
3. `model.logits(hidden)` goes through the head, apart, so that callers choose the tokens that pay for it.

Masks are never passed: every key carries its position, -1 where nothing is stored, and a query at position p sees the
keys at 0 <= position <= p, within the layer's window. So left padding, right padding, ring buffers and shared prefixes
are one rule, and no real token can see padding. Texts packed into one row carry segments besides: new tokens then see
those of their own segment only.

Inside, activations are FEATURES FIRST, [D, R]: every product is weights times activations, which for the few rows of a
decoding step is up to 1.6 times as fast on CPU as activations times weights, and the same to an accelerator.

Shapes: B rows, T new tokens, R = B * T, S cached tokens, D model, N query heads, K key heads, Q = N / K, H head, F MLP,
V vocabulary. Arithmetic: weights and caches keep their dtype, products accumulate in float32; the residual stream, norms
and softmax are float32.
Sources: Llama 3 (arXiv 2407.21783), Qwen2.5 (2412.15115), Qwen3 (2505.09388), Gemma 2 (2408.00118).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from grm_jax.models.attention import Keys, Owner, attend, pieces, softcapped, visible
from grm_jax.models.config import DecoderConfig, RopeScaling
from grm_jax.sharding import batch_columns

Params = dict[str, jax.Array]  # "layers.0.attention.q" -> array; the pytree that jitted functions take

Remat = Callable[[Callable[..., Any]], Callable[..., Any]]


@partial(jax.tree_util.register_dataclass, data_fields=["parts", "own", "clock"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """What was computed before.

    parts: read only, shared by all (leading axes ()) or by a row ((B,)).
    own: None, or each query's own suffix (leading axis B * T), whose slot `clock` this call's tokens are written to;
    queries then do not see each other: a row is a prompt, and its T queries are T samples of it.
    """

    parts: tuple[Keys, ...] = ()
    own: Keys | None = None
    clock: jax.Array | int = 0


def _linear(w: jax.Array, x_IR: jax.Array) -> jax.Array:
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


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Float[Array, "H/2"]:
    """Angular frequency of each rotated pair, in radians a token; Llama 3.1's scaling where the config has one."""
    freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return freq
    turns = scaling.original_max_positions * freq / (2 * math.pi)  # rotations within the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return freq * (smooth + (1 - smooth) / scaling.factor)


def _rotate(x_NHR: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding, halves layout: pairs are (i, i + H/2); cos and sin of the angles are [H/2, R]."""
    cos, sin = (a[None] for a in angles)
    first, second = jnp.split(x_NHR, 2, axis=1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def _param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int) -> nnx.Param:
    """A matrix drawn with standard deviation fan_in ** -0.5; `axes` are the logical names that sharding maps."""
    value = jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5
    return nnx.Param(value, axes=axes)


def _vector(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; q, k, v, o keep the layout of released checkpoints."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        c = config
        self.config = config
        self.q = _param(rngs, (c.heads, c.head_dim, c.dim), ("heads", "head", "embed"), c.dim)
        self.k = _param(rngs, (c.kv_heads, c.head_dim, c.dim), ("kv_heads", "head", "embed"), c.dim)
        self.v = _param(rngs, (c.kv_heads, c.head_dim, c.dim), ("kv_heads", "head", "embed"), c.dim)
        self.o = _param(rngs, (c.dim, c.heads, c.head_dim), ("embed", "heads", "head"), c.heads * c.head_dim)
        if c.qkv_bias:
            self.q_bias = _vector(0.0, (c.heads, c.head_dim), ("heads", "head"))
            self.k_bias = _vector(0.0, (c.kv_heads, c.head_dim), ("kv_heads", "head"))
            self.v_bias = _vector(0.0, (c.kv_heads, c.head_dim), ("kv_heads", "head"))
        if c.qk_norm:
            self.q_norm = _vector(1.0 - c.norm_offset, (c.head_dim,), ("head",))
            self.k_norm = _vector(1.0 - c.norm_offset, (c.head_dim,), ("head",))

    def project(self, x_DR: jax.Array, angles: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [R, K, Q, H] rotated and scaled; keys (rotated) and values [R, K, H] in the weights' dtype."""
        c = self.config
        q, k, v = (_linear(w[...], x_DR) for w in (self.q, self.k, self.v))
        if c.qkv_bias:
            pairs = ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias))
            q, k, v = (y + b[...].astype(jnp.float32)[..., None] for y, b in pairs)
        if c.qk_norm:
            q = rms_norm(q, self.q_norm[...], c.norm_eps, c.norm_offset)
            k = rms_norm(k, self.k_norm[...], c.norm_eps, c.norm_offset)
        q = _rotate(q, angles) * c.query_scale
        q = q.reshape(c.kv_heads, c.heads // c.kv_heads, c.head_dim, -1).transpose(3, 0, 1, 2)
        dtype = self.k[...].dtype
        return q, _rotate(k, angles).astype(dtype).transpose(2, 0, 1), v.astype(dtype).transpose(2, 0, 1)

    def output(self, mixed_RKQH: jax.Array) -> jax.Array:
        """Heads back to the model's width: [D, R]."""
        return _linear(self.o[...].reshape(self.config.dim, -1), mixed_RKQH.reshape(mixed_RKQH.shape[0], -1).T)


class Mlp(nnx.Module):
    """down(activation(gate x) * up x)."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        c = config
        self.config = config
        self.gate = _param(rngs, (c.mlp_dim, c.dim), ("mlp", "embed"), c.dim)
        self.up = _param(rngs, (c.mlp_dim, c.dim), ("mlp", "embed"), c.dim)
        self.down = _param(rngs, (c.dim, c.mlp_dim), ("embed", "mlp"), c.mlp_dim)

    def __call__(self, x_DR: jax.Array) -> jax.Array:
        gate = _linear(self.gate[...], x_DR)
        gate = jax.nn.silu(gate) if self.config.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        return _linear(self.down[...], gate * _linear(self.up[...], x_DR))


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        weight = 1.0 - config.norm_offset
        self.norm_attention = _vector(weight, (config.dim,), ("embed",))
        self.attention = Attention(config, rngs)
        self.norm_mlp = _vector(weight, (config.dim,), ("embed",))
        self.mlp = Mlp(config, rngs)
        if config.post_norms:
            self.norm_attention_post = _vector(weight, (config.dim,), ("embed",))
            self.norm_mlp_post = _vector(weight, (config.dim,), ("embed",))

    def _norm(self, x: jax.Array, weight: nnx.Param) -> jax.Array:
        return rms_norm(x, weight[...], self.config.norm_eps, self.config.norm_offset)

    def add_attention(self, x_DR: jax.Array, mixed_RKQH: jax.Array) -> jax.Array:
        y = self.attention.output(mixed_RKQH)
        return x_DR + (self._norm(y, self.norm_attention_post) if self.config.post_norms else y)

    def add_mlp(self, x_DR: jax.Array) -> jax.Array:
        y = self.mlp(self._norm(x_DR, self.norm_mlp))
        return x_DR + (self._norm(y, self.norm_mlp_post) if self.config.post_norms else y)

    def project(self, x_DR: jax.Array, angles: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.attention.project(self._norm(x_DR, self.norm_attention), angles)


class Decoder(nnx.Module):
    """The whole model. Build it abstractly with `split_abstract`, bind parameters with `bind`.

    mesh: where it runs; rows of its activations then stay spread over it as the batch is.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, mesh: jax.sharding.Mesh | None = None) -> None:
        self.config = config
        self.mesh = mesh
        self.embed = _param(rngs, (config.vocab_size, config.dim), ("vocab", "embed"), config.dim)
        self.layers = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = _vector(1.0 - config.norm_offset, (config.dim,), ("embed",))
        if config.scalar:
            self.score = _vector(0.0, (1, config.dim), (None, "embed"))
        elif not config.tied:
            self.head = _param(rngs, (config.vocab_size, config.dim), ("vocab", "embed"), config.dim)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache | None = None,
        segments: Int[Array, "B T"] | None = None,
        remat: Remat | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Final hidden states (normed, float32) and the cache with the new tokens in it.

        tokens: any id where positions is -1 (padding). With `cache.own` the returned cache has the tokens written in
        slot `clock` and the clock moved on; otherwise the new keys come back as one more part, (B,) leading.
        segments: which of the texts packed into its row a token belongs to; without `cache.own`, and positions then
        begin anew with each. remat: wraps a layer (`jax.checkpoint`), so that the backward pass computes it again.
        """
        cache = cache or Cache()
        config, shape = self.config, tokens.shape
        columns = partial(batch_columns, self.mesh, shape[0])
        x = columns(self.embed[...][tokens.reshape(-1)].astype(jnp.float32).T * config.embed_scale)
        freq = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        theta = freq[:, None] * positions.reshape(1, -1).astype(jnp.float32)
        angles = (jnp.cos(theta), jnp.sin(theta))
        owners = [Owner.ALL if part.positions.ndim == 1 else Owner.ROW for part in cache.parts]
        owners.append(Owner.ROW if cache.own is None else Owner.QUERY)
        new_positions = positions
        if cache.own is not None:
            new_positions = _write(cache.own.positions, positions.reshape(-1), cache.clock)
        keys = [p.reshape(-1, 1, p.shape[-1]) for p in (*(part.positions for part in cache.parts), new_positions)]
        if cache.own is not None:
            keys[-1] = keys[-1].reshape(*positions.shape, -1)
        spans = pieces(shape[1]) if cache.own is None else [slice(None)]
        seen = {w: [visible(positions, owners, keys, segments, w, span) for span in spans] for w in set(config.windows)}
        ks, vs = [], []
        for i, (block, window) in enumerate(zip(self.layers, config.windows, strict=True)):

            def layer(x: jax.Array, i: int = i, block: Block = block, window: int | None = window):
                q, k, v = block.project(columns(x), angles)
                if cache.own is None:
                    k, v = (y.reshape(*shape, *y.shape[1:]).swapaxes(1, 2) for y in (k, v))  # [B, K, T, H]
                else:
                    k, v = _write(cache.own.k[i], k, cache.clock), _write(cache.own.v[i], v, cache.clock)
                pairs = [*((part.k[i], part.v[i]) for part in cache.parts), (k, v)]
                mixed = []
                for piece, masks in zip(spans, seen[window], strict=True):
                    pairs[-1] = (k, v) if cache.own else (k[:, :, : piece.stop], v[:, :, : piece.stop])
                    parts = [(o, *kv, mask) for o, kv, mask in zip(owners, pairs, masks, strict=True)]
                    mixed.append(attend(q.reshape(*shape, *q.shape[1:])[:, piece], parts, config.attention_softcap))
                return block.add_mlp(block.add_attention(x, jnp.concatenate(mixed, axis=1).reshape(q.shape))), k, v

            x, k, v = (layer if remat is None else remat(layer))(x)
            ks.append(k)
            vs.append(v)
        new = Keys(tuple(ks), tuple(vs), new_positions)
        hidden = rms_norm(x, self.norm[...], config.norm_eps, config.norm_offset).T.reshape(*shape, -1)
        if cache.own is None:
            return hidden, dataclasses.replace(cache, parts=(*cache.parts, new))
        return hidden, dataclasses.replace(cache, own=new, clock=cache.clock + 1)

    def scalars(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        """The scalar head's number for each hidden state, float32; for a config with `scalar`."""
        score_D = self.score[...][0].astype(jnp.float32)
        return jnp.einsum("...D,D->...", hidden, score_D)

    @property
    def head_matrix(self) -> Float[Array, "V D"]:
        """The output head's weights: the embedding itself where they are tied."""
        return (self.embed if self.config.tied else self.head)[...]

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits of hidden states, float32, soft-capped where the family does so."""
        # The barrier keeps the product weights-first: XLA would swap its sides to save a transposition that costs less.
        logits_VR = jax.lax.optimization_barrier(_linear(self.head_matrix, hidden.reshape(-1, hidden.shape[-1]).T))
        return softcapped(logits_VR, self.config.logit_softcap).T.reshape(*hidden.shape[:-1], -1)


def _write(store: jax.Array, new: jax.Array, clock: jax.Array | int) -> jax.Array:
    """Each query's new key [R, K, H] into slot `clock` of its suffix [R, K, S, H]; positions [R] into [R, S]."""
    axis = store.ndim - 2 if store.ndim == 4 else 1
    return jax.lax.dynamic_update_slice_in_dim(store, jnp.expand_dims(new, axis), clock, axis)


def split_abstract(
    config: DecoderConfig, mesh: jax.sharding.Mesh | None = None
) -> tuple[nnx.GraphDef, dict[str, tuple[tuple[int, ...], tuple]]]:
    """The module's graph and, for each parameter path, its shape and logical axes; nothing is allocated."""
    abstract = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), mesh))
    graph, state = nnx.split(abstract)
    shapes = {
        ".".join(map(str, path)): (leaf.get_value().shape, leaf.get_metadata()["axes"])
        for path, leaf in nnx.to_flat_state(state)
    }
    return graph, shapes


def bind(graph: nnx.GraphDef, params: Mapping[str, jax.Array]) -> Decoder:
    """The module over these parameters; a trace-time step, free inside jit."""
    nested: dict = {}
    for path, value in params.items():
        *parents, leaf = path.split(".")
        node = nested
        for name in parents:
            node = node.setdefault(int(name) if name.isdigit() else name, {})
        node[leaf] = value
    return nnx.merge(graph, nnx.State(nested))


def random_params(config: DecoderConfig, seed: int, dtype: jnp.dtype = jnp.float32) -> Params:
    """Freshly drawn parameters, as pre-training would start from: matrices ~ N(0, 1 / fan_in), norms at one."""
    state = nnx.state(Decoder(config, nnx.Rngs(seed)))
    return {".".join(map(str, path)): leaf.get_value().astype(dtype) for path, leaf in nnx.to_flat_state(state)}


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder ready to run: its numbers, its graph, its parameters and the mesh that they lie on."""

    config: DecoderConfig
    graph: nnx.GraphDef
    params: Params
    mesh: jax.sharding.Mesh

    @property
    def dtype(self) -> jnp.dtype:
        """Of weights and caches."""
        return self.params["embed"].dtype
