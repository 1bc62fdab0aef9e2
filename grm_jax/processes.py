"""Whether a command runs as one of several processes, and which one: from its flags, or from what started it.

1. `--coordinator HOST:PORT --processes N --process I` before the command, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
   and JAX_PROCESS_ID in the environment, name everything;
2. SLURM, Open MPI, and machines with TPUs (TPU VMs, GKE) know it themselves, and JAX asks them;
3. else the command runs alone.

JAX's runtime aborts a process, with a stack trace, when another one has been gone for a while: `watched` stands by and
says what to do.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

LOST = 75  # exit code: try again (EX_TEMPFAIL of sysexits.h)
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h

FLAGS = {
    "--coordinator": "JAX_COORDINATOR_ADDRESS",
    "--processes": "JAX_NUM_PROCESSES",
    "--process": "JAX_PROCESS_ID",
}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One of several processes; no coordinator: JAX asks the cluster for all three."""

    coordinator: str | None = None  # host:port of process 0, as every process reaches it
    processes: int | None = None
    process: int | None = None


def wanted(argv: Sequence[str], env: Mapping[str, str], root: Path = Path("/")) -> tuple[Wanted | None, list[str]]:
    """Which process this is, None where it runs alone, and the arguments without the flags that said so.

    Raises ValueError for a part of the flags alone, and for a process that is not one of them.
    """
    rest, given = list(argv), {name: env[name] for name in FLAGS.values() if env.get(name)}
    while rest and (flag := rest[0].partition("="))[0] in FLAGS:
        if not flag[1] and len(rest) < 2:
            raise ValueError(f"{flag[0]} has no value: give one, such as {_EXAMPLE}")
        given[FLAGS[flag[0]]] = flag[2] if flag[1] else rest[1]
        del rest[: 1 if flag[1] else 2]
    if given:
        return _named(given), rest
    return (Wanted() if managed(env, root) else None), rest


_EXAMPLE = "--coordinator 10.0.0.2:1234 --processes 4 --process 0"


def _named(given: Mapping[str, str]) -> Wanted:
    missing = [flag for flag, name in FLAGS.items() if name not in given]
    if missing:
        raise ValueError(
            f"of several processes {' and '.join(missing)} are not given: give all three, such as {_EXAMPLE}"
        )
    coordinator, processes, process = (given[name] for name in FLAGS.values())
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator = {coordinator!r}: it has to be host:port of process 0, such as 10.0.0.2:1234")
    if not processes.isdigit() or not process.isdigit() or not int(process) < int(processes):
        raise ValueError(f"process = {process} of processes = {processes}: they are whole numbers and count from 0")
    return Wanted(coordinator, int(processes), int(process))


def managed(env: Mapping[str, str], root: Path = Path("/")) -> bool:
    """Whether a cluster started this process and says so: SLURM, Open MPI, or a machine with TPUs.

    A TPU's own runtime is asked even for one host, as it alone knows how many there are. Where JAX_PLATFORMS leaves
    TPUs out, they are none of the run's business.
    """
    steps = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")  # of a task that srun started
    if int(env.get("SLURM_NTASKS") or 1) > 1 and all(name in env for name in steps):
        return True
    if int(env.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return True
    if "tpu" not in (env.get("JAX_PLATFORMS") or "tpu"):
        return False
    chips = any((root / "dev").glob("accel[0-9]*")) or any((root / "dev/vfio").glob("[0-9]*"))
    return chips and find_spec("libtpu") is not None


def watched() -> int | None:
    """Go on in a child process, where it returns None; the parent returns the child's exit code when it has ended.

    An abort (SIGABRT) becomes LOST, with what to do on standard error. SIGTERM is passed on, a terminal's SIGINT reaches
    both, and a killed parent takes the child with it. Call it before there are threads.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        return None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(child, number))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGABRT:
        print(f"error: {lost('its runtime said so above')}", file=sys.stderr)
        return LOST
    return 128 - code if code < 0 else code


def too_large(reason: str) -> str:
    """What to say when a device's memory does not hold what a program needs."""
    first = (reason.strip().splitlines() or ["no reason given"])[0][:300]
    return f"a device's memory is too small ({first}): the command plan says what a run takes, and what lowers it"


def cause_of(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """The first error of a kind among this one and what it was raised from; None where there is none.

    A checkpoint that waits for a lost process ends with an error of its own, raised from the runtime's.
    """
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    return error


def lost(reason: str) -> str:
    """What to say when another process, or a device, fails a run of several processes."""
    first = (reason.strip().splitlines() or ["no reason given"])[0][:300]
    return (
        f"another process of this run was lost, or a device failed ({first}). Start the same command again on the "
        "processes that there are: it goes on at its newest checkpoint"
    )
