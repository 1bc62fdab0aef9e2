"""Baseline on the tiny task, LLM-as-a-judge: the base model learns to write the best response's number.

    python -m grm_jax.main rft --config configs/tiny_judge_rft.py
    python -m grm_jax.main rl --config configs/tiny_judge_rl.py
    python -m grm_jax.main score --input runs/tiny/data/test.jsonl --model runs/tiny/judge_rl/model \
        --template configs/tiny_choice.txt --max-new-tokens 72

`score --expected-scores` weighs each choice by its probability (the paper's TokenProb).
"""

from grm_jax.recipes import Checkpoints, Optimizer, RftConfig


def config() -> RftConfig:
    return RftConfig(
        output="runs/tiny/judge_rft",
        model="runs/tiny/base/model",
        general=("runs/tiny/data/choice.jsonl",),
        general_share=1.0,
        trajectories=0,  # it could not yet write any that parse
        hinted=0,
        steps=150,
        batch_tokens=12 * 320,
        sequence_tokens=320,
        microbatch_rows=12,
        compute_dtype="float32",
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=10, schedule="cosine"),
        checkpoints=Checkpoints(every=1000),
        remat="none",
    )
