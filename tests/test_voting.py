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


def slow_guided(scores, valid, count, logits, k_meta):
    """(sums, best, tie, kept) after each prefix: sort what is valid, keep the first ones, add up."""
    rows = []
    for k in range(1, len(valid) + 1):
        most = max(1, k // 2) if k_meta is None else min(k, k_meta)
        ranked = sorted((j for j in range(k) if valid[j]), key=lambda j: (-logits[j], j))[:most]
        sums = [sum(scores[j][i] for j in ranked) for i in range(count)]
        tied = [i for i in range(count) if sums[i] == max(sums)]
        rows.append((sums, tied[0], len(tied) > 1, sorted(ranked)))
    return rows


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            ballots(st.integers(1, 10)), st.lists(st.sampled_from([-2.5, 0.0, 0.5, 3.0]), min_size=K, max_size=K)
        ),
        min_size=E,
        max_size=E,
    ),
    st.sampled_from([None, 1, 2, 4, K, 3 * K]),
)
def test_guided_vote_equals_slow_reference(cases, k_meta):
    """Every k' <= K at once, with failed parses, equal logits and k = 1."""
    (scores, valid, counts, *_), logits = zip(*(case for case, _ in cases), strict=True), [row for _, row in cases]
    tally, kept = voting.guided_batch(
        jnp.array(scores, jnp.int32), jnp.array(valid), jnp.array(counts), jnp.array(logits), k_meta
    )
    tally, kept = jax.tree.map(np.asarray, (tally, kept))
    for e in range(E):
        expected = slow_guided(scores[e], valid[e], counts[e], logits[e], k_meta)
        for k, (sums, best, tie, ranked) in enumerate(expected):
            assert tally.sums[e, k].tolist() == sums + [0] * (N - counts[e])
            assert (int(tally.best[e, k]), bool(tally.tie[e, k])) == (best, tie)
            assert np.flatnonzero(kept[e, k]).tolist() == ranked
            assert tally.valid[e, k] == len(ranked)


@settings(deadline=None, max_examples=30)
@given(ballots(st.integers(1, 10)), st.lists(st.sampled_from([-200.0, -2.5, 0.0, 0.5, 90.0]), min_size=K, max_size=K))
def test_softmax_weights_are_shares_of_what_is_valid(case, logits):
    scores, valid, count, _, _ = case
    tally = voting.softmax_weighted_batch(
        *(jnp.array(x)[None] for x in (np.array(scores, np.int32), valid, count, np.array(logits, np.float32)))
    )
    for k in range(1, K + 1):
        share = np.array([np.exp(np.float64(logits[j]) - 90) if valid[j] else 0.0 for j in range(k)])
        share = share / share.sum() if share.any() else share
        sums = share @ np.array(scores[:k], np.float64)
        np.testing.assert_allclose(tally.sums[0, k - 1, :count], sums[:count], rtol=1e-5, atol=1e-6)
        assert int(tally.valid[0, k - 1]) == sum(valid[:k])


def test_guided_vote_by_hand():
    """Three judgments say 9 : 1, 2 : 6, 3 : 5; the meta RM trusts the second most, then the third."""
    given = jnp.array([[9, 1], [2, 6], [3, 5], [0, 0]]), jnp.array([True, True, True, False]), 2
    tally, kept = voting.guided(*given, jnp.array([-1.0, 2.0, 0.5, 9.0]))
    assert tally.sums.tolist() == [[9, 1], [2, 6], [2, 6], [5, 11]]  # k_meta = 1, 1, 1, 2
    assert tally.best.tolist() == [0, 1, 1, 1]
    assert kept[3].tolist() == [False, True, True, False]
    assert voting.vote(*given).best.tolist() == [0, 0, 0, 0]  # 11 : 7 and 14 : 12 without a guide


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
