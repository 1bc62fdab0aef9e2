"""A mixture of experts: each token goes to the few experts that its router chooses, and to one that all tokens share.

1. `choose` turns the router's logits into experts and their weights: softmax or sigmoid, by groups or not
   (DeepSeek-V2: arXiv 2405.04434, section 2.2; DeepSeek-V3: 2412.19437, section 2.1.2; Qwen3: 2505.09388).
2. `through_experts` sorts the assignments by expert and multiplies each expert's run of rows with its matrices, one
   grouped product (`jax.lax.ragged_dot_general`) for all experts. No token is dropped and none has a capacity, so what a
   token gets does not depend on the tokens beside it, padding included. On a TPU that is a kernel of XLA's, but for the
   matrices' gradient, which XLA multiplies out for every expert and every token; there Pallas' grouped product, `tgmm`,
   stands in.
3. On a mesh, each device sorts the tokens of its own rows and computes for the experts that it holds; a sum over the
   devices puts a token's experts together. Only tokens move: matrices are gathered over `fsdp` alone, as an MLP's are.
4. The load is how many real tokens each expert got.

Shapes: R tokens, E experts, K experts a token, A = R * K assignments, D model, F an expert's MLP, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from grm_jax.models.config import DecoderConfig, Experts
from grm_jax.models.kernels import Chosen
from grm_jax.models.layers import Mlp, activated, param, vector
from grm_jax.sharding import ROWS, TRAINING

_PIECE = 2048  # tokens that go through the experts at once
_TILE = 512  # of the kernel's blocks, in each of its three dimensions
# Rows of the left side lie in runs, one an expert; the right side is contracted over its last axis, [E, O, I].
_GROUPED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def choose(
    logits_RE: Float[Array, "R E"], bias_E: Float[Array, "E"] | None, experts: Experts
) -> tuple[Int[Array, "R K"], Float[Array, "R K"]]:
    """Each token's experts and their weights. The bias has a say in which they are, not in how they are weighed."""
    affinity = jax.nn.sigmoid(logits_RE) if experts.sigmoid else jax.nn.softmax(logits_RE, axis=-1)
    choice = affinity if bias_E is None else affinity + bias_E[None]
    if experts.groups > 1:
        grouped_RGE = choice.reshape(choice.shape[0], experts.groups, -1)
        best_RG = jax.lax.top_k(grouped_RGE, experts.group_top)[0].sum(axis=-1)
        kept = jax.lax.top_k(best_RG, experts.groups_kept)[1]
        keeps_RG = jax.nn.one_hot(kept, experts.groups, dtype=bool).any(axis=1)
        choice = jnp.where(keeps_RG[..., None], grouped_RGE, -jnp.inf).reshape(choice.shape)
    chosen = jax.lax.top_k(choice, experts.per_token)[1]
    weights = jnp.take_along_axis(affinity, chosen, axis=1)
    if experts.normalised:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return chosen, weights * experts.scale


def _product(rows_AI: jax.Array, w_EOI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot_general(rows_AI, w_EOI, sizes_E, _GROUPED, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_kernel(interpret: bool, rows_AI: jax.Array, w_EOI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`_product`, whose gradient by the matrices is a kernel of its own."""
    return _product(rows_AI, w_EOI, sizes_E)


def _with_kernel_forward(interpret: bool, *given: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _product(*given), given


def _with_kernel_backward(
    interpret: bool, given: tuple[jax.Array, ...], out_AO: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows_AI, w_EOI, sizes_E = given
    (by_rows,) = jax.vjp(lambda rows: _product(rows, w_EOI, sizes_E), rows_AI)[1](out_AO)
    return by_rows, tgmm(out_AO.astype(w_EOI.dtype), rows_AI, sizes_E, interpret).astype(w_EOI.dtype), None


_with_kernel.defvjp(_with_kernel_forward, _with_kernel_backward)


def tgmm(
    left_AO: Float[Array, "A O"], right_AI: Float[Array, "A I"], sizes_E: Int[Array, "E"], interpret: bool = False
) -> Float[Array, "E O I"]:
    """Each run's rows, left transposed times right, in float32; rows behind the last run belong to none.

    `jax.experimental.pallas.ops.tpu.megablox`, for a TPU; interpret: on any device, slowly.
    """
    # Imported where it is used: a CPU never needs Pallas.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm as grouped

    count = left_AO.shape[0]
    tile = min(_TILE, -(-count // 128) * 128)
    whole = -(-count // tile) * tile
    left_AO, right_AI = (jnp.pad(x, ((0, whole - count), (0, 0))) for x in (left_AO, right_AI))
    rest = (whole - sizes_E.sum())[None]
    return grouped(
        left_AO.T,
        right_AI,
        jnp.concatenate([sizes_E, rest.astype(sizes_E.dtype)]),
        jnp.float32,
        (tile, min(_TILE, left_AO.shape[1]), min(_TILE, right_AI.shape[1])),
        num_actual_groups=sizes_E.shape[0],
        interpret=interpret,
    )


def _grouped(kernels: Chosen, rows_AI: jax.Array, w_EOI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Each run of rows times its expert's matrix, [A, O]; accumulated in float32."""
    given = rows_AI.astype(w_EOI.dtype), w_EOI, sizes_E
    return _with_kernel(kernels == "interpreted", *given) if kernels in ("splash", "interpreted") else _product(*given)


def _of_these(
    activation: str,
    kernels: Chosen,
    first: jax.Array,
    x_RD: jax.Array,
    chosen_RK: jax.Array,
    weights_RK: jax.Array,
    *matrices: jax.Array,
) -> jax.Array:
    """What the experts `first`, first + 1, ..., whose matrices these are, add to each token: [R, D]."""
    gate, up, down = matrices
    grouped = partial(_grouped, kernels)
    count = gate.shape[0]
    expert_KR = chosen_RK.T - first
    here_KR = (expert_KR >= 0) & (expert_KR < count)
    order_A = jnp.argsort(jnp.where(here_KR, expert_KR, count).reshape(-1))  # the others' come last
    sizes_E = jax.nn.one_hot(expert_KR.reshape(-1), count, dtype=jnp.int32).sum(axis=0)
    place_KR = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(order_A.shape[0])).reshape(here_KR.shape)
    rows_AD = _taken(gate.dtype, x_RD, order_A, place_KR, here_KR)
    hidden_AF = activated(grouped(rows_AD, gate, sizes_E), activation) * grouped(rows_AD, up, sizes_E)
    return _summed(grouped(hidden_AF, down, sizes_E), weights_RK.T, order_A, place_KR, here_KR)


# Rows to and from the experts' order. The order is a permutation, so the backward pass of each gathering is a gathering
# too, where differentiation would scatter. Behind the last run a grouped product leaves what it likes: those rows are left
# out where rows come back to their tokens, in either direction.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _taken(dtype: jnp.dtype, x_RD: jax.Array, order_A: jax.Array, place_KR: jax.Array, here_KR: jax.Array) -> jax.Array:
    """Each assignment's token (float32) in this dtype, in the experts' order: [A, D]."""
    return x_RD.astype(dtype)[order_A % x_RD.shape[0]]


def _taken_forward(
    dtype: jnp.dtype, x_RD: jax.Array, order_A: jax.Array, place_KR: jax.Array, here_KR: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _taken(dtype, x_RD, order_A, place_KR, here_KR), (place_KR, here_KR)


def _taken_backward(
    dtype: jnp.dtype, given: tuple[jax.Array, jax.Array], rows_AD: jax.Array
) -> tuple[jax.Array, None, None, None]:
    return _back(rows_AD, *given).sum(axis=0, dtype=jnp.float32), None, None, None


_taken.defvjp(_taken_forward, _taken_backward)


@jax.custom_vjp
def _summed(
    out_AD: jax.Array, weights_KR: jax.Array, order_A: jax.Array, place_KR: jax.Array, here_KR: jax.Array
) -> jax.Array:
    """Each token's assignments by their weights: [R, D]."""
    return jnp.einsum("KRD,KR->RD", _back(out_AD, place_KR, here_KR), weights_KR)


def _summed_backward(given: tuple[jax.Array, ...], y_RD: jax.Array) -> tuple[jax.Array | None, ...]:
    out_AD, weights_KR, order_A, place_KR, here_KR = given
    by_rows = y_RD[order_A % y_RD.shape[0]] * weights_KR.reshape(-1)[order_A][:, None]
    return by_rows, jnp.einsum("KRD,RD->KR", _back(out_AD, place_KR, here_KR), y_RD), None, None, None


_summed.defvjp(lambda *given: (_summed(*given), given), _summed_backward)


def _back(rows_AD: jax.Array, place_KR: jax.Array, here_KR: jax.Array) -> jax.Array:
    """Rows in the experts' order as [K, R, D], 0 for those of no expert here."""
    return jnp.where(here_KR[:, :, None], rows_AD[place_KR], 0.0)


def _in_pieces(of_these: Callable[..., jax.Array], *tokens: jax.Array) -> jax.Array:
    """Many tokens in pieces, computed again in the backward pass: a token takes up as many rows as it has experts.

    Tokens that do not divide into pieces of one size, as powers of two do, go at once.
    """
    count = tokens[0].shape[0]
    parts = -(-count // _PIECE)
    if parts <= 1 or count % parts:
        return of_these(*tokens)
    parted = [x.reshape(parts, -1, *x.shape[1:]) for x in tokens]
    return jax.lax.map(lambda part: jax.checkpoint(of_these)(*part), parted).reshape(count, -1)


def through_experts(
    x_RD: Float[Array, "R D"],
    chosen_RK: Int[Array, "R K"],
    weights_RK: Float[Array, "R K"],
    matrices: tuple[jax.Array, jax.Array, jax.Array],
    activation: str,
    mesh: jax.sharding.Mesh | None = None,
    kernels: Chosen = "plain",
) -> Float[Array, "R D"]:
    """The sum of each token's experts by their weights. matrices: gate and up [E, F, D], down [E, D, F].

    mesh: by default the one that the matrices lie on. kernels: "splash" or "interpreted" for a TPU's (`tgmm`).
    """
    mesh = mesh or jax.typeof(matrices[0]).sharding.mesh
    sizes = dict(mesh.shape)
    of_these = partial(_of_these, activation, kernels)
    if all(size == 1 for size in sizes.values()):
        return _in_pieces(lambda *some: of_these(jnp.int32(0), *some, *matrices), x_RD, chosen_RK, weights_RK)
    over, inner = (TRAINING[name] if sizes.get(TRAINING[name], 1) > 1 else None for name in ("expert", "mlp"))
    rows = tuple(axis for axis in ROWS if axis != over and sizes.get(axis, 1) > 1)
    parts = math.prod(sizes[axis] for axis in rows)
    rows, parts = (rows, parts) if x_RD.shape[0] % parts == 0 else ((), 1)
    here = matrices[0].shape[0] // sizes.get(over, 1)
    scattered = over is not None and over in ROWS and x_RD.shape[0] % (parts * sizes[over]) == 0

    def of_a_device(*arrays: jax.Array) -> jax.Array:
        """What a device's own experts, or its columns of them, add to each token of its rows."""
        first = jax.lax.axis_index(over) * here if over else jnp.int32(0)
        return _in_pieces(lambda *some: of_these(first, *some, *arrays[3:]), *arrays[:3])

    def summed(part: jax.Array) -> jax.Array:
        """The devices' parts of each token together; where experts lie over rows, each device has its own rows again."""
        part = jax.lax.psum(part, inner) if inner else part
        if scattered:
            return jax.lax.psum_scatter(part, over, scatter_dimension=0, tiled=True)
        return jax.lax.psum(part, over) if over else part

    tokens, columns = PartitionSpec(rows or None), PartitionSpec(over, inner)
    places = (tokens, tokens, tokens, columns, columns, PartitionSpec(over, None, inner))
    after = PartitionSpec((*rows, over)) if scattered else tokens
    on_mesh = partial(jax.shard_map, mesh=mesh, check_vma=False)

    # Each device's backward pass is its own, and the sums over devices are written out: kernels say nothing of how what
    # they compute varies over a mesh, and left to itself jax 0.10.2 does not sum the gradient of gathered rows.
    @jax.custom_vjp
    def through(*arrays: jax.Array) -> jax.Array:
        return on_mesh(lambda *own: summed(of_a_device(*own)), in_specs=places, out_specs=after)(*arrays)

    def backward(arrays: tuple[jax.Array, ...], out_RD: jax.Array) -> tuple[jax.Array | None, ...]:
        def of_one(out: jax.Array, x: jax.Array, chosen: jax.Array, *own: jax.Array) -> tuple[jax.Array, ...]:
            x, weights, *by_matrices = jax.vjp(lambda x, *own: of_a_device(x, chosen, *own), x, *own)[1](out)
            by_matrices = [jax.lax.psum(w, rows) if rows else w for w in by_matrices]
            return summed(x), summed(weights), *by_matrices

        backward_of = on_mesh(of_one, in_specs=(tokens, *places), out_specs=(after, after, *places[3:]))
        x, weights, *by_matrices = backward_of(out_RD, *arrays)
        return x, None, weights, *by_matrices

    through.defvjp(lambda *arrays: (through(*arrays), arrays), backward)
    return through(x_RD, chosen_RK, weights_RK, *matrices)


class RoutedExperts(nnx.Module):
    """The matrices of all routed experts, each kind in one array."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        count, inner, dim = config.experts.routed, config.experts.mlp_dim, config.dim
        self.gate = param(rngs, (count, inner, dim), ("expert", "mlp", "embed"), dim)
        self.up = param(rngs, (count, inner, dim), ("expert", "mlp", "embed"), dim)
        self.down = param(rngs, (count, dim, inner), ("expert", "embed", "mlp"), inner)


class Mixture(nnx.Module):
    """Routed experts and, where the config has one, the shared expert, summed."""

    def __init__(
        self,
        config: DecoderConfig,
        rngs: nnx.Rngs,
        mesh: jax.sharding.Mesh | None = None,
        kernels: Chosen = "plain",
    ) -> None:
        of = config.experts
        self.config, self.mesh, self.kernels = config, mesh, kernels
        self.router = param(rngs, (of.routed, config.dim), (None, "embed"), config.dim)
        if of.bias:
            self.router_bias = vector(0.0, (of.routed,), (None,))
        self.experts = RoutedExperts(config, rngs)
        if of.shared_dim:
            self.shared = Mlp(config, of.shared_dim, rngs)

    def __call__(self, x_DR: jax.Array, real_R: Bool[Array, "R"]) -> tuple[jax.Array, Float[Array, "E"]]:
        """[D, R], and the load: how many of the real tokens each expert got."""
        of, experts = self.config.experts, self.experts
        # In float32 throughout: a rounded logit can send a token to another expert.
        router = self.router[...].astype(jnp.float32)
        logits_RE = jnp.einsum("ED,DR->RE", router, x_DR, precision="highest")
        bias = self.router_bias[...].astype(jnp.float32) if of.bias else None
        chosen, weights = choose(logits_RE, bias, of)
        matrices = (experts.gate[...], experts.up[...], experts.down[...])
        y = through_experts(x_DR.T, chosen, weights, matrices, self.config.activation, self.mesh, self.kernels).T
        taken_RE = jax.nn.one_hot(chosen, of.routed).sum(axis=1) * real_R[:, None]
        return y + self.shared(x_DR) if of.shared_dim else y, taken_RE.sum(axis=0)
