"""The recipe of each command: what a user sets, with its unit or source."""

from __future__ import annotations

import dataclasses
from typing import Literal

from grm_jax.config import Dtype, Kernels, MeshSizes, check_sampling
from grm_jax.recipes.parts import Checkpoints, Fresh, Items, Lora, Optimizer, at_least, check_seed, given

Objective = Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo"]


@dataclasses.dataclass(frozen=True)
class _Training:
    """What every training run has."""

    output: str = "run"
    """the run's folder, local or gs://: checkpoints, metrics, the trained model"""
    model: str = "smollm2-135m"
    """an embedded model's name, a Hugging Face folder, a .gguf file, or "fresh": a random one of the numbers below"""
    fresh: Fresh = Fresh()
    seed: int = 0
    steps: int = 100
    """optimizer steps"""
    template: str | None = None
    """of the prompts that are trained on; by default listwise, and single_binary or single for one response"""
    compute_dtype: Dtype | None = None
    """of the copy of the weights that works, by default float32 on CPU, else bfloat16; master weights are float32"""
    optimizer: Optimizer = Optimizer()
    remat: Literal["none", "block", "dots"] = "block"
    """what the backward pass computes again: nothing, whole blocks, or all but the blocks' matrix products"""
    checkpoints: Checkpoints = Checkpoints()
    devices: int | None = None
    """devices of the mesh; by default one on CPU, or as many as the mesh names, and all elsewhere"""
    mesh: MeshSizes = MeshSizes()
    kernels: Kernels = "auto"
    """of attention over many tokens: the device's own, "plain" XLA, "splash" on a TPU or "cudnn" on a GPU"""
    eval_every: int = 0
    """steps between two measurements on the held-out examples; 0 measures at the start and the end alone"""
    profile: tuple[int, ...] = ()
    """steps to trace, into the run's folder"""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", *given(self, "devices"))
        at_least(self, 0, "eval_every")
        check_seed(self.seed)


@dataclasses.dataclass(frozen=True)
class _Run(_Training):
    """What a run that trains a judge has besides."""

    items: Items = Items()
    lora: Lora = Lora()
    log_samples_every: int = 50
    """steps between two looks at full judgments; 0 is never"""
    votes: int = 1
    """judgments of each held-out example when it is measured"""
    slots: int = 64
    """samples decoded at once, but for the rollouts of RL"""
    eval_temperature: float = 0.5
    """of those judgments: the paper votes at 0.5 (section 5)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "votes", "slots")
        at_least(self, 0, "log_samples_every")
        check_sampling(self.eval_temperature, 0, 1.0, 0.0)


@dataclasses.dataclass(frozen=True)
class RftConfig(_Run):
    """Stage 1, rejective fine-tuning: sample judgments, keep right ones, train on them and on general instructions."""

    trajectories: int = 3
    """N_RFT: judgments sampled of each item without a hint (section 3.1)"""
    hinted: int = 1
    """judgments sampled with a hint; 0 for none (section 3.1, optional)"""
    sample_template: str | None = None
    """of the prompts that are sampled from; by default that of the training. A base model needs demonstrations"""
    temperature: float = 1.0
    max_new_tokens: int = 512
    """of a sampled judgment"""
    general: tuple[str, ...] = ()
    """JSON Lines of general instruction data: conversations that end in the assistant's turn"""
    general_share: float = 0.85
    """of the training sequences that are general instructions: 1070K of 1256K in the paper (appendix C.1)"""
    batch_tokens: int = 8192
    """tokens of a batch, packed"""
    sequence_tokens: int = 2048
    """tokens of a packed row; longer sequences are dropped and counted"""
    microbatch_rows: int = 1
    """packed rows whose gradients are computed at once"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "trajectories", "hinted")
        at_least(self, 1, "max_new_tokens", "microbatch_rows")
        at_least(self, 2, "sequence_tokens")
        check_sampling(self.temperature, 0, 1.0, 0.0)
        if not 0 <= self.general_share <= 1:
            raise ValueError(f"general_share = {self.general_share}: it has to be 0 to 1")
        if bool(self.general) != (self.general_share > 0):
            raise ValueError(
                f"general has {len(self.general)} files and general_share is {self.general_share}: "
                "name files for a share above 0, or set it to 0"
            )
        if not self.general and not self.items.files:
            raise ValueError("neither items.files nor general names a file: there is nothing to train on")
        if self.items.files and not (self.trajectories or self.hinted):
            raise ValueError(
                "trajectories = 0 and hinted = 0: nothing is sampled from items.files; raise one, or name no items"
            )
        rows, rest = divmod(self.batch_tokens, self.sequence_tokens)
        if rest or rows % self.microbatch_rows or not rows:
            raise ValueError(
                f"batch_tokens = {self.batch_tokens} is {rows} rows of sequence_tokens = {self.sequence_tokens} and "
                f"{rest} tokens: it has to be whole rows, and those a multiple of microbatch_rows = {self.microbatch_rows}"
            )


@dataclasses.dataclass(frozen=True)
class RlConfig(_Run):
    """Stage 2, rule-based online reinforcement learning: GRPO on the correctness of sampled judgments (section 3.2)."""

    prompts_per_step: int = 128
    group: int = 4
    """G: rollouts of each prompt; a step has prompts_per_step x group of them"""
    max_new_tokens: int = 512
    """of a rollout; one that is longer is cut, and counts as unparsable"""
    temperature: float = 1.0
    """of rollouts, and of the log-probabilities that are trained"""
    objective: Objective = "grpo"
    """grpo is the paper's; the others are those of arXiv 2503.20783, 2503.14476, 2507.18071 and 2402.14740"""
    clip_low: float = 0.2
    """the ratio's lower bound is 1 minus this"""
    clip_high: float = 0.2
    """the ratio's upper bound is 1 plus this; DAPO's is larger than clip_low"""
    kl_coef: float = 0.08
    """of the k3 estimate of the KL to the reference: 0.08 for the 27B, 0.002 for the 16B (appendix C.1)"""
    updates_per_step: int = 1
    """optimizer updates on the same rollouts"""
    microbatch_prompts: int = 8
    """prompts whose rollouts' gradients are computed at once"""
    max_prompt_tokens: int = 2048
    """longer prompts are cut in the middle of their longest response, marked and counted"""
    samples: str | None = None
    """rows of `sample` on these items: those that are right every time are too easy, and left out (section 3.2)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "prompts_per_step", "max_new_tokens", "updates_per_step", "microbatch_prompts")
        at_least(self, 2, "group", "max_prompt_tokens")
        at_least(self, 0, "clip_low", "clip_high", "kl_coef")
        check_sampling(self.temperature, 0, 1.0, 0.0)
        if not self.temperature:
            raise ValueError("temperature = 0: greedy rollouts of a prompt are all alike and teach nothing")
        if self.prompts_per_step % self.microbatch_prompts:
            raise ValueError(
                f"prompts_per_step = {self.prompts_per_step} is no multiple of microbatch_prompts = "
                f"{self.microbatch_prompts}: every microbatch has the same size"
            )
        if not self.items.files:
            raise ValueError("items.files names no file: give labelled examples to learn from")


@dataclasses.dataclass(frozen=True)
class ScalarConfig(_Training):
    """What every run has that trains a scalar head: on judgments, on responses or on pairs of them."""

    batch: int = 64
    """judgments, or pairs of responses, of a step; the paper's meta RM has 512 (appendix C.1)"""
    microbatch: int = 8
    """of them, whose gradients are computed at once"""
    max_tokens: int = 2048
    """of a prompt and the text behind it together; longer ones are cut in the middle of their longest response"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch", "microbatch")
        at_least(self, 2, "max_tokens")
        if self.batch % self.microbatch:
            raise ValueError(
                f"batch = {self.batch} is no multiple of microbatch = {self.microbatch}: all microbatches have one size"
            )


@dataclasses.dataclass(frozen=True)
class MetaConfig(ScalarConfig):
    """The meta RM: a scalar head learns from sampled judgments which of them are right (section 4.2)."""

    samples: tuple[str, ...] = ()
    """files of the command `sample`, or of `rft`'s folder (trajectories.jsonl): judgments with their correctness"""
    held_out: int = 0
    """judged examples at least, whole conversations, that are measured on and never trained on"""
    balance: bool = False
    """weigh judgments so that right and wrong ones count the same in all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "held_out")
        if not self.samples:
            raise ValueError("samples names no file: give judgments that the command `sample` has written")


@dataclasses.dataclass(frozen=True)
class PairsConfig(ScalarConfig):
    """A scalar reward model from preferences, as the paper's baselines: each item's best response against the others."""

    items: Items = Items()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.items.files:
            raise ValueError("items.files names no file: give labelled examples to learn from")


@dataclasses.dataclass(frozen=True)
class CloudConfig(PairsConfig):
    """CLoud: a critic writes, and a value head that reads the critique too is trained (arXiv 2408.11791)."""

    critic: str = "smollm2-135m"
    """what writes the critiques, and goes on writing them when the value head scores"""
    critiques: int = 1
    """sampled of each response; the value head sees each of them"""
    temperature: float = 1.0
    max_new_tokens: int = 512
    """of a critique"""
    slots: int = 64
    """critiques decoded at once"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "critiques", "max_new_tokens", "slots")
        check_sampling(self.temperature, 0, 1.0, 0.0)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Judge labelled examples k times and write every judgment with its correctness."""

    items: Items = Items()
    output: str = "samples.jsonl"
    """one row a judgment, local or gs://; an interrupted run goes on there"""
    model: str = "smollm2-135m"
    """an embedded model's name, a Hugging Face folder or a .gguf file"""
    votes: int = 3
    """k: judgments of each item"""
    hinted: bool = False
    """tell the judge which response is the best, and how much better where the data says so"""
    temperature: float = 1.0
    max_new_tokens: int = 512
    template: str | None = None
    seed: int = 0
    slots: int = 64
    """samples decoded at once"""
    orders: int | None = None
    """as of `score`: orders of its responses that an item's judgments share"""
    meta_rm: str | None = None
    """a meta RM's folder: each judgment's row then has its logit"""
    dtype: Dtype | None = None
    devices: int | None = None
    mesh: MeshSizes = MeshSizes()
    kernels: Kernels = "auto"
    overwrite: bool = False
    """start anew where the output exists"""

    def __post_init__(self) -> None:
        at_least(self, 1, "votes", "max_new_tokens", "slots", *given(self, "devices", "orders"))
        check_sampling(self.temperature, 0, 1.0, 0.0)
        check_seed(self.seed)
        if not self.items.files:
            raise ValueError("items.files names no file: give labelled examples, such as --items.files train.jsonl.gz")
