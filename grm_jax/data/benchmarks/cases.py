"""What a benchmark is made of: cases to judge, and how their scores become its official numbers.

Letters: N responses of a case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from grm_jax.datatypes import Example


@dataclasses.dataclass(frozen=True)
class Case:
    """One example to judge. `subset` is where it counts; cases of a `group` have one query, and are resampled together."""

    example: Example
    subset: str
    group: str


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a judge gave a case's responses, higher is better; None where no judgment could be read.

    first[i]: the same, from the judgments alone that showed response i first (pairs only; empty where that is not known).
    """

    scores: tuple[float, ...] | None
    first: tuple[tuple[float, ...] | None, ...] = ()


Metric = Callable[[Sequence[Case], Sequence[Scored]], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is known of a benchmark without its files: the metric (numbers by name, the total as `score`), the judgments of
    a case that it needs, and the number of rows that each subset officially has, where that is known.
    """

    metric: Metric
    least: int = 1
    official: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark's cases. `dropped` counts by reason the rows that are no case.

    Where the rows are not the official ones, the metric's `score` is no score of the benchmark.
    """

    name: str
    cases: list[Case]
    kind: Kind
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def missing(self) -> dict[str, tuple[int, int]]:
        """(Rows here, rows officially) of each subset where they differ; empty where nothing official is known.

        A row is a group: one row may be several cases.
        """
        here: dict[str, set[str]] = {}
        for case in self.cases:
            here.setdefault(case.subset, set()).add(case.group)
        counts = {subset: len(here.get(subset, ())) for subset in self.kind.official}
        return {subset: (counts[subset], rows) for subset, rows in self.kind.official.items() if counts[subset] != rows}
