r"""Baseline on the tiny task: one reward a response, from the base model that `tiny_base.py` makes.

python -m grm_jax.main bradley_terry --config configs/tiny_bradley_terry.py
python -m grm_jax.main score --input runs/tiny/data/test.jsonl --baseline bradley_terry \
        --model runs/tiny/bradley_terry/model
"""

from grm_jax.recipes import Checkpoints, Items, Optimizer, PairsConfig


def config() -> PairsConfig:
    return PairsConfig(
        output="runs/tiny/bradley_terry",
        model="runs/tiny/base/model",
        items=Items(files=("runs/tiny/data/train.jsonl",), held_out=1000),
        batch=32,
        microbatch=32,
        max_tokens=512,
        steps=200,
        compute_dtype="float32",
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=10, schedule="cosine"),
        checkpoints=Checkpoints(every=1000),
        remat="none",
    )
