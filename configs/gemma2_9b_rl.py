"""Stage 2 for Gemma-2 9B: `gemma2_27b_rl.py` for a smaller model, which the paper has not trained.

    python -m grm_jax.main rl --config configs/gemma2_9b_rl.py --output gs://MINE/rl ...

Put your own paths where YOUR_BUCKET stands; `model` is what stage 1 has made of the 9B (`gemma2_27b_rft.py` with
`--model` and `--output` of your own). No number to expect: the paper has none for this size.

All weights are trained, at least 20 bytes each (float32 masters, gradients and two moments, bfloat16 copies of the
policy and of its reference), 185 GB for 9.2 billion, before activations, split over all devices: 32 v6e chips have
1,024 GB. `plan --config configs/gemma2_9b_rl.py --topology v6e:4x8 --numbers gemma-2-9b` says what it takes. For fewer,
`--lora.rank 16 --optimizer.learning-rate 1e-5` trains adapters beside a bfloat16 base, which is the reference too.

Sections and appendices are those of arXiv 2504.02495; what is marked as ours is not in it.
"""

from grm_jax.config import MeshSizes
from grm_jax.recipes import Checkpoints, Items, Optimizer, RlConfig


def config() -> RlConfig:
    return RlConfig(
        output="gs://YOUR_BUCKET/runs/gemma2_9b_rl",
        model="gs://YOUR_BUCKET/runs/gemma2_9b_rft/model",
        items=Items(
            files=("gs://YOUR_BUCKET/data/preferences.jsonl.gz",),
            n_choices=(2, 3, 4),  # ours, as for the 27B
            held_out=1000,  # ours: a 95 % interval of about 3 points to either side
        ),
        samples="gs://YOUR_BUCKET/samples/chat.jsonl",  # section 3.2: right 3 of 3 times is too easy
        template="listwise",
        prompts_per_step=128,  # appendix C.1: batch 512, read as rollouts: 128 x 4
        group=4,  # G, appendix C.1
        max_prompt_tokens=2048,  # ours: half of the 27B's, for memory
        max_new_tokens=512,  # ours: half of the 27B's; judgments have 220 to 380 tokens in the paper
        temperature=1.0,  # ours
        kl_coef=0.08,  # appendix C.1 has 0.08 for a Gemma-2 and 0.002 for a mixture of experts: ours is the Gemma-2's
        microbatch_prompts=8,  # ours: few, for memory; a multiple of the devices
        steps=900,  # appendix C.1
        mesh=MeshSizes(data=1, fsdp=-1, tensor=4),  # ours: weights over all devices; four of them share a decoding copy
        compute_dtype="bfloat16",
        optimizer=Optimizer(
            learning_rate=4e-7,  # appendix C.1, there for 27B and 16B
            warmup_steps=10,  # ours
            schedule="constant",  # ours
            b1=0.9,  # ours
            b2=0.95,  # ours
            eps=1e-8,
            weight_decay=0.0,  # ours
            clip_norm=1.0,  # ours
        ),
        remat="block",
        checkpoints=Checkpoints(every=50, keep_last=2, keep_every=300),
        eval_every=100,
    )
