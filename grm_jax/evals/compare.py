"""`compare`: reports of one benchmark side by side, each against the first by a paired bootstrap.

Only cases that all of them judged are compared, and a case has to be the same in all: its texts, labels and subset.
Queries are drawn anew, the same ones for both sides of a difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from grm_jax.config import CompareConfig
from grm_jax.data.benchmarks import KINDS, Benchmark, Case, Scored
from grm_jax.data.benchmarks.cases import Metric
from grm_jax.data.benchmarks.metrics import lacking
from grm_jax.evals import report
from grm_jax.evals import table as tables
from grm_jax.evals.measure import RESAMPLES
from grm_jax.evals.run import protocol_of, rows_of

Side = Mapping[str, tuple[Case, Scored]]  # by the case's id


def run(config: CompareConfig) -> None:
    """Print the comparison. Raises DataError and ValueError for folders that are no reports of one benchmark."""
    names = {folder: protocol_of(folder)["benchmark"] for folder in config.folders}
    if len(set(names.values())) > 1:
        told = ", ".join(f"{folder} is {name}" for folder, name in names.items())
        raise ValueError(f"reports of several benchmarks: {told}; compare those of one")
    name = names[config.folders[0]]
    sides = [side_of(folder, config.vote) for folder in config.folders]
    shared = [id for id in sides[0] if all(id in side for side in sides)]
    if not shared:
        raise ValueError(f"no case is in all of {', '.join(config.folders)}: judge the same benchmark's cases")
    check_same(config.folders, sides, shared)
    cases = [sides[0][id][0] for id in shared]
    benchmark = Benchmark(name, cases, KINDS[name], protocol_of(config.folders[0])["dropped"])
    console = Console()
    most = max(map(len, sides))
    console.print(f"{len(shared)} cases that all judged, of up to {most}; vote: {config.vote}")
    if not benchmark.complete():
        console.print("not the official rows: no score of the benchmark")
    console.print(grid(config.folders, benchmark, [[side[id] for id in shared] for side in sides], config.seed))


def check_same(folders: Sequence[str], sides: Sequence[Side], shared: Sequence[str]) -> None:
    """Raise ValueError where cases of one id differ: they would be compared under labels that are not theirs."""
    for id in shared:
        one = sides[0][id][0]
        for folder, side in zip(folders[1:], sides[1:], strict=True):
            other = side[id][0]
            parts = {
                "conversation": (one.example.messages, other.example.messages),
                "responses": (one.example.responses, other.example.responses),
                "labels": (one.example.scores, other.example.scores),
                "subset": (one.subset, other.subset),
            }
            if differing := [part for part, (a, b) in parts.items() if a != b]:
                raise ValueError(
                    f"case {id!r} has another {' and '.join(differing)} in {folder} than in {folders[0]}: "
                    "compare reports of the same files"
                )


def side_of(folder: str, vote: str) -> Side:
    """What a report's folder says of each case after all of its judgments. Raises ValueError for a vote that it lacks."""
    rows = rows_of(folder)
    cases = tables.cases_of(rows)
    table = tables.table_of(cases, rows)
    k_meta = protocol_of(folder)["k_meta"]
    ways = tables.votes(table, k_meta)
    if vote not in ways:
        raise ValueError(f"{folder} has no vote {vote!r}: it has {', '.join(ways)}")
    judged = tables.scored(table, ways[vote], table.valid.shape[1], tables.by_order(table, k_meta)[vote])
    return {case.example.id: (case, scored) for case, scored in zip(cases, judged, strict=True)}


def differences(
    metric: Metric, one: Sequence[tuple[Case, Scored]], other: Sequence[tuple[Case, Scored]], seed: int,
    resamples: int = RESAMPLES,
) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    """(Difference, and its 95 % paired-bootstrap interval) of each of the metric's numbers, `other` less `one`.

    Both hold the same cases in one order; queries are drawn anew with all their cases, for both alike.
    """
    groups: dict[str, list[int]] = {}
    for i, (case, _) in enumerate(one):
        groups.setdefault(case.group, []).append(i)
    members, rng = list(groups.values()), np.random.default_rng(seed)

    def gain(chosen: Sequence[int]) -> tuple[dict[str, float], dict[str, list[str]]]:
        cases = [one[i][0] for i in chosen]
        found = [metric(cases, [side[i][1] for i in chosen]) for side in (one, other)]
        return {name: found[1][name] - value for name, value in found[0].items()}, lacking(metric, found[0])

    whole, due = gain(range(len(one)))
    drawn: dict[str, list[float]] = {}
    for _ in range(resamples):
        found, lacks = gain([i for g in rng.integers(0, len(members), len(members)) for i in members[g]])
        for name, value in found.items():
            if not math.isnan(value) and lacks.get(name) == due.get(name):
                drawn.setdefault(name, []).append(value)
    return {
        name: (value, *(float(np.quantile(drawn[name], share)) for share in (0.025, 0.975)))
        for name, value in whole.items()
        if name in drawn
    }


def grid(
    folders: Sequence[str], benchmark: Benchmark, sides: Sequence[Sequence[tuple[Case, Scored]]], seed: int
) -> Grid:
    """A row a number: its value in the first report, and in each other one with the difference and its interval."""
    metric, complete = benchmark.kind.metric, benchmark.complete()
    found = [metric([case for case, _ in side], [scored for _, scored in side]) for side in sides]
    gains = [differences(metric, sides[0], side, seed) for side in sides[1:]]
    lacks = lacking(metric, found[0])
    result = Grid("", *map(escape, folders))
    for name, value in found[0].items():
        cells = [_percent(value)]
        for numbers, gain in zip(found[1:], gains, strict=True):
            mean, low, high = (100 * part for part in gain.get(name, (0.0, 0.0, 0.0)))
            told = f" ({mean:+.1f}, {low:+.1f} to {high:+.1f})" if name in gain else ""
            cells.append(_percent(numbers[name]) + told)
        result.add_row(escape(report.named(benchmark.name, name, complete, lacks)), *cells)
    return result


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"
