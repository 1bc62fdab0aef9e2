"""The rows of a benchmark's official files: JSON, JSON Lines and parquet, plain or `.gz`, in a folder, local or gs://."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from etils import epath

from grm_jax.data.jsonl import SHOWN_ROWS, BadRow, DataError, RowError

Found = TypeVar("Found")
FORMS = (".jsonl", ".parquet", ".json")
_ENDING = re.compile(r"\.(?:jsonl?|parquet)(\.[^/]*)?$")
_REGEX = {"**/": "(?:.*/)?", "*": "[^/]*"}


def find(folder: str, patterns: Sequence[str], where: str, several: bool = False) -> list[epath.Path]:
    """The files of the first pattern that any file below the folder matches, in the order of their names; a file is itself.

    In a pattern `*` stands for a part of a name and `**/` for any folders. It ends as the official files do; where no file
    ends so, the other FORMS are tried before the next pattern. Each may be .gz. several: the benchmark has files of several
    kinds, and one cannot be all of it.

    Raises FileNotFoundError, with the patterns and `where` to get the files, and DataError for an unreadable folder.
    """
    root = epath.Path(folder).expanduser()
    if root.is_file():
        if several:
            raise FileNotFoundError(f"{folder} is one file, and a folder with {' or '.join(patterns)} is due: {where}")
        return [root]
    files = _of_rows(root)
    for pattern in _with_endings(patterns):
        regex = re.compile("".join(_REGEX.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*)", pattern)))
        if found := [path for name, path in files.items() if regex.fullmatch(name)]:
            return found
    forms = ", ".join(FORMS)
    raise FileNotFoundError(f"{folder} has no {' or '.join(patterns)} ({forms}, plain or .gz): {where}")


def _with_endings(patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        stem = pattern.rpartition(".")[0]
        yield from dict.fromkeys((pattern, *(stem + form for form in FORMS)))  # the official form once, and first


def _of_rows(root: epath.Path) -> dict[str, epath.Path]:
    """The files below a folder that may hold rows, by their names without .gz; of a file in both, the plain one.

    No rows: what lies beside an output `x.jsonl`, its `x.jsonl.run.json` and `x.jsonl.ahead`.
    """
    files: dict[str, epath.Path] = {}
    try:
        for name, path in sorted(_below(root)) if root.exists() else ():
            if (ending := _ENDING.search(name)) and ending[1] in (None, ".gz"):
                files.setdefault(name.removesuffix(".gz"), path)
    except OSError as error:
        raise _unreadable(root, error) from error
    return files


def _unreadable(path: epath.Path, error: OSError) -> DataError:
    reason = error.strerror or f"{type(error).__name__}: {error}"
    return DataError(f"cannot read {error.filename or path}: {reason}; make it readable, or give another --data")


def _below(folder: epath.Path, prefix: str = "") -> Iterator[tuple[str, epath.Path]]:
    """(Name relative to the folder, path) of every file below it; hidden ones are passed over."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _below(path, f"{prefix}{path.name}/")
        else:
            yield f"{prefix}{path.name}", path


def rows(path: epath.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows of a file, from 1 on. Raises DataError, naming the file, where it cannot be read as its ending says."""
    name = str(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        if name.endswith(".gz"):
            name, data = name.removesuffix(".gz"), gzip.decompress(data)
        if name.endswith(".parquet"):
            import pyarrow.parquet

            found = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
        elif not name.endswith(".jsonl"):
            found = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError, EOFError, OSError, zlib.error) as error:  # Arrow's are ValueErrors and OSErrors
        raise DataError(f"cannot read {path}: {error}; give the official file") from error
    if name.endswith(".jsonl"):
        yield from _lines(path, data)
        return
    if not isinstance(found, list):
        raise DataError(f"{path} holds a {type(found).__name__}; the official file is a list of rows")
    yield from enumerate(found, 1)


def _lines(path: epath.Path, data: bytes) -> Iterator[tuple[int, Any]]:
    """Lines end with a line feed alone: JSON's strings may hold the other characters that end lines elsewhere."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line := line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # also lists in lists in lists
                raise DataError(f"cannot read {path}:{number}: {error}; give the official file") from error


def parsed(
    paths: Sequence[epath.Path], parse: Callable[[epath.Path, int, dict[str, Any]], list[Found]], where: str
) -> list[Found]:
    """What `parse` makes of all rows, several or none of each.

    Raises DataError that lists the rows it refuses, and says `where` to get the files.
    """
    found: list[Found] = []
    bad: list[BadRow] = []
    for path in paths:
        for number, row in rows(path):
            try:
                if not isinstance(row, dict):
                    raise RowError(row, "a row is a JSON object")
                found += parse(path, number, row)
            except RowError as error:
                bad.append(BadRow(str(path), number, error.value, error.rule))
            except KeyError as error:
                bad.append(BadRow(str(path), number, ", ".join(sorted(row)), f"a row has the key {error}"))
            except (TypeError, ValueError, IndexError, AttributeError) as error:  # null, or text, where a list is due
                bad.append(
                    BadRow(str(path), number, RowError(row, "").value, f"a row's values have other types ({error})")
                )
    if bad:
        listed = "".join(f"\n  {row}" for row in bad[:SHOWN_ROWS])
        more = f"\n  and {len(bad) - SHOWN_ROWS} more" * (len(bad) > SHOWN_ROWS)
        raise DataError(f"{len(bad)} rows are not as the official files have them; {where}:{listed}{more}", bad)
    return found
