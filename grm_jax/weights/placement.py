"""Rows of a file become a sharded array: each number is read once, converted once, and written where it stays.

What happens in `place`, and in `Placing` where a parameter's rows are several tensors:
1. one buffer is made for each distinct shard that this process holds, in the parameter's own dtype;
2. the tensor is read in slabs of a few MiB, and the part of a slab that falls in a shard is converted into it;
3. each shard goes to its devices: on an accelerator by a copy, on the CPU by adopting the buffer itself.

So beyond the model, the host holds at most one tensor (none on the CPU) and one slab. Buffers start at a multiple of
64 bytes because the CPU backend adopts only such memory, and copies any other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from etils import epath

from grm_jax.log import logger

SLAB_BYTES = 4 << 20
_ALIGNMENT = 64

Rows = Callable[[int, int], np.ndarray]  # rows(start, stop) of the parameter's leading axis: [stop - start, ...]


class Placing:
    """An array that `target` describes (shape, dtype, sharding; none: the default device), while its rows are filled."""

    def __init__(self, target: jax.ShapeDtypeStruct) -> None:
        self.target = target
        self.sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self.missing = target.shape[0]  # rows
        self.shards = {}  # (start, stop) an axis -> buffer; devices that hold the same piece share it
        self.pieces = []  # (device, its piece)
        for device, index in self.sharding.addressable_devices_indices_map(target.shape).items():
            piece = tuple(s.indices(n)[:2] for s, n in zip(index, target.shape, strict=True))
            if piece not in self.shards:
                self.shards[piece] = _buffer(tuple(stop - start for start, stop in piece), target.dtype)
            self.pieces.append((device, piece))

    def fill(self, start: int, stop: int, rows: Rows) -> None:
        """Rows [start, stop), each once; conversion between floats rounds to nearest. Only those are read that a local
        shard needs, in slabs."""
        step = max(1, SLAB_BYTES // (4 * max(1, int(np.prod(self.target.shape[1:])))))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            wanted = [pair for pair in self.shards.items() if pair[0][0][0] < last and first < pair[0][0][1]]
            if wanted:
                slab = rows(first, last)
                for piece, buffer in wanted:
                    _copy(slab, first, last, piece, buffer)
        self.missing -= stop - start

    def array(self) -> jax.Array:
        """The array, once no row is missing."""
        arrays = [jax.device_put(self.shards[piece], device) for device, piece in self.pieces]
        jax.block_until_ready(arrays)  # buffers of an accelerator's shards are freed before the next tensor is read
        shape, dtype = self.target.shape, self.target.dtype
        return jax.make_array_from_single_device_arrays(shape, self.sharding, arrays, dtype=dtype)


def place(target: jax.ShapeDtypeStruct, rows: Rows) -> jax.Array:
    """The array that `target` describes, filled from `rows`."""
    placing = Placing(target)
    placing.fill(0, target.shape[0], rows)
    return placing.array()


def _copy(slab: np.ndarray, start: int, stop: int, piece: tuple[tuple[int, int], ...], buffer: np.ndarray) -> None:
    """Convert the part of slab rows [start, stop) that lies in `piece` into its buffer."""
    first, last = max(start, piece[0][0]), min(stop, piece[0][1])
    rest = tuple(slice(*bounds) for bounds in piece[1:])
    buffer[first - piece[0][0] : last - piece[0][0]] = slab[(slice(first - start, last - start), *rest)]


def _buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


@contextmanager
def local_file(path: epath.Path) -> Iterator[Path]:
    """The file itself where it can be memory-mapped; a remote one (gs://) is copied to a temporary file meanwhile."""
    if "://" not in str(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="grm_jax_weights_") as folder:
        copy = Path(folder) / path.name
        logger.info("copying %s to %s", path, copy)
        path.copy(copy)
        yield copy
