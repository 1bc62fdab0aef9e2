"""The critic of `tiny_cloud.py`: the base model that `tiny_base.py` makes learns to write critiques of one response.

python -m grm_jax.main rft --config configs/tiny_critic.py
"""

from grm_jax.recipes import Checkpoints, Optimizer, RftConfig


def config() -> RftConfig:
    return RftConfig(
        output="runs/tiny/critic",
        model="runs/tiny/base/model",
        general=("runs/tiny/data/critic.jsonl",),
        general_share=1.0,
        trajectories=0,
        hinted=0,
        steps=100,
        batch_tokens=12 * 320,
        sequence_tokens=320,
        microbatch_rows=12,
        compute_dtype="float32",
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=10, schedule="cosine"),
        checkpoints=Checkpoints(every=1000),
        remat="none",
    )
