"""Attention of many new tokens by the hardware's own kernels, which hold no scores in memory.

1. `select` is the one switch, `kernels_for` what it comes to on a mesh: splash attention on TPUs, cuDNN's on one Hopper
   GPU, where it was measured (docs/LOG.md), plain XLA elsewhere. On other GPUs, or several, cuDNN's has to be asked for.
2. `fold` makes one sequence of queries and one of keys of the parts that `attention.attend` takes apart: samples of one
   prompt lie behind each other in the row of their prompt, so that its keys stand there once.
3. `splash` and `cudnn` answer with a function for the layers of a window, or None for a call that they do not cover,
   which is then computed by `attention.attend`.

What may be seen is what positions and segments say, as everywhere. Splash attention wants the greater part of that when
a program is made: that cached parts stand before all new tokens, that these stand in order, and that texts have no gaps
between their tokens, which is how every caller lays them out. What is known later, padding and packed texts, goes by
segment ids.

Shapes: B, T, K, Q, H, V as in `attention`; P rows after folding, G = B / P samples in each, L = G * T queries, S keys.
Sources: splash attention, `jax.experimental.pallas.ops.tpu.splash_attention`; cuDNN, `jax.nn.dot_product_attention`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from grm_jax.config import Kernels
from grm_jax.log import logger
from grm_jax.models.attention import NOWHERE, Owner
from grm_jax.sharding import ROWS, TRAINING

Chosen = Kernels | Literal["interpreted"]
Attend = Callable[[jax.Array, Sequence[tuple[jax.Array, jax.Array]]], jax.Array]

_LEAST = 128  # queries from which on a kernel is worth its call; a block's least size too
_BLOCKS = (512, 256, 128)
_selected: list[Chosen] = ["auto"]


def select(kernels: Chosen) -> None:
    """Choose the kernels of every model that is built from now on; "auto" at first.

    "auto": those of the device; "plain": XLA's own operations; "splash": on a TPU; "interpreted": splash attention on
    any device, slowly, for tests; "cudnn": on a GPU.
    """
    _selected[:] = [kernels]


def kernels_for(devices: Sequence[jax.Device]) -> Chosen:
    """What is selected, for a mesh of these devices, all alike. Raises ValueError where they have no such kernel."""
    (kernels,), first = _selected, devices[0]
    if kernels == "auto":
        hopper = first.platform == "gpu" and str(getattr(first, "compute_capability", "")).startswith("9.")
        return "splash" if first.platform == "tpu" else "cudnn" if hopper and len(devices) == 1 else "plain"
    homes = {"splash": "tpu", "cudnn": "gpu"}
    if homes.get(kernels, first.platform) != first.platform:
        raise ValueError(
            f"kernels = {kernels!r} on {first.platform}: it is a kernel of {homes[kernels]} devices; use auto or plain"
        )
    return kernels


@dataclasses.dataclass(frozen=True)
class Fold:
    """How the parts of a call lie in one sequence of queries and one of keys.

    before: slots of cached keys; whole: those of them that every query may see, which are full.
    """

    rows: int  # P
    samples: int  # G
    tokens: int  # T
    before: int
    whole: int
    queries: jax.Array  # int32 [P, L]: a segment, 0 for padding
    keys: jax.Array  # int32 [P, S]
    query_positions: jax.Array  # int32 [P, L]
    key_positions: jax.Array  # int32 [P, S]

    def of_queries(self, q: jax.Array) -> jax.Array:
        """[B, T, K, Q, H] as [P, K * Q, L, H]."""
        _, tokens, heads, shared, size = q.shape
        q = q.reshape(self.rows, self.samples * tokens, heads * shared, size)
        return q.swapaxes(1, 2)

    def of_keys(self, parts: Sequence[jax.Array]) -> jax.Array:
        """Cached parts [K, S, H] or [P, K, S, H], and the new tokens' [B, K, T, H], as [P, K, S, H]."""
        *cached, new = parts
        heads, _, size = new.shape[1:]
        new = new.reshape(self.rows, self.samples, heads, self.tokens, size).swapaxes(1, 2)
        new = new.reshape(self.rows, heads, -1, size)
        cached = [jnp.broadcast_to(part, (self.rows, *part.shape[-3:])) for part in cached]
        return jnp.concatenate([*cached, new], axis=2)

    def back(self, mixed: jax.Array, key_heads: int) -> jax.Array:
        """[P, K * Q, L, V] as [B, T, K, Q, V], float32."""
        mixed = mixed.swapaxes(1, 2).astype(jnp.float32)
        return mixed.reshape(self.rows * self.samples, self.tokens, key_heads, -1, mixed.shape[-1])

    def same_sample(self) -> np.ndarray:
        """Which new keys belong to a query's own sample: bool [L, L]."""
        sample = np.repeat(np.arange(self.samples), self.tokens)
        return sample[:, None] == sample[None]


def fold(
    positions: jax.Array, owners: Sequence[Owner], cached: Sequence[jax.Array], segments: jax.Array | None
) -> Fold | None:
    """The fold of a call, or None for one whose cached parts belong to different numbers of rows, or are segmented.

    positions [B, T] and segments [B, T] of the new tokens; cached: the positions of each cached part, [S] or [P, S].
    """
    count, tokens = positions.shape
    groups = {p.shape[0] for p, owner in zip(cached, owners, strict=False) if owner is Owner.ROW}
    if len(groups) > 1 or (cached and segments is not None):
        return None
    rows = groups.pop() if groups else count
    queries = positions.reshape(rows, -1)
    cached = [jnp.broadcast_to(p, (rows, p.shape[-1])) for p in cached]
    own = jnp.where(queries > NOWHERE, 1 if segments is None else segments + 1, 0)  # 0 is padding
    return Fold(
        rows=rows,
        samples=count // rows,
        tokens=tokens,
        before=sum(p.shape[-1] for p in cached),
        whole=sum(p.shape[-1] for p, owner in zip(cached, owners, strict=False) if owner is Owner.ALL),
        queries=own,
        keys=jnp.concatenate([*((p > NOWHERE).astype(jnp.int32) for p in cached), own], axis=1),
        query_positions=queries,
        key_positions=jnp.concatenate([*cached, queries], axis=1),
    )


def _up(size: int) -> int:
    """A number of slots that blocks divide: the next multiple of the least block, or of twice that where it is long."""
    step = _BLOCKS[-1] if size <= _BLOCKS[0] else _BLOCKS[-2]
    return -(-size // step) * step


def _block(size: int) -> int:
    return next(block for block in _BLOCKS if size % block == 0)


def sight(layout: Fold, window: int | None, queries: int, keys: int) -> np.ndarray:
    """Which of `keys` slots each of `queries` slots may see as far as the layout says it: bool [queries, keys].

    Slots past the layout's own are padding; a query of them sees the first key, since it has to see one.
    """
    count, before = layout.samples * layout.tokens, layout.before
    at = before + np.arange(count) % layout.tokens
    key_at = np.concatenate([np.arange(before), at])
    seen = key_at[None] <= at[:, None]
    seen[:, before:] &= layout.same_sample()
    if window is not None:
        seen &= key_at[None] > at[:, None] - window
    whole = np.zeros((queries, keys), bool)
    whole[:count, : before + count] = seen
    whole[count:, 0] = True
    return whole


def splash(
    layout: Fold,
    window: int | None,
    softcap: float | None,
    heads: tuple[int, int],
    mesh: jax.sharding.Mesh | None,
    interpret: bool = False,
) -> Attend | None:
    """Splash attention for a call's layers of a window. heads: of queries and of keys, K * Q and K.

    None where it does not cover the call: few queries, key heads that the mesh splits unevenly, or a window that a
    query may look beyond while cached parts have padding, so that distances are known when it runs only.
    """
    # Imported where it is used: a CPU never needs Pallas.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    sizes = {} if mesh is None else dict(mesh.shape)
    split = sizes.get(TRAINING["kv_heads"], 1)
    queries, keys = layout.samples * layout.tokens, layout.keys.shape[1]
    if queries < _LEAST or heads[1] % split:
        return None
    if window is not None and layout.before + layout.tokens <= window:
        window = None  # it reaches over everything
    if window is not None and layout.before > layout.whole:
        return None
    longer = (_up(queries), _up(keys))
    if layout.samples > 1:
        mask: masks.Mask = masks.NumpyMask(sight(layout, window, *longer))
    elif window is None:
        mask = masks.CausalMask(longer, offset=layout.before)
    else:
        mask = masks.LocalMask(longer, (window - 1, 0), offset=layout.before)
    q_block, k_block = map(_block, longer)
    attention = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * (heads[0] // split)),
        block_sizes=kernel.BlockSizes(
            **{f"block_q{phase}": q_block for phase in ("", "_dkv", "_dq")},
            **{f"block_kv{phase}": k_block for phase in ("", "_dkv", "_dq")},
        ),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    of_queries = _padded(layout.queries, longer[0], axis=1)
    of_keys = _padded(layout.keys, longer[1], axis=1)

    def rows(attention: Callable, q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> jax.Array:
        return jax.vmap(lambda q, k, v, *ids: attention(q, k, v, kernel.SegmentIds(*ids)))(q, k, v, *ids)

    if mesh is not None and mesh.size > 1:
        parts = [axis for axis in ROWS if sizes[axis] > 1]
        over = tuple(parts) if layout.rows % np.prod([sizes[axis] for axis in parts], dtype=int) == 0 else ()
        of_rows = PartitionSpec(over or None)
        of_heads = PartitionSpec(over or None, TRAINING["kv_heads"] if split > 1 else None)
        specs = (PartitionSpec(), of_heads, of_heads, of_heads, of_rows, of_rows)
        rows = jax.shard_map(rows, mesh=mesh, in_specs=specs, out_specs=of_heads, check_vma=False)

    def attend(q: jax.Array, pairs: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
        k, v = (layout.of_keys(side) for side in zip(*pairs, strict=True))
        q = _padded(layout.of_queries(q).astype(k.dtype), longer[0], axis=2)
        k, v = (_padded(side, longer[1], axis=2) for side in (k, v))
        return layout.back(rows(attention, q, k, v, of_queries, of_keys)[:, :, :queries], heads[1])

    return attend


@functools.cache
def _say_plain(reason: str) -> None:
    """Say once that what was asked for is not what is run; nothing was asked for by "auto"."""
    logger.warning("kernels = cudnn: it does not cover %s; plain attention is run there", reason)


def _padded(x: jax.Array, size: int, axis: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def cudnn(
    layout: Fold,
    window: int | None,
    softcap: float | None,
    sizes: tuple[int, int],
    dtype: jnp.dtype,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Attend | None:
    """cuDNN's attention for a call's layers of a window; masks go in whole, [P, 1, L, S]. sizes: H and V.

    None where it does not cover the call, with a word of why but for few queries: soft-capped scores, float32, or heads
    whose values have another size, no multiple of 8, or more than 128. implementation: "xla" computes the same by plain
    operations, on any device.
    """
    queries = layout.samples * layout.tokens
    if queries < _LEAST:
        return None
    halves = dtype in (jnp.bfloat16, jnp.float16) or implementation == "xla"
    lacks = {
        "soft-capped scores": softcap is not None,
        f"{jnp.dtype(dtype).name} (give --dtype bfloat16)": not halves,
        f"heads of {sizes[0]} numbers with values of {sizes[1]}": sizes[0] != sizes[1],
        f"heads of {sizes[0]} numbers": sizes[0] % 8 > 0 or sizes[0] > 128,
    }
    if reason := next((reason for reason, lack in lacks.items() if lack), None):
        if _selected != ["auto"]:
            _say_plain(reason)
        return None
    age = layout.query_positions[:, :, None] - layout.key_positions[:, None]
    seen = (age >= 0) & (layout.queries[:, :, None] == layout.keys[:, None]) & (layout.keys[:, None] > 0)
    if window is not None:
        seen &= age < window
    seen &= jnp.asarray(np.pad(layout.same_sample(), ((0, 0), (layout.before, 0)), constant_values=True))[None]
    even = (queries + queries % 2, layout.keys.shape[1] + layout.keys.shape[1] % 2)  # what its backward pass takes
    seen = _padded(_padded(seen, even[0], axis=1), even[1], axis=2)[:, None]

    def attend(q: jax.Array, pairs: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
        k, v = (layout.of_keys(side) for side in zip(*pairs, strict=True))
        q = _padded(layout.of_queries(q).astype(k.dtype), even[0], axis=2)
        k, v = (_padded(side, even[1], axis=2).swapaxes(1, 2) for side in (k, v))
        mixed = jax.nn.dot_product_attention(
            q.swapaxes(1, 2), k, v, mask=seen, scale=1.0, implementation=implementation
        )
        return layout.back(mixed.swapaxes(1, 2)[:, :, :queries], k.shape[2])

    return attend
