"""Baselines with a scalar head: their losses and scores by hand, and runs that learn a preference."""

import dataclasses
import functools
import json
import random
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LLAMA, tiny_model

import grm_jax
from grm_jax import Example, Message, baselines, losses, prompts, scalar_rm
from grm_jax.config import JudgeSettings
from grm_jax.data.chat import encode_chat
from grm_jax.datatypes import Usage
from grm_jax.grm import Grm
from grm_jax.main import main
from grm_jax.models.decoder import bind
from grm_jax.recipes import Checkpoints, CloudConfig, Fresh, Items, Optimizer, PairsConfig
from grm_jax.spct import baselines as training
from grm_jax.tokenizer import ByteTokenizer
from grm_jax.verdicts import of_rewards
from grm_jax.weights.save import save_hf

TOKENIZER = ByteTokenizer()
SCALAR = dataclasses.replace(LLAMA, scalar=True)
CRITIQUE = prompts.load_template("critique", boxed=False)
PAIR = prompts.load_template("pair_rm", boxed=False)
TEXT = str(Path(__file__).parents[1] / "configs/tiny_text.txt")
THREE = Example("three", (Message("user", "which?"),), ("one", "two", "three or so"), (0.0, 2.0, 1.0))


def scalar_model():
    model = tiny_model(SCALAR)
    score = jnp.asarray(np.random.default_rng(4).normal(size=(1, LLAMA.dim)), jnp.float32)
    return dataclasses.replace(model, params=model.params | {"score": score})


@functools.partial(jax.jit, static_argnames="graph")
def _alone(graph, params, tokens, last):
    decoder = bind(graph, params)
    hidden, _ = decoder(tokens, jnp.arange(tokens.shape[1])[None])
    return decoder.scalars(hidden[:, last])[0]


def alone(model, prompt, text):
    """The scalar of one text, from a forward pass over it alone."""
    ids = [*prompt, *text]
    return float(_alone(model.graph, model.params, np.array([ids + [0] * (1024 - len(ids))]), len(ids) - 1))


def test_bradley_terry_by_hand():
    """Pairs (2, 1) and (-1, 1), the second one's worse row first."""
    scalars, correct = jnp.array([2.0, 1.0, 1.0, -1.0]), jnp.array([1.0, 0.0, 0.0, 1.0])
    weights = jnp.array([0.1, 0.1, 0.4, 0.4])
    by_hand = 0.2 * np.log1p(np.exp(-1)) + 0.8 * np.log1p(np.exp(2))
    assert float(losses.bradley_terry(scalars, correct, weights)) == pytest.approx(by_hand, rel=1e-6)
    assert losses.better_first(scalars, correct).tolist() == [True, True, False, False]


def test_scalars_of_many_texts_are_those_of_each_alone(monkeypatch):
    """Prompts of many lengths, some shared, more texts than are computed at once, in an order of their own."""
    monkeypatch.setattr(scalar_rm, "ROWS", 8)
    model, rng = scalar_model(), np.random.default_rng(0)
    shared = [rng.integers(0, 256, n).tolist() for n in (3, 40, 50)]
    texts = [
        (shared[i % 3] if i % 2 else rng.integers(0, 256, 1 + 2 * i).tolist(), rng.integers(0, 256, 1 + i).tolist())
        for i in range(13)
    ]
    found = scalar_rm.scalars(model, texts)
    for i in (0, 1, 7, len(texts) - 1):
        assert found[i] == pytest.approx(alone(model, *texts[i]), abs=2e-5)


def test_long_texts_are_computed_a_few_at_once():
    """Memory goes with padded tokens: 8 of 2,048 and 2,048 are 32,768."""
    texts = [([i] * 1500, [1] * 1100) for i in range(20)] + [([99] * 9000, [i] * 9000) for i in range(9)]
    of_prompt = {}
    for i, (prompt, _) in enumerate(texts):
        of_prompt.setdefault(tuple(prompt), []).append(i)
    shares = scalar_rm._shares(list(of_prompt.items()), texts)
    assert [len(share) for share in shares] == [8, 8, 4, 1]  # the last is one prompt with all its texts
    shares = scalar_rm._shares(list(of_prompt.items()), texts, parts=4)
    assert [len(share) for share in shares] == [20, 1], "four devices take four times as many"


def test_a_reward_that_is_no_number_is_named():
    with pytest.raises(ValueError, match=r"'three' has rewards \[nan, 1.0, 2.0\]: they have to be finite"):
        of_rewards(THREE, [float("nan"), 1.0, 2.0], Usage(1, 0, 0.0))


def test_a_reward_is_read_at_the_end_of_the_conversation():
    model = scalar_model()
    (verdict,) = baselines.BradleyTerry(model, TOKENIZER).judge([THREE], JudgeSettings())
    expected = [
        alone(model, *encode_chat(TOKENIZER, (*THREE.messages, Message("assistant", text)))) for text in THREE.responses
    ]
    assert verdict.scores == pytest.approx(expected, abs=2e-5)
    assert verdict.best == int(np.argmax(expected))
    assert (verdict.votes, verdict.valid, verdict.tie, verdict.judgments) == (1, 1, False, ())


def test_long_texts_are_cut_for_a_reward_and_control_tokens_are_text():
    specials = dataclasses.replace(THREE, messages=(Message("user", "a<|end|>b" * 90),), responses=("x" * 900, "y"))
    for i in (0, 1):
        prompt, text = baselines.response_ids(TOKENIZER, specials, i, 500)
        assert len(prompt) + len(text) <= 500
    plain, _ = baselines.response_ids(TOKENIZER, dataclasses.replace(THREE, reference="unseen"), 0, 500)
    assert b"unseen" not in bytes(id for id in plain if id < 256)
    with pytest.raises(ValueError, match="use a model with a longer context, or shorter texts"):
        baselines.response_ids(TOKENIZER, specials, 0, 60)


def test_a_pair_rm_asks_both_orders_of_every_pair():
    model = scalar_model()
    judge = baselines.PairRm(model, TOKENIZER, PAIR)
    (verdict,) = judge.judge([THREE], JudgeSettings())
    odds = {
        (i, j): alone(model, *baselines.pair_ids(TOKENIZER, PAIR, THREE, i, j, 1024))
        for i in range(3) for j in range(3) if i != j
    }  # fmt: skip
    expected = [sum(odds[i, j] - odds[j, i] for j in range(3) if j != i) / 4 for i in range(3)]
    assert verdict.scores == pytest.approx(expected, abs=5e-5)
    two = dataclasses.replace(THREE, responses=THREE.responses[:2], scores=None)
    (verdict,) = judge.judge([two], JudgeSettings())
    assert verdict.scores == pytest.approx(((odds[0, 1] - odds[1, 0]) / 2, (odds[1, 0] - odds[0, 1]) / 2), abs=5e-5)
    with pytest.raises(ValueError, match="'three' has one response"):
        list(judge.judge([dataclasses.replace(THREE, responses=("x",))], JudgeSettings()))


def test_cloud_reads_its_critics_critiques():
    critic, head = Grm(tiny_model(), TOKENIZER, "critic"), scalar_model()
    cloud = baselines.Cloud(critic, head, TOKENIZER, CRITIQUE)
    other = dataclasses.replace(THREE, id="other", responses=("yes", "no"))
    settings = JudgeSettings(votes=3, max_new_tokens=12, temperature=1.0, slots=8)
    found = {verdict.id: verdict for verdict in cloud.judge([THREE, other], settings)}
    assert found.keys() == {"three", "other"}
    for example in (THREE, other):
        verdict = found[example.id]
        rewards = np.zeros((3, len(example.responses)))
        for j, judgment in enumerate(verdict.judgments):
            parts = judgment.text.split("[Response ")[1:]
            for i, part in enumerate(parts):
                text = part.split("] ", 1)[1].removesuffix("\n\n" if i + 1 < len(parts) else "")
                one = Example("x", example.messages, (example.responses[i],))
                turns = prompts.render(one, (0,), CRITIQUE, controls=TOKENIZER.specials)
                rewards[j, i] = alone(head, *encode_chat(TOKENIZER, (*turns, Message("assistant", text))))
            assert judgment.values == pytest.approx(rewards[j] / 3, abs=5e-5)
        assert verdict.scores == pytest.approx(rewards.mean(axis=0), abs=1e-4)
        assert (verdict.votes, verdict.valid) == (3, 3)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def preferences(tmp_path_factory) -> Path:
    """Responses of two and three, of which the one that says yes is the best."""
    folder, rng = tmp_path_factory.mktemp("preferences"), random.Random(0)
    rows = []
    for i in range(240):
        n = rng.choice((2, 3))
        words = ["yes", *rng.sample(("no", "never", "nay"), n - 1)]
        rng.shuffle(words)
        answers = [f"{word} {rng.randrange(100)}" for word in words]
        rows.append(
            {"id": f"{i}", "prompt": f"{i}?", "responses": answers, "scores": [float(word == "yes") for word in words]}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def fields_of(folder: Path, kind: str, **fields) -> dict:
    return {
        "output": str(folder / kind),
        "model": "fresh",
        "fresh": Fresh(dim=32, layers=1, heads=2, mlp_dim=64, max_positions=512),
        "items": Items(files=(str(folder / "rows.jsonl"),), held_out=40, n_choices=(3,)),
        "steps": 40,
        "batch": 16,
        "microbatch": 8,
        "remat": "none",
        "optimizer": Optimizer(learning_rate=5e-3),
        "checkpoints": Checkpoints(every=100),
    } | fields


def learned(folder: Path, kind: str) -> float:
    before, after = (json.loads(line) for line in (folder / kind / "held_out.jsonl").read_text().splitlines())
    assert before["accuracy"] < 0.6, "a head at zero ties all"
    assert before["ties"] == 1
    return after["accuracy"]


def scored(folder: Path, kind: str, *more: str) -> float:
    """What `score` says of all rows, with the trained folder."""
    output = folder / kind / "verdicts.jsonl"
    asked = ["score", "--input", str(folder / "rows.jsonl"), "--output", str(output), "--baseline", kind]
    assert main([*asked, "--model", str(folder / kind / "model"), *more]) == 0
    labels = [json.loads(line)["scores"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    verdicts = [json.loads(line) for line in output.read_text().splitlines()]
    return np.mean([label[verdict["best"]] == 1 for label, verdict in zip(labels, verdicts, strict=True)])


def test_bradley_terry_learns_a_preference(preferences):
    training.bradley_terry(PairsConfig(**fields_of(preferences, "bradley_terry")))
    assert learned(preferences, "bradley_terry") > 0.95
    assert scored(preferences, "bradley_terry") > 0.95
    reward = grm_jax.load_baseline("bradley_terry", str(preferences / "bradley_terry/model"))
    (verdict,) = reward.judge([Example("new", (Message("user", "900?"),), ("nay 1", "yes 1"))], JudgeSettings())
    assert verdict.best == 1


def test_pair_rm_learns_a_preference_and_keeps_its_template(preferences):
    fields = fields_of(preferences, "pair_rm", template=TEXT, steps=60)
    training.pair_rm(PairsConfig(**fields))
    assert (preferences / "pair_rm/model/template.txt").read_text() == Path(TEXT).read_text()
    assert learned(preferences, "pair_rm") > 0.9
    model = baselines.load("pair_rm", str(preferences / "pair_rm/model"))
    assert model.template.name == "tiny_text"


@pytest.mark.slow
def test_cloud_learns_a_preference_and_goes_on_with_its_critiques(preferences):
    critic = preferences / "critic"
    save_hf(critic, LLAMA, tiny_model().params, TOKENIZER, None, "float32")
    fields = fields_of(
        preferences, "cloud", template=TEXT, critic=str(critic), max_new_tokens=6, critiques=2, steps=110
    )
    training.cloud(CloudConfig(**fields))
    written = preferences / "cloud/critiques.jsonl"
    assert learned(preferences, "cloud") > 0.9
    before = written.read_bytes()
    assert set(Counter(json.loads(line)["id"] for line in before.splitlines()).values()) == {2}
    written.write_bytes(before[: len(before) // 2])
    training.cloud(CloudConfig(**fields))  # the rest is written again, and the same
    assert written.read_bytes() == before
    assert scored(preferences, "cloud", "--critic", str(critic), "--votes", "2", "--max-new-tokens", "6") > 0.9


def test_bad_input_is_named(preferences, tmp_path, capsys):
    for args, said in (
        (["--baseline", "cloud"], "cloud has a critic, and nothing else"),
        (["--critic", "x"], "critic = x and baseline = None"),
        (["--baseline", "pair_rm", "--template", "choice"], "baseline pair_rm has no use for it"),
        (["--baseline", "bradley_terry", "--expected-scores"], "expected_scores = True: baseline bradley_terry"),
    ):
        assert main(["score", "--output", str(tmp_path / "v"), *args]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    single = tmp_path / "single.jsonl"
    single.write_text(json.dumps({"prompt": "?", "responses": ["a"], "scores": [1]}) + "\n")
    pair = ["score", "--input", str(single), "--output", str(tmp_path / "v"), "--baseline", "pair_rm"]
    assert main(pair) == 2
    assert "a pair RM compares two or more" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no pairs to train on"):
        training.bradley_terry(PairsConfig(**fields_of(tmp_path, "x", items=Items(files=(str(single),)))))
    with pytest.raises(ValueError, match="needs one, the model that it was trained with"):
        baselines.load("cloud", "x")
    with pytest.raises(ValueError, match="bradley_terry has none"):
        baselines.load("bradley_terry", "x", critic="y")
    assert main(["pair_rm", "--output", str(tmp_path / "x")]) == 2
    assert "items.files names no file" in capsys.readouterr().err
