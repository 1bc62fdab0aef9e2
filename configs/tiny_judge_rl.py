"""Baseline on the tiny task, LLM-as-a-judge: GRPO from the model that `tiny_judge_rft.py` makes.

python -m grm_jax.main rl --config configs/tiny_judge_rl.py
"""

from pathlib import Path

from grm_jax.recipes import Checkpoints, Items, Optimizer, RlConfig


def config() -> RlConfig:
    return RlConfig(
        output="runs/tiny/judge_rl",
        model="runs/tiny/judge_rft/model",
        items=Items(files=("runs/tiny/data/train.jsonl",), held_out=1000),
        template=str(Path(__file__).parent / "tiny_choice.txt"),
        prompts_per_step=32,
        group=8,
        max_new_tokens=72,
        max_prompt_tokens=512,
        slots=256,
        microbatch_prompts=32,
        kl_coef=0.0,
        steps=70,
        compute_dtype="float32",
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=5, schedule="cosine"),
        checkpoints=Checkpoints(every=1000),
        remat="none",
    )
