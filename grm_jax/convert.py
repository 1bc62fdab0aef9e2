"""`convert`: a model from one format to another; adapters, or a step of a training run, to a whole model.

1. The source is looked at and the output refused, where it is the source or holds something, before weights are read.
2. The weights are read once, in the output's dtype, into the host's memory: one copy. Adapters are merged into it a matrix
   at a time.
3. They are written, one parameter after the other (`hf`); config.json comes last, so a folder that has one is complete.
   What was written is removed where anything goes wrong.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from grm_jax import steps
from grm_jax.config import ConvertConfig
from grm_jax.log import logger
from grm_jax.models import lora as products
from grm_jax.models.config import DecoderConfig
from grm_jax.models.decoder import Params, dtype_of, random_params, split_abstract
from grm_jax.prompts import template_path
from grm_jax.recipes import Fresh, Lora
from grm_jax.scalar_rm import TEMPLATE_FILE
from grm_jax.spct.start import FRESH, fresh_config
from grm_jax.tokenizer import ByteTokenizer, Tokenizer
from grm_jax.weights.adapters import adapters_for, checkpoint_of, is_adapter_folder, load_adapters, merge_into
from grm_jax.weights.decoder import tokenizer_of
from grm_jax.weights.embedded import EMBEDDED, check_model
from grm_jax.weights.load import load_params, read_config, stored_dtype
from grm_jax.weights.save import clear, same_place, save_hf, save_orbax


@dataclasses.dataclass(frozen=True)
class Found:
    """A model to be written, in the dtype that it is written in."""

    config: DecoderConfig
    params: Params
    tokenizer: Tokenizer | None
    source: str | None  # the checkpoint whose config.json and tokenizer files are kept; None for a fresh random one
    dtype: str
    template: bytes | None = None  # of a scalar model's prompts


def run(config: ConvertConfig) -> None:
    """Write the model. Raises FileNotFoundError and ValueError for what does not fit, before the output is touched."""
    started, output = time.monotonic(), epath.Path(config.output).expanduser()
    with jax.default_device(_host()):
        _check_output(config, output)
        found = _with_adapters(find(config), config)
        if found.source is not None and same_place(epath.Path(found.source), output):
            raise ValueError(f"output = {config.output} is what {config.model} is made from: give another folder")
        with _whole(output):
            if found.template is not None:
                (output / TEMPLATE_FILE).write_bytes(found.template)
            told = (found.config, found.params, found.tokenizer, found.source, found.dtype)
            if config.to == "orbax":
                save_orbax(output, *told)
            else:
                save_hf(output, *told, shard_bytes=int(config.shard_gb * 1e9))
    count = sum(value.size for value in found.params.values())
    logger.info("%s: %.4g million parameters in %.1f s", config.model, count / 1e6, time.monotonic() - started)


def _host() -> jax.Device:
    return jax.local_devices(backend="cpu")[0]


def _check_output(config: ConvertConfig, output: epath.Path) -> None:
    """Raise ValueError for an output that holds something, or is one of the inputs."""
    for place in (config.model, config.adapters, config.base):
        if place is not None and place not in EMBEDDED and same_place(epath.Path(place).expanduser(), output):
            raise ValueError(f"output = {config.output} is what is read from: give another folder")
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"output = {config.output} is a file: give a folder")
    if is_adapter_folder(output) or steps.is_run(output):
        kind = "LoRA adapters" if is_adapter_folder(output) else "a training run"
        raise ValueError(f"output = {config.output} holds {kind}: give another folder")
    if any(output.iterdir()) and not config.overwrite:
        state = "" if (output / "config.json").exists() else " (no whole model: it has no config.json)"
        raise ValueError(f"output = {config.output} is not empty{state}: give another folder, or --overwrite")


@contextmanager
def _whole(output: epath.Path) -> Iterator[None]:
    """An output without an older model, which is without one again if the block fails."""
    _cleared(output)
    try:
        yield
    except BaseException:
        _cleared(output)
        if "://" not in str(output) and not any(output.iterdir()):
            output.rmdir()
        raise


def _cleared(output: epath.Path) -> None:
    clear(output)
    (output / TEMPLATE_FILE).unlink(missing_ok=True)


def find(config: ConvertConfig) -> Found:
    """The model that the config names."""
    model, place = config.model, epath.Path(config.model).expanduser()
    if model not in EMBEDDED and not (place / "config.json").exists() and steps.is_run(place):
        return _trained(config)
    for name in ("step", "base"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} = {getattr(config, name)}, but {model} is no training run: leave it out")
    return checkpoint(model, config.dtype)


def checkpoint(model: str, dtype: str | None) -> Found:
    """What `--model` takes. Raises FileNotFoundError and ValueError as the loaders do."""
    check_model(model)
    if model not in EMBEDDED and is_adapter_folder(model):
        base, lora, adapters = load_adapters(model)
        found = checkpoint(base, dtype)
        return dataclasses.replace(found, params=merge_into(found.params, adapters, lora))
    path = checkpoint_of(model)
    config, dtype = read_config(path), dtype or stored_dtype(path)
    place = jax.sharding.SingleDeviceSharding(_host())
    targets = {
        name: jax.ShapeDtypeStruct(shape, dtype_of(name, jnp.dtype(dtype)), sharding=place)
        for name, (shape, _) in split_abstract(config)[1].items()
    }
    kept = path / TEMPLATE_FILE
    template = kept.read_bytes() if config.scalar and kept.exists() else None
    return Found(config, load_params(path, targets), tokenizer_of(path), str(path), dtype, template)


def _with_adapters(found: Found, config: ConvertConfig) -> Found:
    if config.adapters is None:
        return found
    lora, adapters = adapters_for(config.adapters, found.config, config.model)
    return dataclasses.replace(found, params=merge_into(found.params, adapters, lora))


# ---- training runs ----


def _trained(config: ConvertConfig) -> Found:
    """The weights of a training run's step, as its `model` folder would have them; they are the step's float32 masters in
    the output's dtype, or the base in that dtype with the step's adapters in it.

    Raises FileNotFoundError and ValueError as `steps.find` does, and for a base that is not there or is another model.
    """
    step = steps.find(config.model, config.step)
    recipe, base = step.recipe, _base_of(step, config)
    dtype = config.dtype or recipe.get("compute_dtype") or "float32"
    lora = Lora(**recipe["lora"] | {"targets": tuple(recipe["lora"]["targets"])}) if "lora" in recipe else Lora()
    logger.info("step %d of %s, trained from %s", step.number, step.place, base)
    if base == FRESH:
        numbers, tokenizer, source = fresh_config(Fresh(**recipe["fresh"])), ByteTokenizer(), None
    else:
        source = str(checkpoint_of(base))
        numbers, tokenizer = read_config(source), tokenizer_of(source)
    numbers = dataclasses.replace(numbers, scalar=numbers.scalar or "score" in step.shapes)
    _check_weights(step, numbers, lora, base)
    if not lora.rank:
        params = step.read(jnp.dtype(dtype), _host())
    else:
        params = (
            random_params(numbers, recipe["seed"], jnp.dtype(dtype))
            if source is None
            else checkpoint(base, dtype).params
        )
        params = merge_into(params, step.read(jnp.dtype(jnp.float32), _host()), lora)
    return Found(numbers, params, tokenizer, source, dtype, _template(step) if numbers.scalar else None)


def _base_of(step: steps.Step, config: ConvertConfig) -> str:
    base = config.base or step.recipe.get("model")
    if base is None:
        raise ValueError(f"the recipe of {step.place} names no model: give the one that was trained, --base MODEL")
    local = base != FRESH and base not in EMBEDDED and "://" not in base
    if config.base is None and local and not epath.Path(base).expanduser().exists():
        raise FileNotFoundError(
            f"{config.model} was trained from {base}, which is not there: go to the folder that the run was started in, or "
            "give --base MODEL"
        )
    return base


def _check_weights(step: steps.Step, config: DecoderConfig, lora: Lora, base: str) -> None:
    """Raise ValueError unless a step's weights are those of the config, or its adapters."""
    shapes = split_abstract(config)[1]
    wanted: Mapping[str, Any] = products.axes(shapes, lora) if lora.rank else shapes
    expected = {name: tuple(shape) for name, (shape, _) in wanted.items()}
    names = sorted(expected.keys() | step.shapes.keys())
    differing = [name for name in names if expected.get(name) != step.shapes.get(name)]
    if differing:
        told = "; ".join(f"{name} is {step.shapes.get(name)}, not {expected.get(name)}" for name in differing[:3])
        raise ValueError(
            f"{step.place} holds weights of another model than {base}, {len(differing)} of {len(names)} differ: {told}. "
            "Name the model that the run was started from with --base"
        )


def _template(step: steps.Step) -> bytes | None:
    """What shows a scalar model its texts: as the run's model has it, or as its recipe says; None for the packaged one."""
    kept, named = step.place.parent.parent / "model" / TEMPLATE_FILE, step.recipe.get("template")
    if kept.exists():
        return kept.read_bytes()
    return template_path(named).read_bytes() if named else None
