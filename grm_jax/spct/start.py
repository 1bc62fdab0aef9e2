"""How a training run begins and ends: the policy from a checkpoint, a judge over its weights, the model written out.

1. `load` reads the recipe's model: float32 masters, or a base in the compute dtype and fresh adapters beside it.
2. `judge` is a `Grm` over the working copy, so that what is trained is measured by what users run.
3. `save` writes a Hugging Face folder that `score --model` takes, and the adapters alone where there are any.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from grm_jax import grm as judges
from grm_jax.grm import Grm
from grm_jax.models import kernels, lora
from grm_jax.models.config import DecoderConfig
from grm_jax.models.decoder import Model, Params, dtype_of, random_params, split_abstract
from grm_jax.recipes import Fresh, RftConfig, RlConfig
from grm_jax.sharding import TRAINING, lay_out, parameter_sharding, place
from grm_jax.tokenizer import ByteTokenizer, Tokenizer
from grm_jax.train.policy import Policy, State
from grm_jax.weights.adapters import save_adapters
from grm_jax.weights.embedded import EMBEDDED, find_embedded
from grm_jax.weights.save import save_hf

FRESH = "fresh"


@dataclasses.dataclass(frozen=True)
class Start:
    """A policy and the weights that it starts from."""

    policy: Policy
    params: Params  # float32, what is trained
    frozen: Params  # the LoRA base, or the reference policy, or nothing
    tokenizer: Tokenizer
    model: str  # the checkpoint that it came from

    def judge(self, params: Params) -> Grm:
        """A judge over these weights, in the compute dtype."""
        p = self.policy
        model = Model(p.config, p.judging, p.decoding(params, self.frozen), p.mesh)
        return Grm(model, self.tokenizer, self.model)


def load(recipe: RftConfig | RlConfig, reference: bool) -> Start:
    """The recipe's model, ready to train; `reference` keeps a copy of it where the policy is not LoRA's base anyway.

    Raises FileNotFoundError and ValueError as `grm.load` does, and ValueError for a model without a tokenizer.
    """
    on_cpu = jax.default_backend() == "cpu"
    compute = jnp.dtype(recipe.compute_dtype or ("float32" if on_cpu else "bfloat16"))
    stored = compute if recipe.lora.rank else jnp.dtype(jnp.float32)
    kernels.select(recipe.kernels)
    mesh = lay_out(recipe.mesh, recipe.devices, everywhere=True)
    if recipe.model == FRESH:
        found = fresh(recipe.fresh, recipe.seed, mesh, stored)
    else:
        found = judges.load(recipe.model, str(stored), mesh, TRAINING)
    tokenizer, model = found.need_tokenizer(), found.model
    policy = Policy(model.config, model.graph, model.mesh, recipe.lora, compute)
    if recipe.lora.rank:
        _, shapes = split_abstract(model.config, mesh)
        key = jax.random.fold_in(jax.random.key(recipe.seed, impl="threefry2x32"), 1)
        places = lora.axes(shapes, recipe.lora)
        laid = {name: parameter_sharding(mesh, name, *places[name]) for name in places}
        adapters = jax.jit(lambda: lora.init(shapes, recipe.lora, key), out_shardings=laid)()
        return Start(policy, adapters, model.params, tokenizer, recipe.model)
    # A copy even where the dtype is the same: a step donates the masters.
    kept = model.params if reference else {}
    frozen = {name: jnp.array(value, dtype_of(name, compute), copy=True) for name, value in kept.items()}
    return Start(policy, model.params, frozen, tokenizer, recipe.model)


def fresh(numbers: Fresh, seed: int, mesh: jax.sharding.Mesh, dtype: jnp.dtype) -> Grm:
    """A random decoder over bytes, laid out for training."""
    config = fresh_config(numbers)
    graph, shapes = split_abstract(config, mesh)
    params = {
        name: place(np.asarray(value), parameter_sharding(mesh, name, *shapes[name]))
        for name, value in random_params(config, seed, dtype).items()
    }
    return Grm(Model(config, graph, params, mesh), ByteTokenizer(), FRESH)


def fresh_config(numbers: Fresh) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=ByteTokenizer().vocab_size,
        dim=numbers.dim,
        layers=numbers.layers,
        heads=numbers.heads,
        kv_heads=numbers.heads,
        head_dim=numbers.dim // numbers.heads,
        mlp_dim=numbers.mlp_dim,
        norm_eps=1e-5,
        rope_theta=1e4,
        query_scale=(numbers.dim // numbers.heads) ** -0.5,
        max_positions=numbers.max_positions,
        tied=False,
        windows=(None,) * numbers.layers,
    )


def save(start: Start, state: State, output: str) -> None:
    """Write `output`/model, and `output`/adapters where adapters were trained."""
    folder = epath.Path(output)
    source = find_embedded(start.model) if start.model in EMBEDDED else start.model
    merged = start.policy.working(state.params, start.frozen) if start.policy.lora.rank else state.params
    save_hf(
        folder / "model",
        start.policy.config,
        merged,
        start.tokenizer,
        None if start.model == FRESH else source,
        start.policy.dtype,
    )
    if start.policy.lora.rank:
        save_adapters(folder / "adapters", start.policy.config, state.params, start.policy.lora, start.model)
