"""The judge: examples in, verdicts out.

What `judge` does, with `judging`:
1. each of an example's k samples gets an order of the responses, by a seed; equal orders are one distinct prompt;
2. the prompts are cut to fit, rendered and tokenised; those of one template share its head, prefilled once;
3. the sampler draws the samples, forcing scores where a text holds none and the caller wants them;
4. each text is parsed, and its scores go back to the example's own order;
5. where there is a meta RM, it gives each sample a logit, a few examples at once;
6. they are voted (Eq. 14) into its verdict, guided by the logits.

Where it departs from the paper (section 5, each sample shuffled by itself): the n! orders are dealt out in turn from a
shuffled deck, so each sample's order is still uniform, and no order comes up again before all n! have.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grm_jax import prompts
from grm_jax import tokenizer as tokenizers
from grm_jax.config import Dtype, JudgeSettings
from grm_jax.datatypes import Example, Judgment, Verdict
from grm_jax.judging import Judged, check_fit, in_rounds
from grm_jax.models.decoder import Model, bind
from grm_jax.sampler import Sampling, generate
from grm_jax.sharding import DECODING, Rules
from grm_jax.verdicts import verdict
from grm_jax.weights.adapters import is_adapter_folder, load_adapters, merge_into
from grm_jax.weights.decoder import load_decoder
from grm_jax.weights.embedded import EMBEDDED

_GUIDED = 16  # examples whose judgments a meta RM reads together
_WINDOW = 256  # examples taken together where a file needs several templates


class Guide(Protocol):
    """What guides a vote: a `MetaRm`, or anything else that says how far judgments can be trusted."""

    def logits_of(self, judged: Sequence[tuple[Example, Sequence[Judgment]]]) -> Sequence[Sequence[float]]:
        """One number a judgment of each example; higher is better."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """One continuation of a raw prompt; log_probs: one a token, under the distribution that it was drawn from."""

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    ended: bool  # by an end id, not by the budget


@dataclasses.dataclass(frozen=True)
class Grm:
    """A generative reward model: a decoder, its tokenizer (None for a folder without one), and its default templates."""

    model: Model
    tokenizer: tokenizers.Tokenizer | None
    name: str
    demos: bool = False  # its templates carry worked demonstrations: it was not tuned to judge

    def score(
        self, examples: Sequence[Example], votes: int = 8, seed: int = 0, meta_rm: Guide | None = None,
        **settings: float | str | bool | None,
    ) -> list[Verdict]:  # fmt: skip
        """A verdict for each example, in their order; `settings` are further fields of `JudgeSettings`.

        meta_rm: chooses the judgments that are summed. Raises ValueError for ids that occur twice, settings out of range,
        or a prompt that cannot be cut to fit.
        """
        asked = JudgeSettings(votes=votes, seed=seed, **settings)
        verdicts = {v.id: v for v in self.judge(examples, asked, meta_rm=meta_rm)}
        return [verdicts[example.id] for example in examples]

    def judge(
        self, examples: Sequence[Example], settings: JudgeSettings,
        template_of: Callable[[Example], prompts.Template] | None = None,
        hint_of: Callable[[Example], prompts.Hint] | None = None,
        meta_rm: Guide | None = None, greedy: int = 0,
    ) -> Iterator[Verdict]:  # fmt: skip
        """Verdicts as they come to be, in no order. The samples keep one batch full across examples.

        template_of: what shows an example; by default `template` of its number of responses. hint_of: the truth that is
        told at the end of an example's prompt (hinted sampling, section 3.1). meta_rm: as in `score`. greedy: how many
        judgments at temperature 0 each verdict has beside those that are voted, in the orders of the first ones. Raises
        ValueError: ids that occur twice, a hint or example that the template has no place for, a prompt that cannot be
        cut to fit, settings that the vote cannot have together, more greedy judgments than votes.
        """
        settings.check_vote(guided=meta_rm is not None)
        if not 0 <= greedy <= settings.votes:
            raise ValueError(f"greedy = {greedy}: it has to be 0 to votes = {settings.votes}, whose orders they take")
        seen: set[str] = set()
        for example in examples:
            if example.id in seen:
                raise ValueError(
                    f"example id {example.id!r} occurs twice: ids name an example's samples, make them unique"
                )
            seen.add(example.id)
        by_n = cache(partial(self.template, settings=settings))
        template_of = template_of or (lambda example: by_n(len(example.responses)))
        shown: dict[prompts.Template, list[Example]] = {}
        for example in examples:
            shown.setdefault(template_of(example), []).append(example)
        for template, alike in shown.items():
            check_fit(self, template, alike, settings)
        mixed = len(shown) > 1
        window = _WINDOW if mixed else max(len(examples), 1)  # verdicts of a mixed file stay near their order
        for start in range(0, len(examples), window):
            groups: dict[tuple[prompts.Template, int], list[Example]] = {}
            for example in examples[start : start + window]:
                template = template_of(example)
                among = len(example.responses) if template.kind == "choice" else 0  # what its box may hold
                groups.setdefault((template, among), []).append(example)
            for (template, _), group in groups.items():
                found = in_rounds(self, template, group, settings, hint_of, greedy)
                yield from _guided(found, meta_rm, settings.k_meta) if meta_rm else map(_voted, found)

    def template(self, n: int, settings: JudgeSettings) -> prompts.Template:
        """The template that shows n responses."""
        return prompts.load_template(settings.template) if settings.template else prompts.template_for(n, self.demos)

    def generate(
        self, texts: Sequence[str], k: int = 1, *, max_new_tokens: int = 256, seed: int = 0, temperature: float = 1.0,
        top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, slots: int = 32,
    ) -> list[list[Generated]]:  # fmt: skip
        """k continuations of each raw prompt: result[i][j] is sample j of texts[i].

        No chat template is put around a text; the begin token stands before it where the model's texts have one.
        """
        tokenizer = self.need_tokenizer()
        sampling = Sampling(temperature, top_k, top_p, min_p, tokenizer.eos_ids)
        start = tokenizer.start
        ids = [tokenizer.encode(text if start and text.startswith(start) else start + text) for text in texts]
        rows = generate(
            self.model, ids, k, jax.random.key(seed, impl="threefry2x32"),
            max_new_tokens=max_new_tokens, sampling=sampling, slots=slots,
        )  # fmt: skip
        return [[Generated(tokenizer.decode(c.tokens), c.tokens, c.log_probs, c.ended) for c in row] for row in rows]

    def logits(self, token_ids: Int[Array, "B T"] | Int[np.ndarray, "B T"]) -> Float[Array, "B T V"]:
        """Next-token logits at every position, float32; each row starts at position 0."""
        tokens = jnp.asarray(token_ids, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return _forward(self.model.graph, self.model.params, tokens, positions)

    def need_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer, or ValueError for a model that was loaded without one."""
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer files: put tokenizer.json or tokenizer.model in its folder")
        return self.tokenizer

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each id of the model's vocabulary."""
        return vocabulary_bytes(self.need_tokenizer(), self.model.config.vocab_size)


def vocabulary_bytes(tokenizer: tokenizers.Tokenizer, size: int) -> list[bytes]:
    """The bytes of each of a model's `size` ids, which may be more or fewer than the tokenizer's."""
    table = tokenizer.token_bytes()
    return [*table, *[b""] * (size - len(table))][:size]


@partial(jax.jit, static_argnames="graph")
def _forward(graph: object, params: dict[str, jax.Array], tokens: jax.Array, positions: jax.Array) -> jax.Array:
    model = bind(graph, params)
    hidden, _ = model(tokens, positions)
    return model.logits(hidden)


def _guided(found: Iterator[Judged], meta_rm: Guide, k_meta: int | None) -> Iterator[Verdict]:
    """Verdicts guided by the logits of each example's judgments, a few examples at once."""
    while share := list(itertools.islice(found, _GUIDED)):
        of_example = meta_rm.logits_of([(of.example, of.judgments) for of in share])
        for of, logits in zip(share, of_example, strict=True):
            yield _voted(of, logits, k_meta)


def _voted(found: Judged, logits: Sequence[float] | None = None, k_meta: int | None = None) -> Verdict:
    voted = verdict(found.example, found.judgments, found.usage, logits, k_meta)
    return dataclasses.replace(voted, greedy=tuple(found.greedy))


def load(
    model: str = "smollm2-135m",
    dtype: Dtype | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = DECODING,
) -> Grm:
    """Load a judge: an embedded model by name, a Hugging Face folder, a .gguf file, or a folder of adapters (local or gs://).

    Adapters (PEFT's LoRA) are merged into the base that they name, whose tokenizer is used.
    dtype: of weights and caches; by default float32 on CPU, bfloat16 elsewhere. mesh: of `sharding.lay_out` or
    `sharding.make_mesh`; by default one device on CPU, and elsewhere all of this process's, which share the batch. rules:
    how the weights lie on it. Raises FileNotFoundError and ValueError as the loaders of `weights` and `tokenizer` do.
    """
    if model not in EMBEDDED and is_adapter_folder(model):
        base, lora, adapters = load_adapters(model)
        found = load(base, dtype, mesh, rules)
        merged = dataclasses.replace(found.model, params=merge_into(found.model.params, adapters, lora))
        return Grm(merged, found.tokenizer, str(model))
    found, tokenizer = load_decoder(model, dtype, mesh, rules)
    if found.config.scalar:
        raise ValueError(f"{model} has a scalar head and writes nothing: it guides a judge, as --meta-rm {model}")
    return Grm(found, tokenizer, str(model), demos=model in EMBEDDED)
