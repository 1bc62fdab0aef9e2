"""Where the time of an RL step goes: rollouts alone, the whole step, and what both reach of this device's ceilings.

    python tests/peers/step_parts.py --kernels cudnn

1. The step is that of `product_step.py` in bfloat16, over prompts of random tokens: rollouts, scores, rewards, reference,
   gradients and AdamW, one program. The rollouts are timed as a program of their own; the rest of a step is its update.
2. Both ceilings are measured in the same run (`bench.measure_ceilings`), after the peak of memory is read.
3. Bytes of the rollouts: each decoding step reads every weight, each prompt's keys once and each row's own; prefill is not
   counted. FLOPs of the update: each token once forward for the reference, and three times to be trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import product_step
import rl_job

from grm_jax import bench
from grm_jax.data.batches import Batch
from grm_jax.models.decoder import Params
from grm_jax.models.flops import matrix_weights, model_flops, timed
from grm_jax.sampler import Sampling
from grm_jax.spct import rl_step


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"prompts": 64, "group": 8, "prompt-tokens": 512, "new-tokens": 128, "steps": 3, "microbatch-prompts": 16}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--remat", default="block", choices=("none", "block", "dots"))
    parser.add_argument("--kernels", default="auto", choices=("auto", "plain", "splash", "cudnn"))
    parser.add_argument("--model", default="smollm2-135m")
    return parser.parse_args()


def main() -> None:
    given = read_arguments()
    ids = np.random.default_rng(0).integers(1000, 49000, (given.prompts, given.prompt_tokens))
    job = rl_job.RlJob(
        *(tuple(map(tuple, ids.tolist())), given.group, given.new_tokens, 1, given.steps),
        *(given.microbatch_prompts, given.model),
    )
    recipe = product_step.settings(job)
    recipe = dataclasses.replace(recipe, compute_dtype="bfloat16", remat=given.remat, kernels=given.kernels)
    policy, frozen, state, step = product_step.begin(recipe)
    key, batch = jax.random.key(0, impl="threefry2x32"), rl_step.put(product_step.batch_of(job), policy)

    @jax.jit
    def roll(params: Params, frozen: Params, batch: Batch) -> rl_step.Rollouts:
        reading = policy.working(params, frozen) if policy.scans else None
        decoding = policy.decoding(params, frozen)
        return rl_step.roll(policy, decoding, batch, key, recipe, Sampling(recipe.temperature), reading)

    def one() -> rl_step.Report:
        nonlocal state
        state, report = step(state, frozen, batch, key)
        return report

    rollouts = timed(functools.partial(roll, state.params, frozen, batch), given.steps)
    steps = timed(one, given.steps)
    c, rows = policy.config, given.prompts * given.group
    cached = 2 * c.layers * sum(heads * numbers for heads, numbers in c.stored)  # bytes a token
    keys = cached * (given.prompts * given.prompt_tokens + rows * given.new_tokens / 2)
    read = given.new_tokens * (2 * matrix_weights(c) + keys)
    tokens = given.prompts * given.prompt_tokens + rows * given.new_tokens
    flops = model_flops(c, tokens, tokens, (given.prompt_tokens + given.new_tokens) / 2)
    update = min(steps) - min(rollouts)
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    ceilings = bench.measure_ceilings(jnp.dtype("bfloat16"))
    job = f"{given.prompts} prompts of {given.prompt_tokens} tokens, {given.group} rollouts of {given.new_tokens}"
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, kernels {given.kernels}, remat {given.remat}: {job}")
    print(f"step {min(steps):.3f} to {max(steps):.3f} s, peak {memory / 2**30:.1f} GiB")
    print(
        f"rollouts {min(rollouts):.3f} to {max(rollouts):.3f} s: {rows * given.new_tokens / min(rollouts):.0f} tokens/s, "
        f"{read / min(rollouts) / ceilings.bytes:.0%} of {ceilings.bytes / 1e9:.0f} GB/s"
    )
    print(
        f"update {update:.3f} s: {flops / update / 1e12:.2f} TFLOP/s, "
        f"{flops / update / ceilings.flops:.0%} of {ceilings.flops / 1e12:.1f}"
    )


if __name__ == "__main__":
    main()
