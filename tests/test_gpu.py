"""What a GPU does of its own, against plain XLA there. On demand, on a machine with one:

GRM_TEST_PLATFORM=cuda python -m pytest -m slow tests/test_gpu.py

cuDNN's attention holds no scores in memory, and rounds its exponentials elsewhere than the plain one does, so both are
held against the same model in float32: cuDNN may be no further from that than half as much again as the plain one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LLAMA

from grm_jax.models import kernels
from grm_jax.models.decoder import Cache, bind, random_params, split_abstract
from grm_jax.sharding import make_mesh
from grm_jax.train.forward import REMATS, of_packed, of_samples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU, or GRM_TEST_PLATFORM=cuda is not set"),
]

P, G, S, T = 4, 3, 120, 72  # prompts, samples of each, slots of a prompt, tokens of a sample
WIDE = dataclasses.replace(LLAMA, dim=256, head_dim=64, mlp_dim=512, query_scale=64**-0.5)
SHAPES = {
    "all": WIDE,
    "window": dataclasses.replace(WIDE, windows=(50, None)),
    "heads of 128": dataclasses.replace(WIDE, head_dim=128, query_scale=128**-0.5, heads=8, kv_heads=1),
}
CALL = "__cudnn$fmha"


@pytest.fixture(autouse=True)
def as_before():
    yield
    kernels.select("auto")


def graph_of(name, config):
    kernels.select(name)
    return split_abstract(config, make_mesh())[0]


def behind_prompts(seed=0):
    """A program: gradients, and log-probabilities [R, T] of samples behind a head and prompts with padding."""
    rng = np.random.default_rng(seed)
    head, prompts, samples = (rng.integers(0, 256, shape) for shape in (33, (P, S), (P * G, T)))
    lengths, counts = rng.integers(1, S + 1, P), rng.integers(1, T + 1, P * G)
    weights = rng.normal(size=samples.shape) * (np.arange(T) < counts[:, None])

    def program(graph, params):
        def loss(params):
            found, _ = of_samples(
                *(bind(graph, params), *map(jnp.asarray, (head, prompts, lengths, samples, counts))),
                remat=REMATS["block"],
            )
            return jnp.sum(jnp.where(weights != 0, found * weights, 0)), jnp.where(weights != 0, found, 0)

        return jax.grad(loss, has_aux=True)(params)

    return program


def packed(seed=0):
    """A program: gradients, and log-probabilities [B, T] of rows that several texts are packed into."""
    rng = np.random.default_rng(seed)
    lengths, width = [[70, 41, 60], [130, 21]], 181
    segments = np.array([np.pad(np.repeat([1, 2, 3][: len(row)], row), (0, width - sum(row))) for row in lengths])
    positions = np.array([np.pad(np.concatenate([*map(np.arange, row)]), (0, width - sum(row))) for row in lengths])
    tokens = rng.integers(0, 256, (2, width))
    last = np.zeros_like(segments, bool)
    last[:, :-1] = segments[:, :-1] != segments[:, 1:]
    weights = np.where((segments > 0) & ~last, rng.normal(size=segments.shape), 0)

    def program(graph, params):
        def loss(params):
            found = of_packed(bind(graph, params), *map(jnp.asarray, (tokens, positions, segments)))
            return jnp.sum(jnp.where(weights != 0, found * weights, 0)), jnp.where(weights != 0, found, 0)

        return jax.grad(loss, has_aux=True)(params)

    return program


def prefilled(seed=0):
    """A program: nothing, and the final hidden states [B, T, D] of prompts with padding behind them."""
    rng = np.random.default_rng(seed)
    tokens, lengths = jnp.asarray(rng.integers(0, 256, (3, 300))), np.array([300, 171, 1])
    real = np.arange(300) < lengths[:, None]
    positions = jnp.asarray(np.where(real, np.arange(300), -1))

    def program(graph, params):
        hidden, _ = bind(graph, params)(tokens, positions, Cache())
        return {}, jnp.where(real[..., None], hidden, 0)

    return program


def distance(found, exact):
    """||found - exact|| / ||exact||, over all arrays at once."""
    pairs = [
        [np.asarray(y, np.float64) for y in pair] for pair in zip(*map(jax.tree.leaves, (found, exact)), strict=True)
    ]
    assert all(np.isfinite(x).all() for x, _ in pairs)
    return np.sqrt(sum(np.sum((x - y) ** 2) for x, y in pairs) / sum(np.sum(y**2) for _, y in pairs))


@pytest.mark.parametrize("program", [behind_prompts, packed, prefilled], ids=lambda made: made.__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_cudnn_is_as_near_to_float32_as_plain_attention(shape, program):
    config, run = SHAPES[shape], program()
    exact_params = random_params(config, 1, jnp.bfloat16)
    exact = {name: value.astype(jnp.float32) for name, value in exact_params.items()}
    exact = jax.jit(lambda p: run(graph_of("plain", config), p))(exact)
    far = {}
    for name in ("plain", "cudnn"):
        compiled = jax.jit(lambda p, name=name: run(graph_of(name, config), p)).lower(exact_params).compile()
        assert (CALL in compiled.as_text()) == (name == "cudnn")
        found = compiled(exact_params)
        far[name] = [distance(found[i], exact[i]) for i in range(2) if jax.tree.leaves(exact[i])]
    print(shape, program.__name__, far)
    for plain, cudnn in zip(far["plain"], far["cudnn"], strict=True):
        assert 0 < cudnn < 1.5 * plain < 0.1


def test_float32_is_plain():
    params = random_params(WIDE, 1)
    for name in ("plain", "cudnn"):
        text = jax.jit(lambda p, name=name: prefilled()(graph_of(name, WIDE), p)).lower(params).compile().as_text()
        assert CALL not in text


def test_auto_is_cudnn_on_one_hopper_gpu():
    hopper = jax.devices()[0].compute_capability.startswith("9.")
    kernels.select("auto")
    assert kernels.kernels_for(jax.devices()[:1]) == ("cudnn" if hopper else "plain")
