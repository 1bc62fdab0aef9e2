"""When an example has been judged often enough: how likely further votes change its winner.

1. A judgment adds to the leader's margin over each rival the difference of their two scores.
2. A margin that no number of the remaining judgments can make up is settled: risk 0.
3. Else the differences are taken for draws from a normal distribution of unknown mean and variance, under a weak
   conjugate prior; the sum of those to come then has a Student distribution, and the risk is the probability that it
   takes the margin away (a tie counts as taken). Rivals' risks are added up, a bound on their union.

This module's own, not the paper's, which draws all k. The prior: one imagined difference of 0, whose standard deviation
is a quarter of the scores' range, so that two judgments that happen to agree do not look certain.
Source of the predictive distribution: Gelman et al., Bayesian Data Analysis, 3rd ed., section 3.3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from scipy import special

PRIOR_COUNT = 1.0  # imagined differences


def change_risk(scores: Sequence[Sequence[int]], left: int, low: int, high: int) -> float:
    """A bound on the probability that `left` more judgments change which response has the highest sum.

    scores: of the judgments so far that had any, one number a response, in one order. 1 where nothing leads yet, 0 where
    nothing can change: one response, no judgment left, or margins beyond reach. Raises ValueError for left below 0.
    """
    if left < 0:
        raise ValueError(f"left = {left}: it has to be 0 or more judgments")
    if not left or (scores and len(scores[0]) == 1):
        return 0.0
    if not scores:
        return 1.0
    sums = [sum(column) for column in zip(*scores, strict=True)]
    leader = max(range(len(sums)), key=sums.__getitem__)
    rivals = [i for i in range(len(sums)) if i != leader]
    if any(sums[i] == sums[leader] for i in rivals):
        return 1.0
    risks = (_overtaken([row[leader] - row[i] for row in scores], left, high - low) for i in rivals)
    return min(1.0, sum(risks))


def _overtaken(differences: Sequence[int], left: int, reach: int) -> float:
    """The probability that the sum of `left` more differences takes away the sum of these, which is above 0."""
    margin, count = sum(differences), len(differences)
    if margin > left * reach:
        return 0.0
    mean = margin / count
    spread = sum((d - mean) ** 2 for d in differences)
    # Normal-inverse-gamma: prior mean 0 with weight PRIOR_COUNT, two degrees of freedom for the variance.
    weight, freedom = PRIOR_COUNT + count, 2.0 + count
    squares = 2 * (reach / 4) ** 2 + spread + PRIOR_COUNT * count / weight * mean**2
    expected = left * margin / weight
    scale = math.sqrt(squares / freedom * left * (1 + left / weight))
    return float(special.stdtr(freedom, -(margin + expected) / scale))


def rounds(votes: int) -> list[range]:
    """Sample numbers 0..votes - 1 in rounds: two, then each round as many as there were before."""
    ends = [0]
    while ends[-1] < votes:
        ends.append(min(max(2, 2 * ends[-1]), votes))
    return [range(start, end) for start, end in itertools.pairwise(ends)]
