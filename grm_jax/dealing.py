"""In which order responses are shown, and examples taken."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from grm_jax.datatypes import Example, stable_hash

_DECK = 5040  # orders enumerated at most (7!); beyond, each sample's order is drawn by itself


def orders(example_id: str, n: int, votes: int, seed: int) -> list[tuple[int, ...]]:
    """The order of the n responses in each of an example's samples: order[i] is the index shown in slot i.

    A function of (seed, id): sample j has the same order whatever `votes` is, and at most n! orders occur.
    """
    rng = np.random.default_rng([seed, stable_hash(example_id)])
    if math.factorial(n) > _DECK:
        return [tuple(rng.permutation(n).tolist()) for _ in range(votes)]
    deck = list(itertools.permutations(range(n)))
    shuffled = [deck[i] for i in rng.permutation(len(deck))]
    return [shuffled[j % len(deck)] for j in range(votes)]


def by_length(examples: Sequence[Example], width: int) -> list[Example]:
    """The examples with neighbours of like length: each `width` of them sorted, upwards and downwards by turns.

    The longest prompt in a batch decides how much cache each of its prompts takes.
    """

    def length(example: Example) -> int:
        return sum(len(message.content) for message in example.messages) + sum(map(len, example.responses))

    starts = range(0, len(examples), width)
    turns = (sorted(examples[s : s + width], key=length, reverse=i % 2 == 1) for i, s in enumerate(starts))
    return list(itertools.chain.from_iterable(turns))
