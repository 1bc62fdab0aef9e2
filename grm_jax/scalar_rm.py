"""A decoder with one scalar head: a number for each text behind its prompt, read at the text's last token.

Texts of one prompt share it: it is computed once. Prompts are taken in the order of their lengths, ROWS texts at once.

Shapes: P prompts, G texts a prompt, R = P * G, S prompt tokens, T tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float

from grm_jax import prompts
from grm_jax.buckets import power_of_two
from grm_jax.config import Dtype
from grm_jax.models.decoder import Model, Params, bind
from grm_jax.sharding import fetch, rows_of, spread
from grm_jax.tokenizer import Tokenizer
from grm_jax.train.forward import scalars_of
from grm_jax.weights.decoder import load_decoder

TEMPLATE_FILE = "template.txt"  # of a trained model's folder: what showed the texts
LEAST_TOKENS = 32  # the smallest padded prompt and text
ROWS = 32  # texts computed at once, but for the texts of one prompt
TOKENS = 32_768  # padded ones, of prompts and texts, computed at once on a device, but for one prompt with its texts

_Group = tuple[tuple[int, ...], list[int]]  # a prompt's ids, the numbers of its texts


@partial(jax.jit, static_argnames="graph")
def _scalars(graph: nnx.GraphDef, params: Params, *arrays: jax.Array) -> Float[Array, "R"]:
    return scalars_of(bind(graph, params), jnp.zeros(0, jnp.int32), *arrays)


def scalars(model: Model, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """One number for each (prompt ids, text ids), in their order; both have at least one id."""
    of_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, _) in enumerate(texts):
        of_prompt.setdefault(tuple(prompt), []).append(i)
    found = [0.0] * len(texts)
    parts = rows_of(model.mesh)
    for groups in _shares(sorted(of_prompt.items(), key=lambda group: len(group[0])), texts, parts):
        arrays = spread(_padded(groups, texts, parts), model.mesh)
        numbers = fetch(_scalars(model.graph, model.params, *arrays), model.mesh)
        widest = power_of_two(max(len(members) for _, members in groups), 1)
        for p, (_, members) in enumerate(groups):
            for g, i in enumerate(members):
                found[i] = float(numbers[p * widest + g])
    return found


def _shares(
    groups: list[_Group], texts: Sequence[tuple[Sequence[int], Sequence[int]]], parts: int = 1
) -> list[list[_Group]]:
    """Groups cut into shares of at most ROWS padded rows and TOKENS padded tokens a part, or of one group.

    parts: of the mesh, which share the prompts; the rows are at most ROWS in all, unless there are more parts.
    """

    def fits(share: list[_Group]) -> bool:
        P, S, G, T = _sizes(share, texts)
        of_part = -(-P // parts)
        return (P * G <= ROWS or of_part == 1) and of_part * (S + G * T) <= TOKENS

    shares: list[list[_Group]] = []
    for group in groups:
        grown = [*shares[-1], group] if shares else []
        if grown and fits(grown):
            shares[-1] = grown
        else:
            shares.append([group])
    return shares


def _sizes(groups: Sequence[_Group], texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[int, int, int, int]:
    """P, S, G and T of a share, each a power of two."""
    return (
        power_of_two(len(groups), 1),
        power_of_two(max(len(prompt) for prompt, _ in groups), LEAST_TOKENS),
        power_of_two(max(len(members) for _, members in groups), 1),
        power_of_two(max(len(texts[i][1]) for _, members in groups for i in members), LEAST_TOKENS),
    )


def _padded(
    groups: Sequence[_Group], texts: Sequence[tuple[Sequence[int], Sequence[int]]], parts: int
) -> tuple[np.ndarray, ...]:
    """Prompts [P, S], lengths [P], texts [R, T], counts [R], each size a power of two; padding is one token long.

    P is made a multiple of `parts`.
    """
    P, S, G, T = _sizes(groups, texts)
    P = -(-P // parts) * parts
    tokens, lengths = np.zeros((P, S), np.int32), np.ones(P, np.int32)
    rows, counts = np.zeros((P, G, T), np.int32), np.ones((P, G), np.int32)
    for p, (prompt, members) in enumerate(groups):
        tokens[p, : len(prompt)], lengths[p] = prompt, len(prompt)
        for g, i in enumerate(members):
            text = texts[i][1]
            rows[p, g, : len(text)], counts[p, g] = text, len(text)
    return tokens, lengths, rows.reshape(-1, T), counts.reshape(-1)


def load(path: str, dtype: Dtype | None = None, mesh: jax.sharding.Mesh | None = None) -> tuple[Model, Tokenizer]:
    """A Hugging Face `...ForSequenceClassification` folder of one label, local or gs://, and its tokenizer.

    dtype and mesh as in `grm.load`. Raises FileNotFoundError and ValueError as the loaders do, and ValueError for a
    model without a scalar head or without a tokenizer.
    """
    model, tokenizer = load_decoder(path, dtype, mesh)
    if not model.config.scalar:
        raise ValueError(
            f"{path} has no scalar head: give a folder that `meta_rm`, `bradley_terry`, `pair_rm` or `cloud` has written, "
            "or a ...ForSequenceClassification checkpoint of one label"
        )
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer files: put tokenizer.json or tokenizer.model in its folder")
    return model, tokenizer


def template_of(path: str, default: str) -> prompts.Template:
    """The template that a trained model's folder keeps, or the packaged one of a folder without. Errors: as `prompts`."""
    place = epath.Path(path).expanduser() / TEMPLATE_FILE
    if place.exists():
        return prompts.read_template(place.read_bytes(), str(place), boxed=False)
    return prompts.load_template(default, boxed=False)
