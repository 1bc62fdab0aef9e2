"""Before stage 1 on a laptop: the embedded model, SmolLM2-135M-Instruct, learns the format of a judgment.

    python configs/critiques.py runs/smollm2_135m/critiques.jsonl FILE ...
    python -m grm_jax.main rft --config configs/smollm2_135m_base.py

Untuned, it hardly ever writes scores that parse, and stage 1 has nothing to keep. A few hundred judgments made of written
critiques are enough for the format, and no more than that: what is right, stages 1 and 2 find out.
"""

from grm_jax.recipes import Checkpoints, Optimizer, RftConfig


def config() -> RftConfig:
    return RftConfig(
        output="runs/smollm2_135m/base",
        general=("runs/smollm2_135m/critiques.jsonl",),
        general_share=1.0,
        trajectories=0,
        hinted=0,
        steps=30,  # of 4 rows with a judgment each
        batch_tokens=4 * 768,
        sequence_tokens=768,  # longer ones are dropped and counted
        microbatch_rows=1,  # a row at once, for memory
        compute_dtype="float32",  # CPUs without bfloat16 arithmetic are slower with it
        optimizer=Optimizer(learning_rate=5e-5, warmup_steps=5, schedule="cosine"),
        remat="dots",  # on two cores matrix products are what takes time
        checkpoints=Checkpoints(every=15, keep_last=1),  # 1.6 GB each
    )
