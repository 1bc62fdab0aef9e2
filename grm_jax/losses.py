"""Losses of training, each with its formula and its source: arrays and numbers in, arrays out.

1. An update's loss is sum(weights_RT * loss_RT). The weights are made ONCE, from the whole batch, and carry every mean
   that an objective takes; so microbatches add up to the whole batch's loss and gradient, whatever their sizes.
2. Rewards become advantages within each prompt's group; they are constants of the gradient.
3. A surrogate turns advantages and log-probabilities into one loss a token; `OBJECTIVES` names the combinations.
4. The KL to the reference is estimated token by token (`k1`, `k2`, `k3`) and weighed by the same weights.

Departures: a group whose rewards are all equal gives exactly zero, where the rounding of its mean would leave a small
number, and the division by a standard deviation near zero would make it large; `token_mean` goes over the whole batch.

Shapes: P prompts, G rollouts a prompt, R = P * G rollouts, T tokens. A mask is True at sampled tokens, the end id included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

STD_EPS = 1e-6  # beside the standard deviation; rewards of +1 and -1 have none below 2 * sqrt(G - 1) / G

Advantage = Callable[[Float[Array, "P G"]], Float[Array, "P G"]]
Weights = Callable[[Bool[Array, "R T"], int], Float[Array, "R T"]]
Surrogate = Callable[
    [Float[Array, "R T"], Float[Array, "R T"], Float[Array, "R"], Bool[Array, "R T"], float, float],
    tuple[Float[Array, "R T"], Bool[Array, "R T"]],
]


def nll(log_probs: Float[Array, "R T"], weights: Float[Array, "R T"]) -> Float[Array, ""]:
    """-sum(w * log p): the negative log-likelihood of the tokens that have a weight."""
    return -jnp.sum(weights * log_probs)


def bce(logits: Float[Array, "R"], labels: Float[Array, "R"], weights: Float[Array, "R"]) -> Float[Array, ""]:
    """-sum(w * (y log sigmoid(x) + (1 - y) log sigmoid(-x))): binary cross-entropy, labels in [0, 1] (section 4.2)."""
    return -jnp.sum(weights * (labels * jax.nn.log_sigmoid(logits) + (1 - labels) * jax.nn.log_sigmoid(-logits)))


def bradley_terry(
    scalars: Float[Array, "R"], correct: Float[Array, "R"], weights: Float[Array, "R"]
) -> Float[Array, ""]:
    """-sum(w * log sigmoid(r_better - r_worse)) over pairs of rows (2i, 2i + 1); a pair weighs what its rows do together.

    Bradley and Terry, 1952, as in arXiv 2203.02155, Eq. 1. correct: 1 for a pair's better row, 0 for the other.
    """
    ahead = (scalars * (2 * correct - 1)).reshape(-1, 2).sum(axis=1)
    return -jnp.sum(weights.reshape(-1, 2).sum(axis=1) * jax.nn.log_sigmoid(ahead))


def better_first(scalars: Float[Array, "R"], correct: Float[Array, "R"]) -> Bool[Array, "R"]:
    """Whether the better row of each pair (2i, 2i + 1) has the higher scalar; said of both rows."""
    return jnp.repeat((scalars * (2 * correct - 1)).reshape(-1, 2).sum(axis=1) > 0, 2)


def _deviation(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """r - mean(r) within each group; exactly 0 where all of a group are equal."""
    equal = jnp.all(rewards == rewards[:, :1], axis=1, keepdims=True)
    return jnp.where(equal, 0.0, rewards - rewards.mean(axis=1, keepdims=True))


def group_advantage(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-6), std over the group as a population: divided by G, not by G - 1.

    GRPO, arXiv 2402.03300, section 4.1.2. An all-equal group gives exactly zero.
    """
    return _deviation(rewards) / (rewards.std(axis=1, keepdims=True) + STD_EPS)


def centred_advantage(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """A_i = r_i - mean(r). Dr. GRPO, arXiv 2503.20783: easy and hard prompts are not scaled up."""
    return _deviation(rewards)


def leave_one_out(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """A_i = r_i - mean of the group's others = G / (G - 1) * (r_i - mean(r)). RLOO, arXiv 2402.14740.

    Raises ValueError for a group of one, which has no others.
    """
    group = rewards.shape[1]
    if group < 2:
        raise ValueError(f"a group of {group} rollout has no others to compare with: take at least 2 of each prompt")
    return group / (group - 1) * _deviation(rewards)


def sequence_mean(mask: Bool[Array, "R T"], max_length: int) -> Float[Array, "R T"]:
    """1 / (R * len_r): the mean over rollouts of each one's mean over its tokens; a rollout without any weighs 0.

    GRPO, arXiv 2402.03300, Eq. 3. `max_length` is not used.
    """
    lengths = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return mask / (mask.shape[0] * lengths)


def token_mean(mask: Bool[Array, "R T"], max_length: int) -> Float[Array, "R T"]:
    """1 / sum_r len_r: the mean over all tokens of the batch. DAPO, arXiv 2503.14476, Eq. 8. `max_length` is not used.

    The equation takes it over one prompt's group, then the mean over prompts; here it goes over the whole batch at once.
    """
    return mask / jnp.maximum(mask.sum(), 1)


def fixed_length(mask: Bool[Array, "R T"], max_length: int) -> Float[Array, "R T"]:
    """1 / (R * max_length): no rollout's length changes what one of its tokens weighs. Dr. GRPO, arXiv 2503.20783."""
    return mask / jnp.float32(mask.shape[0] * max_length)


def sequence_sum(mask: Bool[Array, "R T"], max_length: int) -> Float[Array, "R T"]:
    """1 / R: the mean over rollouts of each one's sum, its log-probability. RLOO, arXiv 2402.14740.

    `max_length` is not used.
    """
    return mask / jnp.float32(mask.shape[0])


def without_overlong(mask: Bool[Array, "R T"], ended: Bool[Array, "R"]) -> Bool[Array, "R T"]:
    """The mask without rollouts that ran into the budget: their reward judges a text that was cut.

    DAPO's overlong filtering, arXiv 2503.14476, section 3.4.
    """
    return mask & ended[:, None]


def _clipped(
    ratio: Float[Array, "R T"], advantages: Float[Array, "R"], mask: Bool[Array, "R T"], low: float, high: float
) -> tuple[Float[Array, "R T"], Bool[Array, "R T"]]:
    """-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), and where the minimum is the clipped one.

    Written as a choice, so that a ratio exactly on a bound keeps its whole gradient.
    """
    advantages = jnp.broadcast_to(advantages[:, None], ratio.shape)
    above, below = ratio > 1 + high, ratio < 1 - low
    clipped = mask & (((advantages > 0) & above) | ((advantages < 0) & below))
    bounded = jnp.where(clipped, jnp.clip(ratio, 1 - low, 1 + high), ratio)
    return jnp.where(mask, -bounded * advantages, 0.0), clipped


def clipped_ratio(
    log_probs: Float[Array, "R T"],
    old: Float[Array, "R T"],
    advantages: Float[Array, "R"],
    mask: Bool[Array, "R T"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "R T"], Bool[Array, "R T"]]:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = p / p_old of each token.

    PPO, arXiv 1707.06347, Eq. 7; GRPO, 2402.03300, Eq. 3; bounds of two sizes: DAPO, 2503.14476, Eq. 10. Returns each
    token's loss, 0 behind the mask, and whether its ratio was clipped. `old` is a constant, and may be anything there.
    """
    log_ratio = jnp.where(mask, log_probs - jax.lax.stop_gradient(old), 0.0)
    return _clipped(jnp.exp(log_ratio), advantages, mask, clip_low, clip_high)


def sequence_ratio(
    log_probs: Float[Array, "R T"],
    old: Float[Array, "R T"],
    advantages: Float[Array, "R"],
    mask: Bool[Array, "R T"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "R T"], Bool[Array, "R T"]]:
    """As `clipped_ratio`, with one ratio a rollout: exp(mean over its tokens of log p - log p_old).

    GSPO, arXiv 2507.18071, Eq. 5 and 7. Its bounds are for means: the paper's are 3e-4 and 4e-4, not 0.2.
    """
    log_ratio = jnp.where(mask, log_probs - jax.lax.stop_gradient(old), 0.0)
    lengths = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    ratio = jnp.exp(log_ratio.sum(axis=1, keepdims=True) / lengths)
    return _clipped(jnp.broadcast_to(ratio, mask.shape), advantages, mask, clip_low, clip_high)


def reinforce(
    log_probs: Float[Array, "R T"],
    old: Float[Array, "R T"],
    advantages: Float[Array, "R"],
    mask: Bool[Array, "R T"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "R T"], Bool[Array, "R T"]]:
    """-A * log p: the policy gradient itself, without a ratio, so nothing is clipped. RLOO, arXiv 2402.14740.

    `old`, `clip_low` and `clip_high` are not used.
    """
    return jnp.where(mask, -advantages[:, None] * log_probs, 0.0), jnp.zeros_like(mask)


def k1(log_p: Float[Array, "R T"], log_q: Float[Array, "R T"]) -> Float[Array, "R T"]:
    """log p - log q of tokens drawn from p: unbiased for KL(p || q), large variance.

    J. Schulman, "Approximating KL divergence", 2020, http://joschu.net/blog/kl-approx.html; k2 and k3 too.
    """
    return log_p - log_q


def k2(log_p: Float[Array, "R T"], log_q: Float[Array, "R T"]) -> Float[Array, "R T"]:
    """(log p - log q)^2 / 2: biased, never below 0; its gradient's expectation is the KL's."""
    return 0.5 * (log_p - log_q) ** 2


def k3(log_p: Float[Array, "R T"], log_q: Float[Array, "R T"]) -> Float[Array, "R T"]:
    """q / p - log(q / p) - 1: unbiased for KL(p || q), never below 0. GRPO, arXiv 2402.03300, Eq. 4.

    It is exponential in log q - log p: give both the same numbers at padding, or their difference may overflow there.
    """
    log_ratio = log_q - log_p
    return jnp.expm1(log_ratio) - log_ratio


@dataclasses.dataclass(frozen=True)
class Objective:
    """What tells one policy-gradient objective from another."""

    advantage: Advantage
    """rewards [P, G] -> advantages [P, G]"""
    surrogate: Surrogate
    """(log_probs [R, T], old [R, T], advantages [R], mask [R, T], clip_low, clip_high) -> (loss [R, T], clipped [R, T])"""
    weights: Weights
    """(mask [R, T], longest rollout) -> each token's weight in the loss [R, T]"""
    overlong: bool
    """whether rollouts that ran into the budget are left out"""


OBJECTIVES: dict[str, Objective] = {  # the keys are those of recipes.Objective
    "grpo": Objective(group_advantage, clipped_ratio, sequence_mean, overlong=False),
    "dr_grpo": Objective(centred_advantage, clipped_ratio, fixed_length, overlong=False),
    "dapo": Objective(group_advantage, clipped_ratio, token_mean, overlong=True),
    "gspo": Objective(group_advantage, sequence_ratio, sequence_mean, overlong=False),
    "rloo": Objective(leave_one_out, reinforce, sequence_sum, overlong=False),
}
