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
Sources: Llama 3 (arXiv 2407.21783), Qwen2.5 (2412.15115), Qwen3 (2505.09388), Gemma 2 (2408.00118), DeepSeek-V2
(2405.04434) and V3 (2412.19437).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from grm_jax.models import kernels
from grm_jax.models.attention import NOWHERE, Keys, Owner, attend, pieces, softcapped, visible
from grm_jax.models.config import DecoderConfig, Yarn
from grm_jax.models.latent import LatentAttention
from grm_jax.models.layers import Attention, Mlp, linear, param, rms_norm, vector
from grm_jax.models.mixture import Mixture
from grm_jax.models.rope import rope_frequencies
from grm_jax.sharding import batch_columns

Params = dict[str, jax.Array]  # "layers.0.attention.q" -> array; the pytree that jitted functions take

Remat = Callable[[Callable[..., Any]], Callable[..., Any]]
Stored = tuple[jax.Array, ...]  # of one layer: keys and values, or latents alone
SCANNED = 8  # layers from which on an accelerator's programs loop over them


@partial(jax.tree_util.register_dataclass, data_fields=["parts", "own", "clock", "loads"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """What was computed before.

    parts: read only, shared by all (leading axes ()) or by a row ((B,)).
    own: None, or each query's own suffix (leading axis B * T), whose slot `clock` this call's tokens are written to;
    queries then do not see each other: a row is a prompt, and its T queries are T samples of it.
    loads: of the call that gave the cache, how many of its tokens each expert got, [layers with experts, E]; padding
    does not count. None for a model without experts.
    """

    parts: tuple[Keys, ...] = ()
    own: Keys | None = None
    clock: jax.Array | int = 0
    loads: jax.Array | None = None


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        rngs: nnx.Rngs,
        mesh: jax.sharding.Mesh | None = None,
        kernels: kernels.Chosen = "plain",
    ) -> None:
        self.config = config
        weight = 1.0 - config.norm_offset
        self.norm_attention = vector(weight, (config.dim,), ("embed",))
        self.attention = (LatentAttention if config.latent else Attention)(config, rngs)
        self.norm_mlp = vector(weight, (config.dim,), ("embed",))
        self.mixes = config.mixes(layer)
        self.mlp = Mixture(config, rngs, mesh, kernels) if self.mixes else Mlp(config, config.mlp_dim, rngs)
        if config.post_norms:
            self.norm_attention_post = vector(weight, (config.dim,), ("embed",))
            self.norm_mlp_post = vector(weight, (config.dim,), ("embed",))

    def _norm(self, x: jax.Array, weight: nnx.Param) -> jax.Array:
        return rms_norm(x, weight[...], self.config.norm_eps, self.config.norm_offset)

    def add_attention(self, x_DR: jax.Array, mixed: jax.Array) -> jax.Array:
        y = self.attention.output(mixed)
        return x_DR + (self._norm(y, self.norm_attention_post) if self.config.post_norms else y)

    def add_mlp(self, x_DR: jax.Array, positions: Int[Array, "B T"]) -> tuple[jax.Array, jax.Array | None]:
        """The residual stream behind the MLP; and, of a mixture, how many tokens each expert got."""
        y = self._norm(x_DR, self.norm_mlp)
        y, load = self.mlp(y, positions.reshape(-1) > NOWHERE) if self.mixes else (self.mlp(y), None)
        return x_DR + (self._norm(y, self.norm_mlp_post) if self.config.post_norms else y), load

    def project(self, x_DR: jax.Array, angles: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        return self.attention.project(self._norm(x_DR, self.norm_attention), angles)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What all layers of a call share."""

    positions: jax.Array  # [B, T]
    angles: tuple[jax.Array, jax.Array]
    owners: list[Owner]  # of each part of the cache, then of the new tokens
    spans: list[slice]  # pieces of the queries
    kernels: dict[int | None, kernels.Attend | None]  # a window -> a kernel for its layers
    seen: dict[int | None, list]  # a window -> masks of each piece, where there is no kernel
    clock: jax.Array | int
    columns: Callable[[jax.Array], jax.Array]  # holds activations to the batch's sharding


class Decoder(nnx.Module):
    """The whole model. Build it abstractly with `split_abstract`, bind parameters with `bind`.

    mesh: where it runs; rows of its activations then stay spread over it as the batch is. scans: whether many tokens go
    through the layers as a loop over them, which compiles once; a decoding step never does, as a loop copies each
    layer's weights out of their stack. kernels: which attention many tokens take (`kernels`), and which grouped products a
    mixture's gradient.
    """

    def __init__(
        self,
        config: DecoderConfig,
        rngs: nnx.Rngs,
        mesh: jax.sharding.Mesh | None = None,
        scans: bool = False,
        kernels: kernels.Chosen = "plain",
    ) -> None:
        self.config = config
        self.mesh, self.scans, self.kernels = mesh, scans, kernels
        self.embed = param(rngs, (config.vocab_size, config.dim), ("vocab", "embed"), config.dim)
        self.layers = nnx.List([Block(config, layer, rngs, mesh, kernels) for layer in range(config.layers)])
        self.norm = vector(1.0 - config.norm_offset, (config.dim,), ("embed",))
        if config.scalar:
            self.score = vector(0.0, (1, config.dim), (None, "embed"))
        elif not config.tied:
            self.head = param(rngs, (config.vocab_size, config.dim), ("vocab", "embed"), config.dim)

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
        x = columns(self._embedded(tokens.reshape(-1)) * config.embed_scale)
        owners = [Owner.ALL if part.positions.ndim == 1 else Owner.ROW for part in cache.parts]
        owners.append(Owner.ROW if cache.own is None else Owner.QUERY)
        new_positions = positions
        if cache.own is not None:
            new_positions = _write(cache.own.positions, positions.reshape(-1), cache.clock)
        keys = [p.reshape(-1, 1, p.shape[-1]) for p in (*(part.positions for part in cache.parts), new_positions)]
        if cache.own is not None:
            keys[-1] = keys[-1].reshape(*positions.shape, -1)
        spans = pieces(shape[1]) if cache.own is None else [slice(None)]
        quick = self._kernels(positions, owners, cache, segments)
        seen = {
            w: [visible(positions, owners, keys, segments, w, span) for span in spans]
            for w in quick
            if quick[w] is None
        }
        call = _Call(positions, self._angles(positions), owners, spans, quick, seen, cache.clock, columns)
        first, period = config.repeats if self.scans and cache.own is None else (config.layers, 1)
        stored, loads = [], []
        for i in range(first):
            before, own = [part.layer(i) for part in cache.parts], cache.own and cache.own.layer(i)
            layer = partial(self._layer, call, self.layers[i], config.windows[i])
            x, load, new = (layer if remat is None else remat(layer))(before, own, x)
            stored.append(new)
            loads += [] if load is None else [load]
        if first < config.layers:
            x, more, new = self._scanned(call, first, period, cache.parts, remat, x)
            stored += new
            loads += more
        new = Keys.of_layers(stored, new_positions)
        hidden = rms_norm(x, self.norm[...], config.norm_eps, config.norm_offset).T.reshape(*shape, -1)
        load = jnp.stack(loads) if loads else None
        if cache.own is None:
            return hidden, Cache((*cache.parts, new), loads=load)
        return hidden, Cache(cache.parts, new, cache.clock + 1, load)

    def _embedded(self, tokens_R: Int[Array, "R"]) -> Float[Array, "D R"]:
        """Rows of the embedding, float32.

        On a CPU a bfloat16 model's go through a product with 1: as a view of rows they would lie transposed in memory, all
        activations behind them too, and XLA does products with such a side in float32, converting the weights at each.
        """
        rows_RD = self.embed[...][tokens_R].astype(jnp.float32)
        if _platform(self.mesh) == "cpu" and self.embed[...].dtype == jnp.bfloat16:
            return jnp.einsum("DE,RE->DR", jnp.eye(self.config.dim), rows_RD, precision="highest")
        return rows_RD.T

    def _layer(
        self, call: _Call, block: Block, window: int | None, before: Sequence[Stored], own: Stored | None, x: jax.Array
    ) -> tuple[jax.Array, jax.Array | None, list[jax.Array]]:
        """The residual stream behind a block, its load, and what it stores. before: of each part of the cache."""
        shape = call.positions.shape
        q, *new = block.project(call.columns(x), call.angles)
        if own is None:
            new = [y.reshape(*shape, *y.shape[1:]).swapaxes(1, 2) for y in new]  # [B, K, T, H]
        else:
            new = [_write(y, z, call.clock) for y, z in zip(own, new, strict=True)]
        form = block.attention.for_many() if own is None else block.attention.for_few()
        q = form.queries(q)
        read = [form.keys(*part) for part in before]
        q, (k, v) = q.reshape(*shape, *q.shape[1:]), form.keys(*new)
        if (kernel := call.kernels[window]) is not None:
            mix = kernel(q, [*read, (k, v)])
        else:
            mixed = []
            for piece, masks in zip(call.spans, call.seen[window], strict=True):
                pairs = [*read, (k, v) if own is not None else (k[:, :, : piece.stop], v[:, :, : piece.stop])]
                parts = [(o, *kv, mask) for o, kv, mask in zip(call.owners, pairs, masks, strict=True)]
                few = own is not None and _platform(self.mesh) == "cpu"
                mixed.append(attend(q[:, piece], parts, self.config.attention_softcap, few))
            mix = jnp.concatenate(mixed, axis=1)
        mix = form.mixed(mix.reshape(-1, *mix.shape[2:]))
        return *block.add_mlp(block.add_attention(x, mix), call.positions), new

    def _kernels(
        self, positions: jax.Array, owners: list[Owner], cache: Cache, segments: jax.Array | None
    ) -> dict[int | None, kernels.Attend | None]:
        """For each window of the layers, the kernel that a call takes, or None for the plain way."""
        config, layout = self.config, None
        if self.kernels != "plain" and cache.own is None:
            layout = kernels.fold(positions, owners, [part.positions for part in cache.parts], segments)

        def of(window: int | None) -> kernels.Attend | None:
            if layout is None:
                return None
            if self.kernels == "cudnn":
                sizes = (config.head_dim, config.value_dim)
                return kernels.cudnn(layout, window, config.attention_softcap, sizes, self.embed[...].dtype)
            heads, interpret = (config.heads, config.kv_heads), self.kernels == "interpreted"
            return kernels.splash(layout, window, config.attention_softcap, heads, self.mesh, interpret)

        return {window: of(window) for window in set(config.windows)}

    def _scanned(
        self, call: _Call, first: int, period: int, parts: Sequence[Keys], remat: Remat | None, x: jax.Array
    ) -> tuple[jax.Array, list[jax.Array], list[list[jax.Array]]]:
        """The layers from `first` on as one loop over groups of `period` layers: compiled once, not once a layer.

        A group's parameters are stacked where the loop begins, and what it stores is taken apart behind it.
        """
        groups = (self.config.layers - first) // period
        split = [[nnx.split(self.layers[first + g * period + j]) for g in range(groups)] for j in range(period)]
        states = [jax.tree.map(lambda *xs: jnp.stack(xs), *(state for _, state in column)) for column in split]
        columns = [range(first + j, self.config.layers, period) for j in range(period)]
        before = [
            [[jnp.stack(side) for side in zip(*(part.layer(i) for i in column), strict=True)] for part in parts]
            for column in columns
        ]

        def group(x: jax.Array, given: tuple[list, list]) -> tuple[jax.Array, tuple[list, list]]:
            loads, stored = [], []
            for j, (state, keys) in enumerate(zip(*given, strict=True)):
                block, window = nnx.merge(split[j][0][0], state), self.config.windows[first + j]
                x, load, new = self._layer(call, block, window, keys, None, x)
                loads.append(load)
                stored.append(new)
            return x, (loads, stored)

        x, (loads, stored) = jax.lax.scan(group if remat is None else remat(group), x, (states, before))
        at = [(g, j) for g in range(groups) for j in range(period)]
        return x, [loads[j][g] for g, j in at if loads[j] is not None], [[y[g] for y in stored[j]] for g, j in at]

    def _angles(self, positions: Int[Array, "B T"]) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines of each token's rotary angles: [H/2, R]."""
        scaling = self.config.rope_scaling
        freq = rope_frequencies(self.config.rope_dim, self.config.rope_theta, scaling)
        theta = freq[:, None] * positions.reshape(1, -1).astype(jnp.float32)
        angles = (jnp.cos(theta), jnp.sin(theta))
        return tuple(a * scaling.attention_factor for a in angles) if isinstance(scaling, Yarn) else angles

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
        logits_VR = jax.lax.optimization_barrier(linear(self.head_matrix, hidden.reshape(-1, hidden.shape[-1]).T))
        return softcapped(logits_VR, self.config.logit_softcap).T.reshape(*hidden.shape[:-1], -1)


def _write(store: jax.Array, new: jax.Array, clock: jax.Array | int) -> jax.Array:
    """Each query's new key [R, K, H] into slot `clock` of its suffix [R, K, S, H]; positions [R] into [R, S]."""
    axis = store.ndim - 2 if store.ndim == 4 else 1
    return jax.lax.dynamic_update_slice_in_dim(store, jnp.expand_dims(new.astype(store.dtype), axis), clock, axis)


def _platform(mesh: jax.sharding.Mesh | None) -> str:
    return "cpu" if mesh is None else mesh.devices.flat[0].platform


def scanned(config: DecoderConfig, mesh: jax.sharding.Mesh | None) -> bool:
    """Whether programs of many tokens are a loop over the layers, unless said otherwise."""
    return _platform(mesh) != "cpu" and config.layers >= SCANNED


def split_abstract(
    config: DecoderConfig, mesh: jax.sharding.Mesh | None = None, scans: bool | None = None
) -> tuple[nnx.GraphDef, dict[str, tuple[tuple[int, ...], tuple]]]:
    """The module's graph and, for each parameter path, its shape and logical axes; nothing is allocated.

    scans: as `Decoder` has it; by default as `scanned` says. Without a mesh, kernels are plain. Raises ValueError where
    the kernels that `kernels.select` named are none of the mesh's devices.
    """
    scans = scanned(config, mesh) if scans is None else scans
    chosen = "plain" if mesh is None else kernels.kernels_for(mesh.devices.ravel().tolist())
    abstract = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), mesh, scans, chosen))
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


def dtype_of(name: str, dtype: jnp.dtype) -> jnp.dtype:
    """Of a parameter in a model of this dtype: routing biases stay float32, where rounding one sends tokens elsewhere.

    DeepSeek-V3's are numbers around 10 that differ by hundredths, and bfloat16 has eight bits.
    """
    return jnp.dtype(jnp.float32) if name.endswith(".router_bias") else jnp.dtype(dtype)


def random_params(config: DecoderConfig, seed: int, dtype: jnp.dtype = jnp.float32) -> Params:
    """Freshly drawn parameters, as pre-training would start from: matrices ~ N(0, 1 / fan_in), norms at one."""
    state = nnx.state(Decoder(config, nnx.Rngs(seed)))
    drawn = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    return {name: value.astype(dtype_of(name, dtype)) for name, value in drawn.items()}


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
