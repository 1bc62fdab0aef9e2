"""Stage 2 for Gemma-2 27B with the paper's numbers: GRPO from the model that `gemma2_27b_rft.py` makes.

    python -m grm_jax.main sample --items.files gs://MINE/data/preferences.jsonl.gz --items.n-choices 2 3 4 \\
        --model gs://MINE/models/a-chat-model --votes 3 --output gs://MINE/samples/chat.jsonl
    python -m grm_jax.main rl --config configs/gemma2_27b_rl.py --output gs://MINE/rl ...

The first command finds the items that are too easy; the paper took DeepSeek-V2-Lite-Chat for it. Put your own paths
where YOUR_BUCKET stands. To expect, by the paper: 69.9 overall on its four benchmarks, greedy, and 71.0 with 32 votes;
15.6 hours on 128 A100.

For 64 v5p chips; see what it takes before, without one: `python -m grm_jax.main plan --config configs/gemma2_27b_rl.py
--topology v5p:4x4x4 --numbers gemma-2-27b` (docs/LOG.md has what it said). configs/smollm2_135m_rl.py takes the same path
on a laptop.

Sections and appendices are those of arXiv 2504.02495; "not given" means that it does not say, and the choice is ours.
"""

from grm_jax.config import MeshSizes
from grm_jax.recipes import Checkpoints, Items, Optimizer, RlConfig


def config() -> RlConfig:
    return RlConfig(
        output="gs://YOUR_BUCKET/runs/gemma2_27b_rl",
        model="gs://YOUR_BUCKET/runs/gemma2_27b_rft/model",  # section 3.2: RL follows the cold start; also the reference
        items=Items(
            files=("gs://YOUR_BUCKET/data/preferences.jsonl.gz",),  # appendix C.1: 237K items
            n_choices=(2, 3, 4),  # as in stage 1
            held_out=1000,  # as in stage 1, and by the same seed the same examples
        ),
        samples="gs://YOUR_BUCKET/samples/chat.jsonl",  # section 3.2: right 3 of 3 times is too easy
        template="listwise",
        # Appendix C.1: batch 512. Whether of prompts or of rollouts is not given; here it is rollouts, 128 x 4: the
        # smaller reading, four times as many updates for the same sampling.
        prompts_per_step=128,
        group=4,  # G, appendix C.1
        max_prompt_tokens=4096,  # not given; half of Gemma-2's context
        max_new_tokens=1024,  # not given; typical judgments have 220 to 380 tokens
        temperature=1.0,  # not given; then what is sampled from is what is trained
        objective="grpo",  # section 3.2
        clip_low=0.2,  # not given; PPO's
        clip_high=0.2,  # not given; as clip_low
        kl_coef=0.08,  # appendix C.1: best of 0, 0.01, 0.02, 0.08 for the 27B; a small one lets some domains collapse
        updates_per_step=1,  # not given
        microbatch_prompts=64,  # ours: a multiple of the devices
        steps=900,  # appendix C.1; 115,200 prompts, half an epoch
        mesh=MeshSizes(data=1, fsdp=-1, tensor=4),  # ours: weights over all devices; four of them share a decoding copy
        compute_dtype="bfloat16",
        optimizer=Optimizer(
            learning_rate=4e-7,  # appendix C.1
            warmup_steps=10,  # not given
            schedule="constant",  # not given
            b1=0.9,  # not given, nor is the optimizer: AdamW, as is common
            b2=0.95,  # not given
            eps=1e-8,
            weight_decay=0.0,  # not given; the KL keeps the weights near already
            clip_norm=1.0,  # not given
        ),
        remat="block",
        checkpoints=Checkpoints(every=50, keep_last=2, keep_every=300),
        eval_every=100,
    )
