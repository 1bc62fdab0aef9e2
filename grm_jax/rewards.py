"""What a sampled judgment is worth: right or wrong against the labels (Eq. 10), +1 or -1 (Eq. 11).

1. Two responses and more: right when the one that the labels rank first has the highest score, alone. A tie is wrong.
2. One response: right when its score is its label.
3. An unparsable judgment is wrong.

`is_correct` and `is_tie` are for the host, one judgment at a time; `correct`, `tied` and `outcome` are the same rules on
arrays, for compiled programs. Letters: R judgments, N responses (the most that a row has).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Reward = Callable[[Int[Array, "R N"], Bool[Array, "R"], Float[Array, "R N"], Int[Array, "R"]], Float[Array, "R"]]
"""(scores, valid, labels, counts) -> one reward a judgment; the arguments are those of `correct`."""


def is_correct(scores: Sequence[float] | None, labels: Sequence[float]) -> bool:
    """Whether a judgment is right (Eq. 10); scores are None where it did not parse.

    Raises ValueError: no labels, several labels that share the highest value, another number of scores than of labels.
    """
    if not labels:
        raise ValueError("an example without labels has no right judgment: give one label a response")
    best = max(labels)
    if len(labels) > 1 and list(labels).count(best) > 1:
        raise ValueError(f"labels {list(labels)} have no single best: make items with exactly one (Eq. 10)")
    if scores is None:
        return False
    if len(scores) != len(labels):
        raise ValueError(f"{len(scores)} scores {list(scores)} for {len(labels)} labels: give one score a response")
    if len(labels) == 1:
        return scores[0] == labels[0]
    right = list(labels).index(best)
    return all(scores[right] > score for i, score in enumerate(scores) if i != right)


def is_tie(scores: Sequence[int]) -> bool:
    """Whether more than one response has the highest score."""
    return list(scores).count(max(scores)) > 1


def correct(
    scores: Int[Array, "R N"], valid: Bool[Array, "R"], labels: Float[Array, "R N"], counts: Int[Array, "R"]
) -> Bool[Array, "R"]:
    """`is_correct` of each row.

    scores: -1 behind a row's count, where labels may be anything. valid: whether the judgment parsed; scores of one that
    did not may be anything. A row of no responses is never right. Labels must have a single best, which only
    `is_correct` checks: of several, the first counts as the right one.
    """
    column = jnp.arange(scores.shape[1])[None]
    real_RN = column < counts[:, None]
    right_RN = column == jnp.argmax(jnp.where(real_RN, labels, -jnp.inf), axis=1)[:, None]
    least = jnp.iinfo(scores.dtype).min
    of_right = jnp.max(jnp.where(right_RN, scores, least), axis=1)
    of_others = jnp.max(jnp.where(real_RN & ~right_RN, scores, least), axis=1)
    single = scores[:, 0].astype(labels.dtype) == labels[:, 0]
    return valid & jnp.where(counts > 1, of_right > of_others, (counts == 1) & single)


def tied(
    scores: Int[Array, "R N"], valid: Bool[Array, "R"], labels: Float[Array, "R N"], counts: Int[Array, "R"]
) -> Bool[Array, "R"]:
    """`is_tie` of each row, False where it did not parse. The arguments are those of `correct`; labels are not used."""
    real_RN = jnp.arange(scores.shape[1])[None] < counts[:, None]
    top = jnp.max(jnp.where(real_RN, scores, jnp.iinfo(scores.dtype).min), axis=1, keepdims=True)
    return valid & (jnp.sum(real_RN & (scores == top), axis=1) > 1)


def outcome(
    scores: Int[Array, "R N"], valid: Bool[Array, "R"], labels: Float[Array, "R N"], counts: Int[Array, "R"]
) -> Float[Array, "R"]:
    """+1 where the judgment is right, else -1 (Eq. 11); an unparsable one is -1. The arguments are those of `correct`."""
    return jnp.where(correct(scores, valid, labels, counts), 1.0, -1.0)
