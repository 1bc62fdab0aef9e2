"""A checkpoint as a decoder ready to run, with its tokenizer: by an embedded model's name, or from a folder or a file."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath

from grm_jax import tokenizer as tokenizers
from grm_jax.config import Dtype, MeshSizes
from grm_jax.gguf_file import open_gguf
from grm_jax.models.decoder import Model, dtype_of, split_abstract
from grm_jax.sharding import DECODING, Rules, lay_out, parameter_sharding
from grm_jax.weights.adapters import checkpoint_of
from grm_jax.weights.embedded import EMBEDDED, find_embedded
from grm_jax.weights.load import load_params, read_config
from grm_jax.weights.placement import local_file


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


def check_decoder(model: str, scalar: bool) -> None:
    """Raise what reading a model would, for what its config and the names of its files say: before an output is emptied.

    scalar: whether it is to have a scalar head. ValueError where it is otherwise, or without a tokenizer. An embedded
    model is right, and a GGUF file in a bucket is left to the loader.
    """
    if model in EMBEDDED or ("://" in model and model.endswith(".gguf")):
        return
    path = checkpoint_of(model)
    if read_config(path).scalar != scalar:
        raise ValueError(
            f"{model} has no scalar head: give a folder that `meta_rm`, `bradley_terry`, `pair_rm` or `cloud` has written, "
            "or a ...ForSequenceClassification checkpoint of one label"
            if scalar
            else f"{model} has a scalar head and writes nothing: it guides a judge, as --meta-rm {model}"
        )
    if path.suffix != ".gguf" and not _tokenizer_files(path):
        raise ValueError(f"{model} has no tokenizer files: put tokenizer.json or tokenizer.model in its folder")


def _tokenizer_files(path: epath.PathLike) -> list[str]:
    folder = epath.Path(path).expanduser()
    return [name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).exists()]


def tokenizer_of(path: str | Path) -> tokenizers.Tokenizer | None:
    """The checkpoint's tokenizer, or None for a folder that has none."""
    if str(path).endswith(".gguf"):
        with local_file(epath.Path(path).expanduser()) as file:
            return tokenizers.from_gguf(open_gguf(file, str(path)))
    if not _tokenizer_files(path):
        return None
    return tokenizers.from_folder(path)
