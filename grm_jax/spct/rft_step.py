"""One step of supervised fine-tuning as one compiled program: packed rows, completion-only loss, update.

The loss is the mean negative log-likelihood over all completion tokens of the batch: each microbatch is divided by the
WHOLE batch's count, so any size of microbatch, and any packing of the same texts, gives the same gradient.

Shapes: B packed rows, T tokens, M microbatches.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from grm_jax import losses
from grm_jax.data.packing import Packed
from grm_jax.models.decoder import Params, bind
from grm_jax.recipes import RftConfig
from grm_jax.sharding import spread
from grm_jax.train.forward import REMATS, load_metrics, of_packed_with_loads
from grm_jax.train.policy import Policy, State, compiled, moved, split

Step = Callable[[State, Params, Packed], tuple[State, dict[str, Float[Array, ""]]]]


def make_step(policy: Policy, recipe: RftConfig, optimizer: optax.GradientTransformation, state: State) -> Step:
    """The compiled step: (state, frozen, batch) -> (state, scalars by name). The state is donated.

    `state`: the first one, for where its arrays lie.
    """
    remat = REMATS[recipe.remat]

    def loss(params: Params, frozen: Params, rows: Packed, trained: Array) -> tuple[Array, Array | None]:
        model = bind(policy.graph, policy.working(params, frozen))
        found, loads = of_packed_with_loads(model, rows.tokens, rows.positions, rows.segments, remat)
        return losses.nll(found, rows.trains / trained), loads

    def step(state: State, frozen: Params, batch: Packed) -> tuple[State, dict[str, Array]]:
        trained = jnp.maximum(batch.trains.sum(), 1).astype(jnp.float32)
        shares = jax.tree.map(lambda x: split(x, x.shape[0] // recipe.microbatch_rows), batch)

        def add(carry: tuple[Params, Array], rows: Packed) -> tuple[tuple[Params, Array], Array | None]:
            (value, loads), grads = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, rows, trained)
            return (jax.tree.map(jnp.add, carry[0], grads), carry[1] + value), loads

        zeros = jax.tree.map(jnp.zeros_like, state.params), jnp.float32(0)
        with jax.named_scope("gradient"):
            (grads, total), loads = jax.lax.scan(add, zeros, shares)
        params, after, norm = moved(state, grads, optimizer)
        scalars = {"loss": total, "grad_norm": norm, "trained_tokens": trained, "tokens": jnp.sum(batch.segments > 0)}
        scalars |= {} if loads is None else load_metrics(loads.sum(axis=0))
        return State(params, after, state.step + 1), scalars

    return compiled(step, state, policy.mesh)


def put(batch: Packed, policy: Policy) -> Packed:
    """A batch of host arrays on the mesh, rows spread over it."""
    return spread(batch, policy.mesh)
