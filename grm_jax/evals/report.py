"""A report: all numbers as JSON, tables as Markdown, and two lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grm_jax.data.benchmarks import KINDS, Benchmark
from grm_jax.data.benchmarks.metrics import lacking, parts_of


def whole(
    benchmark: Benchmark, protocol: Mapping[str, Any], found: Mapping[str, Any], greedy: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Everything that `report.json` holds.

    `complete`: the rows are the official ones, as far as their number is known; else no `score` in it is the benchmark's.
    `lacking`: of numbers that are a mean of parts, the parts that are not there.
    """
    if found.get("left_out") and not protocol.get("critic"):  # nothing is sampled
        found = {**found, "left_out": ["greedy point", *found["left_out"]]}
    missing = {subset: {"rows": here, "official": rows} for subset, (here, rows) in benchmark.missing().items()}
    lacks = lacking(benchmark.kind.metric, found["baselines"]["longer"])
    return {
        "benchmark": benchmark.name,
        "cases": len(benchmark.cases),
        "queries": len({case.group for case in benchmark.cases}),
        "complete": benchmark.complete(),
        "missing": missing,
        "lacking": {total: parts for total, parts in lacks.items() if parts},
        "dropped": dict(benchmark.dropped),
        "protocol": dict(protocol),
        **found,
        "greedy": greedy,
    }


def protocol_line(protocol: Mapping[str, Any]) -> str:
    """How the judgments came to be, in a line."""
    if protocol.get("baseline"):
        return _baseline_line(protocol)
    templates = ", ".join(f"{name} {sha[:8]}" for name, sha in protocol["template"].items())
    guide = f", meta RM {protocol['meta_rm']}" if protocol["meta_rm"] else ""
    forced = "forced" if protocol["force_scores"] else "not forced"
    orders = f"{protocol['orders']} orders of each case" if protocol.get("orders") else "orders"
    forced += ", and those counted as unread" if protocol.get("drop_forced") else ""
    data = f"; data {protocol['data']}" if protocol.get("data") else ""
    return (
        f"{protocol['votes']} judgments a case at temperature {protocol['temperature']:g}, responses in {orders} drawn by "
        f"seed {protocol['seed']}, scores {forced}, ties by expectation, unread verdicts worth nothing; model "
        f"{protocol['model']} (weights {protocol['weights']}){guide}; templates {templates}{data}"
    )


def _baseline_line(protocol: Mapping[str, Any]) -> str:
    critic = protocol["critic"]
    votes = f"{protocol['votes']} critiques a response at temperature {protocol['temperature']:g} by {critic}, mean"
    templates = "".join(f"; template {name} {sha[:8]}" for name, sha in protocol["template"].items())
    return (
        f"{votes + ' ' if critic else ''}rewards of the baseline {protocol['baseline']}, ties by expectation; seed "
        f"{protocol['seed']}; model {protocol['model']} (weights {protocol['weights']}){templates}"
    )


def left_out(report: Mapping[str, Any]) -> str:
    """What is not in the report, as rewards do not have it; empty where nothing is left out."""
    names = report.get("left_out")
    return f"Left out, as rewards have none: {', '.join(names)}." if names else ""


def summary(report: Mapping[str, Any]) -> str:
    """The totals for the terminal."""
    lines = []
    for name, curve in report["curves"].items():
        points = ", ".join(f"{k}: {_percent(numbers.get('score'))}" for k, numbers in curve.items())
        lines.append(f"{name}: {points}")
    if report["greedy"]:
        lines.append(f"greedy: {_percent(report['greedy']['numbers'].get('score'))}")
    if not report["complete"]:
        lines.append(f"not the official rows: no score of the benchmark{_without(report)}")
    return "\n".join(lines)


def named(benchmark: str, name: str, complete: bool, lacks: Mapping[str, Sequence[str]]) -> str:
    """What a table calls a number: a total of other rows than the official ones is no score; one of few parts says so."""
    called = name if name != "score" or complete else "total (no score of the benchmark)"
    if not lacks.get(name):
        return called
    of = parts_of(KINDS[benchmark].metric, name)
    return f"{called}, {of - len(lacks[name])} of {of} parts"


def _without(report: Mapping[str, Any]) -> str:
    parts = report["lacking"].get("score")
    return f", without {', '.join(parts)}" if parts else ""


def warning(report: Mapping[str, Any]) -> str:
    """Why the totals are no score of the benchmark; empty where they are."""
    if report["complete"]:
        return ""
    said = "; ".join(f"{name} {n['rows']} of {n['official']}" for name, n in report["missing"].items())
    if limit := report["protocol"].get("limit"):
        said = f"limited to {limit} queries" + f"; {said}" * bool(said)
    unknown = "Whether all official rows are here is not known."
    why = f"Rows that differ from the official set: {said}." if said else unknown
    return f"These totals are no score of the benchmark{_without(report)}. {why}"


def tables(report: Mapping[str, Any]) -> dict[str, list[list[Any]]]:
    """The report's tables by title, each with its head as the first row."""
    ks = list(dict.fromkeys(k for curve in report["curves"].values() for k in curve))
    bounds = report["intervals_of_curves"]
    totals = [
        [name, *(_with_interval(curve.get(k, {}).get("score"), bounds[name].get(k)) for k in ks)]
        for name, curve in report["curves"].items()
    ]
    told = [
        [f"{row['from']:.1f} to {row['to']:.1f}", row["cases"], _percent(row["told"]), _percent(row["right"])]
        for row in report["calibration"]["table"]
    ]
    found = {
        f"{'Score' if report['complete'] else 'Total'} after k judgments": [["vote", *ks], *totals],
        "Numbers": _numbers(report),
        "What else was measured": [["", ""], *_rest(report)],
        "Scores given": [["score", "times"], *map(list, report["histogram"].items())],
        "The vote's share and how often it is right": [["share", "cases", "mean", "right"], *told],
    }
    return {title: rows for title, rows in found.items() if not report.get("left_out") or len(rows) > 1}


def counts(report: Mapping[str, Any]) -> str:
    """What was judged, and what is not measured of it."""
    return " ".join(filter(None, [f"{report['cases']} cases of {report['queries']} queries.", left_out(report)]))


def dropped(report: Mapping[str, Any]) -> str:
    """The rows that are no case, by reason; empty where there are none."""
    counts = report["dropped"]
    return f"Dropped: {', '.join(f'{count} {reason}' for reason, count in counts.items())}." if counts else ""


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: totals by vote and k, numbers by subset, baselines, and what else was measured."""
    parts = [f"# {report['benchmark']}", "", protocol_line(report["protocol"]), ""]
    parts += [counts(report), ""]
    if said := dropped(report):
        parts += [said, ""]
    if said := warning(report):
        parts += [f"**{said}**", ""]
    for title, rows in tables(report).items():
        parts += [f"## {title}", "", *_table(*rows), ""]
    return "\n".join(parts)


def _numbers(report: Mapping[str, Any]) -> list[list[Any]]:
    """Each number at the last k of each vote with its interval, beside the greedy point and the baselines."""
    last = {name: curve[list(curve)[-1]] for name, curve in report["curves"].items() if curve}
    greedy = report["greedy"] or {"numbers": {}, "intervals": {}}
    names = dict.fromkeys(name for numbers in (*last.values(), *report["baselines"].values()) for name in numbers)
    rows = [
        [
            named(report["benchmark"], name, report["complete"], report["lacking"]),
            *(_with_interval(numbers.get(name), report["intervals"][way].get(name)) for way, numbers in last.items()),
            _with_interval(greedy["numbers"].get(name), greedy["intervals"].get(name)),
            *(_percent(numbers.get(name)) for numbers in report["baselines"].values()),
        ]
        for name in names
    ]
    return [["", *last, "greedy", "longer response", "drawing lots (mean)"], *rows]


def _rest(report: Mapping[str, Any]) -> list[list[str]]:
    tokens = ", ".join(f"{k}: {count}" for k, count in report["tokens_after"].items())
    rows = [
        ["judgments that could not be read", _percent(report["unread_judgments"])],
        ["cases without any that could", _percent(report["unread_cases"])],
        ["ties of the plain vote", _percent(report["ties"])],
        ["position bias (0 none, 1 always the first)", _signed(report["position_bias"])],
        ["two orders of a case prefer the same response", _percent(report["order_agreement"])],
        ["gap between the vote's share and how often it is right", _percent(report["calibration"]["gap"])],
        ["tokens of a judgment", f"{report['tokens_of_judgment']:.0f}"],
        ["tokens of all cases after k judgments", tokens],
    ]
    if (seconds := report.get("seconds_of_verdict")) is not None:
        rows.append(["seconds of a verdict, compilation included", f"{seconds:.3g}"])
    return [row for row in rows if not report.get("left_out") or row[1] != "-"]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _with_interval(value: float | None, bounds: Sequence[float] | None) -> str:
    if value is None or bounds is None:
        return _percent(value)
    return f"{_percent(value)} ({100 * bounds[0]:.1f} to {100 * bounds[1]:.1f})"


def _table(head: Sequence[Any], *rows: Sequence[Any]) -> list[str]:
    def line(cells: Sequence[Any]) -> str:
        return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(head), f"|{'---|' * len(head)}", *map(line, rows)]
