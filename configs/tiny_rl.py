"""Stage 2 on the tiny task: GRPO from the model that `tiny_rft.py` makes.

    python -m grm_jax.main rl --config configs/tiny_rl.py

64 prompts x 8 rollouts a step. To expect: at least 95 % of 2,000 examples that were never trained on, parse failures
under 1 %; launch/learn.sh runs all three stages.
"""

from pathlib import Path

from grm_jax.recipes import Checkpoints, Items, Optimizer, RlConfig


def config() -> RlConfig:
    return RlConfig(
        output="runs/tiny/rl",
        model="runs/tiny/rft/model",
        items=Items(files=("runs/tiny/data/train.jsonl",)),
        template=str(Path(__file__).parent / "tiny_template.txt"),
        prompts_per_step=32,
        group=8,
        max_new_tokens=72,
        microbatch_prompts=32,
        kl_coef=0.0,  # the smallest of the paper's grid: from a model that cannot judge there is nothing to stay near to
        steps=120,
        compute_dtype="float32",
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=5),
        checkpoints=Checkpoints(every=1000),
        remat="none",
    )
