"""A model as a Hugging Face folder, which `grm_jax.load` and transformers read, or with its weights as Orbax writes them.

What happens in `save_hf`:
1. the config is written as JSON in memory: the source folder's own with another dtype, or `families.to_hf`'s, and
   the parameters are held against the table of names, before anything is touched;
2. an older model in the folder is removed, its config.json first; other files stay;
3. safetensors files of at most 5 GB are written one after the other, with an index where there are several;
4. the tokenizer's files are copied from the source folder, or written from the tokenizer itself;
5. config.json comes last: a folder that has one is complete.

In `save_orbax` 3. is an Orbax checkpoint in the folder `params`. All processes call either together; process 0 writes,
but for Orbax, where each writes its part.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import multihost_utils

from grm_jax.log import logger
from grm_jax.models import families
from grm_jax.models.config import DecoderConfig
from grm_jax.models.decoder import dtype_of
from grm_jax.tokenizer import Tokenizer
from grm_jax.weights import names, orbax
from grm_jax.weights.adapters import checkpoint_of
from grm_jax.weights.write import CODES, Tensor, is_remote, write_json, write_safetensors, writing

SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def save_hf(
    folder: epath.PathLike,
    config: DecoderConfig,
    params: Mapping[str, jax.Array],
    tokenizer: Tokenizer | None,
    source: epath.PathLike | None,
    dtype: jnp.dtype | str,
    shard_bytes: int | None = None,
) -> None:
    """Write a model to `folder`, local or gs://, which may hold an older one.

    params: by path, as `split_abstract(config)` lists them. source: the checkpoint that the model came from: a Hugging
    Face folder or one of adapters, whose config and tokenizer files are kept, a .gguf file, or None. dtype: of the files.
    shard_bytes: the most that a file of weights may have; by default SHARD_BYTES.
    Raises ValueError: parameters that are not the config's, a config or dtype that no such file can have, a folder that
    is the source itself.
    """
    folder, dtype = epath.Path(folder).expanduser(), jnp.dtype(dtype)
    shards = _shards(_tensors(config, params, dtype), dtype, shard_bytes or SHARD_BYTES)
    with _written(folder, config, tokenizer, source, dtype):
        weight_map = {}
        for index, tensors in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{index:05}-of-{len(shards):05}.safetensors"
            write_safetensors(folder, name, tensors, dtype)
            weight_map |= dict.fromkeys(tensors, name)
        if len(shards) > 1 and jax.process_index() == 0:
            size = sum(tensor.bytes_in(dtype) for tensors in shards for tensor in tensors.values())
            write_json(folder, _INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def save_orbax(
    folder: epath.PathLike,
    config: DecoderConfig,
    params: Mapping[str, jax.Array],
    tokenizer: Tokenizer | None,
    source: epath.PathLike | None,
    dtype: jnp.dtype | str,
) -> None:
    """`save_hf`, but the weights are an Orbax checkpoint in `folder`/params, which `load_params` reads."""
    folder, dtype = epath.Path(folder).expanduser(), jnp.dtype(dtype)
    _tensors(config, params, dtype)
    with _written(folder, config, tokenizer, source, dtype):
        orbax.write(folder, params, dtype)


@contextmanager
def _written(
    folder: epath.Path,
    config: DecoderConfig,
    tokenizer: Tokenizer | None,
    source: epath.PathLike | None,
    dtype: jnp.dtype,
) -> Iterator[None]:
    """Checks before and an empty place for weights; tokenizer and config.json behind them, if they were written."""
    if dtype.name not in CODES:
        raise ValueError(f"dtype = {dtype.name}: weights are saved as {', '.join(CODES)}")
    origin = _folder_of(source)
    if origin is not None and same_place(origin, folder):
        raise ValueError(f"{folder} is the model that is being trained from: give another output")
    described = _describe(config, tokenizer, origin, dtype)
    first, several = jax.process_index() == 0, jax.process_count() > 1
    if first:
        clear(folder)
    if several:
        multihost_utils.sync_global_devices(f"cleared {folder}")  # Orbax writes from all
    yield
    if first:
        _write_tokenizer(folder, config, tokenizer, origin)
        write_json(folder, _CONFIG, described)
        logger.info("saved the model as %s in %s", dtype.name, folder)
    if several:
        multihost_utils.sync_global_devices(f"saved {folder}")  # no process reads what process 0 is still writing


def _folder_of(source: epath.PathLike | None) -> epath.Path | None:
    """The Hugging Face folder that a source is, or adapters' base is; None for a GGUF file."""
    if source is None:
        return None
    found = checkpoint_of(source)
    return None if found.suffix == ".gguf" else found


def same_place(one: epath.Path, other: epath.Path) -> bool:
    if is_remote(one) or is_remote(other):
        return str(one).rstrip("/") == str(other).rstrip("/")
    return os.path.realpath(one) == os.path.realpath(other)


def _describe(
    config: DecoderConfig, tokenizer: Tokenizer | None, origin: epath.Path | None, dtype: jnp.dtype
) -> dict[str, Any]:
    """The config.json."""
    if origin is None:
        # transformers 5 reads torch_dtype as well as its own `dtype`, 4 only the former.
        ids = {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id, "eos_token_id": _eos(tokenizer)}
        return families.to_hf(config) | ids | {"torch_dtype": dtype.name}
    described = json.loads((origin / _CONFIG).read_text())
    if config.scalar and not families.from_hf(described).scalar:
        described = families.with_scalar(described)
    if families.from_hf(described) != config:
        raise ValueError(
            f"{origin / _CONFIG} describes another model than the one to save: give the folder that it was loaded from"
        )
    return described | {"dtype" if "dtype" in described else "torch_dtype": dtype.name}


def _eos(tokenizer: Tokenizer) -> int | list[int] | None:
    ids = list(tokenizer.eos_ids)
    return ids[0] if len(ids) == 1 else ids or None


def _tensors(config: DecoderConfig, params: Mapping[str, jax.Array], dtype: jnp.dtype) -> dict[str, Tensor]:
    """Every parameter under its name in the file, in the file's shape; an expert's matrices under their own names."""
    slots = names.hugging_face(config).slots
    wanted = {slot.parameter for slot in slots.values()}
    if wanted != params.keys():
        missing, extra = sorted(wanted - params.keys()), sorted(params.keys() - wanted)
        raise ValueError(f"the config's parameters {missing[:5]} are missing, {extra[:5]} are not among them")
    for slot in slots.values():
        shape = params[slot.parameter].shape
        if math.prod(shape if slot.row is None else shape[1:]) != math.prod(slot.shape):
            raise ValueError(f"{slot.parameter} has shape {shape}, the config asks for {slot.shape} in the file")
    return {
        name: Tensor(params[slot.parameter], slot.shape, slot.row, dtype_of(slot.parameter, dtype))
        for name, slot in slots.items()
    }


def _shards(tensors: Mapping[str, Tensor], dtype: jnp.dtype, most: int) -> list[dict[str, Tensor]]:
    """The tensors in order, cut into files of at most so many bytes; a larger tensor is a file of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    room = most
    for name, tensor in tensors.items():
        size = tensor.bytes_in(dtype)
        if size > room and shards[-1]:
            shards.append({})
            room = most
        shards[-1][name] = tensor
        room -= size
    return shards


def clear(folder: epath.Path) -> None:
    """Make the folder, without the files of an older model, whole or not."""
    old = list(folder.iterdir()) if folder.exists() else []
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(old, key=lambda file: file.name != _CONFIG):
        name = file.name.removeprefix(".").removesuffix(".writing")  # what a killed process was writing
        if name in (_CONFIG, *TOKENIZER_FILES) or _WEIGHTS.fullmatch(name):
            file.unlink()
    for place in old:
        if orbax.is_checkpoint(place):
            place.rmtree()


def _write_tokenizer(
    folder: epath.Path, config: DecoderConfig, tokenizer: Tokenizer | None, origin: epath.Path | None
) -> None:
    """The source's files, or the tokenizer's own: `tokenizer.from_folder` gives the same ids, ends and chat text."""
    if origin is not None and any((origin / name).exists() for name in TOKENIZER_FILES[:2]):
        for name in TOKENIZER_FILES:
            if (origin / name).exists():
                with writing(folder, name) as file:
                    file.write((origin / name).read_bytes())
        return
    if tokenizer is None:
        return
    known = {name: text for name, text in tokenizer.names.items() if text in tokenizer.specials}
    if known != tokenizer.names:  # a reader would make control tokens of them, and other ids of texts that hold them
        logger.warning("%s are no control tokens, and not saved", sorted(tokenizer.names.keys() - known.keys()))
    saved = tokenizer.vocab.saved(tokenizer.start)
    with writing(folder, saved.file) as file:
        file.write(saved.content)
    settings = saved.config | known
    settings |= {
        "add_bos_token": bool(tokenizer.start),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_positions,
    }
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    write_json(folder, "tokenizer_config.json", settings)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": _eos(tokenizer)}
    write_json(folder, "generation_config.json", {key: value for key, value in ids.items() if value is not None})
