"""Log-probabilities through the output head, without ever holding the logits of all tokens over the whole vocabulary.

1. Forward: for each block of the vocabulary, for each block of tokens, logits of [T, B] update three running numbers a
   token: the largest logit m, s = sum exp(z - m), and a = sum exp(z - m) (z - m); the target's logit is picked on the way.
   log p(target) = z_target - m - log s, and the entropy is log s - a / s.
2. Backward: the same blocks are computed again. With g the cotangent of log p, dz = g (onehot(target) - softmax(z)).
   The vocabulary is the outer loop here too, so a block of the head's gradient is added up over all tokens in float32 and
   written once, in the head's dtype: no second copy of the head's size in float32 exists.
3. Blocks are strided (block b of B has the entries b, b + B, b + 2 B, ...), so an array that is spread over devices is
   spread in each of its blocks too, and no device waits while another's part is worked on.

The number of vocabulary blocks is one that divides V where there is one; else the head is copied with zero rows added.

Shapes: N tokens, D model, V vocabulary; C blocks of T tokens, B blocks of W vocabulary entries.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LEAST = float(jnp.finfo(jnp.float32).min)  # a logit of no probability, finite so that 0 times it is 0


def log_probs(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    softcap: float | None,
    temperature: float = 1.0,
    tokens: int = 1024,
    vocab: int = 2048,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Log-probability of each target, and the entropy of the distribution it is drawn from, in nats, float32.

    The distribution is softmax(z / temperature), z = cap * tanh(x / cap) where there is a `softcap`, x = head @ hidden in
    the head's dtype, accumulated in float32. Differentiable in hidden and head; the entropy is for metrics and has no
    gradient. A target outside of the vocabulary gives a finite number that means nothing: its cotangent has to be 0.
    tokens, vocab: the most of either in a block; memory is a few times tokens * vocab * 4 bytes.
    Raises ValueError for a temperature or softcap that is not above 0, and for blocks of nothing.
    """
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: it has to be above 0; greedy choices have no distribution")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap = {softcap}: it has to be above 0; None for no cap")
    if min(tokens, vocab) < 1:
        raise ValueError(f"blocks of {tokens} tokens x {vocab} vocabulary entries: both have to be at least 1")
    return _log_probs(hidden, head, targets, softcap, temperature, tokens, vocab)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _log_probs(hidden, head, targets, softcap, temperature, tokens, vocab):
    return _forward(hidden, head, targets, softcap, temperature, tokens, vocab)[0]


def _forward(hidden, head, targets, softcap, temperature, tokens, vocab):
    """((log-probabilities, entropy), residuals); residuals hold log sum exp(z) of each token."""
    rows, count = head.shape[0], hidden.shape[0]
    pieces = -(-count // tokens)
    head_WBD = _parted(head, _vocabulary_blocks(rows, vocab))
    blocks = head_WBD.shape[1]
    h_CTD, target_CT = (_parted(x, pieces).swapaxes(0, 1) for x in (hidden, targets))

    def of_block(stats_CT, b):
        w_WD, id_W, real_W = _block(head_WBD, b, rows)

        def of_tokens(_, given):
            h_TD, target_T, top, total, mixed, chosen = given
            z_TW = _logits(h_TD, w_WD, softcap, temperature)[0]
            hit_TW = target_T[:, None] == id_W[None]
            chosen += jnp.sum(jnp.where(hit_TW, z_TW, 0.0), axis=1)
            if real_W is not None:
                z_TW = jnp.where(real_W[None], z_TW, _LEAST)
            higher = jnp.maximum(top, z_TW.max(axis=1))
            above_TW = z_TW - higher[:, None]
            p_TW = jnp.exp(above_TW)
            kept = jnp.exp(top - higher)
            mixed = kept * (mixed + total * (top - higher)) + jnp.sum(p_TW * above_TW, axis=1)
            return None, (higher, kept * total + p_TW.sum(axis=1), mixed, chosen)

        return jax.lax.scan(of_tokens, None, (h_CTD, target_CT, *stats_CT))[1], None

    zero_CT = jnp.zeros(target_CT.shape, jnp.float32)
    stats_CT = (jnp.full_like(zero_CT, _LEAST), zero_CT, zero_CT, zero_CT)
    stats_CT, _ = jax.lax.scan(of_block, stats_CT, jnp.arange(blocks))
    top, total, mixed, chosen = (_joined(x.swapaxes(0, 1), count) for x in stats_CT)
    log_total = jnp.log(total)
    found = (chosen - top - log_total, log_total - mixed / total)
    return found, (hidden, head, targets, top + log_total)


def _backward(softcap, temperature, tokens, vocab, residuals, cotangents):
    hidden, head, targets, log_sum = residuals
    g, _ = cotangents
    rows, count = head.shape[0], hidden.shape[0]
    pieces = -(-count // tokens)
    head_WBD = _parted(head, _vocabulary_blocks(rows, vocab))
    blocks = head_WBD.shape[1]
    given_CT = tuple(_parted(x, pieces).swapaxes(0, 1) for x in (hidden, targets, log_sum, g))

    def of_block(carry, b):
        d_hidden_CTD, d_head_WBD = carry
        w_WD, id_W, real_W = _block(head_WBD, b, rows)

        def of_tokens(d_w_WD, given):
            h_TD, target_T, log_sum_T, g_T, d_h_TD = given
            z_TW, slope_TW = _logits(h_TD, w_WD, softcap, temperature)
            p_TW = jnp.exp(z_TW - log_sum_T[:, None])
            if real_W is not None:
                p_TW = jnp.where(real_W[None], p_TW, 0.0)
            hit_TW = target_T[:, None] == id_W[None]
            d_TW = (g_T[:, None] * slope_TW * (hit_TW - p_TW)).astype(w_WD.dtype)
            d_h_TD += jax.lax.optimization_barrier(
                jnp.einsum("TW,WD->TD", d_TW, w_WD, preferred_element_type=jnp.float32)
            )
            d_w_WD += jnp.einsum("TW,TD->WD", d_TW, h_TD.astype(w_WD.dtype), preferred_element_type=jnp.float32)
            return d_w_WD, d_h_TD

        d_w_WD, d_hidden_CTD = jax.lax.scan(of_tokens, jnp.zeros(w_WD.shape, jnp.float32), (*given_CT, d_hidden_CTD))
        bits_WD = jax.lax.bitcast_convert_type(d_w_WD.astype(head.dtype), bits)
        d_head_WBD = jax.lax.dynamic_update_index_in_dim(d_head_WBD, bits_WD, b, axis=1)
        return (d_hidden_CTD, d_head_WBD), None

    # As bits: XLA on CPU would write a block into a bfloat16 array by converting all of it to float32 and back.
    bits = jnp.uint16 if head.dtype.itemsize == 2 else head.dtype
    zeros = jnp.zeros(given_CT[0].shape, jnp.float32), jnp.zeros(head_WBD.shape, bits)
    (d_hidden_CTD, d_head_WBD), _ = jax.lax.scan(of_block, zeros, jnp.arange(blocks))
    d_head_WBD = jax.lax.bitcast_convert_type(d_head_WBD, head.dtype)
    d_hidden = _joined(d_hidden_CTD.swapaxes(0, 1), count).astype(hidden.dtype)
    return d_hidden, _joined(d_head_WBD, rows), None


_log_probs.defvjp(_forward, _backward)


def _logits(h_TD, w_WD, softcap, temperature):
    """Logits [T, W] of a block, and their derivative with respect to the product h w."""
    # The barriers here and in the backward pass keep transpositions of the hidden states out of the products: XLA's CPU
    # backend would fold them in, and has no such product of bfloat16 numbers.
    h_TD = jax.lax.optimization_barrier(h_TD.astype(w_WD.dtype))
    x = jnp.einsum("TD,WD->TW", h_TD, w_WD, preferred_element_type=jnp.float32)
    if softcap is None:
        return x / temperature, jnp.full_like(x, 1 / temperature)
    bent = jnp.tanh(x / softcap)
    return softcap * bent / temperature, (1 - bent * bent) / temperature


def _vocabulary_blocks(rows: int, most: int) -> int:
    """How many blocks of at most `most` entries: the fewest that divide `rows`, or the fewest where that made them tiny."""
    fewest = -(-rows // most)
    dividing = (blocks for blocks in range(fewest, min(4 * fewest, rows) + 1) if rows % blocks == 0)
    return next(dividing, fewest)


def _parted(x, blocks):
    """[N, ...] to [ceil(N / blocks), blocks, ...], zeros behind; block b is [:, b], every blocks-th entry."""
    padding = -x.shape[0] % blocks
    if padding:
        x = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(-1, blocks, *x.shape[1:])


def _joined(x, count):
    """The inverse of `_parted`: the first `count` of [T, blocks, ...] as [count, ...]."""
    return x.reshape(-1, *x.shape[2:])[:count]


def _block(head_WBD, b, rows):
    """Block b of the head [W, D], its ids [W], and which of them the vocabulary has, None for all."""
    width, blocks = head_WBD.shape[:2]
    id_W = jnp.arange(width) * blocks + b
    real_W = None if width * blocks == rows else id_W < rows
    return jax.lax.dynamic_index_in_dim(head_WBD, b, axis=1, keepdims=False), id_W, real_W
