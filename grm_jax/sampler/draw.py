"""One token from logits: what may be drawn, and by which uniform number.

1. `Sampling` says how: temperature (0 is greedy), top-k, top-p, min-p, and the ids that end a text.
2. `restrict` sets what may not be drawn to -inf; a vocabulary is only sorted where top-k or top-p asks for it.
3. `draw` inverts the cumulative distribution at ONE uniform number a row, in two levels (blocks, then inside a block):
   a Gumbel draw would need a random number for each of the vocabulary's entries at every step.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from grm_jax.config import check_sampling

_BLOCK = 256  # vocabulary entries summed at once


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The paper votes at temperature 0.5 (section 5); training draws from the full distribution."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # keeps the likeliest tokens that together reach this probability
    min_p: float = 0.0  # keeps tokens at least this likely relative to the likeliest
    eos_ids: tuple[int, ...] = ()  # a drawn one ends the row
    greedy_from: int | None = None  # samples of this number and later are greedy, whatever the rest says

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)


def restrict(logits_RV: Float[Array, "R V"], sampling: Sampling) -> Float[Array, "R V"]:
    """Logits divided by the temperature, -inf for tokens that top-k, top-p or min-p leave out (in that order)."""
    logits = logits_RV / (sampling.temperature or 1.0)
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.top_p < 1:
        ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        mass_before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        least = jnp.where(mass_before < sampling.top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.min_p:
        floor = logits.max(-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return logits


def _first_past(weights: Float[Array, "R N"], target: Float[Array, "R"]) -> tuple[Int[Array, "R"], Float[Array, "R"]]:
    """The first entry of positive weight whose cumulative sum passes target, and the sum before it.

    Where rounding lets no entry pass, the last one of positive weight: an entry of weight 0 is never chosen.
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    positive = weights > 0
    passed = positive & (cumulative > target[:, None])
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    index = jnp.where(passed.any(-1), jnp.argmax(passed, axis=-1), last)
    before = jnp.take_along_axis(cumulative - weights, index[:, None], axis=-1)[:, 0]
    return index, before


def draw(
    logits_RV: Float[Array, "R V"],
    keys_R: Key[Array, "R"],
    sampling: Sampling,
    allowed: Bool[Array, "R V"] | None = None,
    greedy_R: Bool[Array, "R"] | None = None,
) -> tuple[Int[Array, "R"], Float[Array, "R"]]:
    """One token a row, and its log-probability under the distribution that it was drawn from.

    Greedy (temperature 0, and rows that `greedy_R` marks) takes the first maximum, and gives its log-probability at
    temperature 1. `allowed` masks tokens before anything else. Each row uses its own key alone, so rows can be batched in
    any way.
    """
    if allowed is not None:
        logits_RV = jnp.where(allowed, logits_RV, -jnp.inf)
    greedy = sampling.temperature == 0
    logits = logits_RV if greedy else restrict(logits_RV, sampling)
    if greedy_R is not None:
        logits = jnp.where(greedy_R[:, None], logits_RV, logits)
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    rows, vocabulary = weights.shape
    padded = jnp.pad(weights, ((0, 0), (0, -vocabulary % _BLOCK))).reshape(rows, -1, _BLOCK)
    sums = padded.sum(-1)
    total = sums.sum(-1)
    if greedy:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        target = jax.vmap(jax.random.uniform)(keys_R) * total
        block, before = _first_past(sums, target)
        inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
        offset, _ = _first_past(inside, target - before)
        tokens = block * _BLOCK + offset
        if greedy_R is not None:
            tokens = jnp.where(greedy_R, jnp.argmax(logits, axis=-1), tokens)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - top[:, 0] - jnp.log(total)
