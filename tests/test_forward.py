"""Log-probabilities for training against one plain forward pass a text: in value, and in gradient."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GEMMA, LLAMA, QWEN3, tiny_model

from grm_jax.data.packing import Packed, Source, encoded, packed
from grm_jax.models import attention
from grm_jax.models.decoder import bind
from grm_jax.train import policy as training
from grm_jax.train.forward import REMATS, of_packed, of_samples

SHAPES = {
    "llama": dataclasses.replace(LLAMA, layers=1, windows=(None,)),
    "gemma2": GEMMA,
    "qwen3": dataclasses.replace(QWEN3, layers=1, windows=(None,)),
}
P, G, S, T = 2, 2, 8, 6
LENGTHS, COUNTS = np.array([8, 1]), np.array([6, 2, 1, 5])


def texts(head):
    """(head, prompts [P, S], samples [R, T]) and a fixed weight for each sampled token, 0 where it is padding."""
    rng = np.random.default_rng(3)
    prompts, samples = rng.integers(0, 256, (P, S)), rng.integers(0, 256, (P * G, T))
    weights = rng.normal(size=(P * G, T)) * (np.arange(T) < COUNTS[:, None])
    return rng.integers(0, 256, head), prompts, samples, jnp.asarray(weights, jnp.float32)


def plain(model, texts, temperature=1.0):
    """Log-probability and entropy of tokens[1:] of each text, by log_softmax over the whole vocabulary: [rows, L - 1]."""
    length = max(map(len, texts))
    tokens = jnp.asarray([[*text, *[0] * (length - len(text))] for text in texts])
    positions = jnp.asarray([[*range(len(text)), *[-1] * (length - len(text))] for text in texts])
    hidden, _ = model(tokens, positions)
    logs = jax.nn.log_softmax(model.logits(hidden)[:, :-1] / temperature)
    found = jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1)[..., 0]
    return found, -jnp.sum(jnp.exp(logs) * logs, axis=-1)


def each_alone(model, head, prompts, samples, temperature):
    """What `of_samples` gives, each sample run behind a copy of its whole prompt."""
    texts = [[*head, *prompts[r // G][: LENGTHS[r // G]], *samples[r]] for r in range(P * G)]
    found = plain(model, texts, temperature)
    starts = [len(head) + LENGTHS[r // G] - 1 for r in range(P * G)]
    return tuple(jnp.stack([row[at : at + T] for row, at in zip(x, starts, strict=True)]) for x in found)


@pytest.mark.parametrize(
    ("family", "head", "temperature", "remat", "piece"),
    [
        ("llama", 5, 1.0, "block", 128),
        ("gemma2", 9, 0.7, "none", 3),
        pytest.param("gemma2", 3, 1.0, "dots", 2, marks=pytest.mark.slow),
        ("qwen3", 0, 1.0, "block", 5),
    ],
)
def test_samples_behind_shared_prompts_are_each_alone(monkeypatch, family, head, temperature, remat, piece):
    model = tiny_model(SHAPES[family])
    head, prompts, samples, weights = texts(head)

    def shared(params):
        found, entropy = of_samples(
            *(bind(model.graph, params), *map(jnp.asarray, (head, prompts, LENGTHS, samples, COUNTS))),
            *(temperature, REMATS[remat]),
        )
        return jnp.sum(jnp.where(weights != 0, weights * found, 0)), (found, entropy)

    def alone(params):
        found, entropy = each_alone(bind(model.graph, params), head, prompts, samples, temperature)
        return jnp.sum(weights * found), (found, entropy)

    (_, (expected, expected_entropy)), wanted = jax.jit(jax.value_and_grad(alone, has_aux=True))(model.params)
    monkeypatch.setattr(attention, "_PIECE", piece)
    (_, (found, entropy)), grads = jax.jit(jax.value_and_grad(shared, has_aux=True))(model.params)
    real = np.asarray(weights != 0)
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(expected)[real], atol=2e-5)
    np.testing.assert_allclose(np.asarray(entropy)[real], np.asarray(expected_entropy)[real], atol=2e-5)
    for name in wanted:
        np.testing.assert_allclose(grads[name], wanted[name], atol=1e-4, err_msg=name)
        assert np.abs(np.asarray(wanted[name])).max() > 1e-3, f"{name}: no gradient, the comparison would say nothing"


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 512, 513, 5000])
def test_pieces_are_few_and_whole(tokens):
    pieces = attention.pieces(tokens)
    assert [i for piece in pieces for i in range(tokens)[piece]] == list(range(tokens))
    assert len(pieces) <= 4
    assert len(pieces) == 1 or pieces[0].stop >= 128


def test_what_is_computed_again_is_not_held():
    """Memory of a compiled step, by the compiler's own account: `remat` has to save it on CPU too."""
    model = tiny_model(dataclasses.replace(LLAMA, layers=6, windows=(None,) * 6))
    tokens, positions, segments = jnp.zeros((1, 256), int), jnp.arange(256)[None], jnp.ones((1, 256), int)
    state = training.State(model.params, (), jnp.int32(0))

    def temporary(remat):
        def loss(params):
            return of_packed(bind(model.graph, params), tokens, positions, segments, REMATS[remat]).sum()

        def step(state):
            grads = jax.grad(loss)(state.params)
            return training.State(jax.tree.map(jnp.subtract, state.params, grads), (), state.step), ()

        return training.compiled(step, state, model.mesh).lower(state).compile().memory_analysis().temp_size_in_bytes

    assert temporary("block") < 0.5 * temporary("none")


def packed_rows():
    """Texts packed by the product's own packing, and the texts."""
    rng = np.random.default_rng(5)
    records = [
        (rng.integers(0, 256, a).tolist(), rng.integers(0, 256, b).tolist()) for a, b in [(3, 4), (1, 1), (5, 2)]
    ]
    stream, _ = packed([Source(records, lambda record: record, 1.0)], rows=2, length=12, seed=0)
    return next(iter(stream)), records


@pytest.mark.parametrize(("family", "piece"), [("llama", 4), ("gemma2", 128), ("gemma2", 5)])
def test_a_packed_batch_is_its_texts_one_by_one(monkeypatch, family, piece):
    model = tiny_model(SHAPES[family])
    batch, _ = packed_rows()
    assert int((batch.segments > 0).sum()) > 12, "more than one text a row"

    def together(params):
        found = of_packed(bind(model.graph, params), *map(jnp.asarray, (batch.tokens, batch.positions, batch.segments)))
        return jnp.sum(jnp.where(batch.trains > 0, found, 0.0))

    inside = [batch.segments[row] == segment for row in range(2) for segment in range(1, batch.segments[row].max() + 1)]
    rows = [row for row in range(2) for _ in range(batch.segments[row].max())]
    texts = [batch.tokens[row][at].tolist() for row, at in zip(rows, inside, strict=True)]
    longest = max(map(len, texts))
    trains = [batch.trains[row][at][:-1] for row, at in zip(rows, inside, strict=True)]
    trains = jnp.asarray(np.stack([np.pad(x, (0, longest - 1 - len(x))) for x in trains]))

    def alone(params):
        return jnp.sum(jnp.where(trains > 0, plain(bind(model.graph, params), texts)[0], 0.0))

    expected, wanted = jax.jit(jax.value_and_grad(alone))(model.params)
    monkeypatch.setattr(attention, "_PIECE", piece)
    value, grads = jax.jit(jax.value_and_grad(together))(model.params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name in wanted:
        np.testing.assert_allclose(grads[name], wanted[name], atol=2e-4, err_msg=name)


def test_packing_keeps_texts_whole_and_marks_what_is_trained():
    batch, records = packed_rows()
    whole = {(*prompt, *completion): len(prompt) for prompt, completion in records}
    for row in range(2):
        for segment in range(1, batch.segments[row].max() + 1):
            inside = batch.segments[row] == segment
            text = tuple(batch.tokens[row][inside].tolist())
            assert batch.positions[row][inside].tolist() == list(range(len(text)))
            trained = [t + 1 for t in np.flatnonzero(batch.trains[row][inside])]
            assert trained == list(range(whole[text], len(text))), "the completion, all of it, and nothing else"
    assert not batch.trains[batch.segments == 0].any()


def test_a_stream_goes_on_where_its_state_says():
    records = list(range(1, 60))
    source = Source(records, lambda n: ([1] * (n % 7 + 1), [n] * (n % 5 + 1)), 1.0)
    other = Source(list(range(20)), lambda n: ([2], [200 + n] * 3), 2.0)

    def stream():
        return iter(packed([source, other], rows=2, length=16, seed=4)[0])

    one = stream()
    for _ in range(5):
        next(one)
    state = one.get_state()
    expected = [next(one) for _ in range(30)]
    two = stream()
    two.set_state(state)
    for found, wanted in zip([next(two) for _ in range(30)], expected, strict=True):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(a, b)


def test_sources_are_mixed_in_their_shares_and_long_texts_counted():
    one = Source([1], lambda n: ([1], [1]), 1.0)
    other = Source([2], lambda n: ([2], [2]), 3.0)
    long = Source([20, 1], lambda n: ([3] * n, [3]), 1.0, "long ones")
    stream, too_long = packed([one, other, long], rows=4, length=16, seed=0)
    it, tokens = iter(stream), []
    for _ in range(50):
        tokens += next(it).tokens.reshape(-1).tolist()
    counts = np.bincount(tokens, minlength=4)
    assert counts[3] / counts[1] == pytest.approx(0.5, rel=0.1), "every second of them is longer than a row"
    assert counts[2] / counts[1] == pytest.approx(3, rel=0.05)
    assert too_long.counts() == {"long ones": pytest.approx(counts[3] / 2, rel=0.1)}


def test_what_cannot_be_packed_is_named():
    with pytest.raises(ValueError, match="no text to train on"):
        packed([Source([], lambda n: ([1], [1]), 1.0), Source([1], lambda n: ([1], [1]), 0.0)], 1, 8, 0)
    with pytest.raises(ValueError, match="a text of 0 prompt and 1 completion tokens"):
        encoded([], [1])
    short = Source([1], lambda n: ([1], [1]), 9.0)
    for count, said in ((2000, 1000), (3, 6)):
        long = Source([1] * count, lambda n: ([1] * 20, [1]), 1.0, "long ones")
        stream = iter(packed([short, long], 1, 8, 0)[0])
        with pytest.raises(ValueError, match=f"{said} of long ones and none of at most 8 tokens .the last has 21."):
            list(itertools.islice(stream, 5000))


def test_packed_is_a_pytree():
    batch, _ = packed_rows()
    assert isinstance(jax.tree.map(lambda x: x, batch), Packed)
