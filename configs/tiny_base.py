"""A base model for the tiny runs: it writes judgments in the right format, and somewhat more than half of them are right.

    python configs/tiny_task.py runs/tiny/data
    python -m grm_jax.main rft --config configs/tiny_base.py

A random two-layer decoder over bytes is trained on the judgments of a poor judge (`base.jsonl`) and on instructions: what
a released base model brings to stage 1.
"""

from grm_jax.recipes import Checkpoints, Fresh, Optimizer, RftConfig


def config() -> RftConfig:
    return RftConfig(
        output="runs/tiny/base",
        model="fresh",
        fresh=Fresh(dim=128, layers=2, heads=4, mlp_dim=256, max_positions=1024),
        general=("runs/tiny/data/base.jsonl", "runs/tiny/data/general.jsonl"),
        general_share=1.0,
        trajectories=0,
        hinted=0,
        steps=800,
        batch_tokens=12 * 320,
        sequence_tokens=320,
        microbatch_rows=12,
        compute_dtype="float32",
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=20, schedule="cosine"),
        checkpoints=Checkpoints(every=1000),
        remat="none",
    )
