"""TRL's `GRPOTrainer` on CPU, with transformers' own `generate` for the rollouts (no vLLM).

1. Prompts are ids: a tokenizer of one word an id turns them to text and back. Its end and padding ids stand behind the
   model's vocabulary, so no rollout ends early; all prompts have one length, so nothing is padded.
2. The loss is GRPO's with the k3 KL; rows of a microbatch are `per_device_train_batch_size`, the rest is accumulated.
3. Gradient checkpointing is its default: on, whole layers. Its log-probabilities go through the head in chunks.

Its generation reads each prompt once a rollout. A step ends at `on_step_end`, behind the optimizer.
"""

from __future__ import annotations

import tempfile
import time

import rl_job
import tokenizers
import torch
import transformers
import trl
from datasets import Dataset


class Stamps(transformers.TrainerCallback):
    """The clock at the start of training and behind each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.seconds.append(time.perf_counter())

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seconds.append(time.perf_counter())


def word_tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """Word "i" is id i; two ids behind the vocabulary, which the model cannot sample, end and pad."""
    words = {str(at): at for at in range(vocabulary)} | {"<end>": vocabulary, "<pad>": vocabulary + 1}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<pad>", padding_side="left"
    )


def settings(job: rl_job.RlJob, output: str) -> trl.GRPOConfig:
    """The job in TRL's words."""
    rows, at_once = len(job.prompts) * job.group, job.microbatch_prompts * job.group
    return trl.GRPOConfig(
        output_dir=output,
        use_cpu=True,
        bf16=False,  # float32 everywhere
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=rows // at_once,
        generation_batch_size=rows,
        num_generations=job.group,
        max_completion_length=job.new_tokens,
        temperature=rl_job.TEMPERATURE,
        top_p=1.0,
        top_k=0,
        loss_type="grpo",
        beta=rl_job.KL_COEF,
        use_bias_correction_kl=False,  # the plain k3 estimate
        epsilon=rl_job.CLIP_RATIO,
        learning_rate=rl_job.LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=rl_job.B1,
        adam_beta2=rl_job.B2,
        adam_epsilon=rl_job.EPS,
        weight_decay=rl_job.WEIGHT_DECAY,
        max_grad_norm=rl_job.CLIP_NORM,
        max_steps=job.all_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
    )


def main() -> None:
    job = rl_job.read_job(__doc__)
    torch.set_num_threads(rl_job.threads())
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # the tokenizer's alone ends a rollout: never
    stamps = Stamps()

    def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
        return rl_job.rewards(job, [len(ids) for ids in completion_ids])

    with tempfile.TemporaryDirectory() as output:
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=settings(job, output),
            train_dataset=Dataset.from_dict({"prompt": [" ".join(map(str, ids)) for ids in job.prompts]}),
            processing_class=word_tokenizer(model.config.vocab_size),
            callbacks=[stamps],
        )
        trainer.train()
    check(trainer, job)
    versions = f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    kept = "gradient checkpointing of whole layers" if trainer.args.gradient_checkpointing else "no checkpointing"
    rl_job.report("trl", job, stamps.seconds, f"{versions}; {trainer.args.optim.value}; {kept}; prompt read G times")


def check(trainer: trl.GRPOTrainer, job: rl_job.RlJob) -> None:
    """Raise ValueError unless the run was the job: float32, a reference beside the policy, all weights moved by it."""
    before, after = trainer.ref_model.state_dict(), trainer.model.state_dict()
    types = {str(value.dtype) for value in (*before.values(), *after.values())}
    still = [name for name in after if torch.equal(before[name], after[name])]
    if types != {"torch.float32"} or still:
        raise ValueError(f"trl's weights are {sorted(types)}, {len(still)} of {len(after)} did not move: {still[:3]}")


if __name__ == "__main__":
    main()
