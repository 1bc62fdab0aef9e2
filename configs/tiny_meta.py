"""The meta RM of the tiny task: it learns which judgments of `tiny_rft.py`'s model are right.

    python -m grm_jax.main sample --items.files runs/tiny/data/train.jsonl --items.limit 3000 --model runs/tiny/rft/model \
        --template configs/tiny_template.txt --max-new-tokens 72 --slots 256 --output runs/tiny/judged.jsonl
    python -m grm_jax.main meta_rm --config configs/tiny_meta.py

Three judgments of each item, as in the paper (section 4.2). `python configs/tiny_votes.py runs/tiny` holds its votes
against plain ones.
"""

from pathlib import Path

from grm_jax.recipes import Checkpoints, MetaConfig, Optimizer


def config() -> MetaConfig:
    return MetaConfig(
        output="runs/tiny/meta",
        model="runs/tiny/rft/model",
        samples=("runs/tiny/judged.jsonl",),
        held_out=300,
        template=str(Path(__file__).parent / "tiny_text.txt"),
        max_tokens=512,
        batch=32,
        microbatch=32,
        steps=120,
        compute_dtype="float32",
        optimizer=Optimizer(learning_rate=5e-4, warmup_steps=10, schedule="cosine"),
        checkpoints=Checkpoints(every=1000),
        remat="none",
    )
