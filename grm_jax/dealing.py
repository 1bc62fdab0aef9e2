"""In which order responses are shown, and examples taken."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from grm_jax.datatypes import Example, stable_hash

_DECK = 5040  # orders enumerated at most (7!); beyond, each sample's order is drawn by itself


def orders(example_id: str, n: int, votes: int, seed: int, most: int | None = None) -> list[tuple[int, ...]]:
    """The order of the n responses in each of an example's samples: order[i] is the index shown in slot i.

    A function of (seed, id): sample j has the same order whatever `votes` is, and at most n! orders occur. Of `most`
    orders that are shared, each second one is the reverse of the one before: of a pair, every response stands as far from
    the first slot in one as from the last in the other, and what a judge adds by the slot evenly falls out of the vote.
    """
    rng = np.random.default_rng([seed, stable_hash(example_id)])
    if most is not None:
        return list(itertools.islice(itertools.cycle(_paired(_deck(rng, n), distinct(n, votes, most))), votes))
    return list(itertools.islice(itertools.cycle(_deck(rng, n)), votes))


def distinct(n: int, votes: int, most: int | None = None) -> int:
    """How many orders of n responses occur in so many samples."""
    return min(votes, math.factorial(n), most or votes)


def _deck(rng: np.random.Generator, n: int) -> Iterator[tuple[int, ...]]:
    """All n! orders, shuffled; or orders without end where these are too many to enumerate."""
    if math.factorial(n) > _DECK:
        while True:
            yield tuple(rng.permutation(n).tolist())
    deck = list(itertools.permutations(range(n)))
    yield from (deck[i] for i in rng.permutation(len(deck)))


def _paired(deck: Iterable[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """So many different orders of a deck, each followed by its reverse."""
    found: dict[tuple[int, ...], None] = {}
    for order in deck:
        found |= {order: None, order[::-1]: None}
        if len(found) >= count:
            break
    return list(found)[:count]


def by_length(examples: Sequence[Example], width: int) -> list[Example]:
    """The examples with neighbours of like length: each `width` of them sorted, upwards and downwards by turns.

    The longest prompt in a batch decides how much cache each of its prompts takes.
    """

    def length(example: Example) -> int:
        return sum(len(message.content) for message in example.messages) + sum(map(len, example.responses))

    starts = range(0, len(examples), width)
    turns = (sorted(examples[s : s + width], key=length, reverse=i % 2 == 1) for i, s in enumerate(starts))
    return list(itertools.chain.from_iterable(turns))
