"""Attention over parts: keys that lie in several arrays, one softmax over all of them.

1. `Keys` are stored keys and values with their positions; their leading axes say who may see them (`Owner`).
2. `visible` works out, from positions and segments alone, which keys of each part a query sees.
3. `attend` computes each part's share of the softmax and adds the shares up, so no part is copied to stand by another.
   For few queries on a CPU the product that gives the scores is held keys-first: XLA's takes a third of the time so.
4. `pieces` says in which pieces of queries that is done, so that scores stay small and later keys are left out.

Shapes: B rows, T new tokens, R = B * T, P groups of rows, S stored tokens, K key heads, Q query heads a key head, H head, V
value (as H, but in `latent`).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NOWHERE = -1  # the position of a key that is not there
_PIECE, _PIECES = 128, 4  # queries whose scores are computed at once, unless that made more pieces than this


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "positions"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Keys:
    """Keys and values that queries may see, an array a layer.

    k, v: [..., K, S, H], k rotated, no v where values are read from k (`latent`); positions: int32 [..., S], -1 where
    nothing is stored. The leading axes say who may see them: () every query, (P,) the queries of a row, or, with P a
    divisor of B, those of B / P neighbouring rows, which are samples of one prompt; (R,) one query alone. A part that
    every query may see is full (no -1) and stands before all of them, so only a window masks it.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    positions: jax.Array

    def layer(self, index: int) -> tuple[jax.Array, ...]:
        """What is stored for a layer: keys and values, or keys alone."""
        return tuple(side[index] for side in (self.k, self.v) if side)

    @classmethod
    def of_layers(cls, stored: Sequence[Sequence[jax.Array]], positions: jax.Array) -> Keys:
        """The inverse of `layer`."""
        return cls(tuple(new[0] for new in stored), tuple(v for new in stored for v in new[1:]), positions)


def _dot(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """einsum in the dtype of `w`, accumulated in float32."""
    return jnp.einsum(spec, x.astype(w.dtype), w, preferred_element_type=jnp.float32)


def softcapped(x: jax.Array, cap: float | None) -> jax.Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


def _in_sight(queries_BT: jax.Array, keys_BTS: jax.Array, window: int | None) -> jax.Array:
    """Which keys each query sees: [B, T, S] from positions of queries [B, T] and of keys, broadcastable [B, T, S]."""
    age = queries_BT[:, :, None] - keys_BTS
    seen = (keys_BTS > NOWHERE) & (age >= 0)
    return seen if window is None else seen & (age < window)


def visible(
    positions: jax.Array,
    owners: Sequence[Owner],
    keys: Sequence[jax.Array],
    segments: jax.Array | None,
    window: int | None,
    piece: slice,
) -> list[jax.Array | None]:
    """What each part's mask is for a piece of the queries, None where they see all of it; the last part is new tokens."""
    masks: list[jax.Array | None] = []
    positions = positions[:, piece]
    for owner, p in zip(owners, (*keys[:-1], keys[-1][..., : piece.stop]), strict=True):
        queries = positions.reshape(p.shape[0], -1) if owner is Owner.ROW else positions
        masks.append(None if owner is Owner.ALL and window is None else _in_sight(queries, p, window))
    if segments is not None:
        masks[-1] &= segments[:, piece, None] == segments[:, None, : piece.stop]
    return masks


def pieces(tokens: int) -> list[slice]:
    """New tokens in pieces whose scores fit a processor's cache; a piece needs no key behind its last token."""
    size = max(_PIECE, -(-tokens // _PIECES))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class Owner(enum.Enum):
    """Who may see a part, and how a batched product over it goes: scores, the order that they come out in, mix.

    The scores stay in that order (batch axes first), so that nothing as large as them is ever transposed, but for those
    of few queries (`_KEYS_FIRST`).
    """

    ALL = ("BTKQH,KSH->KBTQS", "KBTQ->BTKQ", "KBTQS,KSH->KBTQH", (None, slice(None), slice(None), None))
    ROW = ("BTKQH,BKSH->BKTQS", "BKTQ->BTKQ", "BKTQS,BKSH->BKTQH", (slice(None), None, slice(None), None))
    QUERY = ("RKQH,RKSH->RKQS", "RKQ->RKQ", "RKQS,RKSH->RKQH", (slice(None), None, None))


# A product over a part with the keys on its left side, and how its scores come to the order that `Owner` has.
_KEYS_FIRST = {
    Owner.ROW: ("BKSH,BTKQH->BKSTQ", (0, 1, 3, 4, 2)),
    Owner.QUERY: ("RKSH,RKQH->RKSQ", (0, 1, 3, 2)),
}


def _scores(q: jax.Array, owner: Owner, k: jax.Array, few: bool) -> jax.Array:
    """Scores in the owner's order; `few`: through a product that a barrier holds keys-first."""
    if not few or owner not in _KEYS_FIRST:
        return _dot(owner.value[0], q, k)
    spec, order = _KEYS_FIRST[owner]
    s = jnp.einsum(spec, k, q.astype(k.dtype), preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(s).transpose(order)


def _attend_part(
    q: jax.Array, owner: Owner, k: jax.Array, v: jax.Array, seen: jax.Array | None, softcap: float | None, few: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One part's share of a softmax: largest score and sum of exponentials [B, T, K, Q], its mix [..., V] of values."""
    _, order, mix_spec, where = owner.value
    shape = q.shape
    if owner is Owner.QUERY:
        q, seen = q.reshape(-1, *shape[2:]), seen.reshape(-1, seen.shape[-1])
    elif owner is Owner.ROW:
        q = q.reshape(k.shape[0], -1, *shape[2:])
    s = softcapped(_scores(q, owner, k, few), softcap)
    if seen is not None:
        s = jnp.where(seen[where], s, -jnp.inf)
    # Finite where nothing is seen. It cancels out of the result, so no gradient goes through it.
    top = jax.lax.stop_gradient(jnp.maximum(s.max(-1), jnp.finfo(jnp.float32).min))
    p = jnp.exp(s - top[..., None]).astype(v.dtype)  # rounded once, for the sum too
    total, mix = p.sum(-1, dtype=jnp.float32), _dot(mix_spec, p, v)
    source, target = order.split("->")
    axes = tuple(source.index(letter) for letter in target)
    top, total, mix = top.transpose(axes), total.transpose(axes), mix.transpose(*axes, len(axes))
    return top.reshape(shape[:-1]), total.reshape(shape[:-1]), mix.reshape(*shape[:-1], v.shape[-1])


def attend(
    q: Float[Array, "B T K Q H"],
    parts: list[tuple[Owner, jax.Array, jax.Array, jax.Array | None]],
    softcap: float | None,
    few: bool = False,
) -> Float[Array, "B T K Q V"]:
    """Attention over several parts with one softmax. Scores are not kept for the backward pass, but computed again.

    parts: (owner, k [..., K, S, H], v [..., K, S, V], seen bool [B or 1, T, S], None for all of them; [P, B / P * T, S]
    where a part belongs to P groups of rows); leading axes of k and v as in `Keys`. A query that sees nothing at all
    (padding) gets zeros. few: a handful of queries meet each key, on a CPU.
    """
    owners = [owner for owner, *_ in parts]
    return jax.checkpoint(partial(_attend, owners, softcap, few))(q, [arrays for _, *arrays in parts])


def _attend(
    owners: list[Owner], softcap: float | None, few: bool, q: jax.Array, parts: list[list[jax.Array | None]]
) -> jax.Array:
    shares = [_attend_part(q, owner, *arrays, softcap, few) for owner, arrays in zip(owners, parts, strict=True)]
    top = shares[0][0]
    for part_top, _, _ in shares[1:]:
        top = jnp.maximum(top, part_top)
    weights = [jnp.exp(part_top - top) for part_top, _, _ in shares]
    total = sum(w * t for w, (_, t, _) in zip(weights, shares, strict=True))
    out = sum(w[..., None] * m for w, (_, _, m) in zip(weights, shares, strict=True))
    return out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
