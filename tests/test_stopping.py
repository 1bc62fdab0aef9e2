"""When to stop voting: what is settled by hand, and a risk that holds on simulated judges."""

import numpy as np
import pytest

from grm_jax.stopping import change_risk, rounds


def test_what_cannot_change_has_no_risk():
    assert change_risk([(9, 1), (8, 2)], left=1, low=1, high=10) == 0.0  # ahead by 14, one judgment makes up 9
    assert change_risk([(9, 1), (8, 2)], left=2, low=1, high=10) > 0.0
    assert change_risk([(5, 5), (6, 5)], left=0, low=1, high=10) == 0.0
    assert change_risk([(7,), (2,)], left=30, low=1, high=10) == 0.0


def test_what_has_no_winner_is_open():
    assert change_risk([], left=4, low=1, high=10) == 1.0
    assert change_risk([(5, 5)], left=4, low=1, high=10) == 1.0
    with pytest.raises(ValueError, match="left = -1"):
        change_risk([(5, 4)], left=-1, low=1, high=10)


def test_the_probability_by_size_by_hand():
    """Differences 1, eight times, and -5; four to come, range 9: a Student distribution of 11 degrees, step by step.

    Mean 1 / 3; squares 2 * 2.25^2 + 32 + 0.9 / 9 = 42.225; expected sum 4 * 3 / 10 = 1.2; scale
    sqrt(42.225 / 11 * 4 * 1.4) = 4.6364; the probability below -4.2 / 4.6364. By sign 360 / 43,680: three of 13 against.
    """
    from scipy import stats

    scores = [(6, 5)] * 8 + [(1, 6)]
    assert change_risk(scores, left=4, low=1, high=10) == pytest.approx(stats.t.cdf(-4.2 / 4.6364, 11), abs=1e-4)


def test_the_probability_by_sign_by_hand():
    """Four that agree, four to come: all would have to be against. 2 of 8 imagined: 2 * 3 * 4 * 5 / (8 * 9 * 10 * 11)."""
    assert change_risk([(7, 3)] * 4, left=4, low=1, high=10) == pytest.approx(120 / 7920)
    assert change_risk([(7, 3)] * 4 + [(5, 5)], left=4, low=1, high=10) == pytest.approx(
        2.5 * 3.5 * 4.5 * 5.5 / (9 * 10 * 11 * 12)
    ), "a tie stands for half of each"


def test_rivals_add_up():
    two = change_risk([(9, 6), (8, 7)], left=6, low=1, high=10)
    assert change_risk([(9, 6, 6), (8, 7, 7)], left=6, low=1, high=10) == pytest.approx(2 * two)


@pytest.mark.parametrize("risk", [0.02, 0.1])
def test_winners_change_no_more_often_than_the_risk(risk):
    """Judges of many qualities and noises, 32 votes: of those stopped, at most `risk` would have changed (2,000 runs)."""
    rng = np.random.default_rng(0)
    changed = stopped = spent = 0
    for _ in range(2000):
        means = rng.normal(5.5, 1.5, 2)
        votes = np.clip(np.rint(rng.normal(means, rng.uniform(0.5, 3), (32, 2))), 1, 10).astype(int)
        last = votes.sum(0)
        for drawn in rounds(32):
            if change_risk(votes[: drawn.stop].tolist(), 32 - drawn.stop, 1, 10) <= risk:
                break
        spent += drawn.stop
        if drawn.stop < 32:
            stopped += 1
            now = votes[: drawn.stop].sum(0)
            changed += (now[0] > now[1]) != (last[0] > last[1]) or last[0] == last[1]
    assert stopped > 1000
    assert changed / stopped <= risk
    assert spent < 2000 * 32 * 0.7


@pytest.mark.parametrize("risk", [0.02, 0.05])
def test_judges_that_are_right_or_wrong_alike_are_not_taken_for_certain(risk):
    """Differences of one size, right with a probability that examples differ in: the first four often agree by chance."""
    rng = np.random.default_rng(1)
    changed = stopped = spent = 0
    for share in rng.beta(2, 2, 2000):
        differences = np.where(rng.random(32) < share, 4, -4)
        votes = [(5 + d // 2, 5 - d // 2) for d in differences.tolist()]
        for drawn in rounds(32):
            if change_risk(votes[: drawn.stop], 32 - drawn.stop, 1, 10) <= risk:
                break
        spent += drawn.stop
        if drawn.stop < 32:
            stopped += 1
            changed += differences[: drawn.stop].sum() * differences.sum() <= 0
    assert stopped > 1000
    assert changed / stopped <= risk
    assert spent < 2000 * 32 * 0.7


@pytest.mark.parametrize("votes", [1, 2, 3, 7, 8, 32, 200])
def test_rounds_are_all_votes_once(votes):
    drawn = rounds(votes)
    assert [j for part in drawn for j in part] == list(range(votes))
    assert all(len(part) <= max(2, votes // 16) for part in drawn[1:])
    assert len(drawn[0]) == min(4, votes)
    assert len(drawn) <= 18
