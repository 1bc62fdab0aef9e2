"""One training step of a scalar head as one compiled program: logits of texts, a loss over them, update.

The loss is a weighted mean over the whole batch; its weights are made on the host, so any size of microbatch gives the
same gradient.

Shapes: R texts, S prompt tokens, T tokens of a text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from grm_jax.models.decoder import Params, bind
from grm_jax.recipes import ScalarConfig
from grm_jax.sharding import spread
from grm_jax.train.forward import REMATS, scalars_of
from grm_jax.train.policy import Policy, State, compiled, moved, split


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts behind their prompts, whether each is the right one, and what each weighs; host or device arrays.

    Weights sum to 1; a row of weight 0 is padding.
    """

    prompts: Int[np.ndarray | jax.Array, "R S"]
    lengths: Int[np.ndarray | jax.Array, "R"]
    texts: Int[np.ndarray | jax.Array, "R T"]
    counts: Int[np.ndarray | jax.Array, "R"]
    correct: Float[np.ndarray | jax.Array, "R"]
    weights: Float[np.ndarray | jax.Array, "R"]


Step = Callable[[State, Texts], tuple[State, dict[str, Float[Array, ""]]]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss of (logits [R], correct [R], weights [R]), and which rows it gets right [R].

    group: rows that belong together and come one after the other.
    """

    loss: Callable[[Array, Array, Array], Array]
    right: Callable[[Array, Array], Array]
    group: int = 1


def logits_of(policy: Policy, params: Params, rows: Texts, remat: str = "none") -> Float[Array, "R"]:
    """The scalar head's logit of each text, under the working copy of the weights."""
    model = bind(policy.graph, policy.working(params, {}))
    nothing = jnp.zeros(0, jnp.int32)
    return scalars_of(model, nothing, rows.prompts, rows.lengths, rows.texts, rows.counts, REMATS[remat])


def make_step(
    policy: Policy, recipe: ScalarConfig, optimizer: optax.GradientTransformation, state: State, objective: Objective
) -> Step:
    """The compiled step: (state, batch) -> (state, scalars by name). The state is donated.

    It compiles once for each shape of a batch. `state`: the first one, for where its arrays lie.
    """

    def loss(params: Params, rows: Texts) -> tuple[Array, Array]:
        logits = logits_of(policy, params, rows, recipe.remat)
        right = objective.right(logits, rows.correct)
        return objective.loss(logits, rows.correct, rows.weights), jnp.sum(jnp.where(rows.weights > 0, right, False))

    def step(state: State, batch: Texts) -> tuple[State, dict[str, Array]]:
        parts = batch.lengths.shape[0] // (recipe.microbatch * objective.group)
        shares = jax.tree.map(lambda x: split(x, parts, objective.group), batch)

        def add(carry: tuple[Params, Array, Array], rows: Texts) -> tuple[tuple[Params, Array, Array], None]:
            (value, right), grads = jax.value_and_grad(loss, has_aux=True)(state.params, rows)
            return (jax.tree.map(jnp.add, carry[0], grads), carry[1] + value, carry[2] + right), None

        zeros = jax.tree.map(jnp.zeros_like, state.params), jnp.float32(0), jnp.int32(0)
        with jax.named_scope("gradient"):
            (grads, total, right), _ = jax.lax.scan(add, zeros, shares)
        params, after, norm = moved(state, grads, optimizer)
        rows = jnp.maximum(jnp.sum(batch.weights > 0), 1)
        scalars = {"loss": total, "accuracy": right / rows, "grad_norm": norm}
        return State(params, after, state.step + 1), scalars

    return compiled(step, state, policy.mesh)


def put(batch: Texts, policy: Policy) -> Texts:
    """A batch of host arrays on the mesh, rows spread over it."""
    return spread(batch, policy.mesh)
