"""Stage 1 on a laptop: rejective fine-tuning of the embedded model, SmolLM2-135M-Instruct, on data of your own.

    python -m grm_jax.main rft --config configs/smollm2_135m_rft.py

The files below are yours to supply, or to replace: labelled rows as the README describes them, one JSON object a line:
{"messages": [...], "responses": ["...", "..."], "scores": [1, 0]}. Lists of many answers (gsm8k, mmlu_pro, crux), pairs
(ukp_convincing, hh_harmless), graded lists (wmt_ted_mqm) and single responses labelled 0 or 1 (halueval) all do.

It runs on two cores, for hours; 1,600 sampled judgments come first, and an interrupted run keeps them. What it is for: the
three parts without demonstrations, so compare `failures` in `held_out.jsonl` before and after. No accuracy to expect.
"""

from grm_jax.recipes import Checkpoints, Items, Optimizer, RftConfig

NAMES = ("gsm8k", "mmlu_pro", "ukp_convincing", "crux", "hh_harmless", "wmt_ted_mqm", "halueval")


def config() -> RftConfig:
    return RftConfig(
        output="runs/smollm2_135m_rft",
        model="smollm2-135m",
        items=Items(
            files=tuple(f"data/train/{name}.jsonl.gz" for name in NAMES),
            n_choices=(2,),  # pairs: two responses are what fits into 1,024 tokens
            held_out=100,  # few, for time: a 95 % interval of 10 points to either side
            limit=400,  # items that are judged, 3 + 1 times each; most judgments do not parse, so more items help
        ),
        template="listwise_short",  # 250 tokens of a row instead of the 700 of listwise
        sample_template="listwise_demos",  # a model that was never tuned to judge follows worked demonstrations
        trajectories=3,  # N_RFT, arXiv 2504.02495, section 3.1
        hinted=1,  # the same
        temperature=0.5,  # below RL's 1.0: the embedded model leaves the format less often
        max_new_tokens=160,  # the demonstrations' judgments have about 60
        slots=16,  # samples decoded at once: few, for memory
        # The embedded model has been through instructions. The paper starts from a base, and general data matter most
        # there (69.9 with, 63.3 without): for a base model name a file of chats, and a share of 0.5 or more.
        general=(),
        general_share=0.0,
        steps=100,  # a row holds a text or two: 400 to 800 texts in all
        batch_tokens=4 * 1024,
        sequence_tokens=1024,  # a prompt of listwise_short and its judgment; longer ones are dropped and counted
        microbatch_rows=1,  # a row at once, for memory
        compute_dtype="float32",  # CPUs without bfloat16 arithmetic are slower with it
        optimizer=Optimizer(
            learning_rate=1e-5,  # twice the paper's 5e-6: a smaller model, and fewer steps
            warmup_steps=10,  # a tenth of the steps
            schedule="cosine",  # to 0: the last steps average the small batches' noise out
        ),
        remat="block",
        checkpoints=Checkpoints(every=20, keep_last=1),  # 1.6 GB each
    )
