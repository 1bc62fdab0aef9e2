"""Stage 2 for DeepSeek-V2-Lite, the paper's 16B: GRPO from the model that stage 1 makes of it.

    python -m grm_jax.main rl --config configs/deepseek_v2_lite_rl.py --output gs://MINE/rl ...

Stage 1 is `gemma2_27b_rft.py` with `--model`, `--output`, `--mesh.tensor 1` and `--mesh.expert 4` of your own. Put your own
paths where YOUR_BUCKET stands. To expect, by the paper: what it gives of its 16B, such as 64.9 ROC-AUC (percent) on
ReaLMistake and 62.3 and 57.0 on RMB's best-of-N.

For 16 v5p chips; see what it takes before, without one: `python -m grm_jax.main plan --config
configs/deepseek_v2_lite_rl.py --topology v5p:2x2x4 --numbers deepseek-v2-lite` (docs/LOG.md has what it said). On 32 v5e
chips it fits with `--mesh.fsdp 2 --mesh.tensor 4 --mesh.expert 4 --microbatch-prompts 8 --max-prompt-tokens 1024
--optimizer.state-dtype bfloat16`.

Sections and appendices are those of arXiv 2504.02495; "not given" means that it does not say, and the choice is ours.
"""

from grm_jax.config import MeshSizes
from grm_jax.recipes import Checkpoints, Items, Optimizer, RlConfig


def config() -> RlConfig:
    return RlConfig(
        output="gs://YOUR_BUCKET/runs/deepseek_v2_lite_rl",
        model="gs://YOUR_BUCKET/runs/deepseek_v2_lite_rft/model",  # section 3.2: the cold start, and the reference
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
        max_prompt_tokens=2048,  # not given; half of the 27B's, for memory
        max_new_tokens=512,  # not given; judgments have 220 to 380 tokens in the paper
        temperature=1.0,  # not given; then what is sampled from is what is trained
        objective="grpo",  # section 3.2
        clip_low=0.2,  # not given; PPO's
        clip_high=0.2,  # not given; as clip_low
        kl_coef=0.002,  # appendix C.1, for the 16B
        updates_per_step=1,  # not given
        microbatch_prompts=32,  # ours: a multiple of the devices
        steps=900,  # appendix C.1; 115,200 prompts, half an epoch
        mesh=MeshSizes(data=1, fsdp=-1, expert=4),  # ours: weights over all devices; four of them share the experts
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
