"""Training of the paper's baselines: a scalar head that learns from preferences (sections 4.1 and C.1).

1. `bradley_terry`: each item's best response against each other one, -log sigmoid of the difference of their rewards.
2. `pair_rm`: whether the first of two responses is the better one, both orders, binary cross-entropy.
3. `cloud`: the critic writes critiques of every response first, into the run's folder, where an interrupted run goes on;
   then as 1, with a critique behind each response.

Before, between (`eval_every`) and after the steps the held-out examples are scored as a user would score them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence

from etils import epath

from grm_jax import baselines, grm, hosts, losses, prompts
from grm_jax.checkpoint import check_claim
from grm_jax.config import JudgeSettings
from grm_jax.data import items as labelled
from grm_jax.data.shares import part_of, shared_writer
from grm_jax.datatypes import Example, Verdict
from grm_jax.grm import Grm
from grm_jax.log import logger
from grm_jax.meta_rm import text_ids
from grm_jax.models.decoder import Model
from grm_jax.recipes import CloudConfig, PairsConfig
from grm_jax.sharding import lay_out, spans_processes
from grm_jax.spct import meta, runs, scalar
from grm_jax.spct.measure import measured
from grm_jax.spct.runs import Run
from grm_jax.spct.scalar_batches import Entry, Ids, TextBatches
from grm_jax.spct.scalar_step import Objective
from grm_jax.spct.start import Start

PREFERENCE = Objective(losses.bradley_terry, losses.better_first, group=2)

Scorer = Callable[[Model, Sequence[Example]], Iterable[Verdict]]


def bradley_terry(recipe: PairsConfig) -> None:
    """Train the recipe's model into `output`/model. Errors as `meta.run`."""
    found, begun, limit = _begin(recipe)

    def encode(item: Example, best: int, other: int) -> list[Ids]:
        return [baselines.response_ids(begun.tokenizer, item, i, limit) for i in (best, other)]

    entries = [
        Entry(functools.partial(encode, item, best, other), (True, False), _characters(item, best, other), weight)
        for item, best, other, weight in pairs(found.train)
    ]

    def score(model: Model, examples: Sequence[Example]) -> Iterable[Verdict]:
        return baselines.BradleyTerry(model, begun.tokenizer).judge(examples, JudgeSettings())

    _train(recipe, found, begun, entries, PREFERENCE, score)


def pair_rm(recipe: PairsConfig) -> None:
    """Train the recipe's model into `output`/model. Errors as `meta.run`."""
    name = recipe.template or baselines.PAIR
    template = prompts.load_template(name, boxed=False)
    found, begun, limit = _begin(recipe)

    def encode(item: Example, first: int, second: int) -> list[Ids]:
        return [baselines.pair_ids(begun.tokenizer, template, item, first, second, limit)]

    entries = [
        Entry(functools.partial(encode, item, *order), (order[0] == best,), _characters(item, *order), weight)
        for item, best, other, weight in pairs(found.train)
        for order in ((best, other), (other, best))
    ]

    def score(model: Model, examples: Sequence[Example]) -> Iterable[Verdict]:
        return baselines.PairRm(model, begun.tokenizer, template).judge(examples, JudgeSettings())

    _train(recipe, found, begun, entries, meta.OBJECTIVE, score, name)


def cloud(recipe: CloudConfig) -> None:
    """Train the recipe's model, a value head for its critic, into `output`/model. Errors as `meta.run`."""
    check_claim(recipe.output, recipe)
    name = recipe.template or baselines.CRITIQUE
    template = prompts.load_template(name, boxed=False)
    found, begun, limit = _begin(recipe)
    critic = grm.load(recipe.critic, recipe.compute_dtype, lay_out(recipe.mesh, recipe.devices, everywhere=True))
    written = critiques(recipe, found.train, critic, template)

    def encode(item: Example, best: int, other: int, j: int) -> list[Ids]:
        alone = [baselines.single(item, i) for i in (best, other)]
        return [text_ids(begun.tokenizer, template, one, (0,), written[one.id][j], limit) for one in alone]

    entries = [
        Entry(functools.partial(encode, item, best, other, j), (True, False), _characters(item, best, other), weight)
        for item, best, other, weight in pairs(found.train)
        for j in range(recipe.critiques)
    ]

    def score(model: Model, examples: Sequence[Example]) -> Iterable[Verdict]:
        return baselines.Cloud(critic, model, begun.tokenizer, template).judge(examples, _settings(recipe))

    _train(recipe, found, begun, entries, PREFERENCE, score, name)


def pairs(items: Sequence[Example]) -> list[tuple[Example, int, int, float]]:
    """(Item, its best response, another, weight) of every item; all pairs of one item weigh 1 together."""
    found = []
    for item in items:
        best = item.scores.index(max(item.scores))
        others = [i for i in range(len(item.responses)) if i != best]
        found += [(item, best, other, 1 / len(others)) for other in others]
    return found


def _characters(item: Example, *shown: int) -> int:
    return sum(len(message.content) for message in item.messages) + sum(len(item.responses[i]) for i in shown)


def _begin(recipe: PairsConfig) -> tuple[labelled.ItemSet, Start, int]:
    """The items, those of one response dropped and counted; the model with its head; and how many tokens it takes."""
    found = labelled.load(recipe.items, recipe.seed)
    train, held_out = ([item for item in part if len(item.responses) > 1] for part in (found.train, found.held_out))
    single = len(found.train) + len(found.held_out) - len(train) - len(held_out)
    dropped = found.dropped | ({"single response, which is no preference": single} if single else {})
    found = dataclasses.replace(found, train=train, held_out=held_out, dropped=dropped)
    runs.say_items(found)
    if not train:
        raise ValueError(
            f"no pairs to train on in {', '.join(recipe.items.files)}: give examples of two or more responses"
        )
    begun = scalar.begin(recipe)
    return found, begun, min(recipe.max_tokens, begun.policy.config.max_positions)


def _settings(recipe: CloudConfig) -> JudgeSettings:
    return JudgeSettings(
        votes=recipe.critiques,
        temperature=recipe.temperature,
        seed=recipe.seed,
        max_new_tokens=recipe.max_new_tokens,
        force_scores=False,
        slots=recipe.slots,
    )


def critiques(
    recipe: CloudConfig, items: Sequence[Example], critic: Grm, template: prompts.Template
) -> dict[str, list[str]]:
    """The critiques of every response of the items, by the id of `baselines.single`; sampled where they are not there."""
    singles = [baselines.single(item, i) for item in items for i in range(len(item.responses))]
    share = hosts.share(lockstep=spans_processes(critic.model.mesh))
    path = f"{recipe.output}/critiques.jsonl"
    paths = [part_of(path, dataclasses.replace(share, index=i)) for i in range(share.count)]
    mine, settings = singles[share.index :: share.count], _settings(recipe)
    known = settings.record() | {"critic": recipe.critic, "template": template.sha256}
    with shared_writer(share, path, mine, known, each=recipe.critiques) as writer:
        waiting = [one for one in mine if one.id not in writer.finished]
        logger.info("%d of %d responses to write critiques of", len(waiting), len(mine))
        for found in baselines.critiques(critic, waiting, template, settings):
            rows = [{"id": found.id, "sample": j, "text": one.text} for j, one in enumerate(found.judgments)]
            writer.write(found, rows)
    hosts.sync(path)  # every process reads the parts of all
    written: dict[str, list[str]] = {}
    for part in paths:
        for line in epath.Path(part).read_text().splitlines():
            row = json.loads(line)
            written.setdefault(row["id"], []).append(row["text"])
    return written


def _train(
    recipe: PairsConfig, found: labelled.ItemSet, begun: Start, entries: Sequence[Entry], objective: Objective,
    score: Scorer, template: str | None = None,
) -> None:  # fmt: skip
    def measure(run: Run, done: int) -> None:
        if not found.held_out or not scalar.due(run, done):
            return
        run.reported(None)  # the time of a step is none of the measurement's
        policy = begun.policy
        model = Model(policy.config, policy.graph, policy.working(run.state.params, {}), policy.mesh)
        result = measured(found.held_out, run.heeded(score(model, found.held_out), done), recipe.seed)
        logger.info("after %d steps: %s", done, result)
        run.metrics.held_out(done, dataclasses.asdict(result))
        run.seconds()

    source = TextBatches(entries, recipe.seed, recipe.steps, recipe.batch)
    scalar.train(recipe, begun, source, objective, measure, template)
