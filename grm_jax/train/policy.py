"""What is trained and what is not: a policy's weights, their working copy, and the optimizer.

1. All weights: `State.params` are float32 masters; `frozen` is the reference policy's copy, where a KL needs one.
2. LoRA: `State.params` are the adapters; `frozen` is the base, which is the reference policy too: no second copy.
3. `working` is the copy in the compute dtype that is differentiated: a cast, or base plus adapters. `decoding` is that
   copy laid out for sampling: a decoding loop would gather weights that `fsdp` splits once a token.

A step donates the state and leaves `frozen` alone, so checkpoints hold what changes and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from grm_jax.models import lora
from grm_jax.models.config import DecoderConfig
from grm_jax.models.decoder import Params, dtype_of, scanned, split_abstract
from grm_jax.recipes import Lora, Optimizer
from grm_jax.sharding import DECODING, parameter_sharding, replicated

# By default XLA orders a program for the CPU by how much of it can run side by side: what `remat` computes again is then
# computed early and held, and saves nothing (docs/LOG.md).
_CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step changes."""

    params: Params  # float32: all weights, or the adapters
    optimizer: optax.OptState
    step: Int[Array, ""]  # steps done


@dataclasses.dataclass(frozen=True)
class Policy:
    """A decoder in training: its numbers, its graph, the mesh, and what of it is trained in which dtype."""

    config: DecoderConfig
    graph: nnx.GraphDef
    mesh: jax.sharding.Mesh
    lora: Lora
    dtype: jnp.dtype  # of the working copy

    @functools.cached_property
    def judging(self) -> nnx.GraphDef:
        """The graph of a judge over `decoding`'s weights: layers one by one, since a loop would stack them anew."""
        return split_abstract(self.config, self.mesh, scans=False)[0]

    @property
    def scans(self) -> bool:
        """Whether prompts and training go through the layers as a loop."""
        return scanned(self.config, self.mesh)

    def working(self, params: Params, frozen: Params) -> Params:
        """The weights that compute, in the compute dtype; differentiable with respect to `params`."""
        if self.lora.rank:
            return lora.merge(frozen, params, self.lora)
        return cast(params, self.dtype)

    def decoding(self, params: Params, frozen: Params) -> Params:
        """The weights that sample, in the compute dtype, whole along the mesh's `fsdp` axis; inside or outside of jit."""
        return self.working(params, frozen) if self.mesh.size == 1 else self._laid_out(params, frozen)

    @functools.cached_property
    def _laid_out(self) -> Callable[[Params, Params], Params]:
        """`working`, laid out for decoding: one function, which is compiled once."""
        _, shapes = split_abstract(self.config, self.mesh)
        places = {name: parameter_sharding(self.mesh, name, *shapes[name], DECODING) for name in shapes}
        return jax.jit(self.working, out_shardings=places)


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """The same weights in another dtype."""
    return {name: value.astype(dtype_of(name, dtype)) for name, value in params.items()}


def make_schedule(config: Optimizer, updates: int) -> optax.Schedule:
    """The learning rate of each update: linear warm-up, then constant or half a cosine down to 0 at the last one."""
    rest = max(1, updates - config.warmup_steps)
    after = (
        optax.cosine_decay_schedule(config.learning_rate, rest)
        if config.schedule == "cosine"
        else optax.constant_schedule(config.learning_rate)
    )
    if not config.warmup_steps:
        return after
    # The first update already moves: it has 1 / warmup_steps of the rate.
    warm = optax.linear_schedule(config.learning_rate / config.warmup_steps, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warm, after], [config.warmup_steps])


def make_optimizer(config: Optimizer, updates: int) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) behind a clipped global norm; norms, biases and adapters' scales do not decay."""

    def decays(params: Params) -> dict[str, bool]:
        return {name: "norm" not in name and not name.endswith("_bias") for name in params}

    adamw = optax.adamw(
        make_schedule(config, updates),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
        mu_dtype=config.state_dtype,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def start(params: Params, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> State:
    """The state before the first step: moments lie as their parameters do, counters everywhere."""
    places = jax.tree.map(lambda x: x.sharding, abstract(params, optimizer, mesh).optimizer)
    moments = jax.jit(optimizer.init, out_shardings=places)(params)
    return State(params, moments, jnp.zeros((), jnp.int32, device=replicated(mesh)))


def abstract(params: Mapping[str, Any], optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> State:
    """The shapes of a state and where its arrays lie, from those of its parameters; nothing is allocated."""
    everywhere = replicated(mesh)
    moments = jax.eval_shape(optimizer.init, dict(params))
    places = optax.tree_map_params(
        optimizer, lambda _, param: param.sharding, moments, dict(params), transform_non_params=lambda _: everywhere
    )
    laid = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), moments, places)
    return State(dict(params), laid, jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere))


def compiled(step: Callable[..., Any], state: State, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """The program of a step (state, ...) -> (state, report), the state donated and lying as it lay, the report everywhere.

    Left to itself the compiler may return another layout, and the next call would compile the program again for it.
    """
    options = _CPU_OPTIONS if mesh.devices.flat[0].platform == "cpu" else None
    everywhere = replicated(mesh)
    places = jax.tree.map(lambda x: x.sharding, state), everywhere
    return jax.jit(step, donate_argnums=0, out_shardings=places, compiler_options=options)


def moved(
    state: State, grads: Params, optimizer: optax.GradientTransformation
) -> tuple[Params, optax.OptState, jax.Array]:
    """Parameters and optimizer state after one update, and the gradients' global norm before clipping."""
    with jax.named_scope("update"):
        updates, after = optimizer.update(grads, state.optimizer, state.params)
        return optax.apply_updates(state.params, updates), after, optax.tree.norm(grads)


def split(x: Array, parts: int, group: int = 1) -> Array:
    """[P * group, ...] to [parts, P * group / parts, ...], whole groups apart.

    Strided: a batch that is spread over devices is spread in each part too.
    """
    prompts = x.shape[0] // group
    parted = x.reshape(prompts // parts, parts, group, *x.shape[1:]).swapaxes(0, 1)
    return parted.reshape(parts, prompts // parts * group, *x.shape[1:])


def join(x: Array, group: int = 1) -> Array:
    """The inverse of `split`."""
    parts, rows = x.shape[:2]
    return x.reshape(parts, rows // group, group, *x.shape[2:]).swapaxes(0, 1).reshape(parts * rows, *x.shape[2:])
