"""What a scalar head is trained on, as batches: batch s of a run is a function of (seed, s) alone.

1. An entry is one text, or several that a loss compares; it is tokenised when its batch is due.
2. Each epoch the entries are shuffled by the seed and cut into windows of WINDOW batches; inside a window they are sorted
   by class of length, so that a batch pads little; then the batches are shuffled. The last batch is filled up from the
   epoch's own start.
3. Weights sum to 1 in each batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from grm_jax.buckets import power_of_two
from grm_jax.scalar_rm import LEAST_TOKENS
from grm_jax.spct.scalar_step import Texts

WINDOW = 16

Ids = tuple[list[int], list[int]]  # of a prompt, of the text behind it


@dataclass(frozen=True)
class Entry:
    """Texts that go into a batch together, one after the other.

    encode: gives each text's ids, and raises ValueError, naming the item, where they cannot be cut to fit. correct:
    whether each text is right. characters: about how long they are together.
    """

    encode: Callable[[], list[Ids]]
    correct: tuple[bool, ...]
    characters: int
    weight: float = 1.0


class TextBatches:
    """`source[step]` is the batch of that step, of numpy arrays. Thread-safe; made for `batches.stream`."""

    def __init__(self, entries: Sequence[Entry], seed: int, steps: int, size: int) -> None:
        """`size` entries a batch. Raises ValueError for no entries."""
        if not entries:
            raise ValueError("nothing to make batches of: give more examples, or hold out fewer")
        self.entries, self.steps, self.size = list(entries), steps, size
        self._lengths = np.array(
            [math.ceil(2 * math.log2(max(entry.characters, 1))) for entry in entries]
        )  # half octaves
        self._seed = seed
        self._plan = functools.lru_cache(maxsize=2)(self._plan_of)

    def __len__(self) -> int:
        return self.steps

    def __repr__(self) -> str:  # grain prints its source
        return f"TextBatches({len(self.entries)} entries, {self.steps} steps of {self.size}, seed {self._seed})"

    def __getitem__(self, step: int) -> Texts:
        """The batch of a step. Raises ValueError for an entry that cannot be cut to fit, naming its item."""
        step = int(step)
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a run of {self.steps}: they count from 0")
        epoch, at = divmod(step, -(-len(self.entries) // self.size))
        chosen = [self.entries[i] for i in self._plan(epoch)[at]]
        weights = np.array([entry.weight for entry in chosen for _ in entry.correct])
        rows = [ids for entry in chosen for ids in entry.encode()]
        return batch(rows, [right for entry in chosen for right in entry.correct], weights)

    def _plan_of(self, epoch: int) -> np.ndarray:
        """An epoch's batches: the entries of each, [batches, size]."""
        count = len(self.entries)
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(count)
        filled = -(-count // self.size) * self.size
        order = np.resize(order, filled)
        width = max(1, min(WINDOW, filled // self.size // 4)) * self.size
        windows = [order[start : start + width] for start in range(0, filled, width)]
        sorted_ = [window[np.argsort(self._lengths[window], kind="stable")] for window in windows]
        return rng.permutation(np.concatenate(sorted_).reshape(-1, self.size))


def batch(rows: Sequence[Ids], correct: Sequence[bool], weights: np.ndarray) -> Texts:
    """A padded batch of encoded texts, weights summing to 1 over all rows."""
    S, T = (power_of_two(max(len(row[part]) for row in rows), LEAST_TOKENS) for part in (0, 1))
    prompts_RS, texts_RT = np.zeros((len(rows), S), np.int32), np.zeros((len(rows), T), np.int32)
    for r, (ids, text) in enumerate(rows):
        prompts_RS[r, : len(ids)], texts_RT[r, : len(text)] = ids, text
    lengths, counts = (np.array([len(row[part]) for row in rows], np.int32) for part in (0, 1))
    normal = (weights / weights.sum()).astype(np.float32)
    return Texts(prompts_RS, lengths, texts_RT, counts, np.array(correct, np.float32), normal)
