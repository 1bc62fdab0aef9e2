"""What a user sets, as frozen dataclasses: typed, checked when made, and parsed from the command line by `parse`.

No array library is imported here, so `--help` and errors about settings are quick.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import tyro

Config = TypeVar("Config")
Dtype = Literal["float32", "bfloat16", "float16"]
Baseline = Literal["bradley_terry", "pair_rm", "cloud"]
Kernels = Literal["auto", "plain", "splash", "cudnn"]


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """Devices along each axis of the mesh; -1, for one of them, is what the others leave."""

    data: int = -1
    """splits the batch"""
    fsdp: int = 1
    """splits the batch, and in training the weights and the optimizer's state, gathered where they are used"""
    tensor: int = 1
    """splits heads, MLP and vocabulary"""
    expert: int = 1
    """splits the experts of a mixture, and elsewhere the batch"""

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{name} = {size}: it has to be at least 1, or -1 for what the others leave")
        if list(sizes.values()).count(-1) > 1:
            unknown = " and ".join(f"mesh.{name}" for name, size in sizes.items() if size == -1)
            raise ValueError(f"{unknown} are -1: one size alone can be what the others leave, give the other a number")


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """How judgments are sampled; the defaults are the paper's (section 5) where it gives them."""

    votes: int = 8
    """k: judgments sampled for each example"""
    temperature: float = 0.5
    """0 is greedy"""
    top_k: int = 0
    """draw from this many likeliest tokens; 0 is all"""
    top_p: float = 1.0
    """draw from the likeliest tokens that reach this probability; 1 is all"""
    min_p: float = 0.0
    """draw from tokens at least this likely relative to the likeliest; 0 is all"""
    seed: int = 0
    """samples and orders are a function of it, of each example's id and of the sample's index"""
    max_new_tokens: int = 512
    """tokens that a judgment may have (forced scores come on top)"""
    force_scores: bool = True
    """where a judgment holds no valid box, open one and sample the scores under a mask"""
    template: str | None = None
    """a template's name or file; by default the one for the number of responses"""
    slots: int = 32
    """samples decoded at once"""
    orders: int | None = None
    """orders of the responses that an example's judgments share, each second one the reverse of the one before"""
    expected_scores: bool = False
    """sum each score's mean under the model's probabilities; a choice of one response is weighed by its probability"""
    k_meta: int | None = None
    """judgments that a meta RM keeps; by default half of them, and at least one"""
    stop_risk: float | None = None
    """draw in rounds, and stop an example when more votes change its winner with at most this probability; 0: never"""

    def __post_init__(self) -> None:
        for name in ("votes", "max_new_tokens", "slots", "orders", "k_meta"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: it has to be at least 1")
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed}: it has to be 0 to 2^32 - 1")
        if self.stop_risk is not None and not 0 <= self.stop_risk < 1:
            raise ValueError(f"stop_risk = {self.stop_risk}: it is a probability, 0 to below 1")

    def record(self) -> dict[str, Any]:
        """What judgments depend on, for the record beside an output; `orders` is in it only where it is given."""
        left_out = {"slots"} if self.orders else {"slots", "orders"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}

    def check_vote(self, guided: bool) -> None:
        """Raise ValueError for settings that a vote, guided by a meta RM or not, cannot have together."""
        if self.stop_risk is not None and (guided or self.expected_scores):
            other = "a meta RM" if guided else "expected_scores"
            raise ValueError(
                f"stop_risk = {self.stop_risk} and {other}: the risk is that of the plain vote, give one of them"
            )
        if self.k_meta is not None and not guided:
            raise ValueError(f"k_meta = {self.k_meta} without a meta RM, which chooses them: give one, --meta-rm DIR")


def check_sampling(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raise ValueError, naming value and rule, for numbers that no distribution has."""
    rules = (
        ("temperature", temperature, "0 (greedy) or more", 0 <= temperature < float("inf")),
        ("top_k", top_k, "0 (all) or more", top_k >= 0),
        ("top_p", top_p, "above 0, at most 1 (all)", 0 < top_p <= 1),
        ("min_p", min_p, "0 (all) to 1", 0 <= min_p <= 1),
    )
    for name, value, rule, holds in rules:
        if not holds:
            raise ValueError(f"{name} = {value}: it has to be {rule}")


@dataclasses.dataclass(frozen=True)
class ScoreConfig(JudgeSettings):
    """Judge conversations with n >= 1 responses each, vote, and write one verdict a row."""

    input: str = "examples"
    """JSON Lines (.gz too, local or gs://), "-" for standard input, "examples" for those of the package"""
    output: str = "verdicts.jsonl"
    """where verdicts go, "-" for standard output; a run that was interrupted goes on there"""
    model: str = "smollm2-135m"
    """an embedded model's name, a Hugging Face folder or a .gguf file"""
    meta_rm: str | None = None
    """a folder of the command `meta_rm`, or a Hugging Face classifier of one label, that guides the vote"""
    baseline: Baseline | None = None
    """what `model` is instead of a judge: a reward model with a scalar head (`bradley_terry` takes released ones)"""
    critic: str | None = None
    """of `--baseline cloud`: the model that writes the critiques"""
    dtype: Dtype | None = None
    """of weights and caches; by default float32 on CPU, bfloat16 elsewhere"""
    devices: int | None = None
    """devices of the mesh; by default one on CPU, or as many as the mesh names, and all elsewhere"""
    mesh: MeshSizes = MeshSizes()
    kernels: Kernels = "auto"
    """of attention over many tokens: the device's own, "plain" XLA, "splash" on a TPU or "cudnn" on a GPU"""
    skip_bad: bool = False
    """leave bad rows out and count them, instead of stopping before the model is loaded"""
    overwrite: bool = False
    """start anew where the output exists"""
    show: bool = False
    """print each example's best-supported judgment and a table of its votes"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"devices = {self.devices}: it has to be at least 1")
        self.check_vote(guided=self.meta_rm is not None)
        _check_baseline(self)
        same = os.path.realpath(self.input) == os.path.realpath(self.output)
        if same and self.input != "-":
            raise ValueError(f"input and output are both {self.input!r}: verdicts would overwrite the examples")


def _check_baseline(config: ScoreConfig | EvalConfig) -> None:
    """Raise ValueError for a critic without its baseline, and for what a baseline has no use for."""
    if (config.critic is not None) != (config.baseline == "cloud"):
        raise ValueError(
            f"critic = {config.critic} and baseline = {config.baseline}: cloud has a critic, and nothing else; give "
            "--baseline cloud --model HEAD --critic MODEL"
        )
    unused = [name for name in ("meta_rm", "template", "stop_risk", "orders") if getattr(config, name) is not None]
    unused += ["expected_scores"] if config.expected_scores else []
    if config.baseline and unused:
        name = unused[0]
        raise ValueError(
            f"{name} = {getattr(config, name)}: baseline {config.baseline} has no use for it, leave it out"
        )


BENCHMARKS = (
    *("reward_bench", "reward_bench_2", "ppe_preference", "ppe_correctness", "rmb"),
    *("rm_bench", "judge_bench", "real_mistake", "llm_bar", "preferences"),
)


def _check_benchmark(name: str) -> None:
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark = {name!r}: known are {', '.join(BENCHMARKS)}")


@dataclasses.dataclass(frozen=True)
class EvalConfig(JudgeSettings):
    """Judge a benchmark's cases k times each, and report every vote for every k' up to k."""

    benchmark: str | None = None
    """its name"""
    data: str | None = None
    """its official files: a folder or a file, local or gs://"""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """report anew from this judgments.jsonl, without a model or data"""
    drop_forced: bool = False
    """with `from`: judgments whose scores were forced count as unread, as if none had been forced"""
    output: str = "report"
    """a folder, local or gs://: judgments.jsonl, report.json, report.md; an interrupted run goes on there"""
    model: str = "smollm2-135m"
    """an embedded model's name, a Hugging Face folder or a .gguf file"""
    meta_rm: str | None = None
    """a meta RM's folder: its guided vote is reported too"""
    baseline: Baseline | None = None
    """what `model` is instead of a judge, as of `score`"""
    critic: str | None = None
    """of `--baseline cloud`: the model that writes the critiques"""
    limit: int | None = None
    """queries, drawn by the seed; the total is then no score of the benchmark"""
    greedy: bool = True
    """judge once more at temperature 0, for the greedy point"""
    force_scores: bool = False
    """where a judgment holds no valid box, open one and sample the scores under a mask"""
    slots: int = 64
    """samples decoded at once"""
    dtype: Dtype | None = None
    """of weights and caches; by default float32 on CPU, bfloat16 elsewhere"""
    devices: int | None = None
    """devices of the mesh; by default one on CPU, or as many as the mesh names, and all elsewhere"""
    mesh: MeshSizes = MeshSizes()
    kernels: Kernels = "auto"
    """of attention over many tokens: the device's own, "plain" XLA, "splash" on a TPU or "cudnn" on a GPU"""
    overwrite: bool = False
    """start anew where the output exists"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_vote(guided=self.meta_rm is not None)
        _check_baseline(self)
        if self.stop_risk is not None:
            raise ValueError(f"stop_risk = {self.stop_risk}: a curve needs all judgments of every case, leave it out")
        if self.from_ is None and (self.data is None or self.benchmark is None):
            raise ValueError("give --benchmark NAME and --data PATH, or --from judgments.jsonl of an earlier run")
        if self.drop_forced and self.from_ is None:
            raise ValueError(
                "drop_forced is for a report of judgments that are there: give --from, or --no-force-scores"
            )
        if self.from_ is not None:
            known = {"from_", "output", "drop_forced", "benchmark", "greedy"}
            for field in dataclasses.fields(self):
                if field.name not in known and (given := getattr(self, field.name)) != field.default:
                    raise ValueError(f"{field.name} = {given} with --from: nothing is judged anew, leave it out")
        if self.benchmark is not None:
            _check_benchmark(self.benchmark)
        for name in ("limit", "devices"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: it has to be at least 1")


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Compile a run's programs for a topology that is not there: does it fit, and what bounds it?

    Other options are those of the config, such as --mesh.fsdp 16.
    """

    config: str
    """the run's config file, of `rl`, `rft`, `meta_rm` or a baseline"""
    topology: str | None = None
    """TPUs to compile for, such as v5p:4x4x4, v5e:4x8 or v6e:4x8; needs libtpu (the extra tpu), no TPU"""
    slices: int = 1
    """such topologies side by side, which the data center's network joins; mesh.data has to be a multiple of them"""
    cpu_devices: int | None = None
    """simulated CPU devices instead"""
    numbers: str | None = None
    """whose config.json has the model's numbers, or a released model's name; by default the config's model"""
    only: tuple[str, ...] = ()
    """programs to compile, such as rl; by default all of the run"""
    output: str | None = None
    """a folder for the compiled programs' text"""

    def __post_init__(self) -> None:
        if (self.topology is None) == (self.cpu_devices is None):
            raise ValueError("give --topology, such as v5p:4x4x4, or --cpu-devices N: one of the two")
        if self.slices < 1 or (self.slices > 1 and self.topology is None):
            raise ValueError(f"slices = {self.slices}: it is at least 1, and of a --topology")
        if self.cpu_devices is not None and self.cpu_devices < 1:
            raise ValueError(f"cpu_devices = {self.cpu_devices}: it has to be at least 1")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Write a benchmark's official files as a dataset of tensorflow-datasets."""

    benchmark: str
    """its name"""
    data: str
    """its official files: a folder or a file, local or gs://"""
    output: str = "datasets"
    """the data_dir of tensorflow-datasets: the dataset is written below it"""

    def __post_init__(self) -> None:
        _check_benchmark(self.benchmark)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Lay reports of one benchmark side by side, each against the first."""

    folders: tyro.conf.Positional[tuple[str, ...]]
    """of `eval`, two or more"""
    vote: Literal["voting", "guided", "softmax", "expected"] = "voting"
    """whose totals to compare, after all judgments of each report"""
    seed: int = 0
    """of the bootstrap"""

    def __post_init__(self) -> None:
        if len(self.folders) < 2:
            raise ValueError(f"{len(self.folders)} folders: give two reports at least")


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Write a model in another format; adapters are merged into their base."""

    model: str
    """an embedded model's name, a Hugging Face folder, a .gguf file, a folder of LoRA adapters, a folder that `convert`
    wrote, or a training run's folder or one step of its checkpoints; local or gs://"""
    output: str
    """the folder to write, local or gs://"""
    to: Literal["hf", "orbax"] = "hf"
    """hf: safetensors, as transformers loads them; orbax: an Orbax checkpoint of the weights alone. Both with config.json
    and tokenizer beside them, for --model"""
    dtype: Dtype | None = None
    """of the weights; by default what the model is stored in (float32 for quantised or mixed weights), and a run's
    compute_dtype, or float32"""
    adapters: str | None = None
    """a folder of LoRA adapters to merge into the model, whichever base it names"""
    step: int | None = None
    """of a training run; by default its last one"""
    base: str | None = None
    """the model that a training run was started from, where it is not where its recipe says"""
    shard_gb: float = 5.0
    """the most that a safetensors file may have, in 10^9 bytes"""
    overwrite: bool = False
    """write over what is in the output"""

    def __post_init__(self) -> None:
        if not self.shard_gb > 0:
            raise ValueError(f"shard_gb = {self.shard_gb}: it has to be above 0")
        if self.step is not None and self.step < 0:
            raise ValueError(f"step = {self.step}: it has to be at least 0")


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Time prefill and decode on random prompts, against what this machine can do."""

    model: str = "smollm2-135m"
    """an embedded model's name, a Hugging Face folder or a .gguf file"""
    dtype: Dtype | None = None
    """of weights and caches; by default float32 on CPU, bfloat16 elsewhere"""
    prompt_tokens: int = 1024
    """tokens of each prompt"""
    new_tokens: int = 128
    """tokens sampled of each, with no end id"""
    batch: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N[,N...]")] = (1,)
    """distinct prompts at once, one row of the table each"""
    votes: Annotated[tuple[int, ...], tyro.conf.arg(metavar="K[,K...]")] = (1, 8, 32)
    """samples of each prompt, one row of the table each"""
    repeats: int = 3
    """timed runs of each row; the table shows their median and spread"""
    json: str | None = None
    """a file for all numbers"""

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 2), ("new_tokens", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: it has to be at least {least}")
        for name in ("batch", "votes"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give numbers of at least 1, such as 1,8,32")


def parse(kind: type[Config], args: Sequence[str], prog: str, default: Config | None = None) -> Config:
    """The config that the arguments describe. Lists of numbers may be written 1,8,32. Raises ValueError as `kind` does.

    default: what fields that no argument names are; by default those of `kind`.
    """
    lists = {f"--{f.name}" for f in dataclasses.fields(kind) if isinstance(f.default, tuple)}
    spread = []
    for arg in args:
        name, equals, value = arg.partition("=")
        spread += [name, value] if equals and name in lists else [arg]
    args = [
        part for i, arg in enumerate(spread) for part in (arg.split(",") if i and spread[i - 1] in lists else [arg])
    ]
    return tyro.cli(kind, args=args, prog=prog, **({} if default is None else {"default": default}))


def parted(args: Sequence[str], names: set[str]) -> tuple[list[str], list[str]]:
    """(The options of these names with their values, --help among them; the other arguments), each in their order."""
    own: list[str] = []
    rest: list[str] = []
    taken = rest
    for arg in args:
        if arg.startswith("--") or arg == "-h":
            taken = own if arg.partition("=")[0] in {*names, "--help", "-h"} else rest
        taken.append(arg)
    return own, rest
