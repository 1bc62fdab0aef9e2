"""Stage 2 on a laptop: GRPO from the model that `smollm2_135m_rft.py` makes, on data of your own.

    python -m grm_jax.main rl --config configs/smollm2_135m_rl.py

The files are those of stage 1: labelled rows as the README describes them. 4 prompts x 4 rollouts of at most 160 tokens a
step, on two cores and in 9 GB of memory. To expect: `reward` and `accuracy` of `metrics.jsonl` are noisy, 16 judgments a
step; compare `held_out.jsonl` before and after, and both with `longer`, which picks the longer response.
"""

from grm_jax.recipes import Checkpoints, Items, Optimizer, RlConfig

NAMES = ("gsm8k", "mmlu_pro", "ukp_convincing", "crux", "hh_harmless", "wmt_ted_mqm", "halueval")


def config() -> RlConfig:
    return RlConfig(
        output="runs/smollm2_135m_rl",
        model="runs/smollm2_135m_rft/model",
        items=Items(
            files=tuple(f"data/train/{name}.jsonl.gz" for name in NAMES),
            n_choices=(2,),  # pairs: two responses are what fits into 768 tokens
            held_out=100,  # by the same seed those of stage 1
        ),
        template="listwise_short",  # as in stage 1
        prompts_per_step=4,  # 16 rollouts a step, a 32nd of the paper's 512
        group=4,  # G of the paper
        max_prompt_tokens=768,  # longer ones lose the middle of their longest response: see cut_prompts
        max_new_tokens=160,  # as in stage 1
        temperature=1.0,
        kl_coef=0.002,  # the paper's for its smaller model, the 16B (appendix C.1)
        microbatch_prompts=1,  # one prompt and its 4 rollouts at once, for memory
        steps=200,
        compute_dtype="float32",  # CPUs without bfloat16 arithmetic are slower with it
        optimizer=Optimizer(
            learning_rate=2e-6,  # five times the paper's 4e-7: a smaller model, and fewer steps
            warmup_steps=10,
        ),
        remat="block",
        checkpoints=Checkpoints(every=25, keep_last=1),  # 1.6 GB each
        log_samples_every=10,  # look at what it writes
    )
