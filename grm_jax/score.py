"""`score`: examples from a file, judged and voted, verdicts to a file.

1. The input is read and checked whole, the template loaded and the output opened, before anything heavy is imported.
2. The model is loaded, and every example judged in one full batch (`Grm.judge`).
3. Each verdict goes to the output as soon as all before it have: in input order, flushed row by row, resumable.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from grm_jax import prompts
from grm_jax.config import JudgeSettings, ScoreConfig
from grm_jax.data.jsonl import DataError, read_examples
from grm_jax.datatypes import Example, Judgment, Verdict
from grm_jax.log import logger
from grm_jax.weights.embedded import check_model

EXAMPLES = Path(__file__).parent / "examples" / "examples.jsonl"
_LOG_SECONDS = 10.0  # between two lines of progress where there is no terminal


def run(config: ScoreConfig) -> None:
    """Judge the input into the output. Raises DataError and ValueError for bad input before the model is loaded."""
    examples, bad = read_examples(str(EXAMPLES) if config.input == "examples" else config.input, config.skip_bad)
    if bad:
        logger.warning("%d bad rows left out, the first: %s", len(bad), bad[0])
    examples = _that_fit_templates(examples, config)
    for model in (config.model, config.meta_rm, config.critic):
        if model:
            check_model(model)
    from grm_jax import hosts  # array libraries are loaded when the input is known to be good
    from grm_jax.data.shares import part_of, shared_writer
    from grm_jax.models import kernels
    from grm_jax.sharding import lay_out, spans_processes
    from grm_jax.weights.decoder import check_decoder

    for model, scalar in ((config.model, bool(config.baseline)), (config.meta_rm, True), (config.critic, False)):
        if model:
            check_decoder(model, scalar)
    kernels.select(config.kernels)
    mesh = lay_out(config.mesh, config.devices)
    share = hosts.share(lockstep=spans_processes(mesh))
    path, examples = part_of(config.output, share), examples[share.index :: share.count]
    with shared_writer(share, config.output, examples, _settings(config), config.overwrite) as writer:
        waiting = [example for example in examples if example.id not in writer.finished]
        if writer.finished:
            logger.info("%d of %d verdicts are in %s already", len(writer.finished), len(examples), path)
        if not waiting:
            return
        started = time.monotonic()
        judged = _judge_of(config, mesh)
        logger.info("loaded %s in %.1f s; %d examples to judge", config.model, time.monotonic() - started, len(waiting))
        started, verdicts = time.monotonic(), []
        with _progress(len(waiting)) as progress:
            for verdict in judged(waiting):
                writer.write(verdict)
                progress.add(verdict)
                verdicts.append(verdict if config.show else dataclasses.replace(verdict, judgments=()))
    _report(verdicts, time.monotonic() - started, progress)
    if config.show:
        show(examples, verdicts, Console(file=sys.stdout if config.output != "-" else sys.stderr))


def _judge_of(config: ScoreConfig, mesh: jax.sharding.Mesh) -> Callable[[list[Example]], Iterator[Verdict]]:
    """Load what the config names, and give what turns examples into verdicts."""
    settings, place = judge_settings(config), (config.dtype, mesh)
    if config.baseline:
        from grm_jax import baselines

        loaded = baselines.load(config.baseline, config.model, *place, critic=config.critic)
        return lambda examples: loaded.judge(examples, settings)
    from grm_jax import meta_rm
    from grm_jax.grm import load

    guide = meta_rm.load(config.meta_rm, *place) if config.meta_rm else None
    grm = load(config.model, *place)
    return lambda examples: grm.judge(examples, settings, meta_rm=guide)


def _that_fit_templates(examples: list[Example], config: ScoreConfig) -> list[Example]:
    """The examples that their templates have places for. Raises DataError naming others, unless they may be left out."""
    check = _check_of(config)
    fitting, faults = [], []
    for example in examples:
        try:
            check(example)
            fitting.append(example)
        except ValueError as error:
            faults.append(str(error))
    if faults and (not config.skip_bad or not fitting):
        raise DataError("\n  ".join([f"{len(faults)} rows do not fit the template:", *faults[:20]]), [])
    if faults:
        logger.warning("%d rows that do not fit the template left out, the first: %s", len(faults), faults[0])
    return fitting


def _check_of(config: ScoreConfig) -> Callable[[Example], None]:
    """What raises ValueError for an example that a template of the judge, its meta RM or a baseline has no place for."""
    if config.baseline:
        from grm_jax import baselines

        return baselines.checker(config.baseline, config.model)
    template_of = functools.cache(
        lambda n: prompts.load_template(config.template) if config.template else prompts.template_for(n, demos=False)
    )

    check_guide = None
    if config.meta_rm:
        from grm_jax import meta_rm

        check_guide = meta_rm.checker(config.meta_rm)

    def check(example: Example) -> None:
        prompts.check_places(example, template_of(len(example.responses)))
        if check_guide:
            check_guide(example)

    return check


def judge_settings(config: ScoreConfig) -> JudgeSettings:
    """The part of the config that says how judgments are sampled."""
    return JudgeSettings(**{f.name: getattr(config, f.name) for f in dataclasses.fields(JudgeSettings)})


def _settings(config: ScoreConfig) -> dict[str, object]:
    """What a verdict depends on: a run that goes on must agree in all of it. Batch size and devices are not in it."""
    settings = judge_settings(config).record() | {"model": config.model, "dtype": config.dtype}
    for name in ("meta_rm", "baseline", "critic"):
        if (value := getattr(config, name)) is not None:
            settings[name] = value
    if config.template:
        settings["template"] = f"{config.template} sha256 {prompts.load_template(config.template).sha256}"
    return settings


class _Counts:
    """How far a run is, and what its last line reports."""

    def __init__(self) -> None:
        self.rows = self.tokens = self.forced = self.failed = self.cut = 0
        self.started = time.monotonic()

    def add(self, verdict: Verdict) -> None:
        self.rows += 1
        self.tokens += verdict.usage.completion_tokens
        self.forced += sum(judgment.forced for judgment in verdict.judgments)
        self.failed += verdict.votes - verdict.valid
        self.cut += verdict.usage.cut_tokens > 0

    def rates(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        return f"{self.rows / seconds:.2f} rows/s, {self.tokens / seconds:.0f} tokens/s"


class _Bar(_Counts):
    """A bar on a terminal."""

    def __init__(self, total: int, bar: Progress) -> None:
        super().__init__()
        self.bar, self.task = bar, bar.add_task("judging", total=total, rates="")

    def add(self, verdict: Verdict) -> None:
        super().add(verdict)
        self.bar.update(self.task, advance=1, rates=self.rates())


class _Lines(_Counts):
    """A log line from time to time, where standard error is no terminal."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.total, self.said = total, time.monotonic()

    def add(self, verdict: Verdict) -> None:
        super().add(verdict)
        now = time.monotonic()
        if now - self.said >= _LOG_SECONDS or self.rows == self.total:
            self.said = now
            left = (now - self.started) / self.rows * (self.total - self.rows)
            logger.info("%d of %d, %s, %.0f s left", self.rows, self.total, self.rates(), left)


@contextmanager
def _progress(total: int) -> Iterator[_Counts]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        yield _Bar(total, bar)


def _report(verdicts: Sequence[Verdict], seconds: float, counts: _Counts) -> None:
    votes = sum(verdict.votes for verdict in verdicts)
    logger.info(
        "%d verdicts in %.1f s (%.0f tokens/s): %d of %d judgments had their scores forced, %d had none; %d ties; "
        "%d prompts were cut to fit",
        *(len(verdicts), seconds, counts.tokens / max(seconds, 1e-9)),
        *(counts.forced, votes, counts.failed, sum(verdict.tie for verdict in verdicts), counts.cut),
    )


def best_supported(verdict: Verdict) -> Judgment | None:
    """The judgment that agrees most with the vote: its scores are nearest to the mean ones; None if none has scores.

    With a meta RM, one of those that it kept.

    Among equally near ones, one whose scores the model wrote unforced, then the likeliest.
    """
    scored = [judgment for judgment in verdict.judgments if judgment.voted is not None and judgment.kept is not False]
    if not scored:
        return None
    means = [total / len(scored) for total in verdict.scores]

    def distance(judgment: Judgment) -> tuple[float, bool, float]:
        gap = sum(abs(score - mean) for score, mean in zip(judgment.voted, means, strict=True))
        return gap, judgment.forced, -judgment.log_prob

    return min(scored, key=distance)


def show(examples: Sequence[Example], verdicts: Sequence[Verdict], console: Console) -> None:
    """Print, for each verdict, the best-supported judgment and the table of all votes."""
    by_id = {verdict.id: verdict for verdict in verdicts}
    for example in examples:
        if example.id in by_id:
            _show_one(example, by_id[example.id], console)


def _shown_score(judgment: Judgment, i: int) -> str:
    """Response i's score: starred if forced, in brackets if the meta RM left it out."""
    if judgment.voted is None:
        return "-"
    shown = f"{judgment.scores[i]}" if judgment.values is None else f"{judgment.values[i]:.2f}"
    text = f"{shown}{'*' if judgment.forced else ''}"
    return f"({text})" if judgment.kept is False else text


def _show_one(example: Example, verdict: Verdict, console: Console) -> None:
    judgment = best_supported(verdict)
    query = example.messages[-1].content
    if judgment is None:
        text = "no judgment had scores"
    else:
        shown = ", ".join(f"Response {slot + 1} is {index + 1}" for slot, index in enumerate(judgment.order))
        text = f"{judgment.text.strip()}\n\n(in this judgment's order {shown})"
    console.print(Panel(escape(text), title=escape(f"{example.id}: {query[:80]}"), title_align="left"))
    table = Table(Column("response", no_wrap=True, overflow="ellipsis", max_width=32), "votes", "sum", "")
    for i, response in enumerate(example.responses):
        votes = " ".join(_shown_score(judgment, i) for judgment in verdict.judgments)
        best = ("tie" if verdict.tie else "best") if verdict.scores[i] == max(verdict.scores) else ""
        best = "" if len(example.responses) == 1 else best
        table.add_row(escape(f"{i + 1}: {' '.join(response.split())}"), votes, f"{verdict.scores[i]:g}", best)
    console.print(table)
    if any(judgment.forced for judgment in verdict.judgments):
        console.print("* forced: the text held no valid box, and the scores were sampled under a mask")
