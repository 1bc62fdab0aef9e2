"""`plan`: compile every program of a run for a topology that is not there, and say whether it fits and what bounds it.

1. The recipe is read as the run's own command reads it; the model's numbers come from a config.json or by name, no weights.
2. A TPU topology comes from libtpu (the extra `tpu`), which compiles without a TPU; `--cpu-devices` simulates.
3. Each program is lowered from shapes and compiled; its memory is the compiler's count, its work `hlo.costs`'.
4. The roofline is a least time: each phase takes as long as its products, its memory, its links or its network alone.

The text of a compiled program goes to `--output` where that is given.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from grm_jax import metrics, recipes
from grm_jax.config import PlanConfig
from grm_jax.log import logger
from grm_jax.models import kernels
from grm_jax.models.config import DecoderConfig
from grm_jax.plan import hlo, known, programs, report
from grm_jax.plan.chips import CHIPS, Chip
from grm_jax.sharding import lay_out
from grm_jax.weights.embedded import EMBEDDED, find_embedded
from grm_jax.weights.load import read_config


def run(config: PlanConfig, rest: Sequence[str]) -> int:
    """Print the plan; 1 where something does not fit, else 0. Raises ValueError for what cannot be planned."""
    recipe = _recipe(config, rest)
    numbers = model_numbers(config.numbers or recipe.model)
    devices, chip = _devices(config)
    kernels.select(recipe.kernels)
    mesh = lay_out(recipe.mesh, pool=devices)
    peak = metrics.peak_flops(devices[0])
    wanted = programs.programs(recipe, numbers, mesh)
    if unknown := set(config.only) - {program.name for program in wanted}:
        raise ValueError(f"only = {sorted(unknown)}: the programs are {', '.join(program.name for program in wanted)}")
    found = []
    for program in wanted:
        if config.only and program.name not in config.only:
            continue
        logger.info("compiling %s for %d devices", program.name, mesh.size)
        found.append(compiled(program, dict(mesh.shape), config.output, devices[0].platform, config.slices))
    print(report.text(found, chip, peak, dict(mesh.shape), config.slices), end="")
    return 0 if all(report.fits(program, chip) for program in found) else 1


def compiled(
    program: programs.Program, mesh: dict[str, int], output: str | None, platform: str, slices: int = 1
) -> report.Compiled:
    """A program compiled, measured and counted; or why the compiler refused it."""
    started = time.monotonic()
    kinds = {kind: report.shard_bytes(tree) for kind, tree in program.arguments.items()}
    try:
        done = program.lowered().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise ValueError(f"{program.name} does not compile: {report.shortened(str(error))}") from error
        return report.Compiled(program.name, time.monotonic() - started, kinds, failed=report.shortened(str(error)))
    seconds, memory, text = time.monotonic() - started, done.memory_analysis(), done.as_text()
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        Path(output, f"{program.name}.hlo.txt").write_text(text)
    gathered = hlo.loops_that_gather(text, "decode", least=1 << 20)
    for line in gathered:
        logger.warning("%s gathers in its decoding loop: %s", program.name, line)
    return report.Compiled(
        program.name,
        seconds,
        kinds,
        temporaries=_temporaries(memory, platform),
        beside=report.shard_bytes(program.beside),
        phases=hlo.costs(text, mesh | {"data": mesh["data"] // slices}, program.steps, slices),
    )


def _temporaries(memory: Any, platform: str) -> float:
    """Bytes beside the arguments at the moment when most are held.

    A TPU's compiler gives that peak, and refuses a program whose peak is more than the chip has; its sum of temporaries
    counts what is not there at once. The CPU's peak is of the arguments alone, so there it is the sum.
    """
    if platform == "tpu":
        return max(memory.peak_memory_in_bytes - memory.argument_size_in_bytes, 0)
    return memory.temp_size_in_bytes + max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)


def model_numbers(model: str) -> DecoderConfig:
    """The numbers of an embedded model, one that `known` lists, or a checkpoint's. Raises ValueError where it is none."""
    if model in EMBEDDED:
        return read_config(find_embedded(model))
    if model in known.CONFIGS:
        return known.numbers(model)
    try:
        return read_config(model)
    except (FileNotFoundError, OSError) as error:
        raise ValueError(
            f"{model} is not to be read here ({error}): give --numbers and a folder with config.json, or one of "
            f"{', '.join(known.CONFIGS)}"
        ) from error


def _recipe(config: PlanConfig, rest: Sequence[str]) -> programs.Recipe:
    kinds = (recipes.RlConfig, recipes.RftConfig, recipes.MetaConfig, recipes.PairsConfig)
    found = recipes.read(object, config.config)
    if not isinstance(found, kinds) or isinstance(found, recipes.CloudConfig):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{config.config} returns {type(found).__name__}(...): plans are made of {names}")
    return recipes.load(type(found), ["--config", config.config, *rest], "grm_jax.main plan")


def _devices(config: PlanConfig) -> tuple[list[jax.Device], Chip | None]:
    if config.cpu_devices is not None:
        found = jax.local_devices(backend="cpu")
        if len(found) < config.cpu_devices:
            raise ValueError(f"cpu_devices = {config.cpu_devices}: JAX was started with {len(found)}, call `plan` anew")
        return found[: config.cpu_devices], None
    from jax.experimental import topologies

    kind = config.topology.partition(":")[0]
    if kind not in CHIPS:
        raise ValueError(f"topology = {config.topology!r}: it begins with one of {', '.join(CHIPS)}, such as v5p:4x4x4")
    chip = CHIPS[kind]
    told = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": chip.accelerator}
    told["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing is run on a TPU, so several plans may be made at once
    for name, value in told.items():
        os.environ.setdefault(name, value)
    try:
        many = {"num_slices": config.slices} if config.slices > 1 else {}
        return list(topologies.get_topology_desc(config.topology, platform="tpu", **many).devices), chip
    except (ImportError, RuntimeError, ValueError, jax.errors.JaxRuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"topology = {config.topology!r}: {first}; libtpu has to be installed (pip install 'grm-jax[tpu]'), and the "
            "topology one of its own, such as v5p:4x4x4, v5e:4x8 or v6e:4x8"
        ) from error
