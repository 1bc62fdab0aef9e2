"""`rl`: rule-based online reinforcement learning, stage 2 (section 3.2), from labelled items to a trained judge.

1. The items are read and split, those that are too easy left out, the policy is loaded, and the newest whole checkpoint
   is restored, if there is one.
2. Each step: the host hands over a batch of prompts, rendered and tokenised ahead of time; the device runs the one
   program of `rl_step`; meanwhile the host writes the metrics of the step before.
3. Checkpoints are written behind the loop's back every so many steps, at the end, and when the run is asked to stop,
   which ends the command with code 130.
4. Accuracy on held-out examples is measured before, between (`eval_every`) and after the steps.

Started again with the same command, a run goes on at its newest checkpoint, and from there on its metrics are those of
a run that was never interrupted: batches, orders and samples are functions of (seed, step, item).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from grm_jax import metrics, neutral, scores
from grm_jax.data import batches
from grm_jax.data import items as labelled
from grm_jax.data.batches import Batch, PromptBatches, Shown
from grm_jax.datatypes import Example
from grm_jax.grm import vocabulary_bytes
from grm_jax.log import logger
from grm_jax.models import flops
from grm_jax.recipes import RlConfig
from grm_jax.sharding import check_microbatch
from grm_jax.spct import reject, rl_step, runs, start
from grm_jax.spct.rl_step import Report
from grm_jax.spct.runs import Run
from grm_jax.spct.sample import read_samples
from grm_jax.spct.start import Start
from grm_jax.train import policy as training

_SHOWN = 4  # rollouts that are shown at once
_BY_SOURCE = ("reward", "accuracy", "tie_rate", "parse_failures")


def run(recipe: RlConfig) -> None:
    """Train the recipe's model into `output`/model.

    Raises ValueError for bad input before a model is loaded, KeyboardInterrupt when asked to stop (the state is saved).
    """
    found = labelled.load(recipe.items, recipe.seed)
    runs.say_items(found)
    train = hard_enough(found.train, recipe.samples)
    template_of = runs.template_of(recipe, found)
    begun = start.load(recipe, reference=recipe.kl_coef > 0)
    check_split(recipe, begun)
    source = PromptBatches(
        *(train, template_of, begun.tokenizer, recipe.seed, recipe.steps, recipe.prompts_per_step),
        recipe.max_prompt_tokens,
    )
    optimizer = training.make_optimizer(recipe.optimizer, recipe.steps * recipe.updates_per_step)
    state = training.start(begun.params, optimizer, begun.policy.mesh)
    table = scores.token_table(vocabulary_bytes(begun.tokenizer, begun.policy.config.vocab_size))
    step = rl_step.make_step(begun.policy, recipe, optimizer, table, begun.tokenizer.eos_ids, state)
    key = jax.random.key(recipe.seed, impl="threefry2x32")
    with runs.opened(recipe, begun, found, state, batches.stream(source)) as run:
        run.measured(run.first)
        for number in range(run.first, recipe.steps):
            batch, shown = next(run.batches)
            with run.traced(number):
                run.state, report = step(run.state, begun.frozen, rl_step.put(batch, begun.policy), key)
            run.settled(report)
            run.reported(functools.partial(_write, run, number + 1, batch, shown, report))
            run.kept(number + 1)
            run.measured(number + 1)
        start.save(begun, run.state, recipe.output)


def hard_enough(items: list[Example], samples: str | None) -> list[Example]:
    """The items without those that a file of samples has right k of k times (section 3.2)."""
    if samples is None:
        return items
    easy = reject.too_easy_ids(read_samples(samples))
    left = [item for item in items if item.id not in easy]
    logger.info("%d of %d items are too easy by %s", len(items) - len(left), len(items), samples)
    if not left:
        raise ValueError(f"all {len(items)} items are right every time in {samples}: there is nothing to learn from")
    return left


def check_split(recipe: RlConfig, begun: Start) -> None:
    """Raise ValueError unless every microbatch can be spread over the devices, and a rollout fits the model."""
    check_microbatch("microbatch_prompts", recipe.microbatch_prompts, begun.policy.mesh)
    longest = begun.policy.config.max_positions
    if recipe.max_prompt_tokens + recipe.max_new_tokens > longest:
        raise ValueError(
            f"max_prompt_tokens + max_new_tokens = {recipe.max_prompt_tokens + recipe.max_new_tokens}: "
            f"{recipe.model} has {longest} positions; lower one of the two"
        )


def _write(run: Run, done: int, batch: Batch, shown: Shown, report: Report) -> None:
    """The metrics of a step, and now and then a few of its judgments in full."""
    report = jax.device_get(report)
    recipe, rollouts, judged = run.recipe, report.rollouts, report.judged
    of_rollout = {
        "reward": judged.reward,
        "accuracy": judged.correct,
        "tie_rate": judged.tie,
        "parse_failures": ~judged.valid,
        "length": rollouts.counts,
        "cut_short": ~rollouts.ended,
    }
    values = {name: float(np.mean(value)) for name, value in of_rollout.items()}
    values |= {name: float(value) for name, value in report.scalars.items()}
    values["cut_prompts"] = float(np.mean(np.array(shown.cut) > 0))
    sources = [item.source or "-" for item in shown.items for _ in range(recipe.group)]
    by_source = metrics.by_source(sources, {name: of_rollout[name] for name in _BY_SOURCE})
    speed = metrics.speed(int(rollouts.counts.sum()), step_flops(run, batch, rollouts.counts), run.seconds())
    run.metrics.write(done, values | speed, by_source)
    if recipe.log_samples_every and done % recipe.log_samples_every == 0:
        run.metrics.samples(done, [_sample(run, shown, report, row) for row in range(min(_SHOWN, len(sources)))])


def step_flops(run: Run, batch: Batch, counts: np.ndarray) -> float:
    """FLOPs that a step needs: every prompt and rollout once forward to sample, once to the reference, once trained."""
    recipe, config = run.recipe, run.begun.policy.config
    head = batch.head.shape[0]
    tokens = head + int(batch.lengths.sum()) + int(counts.sum())
    context = head + float(batch.lengths.mean()) + float(counts.mean()) / 2
    passes = 1 + (recipe.kl_coef > 0)
    return flops.model_flops(config, passes * tokens, recipe.updates_per_step * tokens, context)


def _sample(run: Run, shown: Shown, report: Report, row: int) -> Mapping[str, Any]:
    """One rollout in full, scores in the order shown."""
    rollouts, judged = report.rollouts, report.judged
    item, order = shown.items[row // run.recipe.group], shown.orders[row // run.recipe.group]
    text = run.begun.tokenizer.decode(rollouts.tokens[row, : rollouts.counts[row]].tolist())
    return {
        "id": item.id,
        "source": item.source,
        "order": list(order),
        "text": neutral.restore(text),
        "scores": judged.scores[row, : len(order)].tolist() if judged.valid[row] else None,
        "labels": [item.scores[i] for i in order],
        "reward": float(judged.reward[row]),
    }
