"""Log-probabilities of texts under a decoder, for training: packed rows, and samples that share their prompts.

1. `of_samples` runs the head that all prompts share once, each prompt once, and its samples on both: the same three
   parts as the sampler's caches, with a gradient through each. A prompt repeated for each sample would cost G times.
2. `of_packed` runs rows into which several texts are packed; segments keep them apart.
3. Both go through the output head in blocks (`head.log_probs`), and the blocks of the decoder through `remat`.

Shapes: P prompts, G samples a prompt, R = P * G rows, H0 head tokens, S prompt slots, T tokens, B packed rows.
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
    hidden = _behind_prompts(model, head, prompts, lengths, samples, counts, remat)
    return _through_head(model, hidden, samples, temperature)


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
    hidden = _behind_prompts(model, head, prompts, lengths, longer, counts + 1, remat)
    return model.scalars(jnp.take_along_axis(hidden, counts[:, None, None], axis=1)[:, 0])


def _behind_prompts(
    model: Decoder, head: Array, prompts: Array, lengths: Array, samples: Array, counts: Array, remat: Remat | None
) -> Float[Array, "R T D"]:
    """Hidden states that each sampled token is drawn from: of the token before it."""
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
    return model(inputs, positions, cache, remat=remat)[0]


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
    hidden, _ = model(tokens, jnp.where(segments > 0, positions, NOWHERE), segments=segments, remat=remat)
    targets = jnp.concatenate([tokens[:, 1:], jnp.zeros_like(tokens[:, :1])], axis=1)
    return _through_head(model, hidden, targets, 1.0)[0]


def _through_head(
    model: Decoder, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], temperature: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    flat = hidden.reshape(-1, hidden.shape[-1])
    found, entropy = log_probs(flat, model.head_matrix, targets.reshape(-1), model.config.logit_softcap, temperature)
    return found.reshape(targets.shape), entropy.reshape(targets.shape)
