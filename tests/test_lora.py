"""Low-rank adapters: what they add by hand, that nothing is added at the start, and where gradients go."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GEMMA, LLAMA, QWEN3

from grm_jax.models import lora
from grm_jax.models.decoder import bind, split_abstract
from grm_jax.recipes import Lora
from grm_jax.sharding import make_mesh, parameter_sharding

ALL = Lora(rank=4, alpha=8.0)
BITS = {2: np.uint16, 4: np.uint32}


def key(seed: int = 0) -> jax.Array:
    return jax.random.key(seed, impl="threefry2x32")


def noisy(adapters: dict[str, jax.Array], seed: int = 0) -> dict[str, jax.Array]:
    """Adapters whose B is not zero."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(value.shape, np.float32)) for name, value in adapters.items()}


def test_what_is_added_by_hand() -> None:
    """O = 2, I = 3, rank 1, alpha / rank = 2: w + 2 b a."""
    a, b = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[10.0], [-1.0]])
    found = lora.add(jnp.ones((2, 3)), a, b, 2.0)
    np.testing.assert_array_equal(found, [[21.0, 41.0, 61.0], [-1.0, -3.0, -5.0]])


def test_shapes_and_draws() -> None:
    config = QWEN3
    _, shapes = split_abstract(config)
    adapters = lora.init(shapes, ALL, key())
    assert len(adapters) == config.layers * 7 * 2
    assert {name: value.shape for name, value in adapters.items()} == {
        name: shape for name, (shape, _) in lora.axes(shapes, ALL).items()
    }
    assert adapters["layers.1.attention.q.lora_a"].shape == (4, 32)
    assert adapters["layers.1.attention.k.lora_b"].shape == (2 * 8, 4)
    assert adapters["layers.1.attention.o.lora_a"].shape == (4, 4 * 8)
    assert adapters["layers.1.mlp.down.lora_a"].shape == (4, 64)
    assert adapters["layers.1.mlp.down.lora_b"].shape == (32, 4)
    for name, value in adapters.items():
        assert value.dtype == jnp.float32
        if name.endswith("lora_b"):
            assert not value.any()
        else:
            bound = value.shape[1] ** -0.5
            assert 0.9 * bound < float(jnp.abs(value).max()) <= bound
            assert abs(float(value.mean())) < 0.3 * bound
    rows = {np.asarray(value).tobytes() for name, value in adapters.items() if name.endswith("lora_a")}
    assert len(rows) == config.layers * 7  # no two alike


def test_a_target_that_the_model_lacks_is_named() -> None:
    _, shapes = split_abstract(QWEN3)
    with pytest.raises(
        ValueError, match=r"lora.targets has kv_a, which this model has not; it has down, gate, k, o, q"
    ):
        lora.axes(shapes, Lora(rank=2, targets=("q", "kv_a")))
    assert lora.axes(shapes, Lora(rank=2))  # all that there are


def test_an_adapter_is_a_function_of_key_and_name() -> None:
    _, shapes = split_abstract(LLAMA)
    everything, some = lora.init(shapes, ALL, key()), lora.init(shapes, Lora(4, 8.0, ("o",)), key())
    assert set(some) == {f"layers.{i}.attention.o.lora_{side}" for i in (0, 1) for side in "ab"}
    for name, value in some.items():
        np.testing.assert_array_equal(value, everything[name])
    other = lora.init(shapes, ALL, key(1))
    assert (other["layers.0.mlp.up.lora_a"] != everything["layers.0.mlp.up.lora_a"]).all()


def drawn(config, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Any parameters of a config, drawn by numpy: nothing is compiled."""
    _, shapes = split_abstract(config)
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, (shape, _) in shapes.items()}


@pytest.mark.parametrize(("dtype", "wrap"), [(jnp.float32, jax.jit), (jnp.bfloat16, jax.jit), (jnp.bfloat16, None)])
def test_zero_adapters_change_no_bit(dtype, wrap) -> None:
    _, shapes = split_abstract(GEMMA)
    base = drawn(GEMMA, dtype)
    base["layers.0.attention.q"] = base["layers.0.attention.q"].at[0, 0].set(-0.0)
    base["layers.0.mlp.up"] = base["layers.0.mlp.up"].at[3].set(0.0)

    def merge(b: dict[str, jax.Array], a: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return lora.merge(b, a, ALL)

    merged = (wrap(merge) if wrap else merge)(base, lora.init(shapes, ALL, key()))
    assert merged.keys() == base.keys()
    for name, value in base.items():
        assert merged[name].dtype == dtype
        bits = BITS[jnp.dtype(dtype).itemsize]
        np.testing.assert_array_equal(np.asarray(merged[name]).view(bits), np.asarray(value).view(bits), err_msg=name)


def test_merged_is_each_layer_plus_its_two_products() -> None:
    """Whole matrices in numpy's float64, for a matrix with several output axes and for one with several input axes."""
    _, shapes = split_abstract(QWEN3)
    base, some = drawn(QWEN3), dataclasses.replace(ALL, targets=("q", "o"))
    adapters = noisy(lora.init(shapes, some, key()))
    merged = lora.merge(base, adapters, some)
    for name, flat in (("layers.1.attention.q", (32, 32)), ("layers.0.attention.o", (32, 32))):
        a, b = (np.asarray(adapters[f"{name}.lora_{side}"], np.float64) for side in "ab")
        expected = np.asarray(base[name], np.float64).reshape(flat) + 8 / 4 * b @ a
        np.testing.assert_allclose(np.asarray(merged[name]).reshape(flat), expected, rtol=1e-5, atol=1e-5)
        assert np.abs(np.asarray(merged[name]) - np.asarray(base[name])).max() > 1
    for name in base.keys() - {f"layers.{i}.attention.{kind}" for i in (0, 1) for kind in "qo"}:
        assert merged[name] is base[name]


def test_gradients_flow_to_adapters() -> None:
    """Of B alone at the start, where B is zero, and equal to (scale * dW A^T) of the gradient of the whole matrix."""
    graph, shapes = split_abstract(LLAMA)
    base, adapters = drawn(LLAMA), lora.init(shapes, ALL, key())
    tokens = jnp.arange(6)[None]

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        model = bind(graph, params)
        return (model(tokens, tokens)[0] ** 2 @ jnp.arange(32.0)).sum()

    grads = jax.jit(jax.grad(lambda a: loss(lora.merge(base, a, ALL))))(adapters)
    whole = jax.jit(jax.grad(loss))(base)
    for name in lora.matrices(shapes, ALL):
        assert not grads[f"{name}.lora_a"].any()
        b, a = grads[f"{name}.lora_b"], adapters[f"{name}.lora_a"]
        expected = 2.0 * np.asarray(whole[name]).reshape(b.shape[0], -1) @ np.asarray(a).T
        np.testing.assert_allclose(b, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        assert np.abs(expected).max() > 0


def test_adapters_lie_as_their_matrices_do() -> None:
    even = dataclasses.replace(LLAMA, vocab_size=260)
    _, shapes = split_abstract(even)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    found = lora.axes(shapes, ALL)
    assert found["layers.0.attention.q.lora_a"] == ((4, 32), (None, "embed"))
    assert found["layers.0.attention.q.lora_b"] == ((32, 4), (None, None))
    assert found["layers.0.attention.o.lora_a"] == ((4, 32), (None, None))
    assert found["layers.0.attention.o.lora_b"] == ((32, 4), ("embed", None))
    assert found["layers.0.mlp.gate.lora_b"] == ((64, 4), ("mlp", None))
    adapters = noisy(lora.init(shapes, ALL, key()))
    base = drawn(even)
    placed = {n: jax.device_put(v, parameter_sharding(mesh, n, *found[n])) for n, v in adapters.items()}
    spread = {n: jax.device_put(v, parameter_sharding(mesh, n, *shapes[n])) for n, v in base.items()}
    assert placed["layers.0.mlp.down.lora_a"].addressable_shards[0].data.shape == (4, 32)
    merged = jax.jit(lambda b, a: lora.merge(b, a, ALL))(spread, placed)
    for name, value in lora.merge(base, adapters, ALL).items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.2.mlp.up.lora_a": (4, 32), "layers.2.mlp.up.lora_b": (64, 4)}, r"adapter layers\.2\.mlp\.up\.lora_a"),
        ({"embed.lora_a": (4, 32), "embed.lora_b": (259, 4)}, r"adapter embed\.lora_a: it must be lora_a or lora_b of"),
        ({"layers.0.mlp.up.lora_b": None}, r"adapter layers\.0\.mlp\.up\.lora_a: .* with the other beside it"),
        ({"layers.0.mlp.up.lora_c": (4, 4)}, r"adapter layers\.0\.mlp\.up\.lora_c"),
        ({"layers.0.mlp.up.lora_a": (4, 31)}, r"up: lora_a is \(4, 31\) and lora_b \(64, 4\), .* matrix is \(64, 32\)"),
        ({"layers.0.mlp.up.lora_a": (3, 32)}, r"up: lora_a is \(3, 32\) and lora_b \(64, 4\)"),
    ],
)
def test_adapters_of_another_model(change: dict, message: str) -> None:
    _, shapes = split_abstract(LLAMA)
    adapters = lora.init(shapes, ALL, key())
    for name, shape in change.items():
        if shape is None:
            del adapters[name]
        else:
            adapters[name] = jnp.zeros(shape)
    with pytest.raises(ValueError, match=message):
        lora.merge(drawn(LLAMA), adapters, ALL)
