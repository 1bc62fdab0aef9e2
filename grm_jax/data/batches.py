"""Batches of prompts for reinforcement learning, as a grain dataset: batch s of a run is a function of (seed, s) alone.

1. Items are grouped by template. Each epoch a group is shuffled by the seed and cut into windows of up to WINDOW
   batches; inside a window items are sorted by length, so that a batch pads little. A group's last batch is filled up
   from the group's own start. Then the batches of all groups are shuffled.
2. A batch is made when it is due: each item gets an order of its responses, by (seed, id, epoch), is cut to fit,
   rendered and tokenised exactly as the judge does it.
3. What all prompts of a template begin with, its `head`, is found once from the template itself, and stored apart.
4. `stream` prefetches batches; its state says which one is next.

Several processes: each makes the same batch, whole, so that all agree on its padded size without a word; `sharding.spread`
puts on each device the rows that are its own.

Shapes: P prompts, S padded tokens, H tokens of the head, N responses.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import grain
import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from grm_jax import prompts
from grm_jax.buckets import common_prefix, power_of_two
from grm_jax.datatypes import Example, Message, stable_hash
from grm_jax.tokenizer import Tokenizer

WINDOW = 32  # batches at most whose items are sorted by length together
LEAST_TOKENS = 32  # the smallest padded prompt
HEAD_UNIT = 64  # a head is a multiple of this
MARGIN = 8  # tokens that a head stays short of where prompts part: a merge may reach over that place


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts of one template, and what their rollouts are held against; host or device arrays."""

    head: Int[np.ndarray | jax.Array, "H"]  # what all prompts of the template begin with; may be 0 long
    tokens: Int[np.ndarray | jax.Array, "P S"]  # behind the head, up to the prompt's last token; 0 is padding
    lengths: Int[np.ndarray | jax.Array, "P"]  # tokens of each row, at least 1
    labels: Float[np.ndarray | jax.Array, "P N"]  # in the order SHOWN; 0 is padding
    counts: Int[np.ndarray | jax.Array, "P"]  # responses of each row
    low: Int[np.ndarray | jax.Array, "P"]  # the template's lowest score
    high: Int[np.ndarray | jax.Array, "P"]  # the template's highest score
    choice: Bool[np.ndarray | jax.Array, "P"]  # whether the box holds the best response's number instead of scores
    items: Int[np.ndarray | jax.Array, "P"]  # a hash of the item, for its sampling keys


@dataclasses.dataclass(frozen=True)
class Shown:
    """The rows of a batch on the host: the items, uncut, and how each was shown.

    orders[p][i] is the index of the response that item p shows in slot i; cut[p] counts the tokens that did not fit.
    """

    items: list[Example]
    orders: list[tuple[int, ...]]
    cut: list[int]
    template: str


@dataclasses.dataclass(frozen=True)
class _Group:
    """The items of one template."""

    template: prompts.Template
    head: tuple[int, ...]
    items: list[Example]
    lengths: np.ndarray  # classes of it


@dataclasses.dataclass(frozen=True)
class _Row:
    """An item tokenised: ids behind the head, the order shown, the tokens cut, the hash for its keys."""

    item: Example
    ids: tuple[int, ...]
    order: tuple[int, ...]
    cut: int
    key: int


class PromptBatches:
    """`source[step]` is (Batch, Shown): the batch of that step, of numpy arrays. Thread-safe."""

    def __init__(
        self, items: Sequence[Example], template_of: Callable[[Example], prompts.Template], tokenizer: Tokenizer,
        seed: int, steps: int, size: int, max_prompt_tokens: int,
    ) -> None:  # fmt: skip
        """Group the items and find each template's head.

        Args:
            items: with labels, as `items.make_items` gives them.
            template_of: what shows an item.
            tokenizer: of the policy.
            seed: of shuffles and orders.
            steps: batches of the run.
            size: prompts of a batch.
            max_prompt_tokens: longer prompts are cut, as `prompts.fit` does.

        Raises:
            ValueError: no items, an item without labels or without a place in its template, or that cannot be cut to fit.
        """
        if not items:
            raise ValueError("no items to make batches of: give labelled examples with one best response")
        by_template: dict[prompts.Template, list[Example]] = {}
        for item in items:
            if item.scores is None:
                raise ValueError(f"item {item.id!r} has no scores: rollouts need labels to be rewarded")
            template = template_of(item)
            prompts.check_places(item, template)
            by_template.setdefault(template, []).append(item)
        self.items, self.steps, self.size = list(items), steps, size
        self.widest = max(len(item.responses) for item in items)  # N, the same in all batches
        self._tokenizer, self._seed, self._limit = tokenizer, seed, max_prompt_tokens
        self._groups = [
            _Group(template, head_of(tokenizer, template, group), group, np.array([_length_class(e) for e in group]))
            for template, group in by_template.items()
        ]
        self.epoch_steps = sum(-(-len(group.items) // size) for group in self._groups)
        self._plan = functools.lru_cache(maxsize=2)(functools.partial(_plan, self._groups, size, seed))

        def tokens(turns: tuple[Message, ...]) -> int:
            return len(_prompt_ids(tokenizer, turns))

        for group in self._groups:
            prompts.check_fit(group.items, group.template, max_prompt_tokens, tokens, tokenizer.controls)

    def __len__(self) -> int:
        return self.steps

    def __repr__(self) -> str:  # grain prints its source
        return f"PromptBatches({len(self.items)} items, {self.steps} steps of {self.size} prompts, seed {self._seed})"

    def __getitem__(self, step: int) -> tuple[Batch, Shown]:
        """The batch of a step. Raises ValueError for an item that cannot be cut to fit, naming it."""
        step = int(step)
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a run of {self.steps}: they count from 0")
        epoch, at = divmod(step, self.epoch_steps)
        number, slots = self._plan(epoch)[at]
        group = self._groups[number]
        rows = [self._row(group, slot, epoch) for slot in slots]
        width = power_of_two(max(len(row.ids) for row in rows), LEAST_TOKENS)
        shown = Shown([r.item for r in rows], [r.order for r in rows], [r.cut for r in rows], group.template.name)
        return _batch(group, rows, width, self.widest), shown

    def _row(self, group: _Group, slot: int, epoch: int) -> _Row:
        """The item in a slot of its group. Slots behind the group's end are its items again.

        Such a copy has an order and a key of its own: it may stand beside the first in a batch, and is to add to it.
        """
        copy, at = divmod(slot, len(group.items))
        item, tokenizer = group.items[at], self._tokenizer
        rng = np.random.default_rng([self._seed, stable_hash(item.id), epoch, copy])
        order = tuple(rng.permutation(len(item.responses)).tolist())
        fitted, cut = prompts.fit(
            item,
            group.template,
            self._limit,
            lambda messages: len(_prompt_ids(tokenizer, messages)),
            tokenizer.controls,
        )
        ids = _prompt_ids(tokenizer, prompts.render(fitted, order, group.template, controls=tokenizer.controls))
        size = len(group.head)
        if ids[:size] != group.head or len(ids) == size:
            raise ValueError(
                f"the prompt of item {item.id!r} does not begin with the {size} tokens that template "
                f"{group.template.name!r} fixes: the chat template looks into the texts, or time has changed it"
            )
        key = stable_hash(item.id if copy == 0 else f"{item.id} copy {copy}")
        return _Row(item, ids[size:], order, cut, key)


def head_of(tokenizer: Tokenizer, template: prompts.Template, items: Sequence[Example]) -> tuple[int, ...]:
    """The tokens that a template's prompts begin with, whatever they show; a multiple of HEAD_UNIT of them, or none.

    Found from stand-ins for the items that differ in all that a prompt may show: roles, texts, a reference, the number
    of responses (of the numbers that the items have).
    """
    references = (None, "?", "A") if "reference" in template.variables else (None,)
    talks = [(Message("user", text),) for text in ("?", "A", "b c", "1", "\n", "é")]
    talks += [(Message("system", text), Message("user", text)) for text in ("?", "A")]
    talks += [(Message("user", "?"), Message("assistant", "A"), Message("user", "?"))]
    found = []
    for n in sorted({len(item.responses) for item in items}):
        for talk in talks:
            for reference in references:
                stand_in = Example("stand-in", talk, (talk[-1].content,) * n, reference=reference)
                found.append(_prompt_ids(tokenizer, prompts.render(stand_in, tuple(range(n)), template)))
    same = len(common_prefix(found)) - MARGIN
    return found[0][: max(same - same % HEAD_UNIT, 0)]


def stream(source: PromptBatches, start_step: int = 0) -> grain.DatasetIterator[tuple[Batch, Shown]]:
    """The batches from `start_step` on, made ahead of their time by two threads of this process.

    `get_state` of the iterator gives a JSON-able state and `set_state` goes on there, whatever `start_step` was.
    """
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    batches = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    grain.experimental.set_next_index(batches, start_step)
    return batches


def _plan(groups: Sequence[_Group], size: int, seed: int, epoch: int) -> list[tuple[int, np.ndarray]]:
    """An epoch's batches in their order: the group of each, and the `size` slots of it."""
    batches: list[tuple[int, np.ndarray]] = []
    for number, group in enumerate(groups):
        count = len(group.items)
        order = np.random.default_rng([seed, epoch, stable_hash(group.template.sha256)]).permutation(count)
        filled = -(-count // size) * size
        slots = np.concatenate([order + copy * count for copy in range(-(-filled // count))])[:filled]
        # At least four windows where there are as many batches: one alone would make the same batches each epoch.
        width = max(1, min(WINDOW, filled // size // 4)) * size
        for start in range(0, filled, width):
            window = slots[start : start + width]
            window = window[np.argsort(group.lengths[window % count], kind="stable")]
            batches += [(number, part) for part in window.reshape(-1, size)]
    return [batches[i] for i in np.random.default_rng([seed, epoch]).permutation(len(batches))]


def _batch(group: _Group, rows: Sequence[_Row], width: int, widest: int) -> Batch:
    tokens = np.zeros((len(rows), width), np.int32)
    labels = np.zeros((len(rows), widest), np.float32)
    for p, row in enumerate(rows):
        tokens[p, : len(row.ids)] = row.ids
        labels[p, : len(row.order)] = [row.item.scores[i] for i in row.order]
    return Batch(
        head=np.array(group.head, np.int32),
        tokens=tokens,
        lengths=np.array([len(row.ids) for row in rows], np.int32),
        labels=labels,
        counts=np.array([len(row.order) for row in rows], np.int32),
        low=np.full(len(rows), group.template.low, np.int32),
        high=np.full(len(rows), group.template.high, np.int32),
        choice=np.full(len(rows), group.template.kind == "choice"),
        items=np.array([row.key for row in rows], np.int32),
    )


def _length_class(item: Example) -> int:
    """Quarter octaves of the characters shown: as fine as padding to powers of two can tell apart.

    Sorted by exact length, a batch would hold items that are alike in more than that, such as those of one question.
    """
    texts = (*(message.content for message in item.messages), *item.responses, item.reference or "")
    return math.ceil(4 * math.log2(max(sum(map(len, texts)), 1)))


def _prompt_ids(tokenizer: Tokenizer, messages: tuple[Message, ...]) -> tuple[int, ...]:
    return tuple(tokenizer.encode(tokenizer.chat(messages)))
