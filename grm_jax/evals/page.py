"""`report.html`: one file without links, with the curves as pictures and the cases to look through.

1. What became of a case (`right`, `wrong`, ...) is what the benchmark's metric gives it alone, after all judgments.
2. Texts of cases go into the page as JSON and onto it as text nodes: nothing in a response can become markup.
3. Cases that would make the page larger than LARGEST stay in judgments.jsonl, wrong ones are kept first.

Letters as in `table`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from grm_jax.data.benchmarks import KINDS, Case, Scored
from grm_jax.data.benchmarks.cases import Metric
from grm_jax.evals import report as reports
from grm_jax.evals import table as tables
from grm_jax.evals.table import Table
from grm_jax.spct.sample import Sample

LARGEST = 20_000_000  # characters of cases, as they are written
_COLORS = ("#2f6fde", "#d1661b", "#1a8f63", "#8a4fc9")
_KINDS = ("wrong", "failed", "tied", "partly", "right")
# The headings of a judgment, as the templates ask for them (spct section 2) and as judges vary them: a number, a mark of
# a list or of Markdown before them, "of ..." behind them; then a colon, or nothing more in the line.
_HEADING = re.compile(
    r"^[ \t]*(?:#+[ \t]*)?(?:(?:[-*+]|\d{1,2}[.)])[ \t]+)?[*_]*(?:the[ \t]+)?"
    r"(?:(?P<Principles>(?:(?:specific|evaluation|general)[ \t]+)?(?:criteria|principles))"
    r"|(?P<Critique>analys[ie]s|critiques?)"
    r"|(?P<Scores>(?:(?:final|overall)[ \t]+)?scores|score(?=[*_ \t]*:[*_ \t]*\\boxed)|best[ \t]+response))"
    r"(?:[ \t]+(?:of|for|and)[ \t][^\n:]{1,60}:|[*_# \t\r]*(?::|$))",
    re.IGNORECASE | re.MULTILINE,
)
_ESCAPED = re.compile("[<\u2028\u2029\ud800-\udfff]")  # markup, ends of lines to JavaScript, what UTF-8 has not


def html(report: Mapping[str, Any], table: Table, samples: Sequence[Sample], greedy: Sequence[Sample] = ()) -> str:
    """The page of a report and the judgments that it was made from, those at temperature 0 behind the others."""
    k_meta = report["protocol"].get("k_meta")
    cases, left = _cases(table, report["benchmark"], samples, greedy, k_meta)
    data = {
        "title": report["benchmark"],
        "protocol": reports.protocol_line(report["protocol"]),
        "counts": reports.counts(report),
        "dropped": reports.dropped(report),
        "warning": reports.warning(report),
        "tables": [{"title": title, "rows": rows} for title, rows in reports.tables(report).items()],
        "left": left,
    }
    text = f'{_json(data)[:-1]}, "cases": [{", ".join(cases)}]}}'
    page = (Path(__file__).parent / "page.html").read_text()
    before, rest = page.split("@CHARTS@")
    middle, behind = rest.split("@DATA@")
    return "".join([before, *_charts(report), middle, text, behind])


def _json(value: Any) -> str:
    """JSON that can stand in a page."""
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def _cases(
    table: Table, benchmark: str, samples: Sequence[Sample], greedy: Sequence[Sample] = (), k_meta: int | None = None
) -> tuple[list[str], int]:
    """The cases of the page, each as the JSON that is written, in their order, and how many did not fit."""
    by_order = KINDS[benchmark].least > 1
    plain, kept = tables.votes(table)["voting"], tables.kept(table, k_meta, by_order)
    orders = tables.by_order(table)["voting"] if by_order else ()
    scored = tables.scored(table, plain, table.valid.shape[1], orders)
    worths = [_worth(KINDS[benchmark].metric, case, one) for case, one in zip(table.cases, scored, strict=True)]
    kinds = [_kind(case.example.scores, worth) for case, worth in zip(table.cases, worths, strict=True)]
    of_id, once_of_id = _by_id(samples), _by_id(greedy)
    fitting: dict[int, str] = {}
    size = 0
    for e in sorted(range(len(kinds)), key=lambda e: _KINDS.index(kinds[e])):
        case, n = table.cases[e], int(table.counts[e])
        sums = plain.sums[e, -1, :n].tolist() if plain.valid[e, -1] else [math.nan] * n
        judged = [
            _judgment(sample, None if kept is None else bool(kept[e, k]))
            for k, sample in enumerate(of_id[case.example.id])
        ]
        once = [_judgment(sample, None) for sample in once_of_id.get(case.example.id, ())]
        told = {"kind": kinds[e], "sums": _finite(sums), "orders": [one and _finite(one) for one in scored[e].first]}
        share = worths[e] if kinds[e] == "partly" else None
        text = _json(told | _texts(case, share) | {"judgments": judged, "greedy": once})
        size += len(text) + len(", ")
        if size > LARGEST:
            break
        fitting[e] = text
    return [fitting[e] for e in sorted(fitting)], len(kinds) - len(fitting)


def _by_id(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.id, []).append(sample)
    return found


def _finite(sums: Sequence[float]) -> list[float | None]:
    """The same with None for what JSON lacks."""
    return [total if math.isfinite(total) else None for total in sums]


def _texts(case: Case, share: float | None) -> dict[str, Any]:
    example = case.example
    told = "" if share is None else f"{100 * share:.0f} % of its pairs; "
    return {
        "head": f"{told}{case.subset}: {' '.join(example.messages[-1].content.split())[:160]}",
        "query": "\n\n".join(f"{message.role}: {message.content}" for message in example.messages),
        "responses": list(example.responses),
        "labels": list(example.scores),
    }


def _worth(metric: Metric, case: Case, scored: Scored) -> float | None:
    """What a metric gives a case alone, 0 to 1; None where no judgment could be read.

    Where it gives none (an AUC, and RewardBench 2's Ties, whose rows count by twos): whether the worst of the best-labelled
    responses is ahead of every other one, which a single response that has a score is.
    """
    if scored.scores is None:
        return None
    found = metric([case], [scored])["score"]
    if not math.isnan(found):
        return found
    labels = case.example.scores
    pairs = list(zip(scored.scores, labels, strict=True))
    best = [score for score, label in pairs if label == max(labels)]
    return float(min(best) > max((score for score, label in pairs if label != max(labels)), default=-math.inf))


def _kind(labels: Sequence[float], worth: float | None) -> str:
    """What became of a case; between right and wrong it is tied, or, where several responses are the best, partly right."""
    if worth is None:
        return "failed"
    if worth in (0, 1):
        return "right" if worth else "wrong"
    return "tied" if labels.count(max(labels)) == 1 else "partly"


def _judgment(sample: Sample, kept: bool | None) -> dict[str, Any]:
    return {"head": _head(sample, kept), "parts": parts(sample.text)}


def parts(text: str) -> list[tuple[str, str]]:
    """A judgment's parts, (Principles, Critique, Scores or nothing, its text with its heading): together they are the text.

    What stands before the first heading has no name, and so has a text without any.
    """
    found = [(str(match.lastgroup), match.start()) for match in _HEADING.finditer(text)]
    if not found or text[: found[0][1]].strip():
        found.insert(0, ("", 0))
    else:  # white space alone belongs to what follows
        found[0] = found[0][0], 0
    starts = [next(same) for _, same in itertools.groupby(found, key=lambda one: one[0])]
    ends = [start for _, start in starts[1:]] + [len(text)]
    return [(name, text[start:end]) for (name, start), end in zip(starts, ends, strict=True)]


def _head(sample: Sample, kept: bool | None) -> str:
    said = f"scores {', '.join(map(str, sample.scores))}" if sample.scores else f"unread: {sample.reason}"
    if sample.values and sample.scores is None:
        said = f"rewards {', '.join(f'{value:.3g}' for value in sample.values)}"
    order = f"shown in the order {', '.join(str(i + 1) for i in sample.order)}" if len(sample.order) > 1 else ""
    logit = "" if kept is None else f"logit {sample.logit:.2f}, {'kept' if kept else 'left out'}"
    return "; ".join(part for part in (said, "forced" * bool(sample.forced), order, logit) if part)


def _charts(report: Mapping[str, Any]) -> list[str]:
    """The total against judgments, and against tokens, each vote a line with its intervals."""
    lines: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, curve in report["curves"].items():
        bounds = report["intervals_of_curves"][name]
        totals = {k: numbers["score"] for k, numbers in curve.items() if numbers.get("score") is not None}
        if totals:
            lines[name] = {k: (total, *(bounds.get(k) or (total, total))) for k, total in totals.items()}
    if not lines:
        return []
    spent = report["tokens_after"]
    by_votes = {name: [(int(k), *point) for k, point in points.items()] for name, points in lines.items()}
    charts = [_chart("judgments", by_votes)]
    if all(spent.values()):  # a baseline may write nothing
        by_tokens = {
            name: [(spent[k] / report["cases"], *point) for k, point in points.items()]
            for name, points in lines.items()
        }
        charts.append(_chart("tokens of a case", by_tokens))
    return charts


def _chart(what: str, lines: Mapping[str, Sequence[tuple[float, float, float, float]]]) -> str:
    """A picture of lines over a logarithmic axis, with a legend. Points: (x, y, and the bounds of y)."""
    xs = [x for points in lines.values() for x, *_ in points]
    ys = [y for points in lines.values() for _, *bounds in points for y in bounds]
    low, high = min(ys) - 0.01, max(ys) + 0.01
    left, right = math.log(min(xs)), math.log(max(xs))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - left) / (right - left) if right > left else 0.5
        return 52 + across * 330, 216 - (y - low) / (high - low) * 190

    drawn = [f'<figure><svg viewBox="0 0 400 {256 + 16 * len(lines)}" role="img" aria-label="total against {what}">']
    for y in _round_between(low, high):
        _, at = place(xs[0], y)
        drawn.append(
            f'<line x1="52" x2="382" y1="{at:.1f}" y2="{at:.1f}" stroke="currentColor" stroke-opacity="0.12"/>'
        )
        drawn.append(f'<text x="46" y="{at + 4:.1f}" text-anchor="end">{round(100 * y, 3):g}</text>')
    free = math.inf
    for x in sorted(set(xs), reverse=True):
        at, _ = place(x, low)
        if free - at >= 34:  # the last one stands, those too close to it do not
            drawn.append(f'<text x="{at:.1f}" y="232" text-anchor="middle">{x:.0f}</text>')
            free = at
    drawn.append(f'<text x="217" y="248" text-anchor="middle">{escape(what)} (bars: 95 % intervals)</text>')
    for number, (name, points) in enumerate(lines.items()):
        drawn += _line(name, points, number, len(lines), place)
    return "".join([*drawn, "</svg></figure>"])


def _line(
    name: str, points: Sequence[tuple[float, float, float, float]], number: int, count: int,
    place: Callable[[float, float], tuple[float, float]],
) -> list[str]:  # fmt: skip
    """A line, its dots and intervals, and its place in the legend; number: which of so many it is."""
    color = _COLORS[number % len(_COLORS)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(x, y) for x, y, *_ in points))
    drawn = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>']
    beside = 3 * (number - (count - 1) / 2)  # intervals of several lines stand side by side
    for x, y, *bounds in points:
        (at, bottom), (_, top) = (place(x, bound) for bound in bounds)
        drawn.append(
            f'<path d="M{at + beside:.1f},{bottom:.1f}V{top:.1f}" stroke="{color}" stroke-opacity="0.45" stroke-width="2"/>'
        )
        r = 3 + 1.5 * (count - 1 - number)  # where dots coincide, each has its ring
        drawn.append(f'<circle cx="{at:.1f}" cy="{place(x, y)[1]:.1f}" r="{r}" fill="{color}"/>')
    y = 266 + 16 * number
    drawn.append(f'<rect x="52" y="{y - 9}" width="10" height="10" fill="{color}"/>')
    return [*drawn, f'<text x="68" y="{y}">{escape(name)}, %</text>']


def _round_between(low: float, high: float) -> list[float]:
    """Three to eight multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = max(part * power for part in (1, 2, 5) if part * power <= (high - low) / 3)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
