"""Accuracy on held-out examples, worked by hand: ties by expectation, the longest response, the interval."""

from dataclasses import replace

import numpy as np
import pytest

from grm_jax import Example, Judgment, Message, Usage
from grm_jax.spct.measure import interval, longest_of, measured, worth_of
from grm_jax.verdicts import verdict


def voted(labels: tuple[float, ...], *scores: tuple[int, ...] | None):
    """An example and the vote over judgments with these scores."""
    example = Example("e", (Message("user", "q"),), tuple("abcd"[: len(labels)]), labels)
    judgments = [Judgment("", found, None, tuple(range(len(labels))), False, 1, 0.0) for found in scores]
    return example, verdict(example, judgments, Usage(1, 1, 0.0))


@pytest.mark.parametrize(
    ("labels", "scores", "worth"),
    [
        ((1.0, 0.0), [(8, 3)], 1),
        ((1.0, 0.0), [(3, 8)], 0),
        ((1.0, 0.0), [(5, 5)], 1 / 2),
        ((1.0, 0.0), [(8, 3), (2, 7), None], 1 / 2),  # 10 : 10
        ((0.0, 2.0, 1.0), [(4, 9, 1), (9, 5, 1)], 1),  # 13 : 14 : 2
        ((0.0, 2.0, 1.0), [(9, 9, 9)], 1 / 3),
        ((0.0, 2.0, 1.0), [(9, 5, 9)], 0),  # a tie without the right one
        ((0.0, 2.0, 1.0, 1.0), [None, None], 0),  # no judgment parses: no hidden share of a tie
        ((1.0,), [(1,), (1,), (0,)], 1),  # 2/3 is nearer to 1
        ((1.0,), [(1,), (0,), (0,)], 0),
        ((1.0,), [(1,), (0,)], 1 / 2),  # as near to 0 as to 1
        ((0.0,), [(1,), (0,)], 1 / 2),
        ((0.0,), [(0,), None], 1),
        ((0.0,), [None], 0),
        ((3.0,), [(2,), (3,), (3,)], 1),
        ((3.0,), [(7,)], 0),
    ],
)
def test_the_worth_of_a_verdict_by_hand(labels, scores, worth):
    assert worth_of(*voted(labels, *scores)) == worth


@pytest.mark.parametrize(
    ("responses", "labels", "worth"),
    [
        (("long one", "short"), (1.0, 0.0), 1),
        (("long one", "short"), (0.0, 1.0), 0),
        (("aa", "bb", "c"), (0.0, 1.0, 0.5), 1 / 2),
        (("aa", "bb", "cc"), (0.0, 1.0, 0.5), 1 / 3),
        (("aa", "bb", "c"), (0.0, 0.0, 1.0), 0),
        (("a",), (1.0,), 1),
        (("a",), (0.0,), 0),
    ],
)
def test_what_picking_the_longest_scores_by_hand(responses, labels, worth):
    assert longest_of(Example("e", (Message("user", "q"),), responses, labels)) == worth


def test_the_interval_by_hand():
    assert interval(np.ones(7), "abcdefg", 0) == (1.0, 1.0)
    assert interval(np.array([0.0, 1.0]), "ab", 0) == (0.0, 1.0)  # a quarter of the resamples is 0 0, another 1 1
    assert interval(np.array([0.0, 1.0]), "aa", 0) == (0.5, 0.5)  # one conversation: drawn whole
    each = [str(i) for i in range(400)]
    low, high = interval(np.repeat([0.0, 1.0], 200), each, 3)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)  # the standard error is 0.5 / sqrt(400)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)
    twice = interval(np.repeat([0.0, 1.0], 200), [name for name in each[:200] for _ in range(2)], 3)
    assert twice[0] == pytest.approx(0.5 - 1.96 * 0.025 * np.sqrt(2), abs=0.008)  # half as many that differ


def test_verdicts_without_a_readable_judgment_are_counted_and_worth_nothing():
    pairs = [voted((1.0, 0.0), (8, 3), None), voted((1.0, 0.0), None, None)]
    pairs = [(replace(example, id=str(i)), replace(found, id=str(i))) for i, (example, found) in enumerate(pairs)]
    result = measured([example for example, _ in pairs], [found for _, found in pairs], 0)
    assert (result.accuracy, result.unread, result.failures, result.ties) == (0.5, 0.5, 0.75, 0.0)
