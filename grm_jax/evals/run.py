"""`eval`: a benchmark's cases judged k times, and a report of every vote for every k' up to k.

1. The official files are read, the cases held against their templates and the output opened, before a model is loaded.
2. Every case is judged k times, each judgment a row of `judgments.jsonl` (the format of `sample`); an interrupted run goes
   on there. With `greedy`, once more at temperature 0, into `greedy.jsonl`: in the same batches, so that a prompt is
   prefilled once for both; by themselves where only these are missing. A baseline's rows hold rewards.
3. `report.json`, `report.md` and `report.html` are made from those rows alone, so `--from judgments.jsonl` makes them anew;
   with `drop_forced`, as they would be had no scores been forced.

Process i of c judges cases[i::c] into a part of its own; process 0 reports.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from grm_jax import hosts
from grm_jax.config import EvalConfig, JudgeSettings
from grm_jax.data import benchmarks
from grm_jax.data import items as labelled
from grm_jax.data.benchmarks import KINDS, Benchmark, Case
from grm_jax.data.jsonl import DataError, path_of
from grm_jax.data.output import VerdictWriter
from grm_jax.data.shares import parts_of, remove, shared_writer
from grm_jax.datatypes import Example, Verdict
from grm_jax.evals import judge as judges
from grm_jax.evals import measure, page, report, table
from grm_jax.evals.judge import Judge
from grm_jax.log import logger
from grm_jax.sharding import lay_out, spans_processes
from grm_jax.spct.sample import Sample, read_samples, row_of, samples_of
from grm_jax.weights.decoder import check_decoder
from grm_jax.weights.embedded import check_model

JUDGMENTS, GREEDY = "judgments.jsonl", "greedy.jsonl"
_LOG_SECONDS = 10.0


def run(config: EvalConfig) -> None:
    """Judge and report. Raises FileNotFoundError, DataError and ValueError for bad input before a model is loaded."""
    if config.from_ is not None:
        again(config)
        return
    benchmark = limited(benchmarks.load(config.benchmark, config.data), config.limit, config.seed)
    for reason, count in benchmark.dropped.items():
        logger.info("dropped %d: %s", count, reason)
    if not benchmark.cases:
        raise DataError(f"{config.data} has no cases of {config.benchmark}: give the official files")
    judges.check_orders(config, benchmark)
    templates = judges.templates_of(benchmark.cases, config)
    for model, scalar in ((config.model, bool(config.baseline)), (config.meta_rm, True), (config.critic, False)):
        if model:
            check_model(model)
            check_decoder(model, scalar)
    opened = functools.cache(lambda: judges.open_judge(config))
    settings = judges.settings_of(config)
    alone = judges.once(config, settings, benchmark)
    rows, once = judged(config, benchmark, settings, alone, templates, opened)
    if hosts.is_first():
        _report(config.output, benchmark, rows, once, protocol_of(config.output))


def again(config: EvalConfig) -> None:
    """The report from the rows of an earlier run. Raises DataError where forced ones are to be dropped and none were."""
    place = epath.Path(config.from_)
    place = place / JUDGMENTS if place.is_dir() else place
    protocol = _protocol_beside(place)
    if config.benchmark not in (None, protocol["benchmark"]):
        raise DataError(
            f"{place} has judgments of {protocol['benchmark']}, not of {config.benchmark}: leave --benchmark out"
        )
    rows = _read(str(place), config.drop_forced)
    if config.drop_forced:
        if not protocol["force_scores"]:
            raise DataError(f"{place} was judged without forced scores: leave --drop-forced out")
        protocol["drop_forced"] = True
    name, greedy = protocol["benchmark"], str(place.parent / GREEDY)
    has_greedy = protocol.get("greedy", True) and (epath.Path(greedy).exists() or parts_of(greedy))
    benchmark = Benchmark(name, table.cases_of(rows), KINDS[name], protocol["dropped"])
    once = _read(greedy, config.drop_forced) if has_greedy and config.greedy else []
    if hosts.is_first():
        own = f"{config.output}/{JUDGMENTS}"
        if not (epath.Path(own).exists() or parts_of(own)):  # so that `compare` takes the output
            _write(f"{config.output}/protocol.json", protocol | {"from": str(place)})
        _report(config.output, benchmark, rows, once, protocol)


def _protocol_beside(place: epath.Path) -> dict[str, Any]:
    """What a file of judgments was made with, by `eval`, or by `sample`, whose rows are pairs and lists like any other's.

    Raises DataError where neither has left that beside it.
    """
    record = place.parent / f"{place.name}.run.json"
    if (place.parent / "protocol.json").exists() or not record.exists():
        return protocol_of(str(place.parent))
    given = json.loads(record.read_text())["settings"]
    unknown = {"meta_rm": None, "k_meta": None, "force_scores": False, "dropped": {}, "weights": "not recorded"}
    return unknown | given | {"benchmark": "preferences", "greedy": False}


def rows_of(folder: str) -> list[Sample]:
    """The judgments that a report's folder is made from: its own, or those of the run that it reports anew."""
    protocol = protocol_of(folder)
    return _read(protocol.get("from", f"{folder}/{JUDGMENTS}"), protocol.get("drop_forced", False))


def _read(path: str, drop_forced: bool) -> list[Sample]:
    """The rows of a file; those whose scores were forced have none where they are to be dropped."""
    unread = {"scores": None, "values": None, "correct": None, "reason": "its scores were forced"}
    rows = read_samples(path)
    return [dataclasses.replace(row, **unread) if drop_forced and row.forced else row for row in rows]


def limited(benchmark: Benchmark, limit: int | None, seed: int) -> Benchmark:
    """The benchmark with the cases of at most `limit` queries, those that the seed ranks first."""
    groups = [Example(group, (), ()) for group in dict.fromkeys(case.group for case in benchmark.cases)]
    kept = {group.id for group in labelled.limited(groups, limit, seed)}
    cases = [case for case in benchmark.cases if case.group in kept]
    if len(cases) == len(benchmark.cases):
        return benchmark
    kind = dataclasses.replace(benchmark.kind, rows=None)  # rows that were dropped are of the whole file
    return dataclasses.replace(benchmark, cases=cases, kind=kind)


@dataclasses.dataclass(frozen=True)
class _Output:
    """A file of rows, how they are judged, and the cases that it lacks."""

    path: str
    settings: JudgeSettings
    writer: VerdictWriter
    lacks: dict[str, Case]

    def write(self, case: Case, verdict: Verdict, templates: Mapping[int, str], seconds: float) -> None:
        """The judgments of a case that the file lacks, each a row."""
        template, budget = templates[len(case.example.responses)], self.settings.max_new_tokens
        samples = samples_of(_named(case), verdict, template, budget, hinted=False)
        rows = [
            row_of(dataclasses.replace(sample, forced=judgment.forced or None, group=case.group, seconds=seconds))
            for sample, judgment in zip(samples, verdict.judgments, strict=True)
        ]
        self.writer.write(verdict, rows)
        del self.lacks[case.example.id]


def judged(
    config: EvalConfig, benchmark: Benchmark, settings: JudgeSettings, alone: JudgeSettings | None,
    templates: Mapping[int, str], opened: Callable[[], Judge],
) -> tuple[list[Sample], list[Sample]]:  # fmt: skip
    """The rows of all cases under these settings, and the greedy ones; those that no file has yet are judged into it."""
    share = hosts.share(lockstep=spans_processes(lay_out(config.mesh, config.devices)))
    before = hosts.agree(_weights_before(config) if hosts.is_first() else None)
    mine = benchmark.cases[share.index :: share.count]
    named = [_named(case) for case in mine]
    with contextlib.ExitStack() as stack:

        def output(file: str, settings: JudgeSettings) -> _Output:
            path = f"{config.output}/{file}"
            known = _record(config, benchmark, settings, templates)
            writer = stack.enter_context(
                shared_writer(share, path, named, known, config.overwrite, each=settings.votes)
            )
            if writer.finished:
                logger.info("%d of %d cases are in %s already", len(writer.finished), len(mine), path)
            lacks = {case.example.id: case for case in mine if case.example.id not in writer.finished}
            return _Output(path, settings, writer, lacks)

        main = output(JUDGMENTS, settings)
        if config.overwrite:
            remove(f"{config.output}/{GREEDY}")
        greedy = output(GREEDY, alone) if alone else None
        if main.lacks or (greedy and greedy.lacks):
            known = _record(config, benchmark, settings, templates)
            known |= {"data": config.data, "greedy": greedy is not None, "weights": opened().digest()}
            _check_weights(config, known["weights"], before)
            if hosts.is_first():
                _write(f"{config.output}/protocol.json", known)
        if main.lacks:
            together = greedy and opened().draws_greedy_beside and alone.votes <= settings.votes
            _judge(opened(), main, greedy if together else None, templates)
        if greedy and greedy.lacks:
            _judge(Judge(opened().model), greedy, None, templates)
    files = [main, greedy] if greedy else [main]
    for file in files:
        hosts.sync(file.path)  # process 0 reads the parts of all
    return read_samples(main.path), read_samples(greedy.path) if greedy else []


def _weights_before(config: EvalConfig) -> str | None:
    """The digest of the weights that an output has rows of; None where it has none, or they are to go."""
    folder = epath.Path(config.output)
    if config.overwrite or not (folder / "protocol.json").exists():
        return None
    paths = [f"{folder}/{file}" for file in (JUDGMENTS, GREEDY)]
    names = [name for path in paths for name in (epath.Path(path).name, *parts_of(path))]
    files = [folder / f"{name}{more}" for name in names for more in ("", ".ahead")]
    begun = any(file.exists() and file.stat().length for file in files)
    return protocol_of(config.output)["weights"] if begun else None


def _check_weights(config: EvalConfig, weights: str, before: str | None) -> None:
    """Raise DataError where an output was begun with other weights than these: its rows would be of two models."""
    if before not in (None, weights):
        raise DataError(
            f"{config.output} was begun with weights {before}, and {config.model} (or what goes with it) has {weights}: "
            "give the model as it was, another --output, or start anew with --overwrite"
        )


def _judge(judge: Judge, output: _Output, greedy: _Output | None, templates: Mapping[int, str]) -> None:
    """Judge the cases that an output lacks, and draw what the greedy one lacks of them beside."""
    started = said = before = time.monotonic()
    tokens, count = 0, len(output.lacks)
    beside = greedy.settings.votes if greedy and greedy.lacks.keys() & output.lacks.keys() else 0
    cases = dict(output.lacks)
    verdicts = judge.verdicts([case.example for case in cases.values()], output.settings, templates, beside)
    for done, found in enumerate(map(judges.judgments_of, verdicts), 1):
        case = cases[found.id]
        now = time.monotonic()
        seconds, before = round((now - before) / (len(found.judgments) + beside), 6), now
        if beside and found.id in greedy.lacks:
            greedy.write(case, dataclasses.replace(found, judgments=found.greedy), templates, seconds)
        output.write(case, found, templates, seconds)
        tokens += found.usage.completion_tokens
        if now - said >= _LOG_SECONDS or done == count:
            said = now
            logger.info("%d of %d cases, %.0f tokens/s", done, count, tokens / (now - started))


def _named(case: Case) -> Example:
    """The case's example with its subset as the source."""
    return dataclasses.replace(case.example, source=case.subset)


def _record(
    config: EvalConfig, benchmark: Benchmark, settings: JudgeSettings, templates: Mapping[int, str]
) -> dict[str, Any]:
    """What the rows depend on, and what a report says of it."""
    known = settings.record()
    if config.baseline:  # in the protocols of judges these are not there
        known |= {"baseline": config.baseline, "critic": config.critic}
    return known | {
        "benchmark": benchmark.name,
        "model": config.model,
        "meta_rm": config.meta_rm,
        "dtype": config.dtype,
        "limit": config.limit,
        "template": judges.digests_of(templates, config),
        "dropped": dict(benchmark.dropped),
    }


def protocol_of(folder: str) -> dict[str, Any]:
    """What the rows in a folder were judged with. Raises DataError where that is not there."""
    place = epath.Path(folder) / "protocol.json"
    if not place.exists():
        raise DataError(f"no {place}: the judgments of a report lie beside what they were judged with")
    return json.loads(place.read_text())


def _write(path: str, value: Any) -> None:
    place = path_of(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    written = place.with_name(f"{place.name}.new") if isinstance(place, Path) else place  # objects are atomic anyway
    written.write_text(json.dumps(value, indent=1) + "\n")
    if written is not place:
        written.replace(place)


def _report(
    output: str, benchmark: Benchmark, rows: Sequence[Sample], once: Sequence[Sample], protocol: Mapping[str, Any]
) -> None:
    judged_table = table.table_of(benchmark.cases, rows)
    found = measure.numbers(benchmark, judged_table, protocol["k_meta"], protocol["seed"])
    greedy = measure.greedy(benchmark, table.table_of(benchmark.cases, once), protocol["seed"]) if once else None
    whole = report.whole(benchmark, protocol, found, greedy)
    _write(f"{output}/report.json", whole)
    text = report.markdown(whole)
    (epath.Path(output) / "report.md").write_text(text)
    (epath.Path(output) / "report.html").write_text(page.html(whole, judged_table, rows, once))
    logger.info("%s/report.md:\n%s", output, report.summary(whole))
