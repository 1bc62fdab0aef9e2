"""What the runners of an RL step share: the job they are given, its trivial reward, and the line of JSON that they print.

1. `read_job` reads the job from the command line.
2. A runner stamps the clock where its first step starts and where every step has ended: `report` makes seconds of it.
3. `rewards` holds every rollout against the job's length: a rollout that stopped early voids the run.

A step is everything between two updates' ends: rollouts, rewards, reference, gradients, the optimizer's update.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LEARNING_RATE = 1e-5
B1, B2, EPS, WEIGHT_DECAY = 0.9, 0.95, 1e-8, 0.0  # AdamW's, of all weights
CLIP_NORM = 1.0  # of the global gradient norm
CLIP_RATIO = 0.2
KL_COEF = 0.08  # of the k3 estimate, in the loss
TEMPERATURE = 1.0  # no top-k, no top-p


@dataclass(frozen=True)
class RlJob:
    """One engine's task: `warm_up` + `steps` GRPO steps on the same prompts, `group` rollouts of each."""

    prompts: tuple[tuple[int, ...], ...]
    group: int
    new_tokens: int  # of every rollout, exactly
    warm_up: int  # steps that are not counted: engines compile in them
    steps: int
    microbatch_prompts: int  # prompts whose rollouts' gradients are computed at once
    model: str  # the Hugging Face folder, or the embedded model's name

    @property
    def all_steps(self) -> int:
        return self.warm_up + self.steps


def read_job(doc: str | None) -> RlJob:
    """The job on the command line; `doc` is the runner's own description."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: a list of lists of token ids, equally long")
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--warm-up", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--microbatch-prompts", type=int, required=True)
    parser.add_argument("--model", required=True)
    given = vars(parser.parse_args())
    prompts = json.loads(given["prompts"].read_text())
    return RlJob(**given | {"prompts": tuple(map(tuple, prompts))})


def threads() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


def rewards(job: RlJob, lengths: Sequence[int]) -> list[float]:
    """1 and 0 by turns, so that no group's advantages vanish; `lengths` are the rollouts' tokens, group by group.

    Raises ValueError if a rollout has another length than the job's, or if there are more or fewer of them.
    """
    wanted = len(job.prompts) * job.group
    if len(lengths) != wanted or set(lengths) != {job.new_tokens}:
        raise ValueError(
            f"{len(lengths)} rollouts of {sorted(set(lengths))} tokens, the job is {wanted} of {job.new_tokens}: "
            "end ids must be ignored"
        )
    return [float(1 - at % 2) for at in range(wanted)]


def report(engine: str, job: RlJob, stamps: Sequence[float], notes: str) -> None:
    """Print the result as JSON; `stamps`: seconds at the start of the first step and at the end of each.

    Raises ValueError if a step is missing: the time would be another job's.
    """
    if len(stamps) != job.all_steps + 1:
        raise ValueError(f"{engine} ended {len(stamps) - 1} steps, warm-up and steps are {job.all_steps}")
    seconds = [after - before for before, after in itertools.pairwise(stamps)]
    result = {
        "engine": engine,
        "seconds": seconds[job.warm_up :],
        "warm_up_seconds": seconds[: job.warm_up],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "prompts": len(job.prompts),
        "prompt_tokens": len(job.prompts[0]),
        "group": job.group,
        "new_tokens": job.new_tokens,
        "microbatch_prompts": job.microbatch_prompts,
        "notes": notes,
    }
    print(json.dumps(result), flush=True)
