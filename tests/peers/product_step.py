"""The product's own RL step (`spct.rl_step`): rollouts, scores, rewards, reference, gradients and AdamW in one program.

1. Each prompt is read once for its rollouts, and once for their gradients; the prompts share no head here.
2. The scores are read from the tokens as in a real step; the reward then takes turns instead of judging them.
3. Recomputed in the backward pass: attention alone (`remat = "none"`), which costs 0.2 GiB here against whole blocks.

A step is timed from the prompts' ids on the host to the rollouts and the metrics on the host. It compiles in its warm-up.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import rl_job
from jaxtyping import Array, Bool, Float, Int

from grm_jax import memory, scores
from grm_jax.data.batches import Batch
from grm_jax.grm import vocabulary_bytes
from grm_jax.recipes import Items, Optimizer, RlConfig
from grm_jax.spct import rl_step, start
from grm_jax.train import policy as training


def settings(job: rl_job.RlJob) -> RlConfig:
    """The job in this package's words."""
    return RlConfig(
        model=job.model,
        items=Items(files=("none.jsonl",)),  # not read: the prompts come from the job
        steps=job.all_steps,
        prompts_per_step=len(job.prompts),
        group=job.group,
        max_new_tokens=job.new_tokens,
        temperature=rl_job.TEMPERATURE,
        clip_low=rl_job.CLIP_RATIO,
        clip_high=rl_job.CLIP_RATIO,
        kl_coef=rl_job.KL_COEF,
        microbatch_prompts=job.microbatch_prompts,
        compute_dtype="float32",
        remat="none",
        optimizer=Optimizer(
            learning_rate=rl_job.LEARNING_RATE,
            b1=rl_job.B1,
            b2=rl_job.B2,
            eps=rl_job.EPS,
            weight_decay=rl_job.WEIGHT_DECAY,
            clip_norm=rl_job.CLIP_NORM,
        ),
    )


def by_turns(
    scores: Int[Array, "R N"], valid: Bool[Array, "R"], labels: Float[Array, "R N"], counts: Int[Array, "R"]
) -> Float[Array, "R"]:
    """The job's rewards, on the device."""
    return 1.0 - jnp.arange(scores.shape[0]) % 2


def batch_of(job: rl_job.RlJob) -> Batch:
    """The job's prompts, each with two responses to be scored from 1 to 10."""
    prompts = len(job.prompts)
    return Batch(
        head=np.zeros(0, np.int32),
        tokens=np.array(job.prompts, np.int32),
        lengths=np.array([len(ids) for ids in job.prompts], np.int32),
        labels=np.tile(np.array([1.0, 0.0], np.float32), (prompts, 1)),
        counts=np.full(prompts, 2, np.int32),
        low=np.full(prompts, 1, np.int32),
        high=np.full(prompts, 10, np.int32),
        choice=np.zeros(prompts, bool),
        items=np.arange(prompts, dtype=np.int32),
    )


def begin(recipe: RlConfig) -> tuple[training.Policy, dict[str, jax.Array], training.State, rl_step.Step]:
    """The policy, the reference's weights, the first state, which alone holds the policy's weights, and the step."""
    begun = start.load(recipe, reference=True)
    policy = begun.policy
    table = scores.token_table(vocabulary_bytes(begun.tokenizer, policy.config.vocab_size))
    optimizer = training.make_optimizer(recipe.optimizer, recipe.steps)
    state = training.start(begun.params, optimizer, policy.mesh)
    step = rl_step.make_step(policy, recipe, optimizer, table, (), state, by_turns)  # no id ends a rollout
    return policy, begun.frozen, state, step


def main() -> None:
    job = rl_job.read_job(__doc__)
    memory.give_back_after_compiling()
    recipe = settings(job)
    policy, frozen, state, step = begin(recipe)
    key = jax.random.key(recipe.seed, impl="threefry2x32")
    stamps = [time.perf_counter()]
    for _ in range(job.all_steps):
        state, report = step(state, frozen, rl_step.put(batch_of(job), policy), key)
        rollouts = jax.device_get(report).rollouts
        if report.judged.reward.tolist() != rl_job.rewards(job, rollouts.counts.tolist()):
            raise ValueError(f"rewards {report.judged.reward} are not the job's, 1 and 0 by turns")
        jax.block_until_ready(state)
        stamps.append(time.perf_counter())
    check(state, frozen)
    notes = f"jax {jax.__version__}; nothing recomputed but attention; prompt read once"
    rl_job.report("grm_jax", job, stamps, notes)


def check(state: training.State, frozen: dict[str, jax.Array]) -> None:
    """Raise ValueError unless the run was the job: float32, all weights moved from the reference's."""
    types = sorted({str(value.dtype) for weights in (state.params, frozen) for value in weights.values()})
    still = [name for name, value in state.params.items() if bool(jnp.all(value == frozen[name]))]
    if types != ["float32"] or still:
        raise ValueError(f"weights are {types}, {len(still)} of {len(frozen)} did not move: {still[:3]}")


if __name__ == "__main__":
    main()
