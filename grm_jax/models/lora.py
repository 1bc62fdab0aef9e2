"""Low-rank adapters (arXiv 2106.09685): a matrix W of a layer becomes W + alpha / rank * B A, and only A and B are trained.

1. `axes` lists the adapters of a model with their shapes and logical axes, `init` draws them: A at random, B zero;
2. `merge` gives the weights that compute, as a function of the frozen base and the adapters: gradients flow through it.

Merged, and not two small products beside each layer's own: a training step needs a copy of the policy in the compute
dtype for decoding anyway, the product costs 2 * rank FLOPs a weight, and every family's decoder works unchanged.

Names: the adapters of "layers.0.attention.q" are "layers.0.attention.q.lora_a" and "layers.0.attention.q.lora_b".
Shapes: O outputs and I inputs of the flattened matrix (q: I = D, O = N * H; o: I = N * H, O = D), R rank. The matrices of
E experts are one array [E, O, I], and so are their adapters: A [E, R, I], B [E, O, R].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grm_jax.datatypes import stable_hash
from grm_jax.recipes import Lora

Shapes = Mapping[str, tuple[tuple[int, ...], tuple[str | None, ...]]]  # as `decoder.split_abstract` gives them

# How many leading axes of a layer's matrix are outputs; the others are inputs.
_OUTPUT_AXES = {"q": 2, "k": 2, "v": 2, "q_a": 1, "q_b": 2, "kv_a": 1, "kv_b": 2, "o": 1, "gate": 1, "up": 1, "down": 1}


def _parts(name: str, axes: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """A matrix's axes: one that counts experts, or none; its outputs; its inputs."""
    stacked = int(".experts." in name)
    cut = stacked + _OUTPUT_AXES[name.rpartition(".")[2]]
    return axes[:stacked], axes[stacked:cut], axes[cut:]


def matrices(shapes: Mapping[str, object], lora: Lora) -> list[str]:
    """The parameters that get an adapter: the target matrices of every layer.

    Raises ValueError for a target that the model does not have, unless all there are were meant (the default).
    """
    kinds = {name.rpartition(".")[2] for name in shapes if name.startswith("layers.")}
    absent = [target for target in lora.targets if target not in kinds]
    if absent and (lora.targets != Lora().targets or len(absent) == len(lora.targets)):
        known = ", ".join(sorted(kinds & _OUTPUT_AXES.keys()))
        raise ValueError(f"lora.targets has {', '.join(absent)}, which this model has not; it has {known}")
    return [name for name in shapes if name.startswith("layers.") and name.rpartition(".")[2] in lora.targets]


def axes(shapes: Shapes, lora: Lora) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Shape and logical axes of every adapter, in the form of `shapes`.

    Where the matrix's inputs, or its outputs, are one axis (embed, mlp), that side of the adapter is split as the
    matrix is; several flattened axes (heads) and the rank lie on every device.
    """
    found = {}
    for name in matrices(shapes, lora):
        shape, logical = shapes[name]
        stack, out, inner = _parts(name, shape)
        outputs, inputs = (part[0] if len(part) == 1 else None for part in _parts(name, logical)[1:])
        experts = _parts(name, logical)[0]
        found[f"{name}.lora_a"] = (*stack, lora.rank, math.prod(inner)), (*experts, None, inputs)
        found[f"{name}.lora_b"] = (*stack, math.prod(out), lora.rank), (*experts, outputs, None)
    return found


def init(shapes: Shapes, lora: Lora, key: jax.Array) -> dict[str, jax.Array]:
    """Adapters to start from, float32: A uniform within +-1 / sqrt(I) (PEFT's default, Kaiming's with a = sqrt(5)), B zero.

    An adapter is a function of the key and its own name, whichever others there are.
    """
    found = {}
    for name, (shape, _) in axes(shapes, lora).items():
        if name.endswith(".lora_b"):
            found[name] = jnp.zeros(shape, jnp.float32)
            continue
        bound = shape[-1] ** -0.5
        drawn = jax.random.fold_in(key, stable_hash(name))
        found[name] = jax.random.uniform(drawn, shape, jnp.float32, -bound, bound)
    return found


def add(w: jax.Array, a_RI: Float[Array, "*E R I"], b_OR: Float[Array, "*E O R"], scale: float) -> jax.Array:
    """w + scale * b a, in w's shape and dtype; product and sum in float32. A zero product changes no bit of w."""
    product = jnp.matmul(b_OR * scale, a_RI, precision="highest", preferred_element_type=jnp.float32)
    # w - (0 - x) and not w + x: a weight of -0.0 stays -0.0 where x is a zero of either sign.
    return (w.astype(jnp.float32) - (0.0 - product.reshape(w.shape))).astype(w.dtype)


def merge(base: Mapping[str, jax.Array], adapters: Mapping[str, jax.Array], lora: Lora) -> dict[str, jax.Array]:
    """The base's parameters with the adapters in them, each in the base's dtype; those without an adapter are the base's.

    Differentiable with respect to `adapters`. Raises ValueError for an adapter of a matrix that the base has not, or
    whose shape or twin does not fit.
    """
    check(base, adapters)
    merged = dict(base)
    for name in (key.removesuffix(".lora_a") for key in adapters if key.endswith(".lora_a")):
        merged[name] = add(base[name], adapters[f"{name}.lora_a"], adapters[f"{name}.lora_b"], lora.alpha / lora.rank)
    return merged


def check(base: Mapping[str, jax.Array], adapters: Mapping[str, jax.Array]) -> None:
    """Raise ValueError unless every adapter is A or B of a base's matrix, with its twin, in shapes that fit it."""
    for key in adapters:
        name, _, side = key.rpartition(".")
        pair = [adapters.get(f"{name}.{twin}") for twin in ("lora_a", "lora_b")]
        known = side in ("lora_a", "lora_b") and name in base and name.rpartition(".")[2] in _OUTPUT_AXES
        ndim = 3 if ".experts." in name else 2
        if not known or any(array is None or array.ndim != ndim for array in pair):
            raise ValueError(
                f"adapter {key}: it must be lora_a or lora_b of one of the model's matrices, with the other beside it; "
                "these adapters are of another model, or incomplete"
            )
        shape = base[name].shape
        stack, out, inner = _parts(name, shape)
        rank = pair[0].shape[-2]
        wanted = [(*stack, rank, math.prod(inner)), (*stack, math.prod(out), rank)]
        if [array.shape for array in pair] != wanted:
            raise ValueError(
                f"adapters of {name}: lora_a is {pair[0].shape} and lora_b {pair[1].shape}, but the matrix is {shape}; "
                "these adapters are of another model"
            )
