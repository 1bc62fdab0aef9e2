"""Voting: the kernel against a slow reference in exact arithmetic, and cases worked by hand."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grm_jax import voting

E, K, N = 4, 6, 5  # one compiled shape; counts 1..N and prefixes 1..K stand for the smaller ones

expected_accuracy_batch = jax.jit(jax.vmap(voting.expected_accuracy))


def slow_vote(scores, valid, count, weights, correct):
    """(sums, best, tie, valid, expected accuracy) after each prefix, as a person would work them out."""
    rows = []
    for k in range(1, len(valid) + 1):
        kept = [j for j in range(k) if valid[j]]
        sums = [sum((Fraction(weights[j]) * scores[j][i] for j in kept), Fraction(0)) for i in range(count)]
        tied = [i for i in range(count) if sums[i] == max(sums)]
        accuracy = Fraction(1, len(tied)) if correct in tied else Fraction(0)
        rows.append((sums, tied[0], len(tied) > 1, len(kept), accuracy))
    return rows


@st.composite
def ballots(draw, score_values):
    count = draw(st.integers(1, N))
    scores = draw(st.lists(st.lists(score_values, min_size=N, max_size=N), min_size=K, max_size=K))
    valid = draw(st.lists(st.booleans(), min_size=K, max_size=K))
    weights = draw(st.lists(st.sampled_from([0.0, 0.125, 0.5, 1.0, 2.75]), min_size=K, max_size=K))
    return scores, valid, count, weights, draw(st.integers(0, count - 1))


def check(cases, dtype, weighted: bool) -> None:
    scores, valid, counts, weights, correct = zip(*cases, strict=True)
    tally = voting.vote_batch(
        jnp.array(scores, dtype), jnp.array(valid), jnp.array(counts), jnp.array(weights) if weighted else None
    )
    accuracy = np.asarray(expected_accuracy_batch(tally.sums, jnp.array(counts), jnp.array(correct)))
    tally = jax.tree.map(np.asarray, tally)
    for e, (scores_e, valid_e, count, weights_e, correct_e) in enumerate(cases):
        expected = slow_vote(scores_e, valid_e, count, weights_e if weighted else [1] * K, correct_e)
        for k, (sums, best, tie, voters, worth) in enumerate(expected):
            assert tally.sums[e, k].tolist() == [float(s) for s in sums] + [0.0] * (N - count)
            assert (int(tally.best[e, k]), bool(tally.tie[e, k]), int(tally.valid[e, k])) == (best, tie, voters)
            assert float(accuracy[e, k]) == pytest.approx(float(worth), abs=1e-7)


@settings(deadline=None, max_examples=40)
@given(st.lists(ballots(st.integers(1, 4)), min_size=E, max_size=E), st.booleans())
def test_vote_equals_slow_reference(cases, weighted):
    check(cases, jnp.int32, weighted)


@settings(deadline=None, max_examples=20)
@given(st.lists(ballots(st.sampled_from([-3, -1.5, 0, 0.25, 10])), min_size=E, max_size=E))
def test_vote_takes_negative_and_fractional_scores(cases):
    check(cases, jnp.float32, weighted=False)


def test_vote_by_hand():
    tally = voting.vote(jnp.array([[8, 7, 99], [99, 99, 99], [5, 6, 99]]), jnp.array([True, False, True]), jnp.int32(2))
    assert tally.sums.tolist() == [[8, 7, 0], [8, 7, 0], [13, 13, 0]]
    assert tally.best.tolist() == [0, 0, 0]
    assert tally.tie.tolist() == [False, False, True]
    assert tally.valid.tolist() == [1, 1, 2]
    assert voting.expected_accuracy(tally.sums, jnp.int32(2), jnp.int32(0)).tolist() == [1, 1, 0.5]
    assert voting.expected_accuracy(tally.sums, jnp.int32(2), jnp.int32(1)).tolist() == [0, 0, 0.5]


@pytest.mark.parametrize(("count", "tie"), [(1, False), (2, True), (3, True)])
def test_all_failed_is_a_tie_of_all(count, tie):
    tally = voting.vote(jnp.full((2, 3), -1), jnp.zeros(2, bool), jnp.int32(count))
    assert tally.sums.tolist() == [[0] * 3] * 2
    assert tally.best.tolist() == [0, 0]
    assert tally.tie.tolist() == [tie, tie]
    assert tally.valid.tolist() == [0, 0]
    worth = voting.expected_accuracy(tally.sums, jnp.int32(count), jnp.int32(0))
    np.testing.assert_allclose(worth, [1 / count] * 2, rtol=1e-6)


def test_small_integers_do_not_overflow():
    """Scores from the reader may be stored in 8 bits; 64 tens are more than 8 bits hold."""
    tally = voting.vote(jnp.full((64, 2), 10, jnp.int8), jnp.ones(64, bool), jnp.int32(2))
    assert tally.sums[-1].tolist() == [640, 640]


def test_a_prefix_is_the_vote_of_fewer_judgments():
    scores = jax.random.randint(jax.random.key(0), (K, 3), 1, 11)
    valid = jnp.array([True, False, True, True, False, True])
    vote = jax.jit(voting.vote)
    whole = vote(scores, valid, jnp.int32(3))
    fewer = vote(scores[:4], valid[:4], jnp.int32(3))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:4], b), whole, fewer)
