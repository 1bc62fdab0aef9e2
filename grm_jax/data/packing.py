"""Training texts packed into rows of one length, as a grain dataset that a run can leave and go on with.

1. Each source is a list of records and the function that encodes one: (prompt ids, completion ids). A source is
   shuffled anew each epoch by the seed and repeated; sources are mixed in given shares.
2. Encoded texts that are longer than a row are left out and counted; the others are packed first-fit, a whole text in
   one row. `segments` number the texts of a row from 1, 0 is padding; `positions` begin at 0 with each text.
3. `trains` marks where the NEXT token is one of a completion: only those are trained (completion-only loss).

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Int

Encode = Callable[[Any], tuple[Sequence[int], Sequence[int]]]  # a record -> (prompt ids, completion ids)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A batch of packed rows."""

    tokens: Int[np.ndarray | jax.Array, "B T"]
    positions: Int[np.ndarray | jax.Array, "B T"]  # within a text
    segments: Int[np.ndarray | jax.Array, "B T"]  # 1, 2, ... a text of the row; 0 is padding
    trains: Int[np.ndarray | jax.Array, "B T"]  # 1 where the next token is a completion's


@dataclasses.dataclass(frozen=True)
class Source:
    """Records and what makes ids of one; `share` of the mixture's texts come from here. Messages call it `name`."""

    records: Sequence[Any]
    encode: Encode
    share: float
    name: str = "the texts"


class TooLong:
    """Counts the texts of each source that no row can hold."""

    def __init__(self, longest: int, sources: Sequence[Source]) -> None:
        self.longest, self.sources = longest, sources
        self.dropped, self.kept = [0] * len(sources), [0] * len(sources)

    def fits(self, text: dict[str, Any]) -> bool:
        """Whether a row can hold it. Raises ValueError where all texts of a source were too long, or 1,000 in a row.

        It counts from where a run goes on: within two rounds of the source each of its texts has come.
        """
        fits, i = len(text["tokens"]) <= self.longest, text["source"]
        self.kept[i] += fits
        self.dropped[i] += not fits
        if not self.kept[i] and self.dropped[i] == min(1000, 2 * len(self.sources[i].records)):
            raise ValueError(
                f"{self.dropped[i]} of {self.sources[i].name} and none of at most {self.longest} tokens (the last has "
                f"{len(text['tokens'])}): raise sequence_tokens, or leave them out"
            )
        return fits

    def counts(self) -> dict[str, int]:
        """How many were left out, by the name of their source."""
        return {source.name: count for source, count in zip(self.sources, self.dropped, strict=True) if count}


def encoded(prompt: Sequence[int], completion: Sequence[int]) -> dict[str, np.ndarray]:
    """One text before it is packed: its tokens, and 1 where the next of them is the completion's.

    Raises ValueError for an empty prompt or completion.
    """
    if not prompt or not completion:
        raise ValueError(f"a text of {len(prompt)} prompt and {len(completion)} completion tokens: it needs both")
    trains = np.zeros(len(prompt) + len(completion), np.int32)
    trains[len(prompt) - 1 : -1] = 1
    return {"tokens": np.array([*prompt, *completion], np.int32), "trains": trains}


def packed(sources: Sequence[Source], rows: int, length: int, seed: int) -> tuple[grain.IterDataset, TooLong]:
    """Batches of `rows` packed rows of `length` tokens without end, and the counter of what was too long.

    Iterate with `iter`; the iterator's `get_state` and `set_state` give and take a JSON-able state. Sources without
    records or of share 0 are passed over. Raises ValueError when none is left.
    """
    used = [source for source in sources if source.records and source.share > 0]
    if not used:
        raise ValueError("no text to train on: every source is empty or has a share of 0")
    streams = [
        grain.MapDataset.source(source.records)
        .seed(seed + i)
        .shuffle()
        .map(lambda record, encode=source.encode, i=i: {**encoded(*encode(record)), "source": i})
        .repeat()
        for i, source in enumerate(used)
    ]
    mixed = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, [source.share for source in used])
    too_long = TooLong(length, used)
    texts = mixed.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)).filter(too_long.fits)
    texts = texts.map(lambda text: {name: text[name] for name in ("tokens", "trains")})
    lengths = {"tokens": length, "trains": length}
    bins = grain.experimental.FirstFitPackIterDataset(
        texts, length_struct=lengths, num_packing_bins=rows, shuffle_bins=False
    )
    return bins.batch(rows, drop_remainder=True).map(_packed), too_long


def _packed(row: dict[str, np.ndarray]) -> Packed:
    return Packed(row["tokens"], row["tokens_positions"], row["tokens_segment_ids"], row["trains"])
