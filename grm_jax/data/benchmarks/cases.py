"""What a benchmark is made of: cases to judge, and how their scores become its official numbers.

Letters: N responses of a case.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from grm_jax.datatypes import Example, Message


@dataclasses.dataclass(frozen=True)
class Case:
    """One example to judge. `subset` is where it counts; cases of a `group` have one query, and are resampled together."""

    example: Example
    subset: str
    group: str


def query_of(messages: Sequence[Message]) -> str:
    """The group of a case that no file gives another: equal conversations are one query."""
    said = json.dumps([(message.role, message.content) for message in messages])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


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
    a case that it needs, and the number of cases that each subset officially has, or that of all rows, those that are
    dropped too, where that is known.
    """

    metric: Metric
    least: int = 1
    official: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rows: int | None = None


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
        """(Rows here, rows officially) of each subset where they differ; empty where nothing official is known."""
        here, official = Counter(case.subset for case in self.cases), self.kind.official
        subsets = dict.fromkeys([*official, *here]) if official else ()
        found = {name: (here[name], official.get(name, 0)) for name in subsets if here[name] != official.get(name, 0)}
        whole = len(self.cases) + sum(self.dropped.values())
        if self.kind.rows not in (None, whole):
            found["all"] = whole, self.kind.rows
        return found

    def complete(self) -> bool:
        """Whether the rows are known to be the official ones."""
        return bool(self.kind.official or self.kind.rows) and not self.missing()
