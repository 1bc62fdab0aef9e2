"""Rows that several processes write: each its own part of a file, or all of them the same rows and process 0 alone writes.

A file is one file or all parts of one run (`part_of`): what another number of processes left beside it is refused, or
removed with `overwrite`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from etils import epath

from grm_jax import hosts
from grm_jax.data.jsonl import DataError
from grm_jax.data.output import VerdictWriter, open_writer
from grm_jax.datatypes import Example
from grm_jax.hosts import Share


def part_of(path: str, share: Share) -> str:
    """Where a share's rows are written: the file itself, or a part of it a process."""
    return path if share.count == 1 else f"{path}-{share.index:05d}-of-{share.count:05d}"


def parts_of(path: str) -> list[str]:
    """The names of all parts beside a path, whichever number of processes wrote them, sorted."""
    place = epath.Path(path)
    near = sorted(other.name for other in place.parent.iterdir()) if place.parent.exists() else []
    return [name for name in near if re.fullmatch(re.escape(place.name) + r"-\d{5}-of-\d{5}", name)]


def remove(path: str) -> None:
    """Remove a file, all parts of it, and what lies beside each for going on. All processes call it."""
    place = epath.Path(path)
    if hosts.is_first():
        _remove(place, [place.name, *parts_of(path)])
    hosts.sync(f"removed {path}")


def _remove(place: epath.Path, names: Sequence[str]) -> None:
    for name in names:
        for more in ("", ".run.json", ".ahead"):
            (place.parent / f"{name}{more}").unlink(missing_ok=True)


def shared_writer(
    share: Share, path: str, examples: Sequence[Example], settings: Mapping[str, object], overwrite: bool = False,
    each: int = 1,
) -> VerdictWriter:  # fmt: skip
    """`open_writer` of a process's part; a process that does not write knows what is finished from the one that does.

    Raises DataError as `open_writer` does, and for what another number of processes left.
    """
    if path != "-":
        _clear(share, path, overwrite)
    if share.count > 1:
        if path == "-":
            raise DataError("output = '-': several processes write parts of a file; give --output a path")
        return open_writer(part_of(path, share), examples, settings, overwrite, each)
    writer = open_writer(path, examples, settings, overwrite, each) if share.writes else None
    finished = hosts.agree(sorted(writer.finished) if writer else None)
    if writer:
        return writer
    return VerdictWriter([e.id for e in examples], frozenset(finished), lambda row: None, lambda: None)


def _clear(share: Share, path: str, overwrite: bool) -> None:
    """Remove what another number of processes wrote, or raise DataError."""
    place = epath.Path(path)
    mine = {epath.Path(part_of(path, Share(i, share.count, False))).name for i in range(share.count)}
    found = hosts.agree(sorted({*parts_of(path), *([place.name] if place.is_file() else [])} - mine))
    if found and not overwrite:
        shown = ", ".join(found[:4]) + " ..." * (len(found) > 4)
        raise DataError(
            f"{path}: another number of processes wrote {shown}; go on with as many as these, or give --overwrite"
        )
    if hosts.is_first():
        _remove(place, found)
    if found:
        hosts.sync(f"cleared {path}")
