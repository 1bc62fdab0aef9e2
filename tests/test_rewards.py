"""Rewards: the host's rules by hand, and the device's against the host's."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grm_jax import rewards
from grm_jax.rewards import is_correct, is_tie

R, N = 8, 4  # one compiled shape; counts 1..N stand for the smaller ones


@pytest.mark.parametrize(
    ("scores", "labels", "right"),
    [
        ((7, 5), (1.0, 0.0), True),
        ((5, 7), (1.0, 0.0), False),
        ((7, 7), (1.0, 0.0), False),  # a tie is wrong
        (None, (1.0, 0.0), False),
        ((3, 9, 8), (0.1, 0.3, 0.2), True),
        ((9, 9, 3), (0.1, 0.3, 0.2), False),
        ((2, 9, 2), (0.1, 0.3, 0.1), True),  # ties below the top do not matter
        ((-1, 0), (-2.5, -2.0), True),
        ((1,), (1.0,), True),
        ((0,), (0.0,), True),
        ((1,), (0.0,), False),
        (None, (0.0,), False),
        ((1,), (0.5,), False),
    ],
)
def test_right_judgments_by_hand(scores, labels, right):
    assert is_correct(scores, labels) is right


@pytest.mark.parametrize(
    ("scores", "tie"), [((7, 7), True), ((7, 5, 7), True), ((7, 5, 5), False), ((1, 2), False), ((3,), False)]
)
def test_ties_by_hand(scores, tie):
    assert is_tie(scores) is tie


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ((1, 2), (1.0, 1.0), r"labels \[1.0, 1.0\] have no single best"),
        (None, (0.5, 1.0, 1.0), "no single best"),  # also where it did not parse: the data is wrong, not the judgment
        ((1, 2, 3), (1.0, 0.0), r"3 scores \[1, 2, 3\] for 2 labels"),
        ((1,), (), "an example without labels"),
    ],
)
def test_data_that_has_no_right_answer_is_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        is_correct(scores, labels)


@st.composite
def judgments(draw):
    """Scores, or None; labels with a single best; small numbers, so that ties and right ones are common."""
    count = draw(st.integers(1, N))
    labels = draw(st.lists(st.sampled_from([-1.5, 0.0, 0.25, 1.0, 2.0]), min_size=count, max_size=count))
    if labels.count(max(labels)) > 1:
        labels[draw(st.integers(0, count - 1))] = 3.0
    scores = draw(st.lists(st.integers(-2, 3), min_size=count, max_size=count))
    return draw(st.none() | st.just(scores)), labels


on_device = jax.jit(lambda *row: (rewards.correct(*row), rewards.tied(*row), rewards.outcome(*row)))


@settings(deadline=None, max_examples=60)
@given(st.lists(judgments(), min_size=R, max_size=R), st.sampled_from([-1e30, 7.0, float("nan")]), st.integers(-9, 9))
def test_the_device_says_what_the_host_says(rows, padding, failed):
    """`padding` stands in labels behind the count, `failed` in the scores of judgments that did not parse."""
    scores = [(found if found is not None else [failed] * len(labels)) for found, labels in rows]
    correct, tied, outcome = on_device(
        jnp.asarray([found + [-1] * (N - len(found)) for found in scores]),
        jnp.asarray([found is not None for found, _ in rows]),
        jnp.asarray([labels + [padding] * (N - len(labels)) for _, labels in rows], jnp.float32),
        jnp.asarray([len(labels) for _, labels in rows]),
    )
    expected = [is_correct(found, labels) for found, labels in rows]
    assert correct.tolist() == expected
    assert tied.tolist() == [found is not None and is_tie(found) for found, _ in rows]
    assert outcome.tolist() == [1.0 if right else -1.0 for right in expected]


def test_a_row_of_no_responses_is_never_right():
    row = jnp.asarray([[-1, -1]]), jnp.asarray([True]), jnp.asarray([[-1.0, -1.0]]), jnp.asarray([0])
    assert not rewards.correct(*row).any()
    assert not rewards.tied(*row).any()
    assert rewards.outcome(*row).tolist() == [-1.0]
