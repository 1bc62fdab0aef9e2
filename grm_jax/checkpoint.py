"""Checkpoints of a training run, and how a run is stopped and goes on.

1. `claim` writes the run's `recipe.json`, or compares it: a run that goes on has the recipe that it was started with.
2. `Saver.restore` gives the newest step that is whole; damaged ones are moved aside and named in the log.
3. `Saver.save` copies the state to the host and returns; the writing happens behind the loop's back, and the step
   appears under its number only when all of it is written.
4. `Interrupt` turns SIGTERM and Ctrl-C into a flag that the loop reads.

A step is one folder, `checkpoints/STEP`, by Orbax: `state` (the arrays) and `run` (the data iterator's state, the recipe,
and shape, dtype and digest of every array). The digests are taken on the device before anything is copied, and taken
again of what was restored: Orbax itself notices a file that is cut or gone, but not a flipped byte inside of an array.

All processes call `claim`, `save`, `restore` and `close` alike; process 0 alone renames and writes `recipe.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, Shaped, UInt32
from orbax.checkpoint import args
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from grm_jax import recipes
from grm_jax.damage import Fault, attempt
from grm_jax.log import logger

# Fields of a recipe that may differ when a run goes on: none of them changes what is learned.
FREE = (
    *("checkpoints", "profile", "log_samples_every", "output"),
    *(
        "devices",
        "mesh",
        "kernels",
        "microbatch",
        "microbatch_rows",
        "microbatch_prompts",
        "remat",
        "slots",
    ),  # how, not what
)
RECIPE, STEPS = "recipe.json", "checkpoints"  # in a run's folder
STATE, RUN = "state", "run"  # in a step's
Value = TypeVar("Value")


def claim(folder: str, recipe: object) -> None:
    """Make `folder` this recipe's: write `recipe.json` there, or compare it with the one that is there.

    Fields in FREE may differ, and the steps of a constant schedule; the file then holds the new ones. Raises ValueError
    for another recipe, naming the fields, and for a file that holds none.
    """
    place, text = _path(folder) / RECIPE, recipes.as_json(recipe)
    check_claim(folder, recipe)
    if jax.process_index() == 0 and not (place.exists() and place.read_text() == text):
        place.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(place, text)


def check_claim(folder: str, recipe: object) -> None:
    """Raise what `claim` would, and write nothing: for before the first thing is written, or a model loaded."""
    place = _path(folder) / RECIPE
    if place.exists():
        saved = place.read_text()
        try:
            json.loads(saved)
        except ValueError as error:
            raise ValueError(f"{place} holds no recipe ({error}): give another output, or mend the file") from error
        constant = getattr(getattr(recipe, "optimizer", None), "schedule", None) == "constant"
        recipes.check_same(saved, recipe, (*FREE, "steps") if constant else FREE)


@dataclasses.dataclass(frozen=True)
class Saver:
    """A run's checkpoints; made by `open`, closed as a context manager is."""

    folder: Any  # epath.Path of the steps
    settings: recipes.Checkpoints
    recipe: Any  # what JSON can hold
    manager: ocp.CheckpointManager

    @classmethod
    def open(cls, folder: str, settings: recipes.Checkpoints, recipe_json: str) -> Saver:
        """The checkpoints of the run in `folder`, local or gs://; parts of a step whose writing was cut off are removed."""
        place = _path(folder) / STEPS
        if jax.process_index() == 0 and place.exists():
            for part in sorted(part for part in place.iterdir() if unfinished(part)):
                logger.warning("%s: the run ended while this was written; removed", part)
        kept: list[keep.PreservationPolicy] = [keep.LatestN(settings.keep_last)]
        if settings.keep_every is not None:
            kept.append(keep.EveryNSteps(settings.keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy(kept), cleanup_tmp_directories=True
        )
        return cls(place, settings, json.loads(recipe_json), ocp.CheckpointManager(place, options=options))

    def due(self, step: int) -> bool:
        """Whether the settings ask for a checkpoint after this many steps."""
        return step > 0 and step % self.settings.every == 0

    def save(self, step: int, state: Any, data: Mapping[str, Any]) -> bool:
        """Save a pytree of jax.Arrays (typed keys too) and what JSON can hold; False where the step is there already.

        Returns when the state is copied, so that it may be donated; waits first for an earlier save that is still being
        written, and raises the error of one that failed. Raises ValueError, naming it, for a leaf that is empty or no
        jax.Array.
        """
        if step in self.manager.all_steps():
            return False
        leaves = _named(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise ValueError(f"{name} of the state is a {type(leaf).__name__}: a checkpoint holds jax.Arrays alone")
            if not leaf.size:
                raise ValueError(f"{name} of the state has no elements, {leaf.shape}: leave it out of what is saved")
        found = digests(leaves)
        arrays = {name: [*_kind(leaf), found[name]] for name, leaf in leaves.items()}
        record = json.loads(json.dumps({"data": dict(data), "recipe": self.recipe, "arrays": arrays}))
        run = record | {"crc32": _crc32(record)}
        self.manager.save(
            step, args=args.Composite(state=args.StandardSave(leaves), run=args.JsonSave(run)), force=True
        )
        return True

    def restore(self, target: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, data) of the newest step that is whole, or None; `target` is a pytree of ShapeDtypeStructs.

        The state lies as the target's shardings say, whatever they were when it was saved. A damaged step is renamed to
        `damaged-STEP` and named in the log, in one line. Raises ValueError when the step is another model's state.
        """
        leaves = _named(target)
        for name, leaf in leaves.items():
            if getattr(leaf, "sharding", None) is None:
                raise ValueError(
                    f"{name} of the target has no sharding: give ShapeDtypeStructs that say where they lie"
                )
        self.wait()
        self.manager.reload()
        reader = self._reader()
        for step in sorted(self.manager.all_steps(), reverse=True):
            found = self._read(reader, step, leaves)
            if not isinstance(found, Fault):
                restored, data = found
                return step, jax.tree.unflatten(jax.tree.structure(target), [restored[name] for name in leaves]), data
            self._put_aside(step, found.reason)
        return None

    def wait(self) -> None:
        """Return when nothing is being written any more; raises the error of a save that failed."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the last save and let go of what Orbax holds."""
        self.manager.close()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reader(self) -> ocp.CheckpointManager:
        """A manager whose `restore` waits for no other process: one that finds damage leaves it while others read on."""
        if jax.process_count() == 1:
            return self.manager
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=None, active_processes={me}, barrier_sync_key_prefix=f"reader{me}"
        )
        options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
        return ocp.CheckpointManager(self.folder, options=options)

    def _read(
        self, reader: ocp.CheckpointManager, step: int, leaves: Mapping[str, Any]
    ) -> tuple[dict[str, Array], dict[str, Any]] | Fault:
        record = _agreed(attempt(lambda: self._record(reader, step)))
        if isinstance(record, Fault):
            return record
        saved = {name: tuple(kind) for name, (*kind, _) in record["arrays"].items()}
        wanted = {name: _kind(leaf) for name, leaf in leaves.items()}
        if differing := [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]:
            told = "; ".join(
                f"{name} was {_shown(saved.get(name))}, is {_shown(wanted.get(name))}" for name in differing[:3]
            )
            raise ValueError(
                f"{self.folder}/{step} holds the state of another model, {len(differing)} of {len(wanted)} arrays "
                f"differ: {told}. Give another output, or the model and optimizer that the run was started with"
            )

        wish = args.Composite(state=args.StandardRestore(dict(leaves)))
        found = _agreed(attempt(lambda: reader.restore(step, args=wish).state))
        if isinstance(found, Fault):
            return found
        for name, value in digests({name: found[name] for name in leaves}).items():
            if value != record["arrays"][name][-1]:
                return Fault(f"the values of {name} are not those that were saved")
        return found, record["data"]

    def _record(self, reader: ocp.CheckpointManager, step: int) -> dict[str, Any]:
        return checked(reader.restore(step, args=args.Composite(run=args.JsonRestore())).run, f"{self.folder}/{step}")

    def _put_aside(self, step: int, reason: str) -> None:
        if jax.process_index() == 0:
            place, n = self.folder / f"damaged-{step}", 1
            while place.exists():
                n += 1
                place = self.folder / f"damaged-{step}-{n}"
            (self.folder / str(step)).rename(place)
            logger.warning("step %d does not restore, moved to %s: %s", step, place, reason)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged {step}")
        self.manager.reload()


def checked(found: Mapping[str, Any], step: str) -> dict[str, Any]:
    """What a step's `run` holds: "data", "recipe", and "arrays" with shape, dtype and digest of each. Raises ValueError."""
    record = dict(found)
    if record.pop("crc32", None) != _crc32(record):
        raise ValueError(f"{step}/{RUN} is not what was saved")
    return record


class Interrupt(contextlib.AbstractContextManager["Interrupt"]):
    """While it is entered, SIGTERM and the first SIGINT set a flag; a second SIGINT raises KeyboardInterrupt at once.

    Signals reach the main thread alone: elsewhere it does nothing, and `asked` stays False.
    """

    def __init__(self) -> None:
        self._asked = self._twice = False
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether to save and leave. With several processes all read it together, and one that was asked asks all."""
        if jax.process_count() == 1:
            return self._asked
        return bool(multihost_utils.process_allgather(np.asarray(self._asked)).any())

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not installed from Python
        self._before.clear()

    def _take(self, number: int, _frame: object) -> None:  # logs nothing: it may have cut into a log line
        if number == signal.SIGINT and self._twice:
            raise KeyboardInterrupt
        self._asked, self._twice = True, self._twice or number == signal.SIGINT


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """The digest of each array; all processes that hold a part of one have to ask together."""
    if jax.default_backend() != "cpu" and jax.process_count() == 1:
        return {name: int(value) for name, value in jax.device_get({n: digest(x) for n, x in arrays.items()}).items()}
    # One at a time: several programs under way at once may meet each other's collectives in another order elsewhere, be
    # that on another process or on another simulated device.
    return {name: int(digest(x)) for name, x in arrays.items()}


@jax.jit
def digest(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """A number of 32 bits from an array's bits, the same however it is laid out over devices.

    Each element's bits and place go through a bijection (the finalizer of MurmurHash3), and the results are added modulo
    2^32: one spoiled element always changes the sum, several do but for a chance of 2^-32.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_ or x.dtype.name in ("int4", "uint4", "int2", "uint2"):
        x = x.astype(jnp.int8)
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32))
    mixed = bits.astype(jnp.uint32)
    for axis in range(bits.ndim):
        stride = jnp.uint32(math.prod(bits.shape[axis + 1 :]) * 0x9E3779B9 % 2**32)
        mixed = mixed + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * stride
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(factor)
    return jnp.sum(mixed, dtype=jnp.uint32)


def _agreed(found: Value | Fault) -> Value | Fault:
    """A step is whole only when it is for all processes."""
    if jax.process_count() == 1:
        return found
    whole = multihost_utils.process_allgather(np.asarray(not isinstance(found, Fault))).all()
    return found if whole or isinstance(found, Fault) else Fault("another process cannot read its part")


def _named(tree: Any) -> dict[str, Any]:
    """A pytree's leaves by their paths, such as params.layers.q, in the tree's order."""
    flat, _ = jax.tree.flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}
    if len(named) < len(flat):
        raise ValueError(f"{len(flat)} arrays have {len(named)} names: take the dots out of the tree's keys")
    return named


def _kind(leaf: Any) -> tuple[list[int], str]:
    return list(leaf.shape), str(leaf.dtype)


def _shown(kind: tuple[list[int], str] | None) -> str:
    return "absent" if kind is None else f"{kind[1]}{kind[0]}"


def _crc32(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def unfinished(place: Any) -> bool:
    """Whether Orbax was writing this folder: it renames those on disk at the end, and marks those in a bucket."""
    bucket = "://" in str(place) and place.name.isdecimal()
    return ".orbax-checkpoint-tmp" in place.name or (bucket and not (place / "commit_success.txt").exists())


def _path(folder: str) -> Any:
    return epath.Path(folder if "://" in folder else os.path.abspath(folder))


def _write_whole(place: Any, text: str) -> None:
    """Write a file so that a reader finds it old or new; an object in a bucket is written so anyway."""
    if "://" in str(place):
        place.write_text(text)
        return
    new = place.with_name(f"{place.name}.new")
    new.write_text(text)
    new.replace(place)
