"""From a table of judgments to the numbers of a report.

1. Each way to vote has the benchmark's metric at k' = 1, 2, 4, ..., K, and at K a 95 % bootstrap interval of every number,
   resampled by query; before it one of the total, of a fifth as many draws.
2. Beside them: what picking the longer response and drawing lots score, unread judgments, position bias, agreement of
   orders, the histogram of scores, calibration of the vote's share, tokens, seconds.

Letters as in `table`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grm_jax.data.benchmarks import Benchmark, Case, Scored
from grm_jax.data.benchmarks.cases import Metric
from grm_jax.data.benchmarks.metrics import lacking
from grm_jax.evals import table as tables
from grm_jax.evals.table import Table, Votes

RESAMPLES = 1000
BINS = 10
LOTS = 100  # draws that the baseline is the mean of


def numbers(benchmark: Benchmark, table: Table, k_meta: int | None, seed: int) -> dict[str, Any]:
    """Everything of a report that the judgments say: what JSON can hold, numbers that do not exist being None.

    What rewards have not is left out, and `left_out` says what. Raises ValueError for fewer judgments of a case than the
    benchmark's metric needs.
    """
    least = tables.least(table, benchmark.kind)
    if table.valid.shape[1] < least:
        raise ValueError(
            f"{table.valid.shape[1]} judgments of each case: {benchmark.name} compares both orders, it needs "
            f"{least} at least, give --votes {least} or more"
        )
    ways, orders = tables.votes(table, k_meta), tables.by_order(table, k_meta)
    most = table.valid.shape[1]
    curves: dict[str, dict[str, dict[str, float]]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    totals: dict[str, dict[str, tuple[float, float] | None]] = {}
    metric = benchmark.kind.metric
    for name, way in ways.items():
        curves[name], totals[name] = {}, {}
        for k in tables.points(most):
            if k >= least:
                judged = tables.scored(table, way, k, orders[name])
                curves[name][str(k)] = metric(table.cases, judged)
                draws = RESAMPLES if k == most else -(-RESAMPLES // 5)
                found = interval(metric, table.cases, judged, seed, draws)
                totals[name][str(k)] = found.get("score")
        intervals[name] = found
    plain = ways["voting"]
    return _plain(
        {
            "curves": curves,
            "intervals": intervals,
            "intervals_of_curves": totals,
            "baselines": baselines(metric, table.cases, seed),
            "unread_judgments": float(1 - table.valid.mean()),
            "unread_cases": float((~table.valid.any(axis=1)).mean()),
            "ties": _ties(table, plain),
            **(_of_rewards(table, plain) if table.rewards else _of_scores(table, plain)),
            "tokens_of_judgment": float(table.tokens.mean()),
            "tokens_after": {str(k): int(table.tokens[:, :k].sum()) for k in tables.points(most)},
            "seconds_of_verdict": math.nan if table.seconds is None else float(table.seconds.sum(axis=1).mean()),
        }
    )


def _of_scores(table: Table, plain: Votes) -> dict[str, Any]:
    return {
        "position_bias": position_bias(table),
        "order_agreement": order_agreement(table),
        "histogram": histogram(table),
        "calibration": calibration(table, plain),
    }


def _of_rewards(table: Table, plain: Votes) -> dict[str, Any]:
    """Rewards are no scores of 1 to 10 and know no order; of one vote the winner's share is always 1."""
    several = table.valid.shape[1] > 1
    return {
        "position_bias": math.nan,
        "order_agreement": math.nan,
        "histogram": {},
        "calibration": calibration(table, plain) if several else {"table": [], "gap": math.nan},
        "left_out": ["scores given", "position bias", "agreement of orders", *["the vote's share"] * (not several)],
    }


def greedy(benchmark: Benchmark, table: Table, seed: int) -> dict[str, Any]:
    """The metric of judgments at temperature 0, as few as it needs, with its intervals."""
    least = tables.least(table, benchmark.kind)
    judged = tables.scored(table, tables.votes(table)["voting"], least, tables.by_order(table)["voting"])
    return _plain(
        {
            "numbers": benchmark.kind.metric(table.cases, judged),
            "intervals": interval(benchmark.kind.metric, table.cases, judged, seed),
            "unread_judgments": float(1 - table.valid.mean()),
        }
    )


def baselines(metric: Metric, cases: Sequence[Case], seed: int, draws: int = LOTS) -> dict[str, dict[str, float]]:
    """What picking the longer response gives, and what drawing lots gives in the mean of so many draws."""
    rng = np.random.default_rng(seed)
    drawn = [metric(cases, tables.lots(cases, rng)) for _ in range(draws)]
    return {
        "longer": metric(cases, tables.longer(cases)),
        "random": {name: float(np.mean([found[name] for found in drawn])) for name in drawn[0]},
    }


def interval(
    metric: Metric, cases: Sequence[Case], judged: Sequence[Scored], seed: int, resamples: int = RESAMPLES
) -> dict[str, tuple[float, float]]:
    """The 95 % percentile-bootstrap interval of each of a metric's numbers: queries are drawn anew, with all their cases.

    A number that a draw does not have, such as one of a subset that is not in it, is left out of that draw; so is the mean
    of several where the draw lacks one of them that the cases have.
    """
    due = lacking(metric, metric(cases, judged))
    groups: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        groups.setdefault(case.group, []).append(i)
    members, rng = list(groups.values()), np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(resamples):
        chosen = [i for g in rng.integers(0, len(members), len(members)) for i in members[g]]
        found = metric([cases[i] for i in chosen], [judged[i] for i in chosen])
        lacks = lacking(metric, found)
        for name, value in found.items():
            if not math.isnan(value) and lacks.get(name) == due.get(name):
                drawn.setdefault(name, []).append(value)
    return {
        name: (float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))) for name, values in drawn.items()
    }


def _winners(scores: np.ndarray, count: int) -> np.ndarray:
    """Which responses have the highest score, [N] of bool."""
    return scores[:count] == scores[:count].max()


def _ties(table: Table, plain: Votes) -> float:
    """The share of the cases with two responses and more whose highest sum is shared."""
    shared = [
        _winners(plain.sums[e, -1], int(n)).sum() > 1
        for e, n in enumerate(table.counts)
        if n > 1 and plain.valid[e, -1]
    ]
    return float(np.mean(shared)) if shared else math.nan


def position_bias(table: Table) -> float:
    """How often the response shown first wins a judgment, beyond chance: (share - 1 / n) / (1 - 1 / n), ties left out.

    0 where its place does not matter, 1 for a judge that always prefers it; below 0 for one that avoids it.
    """
    wins, chance = [], []
    for e, n in enumerate(table.counts.tolist()):
        for k in range(table.valid.shape[1]):
            top = _winners(table.scores[e, k], n)
            if n > 1 and table.valid[e, k] and top.sum() == 1:
                wins.append(bool(top[table.first[e, k]]))
                chance.append(1 / n)
    if not wins:
        return math.nan
    expected = float(np.mean(chance))
    return (float(np.mean(wins)) - expected) / (1 - expected)


def order_agreement(table: Table) -> float:
    """How often the votes of two orders of a case prefer the same response: the mean over cases, of each over its orders.

    Over cases of two responses and more that were judged in two orders and more; an order whose vote ties is left out. Of
    n responses a judge that draws lots has 1 / n.
    """
    same = []
    for e in np.flatnonzero(table.counts > 1):
        preferred = []
        for order in np.unique(table.order[e]):
            chosen = table.valid[e] & (table.order[e] == order)
            top = _winners(table.scores[e, chosen].sum(axis=0), int(table.counts[e]))
            if chosen.any() and top.sum() == 1:
                preferred.append(int(np.argmax(top)))
        if (many := len(preferred)) > 1:
            equal = np.bincount(preferred)
            same.append(float((equal * (equal - 1)).sum() / (many * (many - 1))))
    return float(np.mean(same)) if same else math.nan


def histogram(table: Table) -> dict[str, int]:
    """How often each score was given."""
    real = table.valid[:, :, None] & (np.arange(table.scores.shape[2])[None, None] < table.counts[:, None, None])
    scores, counts = np.unique(table.scores[real], return_counts=True)
    return {str(score): int(count) for score, count in zip(scores, counts, strict=True)}


def calibration(table: Table, plain: Votes) -> dict[str, Any]:
    """Whether the share of judgments that prefer the vote's winner is how often it is right: a table, and its mean gap.

    Over cases of two responses and more with a single winner; a judgment that ties counts its share.
    """
    told, right = [], []
    for e, n in enumerate(table.counts.tolist()):
        labels = table.cases[e].example.scores
        if n < 2 or not plain.valid[e, -1] or _winners(plain.sums[e, -1], n).sum() > 1:
            continue
        best = int(np.argmax(plain.sums[e, -1, :n]))
        tops = [_winners(table.scores[e, k], n) for k in np.flatnonzero(table.valid[e])]
        told.append(float(np.mean([top[best] / top.sum() for top in tops])))
        right.append(labels[best] == max(labels))
    rows, gap = [], 0.0
    which = np.minimum((np.array(told) * BINS).astype(int), BINS - 1)
    for b in range(BINS):
        inside = np.flatnonzero(which == b)
        if inside.size:
            mean, share = float(np.mean([told[i] for i in inside])), float(np.mean([right[i] for i in inside]))
            rows.append(
                {"from": b / BINS, "to": (b + 1) / BINS, "cases": int(inside.size), "told": mean, "right": share}
            )
            gap += inside.size * abs(mean - share) / len(told)
    return {"table": rows, "gap": gap if rows else math.nan}


def _plain(value: Any) -> Any:
    """The same with None for nan, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
