"""One mesh for every program: sizes filled in, and the same numbers however the work is spread."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rl_step import EOS, KEY, RECIPE, SMALL, TOKENIZER, batch, policy_of, writer
from tiny import tiny_model

from grm_jax import scores
from grm_jax.config import MeshSizes
from grm_jax.models.decoder import Model, bind, split_abstract
from grm_jax.recipes import Optimizer
from grm_jax.sampler import Sampling, generate
from grm_jax.sharding import (
    DECODING,
    TRAINING,
    batch_sharding,
    fetch,
    lay_out,
    make_mesh,
    parameter_sharding,
    place,
    rows_of,
    spread,
)
from grm_jax.spct import rl_step
from grm_jax.train.forward import of_samples
from grm_jax.train.policy import make_optimizer, start

WIDE = dataclasses.replace(SMALL, vocab_size=264)  # two devices can share its vocabulary
TABLE = scores.token_table([*TOKENIZER.token_bytes(), *[b""] * 5])
MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2), "1x4x2": (1, 4, 2)}


@cache
def weights():
    """The weights of `test_rl_step.writer`, with five more rows of a vocabulary that nothing uses."""
    return dict(writer()) | {"embed": np.pad(writer()["embed"], ((0, 5), (0, 0)))}


def spread_model(sizes, rules=TRAINING):
    mesh = make_mesh(*sizes)
    graph, shapes = split_abstract(WIDE, mesh)
    places = {name: parameter_sharding(mesh, name, *shapes[name], rules) for name in shapes}
    return Model(WIDE, graph, {name: place(value, places[name]) for name, value in weights().items()}, mesh)


def step_on(sizes):
    """Parameters and report of one whole RL step."""
    model = spread_model(sizes)
    recipe = dataclasses.replace(
        RECIPE,
        prompts_per_step=8,
        microbatch_prompts=8,
        kl_coef=0.1,
        optimizer=Optimizer(learning_rate=1e-2, eps=1.0),  # Adam would turn a rounding error into a step of full size
    )
    policy, optimizer = policy_of(model), make_optimizer(recipe.optimizer, 10)
    frozen = {name: value + 0.0 for name, value in model.params.items()}
    state = start(model.params, optimizer, model.mesh)
    step = rl_step.make_step(policy, recipe, optimizer, TABLE, (EOS,), state)
    for _ in range(2):
        state, report = step(state, frozen, rl_step.put(batch(3, head=4, prompts=8), policy), KEY)
    assert step._cache_size() == 1
    for name, value in state.params.items():
        assert value.sharding == frozen[name].sharding, name
    return fetch((state.params, report), model.mesh)


@cache
def alone():
    return step_on((1, 1, 1))


SOME = [pytest.param(name, marks=[] if name == "2x2x2" else pytest.mark.slow) for name in MESHES]


@pytest.mark.parametrize("name", SOME)
def test_a_step_of_rl_on_a_mesh_is_that_of_one_device(name):
    """Rollouts (same keys, same tokens), metrics to 1e-5, parameters to 2e-6."""
    (params, report), (expected, wanted) = step_on(MESHES[name]), alone()
    assert 0.1 < wanted.judged.valid.mean() < 1
    np.testing.assert_array_equal(report.rollouts.tokens, wanted.rollouts.tokens)
    np.testing.assert_array_equal(report.judged.reward, wanted.judged.reward)
    for key, value in wanted.scalars.items():
        np.testing.assert_allclose(report.scalars[key], value, atol=1e-5, err_msg=key)
    assert max(np.abs(expected[key] - weights()[key]).max() for key in expected) > 1e-4, "nothing was learned"
    for key, value in expected.items():
        np.testing.assert_allclose(params[key], value, atol=2e-6, err_msg=key)


@cache
def losses_on(sizes):
    """Log-probabilities of texts, and the gradients of their weighted sum."""
    model, rng = spread_model(sizes), np.random.default_rng(0)
    prompts, texts = rng.integers(0, 256, (8, 32)).astype(np.int32), rng.integers(0, 256, (16, 12)).astype(np.int32)
    lengths, counts = rng.integers(1, 33, 8).astype(np.int32), rng.integers(1, 13, 16).astype(np.int32)
    scale = rng.normal(size=(16, 12)).astype(np.float32) * (np.arange(12) < counts[:, None])
    given = spread((prompts, lengths, texts, counts, scale), model.mesh)

    @jax.jit
    def loss(params, prompts, lengths, texts, counts, scale):
        head = jnp.arange(3, dtype=jnp.int32)
        found, _ = of_samples(bind(model.graph, params), head, prompts, lengths, texts, counts)
        return jnp.sum(found * scale), found

    (_, found), grads = jax.value_and_grad(loss, has_aux=True)(model.params, *given)
    return fetch((jnp.where(scale != 0, found, 0), grads), model.mesh)


@pytest.mark.parametrize("name", SOME)
def test_log_probabilities_and_gradients_on_a_mesh_are_those_of_one_device(name):
    (found, grads), (expected, wanted) = losses_on(MESHES[name]), losses_on((1, 1, 1))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for key, value in wanted.items():
        np.testing.assert_allclose(grads[key], value, atol=2e-5 * max(1, np.abs(value).max()), err_msg=key)


@pytest.mark.parametrize("name", ["2x2x2", "1x4x2"])
@pytest.mark.slow
def test_samples_on_a_mesh_are_those_of_one_device(name):
    prompts = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [7] * 40]
    how = {"max_new_tokens": 12, "sampling": Sampling(1.0, eos_ids=(EOS,)), "slots": 8}
    found, expected = (
        [[c.tokens for c in row] for row in generate(spread_model(sizes, DECODING), prompts, 4, KEY, **how)]
        for sizes in (MESHES[name], (1, 1, 1))
    )
    assert found == expected


def test_the_layout_for_decoding_gathers_along_fsdp():
    model = spread_model((1, 4, 2))
    policy = policy_of(model)
    laid = [policy.decoding(model.params, {}) for _ in range(2)][-1]
    assert policy._laid_out._cache_size() == 1, "laid out by one program, however often"
    for name, value in laid.items():
        assert "fsdp" not in str(value.sharding.spec), name
    assert any("fsdp" in str(value.sharding.spec) for value in model.params.values())
    np.testing.assert_array_equal(laid["embed"], weights()["embed"])


@pytest.mark.slow
def test_prompts_that_the_weights_of_training_read_have_the_same_rollouts():
    """As a step does on accelerators: layers as a loop, over weights that `fsdp` splits."""
    model = spread_model((1, 4, 2))
    policy = dataclasses.replace(policy_of(model), graph=split_abstract(WIDE, model.mesh, scans=True)[0])
    recipe = dataclasses.replace(RECIPE, prompts_per_step=8, microbatch_prompts=8)
    given = rl_step.put(batch(3, head=4, prompts=8), policy)

    def tokens(reads):
        def rolled(params, given):
            reading = policy.working(params, {}) if reads else None
            sampling = Sampling(1.0, eos_ids=(EOS,))
            return rl_step.roll(policy, policy.decoding(params, {}), given, KEY, recipe, sampling, reading).tokens

        return fetch(jax.jit(rolled)(model.params, given), model.mesh)

    np.testing.assert_array_equal(tokens(True), tokens(False))


def test_activations_stay_spread_by_rows():
    """Without being told so the compiler would split them over the model's width, as `fsdp` splits the embedding."""
    model = spread_model((1, 8, 1))
    tokens = spread(np.ones((8, 16), np.int32), model.mesh)

    @jax.jit
    def forward(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)
        return bind(model.graph, params)(tokens, positions)[0]

    text = forward.lower(model.params, tokens).compile().as_text()
    assert "f32[32,128]" not in text, "all 8 x 16 tokens on one device"
    assert "f32[32,16]" in text or "f32[16,32]" in text


SIZES = {
    "one on CPU": (MeshSizes(), None, (1, 1, 1, 1)),
    "as many as named": (MeshSizes(1, 2, 2), None, (1, 2, 2, 1)),
    "the rest is data": (MeshSizes(fsdp=2), 8, (4, 2, 1, 1)),
    "the rest is fsdp": (MeshSizes(data=2, fsdp=-1, tensor=2), 8, (2, 2, 2, 1)),
    "the rest is one": (MeshSizes(tensor=2, expert=4), 8, (1, 1, 2, 4)),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_filled_in(name):
    sizes, devices, expected = SIZES[name]
    mesh = lay_out(sizes, devices)
    assert mesh.axis_names == ("data", "fsdp", "tensor", "expert")
    assert mesh.devices.shape == expected
    assert rows_of(mesh) == expected[0] * expected[1] * expected[3]
    assert batch_sharding(mesh).shard_shape((16, 3)) == (16 // rows_of(mesh), 3)


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        (MeshSizes(tensor=3), 8, r"-1 x 1 x 3 x 1 on 8 devices.*divide it where one size is -1.*multiply to 3"),
        (MeshSizes(data=2), 8, "2 x 1 x 1 x 1 on 8 devices: the sizes' product has to be that number"),
        (MeshSizes(), 9, "on 9 devices: there are 8; use no more"),
        (MeshSizes(16), None, "on 16 devices: there are 8"),
    ],
)
def test_sizes_that_do_not_fit_say_so(sizes, devices, message):
    with pytest.raises(ValueError, match=message):
        lay_out(sizes, devices)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 0}, "mesh.fsdp = 0: it has to be at least 1, or -1"),
        ({"fsdp": -1}, "mesh.data and mesh.fsdp are -1: one size alone"),
        ({"data": -2}, "mesh.data = -2"),
    ],
)
def test_sizes_that_are_none_say_so(sizes, message):
    with pytest.raises(ValueError, match=message):
        MeshSizes(**sizes)


def test_a_parameter_that_does_not_divide_names_itself_and_what_would():
    mesh, (_, shapes) = make_mesh(tensor=8), split_abstract(SMALL)
    name = "layers.0.attention.k"
    with pytest.raises(ValueError, match=rf"{name}: its axis 'kv_heads' of size 2 .* 'tensor' of 8 .* would: 1, 2$"):
        parameter_sharding(mesh, name, *shapes[name])


def test_rows_that_do_not_divide_say_so():
    with pytest.raises(ValueError, match="6 rows for 4 parts of the mesh"):
        spread(np.zeros((6, 2)), make_mesh(2, 2, 2))


def test_a_model_on_one_device_has_the_program_that_it_had():
    """A mesh of one device leaves no trace in the program: nothing is constrained, nothing copied."""
    model = tiny_model(SMALL)
    graph, _ = split_abstract(SMALL, make_mesh())
    tokens = jnp.ones((2, 8), jnp.int32)

    def lowered(graph):
        return jax.jit(lambda p, t: bind(graph, p)(t, t)[0]).lower(model.params, tokens).as_text()

    assert lowered(graph) == lowered(model.graph)
