"""The device's part of sampling: prefill a prompt once, then decode all of its samples in a while-loop.

1. `prefill` runs prompts through the model and keeps their keys; each prompt stands in the cache once, however many
   samples are drawn from it.
2. `decode` feeds every live row its next token, draws one, and stops when all rows are done or `steps` have passed.
   A row is fed its prompt's LAST token first, so prefill needs no logits and a row starts anywhere in the same way.
3. Each row's own keys stand in a ring of T slots that all rows write at one common clock (one in-place slice write).
   Every slot knows its position, so a row can end and another begin at any time: order within the ring is nothing.
4. `resize` gives the ring another length, keeping each row's entries.

A row may carry tokens that it is to write next whatever it would draw (`queue`), and a state of the automaton that masks
what it draws afterwards: that is how scores are forced (`scores.ForceTable`).

Shapes: P prompts, G samples a prompt, R = P * G rows, S cached prompt tokens, T ring slots, Q queued tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from grm_jax import expected, scores
from grm_jax.models.attention import NOWHERE, Keys
from grm_jax.models.config import DecoderConfig
from grm_jax.models.decoder import Cache, Params, bind
from grm_jax.sampler.draw import Sampling, draw
from grm_jax.sharding import batch_sharding, cache_sharding

_QUERIES = 2048  # prompt tokens prefilled at once: their attention scores are the largest array there is


def pytree(cls: type) -> type:
    """A frozen dataclass whose fields are all data."""
    names = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


@pytree
@dataclasses.dataclass(frozen=True)
class Rows:
    """The state of the R rows of a batch.

    token: the next one to feed; position: its position; fresh: a new row, to which nothing in its ring slots belongs;
    drawn: how many tokens it has drawn (the fold of its key); budget: how many it may still write; live: still at it;
    queue [R, Q]: what it has to write next, `queued` of them left, the next one first; mask: the automaton's state;
    item, sample: what the row's own key is folded from.
    """

    token: jax.Array
    position: jax.Array
    fresh: jax.Array
    drawn: jax.Array
    budget: jax.Array
    live: jax.Array
    queue: jax.Array
    queued: jax.Array
    mask: jax.Array
    item: jax.Array
    sample: jax.Array


@pytree
@dataclasses.dataclass(frozen=True)
class Ring:
    """Each row's own keys, a (R,) part of [R, K, T, H] a layer, written at slot `clock` % T."""

    own: Keys
    clock: jax.Array


@pytree
@dataclasses.dataclass(frozen=True)
class Emitted:
    """What `decode` wrote: tokens and log_probs [steps, R], and how many of the steps each row lived [R].

    masses [steps, R, C]: `expected.masses` of what each token was drawn from; C is 0 where they were not asked for.
    """

    tokens: jax.Array
    log_probs: jax.Array
    masses: jax.Array
    count: jax.Array


def row_keys(key: Key[Array, ""], items: Int[Array, "R"], samples: Int[Array, "R"]) -> Key[Array, "R"]:
    """One key a row: a function of the run's key, the item and the sample, so of nothing about batching."""
    return jax.vmap(lambda item, sample: jax.random.fold_in(jax.random.fold_in(key, item), sample))(items, samples)


def empty(config: DecoderConfig, mesh: jax.sharding.Mesh, dtype: jnp.dtype, lead: tuple[int, ...], slots: int) -> Keys:
    """A part that holds nothing, [*lead, K, slots, H] a layer, its first axis split over the mesh's data.

    dtype: of the weights. On a CPU keys are held in float32 whatever it is: XLA writes a bfloat16 array there by
    converting all of it, there and back.
    """
    dtype = jnp.float32 if mesh.devices.flat[0].platform == "cpu" else dtype
    shapes = [(*lead, heads, slots, numbers) for heads, numbers in config.stored]
    places = [cache_sharding(mesh, heads) for heads, _ in config.stored]
    stored = [
        [jnp.zeros(shape, dtype, device=place) for shape, place in zip(shapes, places, strict=True)]
        for _ in range(config.layers)
    ]
    return Keys.of_layers(stored, jnp.full((*lead, slots), NOWHERE, jnp.int32, device=batch_sharding(mesh)))


@partial(jax.jit, static_argnames="graph")
def prefill(
    graph: nnx.GraphDef, params: Params, head: Keys | None, tokens: Int[Array, "B S"], lengths: Int[Array, "B"]
) -> Keys:
    """Keys of prompts, right-padded to a bucket, behind the tokens that all of them share (`head`)."""
    start = 0 if head is None else head.positions.shape[0]
    slot = jnp.arange(tokens.shape[1])[None, :]
    positions = jnp.where(slot < lengths[:, None], start + slot, NOWHERE)
    shared = () if head is None else (head,)
    model, cache = bind(graph, params), Cache(shared)
    for at in range(0, tokens.shape[1], _QUERIES):
        _, cache = model(tokens[:, at : at + _QUERIES], positions[:, at : at + _QUERIES], cache)
    new = cache.parts[len(shared) :]
    k, v = (
        tuple(jnp.concatenate(layer, axis=2) for layer in zip(*side, strict=True))
        for side in ([part.k for part in new], [part.v for part in new])
    )
    return Keys(k, v, jnp.concatenate([part.positions for part in new], axis=1))


@partial(jax.jit, donate_argnames="prompts")
def place(prompts: Keys, new: Keys, slots: Int[Array, "B"]) -> Keys:
    """New prompts' keys [B, K, S', H] into the given slots of the batch [P, K, S, H], S' <= S; slot P is nobody's."""

    def put(store: jax.Array, value: jax.Array) -> jax.Array:
        return store.at[slots, :, : value.shape[2]].set(value, mode="drop")

    width = prompts.positions.shape[1] - new.positions.shape[1]
    positions = jnp.pad(new.positions, ((0, 0), (0, width)), constant_values=NOWHERE)
    return Keys(
        tuple(map(put, prompts.k, new.k)),
        tuple(map(put, prompts.v, new.v)),
        prompts.positions.at[slots].set(positions, mode="drop"),
    )


@partial(jax.jit, donate_argnames="prompts")
def forget(prompts: Keys, slot: Int[Array, ""]) -> Keys:
    """The batch's prompt cache with nothing in a slot: its prompt is no longer than the shared head."""
    return dataclasses.replace(prompts, positions=prompts.positions.at[slot].set(NOWHERE))


@partial(jax.jit, static_argnames=("length", "axis", "fill"))
def resize_slots(store: jax.Array, length: int, axis: int, fill: int) -> jax.Array:
    """An array of the batch's prompt cache with another number of slots a prompt; the last ones are added or dropped."""
    store = jax.lax.slice_in_dim(store, 0, min(length, store.shape[axis]), axis=axis)
    pads = [(0, length - store.shape[axis]) if i == axis else (0, 0) for i in range(store.ndim)]
    return jnp.pad(store, pads, constant_values=fill)


@partial(jax.jit, static_argnames="length")
def resize(ring: Ring, length: int) -> Ring:
    """The ring with `length` slots: its newest entries, each where the clock will look for the slot to overwrite last."""
    old = ring.own.positions.shape[1]
    age = (ring.clock - 1 - jnp.arange(length)) % length  # 0 is the newest
    source = (ring.clock - 1 - jnp.minimum(age, old - 1)) % old
    k, v = (tuple(x[:, :, source] for x in side) for side in (ring.own.k, ring.own.v))
    return Ring(Keys(k, v, jnp.where((age < old)[None, :], ring.own.positions[:, source], NOWHERE)), ring.clock)


def _advance(
    rows: Rows,
    logits_RV: Float[Array, "R V"],
    keys_R: Key[Array, "R"],
    sampling: Sampling,
    table: scores.ForceTable | None,
) -> tuple[Rows, Int[Array, "R"], Float[Array, "R"]]:
    """Rows after one more token each, the token, and its log-probability (0 where it came from the queue)."""
    forced = rows.queued > 0
    states = jnp.where(forced | ~rows.live, scores.FREE, rows.mask)
    keys = jax.vmap(jax.random.fold_in)(keys_R, rows.drawn)
    greedy = None if sampling.greedy_from is None else rows.sample >= sampling.greedy_from
    if table is None:
        drawn, log_probs = draw(logits_RV, keys, sampling, greedy_R=greedy)
    else:
        drawn, log_probs = jax.lax.cond(
            (states != scores.FREE).any(),
            lambda: draw(logits_RV, keys, sampling, scores.mask(table, states), greedy),
            lambda: draw(logits_RV, keys, sampling, greedy_R=greedy),
        )
        states = scores.advance(table, states, drawn)
    token = jnp.where(forced, rows.queue[:, 0], drawn)
    ended = jnp.zeros_like(rows.live)
    for eos in sampling.eos_ids:
        ended |= (token == eos) & ~forced
    budget = rows.budget - 1
    ended |= (budget <= 0) | (~forced & (states == scores.DONE))
    after = dataclasses.replace(
        rows,
        token=jnp.where(rows.live, token, rows.token),
        position=rows.position + rows.live,
        fresh=jnp.zeros_like(rows.fresh),
        drawn=rows.drawn + (rows.live & ~forced),
        budget=jnp.where(rows.live, budget, rows.budget),
        live=rows.live & ~ended,
        queue=jnp.where(forced[:, None], jnp.roll(rows.queue, -1, axis=1), rows.queue),
        queued=jnp.maximum(rows.queued - 1, 0),
        mask=jnp.where(rows.live & ~forced, states, rows.mask),
    )
    return after, token, jnp.where(forced, 0.0, log_probs)


@partial(jax.jit, static_argnames=("graph", "sampling", "steps"), donate_argnames="ring")
def decode(
    graph: nnx.GraphDef,
    params: Params,
    parts: tuple[Keys, ...],
    ring: Ring,
    rows: Rows,
    key: Key[Array, ""],
    sampling: Sampling,
    table: scores.ForceTable | None,
    shape: Bool[Array, "P G"],
    steps: int,
    numbers: expected.NumberTable | None = None,
) -> tuple[Ring, Rows, Emitted]:
    """Up to `steps` tokens a row: a while-loop that stops when no row is live.

    key: the run's. parts: the cache's shared parts, () or (P,) leading. `shape` carries P and G alone: row p * G + g is
    a sample of prompt p. A row has to end within T steps of the one it began at, or it would overwrite itself.
    numbers: whose masses to keep of each step.
    """
    model = bind(graph, params)
    count, slots = ring.own.positions.shape
    positions = jnp.where(rows.fresh[:, None], NOWHERE, ring.own.positions)
    ring = Ring(dataclasses.replace(ring.own, positions=positions), ring.clock)
    keys_R = row_keys(key, rows.item, rows.sample)
    blank = Emitted(
        jnp.zeros((steps, count), jnp.int32),
        jnp.zeros((steps, count), jnp.float32),
        jnp.zeros((steps, count, 0 if numbers is None else numbers.classes), jnp.float32),
        jnp.zeros(count, jnp.int32),
    )

    def body(state: tuple[jax.Array, Ring, Rows, Emitted]) -> tuple[jax.Array, Ring, Rows, Emitted]:
        step, ring, rows, emitted = state
        positions = jnp.where(rows.live, rows.position, NOWHERE).reshape(shape.shape)
        cache = Cache(parts, ring.own, ring.clock % slots)
        hidden, cache = model(rows.token.reshape(shape.shape), positions, cache)
        logits_RV = model.logits(hidden).reshape(count, -1)
        after, token, log_prob = _advance(rows, logits_RV, keys_R, sampling, table)
        emitted = Emitted(
            jax.lax.dynamic_update_slice_in_dim(emitted.tokens, token[None], step, 0),
            jax.lax.dynamic_update_slice_in_dim(emitted.log_probs, log_prob[None], step, 0),
            emitted.masses
            if numbers is None
            else jax.lax.dynamic_update_slice_in_dim(
                emitted.masses, expected.masses(numbers, logits_RV)[None], step, 0
            ),
            emitted.count + rows.live,
        )
        return step + 1, Ring(cache.own, ring.clock + 1), after, emitted

    def busy(state: tuple[jax.Array, Ring, Rows, Emitted]) -> Bool[Array, ""]:
        return (state[0] < steps) & state[2].live.any()

    _, ring, rows, emitted = jax.lax.while_loop(busy, body, (jnp.int32(0), ring, rows, blank))
    return ring, rows, emitted
