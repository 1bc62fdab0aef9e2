"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), with the latent as its cache.

1. `project` makes of each token its queries, and what is stored of it: the normed latent c of C numbers, of which keys
   and values are products, and one rotated key that all heads share. C + 64 numbers a token and layer in DeepSeek-V2.
2. `for_many`, of prompts and training: keys and values are multiplied out (W_UK c, W_UV c), once a token, and attention
   is that of N heads. A query then meets a key with nope + rope + value products, 320 a head in DeepSeek-V2.
3. `for_few`, of decoding: W_UK is absorbed into the query and W_UV follows the mix, so that all heads attend to the
   stored latents themselves, as one key head whose value is the key: 2 * (C + rope) products, 1,152, and nothing is
   multiplied out for each step again. The key's rotated end is mixed too and cut off: to copy the rest costs more.

Shapes: B, T, R, S, D, N, H as in `decoder`; H = nope + rope of a query, C the latent, V a head's value.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from grm_jax.models.config import DecoderConfig
from grm_jax.models.layers import Form, linear, param, rms_norm, vector
from grm_jax.models.rope import rotate, rotate_interleaved


class LatentAttention(nnx.Module):
    """Queries from the residual stream or a latent of their own; the matrices keep the layout of released checkpoints.

    Only what belongs to a head is split over devices: the two down-projections lie on all of them.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        c, of = config, config.latent
        self.config = config
        heads, head = (c.heads, c.head_dim), ("heads", "head")
        if of.q_rank is None:
            self.q = param(rngs, (*heads, c.dim), (*head, "embed"), c.dim)
        else:
            self.q_a = param(rngs, (of.q_rank, c.dim), (None, "embed"), c.dim)
            self.q_a_norm = vector(1.0, (of.q_rank,), (None,))
            self.q_b = param(rngs, (*heads, of.q_rank), (*head, None), of.q_rank)
        self.kv_a = param(rngs, (of.kv_rank + of.rope_dim, c.dim), (None, "embed"), c.dim)
        self.kv_a_norm = vector(1.0, (of.kv_rank,), (None,))
        self.kv_b = param(rngs, (c.heads, self._nope + of.value_dim, of.kv_rank), (*head, None), of.kv_rank)
        self.o = param(rngs, (c.dim, c.heads, of.value_dim), ("embed", *head), c.heads * of.value_dim)

    @property
    def _nope(self) -> int:
        """Numbers of a head's query and key that are not rotated, the first ones."""
        return self.config.head_dim - self.config.latent.rope_dim

    def project(self, x_DR: jax.Array, angles: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Queries [R, N, 1, H] scaled, their ends rotated; the latents [R, 1, C + rope] in the weights' dtype."""
        c, of = self.config, self.config.latent
        turn = rotate_interleaved if of.interleaved else rotate
        if of.q_rank is None:
            q = linear(self.q[...], x_DR)
        else:
            q = linear(self.q_b[...], rms_norm(linear(self.q_a[...], x_DR), self.q_a_norm[...], of.norm_eps, 0.0))
        q = jnp.concatenate([q[:, : self._nope], turn(q[:, self._nope :], angles)], axis=1) * c.query_scale
        kv = linear(self.kv_a[...], x_DR)
        latent = rms_norm(kv[: of.kv_rank], self.kv_a_norm[...], of.norm_eps, 0.0)
        stored = jnp.concatenate([latent, turn(kv[None, of.kv_rank :], angles)[0]])
        return q.transpose(2, 0, 1)[:, :, None], stored.astype(self.kv_a[...].dtype).T[:, None]

    def for_many(self) -> Form:
        """Keys and values multiplied out."""

        def keys(stored: jax.Array) -> tuple[jax.Array, jax.Array]:
            rank, w_NHC = self.config.latent.kv_rank, self.kv_b[...]
            out = jnp.einsum("...SC,NHC->...NSH", stored[..., 0, :, :rank], w_NHC, preferred_element_type=jnp.float32)
            out = out.astype(stored.dtype)
            shared = jnp.broadcast_to(stored[..., rank:], (*out.shape[:-1], stored.shape[-1] - rank))
            return jnp.concatenate([out[..., : self._nope], shared], axis=-1), out[..., self._nope :]

        return Form(keys=keys)

    def for_few(self) -> Form:
        """Attention to the latents themselves."""

        def queries(q_RNQH: jax.Array) -> jax.Array:
            w_NHC, q = self.kv_b[:, : self._nope], q_RNQH[:, :, 0]
            absorbed = jnp.einsum(
                "RNH,NHC->RNC", q[..., : self._nope].astype(w_NHC.dtype), w_NHC, preferred_element_type=jnp.float32
            )
            return jnp.concatenate([absorbed, q[..., self._nope :]], axis=-1)[:, None]

        def mixed(mixed_RKNH: jax.Array) -> jax.Array:
            w_NVC, mix = self.kv_b[:, self._nope :], mixed_RKNH[:, 0, :, : self.config.latent.kv_rank]
            return jnp.einsum("RNC,NVC->RNV", mix.astype(w_NVC.dtype), w_NVC, preferred_element_type=jnp.float32)

        return Form(queries, lambda stored: (stored, stored), mixed)

    def output(self, mixed: jax.Array) -> jax.Array:
        """Heads' values, N x V numbers a token [R, ...], back to the model's width: [D, R]."""
        return linear(self.o[...].reshape(self.config.dim, -1), mixed.reshape(mixed.shape[0], -1).T)
