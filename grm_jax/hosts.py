"""Several processes, one run: JAX's own multi-controller runtime, and who does what in it.

1. `join` starts the runtime that `processes.wanted` has found asked for.
2. Every process runs the same program. A mesh over all processes is used in lockstep: they judge and train on the same
   rows, and process 0 writes. With a mesh a process, each judges a share of the rows and writes its own part (`Share`).
3. `agree` gives all what process 0 found; `sync` waits for all.
4. When a process is lost, the others stop with `processes.LOST`: the same command goes on at the newest checkpoint, on as
   many processes and devices as there then are.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from grm_jax.processes import Wanted

HEARTBEAT_SECONDS = 60  # without a sign of life after which a process counts as lost


@dataclasses.dataclass(frozen=True)
class Share:
    """Rows [index::count] are this process's; `writes` is whether it writes what comes of them."""

    index: int
    count: int
    writes: bool


def join(wanted: Wanted) -> None:
    """Become one of several processes. Call it before anything else asks JAX for a device.

    Raises ValueError where JAX does not find the others.
    """
    # On CPU several programs would otherwise be under way at once, and their collectives meet in another order elsewhere.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # Its notifier takes SIGTERM and tells nobody: a process that is asked to go before training begins would go on.
    jax.config.update("jax_enable_preemption_service", False)
    named = {} if wanted.coordinator is None else {
        "coordinator_address": wanted.coordinator,
        "num_processes": wanted.processes,
        "process_id": wanted.process,
        "cluster_detection_method": "deactivate",
    }  # fmt: skip
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **named)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"cannot join the other processes ({error}): name them by --coordinator, --processes and --process, or set "
            "JAX_PLATFORMS=cpu where there are none"
        ) from error


def is_first() -> bool:
    """Whether this is the process that logs, and writes what there is once."""
    return jax.process_index() == 0


def share(lockstep: bool) -> Share:
    """What of a run's rows this process judges; all of them where the mesh spans processes (`lockstep`)."""
    if lockstep or jax.process_count() == 1:
        return Share(0, 1, is_first())
    return Share(jax.process_index(), jax.process_count(), True)


def agree(value: Any) -> Any:
    """What process 0 gives, on every process; JSON has to be able to hold it."""
    if jax.process_count() == 1:
        return value
    said = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_first() else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(said.size)))
    padded = said if is_first() else np.zeros(size, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)))


def sync(what: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
