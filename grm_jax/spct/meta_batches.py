"""Judged samples as batches for the meta RM: batch s of a run is a function of (seed, s) alone.

1. A judgment is tokenised when its batch is due: the prompt of `meta_rm.text_ids` in the order that the judge saw, and
   the judgment's text.
2. Each epoch the samples are shuffled by the seed and cut into windows of WINDOW batches; inside a window they are sorted
   by class of length, so that a batch pads little; then the batches are shuffled. The last batch is filled up from the
   epoch's own start.
3. Weights sum to 1 in each batch; balanced, a judgment weighs what its class lacks over all samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from grm_jax import meta_rm, prompts
from grm_jax.buckets import power_of_two
from grm_jax.spct.meta_step import Judged
from grm_jax.spct.sample import Sample
from grm_jax.tokenizer import Tokenizer

WINDOW = 16


class SampleBatches:
    """`source[step]` is the batch of that step, of numpy arrays. Thread-safe; made for `batches.stream`."""

    def __init__(
        self, samples: Sequence[Sample], tokenizer: Tokenizer, template: prompts.Template, max_tokens: int, seed: int,
        steps: int, size: int, balance: bool, process_index: int = 0, process_count: int = 1,
    ) -> None:  # fmt: skip
        """`size` judgments a batch, over all processes; each gets its own consecutive share of them.

        Raises ValueError: no samples, a size that the processes cannot share, samples to balance that are all right or
        all wrong.
        """
        if not samples:
            raise ValueError("no judgments to make batches of: sample some first")
        if size % process_count:
            raise ValueError(f"batches of {size} judgments for {process_count} processes: give a multiple of these")
        self.samples, self.steps, self.size = list(samples), steps, size
        right = np.array([sample.correct for sample in samples])
        if balance and right.all() in (right.any(), True):
            raise ValueError(f"balance: all {len(samples)} judgments are {'right' if right.all() else 'wrong'}")
        self._class_weight = np.where(right, 0.5 / max(right.mean(), 1e-9), 0.5 / max(1 - right.mean(), 1e-9))
        if not balance:
            self._class_weight = np.ones(len(samples))
        self._lengths = np.array([_length_class(sample) for sample in samples])
        self._encode = functools.partial(encode, tokenizer, template, max_tokens)
        self._seed = seed
        share = size // process_count
        self._share = slice(process_index * share, (process_index + 1) * share)
        self._plan = functools.lru_cache(maxsize=2)(self._plan_of)

    def __len__(self) -> int:
        return self.steps

    def __repr__(self) -> str:  # grain prints its source
        return f"SampleBatches({len(self.samples)} judgments, {self.steps} steps of {self.size}, seed {self._seed})"

    def __getitem__(self, step: int) -> Judged:
        """The batch of a step. Raises ValueError for a judgment that cannot be cut to fit, naming its item."""
        step = int(step)
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a run of {self.steps}: they count from 0")
        epoch, at = divmod(step, -(-len(self.samples) // self.size))
        rows = self._plan(epoch)[at]
        weights = self._class_weight[rows]
        return batch(
            [self._encode(self.samples[i]) for i in rows], [self.samples[i].correct for i in rows], weights, self._share
        )

    def _plan_of(self, epoch: int) -> np.ndarray:
        """An epoch's batches: the samples of each, [batches, size]."""
        count = len(self.samples)
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(count)
        filled = -(-count // self.size) * self.size
        order = np.resize(order, filled)
        width = max(1, min(WINDOW, filled // self.size // 4)) * self.size
        windows = [order[start : start + width] for start in range(0, filled, width)]
        sorted_ = [window[np.argsort(self._lengths[window], kind="stable")] for window in windows]
        return rng.permutation(np.concatenate(sorted_).reshape(-1, self.size))


def _length_class(sample: Sample) -> int:
    """Half octaves of the characters that are read."""
    texts = (*(message.content for message in sample.messages), *sample.responses, sample.reference or "", sample.text)
    return math.ceil(2 * math.log2(max(sum(map(len, texts)), 1)))


def encode(
    tokenizer: Tokenizer, template: prompts.Template, max_tokens: int, sample: Sample
) -> tuple[list[int], list[int]]:
    """(Prompt ids, judgment ids) of a sample. Raises ValueError, naming the item, where they cannot be cut to fit."""
    return meta_rm.text_ids(tokenizer, template, sample.example, sample.order, sample.text, max_tokens)


def batch(
    rows: Sequence[tuple[list[int], list[int]]], correct: Sequence[bool], weights: np.ndarray, share: slice
) -> Judged:
    """A padded batch of encoded judgments, weights summing to 1 over all rows, and of them the `share`."""
    S, T = (power_of_two(max(len(row[part]) for row in rows), meta_rm.LEAST_TOKENS) for part in (0, 1))
    prompts_RS, texts_RT = np.zeros((len(rows), S), np.int32), np.zeros((len(rows), T), np.int32)
    for r, (ids, judged) in enumerate(rows):
        prompts_RS[r, : len(ids)], texts_RT[r, : len(judged)] = ids, judged
    lengths, counts = (np.array([len(row[part]) for row in rows], np.int32) for part in (0, 1))
    whole = (prompts_RS, lengths, texts_RT, counts, np.array(correct, np.float32), _normal(weights))
    return Judged(*(x[share] for x in whole))


def _normal(weights: np.ndarray) -> np.ndarray:
    return (weights / weights.sum()).astype(np.float32)
