"""What both stages of training have around their loops: where a run stands, what it keeps, how it is stopped.

1. `opened` claims the run's folder for its recipe, restores the newest whole checkpoint, and opens the metrics there.
2. `Run.reported` writes the step before while the device computes this one.
3. `Run.kept` saves a checkpoint where one is due, at the last step, and when the run was asked to stop, which ends it.
4. `Run.measured` judges the held-out examples with the weights as they are, where that is due.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import jax
from etils import epath

from grm_jax import memory, prompts, recipes
from grm_jax.checkpoint import Interrupt, Saver, check_claim, claim
from grm_jax.config import JudgeSettings
from grm_jax.data import items as labelled
from grm_jax.datatypes import Example, Verdict
from grm_jax.log import logger
from grm_jax.metrics import Metrics
from grm_jax.prompts import Template
from grm_jax.recipes import RftConfig, RlConfig
from grm_jax.spct.measure import measured
from grm_jax.spct.start import Start
from grm_jax.train.policy import State

_HEEDED = 16  # verdicts between two looks at whether to stop


@dataclasses.dataclass
class Run:
    """A run under way: its state, the step it begins or goes on at, and the batches from there on."""

    recipe: RftConfig | RlConfig
    begun: Start
    found: labelled.ItemSet
    state: State
    first: int
    batches: Any  # a grain iterator
    saver: Saver
    metrics: Metrics
    interrupt: Interrupt
    known: frozenset[int]  # steps up to `first` after which the held-out examples have been judged
    _saved: int | None = None  # the last step whose state is
    _late: Callable[[], None] | None = None
    _settled: bool = False  # whether every step is waited for
    _clock: float = 0.0

    def reported(self, write: Callable[[], None] | None) -> None:
        """Write the step before, and remember what writes this one; None at the end. A settled step is written at once."""
        if self._late:
            self._late()
        self._late = write
        if self._settled and write:
            write()
            self._late = None

    def settled(self, report: Any) -> None:
        """On simulated devices, wait for the step: two at once can take all threads, each waiting for the other's."""
        if jax.default_backend() == "cpu" and self.begun.policy.mesh.size > 1:
            jax.block_until_ready(report)
            self._settled = True

    @contextlib.contextmanager
    def traced(self, step: int) -> Iterator[None]:
        """Write a profiler's trace of the step, from its begin to the end of its work, where the recipe asks for one."""
        if step not in self.recipe.profile:
            yield
            return
        jax.block_until_ready(self.state)
        with jax.profiler.trace(f"{self.recipe.output}/profile/step-{step}"):
            yield
            jax.block_until_ready(self.state)

    def seconds(self) -> float:
        """Since the last call, or since the run began."""
        before, self._clock = self._clock, time.monotonic()
        return self._clock - before

    def kept(self, done: int) -> None:
        """Save after `done` steps where that is due.

        Raises KeyboardInterrupt, when all is saved, where the run was asked to stop: what follows a run needs its model.
        """
        asked = self.interrupt.asked
        if asked or self.saver.due(done) or done == self.recipe.steps:
            self._save(done)
        if asked:
            self._leave(done)

    def _save(self, done: int) -> None:
        self.reported(None)  # no row behind a checkpoint may be missing
        self.metrics.flush()
        self.saver.save(done, self.state, {"batches": self.batches.get_state()})
        self._saved = done

    def _leave(self, done: int) -> NoReturn:
        self.saver.wait()
        logger.info(
            "asked to stop: %s, the same command goes on there", f"step {done} is saved" if done else "at the start"
        )
        raise KeyboardInterrupt

    def heeded(self, verdicts: Iterable[Verdict], done: int) -> Iterator[Verdict]:
        """The verdicts of a measurement after `done` steps, which may take longer than a machine that is to go is given.

        Raises KeyboardInterrupt, when all is saved, where the run was asked to stop; the measurement begins anew then.
        """
        for number, verdict in enumerate(verdicts):
            if number % _HEEDED == 0:
                self.heed(done)
            yield verdict

    def heed(self, done: int) -> None:
        """Raise KeyboardInterrupt, with the state after `done` steps saved, where the run was asked to stop."""
        if self.interrupt.asked:
            if done not in (0, self._saved):
                self._save(done)
            self._leave(done)

    def measured(self, done: int) -> None:
        """Judge the held-out examples where that is due after `done` steps, and log and keep what came out.

        Due are the start, the end and what `eval_every` divides, unless the run that this one goes on from did it.
        """
        every = self.recipe.eval_every
        due = done in (0, self.recipe.steps) or (every > 0 and done % every == 0)
        if not self.found.held_out or not due or done in self.known:
            return
        self.reported(None)  # the time of a step is none of the measurement's
        grm = self.begun.judge(self.state.params)
        settings = JudgeSettings(
            votes=self.recipe.votes,
            temperature=self.recipe.eval_temperature,
            seed=self.recipe.seed,
            max_new_tokens=self.recipe.max_new_tokens,
            force_scores=False,
            slots=self.recipe.slots,
        )
        examples = self.found.held_out
        verdicts = grm.judge(examples, settings, template_of(self.recipe, self.found))
        result = measured(examples, self.heeded(verdicts, done), settings.seed)
        logger.info("after %d steps: %s", done, result)
        self.metrics.held_out(done, dataclasses.asdict(result))
        self.seconds()


def template_of(recipe: RftConfig | RlConfig, found: labelled.ItemSet) -> Callable[[Example], Template]:
    """What shows an item when it is trained on or measured."""
    load = functools.cache(prompts.load_template)
    return lambda item: load(labelled.template_of(item, found.scales, recipe.template))


def say_items(found: labelled.ItemSet) -> None:
    for reason, count in found.dropped.items():
        logger.info("dropped %d: %s", count, reason)
    logger.info("%d items to train on, %d examples held out", len(found.train), len(found.held_out))


@contextlib.contextmanager
def opened(
    recipe: RftConfig | RlConfig,
    begun: Start,
    found: labelled.ItemSet,
    state: State,
    batches: Any,
) -> Iterator[Run]:
    """The run in the recipe's folder, from its newest whole checkpoint on, or from `state`.

    Raises ValueError for a folder that holds a run of another recipe.
    """
    if jax.default_backend() == "cpu":
        memory.give_back_after_compiling()
    check_claim(recipe.output, recipe)
    known = _measured_steps(recipe.output)
    with (
        Saver.open(recipe.output, recipe.checkpoints, recipes.as_json(recipe)) as saver,
        Interrupt() as interrupt,
    ):
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        first, restored = 0, saver.restore(target)
        if restored is not None:
            first, state, data = restored
            if first > recipe.steps:
                raise ValueError(
                    f"{recipe.output} has a checkpoint of step {first}, steps = {recipe.steps}: give {first} or more, or "
                    "another output"
                )
            batches.set_state(data["batches"])
            logger.info("going on behind step %d of %s", first, recipe.output)
        claim(recipe.output, recipe)
        with Metrics(recipe.output, first if restored else -1) as metrics:
            known = frozenset(step for step in known if restored and step <= first)  # later rows are dropped
            run = Run(recipe, begun, found, state, first, batches, saver, metrics, interrupt, known, first)
            run.seconds()
            yield run


def _measured_steps(output: str) -> set[int]:
    """The steps that have a row in `held_out.jsonl`. Read before anything is written: all processes find the same."""
    file, found = epath.Path(output) / "held_out.jsonl", set()
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):  # half-written
            found.add(json.loads(line)["step"])
    return found
