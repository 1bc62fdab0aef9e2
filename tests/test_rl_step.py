"""The compiled step of reinforcement learning: its rewards, its gradients, what it does not depend on."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import GEMMA, LLAMA, tiny_model

from grm_jax import losses, rewards, scores
from grm_jax.data.batches import Batch
from grm_jax.data.packing import Source, packed
from grm_jax.models import lora
from grm_jax.models.decoder import split_abstract
from grm_jax.recipes import Lora, Optimizer, RftConfig, RlConfig
from grm_jax.sampler import Sampling, generate
from grm_jax.sharding import batch_sharding, make_mesh, replicated
from grm_jax.spct import rft_step, rl_step
from grm_jax.spct.rl_step import Rollouts
from grm_jax.tokenizer import ByteTokenizer
from grm_jax.train.policy import Policy, join, make_optimizer, make_schedule, split, start

TOKENIZER = ByteTokenizer()
TABLE = scores.token_table(TOKENIZER.token_bytes())
(EOS,) = TOKENIZER.eos_ids
KEY = jax.random.key(11, impl="threefry2x32")
P, G, T = 4, 4, 24
SMALL = dataclasses.replace(LLAMA, layers=1, windows=(None,))  # programs compile in half the time
RECIPE = RlConfig(
    prompts_per_step=P,
    group=G,
    max_new_tokens=T,
    microbatch_prompts=P,
    kl_coef=0.0,
    compute_dtype="float32",
    remat="none",
    optimizer=Optimizer(learning_rate=1e-2),
    items=dataclasses.replace(RlConfig.items, files=("given",)),
)


def batch(seed=0, head=0, prompts=P, width=32, choices=0.0):
    """Prompts of random bytes with one, two or three responses; a share `choices` asks for the best one's number."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 4, prompts).astype(np.int32)
    labels = np.zeros((prompts, 3), np.float32)
    labels[np.arange(prompts), rng.integers(0, counts)] = 1
    labels[:, 0] = np.where(counts == 1, rng.integers(0, 2, prompts), labels[:, 0])
    return Batch(
        head=rng.integers(0, 256, head).astype(np.int32),
        tokens=rng.integers(0, 256, (prompts, width)).astype(np.int32),
        lengths=rng.integers(1, width + 1, prompts).astype(np.int32),
        labels=labels,
        counts=counts,
        low=np.where(counts == 1, 0, 1).astype(np.int32),
        high=np.where(counts == 1, 1, 10).astype(np.int32),
        items=rng.integers(0, 2**31, prompts).astype(np.int32),
        choice=(counts > 1) & (rng.random(prompts) < choices),
    )


def policy_of(model, rank=0):
    return Policy(model.config, model.graph, model.mesh, Lora(rank=rank), jnp.dtype("float32"))


@cache
def writer():
    """A tiny model that writes boxes, mostly whole ones: 150 steps on random ones."""
    model, rng = tiny_model(SMALL), np.random.default_rng(0)
    recipe = RftConfig(
        batch_tokens=8 * 64,
        sequence_tokens=64,
        microbatch_rows=8,
        general=("given",),
        steps=150,
        compute_dtype="float32",
        remat="none",
        optimizer=Optimizer(learning_rate=1e-2),
    )
    records = [rng.integers(0, 256, rng.integers(1, 6)).tolist() for _ in range(200)]

    def encode(prompt):
        numbers = ", ".join(str(x) for x in rng.integers(1, 11, rng.integers(1, 4)))
        return prompt, [*f"S: \\boxed{{{numbers}}}".encode(), EOS]

    policy, optimizer = policy_of(model), make_optimizer(recipe.optimizer, recipe.steps)
    placed = jax.device_put(model.params, replicated(model.mesh))
    state = start(placed, optimizer, model.mesh)
    step = rft_step.make_step(policy, recipe, optimizer, state)
    texts = iter(packed([Source(records, encode, 1.0)], 8, 64, 0)[0])
    for _ in range(recipe.steps):
        state, scalars = step(state, {}, rft_step.put(next(texts), policy))
    assert step._cache_size() == 1
    assert float(scalars["loss"]) < 1.0
    return jax.device_get(state.params)


def begin(recipe, devices=1, params=None, reward=rewards.outcome, config=SMALL):
    """(step, state, policy) of a tiny model on so many devices."""
    model = tiny_model(config)
    model = dataclasses.replace(model, mesh=make_mesh(data=devices))
    policy = policy_of(model, recipe.lora.rank)
    everywhere = replicated(policy.mesh)
    params = jax.device_put(model.params if params is None else params, everywhere)
    params = jax.tree.map(jnp.copy, params)  # steps donate them
    optimizer = make_optimizer(recipe.optimizer, 100)
    state = start(params, optimizer, policy.mesh)
    return rl_step.make_step(policy, recipe, optimizer, TABLE, (EOS,), state, reward), state, policy


def host_reward(report, given, row):
    """What `parse` and Eq. 10 and 11 say of a rollout's decoded text, an unfinished one being wrong."""
    p = row // (report.rollouts.tokens.shape[0] // len(given.counts))
    n = int(given.counts[p])
    ids = report.rollouts.tokens[row, : report.rollouts.counts[row]].tolist()
    text, low, high = TOKENIZER.decode(ids), int(given.low[p]), int(given.high[p])
    found, _ = scores.parse_choice(text, n) if given.choice[p] else scores.parse(text, n, low, high)
    found = found if EOS in ids else None  # unfinished
    right = rewards.is_correct(found, tuple(given.labels[p, :n].tolist()))
    return found, right, 1.0 if right else -1.0


def test_every_rollout_of_200_steps_is_rewarded_as_the_host_would():
    """Whole boxes, broken ones, and texts that a budget too small for three scores cuts short, as the model drifts."""
    recipe = dataclasses.replace(RECIPE, max_new_tokens=17, optimizer=Optimizer(learning_rate=1e-3))
    step, state, policy = begin(recipe, params=writer())
    kinds = {"right": 0, "wrong": 0, "unparsed": 0, "endless": 0}
    for number in range(200):
        given = batch(number, choices=0.3)
        state, report = step(state, {}, rl_step.put(given, policy), KEY)
        report = jax.device_get(report)
        for row in range(P * G):
            found, right, reward = host_reward(report, given, row)
            n = given.counts[row // G]
            assert report.judged.valid[row] == (found is not None)
            assert report.judged.correct[row] == right
            assert report.judged.reward[row] == reward
            expected = (*(found or (-1,) * n), *(-1,) * (3 - n))
            assert tuple(report.judged.scores[row]) == expected
            kinds["unparsed" if found is None else "right" if right else "wrong"] += 1
            kinds["endless"] += not report.rollouts.ended[row]
    assert min(kinds.values()) > 100, f"a kind of rollout hardly occurred: {kinds}"
    assert step._cache_size() == 1


PIECES = ["\\boxed{", "}", "7", "10", "-3", "99999", ", ", ",", " ", "x", "\n", "Scores: ", "{", "\\box"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=9), min_size=4, max_size=4), st.integers(0, 9))
def test_any_text_is_judged_as_the_host_would(texts, seed):
    given_batch = batch(seed)
    rows = [list("".join(pieces).encode())[:60] for pieces in texts]
    tokens = np.zeros((4, 64), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids) + 1] = [*ids, EOS]
    ended = np.array([True, True, True, seed % 2 == 0])
    counts = np.array([len(ids) for ids in rows], np.int32) + ended
    rollouts = Rollouts(tokens, np.zeros((4, 64), np.float32), counts, ended)
    judged = _judge(rollouts, given_batch)
    report = rl_step.Report({}, rollouts, jax.device_get(judged))
    for row in range(4):
        found, right, reward = host_reward(report, given_batch, row)
        assert (report.judged.valid[row], report.judged.correct[row]) == (found is not None, right)
        assert report.judged.reward[row] == reward
        assert report.judged.tie[row] == (found is not None and rewards.is_tie(found))


@jax.jit
def _judge(rollouts, given_batch):
    return rl_step.judge(rollouts, given_batch, 1, TABLE, rewards.outcome)


def test_rollouts_are_the_samplers_own():
    """One sampler: the step's tokens are those of `generate` with the same keys, the shared head and prompt included."""
    model, given_batch = tiny_model(dataclasses.replace(GEMMA, layers=1, windows=(8,))), batch(3, head=64)
    policy, sampling = policy_of(model), Sampling(0.8, eos_ids=tuple(range(20)))
    recipe = dataclasses.replace(RECIPE, microbatch_prompts=2, temperature=0.8)
    rolled = jax.jit(lambda given: rl_step.roll(policy, model.params, given, KEY, recipe, sampling))(given_batch)
    prompts = [[*given_batch.head, *row[:n]] for row, n in zip(given_batch.tokens, given_batch.lengths, strict=True)]
    ended = 0
    for p, prompt in enumerate(prompts):
        request = rl_requests(prompt, int(given_batch.items[p]))
        for completion in request(model, sampling):
            row = p * G + completion.sample
            written = rolled.tokens[row, : rolled.counts[row]].tolist()
            assert tuple(written[: len(completion.tokens)]) == completion.tokens
            assert bool(rolled.ended[row]) == completion.ended
            np.testing.assert_allclose(rolled.log_probs[row, : len(completion.tokens)], completion.log_probs, atol=1e-4)
            ended += completion.ended
    assert 0 < ended < P * G


def rl_requests(prompt, item):
    from grm_jax.sampler import Plan, Request, sample

    request = Request(tuple(int(t) for t in prompt), tuple((item, g) for g in range(G)))
    return lambda model, sampling: sample(model, [request], KEY, Plan(1, G, T), sampling)


def steps(recipe, count=2, devices=1, **options):
    step, state, policy = begin(recipe, devices, params=writer(), **options)
    for number in range(count):
        state, report = step(state, {}, rl_step.put(batch(number, prompts=8), policy), KEY)
    return jax.device_get((state.params, report))


def assert_close(found, expected, atol):
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=atol, err_msg=name)


@pytest.mark.slow
def test_microbatches_change_nothing():
    """Plain SGD-like comparison: Adam would turn a rounding error of a tiny gradient into a step of full size."""
    recipe = dataclasses.replace(RECIPE, prompts_per_step=8, microbatch_prompts=8)
    recipe = dataclasses.replace(recipe, optimizer=Optimizer(learning_rate=1e-2, eps=1.0))
    params, report = steps(recipe)
    assert np.abs(params["embed"] - writer()["embed"]).max() > 1e-4, "nothing was learned, so nothing is compared"
    found, found_report = steps(dataclasses.replace(recipe, microbatch_prompts=2))
    np.testing.assert_array_equal(found_report.rollouts.tokens, report.rollouts.tokens)
    assert_close(found, params, 2e-6)
    for name, value in report.scalars.items():
        np.testing.assert_allclose(found_report.scalars[name], value, atol=1e-5, err_msg=name)


def test_equal_rewards_and_the_reference_itself_teach_nothing():
    """No advantage, and a KL to the policy itself: every gradient is zero, and not a bit of the weights moves."""
    recipe = dataclasses.replace(RECIPE, kl_coef=0.5)

    def constant(scores, valid, labels, counts):
        return jnp.ones(scores.shape[0])

    step, state, policy = begin(recipe, params=writer(), reward=constant)
    frozen = jax.tree.map(jnp.copy, state.params)
    state, report = step(state, frozen, rl_step.put(batch(), policy), KEY)
    assert float(report.scalars["zero_advantage_groups"]) == 1
    assert float(report.scalars["kl"]) == pytest.approx(0, abs=1e-6)
    assert float(report.scalars["grad_norm"]) == pytest.approx(0, abs=1e-4)
    step, state, policy = begin(RECIPE, params=writer(), reward=constant)
    state, _ = step(state, {}, rl_step.put(batch(), policy), KEY)
    for name, value in writer().items():
        np.testing.assert_array_equal(state.params[name], value, err_msg=name)


def test_the_kl_pulls_back_to_the_reference():
    recipe = dataclasses.replace(RECIPE, kl_coef=1.0, optimizer=Optimizer(learning_rate=3e-3))

    def constant(scores, valid, labels, counts):
        return jnp.ones(scores.shape[0])

    rng = np.random.default_rng(0)
    moved = {name: value + 0.1 * rng.normal(size=value.shape).astype(np.float32) for name, value in writer().items()}
    step, state, policy = begin(recipe, params=moved, reward=constant)
    frozen = jax.device_put(writer(), replicated(policy.mesh))
    kls = []
    for number in range(20):
        state, report = step(state, frozen, rl_step.put(batch(number), policy), KEY)
        kls.append(float(report.scalars["kl"]))
    assert np.mean(kls[-3:]) < 0.5 * np.mean(kls[:3])


def test_what_is_rewarded_becomes_likelier():
    """A reward for ending soon: rollouts grow shorter within a few steps."""
    recipe = dataclasses.replace(RECIPE, prompts_per_step=8, microbatch_prompts=8, group=8)

    def one_number(scores, valid, labels, counts):
        return jnp.where(valid, 1.0, -1.0)

    step, state, policy = begin(recipe, params=writer(), reward=one_number)
    shares = []
    for number in range(40):
        given_batch = dataclasses.replace(batch(number, prompts=8), counts=np.full(8, 1, np.int32))
        state, report = step(state, {}, rl_step.put(given_batch, policy), KEY)
        shares.append(float(report.judged.valid.mean()))
    assert np.mean(shares[-5:]) > np.mean(shares[:5]) + 0.2, shares


SELDOM = {"dr_grpo", "rloo"}  # they differ from grpo in what tests/test_losses.py works by hand


@pytest.mark.parametrize(
    "objective",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SELDOM)) for name in sorted(losses.OBJECTIVES)],
)
def test_every_objective_makes_a_finite_step(objective):
    recipe = dataclasses.replace(RECIPE, objective=objective, kl_coef=0.01, updates_per_step=2)
    step, state, policy = begin(recipe, params=writer())
    frozen = jax.tree.map(jnp.copy, state.params)
    before = jax.device_get(state.params)
    state, report = step(state, frozen, rl_step.put(batch(7), policy), KEY)
    assert all(np.isfinite(float(value)) for value in report.scalars.values()), report.scalars
    assert float(report.scalars["zero_advantage_groups"]) < 1, "a batch that teaches nothing shows nothing"
    assert any((np.asarray(state.params[name]) != before[name]).any() for name in before)
    assert float(report.scalars["drift_max"]) < 1e-4, "before the first update trainer and sampler are one policy"
    assert float(report.scalars["kl"]) > 0, "behind the first update they are not the reference"


def test_lora_starts_as_its_base_and_leaves_it_alone():
    recipe = dataclasses.replace(RECIPE, lora=Lora(rank=2), kl_coef=0.1)
    base = jax.tree.map(jnp.asarray, writer())
    _, shapes = split_abstract(SMALL)
    step, state, policy = begin(recipe, params=lora.init(shapes, recipe.lora, KEY))
    frozen = jax.device_put(base, replicated(policy.mesh))
    plain, full, _ = begin(dataclasses.replace(RECIPE, kl_coef=0.1), params=base)
    given_batch = rl_step.put(batch(6), policy)
    _, expected = plain(full, jax.tree.map(jnp.copy, frozen), given_batch, KEY)
    state, report = step(state, frozen, given_batch, KEY)
    np.testing.assert_array_equal(report.rollouts.tokens, expected.rollouts.tokens)
    np.testing.assert_array_equal(report.rollouts.log_probs, expected.rollouts.log_probs)
    assert float(report.scalars["kl"]) == pytest.approx(0, abs=1e-9)
    for name, value in base.items():
        np.testing.assert_array_equal(frozen[name], value)
    assert any(np.asarray(value).any() for name, value in state.params.items() if name.endswith("lora_b"))


def test_one_program_a_shape():
    step, state, policy = begin(RECIPE)
    for width, number in ((32, 0), (32, 1), (64, 2), (32, 3), (64, 4)):
        state, _ = step(state, {}, rl_step.put(batch(number, width=width), policy), KEY)
    assert step._cache_size() == 2


@pytest.mark.parametrize("devices", [2, 8])
def test_split_keeps_groups_whole_and_join_undoes_it(devices):
    x = jnp.arange(16 * 3).reshape(48, 1)
    parts = split(x, 4, group=3)
    assert parts.shape == (4, 12, 1)
    groups = np.asarray(parts).reshape(-1, 3)
    assert (groups % 3 == [0, 1, 2]).all()
    np.testing.assert_array_equal(join(parts, group=3), x)
    mesh = make_mesh(data=devices)
    spread = jax.jit(lambda x: split(x, 2))(jax.device_put(x, batch_sharding(mesh)))
    np.testing.assert_array_equal(spread, split(x, 2))


def test_the_schedule_warms_up_and_falls():
    rate = make_schedule(Optimizer(learning_rate=1.0, warmup_steps=4, schedule="cosine"), 14)
    np.testing.assert_allclose([rate(i) for i in (0, 1, 3, 4, 9, 14)], [0.25, 0.4375, 0.8125, 1.0, 0.5, 0.0], atol=1e-6)
    assert make_schedule(Optimizer(learning_rate=0.3), 10)(9) == pytest.approx(0.3)


@pytest.mark.slow
def test_generate_is_untouched_by_a_policy_of_another_dtype():
    """bfloat16 policies roll too: drift is what bfloat16's rounding makes of it, and reported."""
    model = tiny_model(SMALL)
    policy = dataclasses.replace(policy_of(model), dtype=jnp.dtype("bfloat16"))
    optimizer = make_optimizer(RECIPE.optimizer, 10)
    state = start(jax.device_put(jax.tree.map(jnp.copy, model.params), replicated(model.mesh)), optimizer, model.mesh)
    step = rl_step.make_step(policy, RECIPE, optimizer, TABLE, (EOS,), state)
    state, report = step(state, {}, rl_step.put(batch(8), policy), KEY)
    assert 0 < float(report.scalars["drift_mean"]) < 0.02
    assert state.params["embed"].dtype == jnp.float32
    assert generate(model, [[1, 2]], 1, KEY, max_new_tokens=2)
