"""Log-probabilities of texts under a decoder, for training: packed rows, and samples that share their prompts.

1. `of_samples` runs the head that all prompts share once, each prompt once, and its samples on both: the same three
   parts as the sampler's caches, with a gradient through each. A prompt repeated for each sample would cost G times.
2. `of_packed` runs rows into which several texts are packed; segments keep them apart.
   Both have a sibling that tells, besides, how a mixture's experts were loaded; `load_metrics` makes two numbers of it.
3. Both go through the output head in blocks (`head.log_probs`), and the blocks of the decoder through `remat`.

Shapes: P prompts, G samples a prompt, R = P * G rows, H0 head tokens, S prompt slots, T tokens, B packed rows, L layers
with experts, E experts.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grm_jax.head import log_probs
from grm_jax.models.attention import NOWHERE, Keys
from grm_jax.models.decoder import Cache, Decoder, Remat

REMATS: dict[str, Remat | None] = {
    "none": None,
    "block": jax.checkpoint,
    "dots": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


def of_samples(
    model: Decoder,
    head: Int[Array, "H0"],
    prompts: Int[Array, "P S"],
    lengths: Int[Array, "P"],
    samples: Int[Array, "R T"],
    counts: Int[Array, "R"],
    temperature: float = 1.0,
    remat: Remat | None = None,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Log-probability and entropy of each sampled token, given its prompt and the tokens before it.

    head: what all prompts begin with; prompts [P, S]: the rest of each, `lengths` tokens, padded behind. Rows p * G to
    p * G + G - 1 are samples of prompt p; tokens past `counts` are padding, and their numbers mean nothing.
    """
    return of_samples_with_loads(model, head, prompts, lengths, samples, counts, temperature, remat)[:2]


def of_samples_with_loads(
    model: Decoder,
    head: Int[Array, "H0"],
    prompts: Int[Array, "P S"],
    lengths: Int[Array, "P"],
    samples: Int[Array, "R T"],
    counts: Int[Array, "R"],
    temperature: float = 1.0,
    remat: Remat | None = None,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"], Float[Array, "L E"] | None]:
    """As `of_samples`; and how many sampled tokens each expert got, None for a model without experts."""
    hidden, loads = _behind_prompts(model, head, prompts, lengths, samples, counts, remat)
    return *_through_head(model, hidden, samples, temperature), loads


def scalars_of(
    model: Decoder,
    head: Int[Array, "H0"],
    prompts: Int[Array, "P S"],
    lengths: Int[Array, "P"],
    samples: Int[Array, "R T"],
    counts: Int[Array, "R"],
    remat: Remat | None = None,
) -> Float[Array, "R"]:
    """What a scalar head says of each sample behind its prompt, read at the sample's last token; as `of_samples`."""
    longer = jnp.pad(samples, ((0, 0), (0, 1)))
    hidden, _ = _behind_prompts(model, head, prompts, lengths, longer, counts + 1, remat)
    return model.scalars(jnp.take_along_axis(hidden, counts[:, None, None], axis=1)[:, 0])


def _behind_prompts(
    model: Decoder, head: Array, prompts: Array, lengths: Array, samples: Array, counts: Array, remat: Remat | None
) -> tuple[Float[Array, "R T D"], Float[Array, "L E"] | None]:
    """Hidden states that each sampled token is drawn from, those of the token before it; and these tokens' experts."""
    group, parts = samples.shape[0] // prompts.shape[0], ()
    if head.shape[0]:
        _, cache = model(head[None], jnp.arange(head.shape[0])[None], remat=remat)
        (shared,) = cache.parts
        parts = (Keys(tuple(k[0] for k in shared.k), tuple(v[0] for v in shared.v), shared.positions[0]),)
    slot = jnp.arange(prompts.shape[1])[None]
    last = lengths[:, None] - 1  # the last prompt token is fed with the samples, as the sampler does
    positions = jnp.where(slot < last, head.shape[0] + slot, NOWHERE)
    _, cache = model(prompts, positions, Cache(parts), remat=remat)
    fed = jnp.repeat(jnp.take_along_axis(prompts, jnp.maximum(last, 0), axis=1), group, axis=0)
    inputs = jnp.concatenate([fed, samples[:, :-1]], axis=1)
    step = jnp.arange(samples.shape[1])[None]
    positions = jnp.where(step < counts[:, None], head.shape[0] + jnp.repeat(last, group, axis=0) + step, NOWHERE)
    hidden, cache = model(inputs, positions, cache, remat=remat)
    return hidden, cache.loads


def of_packed(
    model: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    remat: Remat | None = None,
) -> Float[Array, "B T"]:
    """Log-probability of tokens[:, t + 1] given its own segment up to t; of a segment's last token it means nothing.

    positions begin at 0 with each segment; segment 0 is padding.
    """
    return of_packed_with_loads(model, tokens, positions, segments, remat)[0]


def of_packed_with_loads(
    model: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    remat: Remat | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "L E"] | None]:
    """As `of_packed`; and how many tokens each expert got, None for a model without experts."""
    hidden, cache = model(tokens, jnp.where(segments > 0, positions, NOWHERE), segments=segments, remat=remat)
    targets = jnp.concatenate([tokens[:, 1:], jnp.zeros_like(tokens[:, :1])], axis=1)
    return _through_head(model, hidden, targets, 1.0)[0], cache.loads


def load_metrics(loads_LE: Float[Array, "L E"]) -> dict[str, Float[Array, ""]]:
    """How evenly tokens are spread over experts, the means over layers: `expert_load_max`, the fullest expert's tokens as
    a multiple of an even share (1 to E); `expert_idle`, the share of experts that got none."""
    shares = loads_LE / jnp.maximum(loads_LE.mean(axis=1, keepdims=True), 1e-9)
    return {"expert_load_max": shares.max(axis=1).mean(), "expert_idle": (loads_LE == 0).mean()}


def _through_head(
    model: Decoder, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], temperature: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    flat = hidden.reshape(-1, hidden.shape[-1])
    found, entropy = log_probs(flat, model.head_matrix, targets.reshape(-1), model.config.logit_softcap, temperature)
    return found.reshape(targets.shape), entropy.reshape(targets.shape)
