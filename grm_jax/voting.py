"""The vote over k judgments of an example, for every k' <= k at once.

1. The scores of the judgments are summed, response by response; failed parses are left out (Eq. 14).
2. The response with the highest sum wins, the first of them at a tie; two sums tie when they are exactly equal.
3. With the right answer known, a verdict is worth 1 or 0, and at a tie what a fair draw among the best is worth.

4. With a logit a judgment, the meta RM's, `guided` sums those with the highest logits alone (section 3.3: half of them),
   and `softmax_weighted` all of them, each times its share of the logits' softmax (this module's own, not the paper's).

Written for one example and mapped over many by the functions that end in `_batch`. A weight multiplies a judgment's
scores.

Letters: E examples, K judgments, N responses (the most that an example of the batch has); k' = 1..K, J judgments of K.
"""

from dataclasses import dataclass
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num


@no_type_check  # JAX rebuilds a pytree around placeholders too
@partial(jax.tree_util.register_dataclass, data_fields=("sums", "best", "tie", "valid"), meta_fields=())
@dataclass(frozen=True)
class Tally:
    """The vote after 1..K judgments; `vote_batch` puts the examples' axis in front of each field."""

    sums: Float[Array, "*E K N"]  # summed scores; 0 for columns that are no response
    best: Int[Array, "*E K"]  # index of the highest sum, the first of them at a tie
    tie: Bool[Array, "*E K"]  # whether more than one response has the highest sum
    valid: Int[Array, "*E K"]  # judgments that had scores


def vote(
    scores: Num[Array, "K N"],
    valid: Bool[Array, "K"],
    count: Int[Array, ""] | int,
    weights: Float[Array, "K"] | None = None,
) -> Tally:
    """S*_i = sum over the first k' valid judgments of S_i (Eq. 14), its argmax and whether it ties, for k' = 1..K.

    `count` is the number of responses (at least 1): columns behind it are padding, whatever they hold, and never win.
    Rows that are not valid may hold anything. No valid judgment: all sums are 0, a tie of all, the first is best.
    Integer scores are summed as integers, so sums are exact up to 2^24; with weights, sums carry float32's rounding and
    tie only when they come out equal.
    """
    real_N = jnp.arange(scores.shape[1]) < count
    wide = jnp.int32 if jnp.issubdtype(scores.dtype, jnp.integer) else jnp.float32
    kept_KN = jnp.where(valid[:, None] & real_N[None], scores.astype(wide), 0)
    if weights is not None:
        kept_KN = jnp.where(valid, weights, 0.0)[:, None] * kept_KN
    sums_KN = jnp.cumsum(kept_KN, axis=0).astype(jnp.float32)
    tied_KN = _tied(sums_KN, real_N)
    return Tally(
        sums=sums_KN,
        best=jnp.argmax(tied_KN, axis=1),
        tie=jnp.sum(tied_KN, axis=1) > 1,
        valid=jnp.cumsum(valid.astype(jnp.int32)),
    )


@jax.jit
def vote_batch(
    scores: Num[Array, "E K N"],
    valid: Bool[Array, "E K"],
    counts: Int[Array, "E"],
    weights: Float[Array, "E K"] | None = None,
) -> Tally:
    """`vote` for many examples at once; every field of the Tally has E in front."""
    return jax.vmap(vote)(scores, valid, counts, weights)


def guided(
    scores: Num[Array, "K N"],
    valid: Bool[Array, "K"],
    count: Int[Array, ""] | int,
    logits: Float[Array, "K"],
    k_meta: int | None = None,
    among: Bool[Array, "K"] | None = None,
) -> tuple[Tally, Bool[Array, "K J"]]:
    """The vote of the k_meta judgments with the highest logits among the first k', for k' = 1..K; and which those are.

    kept[k' - 1, j]: whether judgment j is in the sum after k' judgments. k_meta is at most k'; None is max(1, k' // 2).
    Judgments that are not valid are never kept, so fewer than k_meta may be; of equal logits the earlier one goes first.
    among: the judgments that k' counts where these are not all; those that are valid are among them. `Tally.valid` counts
    the judgments kept. Other arguments as in `vote`.
    """
    upto = jnp.arange(1, scores.shape[0] + 1)
    drawn = upto if among is None else jnp.cumsum(among.astype(jnp.int32))
    most = jnp.maximum(drawn // 2, 1) if k_meta is None else jnp.minimum(drawn, k_meta)
    earlier_JK = upto[:, None] < upto[None]
    ahead_JK = (logits[:, None] > logits[None]) | ((logits[:, None] == logits[None]) & earlier_JK)
    rank_KJ = jnp.cumsum((ahead_JK & valid[:, None]).astype(jnp.int32), axis=0)  # row k' - 1: among the first k'
    kept_KJ = valid[None] & (upto[None] <= upto[:, None]) & (rank_KJ < most[:, None])
    return _tally(kept_KJ, kept_KJ, scores, count), kept_KJ


def softmax_weighted(
    scores: Num[Array, "K N"], valid: Bool[Array, "K"], count: Int[Array, ""] | int, logits: Float[Array, "K"]
) -> Tally:
    """The sum over the valid ones of the first k' judgments, each times its share of exp(logit), for k' = 1..K.

    A mean under the meta RM's softmax, so its sums are on the scale of one judgment's scores. Arguments as in `vote`.
    """
    upto = jnp.arange(scores.shape[0])
    here_KJ = valid[None] & (upto[None] <= upto[:, None])
    top_K1 = jnp.max(jnp.where(here_KJ, logits[None], -jnp.inf), axis=1, keepdims=True)
    above_KJ = jnp.where(here_KJ, logits[None] - jnp.where(jnp.isfinite(top_K1), top_K1, 0.0), -jnp.inf)
    share_KJ = jnp.exp(above_KJ)
    share_KJ /= jnp.maximum(share_KJ.sum(axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return _tally(share_KJ, here_KJ, scores, count)


@partial(jax.jit, static_argnames="k_meta")
def guided_batch(
    scores: Num[Array, "E K N"],
    valid: Bool[Array, "E K"],
    counts: Int[Array, "E"],
    logits: Float[Array, "E K"],
    k_meta: int | None = None,
    among: Bool[Array, "E K"] | None = None,
) -> tuple[Tally, Bool[Array, "E K J"]]:
    """`guided` for many examples at once; everything has E in front."""
    return jax.vmap(partial(guided, k_meta=k_meta))(scores, valid, counts, logits, among=among)


@jax.jit
def softmax_weighted_batch(
    scores: Num[Array, "E K N"], valid: Bool[Array, "E K"], counts: Int[Array, "E"], logits: Float[Array, "E K"]
) -> Tally:
    """`softmax_weighted` for many examples at once; every field of the Tally has E in front."""
    return jax.vmap(softmax_weighted)(scores, valid, counts, logits)


def _tally(
    weights_KJ: Num[Array, "K J"] | Bool[Array, "K J"],
    kept_KJ: Bool[Array, "K J"],
    scores: Num[Array, "J N"],
    count: Int[Array, ""] | int,
) -> Tally:
    """Sums under another set of weights after each judgment; integer scores with weights of 0 and 1 stay exact."""
    real_N = jnp.arange(scores.shape[1]) < count
    shown_KJN = jnp.where(kept_KJ[:, :, None] & real_N[None, None], scores[None].astype(jnp.float32), 0.0)
    sums_KN = jnp.sum(weights_KJ[:, :, None] * shown_KJN, axis=1)
    tied_KN = _tied(sums_KN, real_N)
    return Tally(sums_KN, jnp.argmax(tied_KN, axis=1), jnp.sum(tied_KN, axis=1) > 1, kept_KJ.sum(axis=1))


def expected_accuracy(
    sums: Float[Array, "K N"], count: Int[Array, ""] | int, correct: Int[Array, ""] | int
) -> Float[Array, "K"]:
    """What the verdict after 1..K judgments is worth when `correct` is the best response's index (spct section 1).

    1 / (number of responses with the highest sum) if `correct` is among them, else 0: the expectation of an argmax over
    shuffled responses. Takes a Tally's sums; map it over examples with jax.vmap.
    """
    tied_KN = _tied(sums, jnp.arange(sums.shape[1]) < count)
    return tied_KN[:, correct] / jnp.sum(tied_KN, axis=1)


def _tied(sums_KN: Float[Array, "K N"], real_N: Bool[Array, "N"]) -> Bool[Array, "K N"]:
    """The responses whose sum is the highest."""
    real_sums_KN = jnp.where(real_N[None], sums_KN, -jnp.inf)
    return real_sums_KN == jnp.max(real_sums_KN, axis=1, keepdims=True)
