"""The meta RM: a decoder with one scalar head that says how far a judgment can be trusted (arXiv 2504.02495, section 4.2).

1. Its input is a prompt of the conversation and the responses, in the order in which the judgment saw them, and the
   judgment's text as the assistant's turn. The head is read at the last token, which is the end of that turn.
2. Judgments of one example that saw one order share its prompt, which is computed once.
3. A logit above another's means: more likely right. sigmoid(logit) is the probability that Eq. 10 holds, as trained.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax

from grm_jax import neutral, prompts, scalar_rm
from grm_jax.config import Dtype
from grm_jax.data.chat import encode_read
from grm_jax.datatypes import Example, Judgment, Message
from grm_jax.models.decoder import Model
from grm_jax.tokenizer import Tokenizer

TEMPLATE = "meta_rm"


def text_ids(
    tokenizer: Tokenizer, template: prompts.Template, example: Example, order: tuple[int, ...], text: str, limit: int
) -> tuple[list[int], list[int]]:
    """(Prompt ids, text ids) of a text about responses in the order that it saw.

    The prompt is cut, as `prompts.fit` does, where both together have more than `limit` tokens. Raises ValueError where
    that is not enough.
    """
    read = Message("assistant", neutral.without_controls(text, tokenizer.controls))

    def tokens(turns: Sequence[Message]) -> int:
        return sum(map(len, encode_read(tokenizer, (*turns, read))))

    fitted, _ = prompts.fit(example, template, limit, tokens, tokenizer.controls)
    return encode_read(tokenizer, (*prompts.render(fitted, order, template, controls=tokenizer.controls), read))


@dataclasses.dataclass(frozen=True)
class MetaRm:
    """A decoder whose config has `scalar`, its tokenizer, and the template of its prompts."""

    model: Model
    tokenizer: Tokenizer
    template: prompts.Template
    name: str

    def logits(self, example: Example, judgments: Sequence[Judgment]) -> list[float]:
        """One logit a judgment of the example; a failed parse has one too.

        Raises ValueError for an example and a judgment that cannot be cut to fit the model.
        """
        return self.logits_of([(example, judgments)])[0]

    def logits_of(self, judged: Sequence[tuple[Example, Sequence[Judgment]]]) -> list[list[float]]:
        """`logits` of several examples' judgments, computed together."""
        limit = self.model.config.max_positions
        texts = [
            text_ids(self.tokenizer, self.template, example, judgment.order, judgment.text, limit)
            for example, judgments in judged
            for judgment in judgments
        ]
        found = iter(scalar_rm.scalars(self.model, texts))
        return [[next(found) for _ in judgments] for _, judgments in judged]


def checker(path: str) -> Callable[[Example], None]:
    """What raises ValueError for an example that the meta RM in this folder has no place for, by its template alone."""
    return functools.partial(prompts.check_places, template=scalar_rm.template_of(path, TEMPLATE))


def load(
    path: str, dtype: Dtype | None = None, mesh: jax.sharding.Mesh | None = None, template: str | None = None
) -> MetaRm:
    """Load a meta RM: a folder that `scalar_rm.load` takes, with its errors.

    template: a name or file; by default the one that the folder keeps, or the packaged one.
    """
    model, tokenizer = scalar_rm.load(path, dtype, mesh)
    shown = prompts.load_template(template, boxed=False) if template else scalar_rm.template_of(path, TEMPLATE)
    return MetaRm(model, tokenizer, shown, str(path))
