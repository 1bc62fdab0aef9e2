"""What a training run reports: numbers a step, full judgments, and what they are measured against.

1. `Metrics` writes one row a step to `metrics.jsonl`, the same numbers for TensorBoard, and a line to the log.
2. A run that goes on at a step drops the rows behind it: that part of the run happens again.
3. `peak_flops` and `device_memory` are facts of the device; what a model needs is counted in `models/flops.py`.

A row has the step first, floats in full, and NaN and infinities as the strings "nan", "inf" and "-inf", which JSON has no
numbers for. A local file grows row by row; an object in a bucket is written whole, every OBJECT_SECONDS, at `flush` and
at the end. Process 0 alone writes; the others' calls do nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Shaped
from tensorboardX import SummaryWriter

from grm_jax.log import logger
from grm_jax.models.flops import product_flops

SHOWN = 6  # numbers of a step's line in the log, the first of its values
OBJECT_SECONDS = 30.0  # between two writes of an object in a bucket
FLUSH_SECONDS = 30  # between two writes of TensorBoard's file

# Dense bfloat16 FLOP/s of one JAX device by its device_kind, as cloud.google.com/tpu/docs has them (a chip has one
# device from v4 on, but two on TPU7x, which has no megacore: half of the chip's 2307e12) and NVIDIA's data sheets.
_PEAK_FLOPS = {
    "TPU v4": 275e12,  # /v4
    "TPU v5 lite": 197e12,  # /v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # /v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # /v6e
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # /tpu7x
    "NVIDIA A100-SXM4-40GB": 312e12,  # A100 data sheet; its PCIe and 80 GB variants are as fast
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # H100 data sheet, SXM; 1979e12 there is with sparsity
    "NVIDIA H200": 989e12,  # H200 data sheet, SXM
}


class Metrics(contextlib.AbstractContextManager["Metrics"]):
    """A run's `metrics.jsonl`, `samples.jsonl`, `held_out.jsonl` and `tensorboard` in its folder, and its log lines."""

    def __init__(self, folder: str, resume_step: int, process_index: int | None = None) -> None:
        """Go on behind `resume_step`, the last step that the restored state has seen; -1 for a run that starts.

        Rows of later steps, and half-written ones, are dropped. `process_index` is this process's by default.
        """
        self._writes = (jax.process_index() if process_index is None else process_index) == 0
        if not self._writes:
            return
        place = epath.Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        self._rows = _Rows(place / "metrics.jsonl", resume_step)
        self._samples = _Rows(place / "samples.jsonl", resume_step)
        self._held_out = _Rows(place / "held_out.jsonl", resume_step)
        self._board = _Board(place / "tensorboard", resume_step)

    def write(
        self,
        step: int,
        values: Mapping[str, SupportsFloat],
        by_source: Mapping[str, Mapping[str, SupportsFloat]] | None = None,
    ) -> None:
        """One step's numbers, those to show first; `by_source` is {source: {name: number}}, written as name/source.

        Raises ValueError for a name that comes twice, and for the name "step".
        """
        if not self._writes:
            return
        row: dict[str, Any] = {"step": step}
        apart = [(f"{name}/{source}", x) for source, of in (by_source or {}).items() for name, x in of.items()]
        for name, value in [*values.items(), *apart]:
            if name in row:
                raise ValueError(f"step {step} has two values of {name!r}: a row has each name once, and 'step' first")
            row[name] = value if isinstance(value, int) else float(value)
        self._rows.add(row)
        self._board.add(row)
        shown = list(row.items())[1 : 1 + min(SHOWN, len(values))]
        logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in shown))

    def held_out(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """What held-out examples gave after `step` steps: a row of `held_out.jsonl`, held_out/... on the board."""
        if not self._writes:
            return
        self._held_out.add({"step": step, **values})
        self._board.add({"step": step} | {f"held_out/{name}": value for name, value in values.items()})

    def samples(self, step: int, texts: Sequence[Mapping[str, Any]]) -> None:
        """Judgments in full, each what JSON can hold; the log shows the first one."""
        if not self._writes or not texts:
            return
        for text in texts:
            self._samples.add({"step": step, **text})
        shown = "\n".join(f"  {name}: {value}" for name, value in texts[0].items())
        shown = shown.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair ends no log
        logger.info("step %d, one of %d judgments:\n%s", step, len(texts), shown)

    def flush(self) -> None:
        """Write what is waiting; to be called before a checkpoint, behind which no row may be missing."""
        if self._writes:
            self._rows.flush()
            self._samples.flush()
            self._held_out.flush()
            self._board.flush()

    def close(self) -> None:
        """Finish the files."""
        if self._writes:
            self._rows.close()
            self._samples.close()
            self._held_out.close()
            self._board.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class _Rows:
    """A JSON Lines file whose rows begin with a step."""

    def __init__(self, place: Any, resume_step: int) -> None:
        self._place, self._written, self._stream = place, time.monotonic(), None
        before = place.read_bytes() if place.exists() else b""
        self._text = bytearray(_up_to(resume_step, before, str(place)))
        bucket = "://" in str(place)
        if bytes(self._text) != before:
            new = place if bucket else place.with_name(f"{place.name}.new")
            new.write_bytes(bytes(self._text))
            if not bucket:
                new.replace(place)
        if not bucket:
            self._stream = Path(place).open("ab", buffering=0)  # noqa: SIM115
            self._text.clear()

    def add(self, row: Mapping[str, Any]) -> None:
        line = (json.dumps(_plain(row), allow_nan=False) + "\n").encode()
        if self._stream is not None:
            while line:  # one write a row, unless the system takes less of it
                line = line[self._stream.write(line) :]
            return
        self._text += line
        if time.monotonic() - self._written >= OBJECT_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._stream is None:
            self._place.write_bytes(bytes(self._text))
            self._written = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._stream is not None:
            self._stream.close()


class _Board:
    """TensorBoard's event file; for a bucket it grows in a temporary folder and is copied from there."""

    def __init__(self, place: Any, resume_step: int) -> None:
        self._place, self._written = place, time.monotonic()
        self._local = tempfile.TemporaryDirectory() if "://" in str(place) else None
        folder = os.fspath(place) if self._local is None else self._local.name
        # Files are read in the order of their names, which tell whole seconds and the host: two of one second are one.
        suffix = f".{time.time_ns()}"
        purge = max(resume_step + 1, 0)  # TensorBoard hides this step's and later events of earlier files
        self._writer = SummaryWriter(folder, purge_step=purge, flush_secs=FLUSH_SECONDS, filename_suffix=suffix)

    def add(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])
        if self._local is not None and time.monotonic() - self._written >= OBJECT_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._copy()

    def close(self) -> None:
        self._writer.close()
        self._copy()
        if self._local is not None:
            self._local.cleanup()

    def _copy(self) -> None:
        if self._local is not None:
            for file in Path(self._local.name).iterdir():
                (self._place / file.name).write_bytes(file.read_bytes())
            self._written = time.monotonic()


def _up_to(step: int, text: bytes, name: str) -> bytes:
    """The rows of a JSON Lines text up to a step; what is no row is dropped with a warning."""
    *lines, half = text.split(b"\n")
    kept, spoiled = [], [half] if half else []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            spoiled.append(line)
    if spoiled:
        logger.warning("%s: dropped %d lines that are half-written or no rows", name, len(spoiled))
    return b"".join(kept)


def _plain(value: Any) -> Any:
    """A value as a row holds it: infinite and undefined numbers, however deep, are strings."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def by_source(sources: Sequence[str], values: Mapping[str, Shaped[np.ndarray, "R"]]) -> dict[str, dict[str, float]]:
    """{source: {name: mean over its rows}} of `values`, whose row r belongs to sources[r]; in order of appearance."""
    for name, of in values.items():
        if len(of) != len(sources):
            raise ValueError(f"{name} has {len(of)} rows, there are {len(sources)} sources: give one of each a row")
    rows = {source: [r for r, other in enumerate(sources) if other == source] for source in dict.fromkeys(sources)}
    return {source: {name: float(np.mean(of[at])) for name, of in values.items()} for source, at in rows.items()}


def speed(tokens: float, flops: float, seconds: float) -> dict[str, float]:
    """What a step of so many seconds reached: tokens/s, and MFU, the share of all devices' FLOP/s (arXiv 2204.02311)."""
    reached = flops / seconds
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": reached / (jax.device_count() * _device_flops()),
        "memory_gb": device_memory() / 1e9,
    }


@functools.cache
def _device_flops() -> float:
    """The device's FLOP/s by its maker's word, or what a product of large matrices reaches, shared by simulated ones."""
    device = jax.devices()[0]
    return peak_flops(device) or product_flops(jnp.float32) / (jax.device_count() if device.platform == "cpu" else 1)


def peak_flops(device: Any) -> float | None:
    """Dense bfloat16 FLOP/s of a jax.Device by its maker's word; None where the table has none, as for CPUs."""
    return _PEAK_FLOPS.get(device.device_kind)


def device_memory() -> int:
    """The most bytes held so far: of the device where it says so, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
