"""The records that cross module borders, all frozen: what is judged, a judgment of it, the vote over its judgments."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """A conversation that ends in a query, and n >= 1 candidate responses to it.

    `scores`, where the data has labels, holds one ground-truth reward a response, higher is better.
    `reference` is a reference answer that the judge may see. `strength` says how much better the best response is
    (in the data's own unit); `source` names the dataset that the example came from.
    """

    id: str
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    scores: tuple[float, ...] | None = None
    reference: str | None = None
    strength: float | None = None
    source: str | None = None


@dataclass(frozen=True)
class Judgment:
    """One sampled critique of an example.

    `scores` are in the example's own order of responses, None when the text holds no valid box; `reason` then says why.
    `order[i]` is the index of the response shown in position i. `forced`: the model wrote no valid box by itself, and
    the scores were sampled under the automaton's mask. `tokens` counts sampled and forced tokens; `log_prob` sums the
    log-probability of the sampled ones, under the distribution that they were drawn from. Where a meta RM guided the vote,
    `logit` is what it gave the judgment, and `kept` whether the judgment is in the verdict's sums. `values` are what the
    verdict sums where that is something else than `scores`, a number a response: expected scores, a choice weighted by
    its probability, rewards of a value head.
    """

    text: str
    scores: tuple[int, ...] | None
    reason: str | None
    order: tuple[int, ...]
    forced: bool
    tokens: int
    log_prob: float
    logit: float | None = None
    kept: bool | None = None
    values: tuple[float, ...] | None = None

    @property
    def voted(self) -> tuple[int, ...] | tuple[float, ...] | None:
        """What a vote sums: the values, or the scores where there are none."""
        return self.scores if self.values is None else self.values


@dataclass(frozen=True)
class Usage:
    """What a verdict cost. `prompt_tokens` counts each distinct prompt once; `cut_tokens` were removed to make it fit."""

    prompt_tokens: int
    completion_tokens: int
    seconds: float
    cut_tokens: int = 0

    def after(self, before: Usage | None) -> Usage:
        """What both rounds of one example cost: prompts are counted from the first round on, tokens and time add up."""
        if before is None:
            return self
        return Usage(
            max(self.prompt_tokens, before.prompt_tokens),
            self.completion_tokens + before.completion_tokens,
            self.seconds + before.seconds,
            self.cut_tokens,
        )


@dataclass(frozen=True)
class Verdict:
    """The vote over k judgments of an example (Eq. 14).

    `scores[i]` sums response i's score (or value) over the valid judgments, and with a meta RM over those that it kept;
    `best` is the index of the highest sum (the first of them when `tie`). `votes` is k, `valid` how many judgments had
    scores: when it is 0 the verdict is a tie of all. `greedy`: judgments at temperature 0 that were asked for beside them
    and have no vote; their tokens and time are in `usage`.
    """

    id: str
    scores: tuple[float, ...]
    best: int
    tie: bool
    votes: int
    valid: int
    judgments: tuple[Judgment, ...]
    usage: Usage
    greedy: tuple[Judgment, ...] = ()


def stable_hash(text: str) -> int:
    """31 bits of sha256: the same on every machine, unlike `hash`. Draws are seeded by it, so order does not matter."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
