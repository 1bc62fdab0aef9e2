"""What a training run is made of, as frozen dataclasses; `configs/*.py` return them, `load` reads such a file.

1. A file in `configs/` defines `config()`, which returns an RftConfig or RlConfig: numbers, each with its unit or source.
2. `--config FILE --field value` changes single fields; a field that is not there is an error that lists the known ones.
3. The resolved config is saved with the run (`as_json`), and a run that goes on must agree with it (`check_same`).

No array library is imported here. Sections and equations are those of the paper, arXiv 2504.02495.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from grm_jax.config import Dtype, check_sampling, parse

Recipe = TypeVar("Recipe")
Objective = Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo"]


def _at_least(config: object, least: float, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) < least:
            raise ValueError(f"{type(config).__name__}.{name} = {value}: it has to be at least {least}")


def _given(config: object, *names: str) -> list[str]:
    """The fields among these that are not None."""
    return [name for name in names if getattr(config, name) is not None]


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed}: it has to be 0 to 2^32 - 1")


@dataclasses.dataclass(frozen=True)
class Fresh:
    """The numbers of a fresh random decoder over bytes, for runs that take the whole path in a minute."""

    dim: int = 128
    layers: int = 2
    heads: int = 4
    mlp_dim: int = 256
    max_positions: int = 1024

    def __post_init__(self) -> None:
        _at_least(self, 1, "dim", "layers", "heads", "mlp_dim", "max_positions")
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"dim = {self.dim} in heads = {self.heads}: each head has to get the same even number of it, "
                "which rotary positions pair up"
            )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW behind a clipped global gradient norm."""

    learning_rate: float = 1e-5
    """at the end of the warm-up"""
    warmup_steps: int = 0
    """the rate grows linearly over these"""
    schedule: Literal["constant", "cosine"] = "constant"
    """behind the warm-up; cosine ends at 0 with the run"""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """of matrices; norms and biases do not decay"""
    clip_norm: float = 1.0
    """gradients of a larger global norm are scaled down to it"""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """of the first moment; the second stays float32, where b2 > 0.99 would be lost in bfloat16's rounding"""

    def __post_init__(self) -> None:
        _at_least(self, 0, "learning_rate", "warmup_steps", "weight_decay")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm = {self.clip_norm}: it has to be above 0; inf never clips")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside frozen weights (arXiv 2106.09685)."""

    rank: int = 0
    """0 trains all weights"""
    alpha: float = 16.0
    """the adapters' product is scaled by alpha / rank"""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """matrices of each layer that get an adapter"""

    def __post_init__(self) -> None:
        _at_least(self, 0, "rank")
        known = ("q", "k", "v", "o", "gate", "up", "down")
        for target in self.targets:
            if target not in known:
                raise ValueError(f"lora.targets has {target!r}; known are {', '.join(known)}")
        if self.rank and not self.targets:
            raise ValueError(f"lora.rank = {self.rank} without targets: name some of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """When a run saves itself, and what it keeps."""

    every: int = 100
    """steps between two checkpoints; the last step is always saved"""
    keep_last: int = 2
    keep_every: int | None = None
    """keep for good the checkpoints of steps that this divides"""

    def __post_init__(self) -> None:
        _at_least(self, 1, "every", "keep_last", *_given(self, "keep_every"))


@dataclasses.dataclass(frozen=True)
class Items:
    """Labelled examples, and how they become items with exactly one best response."""

    files: tuple[str, ...] = ()
    """JSON Lines of examples with scores (.gz too, local or gs://)"""
    per_file: int | None = None
    """examples taken from each file at most, drawn by the seed, so that a large file does not crowd out others"""
    n_choices: tuple[int, ...] = (2,)
    """responses of an item made from a longer list: drawn from these by the seed"""
    per_example: int = 1
    """items made from one list of more responses than an item has"""
    held_out: int = 0
    """examples, drawn by the seed, that are never trained on: accuracy is measured on them"""
    limit: int | None = None
    """of items, drawn by the seed; None is all"""

    def __post_init__(self) -> None:
        _at_least(self, 0, "held_out")
        _at_least(self, 1, "per_example", *_given(self, "limit", "per_file"))
        if not self.n_choices or min(self.n_choices) < 2:
            raise ValueError(f"n_choices = {self.n_choices}: give numbers of at least 2, such as 2 3 4")


@dataclasses.dataclass(frozen=True)
class _Run:
    """What every training run has."""

    output: str = "run"
    """the run's folder, local or gs://: checkpoints, metrics, the trained model"""
    model: str = "smollm2-135m"
    """an embedded model's name, a Hugging Face folder, a .gguf file, or "fresh": a random one of the numbers below"""
    fresh: Fresh = Fresh()
    items: Items = Items()
    seed: int = 0
    steps: int = 100
    """optimizer steps"""
    template: str | None = None
    """of the prompts that are trained on; by default listwise, and single_binary or single for one response"""
    compute_dtype: Dtype | None = None
    """of the copy of the weights that works, by default float32 on CPU, else bfloat16; master weights are float32"""
    optimizer: Optimizer = Optimizer()
    lora: Lora = Lora()
    remat: Literal["none", "block", "dots"] = "block"
    """what the backward pass computes again: nothing, whole blocks, or all but the blocks' matrix products"""
    checkpoints: Checkpoints = Checkpoints()
    devices: int | None = None
    """devices that share the batch; by default one on CPU, all elsewhere"""
    log_samples_every: int = 50
    """steps between two looks at full judgments; 0 is never"""
    evaluate_every: int = 0
    """steps between two measurements on the held-out examples; 0 measures at the start and the end alone"""
    votes: int = 1
    """judgments of each held-out example when it is measured"""
    slots: int = 64
    """samples decoded at once, but for the rollouts of RL"""
    evaluate_temperature: float = 0.5
    """of those judgments: the paper votes at 0.5 (section 5)"""
    profile: tuple[int, ...] = ()
    """steps to trace, into the run's folder"""

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "votes", "slots", *_given(self, "devices"))
        _at_least(self, 0, "log_samples_every", "evaluate_every")
        check_sampling(self.evaluate_temperature, 0, 1.0, 0.0)
        _check_seed(self.seed)


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
        _at_least(self, 0, "trajectories", "hinted")
        _at_least(self, 1, "max_new_tokens", "microbatch_rows")
        _at_least(self, 2, "sequence_tokens")
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
        _at_least(self, 1, "prompts_per_step", "max_new_tokens", "updates_per_step", "microbatch_prompts")
        _at_least(self, 2, "group", "max_prompt_tokens")
        _at_least(self, 0, "clip_low", "clip_high", "kl_coef")
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
    dtype: Dtype | None = None
    devices: int | None = None
    overwrite: bool = False
    """start anew where the output exists"""

    def __post_init__(self) -> None:
        _at_least(self, 1, "votes", "max_new_tokens", "slots", *_given(self, "devices"))
        check_sampling(self.temperature, 0, 1.0, 0.0)
        _check_seed(self.seed)
        if not self.items.files:
            raise ValueError("items.files names no file: give labelled examples, such as --items.files train.jsonl.gz")


def load(kind: type[Recipe], args: Sequence[str], prog: str) -> Recipe:
    """The recipe of `--config FILE` (or `kind`'s defaults) with the other arguments' fields changed.

    FILE is a Python file that defines `config()`. Raises ValueError: a file that is missing, lacks `config`, or returns
    another kind of recipe; a field out of its range.
    """
    default = None
    rest = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            raise ValueError("--config without a file: name a Python file such as configs/tiny_rl.py")
        default = read(kind, rest[at + 1])
        del rest[at : at + 2]
    return parse(kind, rest, prog, default)


def read(kind: type[Recipe], file: str) -> Recipe:
    """The recipe that a file's `config()` returns. Raises ValueError as `load` does."""
    if not Path(file).is_file():
        raise ValueError(f"no config {file!r}: give a Python file such as configs/tiny_rl.py")
    found = runpy.run_path(file)
    if not callable(found.get("config")):
        raise ValueError(f"{file} defines no config(): add a function of that name that returns {kind.__name__}(...)")
    recipe = found["config"]()
    if not isinstance(recipe, kind):
        raise ValueError(f"{file} returns {type(recipe).__name__}(...), this command needs {kind.__name__}(...)")
    return recipe


def as_json(recipe: object) -> str:
    """The resolved recipe as JSON, keys sorted: the same recipe gives the same text."""
    return json.dumps(dataclasses.asdict(recipe), indent=1, sort_keys=True)


def check_same(saved: str, recipe: object, free: Mapping[str, Any] | Sequence[str] = ()) -> None:
    """Raise ValueError unless a run's saved recipe is this one, but for the fields in `free`; names those that differ."""
    before, now = json.loads(saved), json.loads(as_json(recipe))
    names = sorted((before.keys() | now.keys()) - set(free))
    differing = [name for name in names if before.get(name) != now.get(name)]
    if differing:
        told = "; ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in differing)
        raise ValueError(
            f"the run in this output was started otherwise: {told}. Give another output, or the old values"
        )
