"""Weights and numbers of a GGUF file, read with the `gguf` package.

What happens:
1. `open_gguf` memory-maps the file and decodes its metadata; `config` turns that into a `DecoderConfig`;
2. `load` holds the tensors' names and shapes against the table of names;
3. tensor by tensor: slabs of rows are dequantised to float32, put into our order (llama's q and k rows are permuted,
   Gemma's norms have 1 added) and converted into the parameter's dtype and sharding.

A remote file (gs://) is copied to local disk while it is read.
"""

from __future__ import annotations

from collections.abc import Mapping

import gguf
import jax
import numpy as np
from etils import epath
from gguf import GGMLQuantizationType
from gguf.gguf_reader import ReaderTensor

from grm_jax.gguf_file import open_gguf
from grm_jax.models import gguf_families
from grm_jax.models.config import DecoderConfig
from grm_jax.weights import names
from grm_jax.weights.placement import local_file, place

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
_OUTPUT = "output.weight"
_ROPE_FACTORS = "rope_freqs.weight"
_PERMUTED = "llama"  # the architecture whose q and k rows the converter interleaves


def read_config(path: epath.PathLike) -> DecoderConfig:
    """The numbers of a GGUF file's model."""
    with local_file(epath.Path(path)) as file:
        return _config(open_gguf(file, str(path)), str(path))


def load(path: epath.PathLike, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The parameters `targets` describes, by path, from a GGUF file.

    Raises ValueError for names, shapes or quantisation types that do not fit.
    """
    with local_file(epath.Path(path)) as file:
        reader = open_gguf(file, str(path))
        table = names.gguf(_config(reader, str(path)), interleaved=_architecture(reader) == _PERMUTED)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        names.check(table, tensors, targets, str(path))
        for name, slot in table.slots.items():
            _check_type(tensors[name], str(path))
            names.check_shape(slot, _shape(tensors[name]), targets[slot.parameter].shape, name, str(path))
        return {
            slot.parameter: _load_tensor(tensors[name], slot, targets[slot.parameter])
            for name, slot in table.slots.items()
        }


def stored_types(path: epath.PathLike) -> set[str]:
    """The dtypes of the tensors; those that are quantised by GGUF's name."""
    with local_file(epath.Path(path)) as file:
        found = {
            tensor.tensor_type.name for tensor in open_gguf(file, str(path)).tensors if tensor.name != _ROPE_FACTORS
        }
    return {_FLOATS.get(kind, kind) for kind in found}


def _config(reader: gguf.GGUFReader, source: str) -> DecoderConfig:
    fields = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer.") and field.types
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{source} has no tensor token_embd.weight; give the GGUF file of a whole language model")
    factors = tensors.get(_ROPE_FACTORS)
    return gguf_families.from_gguf(
        fields,
        vocab_size=_shape(tensors["token_embd.weight"])[0],
        tied=_OUTPUT not in tensors,
        rope_factors=None if factors is None else factors.data.tolist(),
    )


def _architecture(reader: gguf.GGUFReader) -> str:
    return reader.fields["general.architecture"].contents()


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """Rows first: GGUF writes the contiguous axis first."""
    return tuple(int(n) for n in reversed(tensor.shape))


def _check_type(tensor: ReaderTensor, source: str) -> None:
    if tensor.tensor_type.name not in _TYPES:
        raise ValueError(
            f"{source}: tensor {tensor.name} is {tensor.tensor_type.name}, known are {', '.join(_TYPES)}; give a file "
            "quantised to one of these"
        )


def _load_tensor(tensor: ReaderTensor, slot: names.Slot, target: jax.ShapeDtypeStruct) -> jax.Array:
    per_row = slot.shape[0] // target.shape[0]  # a head's rows, where the parameter's leading axis is heads
    # A vector is one row of blocks, so it is dequantised whole.
    vector = _dequantise(tensor.data, tensor.tensor_type) if len(slot.shape) == 1 else None

    def rows(start: int, stop: int) -> np.ndarray:
        first, last = start * per_row, stop * per_row
        stored = _dequantise(tensor.data[first:last], tensor.tensor_type) if vector is None else vector[first:last]
        return slot.arrange(stored.reshape(stop - start, *target.shape[1:]))

    return place(target, rows)


def _dequantise(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    return gguf.quants.dequantize(data, kind)
