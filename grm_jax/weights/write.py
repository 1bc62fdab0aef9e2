"""Files of weights, written so that a name always stands for a whole file, and one parameter at a time is on the host.

1. `writing` gives a file to fill; it takes its name, in a local folder or a gs:// one, once it is complete;
2. `write_safetensors` lists the tensors in the file's header, then fetches and appends one after the other.

All processes of a run call `write_safetensors` together, because each holds parts of the arrays; process 0 writes.
The layout is that of https://github.com/huggingface/safetensors: the header's length as 8 bytes, a JSON object of
types, shapes and offsets, and the tensors' bytes in that order.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils


class Tensor(NamedTuple):
    """What a tensor of a file holds."""

    value: jax.Array
    shape: tuple[int, ...]  # that it has in the file
    row: int | None = None  # the tensor is this row of the array's leading axis; None: the whole array
    dtype: jnp.dtype | None = None  # that it has in the file; None: the file's

    def bytes_in(self, dtype: jnp.dtype) -> int:
        """Its size in a file of this dtype."""
        return math.prod(self.shape) * (self.dtype or dtype).itemsize


CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # dtypes that are written


def is_remote(path: epath.PathLike) -> bool:
    return "://" in str(path)


@contextmanager
def writing(folder: epath.Path, name: str) -> Iterator[BinaryIO]:
    """A file to fill. It is renamed (local) or uploaded (gs://) when the block ends, and dropped if the block fails."""
    if is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="grm_jax_weights_") as local:
            path = Path(local) / name
            with path.open("wb") as file:
                yield file
            epath.Path(path).copy(folder / name, overwrite=True)
        return
    path = Path(folder) / f".{name}.writing"
    try:
        with path.open("wb") as file:
            yield file
        os.replace(path, Path(folder) / name)
    finally:
        path.unlink(missing_ok=True)


def write_json(folder: epath.Path, name: str, value: Mapping[str, Any]) -> None:
    with writing(folder, name) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def to_host(value: jax.Array, dtype: jnp.dtype) -> np.ndarray:
    """The whole array in `dtype`, on every process; rounded on its own devices, so that less is moved."""
    value = value.astype(dtype)
    if value.is_fully_addressable:
        return np.asarray(jax.device_get(value))
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))


def write_safetensors(folder: epath.Path, name: str, tensors: Mapping[str, Tensor], dtype: jnp.dtype) -> None:
    """A safetensors file of these tensors in `dtype` (float32, bfloat16 or float16), but for those of their own."""
    dtype = jnp.dtype(dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
    end = 0
    for name_in_file, tensor in tensors.items():
        start, end = end, end + tensor.bytes_in(dtype)
        described = {
            "dtype": CODES[(tensor.dtype or dtype).name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        header[name_in_file] = described
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8
    with ExitStack() as stack:
        file = stack.enter_context(writing(folder, name)) if jax.process_index() == 0 else None
        if file is not None:
            file.write(len(text).to_bytes(8, "little") + text)
        for value, _, row, own in tensors.values():
            host = to_host(value if row is None else value[row], own or dtype)
            if file is not None:
                file.write(np.ascontiguousarray(host).view(np.uint8).data)
