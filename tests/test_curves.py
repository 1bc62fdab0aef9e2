"""Curves of accuracy against votes, by hand."""

import numpy as np
import pytest

from grm_jax.datatypes import Example, Judgment, Message, Usage
from grm_jax.spct.curves import curves
from grm_jax.verdicts import verdict

TALK = (Message("user", "?"),)
PAIR = Example("pair", TALK, ("a", "b"), (1.0, 0.0))
TRIPLE = Example("triple", TALK, ("a", "b", "c"), (0.0, 0.0, 1.0))


def judged(*scores: tuple[int, ...] | None) -> list[Judgment]:
    return [Judgment("", s, None if s else "no box", tuple(range(len(s or ()))), False, 1, 0.0) for s in scores]


def test_curves_by_hand():
    pair = verdict(PAIR, judged((2, 6), (9, 1), None), Usage(1, 1, 0.0), [-1.0, 2.0, 5.0])
    triple = verdict(TRIPLE, judged((5, 5, 5), (1, 1, 2), (9, 1, 1)), Usage(1, 1, 0.0), [0.0, 0.0, 3.0])
    found = curves([PAIR, TRIPLE], [pair, triple])
    assert found["voting"].tolist() == [[0, 1, 1], pytest.approx([1 / 3, 1, 0])]
    assert found["guided"].tolist() == [[0, 1, 1], pytest.approx([1 / 3, 1 / 3, 0])]
    assert found["softmax"].tolist() == [[0, 1, 1], pytest.approx([1 / 3, 1, 0])]
    plain = verdict(PAIR, judged((2, 6), (9, 1), None), Usage(1, 1, 0.0))
    assert curves([PAIR], [plain]).keys() == {"voting"}
    np.testing.assert_array_equal(curves([PAIR], [plain])["voting"], [[0, 1, 1]])


def test_what_has_no_curve_is_named():
    single = Example("one", TALK, ("a",), (1.0,))
    for example in (single, Example("pair", TALK, ("a", "b")), Example("other", TALK, ("a", "b"), (1.0, 0.0))):
        found = verdict(example, judged((5,) * len(example.responses)), Usage(1, 1, 0.0))
        wrong = found if example.id != "other" else verdict(PAIR, judged((5, 5)), Usage(1, 1, 0.0))
        with pytest.raises(ValueError, match="a curve needs labelled examples of two or more"):
            curves([example], [wrong])
