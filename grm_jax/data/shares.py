"""Rows that several processes write: each its own part, or all of them the same rows and process 0 alone writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grm_jax import hosts
from grm_jax.data.jsonl import VerdictWriter, open_writer
from grm_jax.datatypes import Example
from grm_jax.hosts import Share


def shared_writer(
    share: Share, path: str, examples: Sequence[Example], settings: Mapping[str, object], overwrite: bool = False,
    each: int = 1,
) -> VerdictWriter:  # fmt: skip
    """`open_writer` of a process's share; a process that does not write knows what is finished from the one that does.

    Raises DataError as `open_writer` does.
    """
    if share.count > 1:
        return open_writer(path, examples, settings, overwrite, each)
    writer = open_writer(path, examples, settings, overwrite, each) if share.writes else None
    finished = hosts.agree(sorted(writer.finished) if writer else None)
    if writer:
        return writer
    return VerdictWriter([e.id for e in examples], frozenset(finished), lambda row: None, lambda: None)
