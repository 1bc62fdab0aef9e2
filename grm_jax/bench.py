"""`bench sample`: how fast prompts are prefilled and tokens sampled, against what this machine can do.

1. Both ceilings are measured first, in this run: FLOP/s of a large matrix product in the weights' dtype, and bytes/s of
   reading a large array.
2. Each row of the table samples `votes` continuations of `batch` random prompts, once to compile and `repeats` times
   timed; the prefill alone is timed beside it, and what is left is decoding.
3. FLOPs and bytes are counted from the config: each step reads every weight, each prompt's cache once and each row's own
   tokens; each token costs two FLOPs a matrix weight, and its attention.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from grm_jax.config import BenchConfig
from grm_jax.grm import load
from grm_jax.metrics import device_memory
from grm_jax.models.decoder import Model
from grm_jax.models.flops import attention_flops, matrix_weights, product_flops, timed
from grm_jax.sampler import Sampling, generate, rollout
from grm_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this machine reached: FLOP/s of a matrix product and bytes/s of a read."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row: rates are tokens/s (medians), shares are of the ceilings, spread is (max - min) / median of the runs."""

    batch: int
    votes: int
    seconds: float
    spread: float
    tokens_per_second: float  # sampled tokens, prefill included
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_flops_share: float
    decode_bytes_share: float
    prefill_flops_share: float
    peak_bytes: int


def run(config: BenchConfig) -> None:
    """Measure every row, print the table, and write the JSON file when one is asked for."""
    model = load(config.model, config.dtype, make_mesh()).model
    limit = model.config.max_positions
    if config.prompt_tokens + config.new_tokens > limit:
        raise ValueError(
            f"prompt_tokens + new_tokens = {config.prompt_tokens + config.new_tokens}: {config.model} has {limit} "
            "positions; ask for fewer"
        )
    ceilings = measure_ceilings(model.dtype)
    rows = [measure(model, config, batch, votes, ceilings) for batch in config.batch for votes in config.votes]
    _print(config, model, ceilings, rows)
    if config.json:
        report = {
            "config": dataclasses.asdict(config),
            "device": jax.devices()[0].device_kind,
            "dtype": str(model.dtype),
            "ceilings": dataclasses.asdict(ceilings),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        Path(config.json).write_text(json.dumps(report, indent=1) + "\n")


def measure_ceilings(dtype: jnp.dtype, size: int | None = None, array_bytes: int | None = None) -> Ceilings:
    """The best of five: a product of two [size, size] matrices, and a maximum over `array_bytes` of float32.

    Sizes are by default the device's: 512 MiB on a CPU, and 4 GiB on accelerators, which read half a GiB too soon to be
    timed, or a quarter of what is free there.
    """
    if array_bytes is None:
        memory = jax.devices()[0].memory_stats() or {}
        free = memory.get("bytes_limit", 1 << 31) - memory.get("bytes_in_use", 0)
        array_bytes = min(1 << 32, free // 4) // 4096 * 4096
    x = jnp.ones(array_bytes // 4, jnp.float32)
    parts = 2 * jax.local_device_count() if jax.default_backend() != "cpu" else 8
    read = jax.jit(lambda x: x.reshape(parts, -1).max(axis=1))
    return Ceilings(flops=product_flops(dtype, size), bytes=array_bytes / min(timed(lambda: read(x), 5)))


def measure(model: Model, config: BenchConfig, batch: int, votes: int, ceilings: Ceilings) -> Measured:
    """Time one row of the table."""
    c, itemsize = model.config, model.dtype.itemsize
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, c.vocab_size, (batch, config.prompt_tokens)).tolist()
    sampling, key = Sampling(temperature=0.5), jax.random.key(0, impl="threefry2x32")

    def sample() -> None:
        generate(model, prompts, votes, key, max_new_tokens=config.new_tokens, sampling=sampling, slots=batch * votes)

    tokens, lengths = jnp.asarray(prompts)[:, :-1], jnp.full(1, config.prompt_tokens - 1)

    def prefill() -> object:
        return [rollout.prefill(model.graph, model.params, None, row[None], lengths) for row in tokens]

    runs = timed(sample, config.repeats)
    seconds = statistics.median(runs)
    prefill_seconds = statistics.median(timed(prefill, config.repeats))
    decode_seconds = max(seconds - prefill_seconds, 1e-9)
    rows, steps = batch * votes, config.new_tokens
    own = steps / 2  # tokens that a row has written, on average
    decode_flops = rows * steps * (2 * matrix_weights(c) + attention_flops(c, config.prompt_tokens + own))
    cached = c.layers * sum(heads * numbers for heads, numbers in c.stored) * itemsize  # bytes a token
    decode_bytes = steps * (matrix_weights(c) * itemsize + cached * (batch * config.prompt_tokens + rows * own))
    body = matrix_weights(c) - c.vocab_size * c.dim  # a prefill does not go through the head
    prefill_flops = batch * config.prompt_tokens * (2 * body + attention_flops(c, config.prompt_tokens / 2))
    return Measured(
        batch=batch,
        votes=votes,
        seconds=seconds,
        spread=(max(runs) - min(runs)) / seconds,
        tokens_per_second=rows * steps / seconds,
        prefill_tokens_per_second=batch * config.prompt_tokens / prefill_seconds,
        decode_tokens_per_second=rows * steps / decode_seconds,
        decode_flops_share=decode_flops / decode_seconds / ceilings.flops,
        decode_bytes_share=decode_bytes / decode_seconds / ceilings.bytes,
        prefill_flops_share=prefill_flops / prefill_seconds / ceilings.flops,
        peak_bytes=device_memory(),
    )


def _print(config: BenchConfig, model: Model, ceilings: Ceilings, rows: list[Measured]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)  # a file takes the whole table
    console.print(
        f"{config.model}, {model.dtype}, {jax.devices()[0].device_kind}: {config.prompt_tokens} prompt tokens, "
        f"{config.new_tokens} new ones; ceilings {ceilings.flops / 1e9:.0f} GFLOP/s, {ceilings.bytes / 1e9:.1f} GB/s"
    )
    table = Table(
        *("batch", "votes", "seconds", "spread", "tokens/s", "prefill/s", "decode/s"),
        *("decode FLOPs", "decode bytes", "prefill FLOPs", "peak GB"),
    )
    for row in rows:
        table.add_row(
            *(str(row.batch), str(row.votes), f"{row.seconds:.2f}", f"{row.spread:.0%}"),
            *(f"{row.tokens_per_second:.0f}", f"{row.prefill_tokens_per_second:.0f}"),
            *(f"{row.decode_tokens_per_second:.0f}", f"{row.decode_flops_share:.0%}", f"{row.decode_bytes_share:.0%}"),
            *(f"{row.prefill_flops_share:.0%}", f"{row.peak_bytes / 1e9:.2f}"),
        )
    console.print(table)
