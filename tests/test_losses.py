"""Losses: numbers worked by hand, and what holds between the formulas."""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax import losses, recipes
from grm_jax.losses import OBJECTIVES

MASK = jnp.asarray([[True, True, True, False], [True, False, False, False], [False] * 4])
POLICY_GRADIENTS = [name for name in OBJECTIVES if name != "rloo"]


def close(found, expected, atol=1e-6):
    np.testing.assert_allclose(found, expected, atol=atol, rtol=1e-6)


def rollouts(rows=4, tokens=5, seed=0):
    """Log-probabilities now and then, rewards of two groups, and a mask of 5, 4, 3, 2 tokens."""
    rng = np.random.default_rng(seed)
    new = jnp.asarray(-rng.exponential(size=(rows, tokens)), jnp.float32)
    old = new + jnp.asarray(0.3 * rng.standard_normal((rows, tokens)), jnp.float32)
    mask = jnp.arange(tokens)[None] < (tokens - jnp.arange(rows) % tokens)[:, None]
    return new, old, jnp.asarray(rng.choice([-1.0, 1.0], (rows // 2, 2)), jnp.float32), mask


def loss_of(objective, new, old, advantages, mask, length=8, clip=(0.2, 0.2)):
    of_token, _ = objective.surrogate(new, old, advantages, mask, *clip)
    return jnp.sum(objective.weights(mask, length) * of_token)


# ---------------------------------------------------------------- supervised


def test_nll_by_hand():
    """Probabilities 1/2 and 1/8 with weights 1/4 and 3/4, and one without a weight: (1 * 1/4 + 3 * 3/4) ln 2."""
    log_probs = jnp.log(jnp.asarray([[0.5, 0.125], [0.3, 0.9]]))
    close(losses.nll(log_probs, jnp.asarray([[0.25, 0.75], [0.0, 0.0]])), 2.5 * math.log(2))


def test_bce_by_hand():
    """Logits of probability 3/4: labels 1, 0 and 1/2 cost -ln 3/4, -ln 1/4 and their mean."""
    logits = jnp.full(3, math.log(3.0))
    right, wrong = -math.log(0.75), -math.log(0.25)
    found = losses.bce(logits, jnp.asarray([1.0, 0.0, 0.5]), jnp.asarray([1.0, 10.0, 100.0]))
    close(found, right + 10 * wrong + 100 * (right + wrong) / 2)


def test_bce_of_huge_logits_is_finite_and_its_gradient_right():
    logits, labels = jnp.asarray([300.0, -300.0, 300.0]), jnp.asarray([0.0, 0.0, 1.0])
    value, grad = jax.value_and_grad(losses.bce)(logits, labels, jnp.ones(3))
    close(value, 300.0)
    close(grad, [1.0, 0.0, 0.0])


# ---------------------------------------------------------------- advantages


def test_advantages_by_hand():
    """+1 thrice and -1: mean 1/2, population std sqrt(3)/2; the others of a +1 have mean 1/3, those of the -1 have 1."""
    rewards = jnp.asarray([[1.0, 1.0, 1.0, -1.0]])
    close(losses.centred_advantage(rewards), [[0.5, 0.5, 0.5, -1.5]])
    close(losses.group_advantage(rewards), [[3**-0.5] * 3 + [-(3**0.5)]], atol=5e-6)  # the std's epsilon
    close(losses.leave_one_out(rewards), [[2 / 3, 2 / 3, 2 / 3, -2.0]])


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("reward", [1.0, -1.0, 0.1, 0.7, 1e6 + 0.3])
def test_equal_groups_have_exactly_no_advantage_and_no_gradient(name, reward):
    objective = OBJECTIVES[name]
    advantages = objective.advantage(jnp.full((2, 7), reward))
    assert not advantages.any()
    new, old, _, mask = rollouts(14)
    assert not jax.grad(lambda new: loss_of(objective, new, old, advantages.reshape(-1), mask))(new).any()


def test_groups_do_not_touch_each_other():
    one, other = jnp.asarray([[1.0, -1.0, -1.0]]), jnp.asarray([[5.0, 2.0, 9.0]])
    for advantage in {objective.advantage for objective in OBJECTIVES.values()}:
        both = advantage(jnp.concatenate([one, other]))
        close(both, jnp.concatenate([advantage(one), advantage(other)]))
        close(both.sum(axis=1), [0, 0], atol=1e-5)


def test_a_group_of_one_has_no_others():
    with pytest.raises(ValueError, match="a group of 1 rollout has no others"):
        losses.leave_one_out(jnp.ones((2, 1)))


# ---------------------------------------------------------------- weights


def test_weights_by_hand():
    """Rollouts of 3, 1 and no tokens."""
    ones = np.asarray(MASK, float)
    close(losses.sequence_mean(MASK, 4), ones * [[1 / 9], [1 / 3], [0]])
    close(losses.token_mean(MASK, 4), ones / 4)
    close(losses.fixed_length(MASK, 10), ones / 30)
    close(losses.sequence_sum(MASK, 4), ones / 3)


def test_a_batch_of_no_tokens_weighs_nothing():
    for objective in OBJECTIVES.values():
        assert not objective.weights(jnp.zeros((2, 3), bool), 3).any()


def test_cut_rollouts_are_left_out():
    found = losses.without_overlong(MASK, jnp.asarray([False, True, True]))
    np.testing.assert_array_equal(found, [[False] * 4, [True, False, False, False], [False] * 4])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_microbatches_add_up(name):
    objective = OBJECTIVES[name]
    new, old, rewards, mask = rollouts()
    advantages, weights = (
        objective.advantage(rewards + jnp.asarray([[0.0, 0.5]])).reshape(-1),
        objective.weights(mask, 8),
    )

    def part(new, rows):
        of_token, _ = objective.surrogate(new[rows], old[rows], advantages[rows], mask[rows], 0.2, 0.2)
        return jnp.sum(weights[rows] * of_token)

    whole = jax.value_and_grad(part)(new, slice(None))
    parts = [jax.value_and_grad(part)(new, rows) for rows in (slice(0, 1), slice(1, 2), slice(2, 4))]
    assert abs(whole[1]).max() > 0.01
    for i in range(2):
        close(sum(part[i] for part in parts), whole[i])


# ---------------------------------------------------------------- surrogates


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_clipped_ratio_at_and_about_its_bounds(sign):
    """Bounds 1/2 and 2: the loss is the larger one of both losses, and a clipped token has no gradient."""
    ratio = jnp.asarray([[0.25, 0.5, 1.0, 2.0, 4.0]])
    advantages, mask = jnp.asarray([3.0 * sign]), jnp.ones((1, 5), bool)

    def surrogate(new):
        return losses.clipped_ratio(new, jnp.zeros((1, 5)), advantages, mask, 0.5, 1.0)

    expected = [0.25, 0.5, 1, 2, 2] if sign > 0 else [0.5, 0.5, 1, 2, 4]
    outside = [False] * 4 + [True] if sign > 0 else [True] + [False] * 4
    found, clipped = surrogate(jnp.log(ratio))
    close(found, -3 * sign * jnp.asarray([expected]))
    assert clipped[0].tolist() == outside
    grad = jax.grad(lambda new: surrogate(new)[0].sum())(jnp.log(ratio))
    close(grad, jnp.where(clipped, 0.0, -3 * sign * ratio))


def test_one_ratio_a_sequence_by_hand():
    """Token ratios 2, 8 and (masked) 1000 make 4; 1/2 alone makes 1/2."""
    new = jnp.log(jnp.asarray([[2.0, 8.0, 1000.0], [0.5, 1000.0, 1000.0]]))
    mask = jnp.asarray([[True, True, False], [True, False, False]])
    advantages = jnp.asarray([1.0, -1.0])
    found, clipped = losses.sequence_ratio(new, jnp.zeros((2, 3)), advantages, mask, 0.9, 9.0)
    close(found, [[-4.0, -4.0, 0.0], [0.5, 0.0, 0.0]])
    assert not clipped.any()
    found, clipped = losses.sequence_ratio(new, jnp.zeros((2, 3)), advantages, mask, 0.2, 0.5)
    close(found, [[-1.5, -1.5, 0.0], [0.8, 0.0, 0.0]])
    np.testing.assert_array_equal(clipped, mask)


def test_reinforce_by_hand():
    new = jnp.asarray([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    mask = jnp.asarray([[True, True, False], [True, False, False]])
    found, clipped = losses.reinforce(new, new + 9, jnp.asarray([2.0, -0.5]), mask, 0.2, 0.2)
    close(found, [[2.0, 4.0, 0.0], [-2.0, 0.0, 0.0]])
    assert not clipped.any()


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_on_policy_gradients_are_reinforce_s(name):
    """At p = p_old every ratio's gradient is that of log p: REINFORCE with the same advantages and weights."""
    objective = OBJECTIVES[name]
    new, _, _, mask = rollouts()
    advantages = objective.advantage(jnp.asarray([[1.0, -1.0], [3.0, 2.0]])).reshape(-1)
    weights = objective.weights(mask, 8)
    plain = -weights * advantages[:, None]
    assert abs(plain).max() > 0.01
    # `old` is the very same array: no gradient may go through it.
    close(jax.grad(lambda new: loss_of(objective, new, new, advantages, mask))(new), plain)


def test_gspo_is_grpo_at_ratio_one():
    new, _, _, mask = rollouts()
    advantages = jnp.asarray([1.0, -1.0, 2.0, 0.5])
    one, other = (
        jax.value_and_grad(lambda x, o=OBJECTIVES[name]: loss_of(o, x, new, advantages, mask))(new)
        for name in ("grpo", "gspo")
    )
    close(one[0], other[0])
    close(one[1], other[1])
    _, old, _, _ = rollouts()  # and no longer at other ratios
    one, other = (loss_of(OBJECTIVES[name], new, old, advantages, mask) for name in ("grpo", "gspo"))
    assert abs(one - other) > 1e-3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_stands_behind_the_mask_does_not_matter(name):
    objective = OBJECTIVES[name]
    new, old, _, mask = rollouts()
    advantages = jnp.asarray([1.0, -1.0, 2.0, 0.5])
    value = jax.value_and_grad(lambda new, old: loss_of(objective, new, old, advantages, mask))
    one = value(new, old)
    other = value(jnp.where(mask, new, 7.0), jnp.where(mask, old, -1e6))
    close(one[0], other[0])
    close(one[1], other[1])
    assert not one[1][~np.asarray(mask)].any()


# ---------------------------------------------------------------- KL


def test_estimators_by_hand():
    """q = 2p and q = p / 2."""
    log_p, log_q = jnp.zeros((1, 2)), jnp.log(jnp.asarray([[2.0, 0.5]]))
    ln2 = math.log(2)
    close(losses.k1(log_p, log_q), [[-ln2, ln2]])
    close(losses.k2(log_p, log_q), [[ln2**2 / 2] * 2])
    close(losses.k3(log_p, log_q), [[1 - ln2, ln2 - 0.5]])


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative():
    rng = np.random.default_rng(0)
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(rng.standard_normal((1, 50)), jnp.float32)) for _ in range(2))
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q))
    assert kl > 0.3
    for estimator in (losses.k1, losses.k3):
        close(jnp.sum(jnp.exp(log_p) * estimator(log_p, log_q)), kl, atol=1e-5)
    assert losses.k3(log_p, log_q).min() >= 0
    assert losses.k3(log_p, log_p + 1e-4).min() > 4e-9  # 1/2 (1e-4)^2, which exp(x) - 1 - x would round away


def test_expected_gradients_of_k2_and_k3():
    """Along the policy's scores, k2 pulls to KL(p || q)'s gradient, and k3 to KL(q || p)'s: sum_x p(x) dk/dtheta."""
    rng = np.random.default_rng(1)
    theta, log_q = (jnp.asarray(rng.standard_normal((1, 6)), jnp.float32) for _ in range(2))
    log_q = jax.nn.log_softmax(log_q)
    p = jax.nn.softmax(theta)

    def expected(estimator):
        return jax.grad(lambda theta: jnp.sum(p * estimator(jax.nn.log_softmax(theta), log_q)))(theta)

    def kl(theta):
        log_p = jax.nn.log_softmax(theta)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

    def reverse(theta):
        return jnp.sum(jnp.exp(log_q) * (log_q - jax.nn.log_softmax(theta)))

    close(expected(losses.k2), jax.grad(kl)(theta))
    close(expected(losses.k3), jax.grad(reverse)(theta))


# ---------------------------------------------------------------- the table


def test_the_objectives_are_those_that_a_recipe_may_name():
    assert tuple(OBJECTIVES) == typing.get_args(recipes.Objective)
    assert {field.name for field in dataclasses.fields(losses.Objective)} == {
        "advantage", "surrogate", "weights", "overlong"
    }  # fmt: skip
    assert [name for name, objective in OBJECTIVES.items() if objective.overlong] == ["dapo"]


def test_one_batch_under_every_objective_by_hand():
    """A group of 2: a right rollout of 1 token at ratio 2 and a wrong one of 3 tokens at ratio 1; bounds 0.8 and 1.2."""
    new = jnp.log(jnp.asarray([[0.5, 0.5, 0.5], [0.25, 0.25, 0.25]]))
    old = jnp.log(jnp.asarray([[0.25, 0.5, 0.5], [0.25, 0.25, 0.25]]))
    mask = jnp.asarray([[True, False, False], [True, True, True]])
    ln2 = math.log(2)
    expected = {
        "grpo": (-1.2 + 1) / 2,  # advantages 1 and -1
        "dr_grpo": (-1.2 + 3) / (2 * 8),
        "dapo": (-1.2 + 3) / 4,
        "gspo": (-1.2 + 1) / 2,
        "rloo": (2 * ln2 - 2 * 3 * 2 * ln2) / 2,  # advantages 2 and -2
    }
    for name, objective in OBJECTIVES.items():
        advantages = objective.advantage(jnp.asarray([[1.0, -1.0]])).reshape(-1)
        close(loss_of(objective, new, old, advantages, mask), expected[name], atol=5e-6)
