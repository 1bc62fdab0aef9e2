"""A checkpoint, by path: its config as numbers, its weights as parameters.

What happens:
1. a path that ends in .gguf is a GGUF file, any other a folder with config.json, and safetensors (Hugging Face) or an
   Orbax checkpoint (`convert`);
2. `read_config` gives the numbers, from which a model is built without memory (`split_abstract`);
3. `load_params` fills exactly the parameters asked for, each in the dtype and sharding asked for.

Paths may be gs:// ones; files are then copied to local disk while they are read.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from etils import epath

from grm_jax.models.config import DecoderConfig
from grm_jax.weights import gguf, huggingface, orbax


def read_config(path: epath.PathLike) -> DecoderConfig:
    """The numbers of the checkpoint at `path`.

    Raises FileNotFoundError when there is none, ValueError when the decoder cannot represent it.
    """
    path = _existing(path)
    return gguf.read_config(path) if path.suffix == ".gguf" else huggingface.read_config(path)


def load_params(path: epath.PathLike, abstract_params: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The weights of the checkpoint at `path`, one array for each entry of `abstract_params`, under the same key.

    abstract_params: parameter path ("layers.0.attention.q") -> its shape, its floating dtype and its sharding (None:
    the default device). Every tensor of the checkpoint is used exactly once, or ValueError names those that are not;
    host memory beyond the parameters stays under 1.2 x the largest of them.
    """
    path = _existing(path)
    for name, target in abstract_params.items():
        if not jnp.issubdtype(target.dtype, jnp.floating):
            raise ValueError(f"parameter {name} is wanted as {target.dtype}: weights convert between floats only")
    if path.suffix == ".gguf":
        return gguf.load(path, abstract_params)
    return (orbax if orbax.is_orbax(path) else huggingface).load(path, abstract_params)


def stored_dtype(path: epath.PathLike) -> str:
    """The smallest of float32, bfloat16 and float16 that the checkpoint's weights fit in without loss.

    Quantised weights are float32 once they are read. float64 is given as float32, the widest that is computed in.
    """
    path = _existing(path)
    if path.suffix == ".gguf":
        types = gguf.stored_types(path)
    else:
        types = (orbax if orbax.is_orbax(path) else huggingface).stored_types(path)
    return next(iter(types)) if types in ({"bfloat16"}, {"float16"}) else "float32"


def _existing(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a Hugging Face model folder or a .gguf file")
    return path
