"""The paper's baselines that score by a scalar head (section 4.1, table 2), each with verdicts like a judge's.

1. `BradleyTerry`: one reward a response, read at the end of the conversation that ends with it. Any Hugging Face reward
   model of that kind loads.
2. `PairRm`: one scalar for an ordered pair, the log-odds that the first is better; both orders are asked, and a response
   scores the mean of what it has against each other one.
3. `Cloud`: a critic writes k critiques of each response, and a value head gives a reward for each; votes by their mean
   (CLoud, arXiv 2408.11791).

LLM-as-a-judge needs no code of its own: it is a judge under a template that asks for a choice (`--template choice`).

Departure: CLoud's critic and value head are two models here. The critiques that the value head was trained on are then
those that it will read: training it does not change the critic.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax

from grm_jax import grm, neutral, prompts, scalar_rm
from grm_jax.config import Baseline, Dtype, JudgeSettings
from grm_jax.data.chat import encode_read
from grm_jax.datatypes import Example, Judgment, Message, Usage, Verdict
from grm_jax.grm import Grm
from grm_jax.meta_rm import text_ids
from grm_jax.models.decoder import Model
from grm_jax.tokenizer import Tokenizer
from grm_jax.verdicts import of_rewards, verdict

CRITIQUE, PAIR = "critique", "pair_rm"  # templates
_LONE = "a pair RM compares two or more; take it out, or give another --baseline"
_SHARE = 16  # examples whose texts are computed together

Ids = tuple[list[int], list[int]]  # of a prompt, of the text behind it


def response_ids(tokenizer: Tokenizer, example: Example, i: int, limit: int) -> Ids:
    """(Conversation ids, ids of response i); a reference answer is not shown.

    Texts are cut as `prompts.fit` does, where there are more than `limit` tokens. Raises ValueError where that is not
    enough.
    """
    alone = dataclasses.replace(example, responses=(example.responses[i],), scores=None, reference=None)

    def ids(shown: Example) -> Ids:
        turns = (*shown.messages, Message("assistant", shown.responses[0]))
        return encode_read(
            tokenizer, [Message(m.role, neutral.without_controls(m.content, tokenizer.controls)) for m in turns]
        )

    fitted, _ = prompts.cut_to(alone, limit, lambda shown: sum(map(len, ids(shown))), "or shorter texts")
    return ids(fitted)


def pair_ids(
    tokenizer: Tokenizer, template: prompts.Template, example: Example, first: int, second: int, limit: int
) -> Ids:
    """The prompt of two of an example's responses, and an empty answer. Errors as `meta_rm.text_ids`."""
    two = dataclasses.replace(example, responses=(example.responses[first], example.responses[second]), scores=None)
    return text_ids(tokenizer, template, two, (0, 1), "", limit)


def single(example: Example, i: int) -> Example:
    """Response i of an example as one of its own, for a critic."""
    return Example(f"{example.id}/{i}", example.messages, (example.responses[i],), None, example.reference)


def checker(kind: Baseline, path: str) -> Callable[[Example], None]:
    """What raises ValueError for an example that the model in this folder has no place for. Its template alone is read."""
    template = None if kind == "bradley_terry" else scalar_rm.template_of(path, PAIR if kind == "pair_rm" else CRITIQUE)

    def check(example: Example) -> None:
        if kind == "pair_rm":
            if len(example.responses) < 2:
                raise ValueError(f"{example.id!r} has one response: {_LONE}")
            prompts.check_places(dataclasses.replace(example, responses=example.responses[:2], scores=None), template)
        elif template:
            prompts.check_places(single(example, 0), template)

    return check


@dataclasses.dataclass(frozen=True)
class BradleyTerry:
    """One reward a response."""

    model: Model
    tokenizer: Tokenizer

    def judge(self, examples: Sequence[Example], settings: JudgeSettings) -> Iterator[Verdict]:
        """A verdict an example; nothing of the settings matters. Raises ValueError for texts that cannot be cut to fit."""
        limit = self.model.config.max_positions

        def texts(example: Example) -> list[Ids]:
            return [response_ids(self.tokenizer, example, i, limit) for i in range(len(example.responses))]

        yield from _scored(self.model, examples, texts, lambda example, rewards: rewards)


@dataclasses.dataclass(frozen=True)
class PairRm:
    """One scalar an ordered pair of responses."""

    model: Model
    tokenizer: Tokenizer
    template: prompts.Template

    def judge(self, examples: Sequence[Example], settings: JudgeSettings) -> Iterator[Verdict]:
        """A verdict an example; nothing of the settings matters.

        Raises ValueError for an example of one response, and for texts that cannot be cut to fit.
        """
        limit = self.model.config.max_positions

        def texts(example: Example) -> list[Ids]:
            if len(example.responses) < 2:
                raise ValueError(f"{example.id!r} has one response: {_LONE}")
            return [pair_ids(self.tokenizer, self.template, example, i, j, limit) for i, j in _pairs(example)]

        yield from _scored(self.model, examples, texts, _mean_odds)


def _pairs(example: Example) -> list[tuple[int, int]]:
    """All ordered pairs of an example's responses."""
    n = len(example.responses)
    return [(i, j) for i in range(n) for j in range(n) if i != j]


def _mean_odds(example: Example, scalars: Sequence[float]) -> list[float]:
    """Each response's mean log-odds against the others: half of what it has as the first less half of it as the second."""
    of_pair = dict(zip(_pairs(example), scalars, strict=True))
    n = len(example.responses)
    return [sum(of_pair[i, j] - of_pair[j, i] for j in range(n) if j != i) / (2 * (n - 1)) for i in range(n)]


def _scored(
    model: Model, examples: Sequence[Example], texts: Callable[[Example], list[Ids]],
    rewards: Callable[[Example, list[float]], Sequence[float]],
) -> Iterator[Verdict]:  # fmt: skip
    """Verdicts from the scalars of each example's texts, a few examples at once."""
    for at in range(0, len(examples), _SHARE):
        started, share = time.monotonic(), examples[at : at + _SHARE]
        of_example = [texts(example) for example in share]
        found = iter(scalar_rm.scalars(model, [ids for of in of_example for ids in of]))
        seconds = (time.monotonic() - started) / len(share)
        for example, of in zip(share, of_example, strict=True):
            usage = Usage(sum(len(prompt) + len(text) for prompt, text in of), 0, seconds)
            yield of_rewards(example, rewards(example, [next(found) for _ in of]), usage)


@dataclasses.dataclass(frozen=True)
class Cloud:
    """A critic, and a value head that reads what it writes."""

    critic: Grm
    model: Model
    tokenizer: Tokenizer
    template: prompts.Template

    def judge(self, examples: Sequence[Example], settings: JudgeSettings) -> Iterator[Verdict]:
        """A verdict an example, when the `votes` critiques of each of its responses are in.

        Judgment j has the j-th critique of each response, and their rewards as its values. Raises ValueError as
        `Grm.judge` does, and for texts that cannot be cut to fit.
        """
        parts = {single(e, i).id: (e, i) for e in examples for i in range(len(e.responses))}
        written: dict[str, dict[int, Verdict]] = {}
        singles = [single(e, i) for e, i in parts.values()]
        for found in critiques(self.critic, singles, self.template, settings):
            example, i = parts[found.id]
            of_example = written.setdefault(example.id, {})
            of_example[i] = found
            if len(of_example) == len(example.responses):
                del written[example.id]
                yield self._verdict(example, [of_example[i] for i in range(len(example.responses))])

    def _verdict(self, example: Example, written: Sequence[Verdict]) -> Verdict:
        started, limit = time.monotonic(), self.model.config.max_positions
        texts = [
            text_ids(self.tokenizer, self.template, single(example, i), (0,), judgment.text, limit)
            for i, of in enumerate(written)
            for judgment in of.judgments
        ]
        k = len(written[0].judgments)
        found = scalar_rm.scalars(self.model, texts)
        judgments = [
            Judgment(
                text="\n\n".join(f"[Response {i + 1}] {of.judgments[j].text}" for i, of in enumerate(written)),
                scores=None,
                reason=None,
                order=tuple(range(len(written))),
                forced=False,
                tokens=sum(of.judgments[j].tokens for of in written),
                log_prob=sum(of.judgments[j].log_prob for of in written),
                values=tuple(found[i * k + j] / k for i in range(len(written))),
            )
            for j in range(k)
        ]
        usage = Usage(
            sum(of.usage.prompt_tokens for of in written),
            sum(of.usage.completion_tokens for of in written),
            max(of.usage.seconds for of in written) + time.monotonic() - started,
            sum(of.usage.cut_tokens for of in written),
        )
        return verdict(example, judgments, usage)


def critiques(
    critic: Grm, singles: Sequence[Example], template: prompts.Template, settings: JudgeSettings
) -> Iterator[Verdict]:
    """The critic's verdict on each response alone, as they come: its judgments are the critiques, and have no scores."""
    free = dataclasses.replace(settings, force_scores=False, expected_scores=False, template=None)
    return critic.judge(singles, free, lambda _: template)


def load(
    kind: Baseline,
    path: str,
    dtype: Dtype | None = None,
    mesh: jax.sharding.Mesh | None = None,
    critic: str | None = None,
) -> BradleyTerry | PairRm | Cloud:
    """A baseline from a folder that its command has written; `bradley_terry` takes any reward model's folder.

    critic: of `cloud` alone, the model that writes. Raises ValueError for a critic that is missing or not asked for, and
    errors as `scalar_rm.load` and `grm.load` do.
    """
    if (kind == "cloud") != (critic is not None):
        said = f"needs one, the model that it was trained with: give --critic {path}" if critic is None else "has none"
        raise ValueError(f"critic = {critic}: {kind} {said}")
    model, tokenizer = scalar_rm.load(path, dtype, mesh)
    if kind == "bradley_terry":
        return BradleyTerry(model, tokenizer)
    if kind == "pair_rm":
        return PairRm(model, tokenizer, scalar_rm.template_of(path, PAIR))
    return Cloud(grm.load(critic, dtype, mesh), model, tokenizer, scalar_rm.template_of(path, CRITIQUE))
