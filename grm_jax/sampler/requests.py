"""What is asked of the sampler and what comes back, on the host: no array of the device is touched here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from grm_jax import scores
from grm_jax.buckets import common_prefix as common_prefix
from grm_jax.buckets import power_of_two as power_of_two
from grm_jax.models.decoder import Model


@dataclasses.dataclass(frozen=True)
class Request:
    """Samples wanted of one distinct prompt.

    samples: (item, index) of each, both folded into its key. numbers: how many scores a completion is to hold, where
    scores are forced; 0 forces none.
    """

    prompt: tuple[int, ...]
    samples: tuple[tuple[int, int], ...]
    numbers: int = 0

    def __post_init__(self) -> None:
        if not self.prompt or not self.samples:
            raise ValueError(
                f"a request of {len(self.prompt)} prompt tokens and {len(self.samples)} samples: it needs at least one of "
                "each (a model's bos is a prompt)"
            )


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled continuation of a request's prompt, without the id that ended it.

    log_probs: one a token, 0 for tokens that were not drawn. forced_from: where the forced tail begins, None if nothing
    was forced. ended: an end id was drawn (or the forced box closed), not the budget reached. masses [tokens, C]: of
    `expected.masses`, None where they were not asked for.
    """

    request: Request
    item: int
    sample: int
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    ended: bool
    forced_from: int | None
    seconds: float
    masses: np.ndarray | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Forcing:
    """How scores are forced: the automaton, the tokens of the tail, and the test that says a text needs none of it."""

    table: scores.ForceTable
    tail: tuple[int, ...]
    has_scores: Callable[[Sequence[int], int], bool]

    def budget(self, numbers: int) -> int:
        """Tokens that the tail and the scores may take: a score, a comma and a space each at most, if no token is wider."""
        return len(self.tail) + numbers * (len(str(self.table.high)) + 2)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The size of a batch: `groups` prompts of `group` samples each, `steps` tokens between two looks by the host."""

    groups: int
    group: int
    max_new_tokens: int
    steps: int = 16

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} = {getattr(self, field.name)}: a batch needs at least 1")


def check_length(model: Model, request: Request, plan: Plan, forcing: Forcing | None) -> None:
    """Raise ValueError unless the prompt, its budget and the forced tail fit the model's positions."""
    extra = forcing.budget(request.numbers) if forcing and request.numbers else 0
    needed = len(request.prompt) + plan.max_new_tokens + extra
    if needed > model.config.max_positions:
        raise ValueError(
            f"item {request.samples[0][0]}: a prompt of {len(request.prompt)} tokens and up to "
            f"{plan.max_new_tokens + extra} new ones do not fit the model's {model.config.max_positions} positions; "
            "shorten the prompt or max_new_tokens"
        )
