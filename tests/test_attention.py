"""What a CPU is given to do its products fast: held keys-first, left in bfloat16, prompts little wider than they are."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GEMMA, LLAMA, tiny_model

from grm_jax.buckets import stepped
from grm_jax.models.attention import NOWHERE, Owner, attend
from grm_jax.models.decoder import Cache, bind
from grm_jax.models.layers import linear
from grm_jax.sampler import Plan, Request, Sampling, rollout, sample
from grm_jax.sharding import make_mesh

K, Q, H, P, G = 2, 3, 8, 2, 3  # key heads, queries a key head, head, prompts, samples a prompt


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_few_queries_attend_as_many_do(softcap):
    """A head that all see, prompts of groups and own keys, masked; one query sees nothing of its prompt."""
    q = drawn(0, P, G, K, Q, H)
    seen = np.random.default_rng(1).random((P, G, 7)) < 0.6
    seen[0, 1] = False
    own = np.random.default_rng(2).random((P, G, 5)) < 0.6
    own[..., 0] = True
    parts = [
        (Owner.ALL, drawn(3, K, 4, H), drawn(4, K, 4, H), None),
        (Owner.ROW, drawn(5, P, K, 7, H), drawn(6, P, K, 7, H), jnp.asarray(seen)),
        (Owner.QUERY, drawn(7, P * G, K, 5, H), drawn(8, P * G, K, 5, H), jnp.asarray(own)),
    ]
    few, many = (jax.jit(lambda q, few=few: attend(q, parts, softcap, few))(q) for few in (True, False))
    np.testing.assert_allclose(few, many, atol=1e-6)
    scores = [jnp.einsum("kqh,ksh->kqs", q[0, 1], k) for k in (parts[0][1], parts[2][1][1])]
    scores = jnp.concatenate([s if softcap is None else softcap * jnp.tanh(s / softcap) for s in scores], -1)
    p = jax.nn.softmax(jnp.where(np.concatenate([np.ones(4, bool), own[0, 1]]), scores, -jnp.inf))
    mixed = jnp.einsum("kqs,ksh->kqh", p, jnp.concatenate([parts[0][2], parts[2][2][1]], 1))
    np.testing.assert_allclose(few[0, 1], mixed, atol=1e-6)


def compiled(model, wide):
    tokens = jnp.zeros((1, wide), jnp.int32)
    return rollout.prefill.lower(model.graph, model.params, None, tokens, jnp.array([wide])).compile().as_text()


def test_bfloat16_products_stay_in_bfloat16():
    """Activations that lie transposed in memory would have every product of every layer done in float32 on a CPU."""
    config = dataclasses.replace(LLAMA, dim=64, mlp_dim=192)
    w, x = jnp.zeros((192, 64), jnp.bfloat16), jnp.zeros((64, 128))
    upcast = re.compile(r"f32\[192,64\]")
    if upcast.search(jax.jit(linear).lower(w, x).compile().as_text()):
        pytest.skip("this CPU has no products of bfloat16")
    model = tiny_model(config)
    params = {name: x.astype(jnp.bfloat16) for name, x in model.params.items()}
    assert not upcast.search(compiled(dataclasses.replace(model, params=params), 128))


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma2"])
def test_decoding_a_bfloat16_model_is_its_forward_pass(config):
    """Own keys are held in float32 on a CPU; logits are those of one pass over the text, but for bfloat16's rounding."""
    params = {name: x.astype(jnp.bfloat16) for name, x in tiny_model(config).params.items()}
    graph, mesh = tiny_model(config).graph, make_mesh()
    decoder = jax.jit(lambda *args: bind(graph, params)(*args))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 16)))
    positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)
    expected, _ = decoder(tokens, positions)
    _, cache = decoder(tokens[:, :12], positions[:, :12])
    assert cache.parts[0].k[0].dtype == jnp.bfloat16
    own = rollout.empty(config, mesh, jnp.dtype("bfloat16"), (2,), 6)
    assert {x.dtype for x in (*own.k, *own.v)} == {jnp.dtype("float32")}
    assert (own.positions == NOWHERE).all()
    cache = Cache(cache.parts, own)
    for t in range(12, 16):
        hidden, cache = decoder(tokens[:, t : t + 1], positions[:, t : t + 1], cache)
        np.testing.assert_allclose(hidden[:, 0], expected[:, t], atol=0.06)
    assert cache.own.k[0].dtype == jnp.float32


def test_buckets_between_powers_of_two():
    sizes = {
        0: 0,
        1: 32,
        100: 128,
        129: 256,
        257: 384,
        385: 512,
        513: 640,
        641: 768,
        1024: 1024,
        1025: 1280,
        1793: 2048,
        3000: 3072,
        3073: 3584,
    }
    assert {n: stepped(n, 32, 128) for n in sizes} == sizes


def test_a_long_prompt_is_prefilled_little_wider_than_it_is(monkeypatch):
    widths = []
    prefill = rollout.prefill
    monkeypatch.setattr(rollout, "prefill", lambda *args: widths.append(args[3].shape[1]) or prefill(*args))
    prompts = [tuple(np.random.default_rng(n).integers(0, 256, n).tolist()) for n in (101, 300, 385)]
    requests = [Request(prompt, ((i, 0),)) for i, prompt in enumerate(prompts)]
    done = list(sample(tiny_model(), requests, jax.random.key(0), Plan(3, 1, 2), Sampling(temperature=0)))
    assert widths == [128, 384, 384]
    assert sorted(c.item for c in done) == [0, 1, 2]
