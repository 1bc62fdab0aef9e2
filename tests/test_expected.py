"""Expected scores: hand-worked masses, and the sampler's against forward passes over whole texts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LLAMA, tiny_model

import grm_jax
from grm_jax import Example, Message, expected
from grm_jax.config import JudgeSettings
from grm_jax.grm import Grm
from grm_jax.models.decoder import bind
from grm_jax.sampler import Forcing, Plan, Request, Sampling, sample
from grm_jax.scores import FORCE_TAIL, force_table, parse
from grm_jax.tokenizer import ByteTokenizer

LONG = dataclasses.replace(LLAMA, max_positions=4096)
BYTES = [*(bytes([i]) for i in range(256)), b"", b"", b""]  # the tiny model's vocabulary
WORDS = [b"\\boxed{", b"}", b",", b" ", *(str(i).encode() for i in range(11)), b", 7", b"4}", b"no", b""]


def logits_for(weights: dict[bytes, float], vocabulary=WORDS) -> np.ndarray:
    """Logits that give these tokens these weights, and all others none."""
    return np.log([max(weights.get(token, 0.0), 1e-30) for token in vocabulary]).astype(np.float32)


def masses_of(table, *rows):
    return np.asarray(expected.masses(table, jnp.asarray(np.stack([logits_for(row) for row in rows]))))


def test_a_number_of_one_token_has_the_mean_of_its_place():
    table = expected.number_table(WORDS, 1, 10)
    rows = ({}, {b"8": 0.5, b"7": 0.3, b"10": 0.2, b"no": 5.0, b"0": 3.0}, {b"}": 1.0})
    means, shares = expected.means(table, [b"\\boxed{", b"8", b"}"], masses_of(table, *rows), 1)
    assert means == pytest.approx((0.5 * 8 + 0.3 * 7 + 0.2 * 10,))
    assert shares == pytest.approx((0.5,))


def test_ten_in_two_tokens_is_split_from_one_where_the_text_has_a_one():
    table = expected.number_table(BYTES, 1, 10)
    begin, rest = {b"1": 0.6, b"9": 0.4}, {b"0": 0.75, b"}": 0.25, b"5": 9.0}  # 15 is no score
    rows = [{}] * 7 + [begin, rest, {b"}": 1.0}]
    masses = np.asarray(expected.masses(table, jnp.asarray(np.stack([logits_for(row, BYTES) for row in rows]))))
    for text, share in (("10}", 0.45), ("1}", 0.15)):
        tokens = [bytes([byte]) for byte in f"\\boxed{{{text}".encode()]
        means, shares = expected.means(table, tokens, masses[: len(tokens)], 1)
        assert means == pytest.approx((0.6 * (0.75 * 10 + 0.25 * 1) + 0.4 * 9,))
        assert shares == pytest.approx((share,))
    means, _ = expected.means(table, [bytes([byte]) for byte in b"\\boxed{9}"], masses[:9], 1)
    assert means == pytest.approx((0.6 * 1 + 0.4 * 9,))  # what follows a 1 is not known there


def test_tokens_that_hold_more_than_a_number():
    table = expected.number_table(WORDS, 1, 10)
    rows = ({}, {b"2": 1.0, b"4}": 1.0}, {b", 7": 3.0, b"}": 1.0}, {b"4}": 1.0, b"6": 1.0})
    tokens = [b"\\boxed{", b"2", b", 7", b"}"]
    means, _ = expected.means(table, tokens, masses_of(table, *rows), 2)
    assert means == pytest.approx((3.0, 7.0))
    means, shares = expected.means(table, [b"\\boxed{", b"4}"], masses_of(table, *rows[:2]), 1)
    assert (means, shares) == (pytest.approx((3.0,)), pytest.approx((0.5,)))


@pytest.mark.parametrize(("text", "mean"), [("12", 10), ("0", 1), ("07", 7), ("+5", 5), ("-3", 1)])
def test_numbers_that_are_not_written_as_scores_are_taken_as_read(text, mean):
    table = expected.number_table(BYTES, 1, 10)
    tokens = [bytes([byte]) for byte in f"\\boxed{{ {text} }}".encode()]
    found = expected.means(table, tokens, np.ones((len(tokens), table.classes)), 1)
    assert found == ((mean,), (1.0,))


def test_the_last_complete_box_counts():
    table = expected.number_table(BYTES, 1, 10)
    tokens = [bytes([byte]) for byte in b"\\boxed{1} \\boxed{3, 4} \\boxed{5"]
    assert expected._spans(b"".join(tokens)) == [(False, 17, 18), (False, 20, 21)]
    with pytest.raises(ValueError, match="the last box has 2 numbers, not 3"):
        expected.means(table, tokens, np.ones((len(tokens), table.classes)), 3)


@pytest.mark.parametrize("bounds", [(-1, 5), (3, 3)])
def test_bounds_that_expected_scores_cannot_have(bounds):
    with pytest.raises(ValueError, match="need 0 <= low < high"):
        expected.number_table(BYTES, *bounds)


def test_the_samplers_masses_are_those_of_the_whole_text():
    """Forced boxes of a random model: each token's masses, and the means, from one forward pass over the text."""
    model, tokenizer = tiny_model(), ByteTokenizer()
    table = expected.number_table(BYTES, 1, 10)
    tail = tuple(FORCE_TAIL.encode())
    forcing = Forcing(force_table(BYTES, 2), tail, lambda ids, n: parse(tokenizer.decode(ids), n)[0] is not None)
    prompts = [tuple(f"prompt {i} ".encode()) for i in range(6)]
    requests = [Request(prompt, ((i, 0), (i, 1)), 2) for i, prompt in enumerate(prompts)]
    key = jax.random.key(3, impl="threefry2x32")
    found = list(sample(model, requests, key, Plan(3, 2, 6), Sampling(eos_ids=tuple(range(32))), (), forcing, table))
    assert len(found) == 12
    assert any(c.forced_from < 6 for c in found), "one should have ended before its budget"

    @jax.jit
    def forward(params, tokens):
        decoder = bind(model.graph, params)
        return decoder.logits(decoder(tokens, jnp.arange(tokens.shape[1])[None])[0])[0]

    for completion in found:
        ids = [*completion.request.prompt, *completion.tokens]
        padded = forward(model.params, jnp.asarray([ids + [0] * (64 - len(ids))]))
        logits = padded[len(completion.request.prompt) - 1 : len(ids) - 1]
        whole = np.asarray(expected.masses(table, logits))
        assert completion.masses.shape == whole.shape
        start = completion.forced_from + len(tail)
        np.testing.assert_allclose(completion.masses[start:], whole[start:], rtol=1e-3)
        pieces = [bytes([token]) for token in completion.tokens]
        ours, theirs = (expected.means(table, pieces, masses, 2)[0] for masses in (completion.masses, whole))
        assert ours == pytest.approx(theirs, rel=1e-3)
        probabilities = np.asarray(jax.nn.softmax(logits[start]))[ord("1") : ord("9") + 1]
        first = chr(completion.tokens[start])
        if first != "1":  # then all that is known of the first score is its first digit
            plain = float((probabilities * np.arange(1, 10)).sum() / probabilities.sum())
            assert ours[0] == pytest.approx(plain, rel=1e-3)


def test_verdicts_sum_expected_scores_only_when_asked():
    grm = Grm(tiny_model(LONG), ByteTokenizer(), "tiny")
    examples = [Example(f"e{i}", (Message("user", f"q{i}"),), ("first", "second")) for i in range(3)]
    settings = {"votes": 3, "max_new_tokens": 8, "temperature": 1.0, "template": "listwise_short"}
    plain, by_mean = grm.score(examples, **settings), grm.score(examples, **settings, expected_scores=True)
    for verdict, other in zip(by_mean, plain, strict=True):
        assert [j.text for j in verdict.judgments] == [j.text for j in other.judgments]
        assert all(j.values is None for j in other.judgments)
        assert all(1 <= value <= 10 for j in verdict.judgments for value in j.values)
        assert verdict.scores == pytest.approx(np.sum([j.values for j in verdict.judgments], axis=0))
        assert other.scores == pytest.approx(np.sum([j.scores for j in other.judgments], axis=0))
        assert verdict.scores != other.scores


def test_the_plain_votes_risk_is_not_that_of_expected_scores():
    with pytest.raises(ValueError, match=r"stop_risk = 0.1 and expected_scores"):
        JudgeSettings(stop_risk=0.1, expected_scores=True).check_vote(guided=False)
    grm = Grm(tiny_model(LONG), ByteTokenizer(), "tiny")
    example = grm_jax.Example("e", (Message("user", "q"),), ("a", "b"))
    with pytest.raises(ValueError, match="k_meta = 2 without a meta RM"):
        grm.score([example], votes=2, k_meta=2)
