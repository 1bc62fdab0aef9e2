"""Baseline on the tiny task: a value head that reads the critiques that `tiny_critic.py`'s model writes.

    python -m grm_jax.main cloud --config configs/tiny_cloud.py
    python -m grm_jax.main score --input runs/tiny/data/test.jsonl --baseline cloud --model runs/tiny/cloud/model \
        --critic runs/tiny/critic/model --votes 4 --max-new-tokens 48
"""

from pathlib import Path

from grm_jax.recipes import Checkpoints, CloudConfig, Items, Optimizer


def config() -> CloudConfig:
    return CloudConfig(
        output="runs/tiny/cloud",
        model="runs/tiny/base/model",
        critic="runs/tiny/critic/model",
        items=Items(files=("runs/tiny/data/train.jsonl",), held_out=500, limit=2000),
        template=str(Path(__file__).parent / "tiny_text.txt"),
        critiques=1,
        max_new_tokens=48,
        slots=256,
        batch=32,
        microbatch=32,
        max_tokens=512,
        steps=200,
        compute_dtype="float32",
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=10, schedule="cosine"),
        checkpoints=Checkpoints(every=1000),
        remat="none",
    )
