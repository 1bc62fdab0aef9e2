"""The programs of a run as shapes alone, ready to be lowered: nothing is allocated, no weight is read.

A recipe has one program that trains, at its largest bucket, and two that judge held-out examples and sample:
- `rl`: the whole step of RL, `prompts_per_step` prompts of `max_prompt_tokens`, all in one bucket;
- `rft`: a step on `batch_tokens` of packed rows;
- `meta_rm`: a step on `batch` judgments of `max_tokens`, half of them prompt; `bradley_terry`: on `batch` pairs of
  responses (a pair RM's step is of the same kind, on `batch` texts);
- `prefill` of one prompt a part of the mesh, and `decode` of `slots` samples, beside all that training holds meanwhile.

Shapes: P prompts, S prompt slots, T tokens, R rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from grm_jax import scores
from grm_jax.buckets import power_of_two
from grm_jax.data.batches import LEAST_TOKENS, Batch
from grm_jax.data.packing import Packed
from grm_jax.models import lora
from grm_jax.models.attention import Keys
from grm_jax.models.config import DecoderConfig
from grm_jax.models.decoder import dtype_of, split_abstract
from grm_jax.recipes import Lora, MetaConfig, PairsConfig, RftConfig, RlConfig
from grm_jax.sampler import Sampling, rollout
from grm_jax.sharding import DECODING, TRAINING, batch_sharding, cache_sharding, parameter_sharding, replicated, rows_of
from grm_jax.spct import baselines, meta, rft_step, rl_step, scalar_step
from grm_jax.spct.scalar_step import Texts
from grm_jax.train.policy import Policy, abstract, make_optimizer

Recipe = RlConfig | RftConfig | MetaConfig | PairsConfig
_RING = 128  # slots of the smallest ring
_EOS = (0,)  # any id: it changes no shape


@dataclasses.dataclass(frozen=True)
class Program:
    """What to lower, what its arguments are by kind, how often its decoding loop runs, and what lies beside it."""

    name: str
    lowered: Callable[[], jax.stages.Lowered]
    arguments: dict[str, Any]  # kind -> pytree of ShapeDtypeStructs
    steps: int
    beside: Any = ()  # a pytree of ShapeDtypeStructs that are no arguments, but held meanwhile


def programs(recipe: Recipe, config: DecoderConfig, mesh: jax.sharding.Mesh) -> list[Program]:
    """The programs of a recipe's run. Raises ValueError for sizes that do not divide over the mesh."""
    scalar = isinstance(recipe, MetaConfig | PairsConfig)
    config = dataclasses.replace(config, scalar=scalar)
    training = _training(recipe, config, mesh)
    if scalar:
        return [training]
    held = {kind: tree for kind, tree in training.arguments.items() if kind != "batch"}
    return [training, *(dataclasses.replace(program, beside=held) for program in _judging(recipe, config, mesh))]


def _policy(recipe: Recipe, config: DecoderConfig, mesh: jax.sharding.Mesh) -> Policy:
    graph, _ = split_abstract(config, mesh)
    return Policy(config, graph, mesh, getattr(recipe, "lora", Lora()), jnp.dtype(recipe.compute_dtype or "bfloat16"))


def _weights(config: DecoderConfig, mesh: jax.sharding.Mesh, dtype: jnp.dtype, rules: Mapping) -> dict[str, Any]:
    _, shapes = split_abstract(config, mesh)
    return {
        name: jax.ShapeDtypeStruct(
            shape, dtype_of(name, dtype), sharding=parameter_sharding(mesh, name, shape, axes, rules)
        )
        for name, (shape, axes) in shapes.items()
    }


def _training(recipe: Recipe, config: DecoderConfig, mesh: jax.sharding.Mesh) -> Program:
    policy, float32 = _policy(recipe, config, mesh), jnp.dtype("float32")
    if policy.lora.rank:
        _, shapes = split_abstract(config, mesh)
        params = {
            name: jax.ShapeDtypeStruct(shape, float32, sharding=parameter_sharding(mesh, name, shape, axes))
            for name, (shape, axes) in lora.axes(shapes, policy.lora).items()
        }
        frozen = _weights(config, mesh, policy.dtype, TRAINING)
    else:
        params = _weights(config, mesh, float32, TRAINING)
        reference = isinstance(recipe, RlConfig) and recipe.kl_coef > 0
        frozen = _weights(config, mesh, policy.dtype, TRAINING) if reference else {}
    updates = getattr(recipe, "updates_per_step", 1)
    optimizer = make_optimizer(recipe.optimizer, recipe.steps * updates)
    state = abstract(params, optimizer, mesh)
    names = ("adapters", "base") if policy.lora.rank else ("weights", "reference")
    kinds = {names[0]: state.params, "optimizer": state.optimizer, names[1]: frozen}
    if isinstance(recipe, RlConfig):
        table = scores.token_table([b"1"] * config.vocab_size)
        step = rl_step.make_step(policy, recipe, optimizer, table, _EOS, state)
        batch = _prompts(recipe, mesh)
        key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
        return Program(
            "rl", lambda: step.lower(state, frozen, batch, key), kinds | {"batch": batch}, recipe.max_new_tokens
        )
    if isinstance(recipe, RftConfig):
        step = rft_step.make_step(policy, recipe, optimizer, state)
        rows = recipe.batch_tokens // recipe.sequence_tokens
        packed = Packed(*(_rows(mesh, (rows, recipe.sequence_tokens), d) for d in (jnp.int32,) * 4))
        return Program("rft", lambda: step.lower(state, frozen, packed), kinds | {"batch": packed}, 1)
    objective = meta.OBJECTIVE if isinstance(recipe, MetaConfig) else baselines.PREFERENCE
    step = scalar_step.make_step(policy, recipe, optimizer, state, objective)
    texts = _texts(recipe, mesh, objective.group)
    name = "meta_rm" if isinstance(recipe, MetaConfig) else "bradley_terry"
    return Program(name, lambda: step.lower(state, texts), kinds | {"batch": texts}, 1)


def _rows(mesh: jax.sharding.Mesh, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    if shape[0] % rows_of(mesh):
        raise ValueError(f"a batch of {shape[0]} rows does not divide over {rows_of(mesh)} parts of the mesh")
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def _prompts(recipe: RlConfig, mesh: jax.sharding.Mesh) -> Batch:
    P, widest = recipe.prompts_per_step, max(recipe.items.n_choices or (4,))
    dtypes = {"labels": jnp.float32, "choice": jnp.bool_}
    wide = {"tokens": (P, power_of_two(recipe.max_prompt_tokens, LEAST_TOKENS)), "labels": (P, widest)}
    names = [field.name for field in dataclasses.fields(Batch) if field.name != "head"]
    head = jax.ShapeDtypeStruct((0,), jnp.int32, sharding=replicated(mesh))
    return Batch(head, **{n: _rows(mesh, wide.get(n, (P,)), dtypes.get(n, jnp.int32)) for n in names})


def _texts(recipe: MetaConfig | PairsConfig, mesh: jax.sharding.Mesh, group: int) -> Texts:
    R, most = (
        recipe.batch * group,
        power_of_two(recipe.max_tokens, LEAST_TOKENS),
    )  # one row's prompt, another one's text
    shapes = ((R, most), (R,), (R, most), (R,), (R,), (R,))
    dtypes = (*(jnp.int32,) * 4, jnp.float32, jnp.float32)
    return Texts(*(_rows(mesh, shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)))


def _cache(policy: Policy, rows: int, slots: int) -> Keys:
    mesh = policy.mesh
    shapes = jax.eval_shape(lambda: rollout.empty(policy.config, mesh, policy.dtype, (rows,), slots))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=cache_sharding(mesh, x.shape[1]) if x.ndim == 4 else batch_sharding(mesh)
        ),
        shapes,
    )


def _judging(recipe: RlConfig | RftConfig, config: DecoderConfig, mesh: jax.sharding.Mesh) -> list[Program]:
    """What measures held-out examples: weights laid out for decoding, prompts of the longest kind, `slots` samples."""
    policy = _policy(recipe, config, mesh)
    weights = _weights(config, mesh, policy.dtype, DECODING)
    longest = getattr(recipe, "max_prompt_tokens", None) or getattr(recipe, "sequence_tokens", 2048)
    parts = rows_of(mesh)
    groups = -(-recipe.slots // parts) * parts
    tokens, lengths = _rows(mesh, (parts, longest)), _rows(mesh, (parts,))
    stored, own = (_cache(policy, groups, slots) for slots in (longest, power_of_two(recipe.max_new_tokens + 1, _RING)))
    clock = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    kinds = {"mask": jnp.int32, "fresh": jnp.bool_, "live": jnp.bool_}
    rows = rollout.Rows(
        **{
            field.name: _rows(
                mesh, (groups, 1) if field.name == "queue" else (groups,), kinds.get(field.name, jnp.int32)
            )
            for field in dataclasses.fields(rollout.Rows)
        }
    )
    shape = jax.ShapeDtypeStruct((groups, 1), jnp.bool_, sharding=batch_sharding(mesh))
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    sampling, ring = Sampling(1.0, eos_ids=_EOS), rollout.Ring(own, clock)
    return [
        Program(
            "prefill",
            lambda: rollout.prefill.lower(policy.judging, weights, None, tokens, lengths),
            {"weights": weights, "batch": (tokens, lengths)},
            1,
        ),
        Program(
            "decode",
            lambda: rollout.decode.lower(
                *(policy.judging, weights, (stored,), ring, rows, key, sampling, None, shape, recipe.max_new_tokens)
            ),
            {"weights": weights, "cache": (stored, own), "batch": rows},
            recipe.max_new_tokens,
        ),
    ]
