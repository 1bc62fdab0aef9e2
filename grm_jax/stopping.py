"""When an example has been judged often enough: how likely further votes change its winner.

1. A judgment adds to the leader's margin over each rival the difference of their two scores.
2. A margin that no number of the remaining judgments can make up is settled: risk 0.
3. Else the risk is the probability that the differences to come take the margin away (a tie counts as taken), under
   the worse of two models, each with a weak conjugate prior. By size: differences are draws from a normal distribution
   of unknown mean and variance, and the sum of those to come has a Student distribution. By sign: they are all of one
   size, for or against the leader with an unknown share, and the number of those against has a beta-binomial
   distribution; four judgments that agree to the point look certain by size, and are not.
4. Rivals' risks are added up, a bound on their union.

This module's own, not the paper's, which draws all k. The priors: one imagined difference of 0, whose standard deviation
is a quarter of the scores' range; and two imagined judgments for each side.
Sources: Gelman et al., Bayesian Data Analysis, 3rd ed., sections 3.3 (Student) and 5.3 (beta-binomial).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import special

_FIRST, _PARTS = 4, 16
PRIOR_COUNT = 1.0  # imagined differences
PRIOR_SIDE = 2.0  # imagined judgments for the leader, and against


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
    if sum(differences) > left * reach:
        return 0.0
    return max(_by_size(differences, left, reach), _by_sign(differences, left))


def _by_size(differences: Sequence[int], left: int, reach: int) -> float:
    margin, count = sum(differences), len(differences)
    mean = margin / count
    spread = sum((d - mean) ** 2 for d in differences)
    # Normal-inverse-gamma: prior mean 0 with weight PRIOR_COUNT, two degrees of freedom for the variance.
    weight, freedom = PRIOR_COUNT + count, 2.0 + count
    squares = 2 * (reach / 4) ** 2 + spread + PRIOR_COUNT * count / weight * mean**2
    expected = left * margin / weight
    scale = math.sqrt(squares / freedom * left * (1 + left / weight))
    return float(special.stdtr(freedom, -(margin + expected) / scale))


def _by_sign(differences: Sequence[int], left: int) -> float:
    """Of differences whose sum is above 0, so that there are some."""
    told = [d for d in differences if d]
    ahead = sum(differences) * len(told) / sum(map(abs, told))  # in judgments of the mean size
    split = PRIOR_SIDE + (len(differences) - len(told)) / 2
    against, favour = split + sum(d < 0 for d in told), split + sum(d > 0 for d in told)
    least = math.ceil((left + ahead) / 2 - 1e-9)  # of those to come have to be against the leader
    ways = np.arange(least, left + 1)
    chosen = special.gammaln(left + 1) - special.gammaln(ways + 1) - special.gammaln(left - ways + 1)
    told_so = special.betaln(ways + against, left - ways + favour) - special.betaln(against, favour)
    return float(np.exp(chosen + told_so).sum())


def rounds(votes: int) -> list[range]:
    """Sample numbers 0..votes - 1 in rounds: four, as fewer tell little, then a sixteenth of all, at least two."""
    ends = [0]
    while ends[-1] < votes:
        ends.append(min(ends[-1] + max(2, votes // _PARTS) if ends[-1] else _FIRST, votes))
    return [range(start, end) for start, end in itertools.pairwise(ends)]
