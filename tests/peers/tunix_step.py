"""Tunix's `GRPOLearner` on CPU: its Llama 3 model in this model's numbers, its own sampler ("vanilla") for the rollouts.

1. Prompts are ids: `Ids` knows them by their place. No id ends or pads a text, and `max_prompt_length` is the prompts'
   own length, so nothing is padded.
2. Actor and rollouts share one device and one set of weights; the reference is a second model.
3. Gradients of `train_micro_batch_size` prompts' rollouts are computed at once and accumulated by optax's MultiSteps; a
   job of one microbatch accumulates nothing. Nothing is recomputed in the backward pass: its default (`RematConfig.NONE`).

It asks for a batch where a step starts and waits for the update where it ends, so the batches' source is the clock. Like
in `tunix_sampler.py`, version 0.1.7 passes no `rope_theta` on: its texts are not this model's; its time is.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rl_job
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

_NO_END, _NO_PAD = -1, -2  # ids that no text holds


class Ids:
    """A tokenizer whose texts are places of prompts; a decoded text is one letter a token."""

    def __init__(self, prompts: tuple[tuple[int, ...], ...]) -> None:
        self.prompts = prompts

    def encode(self, text: str) -> list[int]:
        return list(self.prompts[int(text)])

    def decode(self, ids: list[int]) -> str:
        return "x" * len(ids)

    def bos_id(self) -> int:
        return 0  # taken for "none"

    def eos_id(self) -> int:
        return _NO_END

    def pad_id(self) -> int:
        return _NO_PAD


def read_numbers(folder: Path) -> llama.ModelConfig:
    """The folder's model in Tunix's words."""
    given = json.loads((folder / "config.json").read_text())
    return llama.ModelConfig(
        num_layers=given["num_hidden_layers"],
        vocab_size=given["vocab_size"],
        embed_dim=given["hidden_size"],
        hidden_dim=given["intermediate_size"],
        num_heads=given["num_attention_heads"],
        head_dim=given["hidden_size"] // given["num_attention_heads"],
        num_kv_heads=given["num_key_value_heads"],
        rope_theta=given["rope_theta"],
        norm_eps=given["rms_norm_eps"],
        weight_tying=given["tie_word_embeddings"],
    )


def settings(job: rl_job.RlJob, mesh: jax.sharding.Mesh) -> rl_cluster.ClusterConfig:
    """The job in Tunix's words, all roles on one device."""
    prompts, length = len(job.prompts), len(job.prompts[0])
    parted = job.microbatch_prompts < prompts
    adamw = optax.adamw(rl_job.LEARNING_RATE, rl_job.B1, rl_job.B2, rl_job.EPS, weight_decay=rl_job.WEIGHT_DECAY)
    return rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys((rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT), mesh),
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.chain(optax.clip_by_global_norm(rl_job.CLIP_NORM), adamw),
            eval_every_n_steps=10**9,
            max_steps=job.all_steps + 1,  # the batches end first, behind the last step
            mini_batch_size=prompts,
            train_micro_batch_size=job.microbatch_prompts if parted else None,
            rollout_micro_batch_size=prompts,
            compute_logps_micro_batch_size=job.microbatch_prompts,
        ),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=job.new_tokens,
            max_prompt_length=length,
            kv_cache_size=length + job.new_tokens,
            temperature=rl_job.TEMPERATURE,
            top_p=1.0,
            eos_tokens=[_NO_END],
        ),
    )


def main() -> None:
    job = rl_job.read_job(__doc__)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    numbers = read_numbers(Path(job.model))
    actor, reference = (
        create_model_from_safe_tensors(job.model, numbers, mesh, dtype=jnp.dtype("float32")) for _ in range(2)
    )
    tokenizer, config = Ids(job.prompts), settings(job, mesh)
    cluster = rl_cluster.RLCluster(actor=actor, reference=reference, tokenizer=tokenizer, cluster_config=config)

    def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        return rl_job.rewards(job, [len(text) for text in completions])

    learner = GRPOLearner(
        rl_cluster=cluster,
        algo_config=GRPOConfig(
            num_generations=job.group,
            beta=rl_job.KL_COEF,
            epsilon=rl_job.CLIP_RATIO,
            kl_loss_mode="low_var_kl",  # k3
        ),
        reward_fns=reward,
    )
    stamps: list[float] = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(job.all_steps):
            stamps.append(time.perf_counter())
            yield {"prompts": np.array([str(at) for at in range(len(job.prompts))])}
        stamps.append(time.perf_counter())

    learner.train(batches())
    check(cluster)
    version = importlib.metadata.version("google-tunix")
    rl_job.report(
        "tunix", job, stamps, f"google-tunix {version}, jax {jax.__version__}; nothing recomputed; prompt read G times"
    )


def check(cluster: rl_cluster.RLCluster) -> None:
    """Raise ValueError unless the run was the job: float32, all weights moved from the reference's, rollouts by them."""
    models = (cluster.actor_trainer.model, cluster.inference_worker.get_model("reference"), cluster.rollout.model())
    actor, reference, rollout = (jax.tree.leaves(nnx.state(model, nnx.Param)) for model in models)
    types = sorted({str(value.dtype) for value in (*actor, *reference, *rollout)})
    still = sum(bool(jnp.all(after == before)) for after, before in zip(actor, reference, strict=True))
    other = sum(not jnp.all(after == used) for after, used in zip(actor, rollout, strict=True))
    if types != ["float32"] or still or other:
        raise ValueError(
            f"tunix's weights are {types}, {still} of {len(actor)} did not move, {other} are not the rollouts': "
            "the steps that were timed are not the job's"
        )


if __name__ == "__main__":
    main()
