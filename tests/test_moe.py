"""Mixtures of experts: routers by hand, grouped products against a loop over experts, on one device and over several."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_rl_step
from checkpoints import GOLDENS, assert_same, copy_of, load, targets_of, tensors_in
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from tiny import DEEPSEEK, tiny_model

from grm_jax.data.packing import Packed
from grm_jax.models import lora, mixture
from grm_jax.models.config import Experts
from grm_jax.models.decoder import bind, split_abstract
from grm_jax.models.families import from_hf, to_hf
from grm_jax.models.flops import matrix_weights
from grm_jax.recipes import Lora, Optimizer, RftConfig
from grm_jax.sharding import batch_sharding, make_mesh, parameter_sharding
from grm_jax.spct import rft_step
from grm_jax.train.forward import load_metrics
from grm_jax.train.policy import Policy, cast, make_optimizer, start
from grm_jax.weights import names, save
from grm_jax.weights.adapters import load_adapters, save_adapters
from grm_jax.weights.decoder import load_decoder
from grm_jax.weights.load import load_params, read_config
from grm_jax.weights.save import save_hf

QWEN3_30B = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


# ---- routers ----


def chosen(affinities: list[float], experts: Experts, bias: list[float] | None = None) -> dict[int, float]:
    """One token's experts and weights; the logits are those that give the affinities."""
    a = np.array([affinities], np.float32)
    logits = np.log(a / (1 - a)) if experts.sigmoid else np.log(a)
    ids, weights = mixture.choose(jnp.asarray(logits), None if bias is None else jnp.asarray(bias), experts)
    return dict(zip(np.asarray(ids)[0].tolist(), np.asarray(weights)[0].tolist(), strict=True))


def test_softmax_routers_by_hand() -> None:
    affinities = [0.30, 0.02, 0.18, 0.16, 0.25, 0.01, 0.05, 0.03]
    assert chosen(affinities, Experts(8, 2, 1)) == pytest.approx({0: 0.30, 4: 0.25})
    normalised = Experts(8, 2, 1, normalised=True, scale=2.0)
    assert chosen(affinities, normalised) == pytest.approx({0: 2 * 0.30 / 0.55, 4: 2 * 0.25 / 0.55})
    # Groups of two: the best are {0, 1} by 0.30 and {4, 5} by 0.25; {2, 3} has the larger sum and the third-best expert.
    grouped = Experts(8, 3, 1, groups=4, groups_kept=2, scale=16.0)
    assert chosen(affinities, grouped) == pytest.approx({0: 4.8, 4: 4.0, 1: 0.32}, rel=1e-5)


def test_sigmoid_router_by_hand() -> None:
    """Groups {0, 1}, {2, 3}: by their best two, {2, 3} wins; the bias turns that, and is not in the weights."""
    affinities = [0.9, 0.1, 0.6, 0.5]
    v3 = Experts(*(4, 1, 1), sigmoid=True, bias=True, groups=2, groups_kept=1, group_top=2, normalised=False, scale=2.5)
    assert chosen(affinities, v3, [0.0] * 4) == pytest.approx({2: 1.5})
    assert chosen(affinities, v3, [0.0, 0.3, 0.0, 0.0]) == pytest.approx({0: 2.25})
    assert chosen(affinities, v3, [0.0, 0.0, 0.0, 0.2]) == pytest.approx({3: 1.25})
    two = dataclasses.replace(v3, per_token=2, normalised=True)
    assert chosen(affinities, two, [0.0] * 4) == pytest.approx({2: 2.5 * 6 / 11, 3: 2.5 * 5 / 11})


def test_qwen3_moe_by_hand() -> None:
    config = from_hf(QWEN3_30B)
    assert config.experts == Experts(128, 8, 768, normalised=True)
    assert config.qk_norm
    assert config.latent is None
    assert from_hf(to_hf(config)) == config
    stored = sum(np.prod(slot.shape) for slot in names.hugging_face(config).slots.values())
    assert stored == pytest.approx(30.5e9, rel=2e-3)
    assert matrix_weights(config) + config.vocab_size * config.dim == pytest.approx(3.35e9, rel=0.01)
    with pytest.raises(ValueError, match=r"mlp_only_layers = \[3\]: dense layers come first"):
        from_hf(QWEN3_30B | {"mlp_only_layers": [3]})
    with pytest.raises(ValueError, match="decoder_sparse_step = 2, it must be 1"):
        from_hf(QWEN3_30B | {"decoder_sparse_step": 2})


# ---- products ----


def loop(x_RD, ids, weights, matrices, activation):
    """Every expert on every token, weighed by 0 where it was not chosen."""
    gate, up, down = (m.astype(jnp.float32) for m in matrices)
    every = jnp.zeros((x_RD.shape[0], gate.shape[0])).at[jnp.arange(x_RD.shape[0])[:, None], ids].set(weights)
    out = jnp.zeros_like(x_RD)
    for e in range(gate.shape[0]):
        hidden = jax.nn.silu(x_RD @ gate[e].T) * (x_RD @ up[e].T)
        out += every[:, e : e + 1] * (hidden @ down[e].T)
    return out


@pytest.mark.parametrize(
    ("dtype", "atol", "piece", "kernels"),
    [
        ("float32", 2e-5, 2048, "plain"),
        ("float32", 2e-5, 3, "plain"),
        ("bfloat16", 0.1, 5, "plain"),
        pytest.param("float32", 2e-5, 2048, "interpreted", marks=pytest.mark.slow),
        ("float32", 2e-5, 3, "interpreted"),
        pytest.param("bfloat16", 0.1, 5, "interpreted", marks=pytest.mark.slow),
    ],
)
def test_grouped_products_are_a_loop_over_experts(
    dtype: str, atol: float, piece: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In value and in all gradients, with an expert that gets no token and one that gets nearly all.

    All tokens at once, in three pieces, and whole where pieces would not be of one size. With a kernel for the matrices'
    gradient and without.
    """
    through_experts = partial(mixture.through_experts, kernels=kernels)
    monkeypatch.setattr(mixture, "_PIECE", piece)
    rng = np.random.default_rng(0)
    shapes = (4, 6, 5), (4, 6, 5), (4, 5, 6)
    matrices = tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    x = jnp.asarray(rng.standard_normal((9, 5)), jnp.float32)
    ids = np.array([[3, i % 2] for i in range(9)])  # expert 2 is idle, 3 gets every token
    weights = jnp.asarray(rng.random((9, 2)), jnp.float32)
    out = jnp.asarray(rng.standard_normal((9, 5)), jnp.float32)

    def through(function):
        def total(x, weights, matrices):
            y = function(x, jnp.asarray(ids), weights, matrices, "silu")
            return jnp.sum(out * y), y

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(x, weights, matrices)

    def given(x):
        return through_experts(x, jnp.asarray(ids), weights, matrices, "silu")

    assert ("scan[" in str(jax.make_jaxpr(given)(x))) == (piece == 3)
    by_x = jax.make_jaxpr(jax.grad(lambda x: given(x).sum()))(x)
    assert not re.search(r"f32\[\d+,\d+\] = scatter-add", str(by_x)), (
        "rows come back from the experts' order by gathering"
    )
    ((_, y), grads), ((_, wanted), expected) = through(through_experts), through(loop)
    np.testing.assert_allclose(y, wanted, atol=atol)
    for found, right in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert found.dtype == right.dtype
        np.testing.assert_allclose(found.astype(np.float32), right.astype(np.float32), atol=5 * atol)
    assert not np.asarray(grads[2][0][2]).any(), "an idle expert has no gradient"


@pytest.mark.parametrize("sizes", [(3, 0, 130, 40), (0, 0, 0, 0), (600, 0, 0, 1)])
def test_the_kernel_of_the_matrices_gradient(sizes: tuple[int, ...]) -> None:
    """Runs that share blocks or fill several, idle experts, sizes that blocks do not divide, and rows of no expert.

    What stands in those rows is nothing to it, were it no number at all.
    """
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((sum(sizes) + 17, n)).astype(np.float32) for n in (530, 24))
    left[sum(sizes) :] = np.nan
    found = mixture.tgmm(jnp.asarray(left), jnp.asarray(right), jnp.array(sizes, jnp.int32), interpret=True)
    ends = np.cumsum(sizes)
    wanted = [left[end - size : end].T @ right[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    np.testing.assert_allclose(found, np.stack(wanted), atol=2e-4)


def test_load_metrics_by_hand() -> None:
    found = load_metrics(jnp.array([[4.0, 4.0, 4.0, 4.0], [12.0, 4.0, 0.0, 0.0]]))
    assert {name: float(value) for name, value in found.items()} == {"expert_load_max": 2.0, "expert_idle": 0.25}
    assert float(load_metrics(jnp.zeros((1, 4)))["expert_load_max"]) == 0.0  # not one real token


# ---- meshes ----


@pytest.mark.parametrize("kernels", [pytest.param("plain", marks=pytest.mark.slow), "interpreted"])
@pytest.mark.parametrize(
    "axes",
    [pytest.param({"data": 2, "expert": 4}, marks=pytest.mark.slow), {"fsdp": 2, "tensor": 2, "expert": 2}],
)
def test_experts_over_devices_are_those_of_one(
    axes: dict[str, int], kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states, loads and gradients, in pieces of at most 8 tokens on each device.

    And no device gathers matrices of experts that it does not hold.
    """
    model = tiny_model(dataclasses.replace(DEEPSEEK, vocab_size=260))
    mesh, rng = make_mesh(**axes), np.random.default_rng(2)
    tokens, positions = rng.integers(0, 256, (8, 6)), np.tile(np.arange(6), (8, 1))
    positions[1, 4:] = -1

    @partial(jax.jit, static_argnums=0)
    @partial(jax.value_and_grad, argnums=1, has_aux=True)
    def step(graph, params, tokens, positions):
        hidden, cache = bind(graph, params)(tokens, positions)
        return jnp.sum(jnp.sin(hidden) * (positions >= 0)[..., None]), (hidden, cache.loads)

    (_, (hidden, loads)), grads = step(model.graph, model.params, tokens, positions)
    monkeypatch.setattr(mixture, "_PIECE", 8)
    monkeypatch.setattr("grm_jax.models.kernels._selected", [kernels])
    graph, shapes = split_abstract(model.config, mesh, scans=False)
    params = {n: jax.device_put(v, parameter_sharding(mesh, n, *shapes[n])) for n, v in model.params.items()}
    assert params["layers.0.mlp.experts.down"].addressable_shards[0].data.shape[0] == 8 // axes["expert"]
    arrays = [jax.device_put(x, batch_sharding(mesh)) for x in (tokens, positions)]
    program = step.lower(graph, params, *arrays).compile()
    assert ("tgmm" in str(jax.make_jaxpr(step, static_argnums=0)(graph, params, *arrays))) == (kernels == "interpreted")
    (_, (found, found_loads)), found_grads = program(params, *arrays)
    real = positions >= 0
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(hidden)[real], atol=2e-5)
    np.testing.assert_array_equal(found_loads, loads)
    for name in grads:
        np.testing.assert_allclose(found_grads[name], grads[name], atol=1e-4, err_msg=name)
    gathered = re.findall(r"= f32\[([\d,]*)\][^=]* all-gather", program.as_text())
    assert not [shape for shape in gathered if shape.startswith("8,") and shape.count(",") == 2], gathered


# ---- weights ----


def test_experts_in_several_files_and_on_several_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that cut a layer's experts apart, read into arrays that are split over experts."""
    family = GOLDENS / "deepseek_v3"
    config, params = read_config(family), load(family)
    monkeypatch.setattr(save, "SHARD_BYTES", 10_000)
    save_hf(tmp_path, config, params, None, None, "float32")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({file for name, file in index.items() if "mlp.experts" in name and "up_proj" in name}) > 1
    mesh = make_mesh(expert=4)
    place = NamedSharding(mesh, PartitionSpec("expert"))
    targets = {
        name: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=place if ".experts." in name else None)
        for name, t in targets_of(config).items()
    }
    found = load_params(tmp_path, targets)
    assert_same(found, params)
    assert found["layers.1.mlp.experts.up"].addressable_shards[3].data.shape == (2, 16, 32)


def test_an_experts_tensor_is_its_row() -> None:
    stored, params = tensors_in(GOLDENS / "qwen3_moe"), load(GOLDENS / "qwen3_moe")
    for kind in ("gate", "up", "down"):
        name = f"model.layers.1.mlp.experts.5.{kind}_proj.weight"
        np.testing.assert_array_equal(params[f"layers.1.mlp.experts.{kind}"][5], stored[name])


def test_the_routing_bias_stays_float32(tmp_path: Path) -> None:
    """In a bfloat16 model, its working copy, and its files."""
    folder = GOLDENS / "deepseek_v3"
    model = load_decoder(str(folder), "bfloat16")[0]
    bias = tensors_in(folder)["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert model.params["layers.1.mlp.router"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(model.params["layers.1.mlp.router_bias"], bias)
    np.testing.assert_array_equal(cast(model.params, jnp.bfloat16)["layers.1.mlp.router_bias"], bias)
    save_hf(tmp_path, model.config, model.params, None, None, "bfloat16")
    np.testing.assert_array_equal(tensors_in(tmp_path)["model.layers.1.mlp.gate.e_score_correction_bias"], bias)


def test_a_missing_expert_and_modules_behind_the_last_layer(tmp_path: Path) -> None:
    """Released V3 files keep a module that predicts further tokens as one more layer; V2 files have none."""

    def without(config: dict, tensors: dict) -> None:
        tensors.pop("model.layers.1.mlp.experts.5.up_proj.weight")

    def behind(config: dict, tensors: dict) -> None:
        tensors["model.layers.2.eh_proj.weight"] = np.ones((32, 64), np.float32)

    with pytest.raises(ValueError, match=r"has no model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight"):
        load(copy_of("deepseek_v3", tmp_path / "without", without))
    assert_same(load(copy_of("deepseek_v3", tmp_path / "behind", behind)), load(GOLDENS / "deepseek_v3"))
    with pytest.raises(ValueError, match=r"no parameter takes model\.layers\.2\.eh_proj\.weight"):
        load(copy_of("deepseek_v2_groups", tmp_path / "v2", behind))


def test_adapters_of_experts_are_all_or_none(tmp_path: Path) -> None:
    config, settings = read_config(GOLDENS / "deepseek_v2"), Lora(rank=2, targets=("kv_b", "up"))
    _, shapes = split_abstract(config)
    adapters = lora.init(shapes, settings, jax.random.key(0, impl="threefry2x32"))
    assert adapters["layers.1.mlp.experts.up.lora_a"].shape == (8, 2, 32)
    assert adapters["layers.1.mlp.experts.up.lora_b"].shape == (8, 16, 2)
    assert adapters["layers.0.attention.kv_b.lora_b"].shape == (4 * (12 + 10), 2)
    save_adapters(tmp_path, config, adapters, settings, str(GOLDENS / "deepseek_v2"))
    _, read, found = load_adapters(tmp_path)
    assert read == dataclasses.replace(settings, targets=("kv_b", "up"))
    assert_same(found, adapters)
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    stored.pop("base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_A.weight")
    save_file(stored, file)
    with pytest.raises(ValueError, match=r"has no layers\.1\.mlp\.experts\.up\.lora_a of experts \[3\]"):
        load_adapters(tmp_path)


# ---- training ----


@pytest.mark.slow
def test_a_step_of_rl_reports_loads_and_drifts_little() -> None:
    """Rollouts attend to latents, the trainer to keys multiplied out: their log-probabilities are the same."""
    recipe = dataclasses.replace(test_rl_step.RECIPE, microbatch_prompts=2, max_new_tokens=8)
    step, state, _ = test_rl_step.begin(recipe, config=DEEPSEEK)
    _, report = step(state, {}, test_rl_step.batch(1), test_rl_step.KEY)
    scalars = {name: float(value) for name, value in report.scalars.items()}
    assert scalars["drift_max"] < 1e-4
    assert 1.0 <= scalars["expert_load_max"] <= 8.0
    assert 0.0 <= scalars["expert_idle"] < 1.0
    assert np.isfinite(scalars["grad_norm"])


@pytest.mark.slow
def test_a_step_of_fine_tuning_trains_routers_and_experts() -> None:
    """Loss falls, loads are reported, and the router's bias, which has no gradient, stays where it is."""
    model = tiny_model(DEEPSEEK)
    policy = Policy(model.config, model.graph, model.mesh, Lora(), jnp.dtype("float32"))
    recipe = RftConfig(
        microbatch_rows=1,
        general=("given",),
        optimizer=Optimizer(learning_rate=1e-2, weight_decay=0.1),
        lora=policy.lora,
    )
    optimizer = make_optimizer(recipe.optimizer, 4)
    bias = jnp.linspace(-0.1, 0.1, 8)
    base = model.params | {"layers.0.mlp.router_bias": bias}
    state = start(jax.tree.map(jnp.copy, base), optimizer, model.mesh)
    step = rft_step.make_step(policy, recipe, optimizer, state)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (2, 16)).astype(np.int32)
    ones = np.ones((2, 16), np.int32)
    batch = Packed(tokens, np.tile(np.arange(16, dtype=np.int32), (2, 1)), ones, ones)
    losses = []
    for _ in range(4):
        state, scalars = step(state, {}, batch)
        losses.append(float(scalars["loss"]))
        assert 1.0 <= float(scalars["expert_load_max"]) <= 8.0
        assert 0.0 <= float(scalars["expert_idle"]) < 1.0
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(state.params["layers.0.mlp.router_bias"], bias)
    assert np.abs(np.asarray(state.params["layers.0.mlp.router"] - base["layers.0.mlp.router"])).max() > 1e-3
