"""Low-rank adapters as a folder that PEFT reads: adapter_config.json and adapter_model.safetensors.

1. `save_adapters` writes one: the base's name, rank, alpha and target matrices, and A [R, I] and B [O, R] of each,
   under the names of the Hugging Face checkpoint that they adapt (no row is permuted: its layout is ours; each expert's
   are tensors of their own);
2. `load_adapters` reads one, PEFT's too, and holds it against its base's config: every tensor is used exactly once;
3. `merge_into` puts them into the base's weights, for use; `checkpoint_of` follows adapters to the weights under them.

The format is that of PEFT 0.18's LoRA. What changes the numbers in another way (DoRA, ranks by pattern, trained
biases or whole modules) is an error; `use_rslora`'s alpha / sqrt(rank) is read into alpha.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file

from grm_jax.models import lora as products
from grm_jax.models.config import DecoderConfig
from grm_jax.recipes import LORA_TARGETS, Lora
from grm_jax.weights import names
from grm_jax.weights.embedded import EMBEDDED, find_embedded
from grm_jax.weights.load import read_config
from grm_jax.weights.placement import local_file
from grm_jax.weights.write import Tensor, is_remote, write_json, write_safetensors

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNKNOWN = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias")


def is_adapter_folder(path: epath.PathLike) -> bool:
    return (epath.Path(path).expanduser() / _CONFIG).exists()


def checkpoint_of(path: epath.PathLike) -> epath.Path:
    """The checkpoint with whole weights: the path itself, or the last base under a folder of adapters.

    Raises ValueError for adapters that are their own base, FileNotFoundError for a base that is not there.
    """
    seen = []
    while is_adapter_folder(path):
        if str(path) in seen:
            raise ValueError(f"{path} names itself as its base, through {len(seen)} folders: correct {_CONFIG}")
        seen.append(str(path))
        path = _base(epath.Path(path).expanduser(), _read_config(epath.Path(path).expanduser()))
    return epath.Path(find_embedded(path) if path in EMBEDDED else path).expanduser()


def save_adapters(
    folder: epath.PathLike, config: DecoderConfig, adapters: Mapping[str, jax.Array], lora: Lora, base: str
) -> None:
    """Write adapters, by path as `lora.axes` lists them, to `folder`, local or gs://, in float32.

    base: the model that they adapt, as `grm_jax.load` takes it; a local path is written absolute. All processes call
    this together. Raises ValueError unless there are A and B of each of the config's target matrices, and no others.
    """
    folder = epath.Path(folder).expanduser()
    modules = _modules(config)
    targets = {m: where for m, where in modules.items() if where[0].rpartition(".")[2] in lora.targets}
    wanted = {f"{parameter}.lora_{side}" for parameter, _ in targets.values() for side in "ab"}
    if wanted != adapters.keys():
        missing, extra = sorted(wanted - adapters.keys()), sorted(adapters.keys() - wanted)
        raise ValueError(f"the config's adapters {missing[:5]} are missing, {extra[:5]} are not among them")
    if base not in EMBEDDED and not is_remote(base) and epath.Path(base).expanduser().exists():
        base = os.path.abspath(epath.Path(base).expanduser())
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG).unlink(missing_ok=True)  # written last: a folder that has one is complete
    tensors = {}
    for module, (parameter, row) in targets.items():
        for side in "ab":
            value = adapters[f"{parameter}.lora_{side}"]
            shape = value.shape if row is None else value.shape[1:]
            tensors[f"{_PREFIX}{module}.lora_{side.upper()}.weight"] = Tensor(value, shape, row)
    write_safetensors(folder, _WEIGHTS, tensors, jnp.float32)
    if jax.process_index() == 0:
        write_json(folder, _CONFIG, _describe(lora, sorted({module.rpartition(".")[2] for module in targets}), base))


def _describe(lora: Lora, modules: list[str], base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def load_adapters(folder: epath.PathLike) -> tuple[str, Lora, dict[str, jax.Array]]:
    """The base that a folder of adapters names, as `grm_jax.load` takes it; their numbers; and they, in float32.

    Raises FileNotFoundError for a file or a base that is not there, and ValueError: another kind of adapter, a tensor
    that nothing uses, one that is missing, or a shape that is not the base's.
    """
    folder = epath.Path(folder).expanduser()
    base = _base(folder, _read_config(folder))
    return base, *adapters_for(folder, read_config(checkpoint_of(folder)), base)


def adapters_for(folder: epath.PathLike, config: DecoderConfig, base: str) -> tuple[Lora, dict[str, jax.Array]]:
    """`load_adapters` for a base of this config and name, whichever base the folder names."""
    folder = epath.Path(folder).expanduser()
    given = _read_config(folder)
    rank = int(given["r"])
    alpha = given["lora_alpha"] * (rank**0.5 if given.get("use_rslora") else 1)
    slots = {
        f"{_PREFIX}{module}.lora_{side.upper()}.weight": (f"{parameter}.lora_{side}", row)
        for module, (parameter, row) in _modules(config).items()
        for side in "ab"
    }
    stored = _read_tensors(folder)
    unused = sorted(stored.keys() - slots.keys())
    if unused or not stored:
        raise ValueError(
            f"{folder / _WEIGHTS}: no matrix of the base {base} takes {unused[:5]}, {len(unused)} of {len(stored)} "
            "tensors; every tensor must be used: these adapters are of another model or of another kind"
        )
    adapters = _joined({slots[name]: value for name, value in stored.items()}, slots.values(), str(folder / _WEIGHTS))
    for name, value in adapters.items():
        if value.shape[-2 if name.endswith("lora_a") else -1] != rank:
            raise ValueError(f"{folder}: {name} has shape {value.shape}, but its config says r = {rank}")
    kinds = {name.split(".")[-2] for name in adapters}
    return Lora(rank, float(alpha), tuple(kind for kind in LORA_TARGETS if kind in kinds)), adapters


def merge_into(params: dict[str, jax.Array], adapters: Mapping[str, jax.Array], lora: Lora) -> dict[str, jax.Array]:
    """`lora.merge`, but `params` is changed, a matrix at a time: there are never two copies of a model.

    Every parameter keeps its dtype and sharding. Raises ValueError as `lora.merge` does.
    """
    products.check(params, adapters)
    for name in (key.removesuffix(".lora_a") for key in adapters if key.endswith(".lora_a")):
        a_RI, b_OR = (adapters[f"{name}.lora_{side}"] for side in "ab")
        old = params[name]
        params[name] = jax.device_put(products.add(old, a_RI, b_OR, lora.alpha / lora.rank), old.sharding)
    return params


def _modules(config: DecoderConfig) -> dict[str, tuple[str, int | None]]:
    """Module of the Hugging Face model -> parameter, and row of it, for the matrices that may get an adapter."""
    slots = names.hugging_face(config).slots.items()
    found = {name.removesuffix(".weight"): (slot.parameter, slot.row) for name, slot in slots if "_proj" in name}
    return {module: where for module, where in found.items() if where[0].rpartition(".")[2] in LORA_TARGETS}


def _joined(
    found: Mapping[tuple[str, int | None], np.ndarray], known: Collection[tuple[str, int | None]], source: str
) -> dict[str, jax.Array]:
    """Adapters by name, float32; those of a matrix's experts as one array. Raises ValueError where some are missing."""
    adapters = {}
    for name in sorted({name for name, _ in found}):
        rows = sorted(row or 0 for other, row in known if other == name)
        if (name, None) in found:
            adapters[name] = jnp.asarray(found[name, None], jnp.float32)
            continue
        missing = [row for row in rows if (name, row) not in found]
        if missing:
            raise ValueError(
                f"{source}: has no {name} of experts {missing[:5]}; adapters are of all experts or of none"
            )
        adapters[name] = jnp.asarray(np.stack([found[name, row] for row in rows]), jnp.float32)
    return adapters


def _base(folder: epath.Path, given: Mapping[str, Any]) -> str:
    """The base, as `grm_jax.load` takes it."""
    name = str(given.get("base_model_name_or_path"))
    if name in EMBEDDED or is_remote(name):
        return name
    path = folder / name  # an absolute path is itself
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} adapts {name!r}, which is not there: set base_model_name_or_path in its {_CONFIG} to one of "
            f"{', '.join(EMBEDDED)}, an absolute path, or a path relative to the folder"
        )
    return str(path)


def _read_config(folder: epath.Path) -> dict[str, Any]:
    file = folder / _CONFIG
    if not file.exists():
        raise FileNotFoundError(f"{folder} has no {_CONFIG}: give a folder of adapters as PEFT writes it")
    try:
        given = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}; fetch it again") from error
    if given.get("peft_type") != "LORA":
        raise ValueError(
            f"{file}: peft_type = {given.get('peft_type')!r}, known is 'LORA'; merge others with PEFT itself"
        )
    bias = {} if given.get("bias") in (None, "none") else {"bias": given["bias"]}
    for key, value in ({key: given.get(key) for key in _UNKNOWN} | bias).items():
        if value:
            raise ValueError(f"{file}: {key} = {value!r} is not built; merge these adapters with PEFT itself")
    missing = [key for key in ("r", "lora_alpha") if not isinstance(given.get(key), int | float)]
    if missing:
        raise ValueError(f"{file} gives no number for {' and '.join(missing)}: fetch it again")
    return given


def _read_tensors(folder: epath.Path) -> dict[str, np.ndarray]:
    file = folder / _WEIGHTS
    if not file.exists():
        raise FileNotFoundError(f"{folder} has no {_WEIGHTS}; save the adapters with safe_serialization=True")
    with local_file(file) as local:
        try:
            return load_file(local)
        except SafetensorError as error:
            raise ValueError(f"{file} is no complete safetensors file: {error}; fetch it again") from error
