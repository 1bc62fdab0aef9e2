"""Stage 1 for Gemma-2 27B with the paper's numbers: rejective fine-tuning of the base model.

    python -m grm_jax.main rft --config configs/gemma2_27b_rft.py --output gs://MINE/rft ...

Put your own paths where YOUR_BUCKET stands, here or on the command line. To expect, by the paper: 68.8 overall on its
four benchmarks, greedy, after this stage alone; 19.2 hours on 128 A100.

For 64 v5p chips; see what it takes before, without one: `python -m grm_jax.main plan --config configs/gemma2_27b_rft.py
--topology v5p:4x4x4 --numbers gemma-2-27b` (not compiled yet, unlike stage 2).
configs/smollm2_135m_rft.py takes the same path on a laptop.

Sections and appendices are those of arXiv 2504.02495; "not given" means that it does not say, and the choice is ours.
"""

from grm_jax.config import MeshSizes
from grm_jax.recipes import Checkpoints, Items, Optimizer, RftConfig


def config() -> RftConfig:
    return RftConfig(
        output="gs://YOUR_BUCKET/runs/gemma2_27b_rft",
        model="gs://YOUR_BUCKET/models/gemma-2-27b",  # the base, not -it: stage 1 starts from a base model
        items=Items(
            files=("gs://YOUR_BUCKET/data/preferences.jsonl.gz",),
            n_choices=(2, 3, 4),  # not given for lists; pairs are most of public data, longer lists teach comparing
            held_out=1000,  # not given; a 95 % interval of about 3 points to either side
        ),
        template="listwise",
        sample_template="listwise_demos",  # not given; a base model has to see the format before it can follow it
        trajectories=3,  # N_RFT, section 3.1 and appendix C.1
        hinted=1,  # section 3.1: sampled once with a hint
        temperature=1.0,  # not given; trajectories of an item should differ
        max_new_tokens=1024,  # not given; judgments have 220 to 380 tokens after RL, demonstrations make no long ones
        slots=256,  # ours: memory for caches decides
        general=("gs://YOUR_BUCKET/data/instructions.jsonl.gz",),
        general_share=1070 / 1256,  # appendix C.1: 1070K general and 186K rejective sequences
        steps=900,  # appendix C.1; 921,600 sequences, 0.73 of the 1256K
        # Appendix C.1: 1,024 sequences a batch. Ours are packed and counted in tokens; at a mean of 1,024 tokens (not
        # given: a judging prompt of about 1,500, instructions below) that is 1,024 x 1,024, in 256 rows of 4,096.
        batch_tokens=1024 * 1024,
        sequence_tokens=4096,  # not given; half of Gemma-2's context
        microbatch_rows=64,  # ours: a multiple of the devices
        mesh=MeshSizes(data=1, fsdp=-1, tensor=4),  # ours: weights over all devices; four of them share a decoding copy
        compute_dtype="bfloat16",
        optimizer=Optimizer(
            learning_rate=5e-6,  # appendix C.1
            warmup_steps=30,  # not given; short, as the rate is small
            schedule="constant",  # not given; RL goes on from here
            b1=0.9,  # not given, nor is the optimizer: AdamW, as is common
            b2=0.95,  # not given; common at large batches
            eps=1e-8,
            weight_decay=0.0,  # not given; 0.1 would take 0.045 % of a weight in 900 steps of 5e-6
            clip_norm=1.0,  # not given
        ),
        remat="block",
        checkpoints=Checkpoints(every=100, keep_last=2, keep_every=300),
        eval_every=300,
    )
