"""What every peer's runner shares: the job it is given, the clock, and the line of JSON that it prints.

1. `read_job` reads the job from the command line.
2. `measure` calls the warm-up, then `sample(seed)` for each repeat, and holds the number of sampled tokens against k x new.
3. The last line on standard output is the result; whatever else an engine prints comes before it.

A repeat's time starts before the prompt is read by the model and ends when the last token is on the host.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TEMPERATURE = 0.5


@dataclass(frozen=True)
class Job:
    """One engine's task: k samples of one prompt, of exactly `new_tokens` tokens each, `repeats` times."""

    prompt: tuple[int, ...]
    k: int
    new_tokens: int
    repeats: int
    dtype: str
    model: Path  # the GGUF file or Hugging Face folder that the engine reads
    variant: str  # a choice of the engine's own; its runner says which


def read_job(doc: str | None) -> Job:
    """The job on the command line; `doc` is the runner's own description."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=Path, required=True, help="a JSON list of token ids")
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--variant", default="")
    given = vars(parser.parse_args())
    return Job(**given | {"prompt": tuple(json.loads(given["prompt"].read_text()))})


def threads() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


def measure(engine: str, job: Job, warm_up: Callable[[], object], sample: Callable[[int], int], notes: str) -> None:
    """Time `sample`, which takes a seed and returns how many tokens it sampled, and print the result as JSON.

    `notes`: versions, and how often the prompt is read. Raises ValueError if an engine stopped early: its time is void.
    """
    started = time.perf_counter()
    warm_up()
    warm = time.perf_counter() - started
    seconds, wanted = [], job.k * job.new_tokens
    for seed in range(1, job.repeats + 1):
        started = time.perf_counter()
        sampled = sample(seed)
        seconds.append(time.perf_counter() - started)
        if sampled != wanted:
            raise ValueError(
                f"{engine} sampled {sampled} tokens, k x new-tokens is {wanted}: its end ids must be ignored"
            )
    result = {
        "engine": engine,
        "dtype": job.dtype,
        "k": job.k,
        "prompt_tokens": len(job.prompt),
        "new_tokens": job.new_tokens,
        "seconds": seconds,
        "sampled_tokens": wanted,
        "tokens_per_second": [wanted / each for each in seconds],
        "warm_up_seconds": warm,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "notes": notes,
    }
    print(json.dumps(result), flush=True)
