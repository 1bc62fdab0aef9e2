"""Stage 1 on a laptop: rejective fine-tuning of the model that `smollm2_135m_base.py` makes, on data of your own.

    python -m grm_jax.main rft --config configs/smollm2_135m_rft.py

The files below are yours to supply, or to replace: labelled rows as the README describes them, one JSON object a line:
{"messages": [...], "responses": ["...", "..."], "scores": [1, 0]}. Lists of many answers (gsm8k), pairs (ukp_convincing,
hh_harmless) and graded lists (wmt_ted_mqm) all do.

It runs on two cores, in about 75 minutes: 800 sampled judgments come first, an interrupted run keeps them, and the held-out
examples are judged before and after. docs/LOG.md has what came out: chance, 49 and 50 % of 500 held-out pairs.
"""

from grm_jax.recipes import Checkpoints, Items, Optimizer, RftConfig

NAMES = ("ukp_convincing", "hh_harmless", "gsm8k", "wmt_ted_mqm")  # the sets whose pairs are short


def config() -> RftConfig:
    return RftConfig(
        output="runs/smollm2_135m/rft",
        model="runs/smollm2_135m/base/model",
        items=Items(
            files=tuple(f"data/train/{name}.jsonl.gz" for name in NAMES),
            per_file=1000,  # a quarter each: ukp_convincing alone has ten times the others' examples
            n_choices=(2,),  # pairs: two responses are what fits into 768 tokens
            held_out=500,  # a 95 % interval of 4.4 points to either side
            limit=200,  # items that are judged, 3 + 1 times each
        ),
        template="listwise_short",  # 250 tokens of a row instead of the 700 of listwise
        trajectories=3,  # N_RFT, arXiv 2504.02495, section 3.1
        hinted=1,  # the same
        temperature=0.7,  # below RL's 1.0: more judgments parse, and those that are kept differ enough
        max_new_tokens=128,  # the judgments that the base has seen have about 90
        slots=64,  # samples decoded at once
        # The embedded model has been through instructions. The paper starts from a base, and general data matter most
        # there (69.9 with, 63.3 without): for a base model name a file of chats, and a share of 0.5 or more.
        general=(),
        general_share=0.0,
        steps=30,  # about once through what is kept
        batch_tokens=4 * 768,
        sequence_tokens=768,  # a prompt of listwise_short and its judgment; longer ones are dropped and counted
        microbatch_rows=1,  # a row at once, for memory
        compute_dtype="float32",  # CPUs without bfloat16 arithmetic are slower with it
        optimizer=Optimizer(
            learning_rate=2e-5,  # four times the paper's 5e-6: a smaller model, and fewer steps
            warmup_steps=3,  # a tenth of the steps
            schedule="cosine",  # to 0: the last steps average the small batches' noise out
        ),
        remat="dots",  # on two cores matrix products are what takes time
        checkpoints=Checkpoints(every=15, keep_last=1),  # 1.6 GB each
    )
