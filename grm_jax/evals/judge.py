"""What judges a benchmark's cases: a generative judge under its templates, or a baseline with a scalar head.

A baseline's verdicts are read as a judge's: rewards stand as the `values` of judgments without scores.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

from grm_jax import baselines, meta_rm, prompts, scalar_rm
from grm_jax.baselines import BradleyTerry, Cloud, PairRm
from grm_jax.checkpoint import digests
from grm_jax.config import EvalConfig, JudgeSettings
from grm_jax.data.benchmarks import Benchmark, Case
from grm_jax.data.jsonl import DataError
from grm_jax.datatypes import Example, Judgment, Verdict
from grm_jax.grm import Grm, load
from grm_jax.meta_rm import MetaRm
from grm_jax.models import kernels
from grm_jax.sharding import lay_out

_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Judge:
    """A model, and what guides its votes."""

    model: Grm | BradleyTerry | PairRm | Cloud
    guide: MetaRm | None = None

    @property
    def draws_greedy_beside(self) -> bool:
        """Whether `verdicts` can have greedy judgments beside the others; a baseline's are a run of their own."""
        return isinstance(self.model, Grm)

    def verdicts(
        self, examples: Sequence[Example], settings: JudgeSettings, templates: Mapping[int, str], greedy: int = 0
    ) -> Iterator[Verdict]:
        """As the model's `judge`. templates: the name for each number of responses; a baseline has its own."""
        if not isinstance(self.model, Grm):
            return self.model.judge(examples, settings)
        template = functools.cache(prompts.load_template)

        def template_of(example: Example) -> prompts.Template:
            return template(templates[len(example.responses)])

        return self.model.judge(examples, settings, template_of, meta_rm=self.guide, greedy=greedy)

    def digest(self) -> str:
        """16 hexadecimal digits of all weights: the same for the same numbers, however they are stored or laid out."""
        found = dict(digests(self.model.model.params))
        if isinstance(self.model, Cloud):
            found |= {f"critic.{name}": said for name, said in digests(self.model.critic.model.params).items()}
        if self.guide:
            found |= {f"guide.{name}": said for name, said in digests(self.guide.model.params).items()}
        said = json.dumps({name: found[name] for name in sorted(found)})
        return hashlib.sha256(said.encode()).hexdigest()[:16]


def open_judge(config: EvalConfig) -> Judge:
    """The model, and the meta RM where one is asked."""
    kernels.select(config.kernels)
    place = config.dtype, lay_out(config.mesh, config.devices)
    if config.baseline:
        return Judge(baselines.load(config.baseline, config.model, *place, critic=config.critic))
    guide = meta_rm.load(config.meta_rm, *place) if config.meta_rm else None
    return Judge(load(config.model, *place), guide)


def settings_of(config: EvalConfig) -> JudgeSettings:
    """How cases are judged; a baseline that writes nothing has one vote."""
    found = JudgeSettings(**{field.name: getattr(config, field.name) for field in dataclasses.fields(JudgeSettings)})
    return found if config.baseline in (None, "cloud") else dataclasses.replace(found, votes=1)


def check_orders(config: EvalConfig, benchmark: Benchmark) -> None:
    """Raise ValueError for fewer judgments of a case, or orders of its responses, than the benchmark's metric needs."""
    least = 1 if config.baseline else benchmark.kind.least
    for name in ("votes", "orders"):
        if (given := getattr(config, name)) is not None and given < least:
            raise ValueError(f"{name} = {given}: {benchmark.name} compares both orders, give --{name} {least} or more")


def once(config: EvalConfig, settings: JudgeSettings, benchmark: Benchmark) -> JudgeSettings | None:
    """How the greedy point is judged, with as few judgments as the metric needs; None where nothing is sampled."""
    if not config.greedy or config.baseline in ("bradley_terry", "pair_rm"):
        return None
    least = 1 if config.baseline else benchmark.kind.least
    return dataclasses.replace(settings, votes=least, temperature=0.0, k_meta=None, expected_scores=False)


def templates_of(cases: Sequence[Case], config: EvalConfig) -> dict[int, str]:
    """The template's name for each number of responses, or the baseline's. Raises DataError for cases without a place."""
    alone = baselines.checker(config.baseline, config.model) if config.baseline else None
    guide = meta_rm.checker(config.meta_rm) if config.meta_rm else None
    found, faults = {}, []
    for case in cases:
        n = len(case.example.responses)
        found.setdefault(n, config.baseline or config.template or ("listwise" if n > 1 else "single"))
        try:
            if alone:
                alone(case.example)
            else:
                prompts.check_places(case.example, prompts.load_template(found[n]))
            if guide:
                guide(case.example)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n  ".join([f"{len(faults)} cases do not fit the template:", *faults[:_SHOWN]]))
    return found


def digests_of(templates: Mapping[int, str], config: EvalConfig) -> dict[str, str]:
    """The sha256 of each template by its name; a Bradley-Terry model has none."""
    if config.baseline == "bradley_terry":
        return {}
    if config.baseline:
        default = baselines.PAIR if config.baseline == "pair_rm" else baselines.CRITIQUE
        template = scalar_rm.template_of(config.model, default)
        return {template.name: template.sha256}
    return {name: prompts.load_template(name).sha256 for name in sorted(set(templates.values()))}


def judgments_of(verdict: Verdict) -> Verdict:
    """The verdict with a judgment for each of its votes: a model that writes nothing has given rewards all the same."""
    if verdict.judgments:
        return verdict
    order = tuple(range(len(verdict.scores)))
    vote = Judgment("", None, None, order, forced=False, tokens=0, log_prob=0.0, values=verdict.scores)
    return dataclasses.replace(verdict, judgments=(vote,))
