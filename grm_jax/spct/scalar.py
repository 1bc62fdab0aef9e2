"""How a scalar head is trained: the model that it is put on, and the loop around its steps.

1. `begin` takes a decoder's output head away and puts a scalar head at zero in its place, or keeps the one that is there.
2. `train` claims the run's folder and steps through the batches; a started run goes on at its newest checkpoint, bit for
   bit. What is measured, and when it is due, the program says.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from grm_jax import grm, metrics, prompts, scalar_rm
from grm_jax.data import batches
from grm_jax.data import items as labelled
from grm_jax.models import flops, kernels
from grm_jax.models.decoder import split_abstract
from grm_jax.recipes import Lora, ScalarConfig
from grm_jax.sharding import TRAINING, check_microbatch, fetch, lay_out, parameter_sharding, rows_of
from grm_jax.spct import runs, scalar_batches, scalar_step, start
from grm_jax.spct.runs import Run
from grm_jax.spct.scalar_batches import Ids, TextBatches
from grm_jax.spct.scalar_step import Objective, Texts
from grm_jax.spct.start import Start
from grm_jax.train import policy as training
from grm_jax.train.policy import Policy
from grm_jax.weights.adapters import is_adapter_folder
from grm_jax.weights.decoder import load_decoder

_ROWS = 32  # texts that a device measures at once


def begin(recipe: ScalarConfig) -> Start:
    """The recipe's model with a scalar head, ready to train: a judge's or base's gets one at zero, others keep theirs.

    Raises FileNotFoundError and ValueError as `grm.load` does, and ValueError for a model without a tokenizer and for
    microbatches that the devices cannot share.
    """
    on_cpu = jax.default_backend() == "cpu"
    compute = jnp.dtype(recipe.compute_dtype or ("float32" if on_cpu else "bfloat16"))
    kernels.select(recipe.kernels)
    mesh = lay_out(recipe.mesh, recipe.devices, everywhere=True)
    if recipe.model == start.FRESH:
        found = start.fresh(recipe.fresh, recipe.seed, mesh, jnp.dtype(jnp.float32))
        model, tokenizer = found.model, found.tokenizer
    elif is_adapter_folder(recipe.model):
        found = grm.load(recipe.model, "float32", mesh, TRAINING)
        model, tokenizer = found.model, found.tokenizer
    else:
        model, tokenizer = load_decoder(recipe.model, "float32", mesh, TRAINING)
    if tokenizer is None:
        raise ValueError(f"{recipe.model} has no tokenizer files: put tokenizer.json or tokenizer.model in its folder")
    check_microbatch("microbatch", recipe.microbatch, mesh)
    config = dataclasses.replace(model.config, scalar=True)
    graph, shapes = split_abstract(config, mesh)
    params = {name: value for name, value in model.params.items() if name in shapes}
    if not model.config.scalar:
        place = parameter_sharding(mesh, "score", *shapes["score"])
        params["score"] = jnp.zeros(shapes["score"][0], jnp.float32, device=place)
    return Start(Policy(config, graph, model.mesh, Lora(), compute), params, {}, tokenizer, recipe.model)


def train(
    recipe: ScalarConfig, begun: Start, source: TextBatches, objective: Objective,
    measured: Callable[[Run, int], None], template: str | None,
) -> None:  # fmt: skip
    """Train into `output`/model; `measured(run, steps done)` is called before and after every step.

    template: the name or file of what shows the texts, which the model's folder keeps. Raises KeyboardInterrupt when
    asked to stop (the state is saved).
    """
    optimizer = training.make_optimizer(recipe.optimizer, recipe.steps)
    state = training.start(begun.params, optimizer, begun.policy.mesh)
    step = scalar_step.make_step(begun.policy, recipe, optimizer, state, objective)
    nothing = labelled.ItemSet([], [], {})
    with runs.opened(recipe, begun, nothing, state, batches.stream(source)) as run:
        measured(run, run.first)
        for number in range(run.first, recipe.steps):
            batch = next(run.batches)
            with run.traced(number):
                run.state, scalars = step(run.state, scalar_step.put(batch, begun.policy))
            run.settled(scalars)
            run.reported(functools.partial(_write, run, number + 1, batch, scalars))
            run.kept(number + 1)
            measured(run, number + 1)
        start.save(begun, run.state, recipe.output)
        if template is not None and jax.process_index() == 0:
            place = epath.Path(recipe.output) / "model" / scalar_rm.TEMPLATE_FILE
            place.write_bytes(prompts.template_path(template).read_bytes())


def due(run: Run, done: int) -> bool:
    """Whether the held-out examples are to be measured after `done` steps, and were not before."""
    every = run.recipe.eval_every
    return (done in (0, run.recipe.steps) or (every > 0 and done % every == 0)) and done not in run.known


def logits_of(
    begun: Start, params: dict[str, jax.Array], encoded: Sequence[Ids], heed: Callable[[], None] = lambda: None
) -> np.ndarray:
    """The logits of encoded texts, in their order, computed in batches of similar length; `heed` is called before each."""
    policy = begun.policy
    compute: Callable[[dict, Texts], jax.Array] = jax.jit(functools.partial(scalar_step.logits_of, policy))
    order = sorted(range(len(encoded)), key=lambda i: sum(map(len, encoded[i])))
    found = np.zeros(len(encoded), np.float32)
    size = _ROWS * rows_of(policy.mesh)
    for at in range(0, len(order), size):
        heed()
        mine = order[at : at + size]
        rows = [encoded[i] for i in np.resize(mine, size)]
        batch = scalar_batches.batch(rows, [False] * size, np.ones(size))
        found[mine] = fetch(compute(params, scalar_step.put(batch, policy)), policy.mesh)[: len(mine)]
    return found


def _write(run: Run, done: int, batch: Texts, scalars: dict[str, jax.Array]) -> None:
    """The metrics of a step that the device has finished or will have soon."""
    values = {name: float(value) for name, value in jax.device_get(scalars).items()}
    seconds, tokens = run.seconds(), int(batch.lengths.sum() + batch.counts.sum())
    context = float(np.mean(batch.lengths + batch.counts)) / 2
    work = flops.model_flops(run.begun.policy.config, 0, tokens, context)
    run.metrics.write(done, values | metrics.speed(tokens, work, seconds))
