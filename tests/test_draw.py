"""Drawing one token: the right distribution, and nothing that was ruled out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grm_jax.sampler.draw import Sampling, draw, restrict

KEY = jax.random.key(1, impl="threefry2x32")


def keys(count):
    return jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(count))


def repeat(logits, count):
    return jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))


@pytest.mark.parametrize("vocabulary", [3, 256, 257, 1000])
def test_frequencies_are_the_softmax(vocabulary):
    logits = 2 * np.random.default_rng(vocabulary).standard_normal(vocabulary).astype(np.float32)
    count = 20_000
    tokens, log_probs = draw(repeat(logits, count), keys(count), Sampling(temperature=0.8))
    expected = np.asarray(jax.nn.softmax(logits / 0.8))
    found = np.bincount(tokens, minlength=vocabulary)
    likely = expected * count >= 5
    chi2 = ((found - expected * count) ** 2 / (expected * count))[likely].sum()
    freedom = likely.sum()
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)
    np.testing.assert_allclose(log_probs, np.log(expected)[tokens], atol=1e-4)


def test_each_row_uses_its_own_key_alone():
    logits = np.random.default_rng(0).standard_normal((8, 500)).astype(np.float32)
    together, _ = draw(jnp.asarray(logits), keys(8), Sampling())
    for row in range(8):
        alone, _ = draw(jnp.asarray(logits[row : row + 1]), keys(8)[row : row + 1], Sampling())
        assert alone[0] == together[row]


def test_masked_tokens_are_never_drawn():
    logits = np.full(700, 5.0, np.float32)
    logits[[3, 699]] = -20.0
    allowed = np.zeros((4000, 700), bool)
    allowed[:, [3, 699]] = True
    tokens, log_probs = draw(repeat(logits, 4000), keys(4000), Sampling(), jnp.asarray(allowed))
    assert set(np.unique(tokens)) == {3, 699}
    np.testing.assert_allclose(log_probs, np.log(0.5), atol=1e-5)


def test_greedy_takes_the_first_maximum_and_its_log_probability():
    logits = jnp.asarray([[0.0, 2.0, 2.0, 1.0]])
    tokens, log_probs = draw(logits, keys(1), Sampling(temperature=0))
    assert tokens[0] == 1
    np.testing.assert_allclose(log_probs[0], jax.nn.log_softmax(logits)[0, 1], rtol=1e-6)


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.5, top_k=40), Sampling(temperature=0)])
def test_greedy_rows_beside_others(sampling):
    """Marked rows are as if all were greedy, the others as if none were; what is masked stays so."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 600)), jnp.float32)
    allowed, marked = jnp.arange(600) % 3 > 0, jnp.arange(64) % 2 == 0
    allowed = jnp.broadcast_to(allowed, logits.shape)
    tokens, log_probs = draw(logits, keys(64), sampling, allowed, marked)
    greedy, drawn = (draw(logits, keys(64), s, allowed) for s in (Sampling(temperature=0), sampling))
    assert (tokens[::2] == jnp.argmax(jnp.where(allowed, logits, -jnp.inf), -1)[::2]).all()
    for found, one, other in zip((tokens, log_probs), greedy, drawn, strict=True):
        np.testing.assert_allclose(found, jnp.where(marked, one, other), rtol=1e-6)
    assert sampling.temperature == 0 or (tokens != greedy[0]).any()


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [0, 1, 2, 3]),
        (Sampling(top_k=2), [1, 3]),
        (Sampling(top_k=9), [0, 1, 2, 3]),
        (Sampling(top_p=0.5), [3]),  # probabilities .1 .2 .05 .65: the likeliest alone reaches it
        (Sampling(top_p=0.7), [1, 3]),
        (Sampling(top_p=0.9), [0, 1, 3]),
        (Sampling(min_p=0.3), [1, 3]),  # at least 0.195
        (Sampling(top_k=3, min_p=0.5), [3]),
        (Sampling(temperature=100.0, top_p=0.8), [0, 1, 2, 3]),  # nearly uniform: all four are needed
    ],
)
def test_what_is_kept(sampling, kept):
    logits = jnp.log(jnp.asarray([[0.1, 0.2, 0.05, 0.65]]))
    assert np.flatnonzero(np.isfinite(restrict(logits, sampling)[0])).tolist() == kept


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0: it has to be 0"),
        ({"top_k": -2}, "top_k = -2"),
        ({"top_p": 0.0}, "top_p = 0.0: it has to be above 0"),
        ({"min_p": 1.5}, "min_p = 1.5"),
        ({"temperature": float("nan")}, "temperature = nan"),
    ],
)
def test_numbers_that_no_distribution_has_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)
