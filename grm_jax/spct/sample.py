"""`sample`: labelled items judged k times each, every judgment a row of a file with its correctness (Eq. 10).

1. The items are read and held against their templates, and the output is opened, before a model is loaded.
2. Each item is judged `votes` times, hinted or not (section 3.1). Scores are never forced: a judgment that does not parse
   is wrong.
3. The rows of an item are written in one piece when all before it are; an interrupted run goes on there.
4. The end reports by source what is right, beside what picking the longer response scores on the same items.

Process i of c judges items[i::c] into a part of its own; `read_samples` reads the file, or all of its parts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grm_jax import hosts, meta_rm, prompts
from grm_jax.config import JudgeSettings
from grm_jax.data import items as labelled
from grm_jax.data.jsonl import DataError
from grm_jax.data.shares import part_of, parts_of, shared_writer
from grm_jax.datatypes import Example, Judgment, Message, Verdict
from grm_jax.grm import Grm, Guide, load
from grm_jax.hosts import Share
from grm_jax.log import logger
from grm_jax.meta_rm import MetaRm
from grm_jax.models import kernels
from grm_jax.recipes import SampleConfig
from grm_jax.rewards import is_correct, is_tie
from grm_jax.sharding import lay_out, spans_processes
from grm_jax.spct.measure import longest_of
from grm_jax.weights.decoder import check_decoder
from grm_jax.weights.embedded import check_model

_LOG_SECONDS = 10.0  # between two lines of progress
# Keys that a row lacks where there is nothing to say.
_OPTIONAL = ("reference", "strength", "reason", "correct", "ended", "logit", "values", "forced", "group", "seconds")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One judgment of a labelled item, and all that its prompt was made of but the hint.

    `responses`, `labels` and `scores` are in the item's own order; `order[i]` is the index of the response shown in slot
    i. `scores` is None, with a `reason`, where the text holds no valid box. `template` is the name or file that showed
    the item, `sample` the judgment's number among the item's, `tokens` the length of the text without its end id, and
    `ended` whether an end id came within the budget (None: not known); `logit` is a meta RM's, where one was asked, and
    `values` are those of `Judgment`. `correct` is None where several responses are the best, and for a lone reward. Of
    `eval`: `forced` scores (`sample` never forces any), the `group` of cases that have one query, and `seconds`, an even
    share of the time from the verdict before to this one's: those of all rows add up to the time that judging took.
    """

    id: str
    source: str | None
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    labels: tuple[float, ...]
    reference: str | None
    strength: float | None
    order: tuple[int, ...]
    text: str
    scores: tuple[int, ...] | None
    reason: str | None
    correct: bool | None
    hinted: bool
    sample: int
    tokens: int
    ended: bool | None
    template: str
    logit: float | None = None
    values: tuple[float, ...] | None = None
    forced: bool | None = None
    group: str | None = None
    seconds: float | None = None

    @property
    def example(self) -> Example:
        """The item that was judged."""
        labels = self.labels
        return Example(self.id, self.messages, self.responses, labels, self.reference, self.strength, self.source)


def row_of(sample: Sample) -> dict[str, Any]:
    """A sample as one row of output, without the keys of _OPTIONAL that have no value."""
    row = dataclasses.asdict(sample)
    return {key: value for key, value in row.items() if value is not None or key not in _OPTIONAL}


def sample_of(row: Mapping[str, Any]) -> Sample:
    """The sample in a decoded row; keys that no sample has are passed over. Raises KeyError and TypeError for others."""
    row = dict.fromkeys(_OPTIONAL) | dict(row)
    fields = {field.name: row[field.name] for field in dataclasses.fields(Sample)}
    for name in ("responses", "labels", "order"):
        fields[name] = tuple(fields[name])
    fields["messages"] = tuple(Message(**message) for message in fields["messages"])
    for name in ("scores", "values"):
        fields[name] = None if fields[name] is None else tuple(fields[name])
    return Sample(**fields)


def run(config: SampleConfig) -> None:
    """Sample the config's items into its output, and report. Raises ValueError for bad input before a model is loaded."""
    found = labelled.load(config.items, config.seed)
    for reason, count in found.dropped.items():
        logger.info("dropped %d: %s", count, reason)
    if not found.train:
        raise ValueError(f"no items are left of {', '.join(config.items.files)}: give examples with one best response")
    same = [file for file in config.items.files if os.path.realpath(file) == os.path.realpath(config.output)]
    if same:
        raise ValueError(f"output {config.output!r} is one of items.files: samples would overwrite the examples")

    def name_of(item: Example) -> str:
        return labelled.template_of(item, found.scales, config.template)

    check_places(found.train, name_of, config.hinted)
    for model, scalar in ((config.model, False), (config.meta_rm, True)):
        if model:
            check_model(model)
            check_decoder(model, scalar)
    kernels.select(config.kernels)
    mesh = lay_out(config.mesh, config.devices)
    share = hosts.share(lockstep=spans_processes(mesh))
    tallies = sample_part(
        config, found.train, name_of, share,
        functools.partial(load, config.model, config.dtype, mesh),
        functools.partial(meta_rm.load, config.meta_rm, config.dtype, mesh) if config.meta_rm else None,
    )  # fmt: skip
    if tallies and share.writes:  # a process may have no items at all
        show(tallies, Console(file=sys.stderr))


def sample_part(
    config: SampleConfig, items: Sequence[Example], name_of: Callable[[Example], str], share: Share,
    open_judge: Callable[[], Grm], open_guide: Callable[[], MetaRm] | None = None,
) -> dict[str, Counter[str]]:  # fmt: skip
    """Write the samples of the share of the items, and return what `tally` counts of them by source.

    `open_judge` loads the model, `open_guide` a meta RM; neither is called when nothing is left to do. Raises DataError
    as `open_writer` does.
    """
    mine = items[share.index :: share.count]
    path = part_of(config.output, share)
    settings = judge_settings(config)
    tallies: dict[str, Counter[str]] = {}
    with shared_writer(
        share, config.output, mine, _record(config, items, name_of), config.overwrite, each=config.votes
    ) as writer:
        waiting = [item for item in mine if item.id not in writer.finished]
        if writer.finished:
            logger.info("%d of %d items are in %s already", len(writer.finished), len(mine), path)
        judged: Iterable[tuple[Verdict, list[Sample]]] = ()
        if waiting:
            guide = open_guide() if open_guide else None
            judged = sample_items(open_judge(), waiting, name_of, settings, config.hinted, guide)
            logger.info("%d items to judge %d times each", len(waiting), config.votes)
        started, tokens, said = time.monotonic(), 0, time.monotonic()
        for done, (verdict, samples) in enumerate(judged, 1):
            writer.write(verdict, [row_of(sample) for sample in samples])
            _add(tallies, samples)
            tokens += sum(sample.tokens for sample in samples)
            if (now := time.monotonic()) - said >= _LOG_SECONDS or done == len(waiting):
                said = now
                logger.info("%d of %d items, %.0f tokens/s", done, len(waiting), tokens / (now - started))
    if writer.finished and share.writes:  # some of them waited for their turn until now
        for samples in _by_id(_read(path)):
            if samples[0].id in writer.finished:
                _add(tallies, samples)
    return tallies


def sample_items(
    grm: Grm, items: Sequence[Example], name_of: Callable[[Example], str], settings: JudgeSettings, hinted: bool,
    guide: Guide | None = None,
) -> Iterator[tuple[Verdict, list[Sample]]]:  # fmt: skip
    """Each item's verdict and samples, as they come to be; `name_of` gives an item's template.

    `settings.force_scores` has to be off: a forced score is not the judge's own. Raises ValueError as `Grm.judge` does.
    """
    if settings.force_scores:
        raise ValueError("force_scores = True: a judgment that does not parse is wrong (Eq. 11), set it to False")
    template = functools.cache(prompts.load_template)
    by_id = {item.id: item for item in items}
    hint_of = labelled.hint_of if hinted else None
    for verdict in grm.judge(items, settings, lambda item: template(name_of(item)), hint_of, guide):
        item = by_id[verdict.id]
        yield verdict, samples_of(item, verdict, name_of(item), settings.max_new_tokens, hinted)


def samples_of(item: Example, verdict: Verdict, template: str, budget: int, hinted: bool) -> list[Sample]:
    """The judgments of a labelled item's verdict as samples."""
    return [
        Sample(
            id=item.id,
            source=item.source,
            messages=item.messages,
            responses=item.responses,
            labels=item.scores,
            reference=item.reference,
            strength=item.strength,
            order=judgment.order,
            text=judgment.text,
            scores=judgment.scores,
            reason=judgment.reason,
            correct=_correct(judgment, item.scores),
            hinted=hinted,
            sample=j,
            tokens=judgment.tokens,
            ended=judgment.tokens < budget,  # an end id is not counted, and without one the budget is used up
            template=template,
            logit=judgment.logit,
            values=judgment.values,
        )
        for j, judgment in enumerate(verdict.judgments)
    ]


def _correct(judgment: Judgment, labels: tuple[float, ...]) -> bool | None:
    """Whether it is right: None where several responses are the best, and for a lone reward, which is no label."""
    if len(labels) > 1 and labels.count(max(labels)) > 1:
        return None
    if judgment.scores is not None or judgment.values is None:
        return is_correct(judgment.scores, labels)
    return is_correct(judgment.values, labels) if len(labels) > 1 else None


def judge_settings(config: SampleConfig) -> JudgeSettings:
    """How the config's judgments are sampled: from the whole distribution, and never forced."""
    return JudgeSettings(
        votes=config.votes,
        temperature=config.temperature,
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        force_scores=False,
        slots=config.slots,
        orders=config.orders,
    )


def _record(config: SampleConfig, items: Iterable[Example], name_of: Callable[[Example], str]) -> dict[str, object]:
    """What a sample depends on beside its item: a run that goes on must agree in all of it."""
    settings = judge_settings(config).record() | {"model": config.model, "dtype": config.dtype}
    if config.meta_rm:
        settings["meta_rm"] = config.meta_rm
    shas = {name: prompts.load_template(name).sha256 for name in sorted(set(map(name_of, items)))}
    return settings | {"hinted": config.hinted, "template": shas}


def check_places(items: Iterable[Example], name_of: Callable[[Example], str], hinted: bool) -> None:
    """Raise ValueError, with the first faults, for items or hints that their templates have no place for."""
    template, faults = functools.cache(prompts.load_template), []
    for item in items:
        try:
            prompts.check_places(item, template(name_of(item)), labelled.hint_of(item) if hinted else None)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n  ".join([f"{len(faults)} items do not fit their template:", *faults[:20]]))


def read_samples(path: str) -> list[Sample]:
    """The samples of a file (local or gs://), or of all parts of it: in the items' order, however many wrote them.

    Raises DataError: no such file, parts that are missing or of several runs, a line that is no sample.
    """
    from etils import epath

    place = epath.Path(path)
    parts = parts_of(path)
    found = [place.name] * place.exists() + parts
    if not found:
        raise DataError(f"no {path}, and no parts of it; write it with the command `sample --output {path}`")
    wanted = [part_of(place.name, Share(i, len(parts), False)) for i in range(len(parts))] if len(parts) > 1 else []
    if parts != wanted or (parts and found != parts):
        shown = ", ".join(found[:8]) + " ..." * (len(found) > 8)
        raise DataError(f"{path}: found {shown}; samples are one file or all parts of one run: leave only those there")
    groups = [_by_id(_read(str(place.parent / name))) for name in found]
    in_turn = itertools.zip_longest(*groups, fillvalue=[])  # item i of the run is in part i mod count
    return [sample for turn in in_turn for group in turn for sample in group]


def _by_id(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Runs of samples of one item."""
    return (list(group) for _, group in itertools.groupby(samples, key=lambda sample: sample.id))


def _read(path: str) -> Iterator[Sample]:
    from etils import epath

    with epath.Path(path).open("rb") as stream:
        for line, raw in enumerate(stream, 1):
            try:
                yield sample_of(json.loads(raw))
            except (ValueError, KeyError, TypeError) as error:
                said = f"{type(error).__name__}: {error}"
                raise DataError(f"{path}:{line}: no sample ({said}); run `sample` again to mend it") from error


def tally(samples: Sequence[Sample]) -> Counter[str]:
    """What one item adds to the report: counts, but `longer` is what picking its longest response scores."""
    parsed = [sample.scores for sample in samples if sample.scores is not None]
    return Counter(
        items=1,
        judgments=len(samples),
        correct=sum(sample.correct for sample in samples),
        unparsed=len(samples) - len(parsed),
        ties=sum(map(is_tie, parsed)),
        longer=longest_of(samples[0].example),
    )


def _add(tallies: dict[str, Counter[str]], samples: Sequence[Sample]) -> None:
    tallies.setdefault(samples[0].source or "-", Counter()).update(tally(samples))


def show(tallies: Mapping[str, Counter[str]], console: Console) -> None:
    """Print the report: a row a source, and one of all of them together."""
    table = Table("source", "items", "judgments", "correct", "unparsed", "ties", "longer response")
    total = Counter()
    for counts in tallies.values():
        total.update(counts)
    for name, counts in [*sorted(tallies.items()), ("all", total)]:
        shares = [f"{counts[key] / counts['judgments']:.1%}" for key in ("correct", "unparsed", "ties")]
        longer = f"{counts['longer'] / counts['items']:.1%}"
        table.add_row(escape(name), str(counts["items"]), str(counts["judgments"]), *shares, longer)
    console.print(table)
