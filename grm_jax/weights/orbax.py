"""Weights of a folder that `save.save_orbax` wrote: an Orbax checkpoint in `params`, config.json and tokenizer beside it.

The checkpoint is one flat tree, {"embed": ..., "layers.0.attention.q": ...}, as `decoder.split_abstract` names its
parameters. What is read lies at once as it is wanted: each process and device reads its own part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from grm_jax.damage import Fault, attempt
from grm_jax.models.decoder import dtype_of

PARAMS = "params"
Value = TypeVar("Value")
_GB_AT_ONCE = 4
_FILES = ("_METADATA", "_CHECKPOINT_METADATA")  # Orbax's own; the first is there once the arrays are


def is_orbax(folder: epath.PathLike) -> bool:
    return (epath.Path(folder) / PARAMS / _FILES[0]).exists()


def is_checkpoint(place: epath.Path) -> bool:
    """Whether a place inside of a folder is a checkpoint that `write` wrote there, whole or cut off."""
    return place.name.partition(".orbax-checkpoint-tmp")[0] == PARAMS and any(
        (place / name).exists() for name in _FILES
    )


def write(folder: epath.Path, params: Mapping[str, jax.Array], dtype: jnp.dtype) -> None:
    """Write the checkpoint, which takes its name once it is complete. All processes call this together."""
    with _checkpointer(params.values()) as writer:
        writer.save(_absolute(folder) / PARAMS, {n: value.astype(dtype_of(n, dtype)) for n, value in params.items()})
        writer.wait_until_finished()


def load(folder: epath.PathLike, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The parameters `targets` describes, by path. Raises ValueError for names or shapes that do not fit, or damage."""
    saved = _saved(folder)
    if saved.keys() != targets.keys():
        missing, extra = sorted(targets.keys() - saved.keys())[:5], sorted(saved.keys() - targets.keys())[:5]
        raise ValueError(
            f"{folder}/{PARAMS}: the config's parameters {missing} are missing, {extra} are not among them; weights and "
            "config are of different models"
        )
    for name, (shape, _) in saved.items():
        if shape != targets[name].shape:
            raise ValueError(
                f"{folder}/{PARAMS}: {name} has shape {shape}, its config asks for {targets[name].shape}; weights and "
                "config are of different models"
            )
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wish = {
        name: jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=target.sharding or default)
        for name, target in targets.items()
    }
    return _read(folder, lambda reader, place: reader.restore(place, wish), wish.values())


def stored_types(folder: epath.PathLike) -> set[str]:
    """The dtypes of the arrays, without those that are float32 in a model of any dtype."""
    narrow = jnp.dtype("bfloat16")
    return {dtype for name, (_, dtype) in _saved(folder).items() if dtype_of(name, narrow) == narrow}


def _saved(folder: epath.PathLike) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array."""
    found = _read(folder, _listed)
    return {name: (tuple(array.shape), jnp.dtype(array.dtype).name) for name, array in found.items()}


def _listed(reader: ocp.StandardCheckpointer, place: epath.Path) -> Mapping[str, Any]:
    told = reader.metadata(place).item_metadata
    if told is None:  # Orbax has said why in the log
        raise ValueError("its list of arrays cannot be read")
    return told.tree


def _read(folder: epath.PathLike, read: Callable[..., Value], arrays: Collection[jax.ShapeDtypeStruct] = ()) -> Value:
    def whole() -> Value:
        with _checkpointer(arrays) as reader:
            return read(reader, _absolute(epath.Path(folder)) / PARAMS)

    found = attempt(whole)
    if isinstance(found, Fault):
        raise ValueError(f"{folder}/{PARAMS} is no complete Orbax checkpoint: {found.reason}; write it again")
    return found


def _checkpointer(arrays: Collection[jax.ShapeDtypeStruct | jax.Array]) -> ocp.StandardCheckpointer:
    """One that has a few GB under way at once, not 96: beside a large model that would be a second one."""
    largest = max((4 * math.prod(array.shape) for array in arrays), default=0)  # whatever it is stored in
    at_once = max(_GB_AT_ONCE, 1 + largest // 10**9)
    return ocp.StandardCheckpointer(save_concurrent_gb=at_once, restore_concurrent_gb=at_once)


def _absolute(folder: epath.Path) -> epath.Path:
    """Orbax takes no relative path."""
    return folder if "://" in str(folder) else epath.Path(folder.expanduser().resolve())
