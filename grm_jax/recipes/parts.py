"""The parts that recipes share: optimizer, adapters, checkpoints, items; and the rules that numbers are held against."""

from __future__ import annotations

import dataclasses
from typing import Literal


def at_least(config: object, least: float, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) < least:
            raise ValueError(f"{type(config).__name__}.{name} = {value}: it has to be at least {least}")


def given(config: object, *names: str) -> list[str]:
    """The fields among these that are not None."""
    return [name for name in names if getattr(config, name) is not None]


def check_seed(seed: int) -> None:
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
        at_least(self, 1, "dim", "layers", "heads", "mlp_dim", "max_positions")
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
        at_least(self, 0, "learning_rate", "warmup_steps", "weight_decay")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm = {self.clip_norm}: it has to be above 0; inf never clips")


# Of grouped-query attention (q, k, v), of latent attention (q or q_a and q_b; kv_a, kv_b), of both (o), and of MLPs.
LORA_TARGETS = ("q", "k", "v", "q_a", "q_b", "kv_a", "kv_b", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside frozen weights (arXiv 2106.09685)."""

    rank: int = 0
    """0 trains all weights"""
    alpha: float = 16.0
    """the adapters' product is scaled by alpha / rank"""
    targets: tuple[str, ...] = LORA_TARGETS
    """matrices that get an adapter, in each layer that has them; gate, up and down of every expert too"""

    def __post_init__(self) -> None:
        at_least(self, 0, "rank")
        for target in self.targets:
            if target not in LORA_TARGETS:
                raise ValueError(f"lora.targets has {target!r}; known are {', '.join(LORA_TARGETS)}")
        if self.rank and not self.targets:
            raise ValueError(f"lora.rank = {self.rank} without targets: name some of {', '.join(LORA_TARGETS)}")


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """When a run saves itself, and what it keeps."""

    every: int = 100
    """steps between two checkpoints; the last step is always saved"""
    keep_last: int = 2
    keep_every: int | None = None
    """keep for good the checkpoints of steps that this divides"""

    def __post_init__(self) -> None:
        at_least(self, 1, "every", "keep_last", *given(self, "keep_every"))


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
        at_least(self, 0, "held_out")
        at_least(self, 1, "per_example", *given(self, "limit", "per_file"))
        if not self.n_choices or min(self.n_choices) < 2:
            raise ValueError(f"n_choices = {self.n_choices}: give numbers of at least 2, such as 2 3 4")
