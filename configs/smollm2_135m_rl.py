"""Stage 2 on a laptop: GRPO from the model that `smollm2_135m_rft.py` makes, on data of your own.

    python -m grm_jax.main rl --config configs/smollm2_135m_rl.py

The files are those of stage 1: labelled rows as the README describes them. 8 prompts x 4 rollouts of at most 128 tokens a
step, on two cores. `reward` and `accuracy` of `metrics.jsonl` are noisy, 32 judgments a step; compare `held_out.jsonl`
before and after, and both with `longer`, which picks the longer response. docs/LOG.md has what came of 15 steps: 26
minutes on two cores without the held-out examples, and 18 GB of memory.
"""

from grm_jax.recipes import Checkpoints, Items, Optimizer, RlConfig

NAMES = ("ukp_convincing", "hh_harmless", "gsm8k", "wmt_ted_mqm")


def config() -> RlConfig:
    return RlConfig(
        output="runs/smollm2_135m/rl",
        model="runs/smollm2_135m/rft/model",
        items=Items(
            files=tuple(f"data/train/{name}.jsonl.gz" for name in NAMES),
            per_file=1000,
            n_choices=(2,),  # pairs: two responses are what fits into 768 tokens
            held_out=500,  # by the same seed those of stage 1
        ),
        template="listwise_short",  # as in stage 1
        prompts_per_step=8,  # 32 rollouts a step, a 16th of the paper's 512
        group=4,  # G of the paper
        max_prompt_tokens=768,  # longer ones lose the middle of their longest response: see cut_prompts
        max_new_tokens=128,  # as in stage 1
        temperature=1.0,
        kl_coef=0.0,  # the smallest of the paper's grid: the reference's pass is a fifth of a step here
        microbatch_prompts=4,  # four prompts and their 16 rollouts at once, for memory
        steps=40,
        compute_dtype="float32",  # CPUs without bfloat16 arithmetic are slower with it
        optimizer=Optimizer(
            learning_rate=2e-5,  # 50 times the paper's 4e-7: a smaller model, and a 22nd of the steps
            warmup_steps=3,
        ),
        remat="dots",  # on two cores matrix products are what takes time
        checkpoints=Checkpoints(every=20, keep_last=1),  # 1.6 GB each
        slots=64,  # held-out examples decoded at once
        log_samples_every=10,  # look at what it writes
    )
