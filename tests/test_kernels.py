"""Kernels of attention against the plain one: what is seen, values and gradients, for packed rows and shared prompts.

Splash attention runs interpreted; what its program is for a TPU is in test_plan. cuDNN's call runs by plain operations
here (`implementation="xla"`), and on a GPU in test_gpu.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DEEPSEEK, GEMMA, LLAMA

from grm_jax.models import kernels
from grm_jax.models.attention import Owner
from grm_jax.models.decoder import Cache, Decoder, bind, random_params, split_abstract
from grm_jax.sharding import make_mesh, parameter_sharding, place, spread
from grm_jax.train.forward import REMATS, of_packed, of_samples

CAPPED = dataclasses.replace(GEMMA, layers=1, windows=(400,))  # beyond all of a row
NARROW = dataclasses.replace(CAPPED, windows=(50,))
LONG = dataclasses.replace(LLAMA, layers=1, windows=(None,))
P, G, S, T = 2, 3, 40, 48


@pytest.fixture(autouse=True)
def as_before():
    yield
    kernels.select("auto")


def graph_with(name, config, mesh=None):
    kernels.select(name)
    graph, shapes = split_abstract(config, mesh or make_mesh())
    kernels.select("auto")
    return graph, shapes


def behind_prompts(seed=3, rows=P):
    """(head, prompts, lengths, samples, counts) and a weight for each sampled token, 0 where it is padding."""
    rng = np.random.default_rng(seed)
    prompts, samples = rng.integers(0, 256, (rows, S)), rng.integers(0, 256, (rows * G, T))
    lengths, counts = rng.integers(1, S + 1, rows), rng.integers(1, T + 1, rows * G)
    weights = rng.normal(size=samples.shape) * (np.arange(T) < counts[:, None])
    arrays = (rng.integers(0, 256, 7), prompts, lengths, samples, counts, weights)
    return [x.astype(np.float32 if x is weights else np.int32) for x in arrays]


def of_group(graph, params, head, prompts, lengths, samples, counts, weights):
    def loss(params):
        found, _ = of_samples(bind(graph, params), head, prompts, lengths, samples, counts, remat=REMATS["block"])
        return jnp.sum(jnp.where(weights != 0, found * weights, 0)), jnp.where(weights != 0, found, 0)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def through_splash(program, *args):
    """Whether a program takes the kernel, and the plain one does not: the comparison would say nothing."""
    return "splash" in str(jax.make_jaxpr(program)(*args))


def agree(found, expected, atol=2e-5):
    (_, values), grads = found
    (_, wanted), wanted_grads = expected
    np.testing.assert_allclose(values, wanted, atol=atol)
    assert np.abs(np.asarray(wanted)).max() > 1
    for name, value in wanted_grads.items():
        np.testing.assert_allclose(grads[name], value, atol=5e-5 * max(1, np.abs(value).max()), err_msg=name)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LONG, id="llama", marks=pytest.mark.slow),
        pytest.param(CAPPED, id="gemma2", marks=pytest.mark.slow),
        pytest.param(DEEPSEEK, id="deepseek", marks=pytest.mark.slow),
    ],
)
def test_samples_behind_prompts(config):
    """T = 48 and G = 3: 144 queries, over a head, prompts with padding, and the samples' own tokens."""
    params, texts = random_params(config, 1), behind_prompts()
    graph, plain = graph_with("interpreted", config)[0], graph_with("plain", config)[0]
    assert through_splash(lambda p: of_group(graph, p, *texts), params)
    assert not through_splash(lambda p: of_group(plain, p, *texts), params)
    agree(of_group(graph, params, *texts), of_group(plain, params, *texts))


@pytest.mark.parametrize(
    "config", [pytest.param(NARROW, id="gemma2"), pytest.param(LONG, id="llama", marks=pytest.mark.slow)]
)
def test_packed_rows(config):
    rng, params = np.random.default_rng(0), random_params(config, 2)
    lengths = [[70, 40, 60], [130, 20]]
    segments = np.array([np.pad(np.repeat([1, 2, 3][: len(row)], row), (0, 180 - sum(row))) for row in lengths])
    positions = np.array([np.pad(np.concatenate([np.arange(n) for n in row]), (0, 180 - sum(row))) for row in lengths])
    tokens = rng.integers(0, 256, (2, 180))
    last = np.zeros_like(segments, bool)
    last[:, :-1] = segments[:, :-1] != segments[:, 1:]
    weights = jnp.where((segments > 0) & ~last, rng.normal(size=(2, 180)).astype(np.float32), 0)

    def values(graph):
        def loss(params):
            found = of_packed(bind(graph, params), *map(jnp.asarray, (tokens, positions, segments)))
            return jnp.sum(jnp.where(weights != 0, found * weights, 0)), jnp.where(weights != 0, found, 0)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    graph = graph_with("interpreted", config)[0]
    assert through_splash(lambda: values(graph))
    agree(values(graph), values(graph_with("plain", config)[0]))


def test_rows_and_heads_spread_over_a_mesh():
    """Two rows of samples over data, two key heads over tensor; a head alone, which every device computes."""
    texts, params = behind_prompts(rows=4), random_params(dataclasses.replace(LONG, vocab_size=264), 1)
    config = dataclasses.replace(LONG, vocab_size=264)
    texts[0] = np.arange(130, dtype=np.int32)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    graph, shapes = graph_with("interpreted", config, mesh)
    laid = {name: place(params[name], parameter_sharding(mesh, name, *shapes[name])) for name in params}
    expected = of_group(graph_with("plain", config)[0], params, *texts)
    given = (texts[0], *spread(tuple(texts[1:]), mesh))
    traced = str(jax.make_jaxpr(lambda p: of_group(graph, p, *given))(laid))
    assert "shard_map" in traced
    assert "splash" in traced
    agree(jax.device_get(of_group(graph, laid, *given)), expected)


def test_a_window_that_padding_makes_unknown_is_left_to_plain_attention():
    """A prompt's padding lies between it and its samples, so how far a key is away is known when it runs only."""
    positions, prompt = jnp.arange(128)[None] + 40, jnp.where(jnp.arange(64) < 40, jnp.arange(64), -1)[None]
    layout = kernels.fold(positions, [Owner.ROW, Owner.ROW], [prompt], None)
    heads = (4, 2)
    assert kernels.splash(layout, 100, None, heads, None) is None
    assert kernels.splash(layout, 192, None, heads, None) is not None  # reaches over all 64 + 128 slots
    assert kernels.splash(kernels.fold(positions[:, :127], [Owner.ROW], [], None), None, None, heads, None) is None
    assert kernels.splash(layout, None, None, heads, make_mesh(tensor=4)) is None  # two key heads on four devices
    assert kernels.fold(positions, [Owner.ROW, Owner.ROW], [prompt], jnp.ones((1, 128), int)) is None
    assert kernels.fold(positions, [Owner.ROW, Owner.ROW, Owner.ROW], [prompt, jnp.zeros((3, 8), int)], None) is None


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 6), st.integers(0, 6), st.sampled_from([None, 1, 3, 100]))
def test_what_is_seen_by_layout_is_what_is_seen_by_position(samples, tokens, head, prompt, window):
    """Of full parts, `sight` and the masks that positions give are the same."""
    before = head + prompt
    positions = jnp.tile(before + jnp.arange(tokens), (samples, 1))
    cached = [jnp.arange(head), head + jnp.arange(prompt)[None]]
    layout = kernels.fold(positions, [Owner.ALL, Owner.ROW, Owner.ROW], cached, None)
    seen = kernels.sight(layout, window, samples * tokens + 2, before + samples * tokens + 1)
    age = layout.query_positions[0][:, None] - layout.key_positions[0][None]
    same = np.pad(layout.same_sample(), ((0, 0), (before, 0)), constant_values=True)
    expected = (np.asarray(age) >= 0) & same & (True if window is None else np.asarray(age) < window)
    np.testing.assert_array_equal(seen[: samples * tokens, : before + samples * tokens], expected)
    assert seen.any(axis=1).all(), "a query that sees nothing has no softmax"
    assert not seen[: samples * tokens, before + samples * tokens :].any()


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(dataclasses.replace(LONG, windows=(30,)), id="window"),
        pytest.param(LONG, id="all", marks=pytest.mark.slow),
    ],
)
def test_what_cudnn_is_asked_for(monkeypatch, config):
    """The same call by plain operations, on shared prompts: odd numbers of keys, padding, a window."""
    covered, asked = kernels.cudnn, []

    def plainly(*args):
        asked.append(covered(*args, implementation="xla"))
        return asked[-1]

    params, texts = random_params(config, 1), behind_prompts()
    expected = of_group(graph_with("plain", config)[0], params, *texts)
    monkeypatch.setattr(kernels, "cudnn", plainly)
    graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), kernels="cudnn")))
    agree(of_group(graph, params, *texts), expected)
    assert any(asked)


@pytest.mark.parametrize(
    ("softcap", "sizes", "dtype", "said"),
    [
        (50.0, (64, 64), "bfloat16", "soft-capped scores"),
        (None, (64, 64), "float32", "float32 (give --dtype bfloat16)"),
        (None, (192, 128), "bfloat16", "heads of 192 numbers with values of 128"),
        (None, (256, 256), "bfloat16", "heads of 256 numbers"),
    ],
)
def test_what_cudnn_does_not_cover_is_said_once(softcap, sizes, dtype, said, monkeypatch):
    told = []
    monkeypatch.setattr(kernels.logger, "warning", lambda text, *given: told.append(text % given))
    kernels._say_plain.cache_clear()
    kernels.select("cudnn")
    layout = kernels.fold(jnp.arange(128)[None], [Owner.ROW], [], None)
    for _ in range(2):
        assert kernels.cudnn(layout, None, softcap, sizes, jnp.dtype(dtype)) is None
    assert told == [f"kernels = cudnn: it does not cover {said}; plain attention is run there"]
    few = kernels.fold(jnp.arange(127)[None], [Owner.ROW], [], None)
    assert kernels.cudnn(few, None, softcap, sizes, jnp.dtype(dtype)) is None
    assert len(told) == 1
    kernels._say_plain.cache_clear()
    kernels.select("auto")
    assert kernels.cudnn(layout, None, softcap, sizes, jnp.dtype(dtype)) is None
    assert len(told) == 1, "nobody asked for it"


def devices_of(platform, count=1, capability=None):
    """As JAX describes them; only GPUs have a capability, AMD's another sort of it."""
    return [SimpleNamespace(platform=platform, **({"compute_capability": capability} if capability else {}))] * count


@pytest.mark.parametrize(
    ("kernels_of", "devices", "expected"),
    [
        ("auto", devices_of("tpu", 4), "splash"),
        ("auto", devices_of("cpu"), "plain"),
        ("auto", devices_of("gpu", 1, "9.0"), "cudnn"),
        ("auto", devices_of("gpu", 2, "9.0"), "plain"),
        ("auto", devices_of("gpu", 1, "8.0"), "plain"),
        ("auto", devices_of("gpu", 1, "gfx90a"), "plain"),
        ("plain", devices_of("tpu"), "plain"),
        ("plain", devices_of("gpu", 1, "9.0"), "plain"),
        ("cudnn", devices_of("gpu", 2, "8.0"), "cudnn"),
        ("interpreted", devices_of("cpu"), "interpreted"),
    ],
)
def test_the_switch(kernels_of, devices, expected):
    kernels.select(kernels_of)
    assert kernels.kernels_for(devices) == expected


@pytest.mark.parametrize(("kernels_of", "platform"), [("splash", "cpu"), ("cudnn", "tpu"), ("splash", "gpu")])
def test_kernels_of_other_devices_say_so(kernels_of, platform):
    kernels.select(kernels_of)
    with pytest.raises(ValueError, match=rf"kernels = '{kernels_of}' on {platform}: .*use auto or plain"):
        kernels.kernels_for(devices_of(platform))


def test_decoding_and_few_tokens_stay_plain():
    graph, _ = graph_with("interpreted", LONG)
    params = random_params(LONG, 1)
    tokens, positions = jnp.zeros((2, 64), int), jnp.tile(jnp.arange(64), (2, 1))
    traced = jax.make_jaxpr(lambda p: bind(graph, p)(tokens, positions, Cache())[0])(params)
    assert "splash" not in str(traced)
