"""Baseline on the tiny task: one scalar for a pair of responses, from the base model that `tiny_base.py` makes.

python -m grm_jax.main pair_rm --config configs/tiny_pair_rm.py
python -m grm_jax.main score --input runs/tiny/data/test.jsonl --baseline pair_rm --model runs/tiny/pair_rm/model
"""

from pathlib import Path

from grm_jax.recipes import Checkpoints, Items, Optimizer, PairsConfig


def config() -> PairsConfig:
    return PairsConfig(
        output="runs/tiny/pair_rm",
        model="runs/tiny/base/model",
        items=Items(files=("runs/tiny/data/train.jsonl",), held_out=1000),
        template=str(Path(__file__).parent / "tiny_text.txt"),
        batch=32,
        microbatch=32,
        max_tokens=512,
        steps=300,
        compute_dtype="float32",
        optimizer=Optimizer(learning_rate=3e-4, warmup_steps=10, schedule="cosine"),
        checkpoints=Checkpoints(every=1000),
        remat="none",
    )
