"""A checkpoint as a decoder ready to run, with its tokenizer: by an embedded model's name, or from a folder or a file."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from grm_jax import tokenizer as tokenizers
from grm_jax.config import Dtype, MeshSizes
from grm_jax.models.decoder import Model, dtype_of, split_abstract
from grm_jax.sharding import DECODING, Rules, lay_out, parameter_sharding
from grm_jax.weights.embedded import EMBEDDED, find_embedded
from grm_jax.weights.load import load_params, read_config


def load_decoder(
    model: str, dtype: Dtype | None, mesh: jax.sharding.Mesh | None = None, rules: Rules = DECODING
) -> tuple[Model, tokenizers.Tokenizer | None]:
    """A decoder by an embedded model's name, a Hugging Face folder or a .gguf file, and its tokenizer where it has one.

    mesh: by default `lay_out`'s. rules: which of the layouts of parameters, for decoding or for training.
    """
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(dtype or ("float32" if on_cpu else "bfloat16"))
    mesh = mesh or lay_out(MeshSizes())
    path = find_embedded(model) if model in EMBEDDED else model
    config = read_config(path)
    # A loop over layers would need a second copy of the weights, stacked, beside what a judge keeps.
    graph, shapes = split_abstract(config, mesh, scans=False if rules is DECODING else None)
    targets = {
        name: jax.ShapeDtypeStruct(
            shape, dtype_of(name, dtype), sharding=parameter_sharding(mesh, name, shape, axes, rules)
        )
        for name, (shape, axes) in shapes.items()
    }
    return Model(config, graph, load_params(path, targets), mesh), tokenizer_of(path)


def tokenizer_of(path: str | Path) -> tokenizers.Tokenizer | None:
    """The checkpoint's tokenizer, or None for a folder that has none."""
    if str(path).endswith(".gguf"):
        return tokenizers.from_gguf(path)
    from etils import epath

    if not any((epath.Path(path).expanduser() / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return tokenizers.from_folder(path)
