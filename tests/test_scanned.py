"""Layers as one loop: the same numbers as one after the other, and a program that does not grow with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DEEPSEEK, GEMMA, LLAMA

from grm_jax.models.decoder import bind, random_params, split_abstract
from grm_jax.train.forward import REMATS, of_samples_with_loads

FAMILIES = {
    "llama": dataclasses.replace(LLAMA, layers=4, windows=(None,) * 4),
    "gemma": dataclasses.replace(GEMMA, layers=4, windows=(8, None) * 2),
    "deepseek": dataclasses.replace(DEEPSEEK, layers=3, windows=(None,) * 3),
}


def found(config, scans, remat):
    """Log-probabilities, loads and gradients of samples behind a shared head and prompts."""
    graph, _ = split_abstract(config, scans=scans)
    params, rng = random_params(config, 0), np.random.default_rng(0)
    head, prompts = rng.integers(0, 256, 5).astype(np.int32), rng.integers(0, 256, (2, 12)).astype(np.int32)
    samples = rng.integers(0, 256, (4, 6)).astype(np.int32)
    lengths, counts = np.array([12, 7], np.int32), np.array([6, 3, 1, 5], np.int32)
    weights = rng.normal(size=(4, 6)).astype(np.float32) * (np.arange(6) < counts[:, None])

    def loss(params):
        given = (head, prompts, lengths, samples, counts, 1.0, REMATS[remat])
        log_probs, _, loads = of_samples_with_loads(bind(graph, params), *given)
        return jnp.sum(log_probs * weights), loads

    program = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return program(params), program.lower(params).as_text()


@pytest.mark.parametrize(
    ("family", "remat"),
    [
        pytest.param("gemma", "block", marks=pytest.mark.slow),
        pytest.param("llama", "none", marks=pytest.mark.slow),
        pytest.param("deepseek", "dots", marks=pytest.mark.slow),
    ],
)
def test_scanned_layers_are_those_one_after_the_other(family, remat):
    (expected, loop), (wanted, unrolled) = (found(FAMILIES[family], scans, remat) for scans in (True, False))
    (value, loads), grads = expected
    np.testing.assert_allclose(value, wanted[0][0], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, loads, wanted[0][1])
    for name, grad in wanted[1].items():
        np.testing.assert_allclose(grads[name], grad, atol=2e-5, err_msg=name)
    assert loop.count("while") > unrolled.count("while")


def test_the_program_does_not_grow_with_the_layers():
    def lines(layers):
        config = dataclasses.replace(LLAMA, layers=layers, windows=(None,) * layers)
        graph, shapes = split_abstract(config, scans=True)
        params = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, (shape, _) in shapes.items()}
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        text = jax.jit(lambda p, t: bind(graph, p)(t, t)[0]).lower(params, tokens).as_text()
        return sum("dot_general" in line for line in text.splitlines())

    assert lines(4) == lines(8) == lines(16)


@pytest.mark.parametrize(
    ("windows", "dense", "expected"),
    [
        ((None,) * 4, 0, (0, 1)),
        ((8, None) * 3, 0, (0, 2)),
        ((8, None, None) * 2, 0, (0, 3)),
        ((8, None, None), 0, (3, 1)),
        ((None,) * 3, 1, (1, 1)),
    ],
)
def test_what_repeats(windows, dense, expected):
    config = dataclasses.replace(LLAMA, layers=len(windows), windows=windows)
    if dense:
        experts = dataclasses.replace(DEEPSEEK.experts, dense_layers=dense)
        config = dataclasses.replace(DEEPSEEK, layers=len(windows), windows=windows, experts=experts)
    assert config.repeats == expected
