"""Log-probabilities through the head in blocks: equal to the whole logits' in value and gradient, in little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grm_jax.head import log_probs
from grm_jax.sharding import make_mesh


def case(tokens, vocabulary, size=8, dtype=jnp.float32):
    """Hidden states, head, targets and cotangents; every fourth token is padding: no target, no cotangent."""
    rng = np.random.default_rng(tokens * vocabulary)
    hidden, head = rng.standard_normal((tokens, size)), rng.standard_normal((vocabulary, size))
    targets, cotangents = rng.integers(0, vocabulary, tokens), rng.standard_normal(tokens)
    targets[::4], cotangents[::4] = -1, 0
    floats = jnp.asarray(hidden, jnp.float32), jnp.asarray(head, dtype)
    return *floats, jnp.asarray(targets), jnp.asarray(cotangents, jnp.float32)


def plain(hidden, head, targets, softcap, temperature):
    """The same from all logits at once, in the head's dtype as the model does it."""
    x = jnp.einsum("ND,VD->NV", hidden.astype(head.dtype), head, preferred_element_type=jnp.float32)
    z = (x if softcap is None else softcap * jnp.tanh(x / softcap)) / temperature
    found = jax.nn.log_softmax(z)
    return jnp.take_along_axis(found, targets[:, None], axis=1)[:, 0], -jnp.sum(jnp.exp(found) * found, axis=1)


def with_gradients(function, hidden, head, targets, cotangents, *how):
    """Log-probabilities, entropy, and the gradients of sum(cotangents * log-probabilities)."""

    def total(hidden, head):
        found, entropy = function(hidden, head, targets, *how)
        return jnp.sum(cotangents * found), (found, entropy)

    grads, (found, entropy) = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(hidden, head)
    return found, entropy, *grads


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "blocks"),
    [
        (12, 24, (4, 8)),
        (13, 101, (5, 16)),  # 13 and 101 are primes: tokens and head are padded
        (7, 20, (100, 100)),  # one block of each
        (9, 21, (2, 10)),  # 3 blocks of 7 entries
        (3, 5, (1, 1)),
    ],
)
@pytest.mark.parametrize(("softcap", "temperature"), [(None, 1.0), (2.0, 0.7)])
def test_blocks_give_what_all_logits_give(tokens, vocabulary, blocks, softcap, temperature):
    *arrays, targets, cotangents = case(tokens, vocabulary)
    found = with_gradients(log_probs, *arrays, targets, cotangents, softcap, temperature, *blocks)
    expected = with_gradients(plain, *arrays, jnp.maximum(targets, 0), cotangents, softcap, temperature)
    real = np.asarray(targets) >= 0
    assert np.isfinite(found[0]).all()
    np.testing.assert_allclose(found[0][real], expected[0][real], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not found[2][~real].any()


@pytest.mark.parametrize("vocabulary", [24, 101])
def test_extreme_logits_stay_finite_and_right(vocabulary):
    """Logits of all signs to some thousands: a zero row of padding must not count beside logits far below 0."""
    hidden, head, targets, cotangents = case(6, vocabulary)
    head = -jnp.abs(head)
    hidden = jnp.abs(hidden) * jnp.asarray([[1.0], [1e3], [-1e3], [30.0], [-30.0], [0.0]])
    found = with_gradients(log_probs, hidden, head, targets, cotangents, None, 1.0, 4, 8)
    expected = with_gradients(plain, hidden, head, jnp.maximum(targets, 0), cotangents, None, 1.0)
    real = np.asarray(targets) >= 0
    np.testing.assert_allclose(found[0][real], expected[0][real], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-3)  # hidden states of 1000, rounded in other orders
    np.testing.assert_allclose(found[1][5], np.log(vocabulary), rtol=1e-6)  # a hidden state of 0: uniform


def test_half_precision_heads_are_added_up_in_float32():
    """Every token adds a half to the same row, 256 in all: in bfloat16 the sum would stop at 128."""
    count = 512
    hidden, head = jnp.ones((count, 4)), jnp.zeros((2, 4), jnp.bfloat16)
    _, _, d_hidden, d_head = with_gradients(
        log_probs, hidden, head, jnp.zeros(count, int), jnp.ones(count), None, 1.0, 1, 1
    )
    assert (d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(d_head.astype(jnp.float32), np.outer([count / 2, -count / 2], np.ones(4)))


def test_products_are_those_of_the_heads_dtype():
    hidden, head, targets, cotangents = case(12, 24, dtype=jnp.bfloat16)
    found = with_gradients(log_probs, hidden, head, targets, cotangents, 2.0, 1.0, 4, 8)
    expected = with_gradients(plain, hidden, head, jnp.maximum(targets, 0), cotangents, 2.0, 1.0)
    real = np.asarray(targets) >= 0
    np.testing.assert_allclose(found[0][real], expected[0][real], atol=1e-5)
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=2**-8 * np.abs(theirs).max())  # one rounding to bfloat16


def test_entropy_has_no_gradient():
    hidden, head, targets, _ = case(4, 9)
    grads = jax.grad(lambda h, w: log_probs(h, w, targets, None)[1].sum(), argnums=(0, 1))(hidden, head)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("axes", [("tensor", None), (None, "fsdp"), ("tensor", "fsdp")])
def test_a_head_spread_over_devices_gives_the_same(axes):
    hidden, head, targets, cotangents = case(32, 64)
    how = (3.0, 0.9, 8, 16)
    expected = with_gradients(log_probs, hidden, head, targets, cotangents, *how)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    hidden, targets, cotangents = (
        jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in (hidden, targets, cotangents)
    )
    head = jax.device_put(head, NamedSharding(mesh, PartitionSpec(*axes)))
    found = with_gradients(log_probs, hidden, head, targets, cotangents, *how)
    real = np.asarray(targets) >= 0
    np.testing.assert_allclose(found[0][real], expected[0][real], atol=1e-5)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_spread_vocabulary_is_not_gathered():
    """Each device computes on its own part of every block: no collective is as large as the head."""
    mesh = make_mesh(tensor=8)
    put = NamedSharding(mesh, PartitionSpec("tensor"))
    head = jax.ShapeDtypeStruct((4096, 64), jnp.float32, sharding=put)
    rest = (jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((32,), jnp.int32))
    total = jax.grad(lambda w, h, t: log_probs(h, w, t, None, 1.0, 16, 512)[0].sum())
    text = jax.jit(total, out_shardings=put).lower(head, *rest).compile().as_text()
    assert "all-reduce" in text
    assert not [line for line in text.splitlines() if "all-gather" in line or "all-to-all" in line]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gemmas_vocabulary_needs_little_memory(dtype):
    """4096 tokens' logits would be 3.9 GiB."""
    shapes = (
        jax.ShapeDtypeStruct((4096, 32), jnp.float32),
        jax.ShapeDtypeStruct((256_000, 32), dtype),
        jax.ShapeDtypeStruct((4096,), jnp.int32),
    )
    total = jax.value_and_grad(lambda h, w, t: log_probs(h, w, t, 30.0)[0].sum(), argnums=(0, 1))
    memory = jax.jit(total).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 2**20


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ((None, 0.0), "temperature = 0.0: it has to be above 0"),
        ((0.0, 1.0), "softcap = 0.0: it has to be above 0; None"),
        ((None, 1.0, 0), "blocks of 0 tokens x 2048"),
    ],
)
def test_what_no_distribution_has_is_refused(how, message):
    hidden, head, targets, _ = case(4, 9)
    with pytest.raises(ValueError, match=message):
        log_probs(hidden, head, targets, *how)
