"""How well logits tell right judgments from wrong ones: AUC, accuracy, and whether their probabilities are true."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

BINS = 10  # of the reliability table, equally wide in probability


@dataclasses.dataclass(frozen=True)
class Bin:
    """Judgments whose probability lies in [low, high): how many, their mean probability, and the share that is right."""

    low: float
    high: float
    count: int
    told: float
    right: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """auc: of a right judgment above a wrong one (nan where there is only one kind); accuracy at probability 1/2; ece: the
    expected calibration error, the mean over judgments of |told - right| of their bin; base: the share that is right.
    """

    auc: float
    accuracy: float
    ece: float
    base: float
    table: tuple[Bin, ...]

    def numbers(self) -> dict[str, float]:
        """The numbers without the table."""
        return {name: getattr(self, name) for name in ("auc", "accuracy", "ece", "base")}

    def __str__(self) -> str:
        rows = [
            f"  {b.low:.1f} to {b.high:.1f}: {b.count} judgments, told {b.told:.3f}, right {b.right:.3f}"
            for b in self.table
            if b.count
        ]
        head = (
            f"AUC {self.auc:.3f}, accuracy {self.accuracy:.1%}, calibration error {self.ece:.3f}, {self.base:.1%} right"
        )
        return "\n".join([head, *rows])


def auc(logits: Float[np.ndarray, "R"], right: Bool[np.ndarray, "R"]) -> float:
    """The probability that a right judgment's logit is above a wrong one's, ties counted as half; nan without either.

    The Mann-Whitney U statistic over its largest value (Hanley and McNeil, 1982).
    """
    positive, negative = int(right.sum()), int((~right).sum())
    if not positive or not negative:
        return float("nan")
    _, inverse, counts = np.unique(logits, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    mean_rank = (ends - counts + 1 + ends) / 2  # of equal values
    ranks = mean_rank[inverse]
    return float((ranks[right].sum() - positive * (positive + 1) / 2) / (positive * negative))


def measure(logits: Float[np.ndarray, "R"], right: Bool[np.ndarray, "R"]) -> Calibration:
    """Logits held against which judgments are right. Raises ValueError for none."""
    if not len(logits):
        raise ValueError("no judgments to measure on: hold some out")
    told = 1 / (1 + np.exp(-logits.astype(np.float64)))
    which = np.minimum((told * BINS).astype(int), BINS - 1)
    table = []
    for b in range(BINS):
        inside = which == b
        mean = (float(told[inside].mean()), float(right[inside].mean())) if inside.any() else (0.0, 0.0)
        table.append(Bin(b / BINS, (b + 1) / BINS, int(inside.sum()), *mean))
    ece = sum(b.count * abs(b.told - b.right) for b in table) / len(logits)
    return Calibration(
        auc(logits, right), float(((logits > 0) == right).mean()), ece, float(right.mean()), tuple(table)
    )
