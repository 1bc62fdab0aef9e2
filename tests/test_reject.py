"""Which sampled judgments are kept: rows made by hand, each rule of section 3.1 by itself."""

from collections import Counter

import pytest

from grm_jax import Message
from grm_jax.spct.reject import by_item, labelled, reject_easy, reject_wrong, too_easy_ids, trajectories
from grm_jax.spct.sample import Sample

RIGHT, WRONG, TIE, UNPARSED = (8, 3), (3, 8), (5, 5), None


def rows(id: str, *scores: tuple[int, ...] | None, hinted: bool = False) -> list[Sample]:
    """Judgments of a pair whose first response is the best."""
    return [
        Sample(
            id, "here", (Message("user", "q"),), ("good", "bad"), (1.0, 0.0), None, None, (0, 1), f"{found}", found,
            None if found else "no box", found == RIGHT, hinted, j, 9, True, "listwise",
        )
        for j, found in enumerate(scores)
    ]  # fmt: skip


EASY = rows("easy", RIGHT, RIGHT, RIGHT)
MIXED = rows("mixed", RIGHT, WRONG, RIGHT)
HARD = rows("hard", WRONG, TIE, UNPARSED)
HINTS = [*rows("easy", RIGHT, hinted=True), *rows("mixed", TIE, hinted=True), *rows("hard", RIGHT, hinted=True)]


def test_samples_of_an_item_stay_together_in_their_order():
    shuffled = [MIXED[1], EASY[0], MIXED[0], EASY[2]]
    assert by_item(shuffled) == {"mixed": [MIXED[1], MIXED[0]], "easy": [EASY[0], EASY[2]]}


def test_wrong_ones_ties_and_unparsed_ones_are_rejected():
    assert reject_wrong(MIXED + HARD) == [MIXED[0], MIXED[2]]


def test_an_item_right_k_of_k_times_is_too_easy():
    assert too_easy_ids(EASY + MIXED + HARD) == {"easy"}
    assert reject_easy(EASY + MIXED + HARD) == MIXED + HARD
    assert too_easy_ids(rows("once", RIGHT)) == {"once"}
    assert too_easy_ids([]) == set()


def test_hinted_samples_neither_make_an_item_too_easy_nor_save_it_from_it():
    assert too_easy_ids(rows("told", RIGHT, RIGHT, hinted=True)) == set()
    assert too_easy_ids(EASY + rows("easy", WRONG, hinted=True)) == {"easy"}
    assert too_easy_ids(MIXED + rows("mixed", RIGHT, hinted=True)) == set()


def test_trajectories_and_what_was_rejected_for_which_reason():
    kept, rejected = trajectories(EASY + MIXED + HARD, HINTS)
    assert kept == [MIXED[0], MIXED[2], HINTS[0], HINTS[2]]  # a hinted one is rejected only when wrong
    assert rejected == Counter({"too easy": 3, "wrong": 2, "tie": 2, "unparsed": 1})
    assert len(kept) + rejected.total() == len(EASY + MIXED + HARD + HINTS)


def test_samples_in_the_wrong_place_are_named():
    with pytest.raises(ValueError, match="sample 0 of 'easy' was made with a hint"):
        trajectories(MIXED + HINTS)
    with pytest.raises(ValueError, match="sample 1 of 'mixed' was made without a hint"):
        trajectories(EASY, [MIXED[1]])
    with pytest.raises(ValueError, match="sample 0 of 'easy' occurs 2 times"):
        trajectories(EASY + MIXED + EASY[:1])


def test_the_meta_rms_data_is_every_unhinted_sample_right_and_wrong():
    assert labelled(MIXED + HINTS) == [(MIXED[0], True), (MIXED[1], False), (MIXED[2], True)]
