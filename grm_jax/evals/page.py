"""`report.html`: one file without links, with the curves as pictures and the cases to look through.

Texts of cases go into the page as JSON and onto it as text nodes: nothing in a response can become markup. Cases that
would make the page larger than LARGEST stay in judgments.jsonl, wrong ones are kept first.

Letters as in `table`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from grm_jax.data.benchmarks import KINDS
from grm_jax.evals import report as reports
from grm_jax.evals import table as tables
from grm_jax.evals.table import Table
from grm_jax.spct.sample import Sample

LARGEST = 20_000_000  # characters of cases
_COLORS = ("#2f6fde", "#d1661b", "#1a8f63", "#8a4fc9")
_KINDS = ("wrong", "failed", "tied", "right")


def html(report: Mapping[str, Any], table: Table, samples: Sequence[Sample]) -> str:
    """The page of a report and the judgments that it was made from."""
    by_order = KINDS[report["benchmark"]].least > 1
    cases, left = _cases(table, samples, report["protocol"].get("k_meta"), by_order)
    protocol = report["protocol"]
    data = {
        "title": report["benchmark"],
        "protocol": reports.protocol_line(protocol),
        "counts": reports.counts(report),
        "warning": reports.warning(report),
        "tables": [{"title": title, "rows": rows} for title, rows in reports.tables(report).items()],
        "cases": cases,
        "left": left,
    }
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    page = (Path(__file__).parent / "page.html").read_text()
    before, rest = page.split("@CHARTS@")
    middle, behind = rest.split("@DATA@")
    return "".join([before, *_charts(report), middle, text, behind])


def _cases(
    table: Table, samples: Sequence[Sample], k_meta: int | None = None, by_order: bool = False
) -> tuple[list[dict[str, Any]], int]:
    """The cases for the page, in their order, and how many did not fit."""
    plain, kept = tables.votes(table)["voting"], tables.kept(table, k_meta, by_order)
    of_id: dict[str, list[Sample]] = {}
    for sample in samples:
        of_id.setdefault(sample.id, []).append(sample)
    rows = []
    for e, case in enumerate(table.cases):
        n, valid = int(table.counts[e]), int(plain.valid[e, -1])
        sums = plain.sums[e, -1, :n].tolist()
        of_case = of_id[case.example.id]
        judged = [(sample, None if kept is None else bool(kept[e, k])) for k, sample in enumerate(of_case)]
        rows.append((e, _case(case.example, case.subset, sums if valid else None, judged)))
    fitting, size = set(), 0
    for e, row in sorted(rows, key=lambda row: _KINDS.index(row[1]["kind"])):
        size += len(json.dumps(row, ensure_ascii=False))
        if size <= LARGEST:
            fitting.add(e)
    return [row for e, row in rows if e in fitting], len(rows) - len(fitting)


def _case(
    example: Any, subset: str, sums: list[float] | None, judged: Sequence[tuple[Sample, bool | None]]
) -> dict[str, Any]:
    query = "\n\n".join(f"{message.role}: {message.content}" for message in example.messages)
    return {
        "kind": _kind(example.scores, sums),
        "head": f"{subset}: {' '.join(example.messages[-1].content.split())[:160]}",
        "query": query,
        "responses": list(example.responses),
        "labels": list(example.scores),
        "sums": sums or [None] * len(example.responses),
        "words": " ".join([query, *example.responses]).lower(),
        "judgments": [{"head": _head(sample, kept), "text": sample.text} for sample, kept in judged],
    }


def _kind(labels: Sequence[float], sums: list[float] | None) -> str:
    """What became of a case: a single response counts as right when it is scored at all."""
    if sums is None:
        return "failed"
    top = [label for label, total in zip(labels, sums, strict=True) if total == max(sums)]
    if len(labels) == 1 or all(label == max(labels) for label in top):
        return "right"
    return "tied" if any(label == max(labels) for label in top) else "wrong"


def _head(sample: Sample, kept: bool | None) -> str:
    said = f"scores {', '.join(map(str, sample.scores))}" if sample.scores else f"unread: {sample.reason}"
    if sample.values and sample.scores is None:
        said = f"rewards {', '.join(f'{value:.3g}' for value in sample.values)}"
    order = f"shown in the order {', '.join(str(i + 1) for i in sample.order)}" if len(sample.order) > 1 else ""
    logit = "" if kept is None else f"logit {sample.logit:.2f}, {'kept' if kept else 'left out'}"
    return "; ".join(part for part in (said, "forced" * bool(sample.forced), order, logit) if part)


def _charts(report: Mapping[str, Any]) -> list[str]:
    """The total against judgments, and against tokens, each vote a line."""
    lines = {
        name: [(k, numbers["score"]) for k, numbers in curve.items() if numbers.get("score") is not None]
        for name, curve in report["curves"].items()
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return []
    spent = report["tokens_after"]
    by_votes = {name: [(int(k), value) for k, value in points] for name, points in lines.items()}
    charts = [_chart("judgments", by_votes)]
    if all(spent.values()):  # a baseline may write nothing
        by_tokens = {
            name: [(spent[k] / report["cases"], value) for k, value in points] for name, points in lines.items()
        }
        charts.append(_chart("tokens of a case", by_tokens))
    return charts


def _chart(what: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A picture of lines over a logarithmic axis, with a legend."""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    low, high = min(ys) - 0.01, max(ys) + 0.01
    left, right = math.log(min(xs)), math.log(max(xs))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - left) / (right - left) if right > left else 0.5
        return 52 + across * 330, 216 - (y - low) / (high - low) * 190

    parts = [f'<figure><svg viewBox="0 0 400 {256 + 16 * len(lines)}" role="img" aria-label="total against {what}">']
    for y in _round_between(low, high):
        _, at = place(xs[0], y)
        parts.append(
            f'<line x1="52" x2="382" y1="{at:.1f}" y2="{at:.1f}" stroke="currentColor" stroke-opacity="0.12"/>'
        )
        parts.append(f'<text x="46" y="{at + 4:.1f}" text-anchor="end">{round(100 * y, 3):g}</text>')
    for x in sorted(set(xs)):
        at, _ = place(x, low)
        parts.append(f'<text x="{at:.1f}" y="232" text-anchor="middle">{x:.0f}</text>')
    parts.append(f'<text x="217" y="248" text-anchor="middle">{escape(what)}</text>')
    for number, (name, points) in enumerate(lines.items()):
        color = _COLORS[number % len(_COLORS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in (place(*p) for p in points)]
        y = 266 + 16 * number
        parts.append(f'<rect x="52" y="{y - 9}" width="10" height="10" fill="{color}"/>')
        parts.append(f'<text x="68" y="{y}">{escape(name)}, %</text>')
    return "".join([*parts, "</svg></figure>"])


def _round_between(low: float, high: float) -> list[float]:
    """Three to eight multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = max(part * power for part in (1, 2, 5) if part * power <= (high - low) / 3)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
