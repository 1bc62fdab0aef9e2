"""Continuous batching: keep the batch full while samples of different lengths come and go.

1. The tokens that all prompts share (the template's head) are prefilled once a run.
2. A batch is P groups of G rows. A group holds one distinct prompt, prefilled once; its rows are samples of it.
3. The device decodes a few steps for all rows; then the host takes what ended, starts the prompt's next sample in the
   freed row, or, when a group has no sample left, the next prompt in the freed group.
4. A row that ended without scores, where scores are to be forced, goes on: it writes the tail that opens the box and then
   draws under the automaton's mask.
5. A prompt is prefilled at a width a little above its own length. The prompt cache's width follows the longest prompt in
   the batch, the ring of own tokens the longest row, both by powers of two: short ones do not pay for the longest.

A sample depends on (key, item, sample index) and its prompt alone: not on the batch, its neighbours or the devices.
On a mesh that spans processes each of them runs this loop, on the same requests, and all take the same steps.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from grm_jax import scores
from grm_jax.buckets import stepped
from grm_jax.expected import NumberTable
from grm_jax.models.attention import NOWHERE, Keys
from grm_jax.models.decoder import Model
from grm_jax.sampler import rollout
from grm_jax.sampler.draw import Sampling
from grm_jax.sampler.requests import Completion, Forcing, Plan, Request, check_length, common_prefix, power_of_two
from grm_jax.sharding import fetch, place, replicated, rows_of, spread

_LEAST_BUCKET = 32  # slots of the smallest prompt bucket
_STEP = 128  # tokens; widths of prompts between powers of two are no closer, since each is compiled
_CACHE_STEP = 512  # slots; the same of the cache that prompts have in a batch
_LEAST_RING = 128  # slots of the smallest ring
_HEAD_STEP = 64  # tokens; what is left of a shared head is prefilled with each prompt


@dataclasses.dataclass
class _Row:
    """A sample under way, on the host."""

    request: Request
    item: int
    sample: int
    started: float
    clock: int  # of the batch when it began: its ring entries are no older
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    masses: list[np.ndarray] = dataclasses.field(default_factory=list)  # one a token, or none at all
    forced_from: int | None = None


class _Batch:
    """The device arrays of a batch and the host's mirror of its rows. `sample` drives it."""

    def __init__(
        self,
        model: Model,
        plan: Plan,
        sampling: Sampling,
        key: jax.Array,
        head: tuple[int, ...],
        forcing: Forcing | None,
        numbers: NumberTable | None,
    ) -> None:
        self.model, self.plan, self.sampling, self.key, self.forcing = model, plan, sampling, key, forcing
        self.numbers = numbers
        data = rows_of(model.mesh)
        self.groups = -(-plan.groups // data) * data
        count = self.groups * plan.group
        self.rows: list[_Row | None] = [None] * count
        self.pending: list[list[tuple[int, int]]] = [[] for _ in range(self.groups)]  # samples not yet started, a group
        self.request: list[Request | None] = [None] * self.groups
        queue = 1 if forcing is None else len(forcing.tail)
        self.state = {
            "token": np.zeros(count, np.int32),
            "position": np.zeros(count, np.int32),
            "fresh": np.zeros(count, bool),
            "drawn": np.zeros(count, np.int32),
            "budget": np.zeros(count, np.int32),
            "live": np.zeros(count, bool),
            "queue": np.zeros((count, queue), np.int32),
            "queued": np.zeros(count, np.int32),
            "mask": np.full(count, scores.FREE, np.int32),
            "item": np.zeros(count, np.int32),
            "sample": np.zeros(count, np.int32),
        }
        self.clock = 0
        clock = place(np.int32(0), replicated(model.mesh))
        self.ring = rollout.Ring(self._empty((count,), _LEAST_RING), clock)
        self.prompts: Keys | None = None
        self.shape = jnp.zeros((self.groups, plan.group), bool)
        self.set_head(head)

    def _empty(self, lead: tuple[int, ...], slots: int) -> Keys:
        return rollout.empty(self.model.config, self.model.mesh, self.model.dtype, lead, slots)

    def set_head(self, head: tuple[int, ...]) -> None:
        """Prefill the tokens that every prompt of the batch starts with, in whole steps: their number is compiled in."""
        head = head[: len(head) // _HEAD_STEP * _HEAD_STEP]
        self.head_tokens, self.head = head, None
        if head:
            keys = self._prefill([head], len(head))
            self.head = Keys(tuple(x[0] for x in keys.k), tuple(x[0] for x in keys.v), keys.positions[0])

    def _prefill(self, prompts: list[Sequence[int]], width: int) -> Keys:
        """Keys of a few prompts, in a block that the mesh's data axis divides."""
        data = rows_of(self.model.mesh)
        tokens = np.zeros((-(-len(prompts) // data) * data, width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt)] = prompt
        lengths = np.array([*map(len, prompts), *[0] * (len(tokens) - len(prompts))], np.int32)
        tokens, lengths = spread((tokens, lengths), self.model.mesh)
        return rollout.prefill(self.model.graph, self.model.params, self.head, tokens, lengths)

    def free_groups(self) -> list[int]:
        return [p for p, request in enumerate(self.request) if request is None]

    def admit(self, requests: list[tuple[int, Request]]) -> None:
        """Put requests into free groups: prefill what is theirs alone, and start their first samples."""
        data = rows_of(self.model.mesh)
        for start in range(0, len(requests), data):
            block = requests[start : start + data]
            rests = [request.prompt[len(self.head_tokens) : -1] for _, request in block]
            width = stepped(max(map(len, rests)), _LEAST_BUCKET, _STEP)
            for group, request in block:
                self.request[group], self.pending[group] = request, list(request.samples)
            self._fit_prompts()
            if width:
                keys = self._prefill(rests, width)
                slots = [group for group, _ in block] + [self.groups] * (keys.positions.shape[0] - len(block))
                self.prompts = rollout.place(self.prompts, keys, jnp.array(slots, jnp.int32))
            for group, request in block:
                if self.prompts is not None and not len(request.prompt) - 1 - len(self.head_tokens):
                    self.prompts = rollout.forget(self.prompts, jnp.int32(group))
                for row in range(group * self.plan.group, (group + 1) * self.plan.group):
                    self._start(row)

    def _fit_prompts(self) -> None:
        """Give the prompt cache the width of the longest prompt in the batch; keep one that is not much too wide.

        Every step reads all of it, while changing it costs about what two steps do, and each width is compiled.
        """
        rests = [len(request.prompt) - 1 - len(self.head_tokens) for request in self.request if request]
        wanted = stepped(max(rests), _LEAST_BUCKET, _CACHE_STEP)
        if self.prompts is None:
            if wanted:
                self.prompts = self._empty((self.groups,), wanted)
            return
        width = self.prompts.positions.shape[1]
        if wanted > width or 0 < wanted <= max(width // 4, width - 2 * _CACHE_STEP):
            self._resize_prompts(wanted)

    def _resize_prompts(self, length: int) -> None:
        """Give the prompt cache another width, an array at a time: both caches at once may be more than memory holds."""
        positions = rollout.resize_slots(self.prompts.positions, length, 1, NOWHERE)
        sides = [list(self.prompts.k), list(self.prompts.v)]
        self.prompts = None
        for side in sides:
            for i, store in enumerate(side):
                side[i] = jax.block_until_ready(rollout.resize_slots(store, length, 2, 0))
        k, v = map(tuple, sides)
        self.prompts = Keys(k, v, positions)

    def _start(self, row: int) -> None:
        """Begin the group's next sample in this row, if one is left."""
        group = row // self.plan.group
        request = self.request[group]
        if request is None or not self.pending[group]:
            self.rows[row] = None
            return
        item, sample = self.pending[group].pop(0)
        self.rows[row] = _Row(request, item, sample, time.monotonic(), self.clock)
        self._set(
            row,
            token=request.prompt[-1],
            position=len(request.prompt) - 1,
            fresh=True,
            drawn=0,
            budget=self.plan.max_new_tokens,
            live=True,
            queued=0,
            mask=scores.FREE,
            item=item,
            sample=sample,
        )

    def _set(self, row: int, **values: int | bool) -> None:
        for name, value in values.items():
            self.state[name][row] = value

    def _force(self, row: int, ended: bool) -> None:
        """Let a row that ended without scores write the tail and then scores under the mask."""
        sample, tail = self.rows[row], self.forcing.tail
        sample.forced_from = len(sample.tokens)
        token, position = int(self.state["token"][row]), int(self.state["position"][row])
        queue = list(tail)
        if ended:  # the end id was drawn but never fed: the tail's first token takes its place
            token = queue.pop(0)
            sample.tokens.append(token)
            sample.log_probs.append(0.0)
            if self.numbers is not None:
                sample.masses.append(np.zeros(self.numbers.classes, np.float32))
        self.state["queue"][row, : len(queue)] = queue
        self._set(
            row,
            token=token,
            position=position,
            budget=self.forcing.budget(sample.request.numbers),
            live=True,
            queued=len(queue),
            mask=self.forcing.table.start(sample.request.numbers),
        )

    def step(self) -> Iterator[Completion]:
        """Decode for all rows, take what they wrote, and yield the samples that are whole; their rows begin anew."""
        self._fit_ring()
        state = rollout.Rows(**spread(self.state, self.model.mesh))
        table = None
        if self.forcing is not None and any(row and row.request.numbers for row in self.rows):
            table = self.forcing.table
        parts = tuple(part for part in (self.head, self.prompts) if part is not None)
        self.ring, state, emitted = rollout.decode(
            *(self.model.graph, self.model.params, parts, self.ring, state, self.key),
            *(self.sampling, table, self.shape, self.plan.steps, self.numbers),
        )
        names = list(self.state)
        wanted = [getattr(state, name) for name in names]
        wanted += [emitted.tokens, emitted.log_probs, emitted.masses, emitted.count, self.ring.clock]
        *values, tokens, log_probs, masses, counts, clock = fetch(wanted, self.model.mesh)
        self.state = {name: np.array(value) for name, value in zip(names, values, strict=True)}
        self.clock = int(clock)
        for row, sample in enumerate(self.rows):
            if sample is not None:
                sample.tokens.extend(tokens[: counts[row], row].tolist())
                sample.log_probs.extend(log_probs[: counts[row], row].tolist())
                if self.numbers is not None:
                    sample.masses.extend(masses[: counts[row], row])
                if not self.state["live"][row] and (done := self._finish(row, sample)):
                    yield done

    def _finish(self, row: int, sample: _Row) -> Completion | None:
        """The completion of a row that is no longer live, or None if it now has to write its scores."""
        drawn_end = bool(sample.tokens) and sample.tokens[-1] in self.sampling.eos_ids and sample.forced_from is None
        if drawn_end:
            sample.tokens.pop()
            sample.log_probs.pop()
            del sample.masses[-1:]
        numbers = sample.request.numbers
        may_force = self.forcing is not None and numbers and sample.forced_from is None
        if may_force and not self.forcing.has_scores(sample.tokens, numbers):
            self._force(row, drawn_end)
            return None
        ended = drawn_end or sample.forced_from is not None
        completion = Completion(
            sample.request,
            sample.item,
            sample.sample,
            tuple(sample.tokens),
            tuple(sample.log_probs),
            ended,
            sample.forced_from,
            time.monotonic() - sample.started,
            np.stack(sample.masses) if sample.masses else None,
        )
        group = row // self.plan.group
        self._start(row)
        members = range(group * self.plan.group, (group + 1) * self.plan.group)
        if all(self.rows[member] is None for member in members):
            self.request[group] = None
        return completion

    def _fit_ring(self) -> None:
        """Give the ring room for `steps` more tokens of the longest row; keep one that is not four times too long."""
        oldest = max(self.clock - row.clock for row in self.rows if row)
        wanted = power_of_two(oldest + self.plan.steps, _LEAST_RING)
        slots = self.ring.own.positions.shape[1]
        if wanted > slots or wanted <= slots // 4:
            self.ring = rollout.resize(self.ring, wanted)


def sample(
    model: Model,
    requests: Iterable[Request],
    key: jax.Array,
    plan: Plan,
    sampling: Sampling,
    head: Sequence[int] = (),
    forcing: Forcing | None = None,
    numbers: NumberTable | None = None,
) -> Iterator[Completion]:
    """Sample every request, in a batch kept full, and yield completions as they end, in no order.

    head: tokens that the prompts are expected to share; a prompt that starts otherwise makes the batch run empty and go on
    with the shorter head that it does share. numbers: whose masses a completion carries. Raises ValueError, naming the
    item, for a prompt that is empty or longer than the model's positions allow with its budget.
    """
    waiting = iter(requests)
    batch: _Batch | None = None
    request = next(waiting, None)
    while request is not None or (batch and any(batch.rows)):
        if batch is None:
            check_length(model, request, plan, forcing)
            batch = _Batch(model, plan, sampling, key, common_prefix([(*head, -1), request.prompt]), forcing, numbers)
        admitted = []
        for group in batch.free_groups():
            if request is None:
                break
            check_length(model, request, plan, forcing)
            shared = common_prefix([(*batch.head_tokens, -1), request.prompt])
            if len(shared) < len(batch.head_tokens):
                if admitted or any(batch.rows):
                    break  # the batch runs empty first
                batch.set_head(shared)
            admitted.append((group, request))
            request = next(waiting, None)
        batch.admit(admitted)
        yield from batch.step()


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    k: int,
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    slots: int = 32,
) -> list[list[Completion]]:
    """k samples of each prompt: result[i][j] is sample j of prompts[i].

    Equal prompts share one prefill but have keys of their own: sample j of prompts[i] is a function of (key, i, j).
    Raises ValueError for numbers below 1, and for a prompt that is empty or too long, before anything is sampled.
    """
    for name, value in (("k", k), ("slots", slots)):
        if value < 1:
            raise ValueError(f"{name} = {value}: it has to be at least 1")
    asked: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for item, prompt in enumerate(prompts):
        asked.setdefault(tuple(prompt), []).extend((item, j) for j in range(k))
    requests = [Request(prompt, tuple(samples)) for prompt, samples in asked.items()]
    group = min(k, slots)
    plan = Plan(max(1, min(len(requests), slots // group)), group, max_new_tokens)
    for request in requests:
        check_length(model, request, plan, None)
    done: list[list[Completion | None]] = [[None] * k for _ in prompts]
    head = common_prefix([request.prompt for request in requests]) if requests else ()
    for completion in sample(model, requests, key, plan, sampling or Sampling(), head):
        done[completion.item][completion.sample] = completion
    return done
