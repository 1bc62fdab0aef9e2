"""The meta RM: a decoder with one scalar head that says how far a judgment can be trusted (arXiv 2504.02495, section 4.2).

1. Its input is a prompt of the conversation and the responses, in the order in which the judgment saw them, and the
   judgment's text as the assistant's turn. The head is read at the last token, which is the end of that turn.
2. Judgments of one example that saw one order share its prompt, which is computed once.
3. A logit above another's means: more likely right. sigmoid(logit) is the probability that Eq. 10 holds, as trained.

Shapes: P prompts, G judgments a prompt, R = P * G, S prompt tokens, T tokens of a judgment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from grm_jax import prompts
from grm_jax.buckets import power_of_two
from grm_jax.config import Dtype
from grm_jax.data.chat import encode_chat
from grm_jax.datatypes import Example, Judgment, Message
from grm_jax.models.decoder import Model, Params, bind
from grm_jax.tokenizer import Tokenizer
from grm_jax.train.forward import scalars_of
from grm_jax.weights.decoder import load_decoder

TEMPLATE = "meta_rm"
LEAST_TOKENS = 32  # the smallest padded prompt and judgment


def text_ids(
    tokenizer: Tokenizer, template: prompts.Template, example: Example, order: tuple[int, ...], text: str, limit: int
) -> tuple[list[int], list[int]]:
    """(Prompt ids, judgment ids) of a judgment's text on responses in the order that it saw.

    The prompt is cut, as `prompts.fit` does, where both together have more than `limit` tokens. Raises ValueError where
    that is not enough.
    """
    judged = len(encode_chat(tokenizer, (Message("user", ""), Message("assistant", text)))[1])
    fitted, _ = prompts.fit(
        example,
        template,
        limit - judged,
        lambda messages: len(tokenizer.encode(tokenizer.chat(messages))),
        tokenizer.specials,
    )
    turns = prompts.render(fitted, order, template, controls=tokenizer.specials)
    return encode_chat(tokenizer, (*turns, Message("assistant", text)))


@partial(jax.jit, static_argnames="graph")
def _logits(graph: nnx.GraphDef, params: Params, *arrays: jax.Array) -> Float[Array, "R"]:
    return scalars_of(bind(graph, params), jnp.zeros(0, jnp.int32), *arrays)


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
        groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        limit = self.model.config.max_positions
        for j, judgment in enumerate(judgments):
            ids, judged = text_ids(self.tokenizer, self.template, example, judgment.order, judgment.text, limit)
            groups.setdefault(tuple(ids), []).append((j, judged))
        found = np.asarray(_logits(self.model.graph, self.model.params, *_padded(groups)))
        widest = power_of_two(max(map(len, groups.values())), 1)
        logits = [0.0] * len(judgments)
        for p, judged in enumerate(groups.values()):
            for g, (j, _) in enumerate(judged):
                logits[j] = float(found[p * widest + g])
        return logits


def _padded(groups: dict[tuple[int, ...], list[tuple[int, list[int]]]]) -> tuple[np.ndarray, ...]:
    """Prompts [P, S], lengths [P], judgments [R, T], counts [R], each size a power of two; padding is one token long."""
    rows = [judged for of_prompt in groups.values() for _, judged in of_prompt]
    P, G = power_of_two(len(groups), 1), power_of_two(max(map(len, groups.values())), 1)
    S, T = (power_of_two(max(map(len, ids)), LEAST_TOKENS) for ids in (groups, rows))
    tokens, lengths = np.zeros((P, S), np.int32), np.ones(P, np.int32)
    samples, counts = np.zeros((P, G, T), np.int32), np.ones((P, G), np.int32)
    for p, (ids, judged) in enumerate(groups.items()):
        tokens[p, : len(ids)], lengths[p] = ids, len(ids)
        for g, (_, row) in enumerate(judged):
            samples[p, g, : len(row)], counts[p, g] = row, len(row)
    return tokens, lengths, samples.reshape(-1, T), counts.reshape(-1)


def load(path: str, dtype: Dtype | None = None, devices: int | None = None, template: str = TEMPLATE) -> MetaRm:
    """Load a meta RM: a Hugging Face `...ForSequenceClassification` folder of one label, local or gs://.

    dtype and devices as in `grm.load`. Raises FileNotFoundError and ValueError as the loaders do, and ValueError for a
    model without a scalar head or without a tokenizer.
    """
    model, tokenizer = load_decoder(path, dtype, devices)
    if not model.config.scalar:
        raise ValueError(
            f"{path} has no scalar head: give a folder that the command `meta_rm` has written, or a "
            "...ForSequenceClassification checkpoint of one label"
        )
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer files: put tokenizer.json or tokenizer.model in its folder")
    return MetaRm(model, tokenizer, prompts.load_template(template, boxed=False), str(path))
