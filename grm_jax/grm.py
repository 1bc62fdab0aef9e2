"""The judge: examples in, verdicts out. The only place that knows the order in which responses were shown.

What `judge` does:
1. each of an example's k samples gets an order of the responses, by a seed; equal orders are one distinct prompt;
2. the prompts are cut to fit, rendered and tokenised; those of one template share its head, prefilled once;
3. the sampler draws the samples, forcing scores where a text holds none and the caller wants them;
4. each text is parsed, and its scores go back to the example's own order;
5. where there is a meta RM, it gives each sample a logit, a few examples at once;
6. they are voted (Eq. 14) into its verdict, guided by the logits.

Where it departs from the paper (section 5, each sample shuffled by itself): the n! orders are dealt out in turn from a
shuffled deck, so each sample's order is still uniform, and no order comes up again before all n! have.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, cached_property, partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grm_jax import expected, neutral, prompts, reading, stopping
from grm_jax import tokenizer as tokenizers
from grm_jax.config import Dtype, JudgeSettings
from grm_jax.datatypes import Example, Judgment, Message, Usage, Verdict, stable_hash
from grm_jax.dealing import by_length, orders
from grm_jax.models.decoder import Model, bind
from grm_jax.sampler import Completion, Forcing, Plan, Request, Sampling, common_prefix, generate, sample
from grm_jax.sharding import DECODING, Rules
from grm_jax.verdicts import verdict
from grm_jax.weights.adapters import is_adapter_folder, load_adapters, merge_into
from grm_jax.weights.decoder import load_decoder
from grm_jax.weights.embedded import EMBEDDED

_PEEK = 16  # examples whose prompts tell how long the shared head is
_GUIDED = 16  # examples whose judgments a meta RM reads together
_AHEAD = 4  # batches of prompts that are sorted by length together; verdicts come that much out of order
_WINDOW = 256  # examples taken together where a file needs several templates


class Guide(Protocol):
    """What guides a vote: a `MetaRm`, or anything else that says how far judgments can be trusted."""

    def logits_of(self, judged: Sequence[tuple[Example, Sequence[Judgment]]]) -> Sequence[Sequence[float]]:
        """One number a judgment of each example; higher is better."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """One continuation of a raw prompt; log_probs: one a token, under the distribution that it was drawn from."""

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    ended: bool  # by an end id, not by the budget


@dataclasses.dataclass(frozen=True)
class _Task:
    """An example being judged: its prompts by order, and what its samples have brought so far."""

    example: Example
    orders: list[tuple[int, ...]]  # a sample
    requests: list[Request]
    cut_tokens: int
    done: dict[int, Judgment] = dataclasses.field(default_factory=dict)
    started: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Grm:
    """A generative reward model: a decoder, its tokenizer (None for a folder without one), and its default templates."""

    model: Model
    tokenizer: tokenizers.Tokenizer | None
    name: str
    demos: bool = False  # its templates carry worked demonstrations: it was not tuned to judge

    def score(
        self, examples: Sequence[Example], votes: int = 8, seed: int = 0, meta_rm: Guide | None = None,
        **settings: float | str | bool | None,
    ) -> list[Verdict]:  # fmt: skip
        """A verdict for each example, in their order; `settings` are further fields of `JudgeSettings`.

        meta_rm: chooses the judgments that are summed. Raises ValueError for ids that occur twice, settings out of range,
        or a prompt that cannot be cut to fit.
        """
        asked = JudgeSettings(votes=votes, seed=seed, **settings)
        verdicts = {v.id: v for v in self.judge(examples, asked, meta_rm=meta_rm)}
        return [verdicts[example.id] for example in examples]

    def judge(
        self, examples: Sequence[Example], settings: JudgeSettings,
        template_of: Callable[[Example], prompts.Template] | None = None,
        hint_of: Callable[[Example], prompts.Hint] | None = None,
        meta_rm: Guide | None = None,
    ) -> Iterator[Verdict]:  # fmt: skip
        """Verdicts as they come to be, in no order. The samples keep one batch full across examples.

        template_of: what shows an example; by default `template` of its number of responses. hint_of: the truth that is
        told at the end of an example's prompt (hinted sampling, section 3.1). meta_rm: as in `score`. Raises ValueError:
        ids that occur twice, a hint or example that the template has no place for, a prompt that cannot be cut to fit,
        settings that the vote cannot have together.
        """
        settings.check_vote(guided=meta_rm is not None)
        seen: set[str] = set()
        for example in examples:
            if example.id in seen:
                raise ValueError(
                    f"example id {example.id!r} occurs twice: ids name an example's samples, make them unique"
                )
            seen.add(example.id)
        by_n = cache(partial(self.template, settings=settings))
        template_of = template_of or (lambda example: by_n(len(example.responses)))
        mixed = len({template_of(example) for example in examples}) > 1
        window = _WINDOW if mixed else max(len(examples), 1)  # verdicts of a mixed file stay near their order
        for start in range(0, len(examples), window):
            alike: dict[tuple[prompts.Template, int], list[Example]] = {}
            for example in examples[start : start + window]:
                template = template_of(example)
                among = len(example.responses) if template.kind == "choice" else 0  # what its box may hold
                alike.setdefault((template, among), []).append(example)
            for (template, _), group in alike.items():
                found = _in_rounds(self, template, group, settings, hint_of)
                yield from _guided(found, meta_rm, settings.k_meta) if meta_rm else itertools.starmap(verdict, found)

    def template(self, n: int, settings: JudgeSettings) -> prompts.Template:
        """The template that shows n responses."""
        return prompts.load_template(settings.template) if settings.template else prompts.template_for(n, self.demos)

    def generate(
        self, texts: Sequence[str], k: int = 1, *, max_new_tokens: int = 256, seed: int = 0, temperature: float = 1.0,
        top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, slots: int = 32,
    ) -> list[list[Generated]]:  # fmt: skip
        """k continuations of each raw prompt: result[i][j] is sample j of texts[i].

        No chat template is put around a text; the begin token stands before it where the model's texts have one.
        """
        tokenizer = self.need_tokenizer()
        sampling = Sampling(temperature, top_k, top_p, min_p, tokenizer.eos_ids)
        start = tokenizer.start
        ids = [tokenizer.encode(text if start and text.startswith(start) else start + text) for text in texts]
        rows = generate(
            self.model, ids, k, jax.random.key(seed, impl="threefry2x32"),
            max_new_tokens=max_new_tokens, sampling=sampling, slots=slots,
        )  # fmt: skip
        return [[Generated(tokenizer.decode(c.tokens), c.tokens, c.log_probs, c.ended) for c in row] for row in rows]

    def logits(self, token_ids: Int[Array, "B T"] | Int[np.ndarray, "B T"]) -> Float[Array, "B T V"]:
        """Next-token logits at every position, float32; each row starts at position 0."""
        tokens = jnp.asarray(token_ids, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return _forward(self.model.graph, self.model.params, tokens, positions)

    def need_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer, or ValueError for a model that was loaded without one."""
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer files: put tokenizer.json or tokenizer.model in its folder")
        return self.tokenizer

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each id of the model's vocabulary."""
        return vocabulary_bytes(self.need_tokenizer(), self.model.config.vocab_size)


def vocabulary_bytes(tokenizer: tokenizers.Tokenizer, size: int) -> list[bytes]:
    """The bytes of each of a model's `size` ids, which may be more or fewer than the tokenizer's."""
    table = tokenizer.token_bytes()
    return [*table, *[b""] * (size - len(table))][:size]


@partial(jax.jit, static_argnames="graph")
def _forward(graph: object, params: dict[str, jax.Array], tokens: jax.Array, positions: jax.Array) -> jax.Array:
    model = bind(graph, params)
    hidden, _ = model(tokens, positions)
    return model.logits(hidden)


def _prompt_ids(tokenizer: tokenizers.Tokenizer, messages: tuple[Message, ...]) -> tuple[int, ...]:
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
    told, untold = (len(_prompt_ids(tokenizer, prompts.render(bare, order, template, h))) for h in (hint, None))
    return told - untold


def _prepare(
    grm: Grm, template: prompts.Template, example: Example, settings: JudgeSettings, forcing: Forcing | None,
    hint: prompts.Hint | None, drawn: range,
) -> _Task:  # fmt: skip
    """Cut, render and tokenise an example's distinct prompts, for the samples of these numbers."""
    tokenizer, n = grm.need_tokenizer(), len(example.responses)
    numbers = reading.numbers_of(template, n)[0] if forcing else 0
    room = settings.max_new_tokens + (forcing.budget(numbers) if forcing else 0)
    if hint is not None:
        room += _hint_tokens(tokenizer, template, example, hint)
    shown, cut = prompts.fit(
        example,
        template,
        grm.model.config.max_positions - room,
        lambda messages: len(_prompt_ids(tokenizer, messages)),
        tokenizer.specials,
    )
    dealt = orders(example.id, n, settings.votes, settings.seed)
    ids_of = {
        order: _prompt_ids(tokenizer, prompts.render(shown, order, template, hint, tokenizer.specials))
        for order in {dealt[j] for j in drawn}
    }
    asked: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for j in drawn:  # equal responses make equal prompts of different orders
        asked.setdefault(ids_of[dealt[j]], []).append((stable_hash(example.id), j))
    return _Task(example, dealt, [Request(ids, tuple(samples), numbers) for ids, samples in asked.items()], cut)


def _in_rounds(
    grm: Grm, template: prompts.Template, examples: list[Example], settings: JudgeSettings,
    hint_of: Callable[[Example], prompts.Hint] | None,
) -> Iterator[tuple[Example, list[Judgment], Usage]]:  # fmt: skip
    """Judge examples that share a template: all samples at once, or in rounds until an example's winner is safe."""
    if settings.stop_risk is None:
        yield from _judge_with(grm, template, examples, settings, hint_of, range(settings.votes))
        return
    earlier: dict[str, tuple[list[Judgment], Usage]] = {}
    for drawn in stopping.rounds(settings.votes):
        waiting = []
        for example, new, usage in _judge_with(grm, template, examples, settings, hint_of, drawn):
            judgments, before = earlier.pop(example.id, ([], None))
            judgments, usage = [*judgments, *new], usage.after(before)
            found = [judgment.scores for judgment in judgments if judgment.scores is not None]
            risk = stopping.change_risk(found, settings.votes - drawn.stop, template.low, template.high)
            if risk <= settings.stop_risk:
                yield example, judgments, usage
            else:
                earlier[example.id] = judgments, usage
                waiting.append(example)
        if not (examples := waiting):
            return


def _guided(
    found: Iterator[tuple[Example, list[Judgment], Usage]], meta_rm: Guide, k_meta: int | None
) -> Iterator[Verdict]:
    """Verdicts guided by the logits of each example's judgments, a few examples at once."""
    while share := list(itertools.islice(found, _GUIDED)):
        of_example = meta_rm.logits_of([(example, judgments) for example, judgments, _ in share])
        for (example, judgments, usage), logits in zip(share, of_example, strict=True):
            yield verdict(example, judgments, usage, logits, k_meta)


def _judge_with(
    grm: Grm, template: prompts.Template, examples: list[Example], settings: JudgeSettings,
    hint_of: Callable[[Example], prompts.Hint] | None, drawn: range,
) -> Iterator[tuple[Example, list[Judgment], Usage]]:  # fmt: skip
    """Judge examples that share a template: each with its samples of these numbers, when all of them are in."""
    tokenizer = grm.need_tokenizer()
    forcing, table = _forcing(grm, template, examples, settings), None
    if settings.expected_scores and template.kind != "text":
        _, low, high = reading.numbers_of(template, len(examples[0].responses))
        table = expected.number_table(grm.token_bytes, low, high)
    plan = _plan(examples, settings, len(drawn))
    near = by_length(examples, _AHEAD * plan.groups)
    hints = (hint_of(example) if hint_of else None for example in near)
    prepared = (_prepare(grm, template, e, settings, forcing, h, drawn) for e, h in zip(near, hints, strict=True))
    peeked = list(itertools.islice(prepared, _PEEK))
    head = common_prefix([request.prompt for task in peeked for request in task.requests])
    task_of: dict[int, _Task] = {}

    def requests() -> Iterable[Request]:
        for task in itertools.chain(peeked, prepared):
            for request in task.requests:
                task_of[id(request)] = task
                yield request

    key = jax.random.key(settings.seed, impl="threefry2x32")
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.min_p, tokenizer.eos_ids)
    for completion in sample(grm.model, requests(), key, plan, sampling, head, forcing, table):
        task = task_of[id(completion.request)]
        task.started.append(time.monotonic() - completion.seconds)
        judgment = _judgment(tokenizer, template, task, completion)
        if table is not None and judgment.scores is not None:
            judgment = dataclasses.replace(judgment, values=_values(grm, template, table, judgment, completion))
        task.done[completion.sample] = judgment
        if len(task.done) == len(drawn):
            for request in task.requests:
                del task_of[id(request)]
            yield task.example, [task.done[j] for j in drawn], _usage(task)


def _forcing(grm: Grm, template: prompts.Template, examples: list[Example], settings: JudgeSettings) -> Forcing | None:
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
    grm: Grm, template: prompts.Template, table: expected.NumberTable, judgment: Judgment, completion: Completion
) -> tuple[float, ...]:
    """Expected scores in the example's own order; of a choice, its probability for the response chosen, 0 for others."""
    count, _, _ = reading.numbers_of(template, len(judgment.order))
    tokens = [grm.token_bytes[id] for id in completion.tokens]
    found, shares = expected.means(table, tokens, completion.masses, count)
    if template.kind == "choice":
        return tuple(shares[0] * score for score in judgment.scores)
    return tuple(found[judgment.order.index(i)] for i in range(len(judgment.order)))


def _plan(examples: list[Example], settings: JudgeSettings, votes: int) -> Plan:
    """As many rows a group as half the samples of an average distinct prompt, and as many groups as the slots allow.

    Half: a freed row then takes its prompt's next sample, so few rows idle until the slowest of their group is done.
    Where there are too few prompts to fill the slots so, a group has a row for each sample.
    """
    distinct = sum(min(votes, math.factorial(min(len(example.responses), 20))) for example in examples)
    average = votes * len(examples) / distinct
    half = math.ceil(average / 2)
    group = min(settings.slots, half if half * distinct >= settings.slots else math.ceil(average))
    return Plan(max(1, min(settings.slots // group, distinct)), group, settings.max_new_tokens)


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
        prompt_tokens=sum(len(request.prompt) for request in task.requests),
        completion_tokens=sum(judgment.tokens for judgment in task.done.values()),
        seconds=time.monotonic() - min(task.started),
        cut_tokens=task.cut_tokens,
    )


def load(
    model: str = "smollm2-135m",
    dtype: Dtype | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = DECODING,
) -> Grm:
    """Load a judge: an embedded model by name, a Hugging Face folder, a .gguf file, or a folder of adapters (local or gs://).

    Adapters (PEFT's LoRA) are merged into the base that they name, whose tokenizer is used.
    dtype: of weights and caches; by default float32 on CPU, bfloat16 elsewhere. mesh: of `sharding.lay_out` or
    `sharding.make_mesh`; by default one device on CPU, and elsewhere all of this process's, which share the batch. rules:
    how the weights lie on it. Raises FileNotFoundError and ValueError as the loaders of `weights` and `tokenizer` do.
    """
    if model not in EMBEDDED and is_adapter_folder(model):
        base, lora, adapters = load_adapters(model)
        found = load(base, dtype, mesh, rules)
        merged = dataclasses.replace(found.model, params=merge_into(found.model.params, adapters, lora))
        return Grm(merged, found.tokenizer, str(model))
    found, tokenizer = load_decoder(model, dtype, mesh, rules)
    if found.config.scalar:
        raise ValueError(f"{model} has a scalar head and writes nothing: it guides a judge, as --meta-rm {model}")
    return Grm(found, tokenizer, str(model), demos=model in EMBEDDED)
