"""Each score's mean under the model's own probabilities, at the place where it was written (G-Eval, arXiv 2303.16634).

1. `number_table` finds the tokens that can begin a number of the range, and those that can go on or end one.
2. While a text is sampled, `masses` takes from each step's logits what these tokens weigh, a few numbers a token.
3. `means` finds the last box's numbers in the tokens, and sums number times probability at the place of each.

Where a number takes several tokens (10 is "1" and "0" in many vocabularies), the text follows one path: what the model
would have written behind another first digit is not known, and counts as ended there. So 10's part of "1" is known where
the text has a 1 there, and left with 1 elsewhere. Probabilities are those at temperature 1, whatever was sampled at, and
relative to the tokens that fit; a forced score's are the model's own too, from before the mask.

Letters: R rows, T tokens, V vocabulary, K tokens of numbers, C classes of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

END = ""  # the class of tokens that end a number
_OPENING = b"\\boxed{"
_BEGINS = re.compile(rb"[ \t\n,{]*([0-9]+)(?:[ \t\n,}].*)?", re.DOTALL)
_GOES_ON = re.compile(rb"([0-9]*)(?:[ \t\n,}].*)?", re.DOTALL)
_NUMBER = re.compile(rb"([+-]?)([0-9]+)")
_SPACES = b" \t\n\r"


@no_type_check  # JAX rebuilds a pytree around placeholders too
@partial(
    jax.tree_util.register_dataclass,
    data_fields=("begin_tokens", "begin_classes", "rest_tokens", "rest_classes"),
    meta_fields=("begins", "rests", "low", "high"),
)
@dataclass(frozen=True)
class NumberTable:
    """Tokens by what they write of a number: `begins` and `rests` are the classes' digits, "" ends a number."""

    begin_tokens: Int[Array, "K"]
    begin_classes: Int[Array, "K"]
    rest_tokens: Int[Array, "K2"]
    rest_classes: Int[Array, "K2"]
    begins: tuple[str, ...]
    rests: tuple[str, ...]
    low: int
    high: int

    @property
    def classes(self) -> int:
        """C: how many numbers `masses` gives a row."""
        return len(self.begins) + len(self.rests)


def number_table(token_bytes: Sequence[bytes], low: int, high: int) -> NumberTable:
    """The table of a vocabulary for numbers of low..high. Raises ValueError for bounds outside of 0 <= low < high."""
    if not 0 <= low < high:
        raise ValueError(f"numbers from {low} to {high}: expected scores need 0 <= low < high")
    numbers = [str(number) for number in range(low, high + 1)]
    begins = sorted({number[:end] for number in numbers for end in range(1, len(number) + 1)})
    rests = sorted(
        {number[i:j] for number in numbers for i in range(1, len(number)) for j in range(i + 1, len(number) + 1)}
    )
    rests = (END, *rests)
    begin_of = {digits: i for i, digits in enumerate(begins)}
    rest_of = {digits: i for i, digits in enumerate(rests)}
    found: tuple[dict[int, int], dict[int, int]] = {}, {}
    for id, token in enumerate(token_bytes):
        for kind, pattern, classes in ((0, _BEGINS, begin_of), (1, _GOES_ON, rest_of)):
            if token and (match := pattern.fullmatch(token)) and (digits := match[1].decode()) in classes:
                found[kind][id] = classes[digits]
    arrays = [jnp.array(list(part), jnp.int32) for of in found for part in (of.keys(), of.values())]
    return NumberTable(*arrays, tuple(begins), tuple(rests), low, high)


def masses(table: NumberTable, logits: Float[Array, "R V"]) -> Float[Array, "R C"]:
    """What each class weighs in each row, up to a factor a row and kind: first those of `begins`, then of `rests`."""
    parts = []
    for tokens, classes, count in (
        (table.begin_tokens, table.begin_classes, len(table.begins)),
        (table.rest_tokens, table.rest_classes, len(table.rests)),
    ):
        chosen = logits[:, tokens].astype(jnp.float32)
        weights = jnp.exp(chosen - jnp.max(chosen, axis=1, keepdims=True, initial=-jnp.inf))
        parts.append(jnp.zeros((logits.shape[0], count), jnp.float32).at[:, classes].add(weights))
    return jnp.concatenate(parts, axis=1)


def means(
    table: NumberTable, tokens: Sequence[bytes], masses: Float[np.ndarray, "T C"], count: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(Mean, probability of what was written) of each of the `count` numbers in the last complete box of the tokens.

    masses[t]: of the distribution that token t was drawn from. A number that is not one of low..high as they are written
    (0 or 12 of 1..10, 07, +5) has the mean that it reads as, clipped, and probability 1. Raises ValueError where the
    box does not hold `count` numbers.
    """
    text = b"".join(tokens)
    ends = np.cumsum([len(token) for token in tokens])
    spans = _spans(text)
    if len(spans) != count:
        raise ValueError(f"the last box has {len(spans)} numbers, not {count}")
    found = [_mean(table, text, ends, masses, *span) for span in spans]
    return tuple(mean for mean, _ in found), tuple(share for _, share in found)


def _spans(text: bytes) -> list[tuple[bool, int, int]]:
    """(Has it a sign, where its digits begin, where they end) of each number in the last complete box."""
    spans, at = [], 0
    pieces = text.split(_OPENING)
    last = max((i for i, piece in enumerate(pieces) if i and b"}" in piece), default=0)
    if not last:
        return []
    at = len(_OPENING.join(pieces[:last])) + len(_OPENING)
    for item in pieces[last].partition(b"}")[0].split(b","):
        number = _NUMBER.fullmatch(item.strip(_SPACES))
        if number is None:
            return []
        start = at + len(item) - len(item.lstrip(_SPACES)) + len(number[1])
        spans.append((bool(number[1]), start, start + len(number[2])))
        at += len(item) + 1
    return spans


def _mean(
    table: NumberTable, text: bytes, ends: np.ndarray, masses: np.ndarray, signed: bool, start: int, end: int
) -> tuple[float, float]:
    """The mean and the probability of the number whose digits are text[start:end]."""
    written = text[start:end].decode()
    value = int(text[start - 1 : end] if signed else written)
    as_read = float(min(max(value, table.low), table.high)), 1.0
    if signed or written != str(value) or not table.low <= value <= table.high:
        return as_read
    place = int(np.searchsorted(ends, start, side="right"))
    taken = written[: int(ends[place]) - start]
    if taken not in table.begins:
        return as_read
    row = masses[place][: len(table.begins)]
    reached, prefix = float(row[table.begins.index(taken)] / row.sum()), taken
    total = _others(table, row, table.begins, taken, "", 1.0)
    while ends[place] <= end:  # the token ends with the digits so far: the next one ends the number, or goes on
        place += 1
        taken = written[len(prefix) : int(ends[place]) - start]
        row = masses[place][len(table.begins) :] * [_fits(table, prefix + digits) for digits in table.rests]
        if taken not in table.rests or not row.sum():
            break
        total = tuple(
            a + b for a, b in zip(total, _others(table, row, table.rests, taken, prefix, reached), strict=True)
        )
        reached, prefix = reached * float(row[table.rests.index(taken)] / row.sum()), prefix + taken
    weight, mean = total[0] + reached, total[1] + reached * value
    return mean / weight, reached / weight


def _fits(table: NumberTable, digits: str) -> bool:
    return table.low <= int(digits) <= table.high


def _others(
    table: NumberTable, row: np.ndarray, classes: tuple[str, ...], taken: str, prefix: str, reached: float
) -> tuple[float, float]:
    """(Probability, probability times number) of all that a text may have written here but `taken`."""
    share = reached * row / row.sum()
    others = [(share[i], int(prefix + digits)) for i, digits in enumerate(classes) if digits != taken]
    inside = [(float(weight), number) for weight, number in others if table.low <= number <= table.high]
    return sum(weight for weight, _ in inside), sum(weight * number for weight, number in inside)
