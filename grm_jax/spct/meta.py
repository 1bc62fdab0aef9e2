"""`meta_rm`: the meta RM's training (section 4.2), from sampled judgments to a folder that `--meta-rm` loads.

1. Rows of `sample` are read; those of conversations held out, drawn by the seed, are measured on alone.
2. A decoder gets a scalar head in the place of its output head, at zero: every judgment starts at probability 1/2.
3. Each step: binary cross-entropy of a batch's logits on whether the judgment is right (Eq. 10: a tie at the top or a
   failed parse is wrong), one compiled program.
4. Before, between (`evaluate_every`) and after the steps: AUC, accuracy and calibration on what is held out.

Started again with the same command, a run goes on at its newest checkpoint, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax import meta_rm, metrics, prompts
from grm_jax.data import batches
from grm_jax.data import items as labelled
from grm_jax.log import logger
from grm_jax.models import flops
from grm_jax.models.decoder import split_abstract
from grm_jax.recipes import Lora, MetaConfig
from grm_jax.sharding import parameter_sharding
from grm_jax.spct import calibration, meta_batches, meta_step, runs, start
from grm_jax.spct.meta_batches import SampleBatches
from grm_jax.spct.meta_step import Judged
from grm_jax.spct.runs import Run
from grm_jax.spct.sample import Sample, read_samples
from grm_jax.spct.start import Start
from grm_jax.train import policy as training
from grm_jax.train.policy import Policy
from grm_jax.weights.decoder import load_decoder

_ROWS = 32  # judgments that a device measures at once


def run(recipe: MetaConfig) -> None:
    """Train the recipe's model into `output`/model.

    Raises ValueError for bad input before a model is loaded, KeyboardInterrupt when asked to stop (the state is saved).
    """
    template = prompts.load_template(recipe.template or meta_rm.TEMPLATE, boxed=False)
    train, held_out = split([sample for file in recipe.samples for sample in read_samples(file)], recipe)
    begun = begin(recipe)
    limit = min(recipe.max_tokens, begun.policy.config.max_positions)
    source = SampleBatches(
        *(train, begun.tokenizer, template, limit, recipe.seed, recipe.steps, recipe.batch, recipe.balance),
        *(jax.process_index(), jax.process_count()),
    )
    encoded = [meta_batches.encode(begun.tokenizer, template, limit, sample) for sample in held_out]
    optimizer = training.make_optimizer(recipe.optimizer, recipe.steps)
    state = training.start(begun.params, optimizer, begun.policy.mesh)
    step = meta_step.make_step(begun.policy, recipe, optimizer, state)
    nothing = labelled.ItemSet([], [], {})
    with runs.opened(recipe, begun, nothing, state, batches.stream(source)) as run:
        measured = functools.partial(_measure, run, held_out, encoded)
        measured(run.first)
        for number in range(run.first, recipe.steps):
            batch = next(run.batches)
            with runs.traced(recipe, number):
                run.state, scalars = step(run.state, meta_step.put(batch, begun.policy))
            run.reported(functools.partial(_write, run, number + 1, batch, scalars))
            run.kept(number + 1)
            measured(number + 1)
        start.save(begun, run.state, recipe.output)


def split(samples: Sequence[Sample], recipe: MetaConfig) -> tuple[list[Sample], list[Sample]]:
    """(Those to train on, those held out) by conversation; hinted judgments are left out.

    A hinted judge knew the answer: its judgments say nothing of those that the meta RM will guide. Raises ValueError
    where nothing is left to train on.
    """
    plain = [sample for sample in samples if not sample.hinted]
    if len(plain) < len(samples):
        logger.info("%d hinted judgments left out", len(samples) - len(plain))
    examples = {id(sample): sample.example for sample in plain}
    distinct = list({(example.id, example.messages): example for example in examples.values()}.values())
    _, out = labelled.split(distinct, recipe.held_out, recipe.seed)
    talks = {example.messages for example in out}
    held = [sample for sample in plain if sample.messages in talks]
    train = [sample for sample in plain if sample.messages not in talks]
    if not train:
        raise ValueError(
            f"of {len(samples)} judgments {len(samples) - len(plain)} are hinted and {len(held)} held out: none is left to "
            "train on, give more samples or hold out fewer"
        )
    for name, part in (("train on", train), ("measure on", held)):
        right = sum(sample.correct for sample in part)
        logger.info("%d judgments to %s, %d of them right", len(part), name, right)
    return train, held


def begin(recipe: MetaConfig) -> Start:
    """The recipe's model with a scalar head, ready to train: a judge's or base's gets one at zero, a meta RM keeps its own.

    Raises FileNotFoundError and ValueError as `grm.load` does, and ValueError for a model without a tokenizer and for
    microbatches that the devices cannot share.
    """
    on_cpu = jax.default_backend() == "cpu"
    compute = jnp.dtype(recipe.compute_dtype or ("float32" if on_cpu else "bfloat16"))
    if recipe.model == start.FRESH:
        found = start.fresh(recipe.fresh, recipe.seed, recipe.devices, jnp.dtype(jnp.float32))
        model, tokenizer = found.model, found.tokenizer
    else:
        model, tokenizer = load_decoder(recipe.model, "float32", recipe.devices)
    if tokenizer is None:
        raise ValueError(f"{recipe.model} has no tokenizer files: put tokenizer.json or tokenizer.model in its folder")
    devices = model.mesh.shape["data"]
    if recipe.microbatch % devices:
        raise ValueError(
            f"microbatch = {recipe.microbatch} does not divide over {devices} devices: make it a multiple of {devices}, or "
            "set devices"
        )
    config = dataclasses.replace(model.config, scalar=True)
    graph, shapes = split_abstract(config)
    params = {name: value for name, value in model.params.items() if name in shapes}
    if not model.config.scalar:
        place = parameter_sharding(model.mesh, "score", *shapes["score"])
        params["score"] = jax.device_put(jnp.zeros(shapes["score"][0], jnp.float32), place)
    return Start(Policy(config, graph, model.mesh, Lora(), compute), params, {}, tokenizer, recipe.model)


def _measure(run: Run, held_out: Sequence[Sample], encoded: Sequence[tuple[list[int], list[int]]], done: int) -> None:
    """AUC, accuracy and calibration on what is held out, where that is due."""
    every = run.recipe.evaluate_every
    due = done in (0, run.recipe.steps) or (every > 0 and done % every == 0)
    if not held_out or not due or done in run.known:
        return
    run.reported(None)  # the time of a step is none of the measurement's
    logits = logits_of(run.begun, run.state.params, encoded)
    found = calibration.measure(logits, np.array([sample.correct for sample in held_out]))
    logger.info("after %d steps, %d held-out judgments: %s", done, len(held_out), found)
    run.metrics.held_out(done, {"judgments": len(held_out)} | found.numbers())
    run.seconds()


def logits_of(begun: Start, params: dict[str, jax.Array], encoded: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
    """The logits of encoded judgments, in their order, computed in batches of similar length."""
    policy = begun.policy
    compute: Callable[[dict, Judged], jax.Array] = jax.jit(functools.partial(meta_step.logits_of, policy))
    order = sorted(range(len(encoded)), key=lambda i: sum(map(len, encoded[i])))
    found = np.zeros(len(encoded), np.float32)
    size = _ROWS * policy.mesh.shape["data"]
    for at in range(0, len(order), size):
        mine = order[at : at + size]
        rows = [encoded[i] for i in np.resize(mine, size)]
        batch = meta_batches.batch(rows, [False] * size, np.ones(size), slice(None))
        found[mine] = np.asarray(compute(params, meta_step.put(batch, policy)))[: len(mine)]
    return found


def _write(run: Run, done: int, batch: Judged, scalars: dict[str, jax.Array]) -> None:
    """The metrics of a step that the device has finished or will have soon."""
    values = {name: float(value) for name, value in jax.device_get(scalars).items()}
    seconds, tokens = run.seconds(), int(batch.lengths.sum() + batch.counts.sum()) * jax.process_count()
    context = float(np.mean(batch.lengths + batch.counts)) / 2
    work = flops.model_flops(run.begun.policy.config, 0, tokens, context)
    run.metrics.write(done, values | metrics.speed(tokens, work, seconds))
