"""Examples from JSON Lines: all rows are read, and every bad one is named with file, line, value and rule.

Nothing heavy is imported.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from grm_jax.datatypes import Example, Message

Parse = Callable[[object, str], Any]  # a decoded row and its id by default -> a record with an id, or RowError
ROLES = ("system", "user", "assistant")
SHOWN_ROWS = 20  # bad rows that an error lists


@dataclass(frozen=True)
class BadRow:
    """A row that is no example: where it stands, what was found and the rule that this breaks."""

    file: str
    line: int
    value: str
    rule: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}; found {self.value}"


class DataError(ValueError):
    """Input or output that cannot be used as it is; `bad` holds the rows, where rows are the reason."""

    def __init__(self, message: str, bad: Sequence[BadRow] = ()) -> None:
        super().__init__(message)
        self.bad = tuple(bad)


class RowError(ValueError):
    """One row's fault: a value and the rule that it breaks."""

    def __init__(self, value: object, rule: str) -> None:
        try:
            shown = json.dumps(value, default=repr)
        except RecursionError:  # it was read a few frames up, just within the limit
            shown = "lists in lists in lists"
        self.value, self.rule = shown if len(shown) <= 60 else f"{shown[:56]} ...", rule
        super().__init__(f"{rule}; found {self.value}")


def read_examples(path: str, skip_bad: bool) -> tuple[list[Example], list[BadRow]]:
    """The examples of a JSON Lines file, in its order, and the rows that are none, as `read_rows` gives them."""
    return read_rows(path, parse_row, skip_bad, '{"prompt": "...", "responses": ["..."]}')


def read_rows(path: str, parse: Parse, skip_bad: bool, such_as: str) -> tuple[list[Any], list[BadRow]]:
    """What `parse` makes of a file's rows, in its order, where `row-<line>` is an id by default; and the bad rows.

    `path` may be `gs://`, "-" or a `.gz`. Raises DataError: unreadable, no good row, or a bad one without `skip_bad`.
    """
    records, bad, line_of = list[Any](), list[BadRow](), dict[str, int]()
    name = "standard input" if path == "-" else path
    for line, raw in _lines(path, name):
        try:
            record = parse(_json(raw), f"row-{line}")
            if (first := line_of.setdefault(record.id, line)) != line:
                raise RowError(record.id, f"ids are unique, and line {first} has this one: change or remove one")
            records.append(record)
        except RowError as error:
            bad.append(BadRow(name, line, error.value, error.rule))
    if bad and (not skip_bad or not records):
        listed = "".join(f"\n  {row}" for row in bad[:SHOWN_ROWS])
        more = f"\n  and {len(bad) - SHOWN_ROWS} more" * (len(bad) > SHOWN_ROWS)
        way_out = "correct them, or leave them out (score --skip-bad)" if records else "no good row is left"
        raise DataError(f"{len(bad)} bad rows in {name}; {way_out}:{listed}{more}", bad)
    if not records:
        raise DataError(f"{name} is empty; give at least one row, such as {such_as}")
    return records, bad


def parse_row(row: object, default_id: str) -> Example:
    """The example in one decoded JSON row. Raises RowError with the value and the rule that it breaks."""
    if not isinstance(row, dict):
        raise RowError(row, "a row is a JSON object with a conversation and responses")
    row = {key: value for key, value in row.items() if value is not None}  # tables export absent cells as null
    pair = "chosen" in row and "rejected" in row
    if pair == ("responses" in row):
        raise RowError(sorted(row), "a row has either 'responses', or 'chosen' and 'rejected'")
    if pair:
        messages, responses = _pair(row)
    else:
        messages = conversation_of(row)
        responses = tuple(text_of(text, "responses") for text in list_of(row["responses"], "responses"))
    if messages[-1].role != "user" or not messages[-1].content.strip():
        raise RowError(asdict(messages[-1]), "a conversation ends with a turn of the user, which is not blank")
    return Example(
        id=id_of(row.get("id", default_id)),
        messages=messages,
        responses=responses,
        scores=_scores(row["scores"], len(responses)) if "scores" in row else (1.0, 0.0) if pair else None,
        reference=text_of(row["reference"], "reference") or None if "reference" in row else None,
        strength=_number(row["strength"], "strength") if "strength" in row else None,
        source=text_of(row["source"], "source") if "source" in row else None,
    )


def _lines(path: str, name: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines from 1 on, stripped, but for blank ones. Raises DataError for a file that cannot be read."""
    with contextlib.ExitStack() as stack:
        try:
            stream: Any = sys.stdin.buffer if path == "-" else stack.enter_context(path_of(path).open("rb"))
            if path.endswith(".gz"):
                stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
            for line, raw in enumerate(stream, 1):
                if raw := (raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw).strip():
                    yield line, raw
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise DataError(f"cannot read {name}: {reason}; give a JSON Lines file, or - for standard input") from error


def path_of(path: str) -> Any:
    if "://" not in path:
        return Path(path)
    from etils import epath  # only here: buckets need packages that take seconds to import

    return epath.Path(path)


def _json(raw: bytes) -> object:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number of JSON's; leave its key out")

    try:
        text = raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        near = raw[max(0, error.start - 10) : error.start + 10].decode("ascii", "backslashreplace")
        raise RowError(near, "a row is UTF-8 text") from error
    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and lists in lists in lists
        at, fault = getattr(error, "pos", 0), getattr(error, "msg", error)
        raise RowError(text[max(0, at - 20) : at + 20], f"a row is one line of JSON ({fault})") from error


def text_of(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise RowError(value, f"'{key}' is a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(ascii(value[error.start : error.end]), f"'{key}' holds half a surrogate pair") from error
    return value


def list_of(value: object, key: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RowError(value, f"'{key}' is a list that is not empty")
    return value


def turns_of(value: object, key: str) -> tuple[Message, ...]:
    for turn in list_of(value, key):
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            raise RowError(turn, f"a turn of '{key}' is an object with 'role' and 'content'")
        if turn["role"] not in ROLES:
            raise RowError(turn["role"], f"a role in '{key}' is one of {', '.join(ROLES)}")
    return tuple(Message(turn["role"], text_of(turn["content"], f"{key}: content")) for turn in value)


def conversation_of(row: Mapping[str, object]) -> tuple[Message, ...]:
    if ("prompt" in row) == ("messages" in row):
        raise RowError(sorted(row), "a row has a conversation, as either 'prompt' or 'messages'")
    key = "messages" if "messages" in row else "prompt"
    if key == "messages" or isinstance(row[key], list):
        return turns_of(row[key], key)
    return (Message("user", text_of(row["prompt"], "prompt")),)


def _pair(row: Mapping[str, object]) -> tuple[tuple[Message, ...], tuple[str, str]]:
    """The conversation and both responses of a preference row; chat lists may carry the conversation with them."""
    told = [conversation_of(row)] if "prompt" in row or "messages" in row else []
    responses = []
    for key in ("chosen", "rejected"):
        if isinstance(row[key], str):
            responses.append(text_of(row[key], key))
            continue
        *earlier, last = turns_of(row[key], key)
        if last.role != "assistant":
            raise RowError(last.role, f"the last turn of '{key}' is the assistant's, the response")
        responses.append(last.content)
        if earlier:
            told.append(tuple(earlier))
    if not told:
        raise RowError(sorted(row), "a row has a conversation: 'prompt', 'messages', or turns before the response")
    for other in told[1:]:
        if other != told[0]:
            differing = next((a for a, b in zip(other, told[0], strict=False) if a != b), other[-1])
            raise RowError(differing.content, "'chosen' and 'rejected' answer one conversation, the row's own")
    return told[0], (responses[0], responses[1])


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise RowError(value, f"'{key}' is a finite number")
    return float(value)


def _scores(value: object, n: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != n:
        raise RowError(value, f"'scores' is a list of one number a response, here {n}")
    return tuple(_number(score, "scores") for score in value)


def id_of(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise RowError(value, "'id' is a string that is not empty, or a whole number")
    return text_of(value, "id")
