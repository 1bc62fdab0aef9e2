"""Stage 1 on the tiny task: rejective fine-tuning of the base model that `tiny_base.py` makes.

    python -m grm_jax.main rft --config configs/tiny_rft.py

300 items are judged three times each and once with a hint, what is right is kept, and the model is fine-tuned on that and
on general instructions: it judges better than its base then, and below 80 %.
"""

from pathlib import Path

from grm_jax.recipes import Checkpoints, Items, Optimizer, RftConfig


def config() -> RftConfig:
    return RftConfig(
        output="runs/tiny/rft",
        model="runs/tiny/base/model",
        items=Items(files=("runs/tiny/data/train.jsonl",), limit=300, held_out=1000),
        template=str(Path(__file__).parent / "tiny_template.txt"),
        trajectories=3,  # N_RFT, section 3.1
        hinted=1,
        temperature=1.0,
        max_new_tokens=72,
        slots=256,
        general=("runs/tiny/data/general.jsonl",),
        general_share=0.3,
        steps=10,
        batch_tokens=12 * 320,
        sequence_tokens=320,
        microbatch_rows=12,
        compute_dtype="float32",
        optimizer=Optimizer(learning_rate=1e-4, warmup_steps=5, schedule="cosine"),
        checkpoints=Checkpoints(every=1000),
        remat="none",
    )
