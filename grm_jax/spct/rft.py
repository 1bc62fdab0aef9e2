"""`rft`: rejective fine-tuning, stage 1 (section 3.1), from labelled items and general instructions to a trained model.

1. The model judges each item `trajectories` times without a hint, and `hinted` times with one; the judgments are rows
   in the run's folder, and a run that goes on finds them there.
2. Wrong judgments are rejected, and items that are right every time (`reject.trajectories`).
3. What is left is trained on, under the prompt WITHOUT a hint, mixed with general instructions in the given share:
   packed rows, completion-only loss, one compiled program a step (`rft_step`).
4. Accuracy on held-out examples is measured before and after; the model is written as a Hugging Face folder.

Started again with the same command, a run goes on at its newest checkpoint, bit for bit.

Departures from the paper: the prompt that is sampled from may be another template than the one that is trained on
(`sample_template`): a base model judges only after demonstrations, and its trained self has to do without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax

from grm_jax import hosts, metrics, prompts
from grm_jax.checkpoint import check_claim
from grm_jax.data import items as labelled
from grm_jax.data.chat import Chat, encode_chat, read_chats
from grm_jax.data.packing import Packed, Source, packed
from grm_jax.datatypes import Example, Message
from grm_jax.log import logger
from grm_jax.models import flops
from grm_jax.recipes import RftConfig, SampleConfig
from grm_jax.sharding import check_microbatch, spans_processes
from grm_jax.spct import reject, rft_step, runs, start
from grm_jax.spct.runs import Run
from grm_jax.spct.sample import Sample, check_places, read_samples, sample_part
from grm_jax.spct.start import Start
from grm_jax.tokenizer import Tokenizer
from grm_jax.train import policy as training


def run(recipe: RftConfig) -> None:
    """Fine-tune the recipe's model into `output`/model.

    Raises ValueError for bad input before a model is loaded, KeyboardInterrupt when asked to stop (the state is saved).
    """
    found = labelled.ItemSet([], [], {})
    if recipe.items.files:
        found = labelled.load(recipe.items, recipe.seed)
        runs.say_items(found)
    chats = [chat for file in recipe.general for chat in read_chats(file)]
    _check_templates(recipe, found)
    check_claim(recipe.output, recipe)
    begun = start.load(recipe, reference=False)
    _check_turns(chats, begun.tokenizer)
    check_microbatch("microbatch_rows", recipe.microbatch_rows, begun.policy.mesh)
    kept = collect(recipe, found, begun) if found.train else []
    sources = mixture(recipe, begun.tokenizer, kept, chats, runs.template_of(recipe, found))
    stream, too_long = packed(
        sources, recipe.batch_tokens // recipe.sequence_tokens, recipe.sequence_tokens, recipe.seed
    )
    optimizer = training.make_optimizer(recipe.optimizer, recipe.steps)
    state = training.start(begun.params, optimizer, begun.policy.mesh)
    step = rft_step.make_step(begun.policy, recipe, optimizer, state)
    with runs.opened(recipe, begun, found, state, iter(stream)) as run:
        run.measured(run.first)
        for number in range(run.first, recipe.steps):
            batch = next(run.batches)
            with run.traced(number):
                run.state, scalars = step(run.state, begun.frozen, rft_step.put(batch, begun.policy))
            run.settled(scalars)
            run.reported(functools.partial(_write, run, number + 1, batch, scalars))
            run.kept(number + 1)
            run.measured(number + 1)
        for name, count in too_long.counts().items():
            logger.info("%d texts of %s were longer than a row of %d tokens", count, name, recipe.sequence_tokens)
        start.save(begun, run.state, recipe.output)


def _check_templates(recipe: RftConfig, found: labelled.ItemSet) -> None:
    """Raise ValueError for items that the template of the sampling or that of the training has no place for."""

    def name_of(template: str) -> Callable[[Example], str]:
        return lambda item: labelled.template_of(item, found.scales, template)

    check_places(found.train, name_of(recipe.sample_template or recipe.template), hinted=recipe.hinted > 0)
    check_places([*found.train, *found.held_out], name_of(recipe.template), hinted=False)


def _check_turns(chats: Sequence[Chat], tokenizer: Tokenizer) -> None:
    """Raise ValueError, naming the first conversation, for roles that the chat template refuses."""
    first: dict[tuple[str, ...], Chat] = {}
    for chat in chats:
        first.setdefault(tuple(message.role for message in chat.messages), chat)
    for roles, chat in first.items():
        try:
            encode_chat(tokenizer, tuple(Message(role, "text") for role in roles))
        except ValueError as error:
            raise ValueError(f"general instruction {chat.id!r}: {error}, or leave such out") from error


def collect(recipe: RftConfig, found: labelled.ItemSet, begun: Start) -> list[Sample]:
    """The trajectories to train on: sampled into the run's folder where they are not there yet, then rejected."""
    unhinted = _sampled(recipe, found, begun, hinted=False) if recipe.trajectories else []
    hinted = _sampled(recipe, found, begun, hinted=True) if recipe.hinted else []
    kept, rejected = reject.trajectories(unhinted, hinted)
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(rejected.items()))
    logger.info("%d of %d trajectories kept; rejected: %s", len(kept), len(unhinted) + len(hinted), told or "none")
    if not kept:
        raise ValueError(
            f"all {len(unhinted) + len(hinted)} trajectories were rejected ({told}): a base model needs "
            "demonstrations in its prompt (sample_template = 'listwise_demos'), more items, or hints"
        )
    return kept


def _sampled(recipe: RftConfig, found: labelled.ItemSet, begun: Start, hinted: bool) -> list[Sample]:
    config = SampleConfig(
        items=recipe.items,
        output=f"{recipe.output}/trajectories{'-hinted' if hinted else ''}.jsonl",
        model=recipe.model,
        votes=recipe.hinted if hinted else recipe.trajectories,
        hinted=hinted,
        temperature=recipe.temperature,
        max_new_tokens=recipe.max_new_tokens,
        seed=recipe.seed,
        slots=recipe.slots,
        dtype=recipe.compute_dtype,
    )
    template = recipe.sample_template or recipe.template

    def name_of(item: Example) -> str:
        return labelled.template_of(item, found.scales, template)

    share = hosts.share(lockstep=spans_processes(begun.policy.mesh))
    sample_part(config, found.train, name_of, share, lambda: begun.judge(begun.params))
    hosts.sync(config.output)  # every process reads what is written
    return read_samples(config.output)


def mixture(
    recipe: RftConfig,
    tokenizer: Tokenizer,
    kept: Sequence[Sample],
    chats: Sequence[Chat],
    template_of: Callable[[Example], prompts.Template],
) -> list[Source]:
    """Trajectories and general instructions, each with its share of the training texts."""

    def of_sample(sample: Sample) -> tuple[list[int], list[int]]:
        example = sample.example
        turns = prompts.render(example, sample.order, template_of(example), controls=tokenizer.controls)
        return encode_chat(tokenizer, (*turns, Message("assistant", sample.text)))

    return [
        Source(kept, of_sample, 1 - recipe.general_share, "the judgments"),
        Source(
            chats, lambda chat: encode_chat(tokenizer, chat.messages), recipe.general_share, "the general instructions"
        ),
    ]


def _write(run: Run, done: int, batch: Packed, scalars: dict[str, jax.Array]) -> None:
    """The metrics of a step that the device has finished or will have soon."""
    values = {name: float(value) for name, value in jax.device_get(scalars).items()}
    seconds = run.seconds()
    context = float((batch.positions * (batch.segments > 0)).sum() / max(int((batch.segments > 0).sum()), 1))
    work = flops.model_flops(run.begun.policy.config, 0, int((batch.segments > 0).sum()), context)
    run.metrics.write(done, values | metrics.speed(values["tokens"], work, seconds))
