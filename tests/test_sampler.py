"""The sampler against a reference that runs the whole text through the model for every token."""

import dataclasses
from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GEMMA, LLAMA, QWEN3, tiny_model

from grm_jax import scores
from grm_jax.models.decoder import Cache, Keys, Model, bind
from grm_jax.sampler import Completion, Forcing, Plan, Request, Sampling, batching, generate, rollout, sample
from grm_jax.sampler.draw import restrict
from grm_jax.sampler.requests import common_prefix, power_of_two

KEY = jax.random.key(7, impl="threefry2x32")
LENGTH = 512  # of the reference's texts, padded
SHAPES = {"llama": LLAMA, "gemma2": GEMMA, "qwen3": QWEN3}


@cache
def whole(config):
    """The logits of every position of one text padded to LENGTH."""
    graph = tiny_model(config).graph

    @jax.jit
    def logits(params, tokens):
        model = bind(graph, params)
        hidden, _ = model(tokens, jnp.arange(LENGTH)[None])
        return model.logits(hidden)

    return logits


def assert_drawn(found: Completion, model: Model, new: int, sampling: Sampling) -> None:
    """Every token, and the end, is what the sample's own key draws from one forward pass over the whole text.

    A draw takes the token whose stretch of the cumulative distribution holds the key's uniform number. Two programs
    round differently, so a number within 1e-5 of a stretch's edge may fall on either side: on any machine, once in
    about a thousand tokens.
    """
    prompt, text = found.request.prompt, [*found.request.prompt, *found.tokens]
    assert found.ended or len(found.tokens) == new
    logits = whole(model.config)(model.params, np.array([text + [0] * (LENGTH - len(text))]))[0]
    own = jax.random.fold_in(jax.random.fold_in(KEY, found.item), found.sample)
    count = len(found.tokens) + found.ended
    logits = np.asarray(restrict(logits[len(prompt) - 1 :][:count], sampling))
    if sampling.temperature == 0:
        assert logits[np.arange(len(found.tokens)), found.tokens].tolist() == pytest.approx(logits.max(1), abs=1e-4)
        return
    numbers = jax.vmap(lambda step: jax.random.uniform(jax.random.fold_in(own, step)))(jnp.arange(count))
    upper = np.cumsum(np.asarray(jax.nn.softmax(logits), np.float64), axis=1)
    lower = np.pad(upper, ((0, 0), (1, 0)))[:, :-1]
    for step, number in enumerate(np.asarray(numbers)):
        drawn = [found.tokens[step]] if step < len(found.tokens) else sampling.eos_ids
        assert any(lower[step, t] - 1e-5 <= number <= upper[step, t] + 1e-5 for t in drawn), f"token {step}"
        assert step == len(found.tokens) or found.tokens[step] not in sampling.eos_ids


def ask(prompt: Sequence[int], item: int, *samples: int, numbers: int = 0) -> Request:
    return Request(tuple(prompt), tuple((item, j) for j in samples), numbers)


def prompts_of(*lengths: int, shared: int = 0, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    head = rng.integers(0, 256, shared).tolist()
    return [head + rng.integers(0, 256, length).tolist() for length in lengths]


@pytest.mark.parametrize("family", SHAPES)
def test_prefill_and_decode_steps_are_one_forward_pass(family):
    model = tiny_model(SHAPES[family])
    tokens = jnp.asarray(prompts_of(24, 24, seed=1))
    positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)
    decoder = jax.jit(lambda *args: bind(model.graph, model.params)(*args))
    logits = jax.jit(lambda hidden: bind(model.graph, model.params).logits(hidden))
    expected = logits(decoder(tokens, positions)[0])
    _, cache = decoder(tokens[:, :4], positions[:, :4])
    _, cache = decoder(tokens[:, 4:13], positions[:, 4:13], cache)  # a prompt in two parts
    c = model.config
    empty = tuple(jnp.zeros((2, c.kv_heads, 5, c.head_dim)) for _ in range(c.layers))
    cache = dataclasses.replace(cache, own=Keys(empty, empty, jnp.full((2, 5), -1)))
    for t in range(13, 18):
        hidden, cache = decoder(tokens[:, t : t + 1], positions[:, t : t + 1], cache)
        np.testing.assert_allclose(logits(hidden)[:, 0], expected[:, t], atol=2e-5, rtol=0)


def test_a_head_that_all_rows_share_is_one_part():
    model = tiny_model()
    shared, rest = prompts_of(17, 9, seed=2)
    decoder = jax.jit(lambda *args: bind(model.graph, model.params)(*args))
    tokens = jnp.asarray([shared + rest])
    expected, _ = decoder(tokens, jnp.arange(26)[None])
    head = rollout.prefill(model.graph, model.params, None, jnp.asarray([shared]), jnp.array([17]))
    head = Keys(tuple(k[0] for k in head.k), tuple(v[0] for v in head.v), head.positions[0])
    hidden, _ = decoder(jnp.asarray([rest]), 17 + jnp.arange(9)[None], Cache((head,)))
    np.testing.assert_allclose(hidden, expected[:, 17:], atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_samples_equal_the_reference_token_for_token(family):
    model = tiny_model(SHAPES[family])
    prompts = prompts_of(1, 31, 32, 33, 70, shared=66)  # below, at and above a bucket, the shared tokens before them
    sampling = Sampling(eos_ids=(5, 9))
    found = generate(model, prompts, 3, KEY, max_new_tokens=20, sampling=sampling, slots=6)
    for item, j in ((0, 0), (1, 2), (2, 1), (3, 0), (4, 2)):
        assert_drawn(found[item][j], model, 20, sampling)


def test_shared_prefix_samples_equal_separate_runs():
    model, prompts, sampling = tiny_model(), prompts_of(40, 12), Sampling(eos_ids=(3,))
    together = generate(model, prompts, 6, KEY, max_new_tokens=24, sampling=sampling)
    for item, prompt in enumerate(prompts):
        for j in range(6):
            alone = sample(model, [ask(prompt, item, j)], KEY, Plan(1, 1, 24), sampling)
            assert next(alone).tokens == together[item][j].tokens


@pytest.mark.parametrize(("slots", "devices"), [(2, 1), (5, 1), (64, 1), (16, 8)])
def test_samples_do_not_depend_on_batch_refilling_or_devices(slots, devices):
    sampling, prompts = Sampling(eos_ids=tuple(range(12))), prompts_of(3, 60, 5, 33, 8, 20, shared=70)
    expected = generate(tiny_model(), prompts, 4, KEY, max_new_tokens=40, sampling=sampling)
    model = tiny_model(devices=devices)
    found = generate(model, prompts, 4, KEY, max_new_tokens=40, sampling=sampling, slots=slots)
    lengths = {len(c.tokens) for row in expected for c in row}
    assert len(lengths) > 3, "rows of one length would not test refilling"
    assert [[c.tokens for c in row] for row in found] == [[c.tokens for c in row] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)


def test_a_row_longer_than_the_smallest_ring_equals_the_reference():
    model, (prompt,), sampling = tiny_model(), prompts_of(6), Sampling()
    (found,) = generate(model, [prompt], 2, KEY, max_new_tokens=300, sampling=sampling)
    assert [len(c.tokens) for c in found] == [300, 300]
    assert_drawn(found[1], model, 300, sampling)


def test_long_and_short_rows_share_a_ring_as_it_wraps_and_grows():
    """One slot's long row lives through many short ones beside it: the ring wraps, grows, and stays right."""
    model, sampling = tiny_model(), Sampling(eos_ids=tuple(range(60)))
    prompts = prompts_of(*[4] * 40, seed=5)
    found = generate(model, prompts, 2, KEY, max_new_tokens=200, sampling=sampling, slots=4)
    longest = max(range(40), key=lambda i: len(found[i][0].tokens))
    assert_drawn(found[longest][0], model, 200, sampling)


def test_the_first_token_may_end_a_row():
    model, prompts = tiny_model(), prompts_of(7, 40)
    (first,), _ = generate(model, prompts, 1, KEY, max_new_tokens=1, sampling=Sampling())
    sampling = Sampling(eos_ids=first.tokens)
    found = generate(model, prompts, 1, KEY, max_new_tokens=5, sampling=sampling)
    assert found[0][0].tokens == ()
    assert found[0][0].log_probs == ()
    assert found[0][0].ended


def test_the_budget_ends_a_row_and_says_so():
    ((found,),) = generate(tiny_model(), prompts_of(9), 1, KEY, max_new_tokens=17, sampling=Sampling())
    assert len(found.tokens) == 17
    assert not found.ended


def test_greedy_takes_the_likeliest_token_whatever_the_key():
    model, prompts = tiny_model(), prompts_of(20)
    greedy = Sampling(temperature=0)
    ((one,),) = generate(model, prompts, 1, KEY, max_new_tokens=12, sampling=greedy)
    ((two,),) = generate(model, prompts, 1, jax.random.key(99), max_new_tokens=12, sampling=greedy)
    assert one.tokens == two.tokens
    assert_drawn(one, model, 12, greedy)


def test_greedy_samples_beside_others_change_nothing_of_them():
    model, prompts = tiny_model(), prompts_of(20, 30)
    mixed = Sampling(temperature=0.8, greedy_from=2)
    requests = [ask(prompt, i, 0, 1, 2) for i, prompt in enumerate(prompts)]
    found = list(sample(model, requests, KEY, Plan(2, 2, 12), mixed))
    assert len(found) == 6
    for completion in found:
        alone = Sampling(temperature=0.0 if completion.sample == 2 else 0.8)
        assert_drawn(completion, model, 12, alone)


def test_log_probs_are_those_of_the_distribution_drawn_from():
    model, (prompt,), sampling = tiny_model(sharpness=3.0), prompts_of(15), Sampling(temperature=0.7)
    ((found,),) = generate(model, [prompt], 1, KEY, max_new_tokens=10, sampling=sampling)
    text = [*prompt, *found.tokens]
    logits = whole(model.config)(model.params, jnp.asarray([text + [0] * (LENGTH - len(text))]))[0]
    expected = jax.nn.log_softmax(logits / 0.7)[jnp.arange(14, 24), jnp.asarray(found.tokens)]
    np.testing.assert_allclose(found.log_probs, expected, atol=1e-4)


def test_prompts_that_do_not_fit_or_are_empty_are_named():
    with pytest.raises(ValueError, match="item 0: a prompt of 1020 tokens and up to 10 new ones"):
        generate(tiny_model(), prompts_of(1020), 1, KEY, max_new_tokens=10)
    with pytest.raises(ValueError, match="a request of 0 prompt tokens"):
        generate(tiny_model(), [[]], 1, KEY, max_new_tokens=10)
    assert generate(tiny_model(), [], 3, KEY, max_new_tokens=10) == []


def test_a_prompt_that_does_not_share_the_head_is_sampled_right():
    """The head that the caller expects is a guess: prompts that start otherwise make it shorter, or nothing."""
    model, sampling = tiny_model(), Sampling()
    prompts = prompts_of(10, 10, 10, shared=150) + prompts_of(80, seed=9)
    requests = [ask(p, i, 0) for i, p in enumerate(prompts)]
    found = {c.item: c for c in sample(model, requests, KEY, Plan(2, 1, 8), sampling, prompts[0][:150])}
    for item, prompt in enumerate(prompts):
        assert found[item].request.prompt == tuple(prompt)
        assert_drawn(found[item], model, 8, sampling)


def test_decode_compiles_once_for_a_bucket():
    model, sampling = tiny_model(seed=3), Sampling(eos_ids=(3,))
    generate(model, prompts_of(40, 50), 2, KEY, max_new_tokens=30, sampling=sampling, slots=4)
    before = rollout.decode._cache_size(), rollout.prefill._cache_size()
    generate(model, prompts_of(50, 61, seed=4), 2, KEY, max_new_tokens=30, sampling=sampling, slots=4)
    assert (rollout.decode._cache_size(), rollout.prefill._cache_size()) == before


def test_one_prompt_compiles_decode_once_whatever_its_length_in_the_bucket():
    """It shares all of itself with itself, but its length is no shape of a program."""
    model, sampling = tiny_model(seed=4), Sampling(temperature=0.9)
    start = rollout.decode._cache_size()
    generate(model, prompts_of(300), 2, KEY, max_new_tokens=40, sampling=sampling)
    assert rollout.decode._cache_size() == start + 1, "three looks by the host are one program"
    prefills = rollout.prefill._cache_size()
    generate(model, prompts_of(310, seed=1), 2, KEY, max_new_tokens=40, sampling=sampling)
    assert (rollout.decode._cache_size(), rollout.prefill._cache_size()) == (start + 1, prefills)


def test_prompt_cache_and_ring_shrink_again_and_samples_stay_right():
    """A long prompt and a long row first, then short ones: both stores grow, wrap and shrink under live rows."""
    model, sampling = tiny_model(), Sampling(eos_ids=tuple(range(40)))
    prompts = prompts_of(200, *[3, 5, 4, 6] * 8, 150, 6)
    found = generate(model, prompts, 3, KEY, max_new_tokens=300, sampling=sampling, slots=4)
    for item in (0, 1, 9, 20, 33, 34):
        assert_drawn(found[item][2], model, 300, sampling)


def test_equal_prompts_share_a_prefill_and_not_their_samples(monkeypatch):
    widths = []
    prefill = rollout.prefill
    monkeypatch.setattr(rollout, "prefill", lambda *args: widths.append(args[3].shape) or prefill(*args))
    prompts = prompts_of(40, 50)
    found = generate(tiny_model(), [prompts[0], prompts[1], prompts[0]], 2, KEY, max_new_tokens=8)
    assert len(widths) == 2
    assert found[0][0].tokens != found[2][0].tokens
    for item, prompt in ((0, prompts[0]), (2, prompts[0]), (1, prompts[1])):
        assert found[item][1].request.prompt == tuple(prompt)
        assert_drawn(found[item][1], tiny_model(), 8, Sampling())


def test_a_prompt_longer_than_one_prefill_pass(monkeypatch):
    monkeypatch.setattr(rollout, "_QUERIES", 32)
    model = tiny_model(dataclasses.replace(LLAMA, windows=(None, 9)), seed=8)
    tokens, lengths = jnp.asarray(prompts_of(90)), jnp.array([90])
    in_parts = jax.jit(rollout.prefill.__wrapped__, static_argnums=0)(model.graph, model.params, None, tokens, lengths)
    monkeypatch.setattr(rollout, "_QUERIES", 128)
    at_once = jax.jit(rollout.prefill.__wrapped__, static_argnums=0)(model.graph, model.params, None, tokens, lengths)
    for a, b in zip(jax.tree.leaves(in_parts), jax.tree.leaves(at_once), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_refilling_keeps_a_long_row_from_holding_up_the_rest(monkeypatch):
    """24 rows in 4 slots: refilled, the batch decodes little more than the tokens there are."""
    steps = []
    decode = rollout.decode

    def counted(*args):
        result = decode(*args)
        steps.append(int(result[2].count.max()))
        return result

    monkeypatch.setattr(rollout, "decode", counted)
    model, sampling = tiny_model(), Sampling(eos_ids=tuple(range(8)))
    found = generate(model, prompts_of(*[5] * 24), 1, KEY, max_new_tokens=120, sampling=sampling, slots=4)
    lengths = [len(row[0].tokens) for row in found]
    in_batches_of_four = sum(max(lengths[i : i + 4]) for i in range(0, 24, 4))
    assert sum(steps) < 0.75 * in_batches_of_four


@pytest.mark.parametrize("devices", [1, 8])
def test_forced_scores_are_always_valid(devices):
    model, table = tiny_model(devices=devices), [bytes([i]) for i in range(256)] + [b""] * 3
    tail = tuple(scores.FORCE_TAIL.encode())

    def text(ids):
        return b"".join(table[i] for i in ids).decode(errors="replace")

    forcing = Forcing(scores.force_table(table, 5), tail, lambda ids, n: scores.parse(text(ids), n)[0] is not None)
    requests = [ask(p, i, 0, 1, 2, numbers=1 + i % 5) for i, p in enumerate(prompts_of(5, 9, 40, 41, 3))]
    sampling = Sampling(eos_ids=tuple(range(250, 259)))
    found = list(sample(model, requests, KEY, Plan(2, 2, 30), sampling, forcing=forcing))
    assert len(found) == 15
    ended_early = 0
    for completion in found:
        assert completion.forced_from is not None
        shown, reason = scores.parse(text(completion.tokens), completion.request.numbers)
        assert shown is not None, reason
        start = completion.forced_from
        assert completion.tokens[start : start + len(tail)] == tail
        assert set(completion.log_probs[start : start + len(tail)]) == {0.0}
        assert len(completion.log_probs) == len(completion.tokens)
        ended_early += start < 30
    assert 0 < ended_early < 15, "both ways into the tail: an end id, and the budget"


def test_forcing_leaves_the_drawn_text_as_it_was():
    """What a row draws before the tail is what it draws without forcing."""
    model, table = tiny_model(), [bytes([i]) for i in range(256)] + [b""] * 3
    forcing = Forcing(scores.force_table(table, 2), tuple(scores.FORCE_TAIL.encode()), lambda ids, n: False)
    sampling = Sampling(eos_ids=(1, 2, 3, 4, 5, 6, 7, 8))
    (prompt,) = prompts_of(30)
    free = generate(model, [prompt], 4, KEY, max_new_tokens=40, sampling=sampling)[0]
    forced = sample(model, [ask(prompt, 0, 0, 1, 2, 3, numbers=2)], KEY, Plan(1, 4, 40), sampling, (), forcing)
    for completion in forced:
        assert completion.tokens[: completion.forced_from] == free[completion.sample].tokens


@pytest.mark.parametrize(
    ("n", "least", "bucket"), [(0, 32, 0), (1, 32, 32), (32, 32, 32), (33, 32, 64), (1023, 32, 1024)]
)
def test_buckets(n, least, bucket):
    assert power_of_two(n, least) == bucket


def test_common_prefix_stops_short_of_the_last_token():
    assert common_prefix([[1, 2, 3], [1, 2, 4]]) == (1, 2)
    assert common_prefix([[1, 2, 3]]) == (1, 2)
    assert common_prefix([[1, 2], [1, 2, 3]]) == (1,)
    assert common_prefix([[1], [2]]) == ()


def test_the_prompt_cache_follows_the_longest_prompt(monkeypatch):
    """It grows at once, and shrinks where that saves two steps of widths or three quarters; samples stay right."""
    monkeypatch.setattr(batching, "_CACHE_STEP", 64)
    model, sampling, widths = tiny_model(), Sampling(), []
    decode = rollout.decode
    monkeypatch.setattr(rollout, "decode", lambda *args: widths.append(args[2][0].positions.shape[1]) or decode(*args))
    held, resize = [], rollout.resize_slots

    def resized(store, *args):
        held.append(sum(x.ndim == 4 and x.shape == store.shape for x in jax.live_arrays()))
        return resize(store, *args)

    monkeypatch.setattr(rollout, "resize_slots", resized)
    prompts = prompts_of(60, 200, 150, 60)
    requests = [ask(p, i, 0) for i, p in enumerate(prompts)]
    found = {c.item: c for c in sample(model, requests, KEY, Plan(1, 1, 4), sampling)}
    assert widths == [64, 256, 256, 64]
    assert held == [0, 4, 3, 2, 1] * 2, "never two whole caches at once"
    for item in range(4):
        assert_drawn(found[item], model, 4, sampling)
