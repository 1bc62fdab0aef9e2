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


def test_the_predictive_probability_by_hand():
    """Differences 4 and 2, two to come, range 9: a Student distribution of 4 degrees, worked out step by step.

    Squares 2 * 2.25^2 + 2 + 1 * 2 / 3 * 3^2 = 18.125; expected sum 2 * 6 / 3 = 4; scale
    sqrt(18.125 / 4 * 2 * (1 + 2 / 3)) = 3.8865; the probability below -10 / 3.8865 = -2.573.
    """
    from scipy import stats

    assert change_risk([(6, 2), (5, 3)], left=2, low=1, high=10) == pytest.approx(stats.t.cdf(-2.573, 4), abs=1e-4)


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


@pytest.mark.parametrize("votes", [1, 2, 3, 7, 8, 32])
def test_rounds_are_all_votes_once(votes):
    drawn = rounds(votes)
    assert [j for part in drawn for j in part] == list(range(votes))
    assert all(len(part) <= max(2, part.start) for part in drawn)
