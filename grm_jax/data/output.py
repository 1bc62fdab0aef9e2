"""Verdicts to JSON Lines: in the input's order, each row in one piece, and none lost that was ready.

1. `open_writer` checks the output: it resumes an interrupted run of the same input and settings, or refuses.
2. `VerdictWriter.write` takes verdicts in any order and writes their rows in the input's order.
3. What is ready before its turn stands in `<output>.ahead` until then, so an interruption loses none of it.

Resuming. Beside `<output>` lies `<output>.run.json` with the run's settings and a digest of its examples. It is written
first. The rows of the output are a head of the input. A local file grows row by row, and loses a half-written last line on
resuming; an object in a bucket is written whole, every OBJECT_SECONDS and at the end. Pipes do not resume.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from grm_jax.data.jsonl import DataError, path_of
from grm_jax.datatypes import Example, Verdict
from grm_jax.log import logger

OBJECT_SECONDS = 30.0  # between two writes of an object in a bucket


def verdict_row(verdict: Verdict) -> dict[str, Any]:
    """A verdict as one row of output: its fields but greedy judgments; what a judgment need not have where it has it."""
    row = asdict(verdict)
    row["scores"] = [int(score) if score == int(score) else score for score in verdict.scores]
    for judgment in row["judgments"]:
        judgment["log_prob"] = round(judgment["log_prob"], 5)
        for name in [name for name in ("reason", "logit", "kept", "values") if judgment[name] is None]:
            del judgment[name]
    del row["greedy"]
    row["usage"]["seconds"] = round(verdict.usage.seconds, 3)
    if not verdict.usage.cut_tokens:
        del row["usage"]["cut_tokens"]
    return row


class VerdictWriter(contextlib.AbstractContextManager["VerdictWriter"]):
    """Rows of verdicts in the order of `ids`, whatever order they come in; `finished` ones were there before.

    written: the ids whose rows stand in the output; ready: the rows of those that stand in `ahead` and wait for their turn.
    Without `ahead`, as with pipes, rows that wait are lost when the writer is closed.
    """

    def __init__(
        self, ids: Sequence[str], written: Set[str], put: Callable[[bytes], None], close: Callable[[], None],
        ahead: Ahead | None = None, ready: Mapping[str, bytes] | None = None,
    ) -> None:  # fmt: skip
        self._due = [id for id in reversed(ids) if id not in written]  # the next one last
        self._waiting = dict(ready or {})
        self.finished = frozenset({*written, *self._waiting})
        self._open = set(self._due) - set(self._waiting)
        self._put, self._close, self._ahead = put, close, ahead
        self._write_what_is_due()

    def write(self, verdict: Verdict, rows: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Write the verdict's row, or `rows` in one piece, and those that waited for it, or keep it until its turn."""
        if verdict.id not in self._open:
            raise ValueError(f"verdict of {verdict.id!r}; each example of the run that is not finished has one verdict")
        self._open.remove(verdict.id)
        rows = [verdict_row(verdict)] if rows is None else rows
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        for separator in "\x85\u2028\u2029":  # some readers end a line there
            text = text.replace(separator, f"\\u{ord(separator):04x}")
        self._waiting[verdict.id] = text.encode()
        if self._ahead and self._due[-1] != verdict.id:
            self._ahead.keep(self._waiting[verdict.id])
        self._write_what_is_due()

    def _write_what_is_due(self) -> None:
        while self._due and self._due[-1] in self._waiting:
            self._put(self._waiting.pop(self._due.pop()))
        if self._ahead and not self._waiting:
            self._ahead.clear()

    def close(self) -> None:
        """Finish the output."""
        if self._waiting and not self._ahead:
            logger.warning("%d verdicts were ready before %s was; they are not kept", len(self._waiting), self._due[-1])
        self._close()
        if self._ahead:
            self._ahead.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class Ahead:
    """The rows that are ready before their turn, in a file or an object beside the output; none where none are.

    settle: called before they go, so that they stand in the output by then.
    """

    def __init__(
        self, path: str, settle: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._place, self._name, self._clock = path_of(f"{path}.ahead"), f"{path}.ahead", clock
        self._settle = settle
        self._rows: list[bytes] = []  # of an object, which cannot grow
        self._stream: BinaryIO | None = None
        self._written, self._held = clock(), False

    def read(self) -> bytes:
        """What an interrupted run left."""
        return self._place.read_bytes() if self._place.exists() else b""

    def begin(self, rows: Mapping[str, bytes]) -> None:
        """Hold these rows and nothing else. What is there already is not gone for a moment."""
        whole = b"".join(rows.values())
        if not whole:
            self._place.unlink(missing_ok=True)
            return
        self._held = True
        local = isinstance(self._place, Path)
        self._rows = [] if local else [whole]
        if whole != self.read():
            written = path_of(f"{self._name}.new") if local else self._place  # objects are atomic anyway
            written.write_bytes(whole)
            if local:
                written.replace(self._place)

    def keep(self, row: bytes) -> None:
        self._held = True
        if not isinstance(self._place, Path):
            self._rows.append(row)
            if self._clock() - self._written >= OBJECT_SECONDS:
                self.close()
            return
        self._stream = self._stream or self._place.open("ab", buffering=0)
        _row_by_row(self._stream, self._name)(row)

    def clear(self) -> None:
        if not self._held:
            return
        self._settle()
        self._rows.clear()
        if self._stream:
            self._stream.close()
            self._stream = None
        self._place.unlink(missing_ok=True)
        self._held = False

    def close(self) -> None:
        if self._rows:
            self._place.write_bytes(b"".join(self._rows))
            self._written = self._clock()
        if self._stream:
            self._stream.close()
            self._stream = None


def open_writer(
    path: str, examples: Sequence[Example], settings: Mapping[str, object], overwrite: bool = False, each: int = 1
) -> VerdictWriter:
    """A writer to `path` ("-": standard output), going on behind the rows of an interrupted run unless `overwrite`.

    Makes missing parent folders. Call it before loading a model: raises DataError for a path that cannot be written,
    and as `finished` does. `settings` is what JSON can hold, `each` how many rows an example has.
    """
    ids = [example.id for example in examples]
    try:
        if path == "-":
            return VerdictWriter(ids, frozenset(), _row_by_row(sys.stdout.buffer, "standard output"), lambda: None)
        place = path_of(path)
        if isinstance(place, Path) and place.exists() and not place.is_file() and not place.is_dir():
            stream = place.open("wb", buffering=0)  # a pipe or a device
            return VerdictWriter(ids, frozenset(), _row_by_row(stream, path), stream.close)
        if isinstance(place, Path):
            place.parent.mkdir(parents=True, exist_ok=True)
        written, ready = ((), {}) if overwrite else _left(path, examples, settings, each)
        if not written and not ready:
            place.write_bytes(b"")  # first, so that the new record never stands beside old rows
            path_of(f"{path}.ahead").unlink(missing_ok=True)
            _record(path, *_run(examples, settings))
        if isinstance(place, Path):
            stream = place.open("ab", buffering=0)
            put, close, ahead = _row_by_row(stream, path), stream.close, Ahead(path)
        else:
            put, close = _as_a_whole(place, time.monotonic)
            ahead = Ahead(path, settle=close)
        ahead.begin(ready)
        return VerdictWriter(ids, set(written), put, close, ahead, ready)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}; give another --output") from error


def _row_by_row(stream: BinaryIO, name: str) -> Callable[[bytes], None]:
    def put(row: bytes) -> None:
        try:
            while row:  # one write a row, unless the system takes less of it
                row = row[stream.write(row) :]
            stream.flush()
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # the reader has gone
                raise
            raise DataError(f"cannot write to {name}: {error.strerror}; mend that, run again to go on") from error

    return put


def _as_a_whole(place: Any, clock: Callable[[], float]) -> tuple[Callable[[bytes], None], Callable[[], None]]:
    """`put` and `close` for a place that cannot grow: it is written whole from time to time, and at the end."""
    rows, written = [place.read_bytes()], clock()

    def put(row: bytes) -> None:
        nonlocal written
        rows.append(row)
        if clock() - written >= OBJECT_SECONDS:
            close()
            written = clock()

    def close() -> None:
        place.write_bytes(b"".join(rows))

    return put, close


def _run(examples: Sequence[Example], settings: Mapping[str, object]) -> tuple[dict[str, Any], str]:
    """What tells runs apart: the settings as JSON gives them back, and a digest of the input."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example)).encode())
    return json.loads(json.dumps(dict(settings))), digest.hexdigest()


def _record(path: str, settings: Mapping[str, object], digest: str) -> None:
    place = path_of(f"{path}.run.json")
    written = place.with_name(place.name + ".new") if isinstance(place, Path) else place  # objects are atomic anyway
    written.write_text(json.dumps({"settings": settings, "input": digest}, indent=1) + "\n")
    if written is not place:
        written.replace(place)


def finished(path: str, examples: Sequence[Example], settings: Mapping[str, object], each: int = 1) -> frozenset[str]:
    """The ids whose `each` rows an interrupted run left in `path`, or ahead of their turn beside it.

    A half-written last line or example is cut off. Raises DataError, each with the way out, when the rows are not those of
    this run: no record beside them, other settings or another input than recorded, a broken row, an id that the input does
    not have in that place.
    """
    written, ready = _left(path, examples, settings, each)
    return frozenset({*written, *ready})


def _left(
    path: str, examples: Sequence[Example], settings: Mapping[str, object], each: int
) -> tuple[Sequence[str], dict[str, bytes]]:
    """What an interrupted run left: the ids in `path`, and the rows of those that wait for their turn."""
    place = path_of(path)
    text, before_turn = place.read_bytes() if place.exists() else b"", Ahead(path).read()
    if not text and not before_turn:
        return (), {}
    anew = "or start anew with --overwrite"
    record = path_of(f"{path}.run.json")
    try:
        before = json.loads(record.read_text())
        old, digest = dict(before["settings"]), before["input"]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} has text, but {record} no record of its run; give another --output, {anew}") from error
    new, digest_now = _run(examples, settings)
    if differ := [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]:
        was, now_is = (", ".join(f"{key}={side.get(key)!r}" for key in differ) for side in (old, new))
        raise DataError(f"{path} was begun with {was}; this run has {now_is}: use the same settings, {anew}")
    if digest != digest_now:
        raise DataError(f"{path} was begun with another input; give the same one, another --output, {anew}")
    *rows, half = text.split(b"\n")
    ids = [example.id for example in examples for _ in range(each)]
    for line, raw in enumerate(rows, 1):
        try:
            found = json.loads(raw)["id"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{line}: no row of verdicts; take it and those behind it out, {anew}") from error
        if [found] != ids[line - 1 : line]:
            known = "out of its place" if found in ids else "not in the input"
            raise DataError(f"{path}:{line}: id {found!r} is {known}; give another --output, {anew}")
    whole = len(rows) - len(rows) % each
    if half := b"\n".join([*rows[whole:], half]):
        logger.warning("%s: dropped a half-written end of %d bytes", path, len(half))
        os.truncate(path, len(text) - len(half))
    return ids[:whole:each], _whole_examples(before_turn, set(ids[whole:]), each)


def _whole_examples(text: bytes, ids: Set[str], each: int) -> dict[str, bytes]:
    """The rows of each of these examples that has all of them; an interrupted run may have left some half-written."""
    rows: dict[str, list[bytes]] = {}
    for raw in text.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            rows.setdefault(json.loads(raw)["id"], []).append(raw + b"\n")
    return {id: b"".join(found) for id, found in rows.items() if id in ids and len(found) == each}
