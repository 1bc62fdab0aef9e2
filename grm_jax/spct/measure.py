"""Accuracy on held-out examples: what a run reports before, between and after its steps.

1. Each example is judged `votes` times, without forced scores, and voted: what the run's weights do by themselves.
2. A tie at the top is worth its expectation (spct section 1); a verdict without a judgment that parses is worth nothing,
   as in `eval`, and is counted.
3. Beside it stands what "pick the longer response" scores on the same rows, and a bootstrap interval over conversations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from grm_jax.data.benchmarks.cases import query_of
from grm_jax.datatypes import Example, Verdict

RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Measured:
    """Shares in 0..1; `low` to `high` is the 95 % bootstrap interval of `accuracy`, conversations drawn anew."""

    accuracy: float
    low: float
    high: float
    examples: int
    ties: float  # of the examples
    failures: float  # of the judgments: no valid box
    unread: float  # of the examples: no judgment with one
    longer: float  # what "pick the longest response" scores

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.1%} ({self.low:.1%} to {self.high:.1%}) on {self.examples} held-out examples, "
            f"ties {self.ties:.1%}, parse failures {self.failures:.1%} (no verdict: {self.unread:.1%}); "
            f"the longer response: {self.longer:.1%}"
        )


def measured(examples: Sequence[Example], found: Iterable[Verdict], seed: int) -> Measured:
    """Verdicts on all of the examples, in any order, held against their labels."""
    verdicts = {verdict.id: verdict for verdict in found}
    worth = np.array([worth_of(example, verdicts[example.id]) for example in examples])
    low, high = interval(worth, [query_of(example.messages) for example in examples], seed)
    judgments = sum(verdict.votes for verdict in verdicts.values())
    longest = [longest_of(example) for example in examples]
    return Measured(
        accuracy=float(worth.mean()),
        low=low,
        high=high,
        examples=len(examples),
        ties=float(np.mean([verdict.tie and verdict.valid > 0 for verdict in verdicts.values()])),
        failures=1 - sum(verdict.valid for verdict in verdicts.values()) / judgments,
        unread=float(np.mean([verdict.valid == 0 for verdict in verdicts.values()])),
        longer=float(np.mean(longest)),
    )


def worth_of(example: Example, verdict: Verdict) -> float:
    """1 for a right verdict, 0 for a wrong one or none, 1 / (number of the best) at a tie that holds the right one.

    A single response is right when its label is the whole number nearest to its mean score (n = 1 of Eq. 10, over
    votes); half right when two are as near.
    """
    labels = example.scores
    if not verdict.valid:
        return 0.0
    if len(labels) == 1:
        far = abs(verdict.scores[0] / verdict.valid - labels[0])
        return 0.5 if far == 0.5 else float(far < 0.5)
    top = [i for i, score in enumerate(verdict.scores) if score == max(verdict.scores)]
    return (labels.index(max(labels)) in top) / len(top)


def longest_of(example: Example) -> float:
    """What picking the longest response scores; a single response's is 1 by convention of the label's base rate."""
    if len(example.responses) == 1:
        return float(example.scores[0] == 1)
    lengths = [len(response) for response in example.responses]
    top = [i for i, length in enumerate(lengths) if length == max(lengths)]
    return (example.scores.index(max(example.scores)) in top) / len(top)


def interval(worth: np.ndarray, groups: Sequence[str], seed: int) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of the mean: groups are drawn anew, each with all of its examples."""
    _, of = np.unique(list(groups), return_inverse=True)
    sums, sizes = np.bincount(of, worth), np.bincount(of)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
