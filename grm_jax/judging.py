"""From examples and a judge to the judgments of each. The only place that knows the order in which responses were shown.

1. An example's responses get an order a sample, and each distinct prompt is cut, rendered and tokenised once.
2. `judged`: samples keep one batch full across examples; each text is parsed, its scores put back into the example's own
   order, and an example's judgments come when all of them are in.
3. `in_rounds` asks for a few samples at a time where an example may stop early (`stopping`).

Greedy judgments are further samples of the same prompts: they are drawn beside the others, so a prompt is prefilled once
for both, and take no part in the vote. Greedy sample g has number `votes` + g, and the order of sample g.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import jax

from grm_jax import expected, neutral, prompts, reading, stopping
from grm_jax import tokenizer as tokenizers
from grm_jax.config import JudgeSettings
from grm_jax.datatypes import Example, Judgment, Message, Usage, stable_hash
from grm_jax.dealing import by_length, distinct, orders
from grm_jax.models.decoder import Model
from grm_jax.sampler import Completion, Forcing, Plan, Request, Sampling, common_prefix, sample

_PEEK = 16  # examples whose prompts tell how long the shared head is
_AHEAD = 4  # batches of prompts that are sorted by length together; verdicts come that much out of order


class Writer(Protocol):
    """What writes judgments: a `Grm`."""

    model: Model

    def need_tokenizer(self) -> tokenizers.Tokenizer: ...

    @property
    def token_bytes(self) -> list[bytes]: ...


@dataclasses.dataclass(frozen=True)
class Judged:
    """An example with its judgments, what they cost, and the greedy ones beside them."""

    example: Example
    judgments: list[Judgment]
    usage: Usage
    greedy: list[Judgment]


@dataclasses.dataclass(frozen=True)
class _Task:
    """An example being judged: its prompts by order, and what its samples have brought so far."""

    example: Example
    orders: list[tuple[int, ...]]  # a sample
    requests: list[Request]
    prompt_tokens: int  # of the distinct prompts of this and earlier rounds
    cut_tokens: int
    done: dict[int, Judgment] = dataclasses.field(default_factory=dict)
    started: list[float] = dataclasses.field(default_factory=list)


def prompt_ids(tokenizer: tokenizers.Tokenizer, messages: tuple[Message, ...]) -> tuple[int, ...]:
    return tuple(tokenizer.encode(tokenizer.chat(messages)))


def _hint_tokens(
    tokenizer: tokenizers.Tokenizer, template: prompts.Template, example: Example, hint: prompts.Hint
) -> int:
    """Tokens that a hint adds to a prompt, counted on the example without its texts.

    The best response is shown last, where its number has the most digits.
    """
    n = len(example.responses)
    bare = Example(example.id, (Message("user", "?"),), ("?",) * n)
    order = tuple(sorted(range(n), key=lambda i: i == hint.best))
    told, untold = (len(prompt_ids(tokenizer, prompts.render(bare, order, template, h))) for h in (hint, None))
    return told - untold


def _prepare(
    grm: Writer, template: prompts.Template, example: Example, settings: JudgeSettings, forcing: Forcing | None,
    hint: prompts.Hint | None, drawn: range, greedy: int,
) -> _Task:  # fmt: skip
    """Cut, render and tokenise an example's distinct prompts, for the samples of these numbers and the greedy ones."""
    tokenizer, n = grm.need_tokenizer(), len(example.responses)
    numbers = reading.numbers_of(template, n)[0] if forcing else 0
    room = settings.max_new_tokens + (forcing.budget(numbers) if forcing else 0)
    if hint is not None:
        room += _hint_tokens(tokenizer, template, example, hint)
    shown, cut = prompts.fit(
        example,
        template,
        grm.model.config.max_positions - room,
        lambda messages: len(prompt_ids(tokenizer, messages)),
        tokenizer.controls,
    )
    dealt = orders(example.id, n, settings.votes, settings.seed, settings.orders)
    dealt += dealt[:greedy]
    asked_for = [*drawn, *range(settings.votes, settings.votes + greedy)]
    ids_of = {
        order: prompt_ids(tokenizer, prompts.render(shown, order, template, hint, tokenizer.controls))
        for order in {dealt[j] for j in {*range(drawn.stop), *asked_for}}  # earlier rounds' too, to count them
    }
    asked: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for j in asked_for:  # equal responses make equal prompts of different orders
        asked.setdefault(ids_of[dealt[j]], []).append((stable_hash(example.id), j))
    requests = [Request(ids, tuple(samples), numbers) for ids, samples in asked.items()]
    return _Task(example, dealt, requests, sum(map(len, set(ids_of.values()))), cut)


def check_fit(grm: Writer, template: prompts.Template, examples: Sequence[Example], settings: JudgeSettings) -> None:
    """Raise ValueError, before anything is judged, for examples that cannot be cut to fit beside a judgment.

    Tokens of a hint, and of forced scores, are counted when an example's turn comes.
    """
    tokenizer, positions = grm.need_tokenizer(), grm.model.config.max_positions
    limit = positions - settings.max_new_tokens
    if limit < 1:
        raise ValueError(
            f"max_new_tokens = {settings.max_new_tokens}: the model has {positions} positions, for a prompt too; lower it"
        )

    def tokens(messages: tuple[Message, ...]) -> int:
        return len(prompt_ids(tokenizer, messages))

    prompts.check_fit(examples, template, limit, tokens, tokenizer.controls)


def in_rounds(
    grm: Writer, template: prompts.Template, examples: list[Example], settings: JudgeSettings,
    hint_of: Callable[[Example], prompts.Hint] | None, greedy: int,
) -> Iterator[Judged]:  # fmt: skip
    """Judge examples that share a template: all samples at once, or in rounds until an example's winner is safe.

    greedy: how many greedy judgments of each, drawn in the first round.
    """
    if settings.stop_risk is None:
        yield from judged(grm, template, examples, settings, hint_of, range(settings.votes), greedy)
        return
    earlier: dict[str, Judged] = {}
    for drawn in stopping.rounds(settings.votes):
        waiting = []
        for new in judged(grm, template, examples, settings, hint_of, drawn, 0 if drawn.start else greedy):
            found, example = new, new.example
            if before := earlier.pop(example.id, None):
                judgments = [*before.judgments, *new.judgments]
                found = Judged(example, judgments, new.usage.after(before.usage), before.greedy)
            scores = [judgment.scores for judgment in found.judgments if judgment.scores is not None]
            risk = stopping.change_risk(scores, settings.votes - drawn.stop, template.low, template.high)
            if risk <= settings.stop_risk:
                yield found
            else:
                earlier[example.id] = found
                waiting.append(example)
        if not (examples := waiting):
            return


def judged(
    grm: Writer, template: prompts.Template, examples: list[Example], settings: JudgeSettings,
    hint_of: Callable[[Example], prompts.Hint] | None, drawn: range, greedy: int,
) -> Iterator[Judged]:  # fmt: skip
    """Examples that share a template: each with its samples of these numbers, when all of them are in."""
    tokenizer = grm.need_tokenizer()
    forcing, table = _forcing(grm, template, examples, settings), None
    if settings.expected_scores and template.kind != "text":
        _, low, high = reading.numbers_of(template, len(examples[0].responses))
        table = expected.number_table(grm.token_bytes, low, high)
    plan = plan_of(examples, settings, len(drawn), greedy)
    near = by_length(examples, _AHEAD * plan.groups)
    hints = (hint_of(example) if hint_of else None for example in near)
    prepared = (
        _prepare(grm, template, e, settings, forcing, h, drawn, greedy) for e, h in zip(near, hints, strict=True)
    )
    peeked = list(itertools.islice(prepared, _PEEK))
    head = common_prefix([request.prompt for task in peeked for request in task.requests])
    task_of: dict[int, _Task] = {}

    def requests() -> Iterable[Request]:
        for task in itertools.chain(peeked, prepared):
            for request in task.requests:
                task_of[id(request)] = task
                yield request

    key = jax.random.key(settings.seed, impl="threefry2x32")
    likeliest = settings.votes if greedy else None
    sampling = Sampling(
        settings.temperature, settings.top_k, settings.top_p, settings.min_p, tokenizer.eos_ids, likeliest
    )
    for completion in sample(grm.model, requests(), key, plan, sampling, head, forcing, table):
        task = task_of[id(completion.request)]
        task.started.append(time.monotonic() - completion.seconds)
        judgment = _judgment(tokenizer, template, task, completion)
        if table is not None and judgment.scores is not None and completion.sample < settings.votes:
            judgment = dataclasses.replace(judgment, values=_values(grm, template, table, judgment, completion))
        task.done[completion.sample] = judgment
        if len(task.done) == len(drawn) + greedy:
            for request in task.requests:
                del task_of[id(request)]
            beside = [task.done[settings.votes + g] for g in range(greedy)]
            yield Judged(task.example, [task.done[j] for j in drawn], _usage(task), beside)


def _forcing(
    grm: Writer, template: prompts.Template, examples: list[Example], settings: JudgeSettings
) -> Forcing | None:
    """How scores are forced, where they are to be and the template has any."""
    if not settings.force_scores or template.kind == "text":
        return None
    tokenizer, most = grm.need_tokenizer(), max(len(example.responses) for example in examples)
    among = (
        most if template.kind == "choice" else None
    )  # all examples have as many responses then, and the box one number
    return Forcing(
        reading.force_table(template, grm.token_bytes, most),
        tuple(tokenizer.encode_plain(reading.tail_of(template))),
        lambda ids, n: reading.parse(template, tokenizer.decode(ids), among or n)[0] is not None,
    )


def _values(
    grm: Writer, template: prompts.Template, table: expected.NumberTable, judgment: Judgment, completion: Completion
) -> tuple[float, ...]:
    """Expected scores in the example's own order; of a choice, its probability for the response chosen, 0 for others."""
    count, _, _ = reading.numbers_of(template, len(judgment.order))
    tokens = [grm.token_bytes[id] for id in completion.tokens]
    found, shares = expected.means(table, tokens, completion.masses, count)
    if template.kind == "choice":
        return tuple(shares[0] * score for score in judgment.scores)
    return tuple(found[judgment.order.index(i)] for i in range(len(judgment.order)))


def plan_of(examples: list[Example], settings: JudgeSettings, votes: int, greedy: int = 0) -> Plan:
    """As many rows a group as half the votes of an average distinct prompt, and as many groups as the slots allow.

    Half: a freed row then takes its prompt's next sample, so few rows idle until the slowest of their group is done.
    Where there are too few prompts to fill the slots so, a group has a row for each sample, the greedy ones too.
    """
    count = sum(distinct(len(example.responses), votes, settings.orders) for example in examples)
    each = len(examples) / count
    half = math.ceil(votes * each / 2)
    group = half if half * count >= settings.slots else math.ceil((votes + greedy) * each)
    group = min(settings.slots, group)
    return Plan(max(1, min(settings.slots // group, count)), group, settings.max_new_tokens)


def _judgment(
    tokenizer: tokenizers.Tokenizer, template: prompts.Template, task: _Task, completion: Completion
) -> Judgment:
    """A completion read: its scores, put back into the example's own order, or the reason why there are none."""
    order = task.orders[completion.sample]
    text = tokenizer.decode(completion.tokens)
    shown, reason = reading.parse(template, text, len(order))
    own = None
    if shown is not None:
        own = tuple(shown[order.index(i)] for i in range(len(order)))
    return Judgment(
        text=neutral.restore(text),
        scores=own,
        reason=reason,
        order=order,
        forced=completion.forced_from is not None,
        tokens=len(completion.tokens),
        log_prob=float(sum(completion.log_probs)),
    )


def _usage(task: _Task) -> Usage:
    return Usage(
        prompt_tokens=task.prompt_tokens,
        completion_tokens=sum(judgment.tokens for judgment in task.done.values()),
        seconds=time.monotonic() - min(task.started),
        cut_tokens=task.cut_tokens,
    )
