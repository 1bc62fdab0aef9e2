"""Weights of a Hugging Face folder: `model.safetensors`, or shards with `model.safetensors.index.json`.

What happens in `load`:
1. the index, or the single file's own header, gives the tensors' names; they are held against the table of names;
2. file by file: its tensors must be those that the index lists, with floats of the shapes that the config asks for;
3. tensor by tensor: memory-mapped rows go straight to the parameter's dtype and sharding; experts' matrices, which may
   lie in several files, are rows of one parameter, which is whole when the last of them is read;
4. a tied checkpoint that stores its output head anyway must store the embedding there, byte for byte.

A remote file (gs://) is copied to local disk while it is read, one file at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy, by which safetensors looks the type up
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from grm_jax.models import families
from grm_jax.models.config import DecoderConfig
from grm_jax.models.decoder import dtype_of
from grm_jax.weights import names
from grm_jax.weights.placement import SLAB_BYTES, Placing, local_file

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_config(folder: epath.PathLike) -> DecoderConfig:
    """The numbers of a folder's config.json."""
    file = epath.Path(folder) / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{folder} has no config.json; give a Hugging Face model folder or a .gguf file")
    return families.from_hf(_read_json(file))


def load(folder: epath.PathLike, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The parameters `targets` describes, by path, from the safetensors files of `folder`.

    Raises FileNotFoundError for missing files, ValueError for names, shapes or types that do not fit.
    """
    folder = epath.Path(folder)
    table = names.hugging_face(read_config(folder))
    listed = _listed(folder)
    everything = None if None in listed.values() else set().union(*listed.values())
    if everything is not None:
        names.check(table, everything, targets, str(folder / _INDEX))
    params, digests, begun = {}, {}, {}
    for name, tensors in listed.items():
        with _open(folder / name) as opened:
            found = set(opened.keys())
            if tensors is None:
                names.check(table, found, targets, str(folder / name))
            elif found != tensors:
                raise ValueError(
                    f"{folder / name} holds {sorted(found - tensors)[:5]} that {_INDEX} does not list there, and lacks "
                    f"{sorted(tensors - found)[:5]} that it does; index and shards must be of one checkpoint"
                )
            params |= _load_file(opened, str(folder / name), table, targets, begun)
            twins = {pair for pair in table.copies.items() if pair[0] in (everything or found)}
            digests |= {tensor: _digest(opened, tensor) for pair in twins for tensor in found.intersection(pair)}
    for copy, original in table.copies.items():
        if copy in digests and digests[copy] != digests[original]:
            raise ValueError(
                f"{folder}: config has tie_word_embeddings = true, but {copy} differs from {original}; set it to false "
                "to use both, or remove the one that was not trained"
            )
    return params


def _stays(parameter: str) -> bool:
    """Whether a parameter is float32 in a model of any dtype."""
    return dtype_of(parameter, np.dtype("bfloat16")) == np.float32


def stored_types(folder: epath.PathLike) -> set[str]:
    """The dtypes of the tensors that fill parameters, from the files' headers alone; of no floats, safetensors' names."""
    folder, found = epath.Path(folder), set()
    slots = names.hugging_face(read_config(folder)).slots
    for name in _listed(folder):
        with (folder / name).open("rb") as file:
            text = file.read(int.from_bytes(file.read(8), "little"))
        try:
            header = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{folder / name} is no complete safetensors file: {error}; fetch it again") from error
        found |= {t["dtype"] for key, t in header.items() if key in slots and not _stays(slots[key].parameter)}
    return {_FLOATS.get(kind, kind) for kind in found}


def _listed(folder: epath.Path) -> dict[str, set[str] | None]:
    """Files in the index's order, each with the tensors listed in it; None for a single file, which lists itself."""
    if (folder / _SINGLE).exists():
        return {_SINGLE: None}
    if not (folder / _INDEX).exists():
        raise FileNotFoundError(f"{folder} has neither {_SINGLE} nor {_INDEX}; give a folder of safetensors weights")
    listed: dict[str, set[str] | None] = {}
    for tensor, file in _read_json(folder / _INDEX).get("weight_map", {}).items():
        listed.setdefault(file, set()).add(tensor)
    if not listed:
        raise ValueError(f"{folder / _INDEX} has no weight_map of tensors to files; fetch it again")
    missing = [file for file in listed if not (folder / file).exists()]
    if missing:
        raise FileNotFoundError(f"{folder / _INDEX} names {', '.join(missing)}, not there; fetch the missing shards")
    return listed


def _read_json(file: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}; fetch it again") from error


@contextmanager
def _open(file: epath.Path) -> Iterator[safe_open]:
    with local_file(file) as local:
        try:
            opened = safe_open(local, framework="numpy")
        except SafetensorError as error:  # cut short, or a pointer that git left instead of the file
            raise ValueError(f"{file} is no complete safetensors file: {error}; fetch it again") from error
        with opened:
            yield opened


def _load_file(
    opened: safe_open,
    source: str,
    table: names.Table,
    targets: Mapping[str, jax.ShapeDtypeStruct],
    begun: dict[str, Placing],
) -> dict[str, jax.Array]:
    """The parameters that one file fills; shapes and types of all its tensors are checked first.

    begun: those of which earlier files gave some rows; it is brought up to date.
    """
    mine = {name: table.slots[name] for name in opened.keys() if name in table.slots}  # noqa: SIM118 - no mapping
    for name, slot in mine.items():
        tensor = opened.get_slice(name)
        if tensor.get_dtype() not in _FLOATS:
            raise ValueError(
                f"{source}: tensor {name} is {tensor.get_dtype()}, known are {', '.join(_FLOATS)}; give an unquantised "
                "checkpoint"
            )
        names.check_shape(slot, tuple(tensor.get_shape()), targets[slot.parameter].shape, name, source)
    params = {}
    # A parameter of several tensors is filled in one go, so that few of them are begun at a time.
    for name, slot in sorted(mine.items(), key=lambda pair: (pair[1].row is not None, pair[1].parameter)):
        placing = begun.pop(slot.parameter, None) or Placing(targets[slot.parameter])
        _fill(placing, opened, name, slot)
        if placing.missing:
            begun[slot.parameter] = placing
        else:
            params[slot.parameter] = placing.array()
    return params


def _fill(placing: Placing, opened: safe_open, name: str, slot: names.Slot) -> None:
    """The rows that a tensor holds."""
    tensor, (count, *rest) = opened.get_slice(name), placing.target.shape
    if slot.row is not None:
        placing.fill(slot.row, slot.row + 1, lambda start, stop: slot.arrange(tensor[:].reshape(1, *rest)))
        return
    per_row = slot.shape[0] // count  # a head's rows, where the parameter's leading axis is heads

    def rows(start: int, stop: int) -> np.ndarray:
        return slot.arrange(tensor[start * per_row : stop * per_row].reshape(stop - start, *rest))

    placing.fill(0, count, rows)


def _digest(opened: safe_open, name: str) -> str:
    """A hash of a tensor's type and bytes, read in slabs."""
    tensor = opened.get_slice(name)
    count, *rest = tensor.get_shape()
    digest = hashlib.sha256(f"{tensor.get_dtype()} {tensor.get_shape()}".encode())
    step = max(1, SLAB_BYTES // (4 * max(1, int(np.prod(rest)))))
    for start in range(0, count, step):
        digest.update(tensor[start : min(start + step, count)].tobytes())
    return digest.hexdigest()
