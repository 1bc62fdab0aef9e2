"""`meta_rm`: the meta RM's training (section 4.2), from sampled judgments to a folder that `--meta-rm` loads.

1. Rows of `sample` are read; those of conversations held out, drawn by the seed, are measured on alone.
2. A decoder gets a scalar head in the place of its output head, at zero: every judgment starts at probability 1/2.
3. Each step: binary cross-entropy of a batch's logits on whether the judgment is right (Eq. 10: a tie at the top or a
   failed parse is wrong), one compiled program. Balanced, a judgment weighs what its class lacks over all samples.
4. Before, between (`eval_every`) and after the steps: AUC, accuracy and calibration on what is held out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from grm_jax import losses, meta_rm, prompts
from grm_jax.data import items as labelled
from grm_jax.log import logger
from grm_jax.recipes import MetaConfig
from grm_jax.spct import calibration, scalar
from grm_jax.spct.runs import Run
from grm_jax.spct.sample import Sample, read_samples
from grm_jax.spct.scalar_batches import Entry, Ids, TextBatches
from grm_jax.spct.scalar_step import Objective
from grm_jax.tokenizer import Tokenizer

OBJECTIVE = Objective(losses.bce, lambda logits, correct: (logits > 0) == (correct > 0.5))


def run(recipe: MetaConfig) -> None:
    """Train the recipe's model into `output`/model.

    Raises ValueError for bad input before a model is loaded, KeyboardInterrupt when asked to stop (the state is saved).
    """
    name = recipe.template or meta_rm.TEMPLATE
    template = prompts.load_template(name, boxed=False)
    train, held_out = split([sample for file in recipe.samples for sample in read_samples(file)], recipe)
    begun = scalar.begin(recipe)
    limit = min(recipe.max_tokens, begun.policy.config.max_positions)
    entries = entries_of(train, begun.tokenizer, template, limit, recipe.balance)
    encoded = [ids for entry in entries_of(held_out, begun.tokenizer, template, limit) for ids in entry.encode()]
    source = TextBatches(entries, recipe.seed, recipe.steps, recipe.batch)
    scalar.train(recipe, begun, source, OBJECTIVE, functools.partial(_measure, held_out, encoded), name)


def split(samples: Sequence[Sample], recipe: MetaConfig) -> tuple[list[Sample], list[Sample]]:
    """(Those to train on, those held out) by conversation; hinted judgments are left out.

    A hinted judge knew the answer: its judgments say nothing of those that the meta RM will guide. Raises ValueError
    where nothing is left to train on.
    """
    plain = [sample for sample in samples if not sample.hinted and sample.correct is not None]
    if len(plain) < len(samples):
        logger.info("%d judgments left out, hinted or of several best responses", len(samples) - len(plain))
    examples = {id(sample): sample.example for sample in plain}
    distinct = list({(example.id, example.messages): example for example in examples.values()}.values())
    _, out = labelled.split(distinct, recipe.held_out, recipe.seed)
    talks = {example.messages for example in out}
    held = [sample for sample in plain if sample.messages in talks]
    train = [sample for sample in plain if sample.messages not in talks]
    if not train:
        raise ValueError(
            f"of {len(samples)} judgments {len(samples) - len(plain)} are hinted or of several best responses, and "
            f"{len(held)} held out: none is left to train on, give more samples or hold out fewer"
        )
    for name, part in (("train on", train), ("measure on", held)):
        right = sum(sample.correct for sample in part)
        logger.info("%d judgments to %s, %d of them right", len(part), name, right)
    return train, held


def entries_of(
    samples: Sequence[Sample], tokenizer: Tokenizer, template: prompts.Template, limit: int, balance: bool = False
) -> list[Entry]:
    """An entry a judgment. Raises ValueError for samples to balance that are all right or all wrong."""
    right = np.array([sample.correct for sample in samples])
    if balance and right.all() in (right.any(), True):
        raise ValueError(f"balance: all {len(samples)} judgments are {'right' if right.all() else 'wrong'}")
    share = right.mean() if len(samples) else 0.0
    weights = np.where(right, 0.5 / max(share, 1e-9), 0.5 / max(1 - share, 1e-9)) if balance else np.ones(len(samples))

    def encode(sample: Sample) -> list[Ids]:
        return [meta_rm.text_ids(tokenizer, template, sample.example, sample.order, sample.text, limit)]

    return [
        Entry(functools.partial(encode, sample), (sample.correct,), _characters(sample), float(weight))
        for sample, weight in zip(samples, weights, strict=True)
    ]


def _characters(sample: Sample) -> int:
    texts = (*(message.content for message in sample.messages), *sample.responses, sample.reference or "", sample.text)
    return sum(map(len, texts))


def _measure(held_out: Sequence[Sample], encoded: Sequence[Ids], run: Run, done: int) -> None:
    """AUC, accuracy and calibration on what is held out, where that is due."""
    if not held_out or not scalar.due(run, done):
        return
    run.reported(None)  # the time of a step is none of the measurement's
    logits = scalar.logits_of(run.begun, run.state.params, encoded, functools.partial(run.heed, done))
    found = calibration.measure(logits, np.array([sample.correct for sample in held_out]))
    logger.info("after %d steps, %d held-out judgments: %s", done, len(held_out), found)
    run.metrics.held_out(done, {"judgments": len(held_out)} | found.numbers())
    run.seconds()
