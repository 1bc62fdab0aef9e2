"""The golden checkpoints, edited copies of them, and the parameters that a config asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from grm_jax.models.config import DecoderConfig
from grm_jax.models.decoder import split_abstract
from grm_jax.weights.load import load_params, read_config

GOLDENS = Path(__file__).parent / "goldens"
MIXTURES = ["deepseek_v2", "deepseek_v2_groups", "deepseek_v3", "qwen3_moe"]
FAMILIES = ["gemma2", "llama", "mistral", "qwen2", "qwen3", *MIXTURES]


def targets_of(config: DecoderConfig, dtype=jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    _, shapes = split_abstract(config)
    return {path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, _) in shapes.items()}


def load(path: Path, dtype=jnp.float32) -> dict[str, jax.Array]:
    return load_params(path, targets_of(read_config(path), dtype))


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def copy_of(family: str, folder: Path, edit: Callable[[dict, dict], None] | None = None) -> Path:
    """A single-file copy of a golden checkpoint, its config and tensors edited in place by `edit`."""
    folder.mkdir(exist_ok=True)
    config = json.loads((GOLDENS / family / "config.json").read_text())
    tensors = tensors_in(GOLDENS / family)
    if edit is not None:
        edit(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def assert_same(found: dict[str, jax.Array], expected: dict[str, jax.Array]) -> None:
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(expected[path]), err_msg=path)
