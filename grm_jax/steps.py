"""The weights that a training run has saved after a step, read without the run: by name, a few at a time.

1. `find` takes a run's folder, its `checkpoints`, or one step, and reads the step's record: recipe and list of arrays;
2. `Step.read` restores arrays of the trained weights alone, holds each against its digest, and converts it.

Nothing is written or moved: a damaged step is an error here.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from grm_jax.checkpoint import RECIPE, RUN, STATE, STEPS, checked, digest, unfinished
from grm_jax.damage import Fault, attempt
from grm_jax.models.decoder import dtype_of

_PARAMS = "params."  # of `train.policy.State`: names of its leaves begin so
_AT_ONCE = 1 << 30  # bytes that are restored together


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a run."""

    place: epath.Path
    number: int
    recipe: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]  # of the trained weights, by parameter: all weights, or the adapters
    _arrays: dict[str, tuple[list[int], str, int]]  # shape, dtype and digest as saved

    def read(self, dtype: jnp.dtype, device: jax.Device) -> dict[str, jax.Array]:
        """The trained weights in `dtype`; beyond them the host holds a GiB, or the largest of them, as it was saved.

        Raises ValueError where the step is damaged.
        """
        place = jax.sharding.SingleDeviceSharding(device)
        found: dict[str, jax.Array] = {}
        for names in self._groups():
            target = {
                _PARAMS + name: jax.ShapeDtypeStruct(self.shapes[name], self._arrays[name][1], sharding=place)
                for name in names
            }
            restored = attempt(lambda target=target: _restore(self.place / STATE, target))
            if isinstance(restored, Fault):
                raise ValueError(self._damaged(restored.reason))
            for name in names:
                value = restored.pop(_PARAMS + name)
                if int(digest(value)) != self._arrays[name][2]:
                    raise ValueError(self._damaged(f"the values of {name} are not those that were saved"))
                found[name] = value.astype(dtype_of(name, dtype))
        return found

    def _groups(self) -> Iterator[list[str]]:
        group, size = [], 0
        for name, (shape, dtype, _) in self._arrays.items():
            bytes_ = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
            if group and size + bytes_ > _AT_ONCE:
                yield group
                group, size = [], 0
            group.append(name)
            size += bytes_
        yield group

    def _damaged(self, reason: str) -> str:
        return f"step {self.number}, {self.place}, is damaged: {reason}. {_others(self.place.parent, self.number)}"


def is_run(folder: epath.PathLike) -> bool:
    """Whether a folder is a training run's, its `checkpoints`, or a step of it."""
    folder = epath.Path(folder).expanduser()
    return (folder / STEPS).is_dir() or folder.name == STEPS or (folder / STATE).is_dir() or (folder / RECIPE).exists()


def find(folder: epath.PathLike, step: int | None) -> Step:
    """The step of a run, by default its last one; `folder` may also be one step itself.

    Raises FileNotFoundError for a step that is not there, ValueError for a damaged one.
    """
    folder = epath.Path(folder).expanduser()
    if "://" not in str(folder):
        folder = epath.Path(os.path.abspath(folder))  # Orbax takes no relative path
    if (folder / STATE).is_dir():
        if step is not None:
            raise ValueError(f"step = {step}, but {folder} is one step: give the run's folder, or leave the step out")
        return _open(folder)
    steps = folder if folder.name == STEPS else folder / STEPS
    known = _numbers(steps)
    if not known:
        raise FileNotFoundError(f"{steps} holds no finished step: the run has saved nothing yet")
    if step is not None and step not in known:
        raise FileNotFoundError(f"{steps} has no step {step}: it has {', '.join(map(str, known))}")
    return _open(steps / str(known[-1] if step is None else step))


def _numbers(steps: epath.Path) -> list[int]:
    places = steps.iterdir() if steps.exists() else ()
    return sorted(int(place.name) for place in places if place.name.isdecimal() and not unfinished(place))


def _open(place: epath.Path) -> Step:
    number = int(place.name) if place.name.isdecimal() else 0
    record = attempt(lambda: checked(_record(place), str(place)))
    if isinstance(record, Fault):
        raise ValueError(f"step {number}, {place}, is damaged: {record.reason}. {_others(place.parent, number)}")
    arrays = {name.removeprefix(_PARAMS): kind for name, kind in record["arrays"].items() if name.startswith(_PARAMS)}
    if not arrays:
        raise ValueError(f"{place} holds no trained weights but {sorted(record['arrays'])[:5]}: give a run's step")
    shapes = {name: tuple(shape) for name, (shape, _, _) in arrays.items()}
    return Step(place, number, record["recipe"], shapes, arrays)


def _record(place: epath.Path) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(place / RUN)


def _restore(place: epath.Path, target: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    wish = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(place, args=wish)


def _others(steps: epath.Path, damaged: int) -> str:
    others = [number for number in _numbers(steps) if number != damaged]
    return f"Give another --step: {', '.join(map(str, others))}" if others else "The run has no other step"
