"""Training of the meta RM: batches, the step, calibration by hand, and a run that learns and goes on."""

import dataclasses
import functools
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import LLAMA, tiny_model

from grm_jax import meta_rm, prompts
from grm_jax.data import batches
from grm_jax.datatypes import Message
from grm_jax.main import main
from grm_jax.models import lora
from grm_jax.models.decoder import split_abstract
from grm_jax.recipes import Checkpoints, Fresh, Lora, MetaConfig, Optimizer
from grm_jax.spct import calibration, meta, runs, scalar, scalar_batches, scalar_step
from grm_jax.spct.sample import Sample, read_samples, row_of
from grm_jax.tokenizer import ByteTokenizer
from grm_jax.train import policy as training
from grm_jax.train.policy import Policy
from grm_jax.weights.adapters import save_adapters
from grm_jax.weights.save import save_hf

TEMPLATE = prompts.load_template("meta_rm", boxed=False)
FRESH = Fresh(dim=32, layers=2, heads=2, mlp_dim=64, max_positions=512)


def sample(i: int, correct: bool, hinted: bool = False, j: int = 0) -> Sample:
    """A judgment whose text says whether it is right, in a word among others."""
    word = "sure" if correct else "vague"
    return Sample(
        *(f"item-{i}", "made", (Message("user", f"{i}?"),), ("yes " * (i % 7), "no"), (1.0, 0.0), None, None),
        *((0, 1) if i % 2 else (1, 0), f"{word} {i}", (9, 1) if correct else (1, 9), None, correct, hinted),
        *(j, 9, True, "listwise"),
    )


def write(path: Path, samples: list[Sample]) -> str:
    path.write_text("".join(json.dumps(row_of(one)) + "\n" for one in samples))
    return str(path)


def many(count: int, share: float = 0.5) -> list[Sample]:
    rng = random.Random(1)
    return [sample(i, rng.random() < share) for i in range(count)]


def recipe_of(folder: Path, samples: str, **fields) -> MetaConfig:
    known = {
        "model": "fresh",
        "fresh": FRESH,
        "samples": (samples,),
        "held_out": 20,
        "steps": 40,
        "batch": 16,
        "microbatch": 8,
        "remat": "none",
        "optimizer": Optimizer(learning_rate=3e-3),
        "checkpoints": Checkpoints(every=10),
    }
    return MetaConfig(output=str(folder), **known | fields)


# ---------------------------------------------------------------- calibration


def test_auc_by_hand():
    right = np.array([True, False, True, False])
    assert calibration.auc(np.array([3.0, 1.0, 2.0, 0.0]), right) == 1.0
    assert calibration.auc(np.array([0.0, 1.0, 2.0, 3.0]), right) == 0.25
    assert calibration.auc(np.array([1.0, 1.0, 1.0, 1.0]), right) == 0.5
    assert calibration.auc(np.array([1.0, 1.0, 2.0, 0.0]), right) == 0.875  # of four pairs three are right, one ties
    assert np.isnan(calibration.auc(np.array([1.0, 2.0]), np.array([True, True])))


def test_calibration_by_hand():
    """Two judgments at probability 0.75, one of them right; two at 0.05, none right."""
    logits = np.array([np.log(3), np.log(3), -np.log(19), -np.log(19)], np.float32)
    found = calibration.measure(logits, np.array([True, False, False, False]))
    assert found.accuracy == 0.75
    assert found.base == 0.25
    assert found.ece == pytest.approx((2 * 0.25 + 2 * 0.05) / 4)
    assert [(b.count, b.right) for b in found.table if b.count] == [(2, 0.0), (2, 0.5)]
    assert "0.7 to 0.8: 2 judgments, told 0.750, right 0.500" in str(found)
    with pytest.raises(ValueError, match="hold some out"):
        calibration.measure(np.zeros(0), np.zeros(0, bool))


# ---------------------------------------------------------------- batches


def batches_of(samples: list[Sample], balance: bool = False, **fields) -> scalar_batches.TextBatches:
    known = {"seed": 3, "steps": 50, "size": 8} | fields
    return scalar_batches.TextBatches(meta.entries_of(samples, ByteTokenizer(), TEMPLATE, 400, balance), **known)


def test_an_epoch_has_every_judgment_once_behind_its_own_prompt():
    samples = many(24)
    source = batches_of(samples)
    seen = []
    for step in range(3):
        batch = source[step]
        for r in range(8):
            text = ByteTokenizer().decode(batch.texts[r, : batch.counts[r] - 1].tolist())
            (one,) = [s for s in samples if s.text == text]
            assert batch.correct[r] == one.correct
            prompt = ByteTokenizer().decode(batch.prompts[r, : batch.lengths[r]].tolist())
            assert prompt == ByteTokenizer().decode(
                meta_rm.text_ids(ByteTokenizer(), TEMPLATE, one.example, one.order, one.text, 400)[0]
            )
            seen.append(text)
    assert sorted(seen) == sorted(s.text for s in samples)
    assert [r.tobytes() for r in dataclasses.astuple(source[40])] == [
        r.tobytes() for r in dataclasses.astuple(batches_of(samples)[40])
    ]
    iterator = batches.stream(source, 2)
    np.testing.assert_array_equal(next(iterator).texts, source[2].texts)


def test_balanced_weights_make_both_kinds_count_the_same():
    samples = many(80, share=0.2)
    source = batches_of(samples, balance=True, size=80, steps=1)
    batch = source[0]
    assert batch.weights.sum() == pytest.approx(1)
    assert batch.weights[batch.correct > 0].sum() == pytest.approx(0.5, abs=1e-6)
    plain = batches_of(samples, size=80, steps=1)[0]
    assert set(plain.weights.round(6)) == {np.float32(1 / 80).round(6)}
    with pytest.raises(ValueError, match="all 4 judgments are right"):
        batches_of([sample(i, True) for i in range(4)], balance=True)


# ---------------------------------------------------------------- the step


@pytest.fixture(scope="module")
def policy() -> tuple[Policy, dict[str, jax.Array]]:
    model = tiny_model(dataclasses.replace(LLAMA, scalar=True))
    score = 0.3 * jax.random.normal(jax.random.key(2), (1, LLAMA.dim))
    return Policy(model.config, model.graph, model.mesh, Lora(), np.dtype("float32")), model.params | {"score": score}


@pytest.mark.slow
def test_any_size_of_microbatch_is_one_batch(policy):
    """And the loss is the mean of -log p(right or wrong), worked out from the logits."""
    policy, params = policy
    batch = batches_of(many(16))[0]
    forward = jax.jit(functools.partial(scalar_step.logits_of, policy))
    logits = np.asarray(forward(params, scalar_step.put(batch, policy)), np.float64)
    by_hand = np.mean(np.where(batch.correct > 0, np.log1p(np.exp(-logits)), np.log1p(np.exp(logits))))
    found = []
    for microbatch in (2, 8):
        recipe = recipe_of(Path("unused"), "unused", batch=8, microbatch=microbatch)
        optimizer = training.make_optimizer(Optimizer(learning_rate=1e-3), 1)
        state = training.start({name: value.copy() for name, value in params.items()}, optimizer, policy.mesh)
        after, scalars = scalar_step.make_step(policy, recipe, optimizer, state, meta.OBJECTIVE)(
            state, scalar_step.put(batch, policy)
        )
        assert float(scalars["loss"]) == pytest.approx(by_hand, rel=1e-5)
        assert float(scalars["accuracy"]) == pytest.approx(((logits > 0) == (batch.correct > 0)).mean())
        found.append((float(scalars["grad_norm"]), np.asarray(after.params["layers.0.mlp.up"])))
    for norm, weights in found[1:]:
        assert norm == pytest.approx(found[0][0], rel=1e-4)
        np.testing.assert_allclose(weights, found[0][1], atol=2e-5)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run that nothing interrupted, on judgments that say themselves whether they are right."""
    folder = tmp_path_factory.mktemp("meta")
    write(folder / "samples.jsonl", [*many(200), sample(300, True, hinted=True)])
    meta.run(recipe_of(folder / "run", str(folder / "samples.jsonl")))
    return folder


def test_a_run_learns_to_tell_right_from_wrong(trained):
    before, after = (json.loads(line) for line in (trained / "run/held_out.jsonl").read_text().splitlines())
    assert (before["step"], after["step"], after["judgments"]) == (0, 40, 20)
    assert before["auc"] == 0.5  # the head starts at zero
    assert after["auc"] > 0.95
    guide = meta_rm.load(str(trained / "run/model"))
    judged = {kind: sample(900, kind) for kind in (True, False)}
    logits = {
        kind: guide.logits(one.example, [dataclasses.replace(JUDGMENT, text=one.text, order=one.order)])[0]
        for kind, one in judged.items()
    }
    assert logits[True] > logits[False] + 1


def test_an_interrupted_run_ends_like_one_that_was_not(trained, tmp_path, monkeypatch):
    samples, kept = str(trained / "samples.jsonl"), runs.Run.kept

    def stop(run, done):
        kept(run, done)
        if done == 23:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "kept", stop)
    with pytest.raises(KeyboardInterrupt):
        meta.run(recipe_of(tmp_path / "run", samples))
    monkeypatch.setattr(runs.Run, "kept", kept)
    meta.run(recipe_of(tmp_path / "run", samples))
    rows = [
        [
            {
                name: value
                for name, value in json.loads(line).items()
                if name in ("step", "loss", "accuracy", "grad_norm")
            }
            for line in (folder / "run/metrics.jsonl").read_text().splitlines()
        ]
        for folder in (trained, tmp_path)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 40
    model = "run/model/model.safetensors"
    assert (trained / model).read_bytes() == (tmp_path / model).read_bytes()


def test_a_checkpoint_converts_to_the_model_that_the_run_wrote(trained, tmp_path):
    """Its scalar head and its template too, though it was begun from a decoder without a head."""
    assert main(["convert", "--model", str(trained / "run"), "--output", str(tmp_path / "new")]) == 0
    found, written = (
        {file.name: file.read_bytes() for file in folder.iterdir()}
        for folder in (tmp_path / "new", trained / "run/model")
    )
    assert found == written
    assert "template.txt" in found


def test_score_and_sample_take_a_meta_rm(trained, tmp_path):
    """A judge of random weights, its scores forced; every judgment has its logit, half of them are kept."""
    long = tiny_model(dataclasses.replace(LLAMA, max_positions=8192))
    save_hf(tmp_path / "judge", long.config, long.params, ByteTokenizer(), None, "float32")
    rows = [{"id": f"r{i}", "prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = ["--model", str(tmp_path / "judge"), "--meta-rm", str(trained / "run/model"), "--max-new-tokens", "8"]
    score = ["score", "--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "verdicts.jsonl")]
    assert main([*score, *known, "--votes", "5"]) == 0
    for line in (tmp_path / "verdicts.jsonl").read_text().splitlines():
        found = json.loads(line)
        kept = [j for j in found["judgments"] if j["kept"]]
        assert len(kept) == 2
        assert found["scores"] == [sum(j["scores"][i] for j in kept) for i in range(2)]
        assert min(j["logit"] for j in kept) >= max(j["logit"] for j in found["judgments"] if not j["kept"])
    sample = ["sample", "--items.files", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "samples.jsonl")]
    assert main([*sample, *known, "--votes", "2"]) == 0
    judged = read_samples(str(tmp_path / "samples.jsonl"))
    assert len(judged) == 4
    assert all(isinstance(one.logit, float) for one in judged)


def test_a_meta_rm_may_start_from_a_folder_of_adapters(tmp_path):
    save_hf(tmp_path / "base", LLAMA, tiny_model().params, ByteTokenizer(), None, "float32")
    _, shapes = split_abstract(LLAMA)
    settings = Lora(rank=2)
    adapters = lora.init(shapes, settings, jax.random.key(0))
    adapters = {name: value + 0.1 for name, value in adapters.items()}
    save_adapters(tmp_path / "adapters", LLAMA, adapters, settings, str(tmp_path / "base"))
    recipe = recipe_of(tmp_path / "run", write(tmp_path / "some.jsonl", many(40)), model=str(tmp_path / "adapters"))
    begun = scalar.begin(recipe)
    merged = lora.merge(tiny_model().params, adapters, settings)
    np.testing.assert_allclose(begun.params["layers.0.mlp.up"], merged["layers.0.mlp.up"], atol=1e-5)
    assert not begun.params["score"].any()


def test_bad_input_is_named(tmp_path, capsys):
    hinted = write(tmp_path / "hinted.jsonl", [sample(i, True, hinted=True) for i in range(3)])
    with pytest.raises(ValueError, match="of 3 judgments 3 are hinted"):
        meta.run(recipe_of(tmp_path / "run", hinted))
    some = write(tmp_path / "some.jsonl", many(6))
    with pytest.raises(ValueError, match="6 held out: none is left"):
        meta.run(recipe_of(tmp_path / "run", some))
    with pytest.raises(ValueError, match=r"microbatch = 3 does not divide over 2 devices"):
        scalar.begin(recipe_of(tmp_path / "run", some, batch=6, microbatch=3, devices=2))
    with pytest.raises(ValueError, match=r"batch = 10 is no multiple of microbatch = 4"):
        recipe_of(tmp_path, some, batch=10, microbatch=4)
    assert main(["meta_rm", "--output", str(tmp_path / "x")]) == 2
    assert "samples names no file" in capsys.readouterr().err
    assert main(["score", "--meta-rm", str(tmp_path / "none"), "--output", str(tmp_path / "v")]) == 2
    assert "none does not exist" in capsys.readouterr().err
    assert main(["score", "--k-meta", "2", "--output", str(tmp_path / "v")]) == 2
    assert "k_meta = 2 without a meta RM" in capsys.readouterr().err


JUDGMENT = meta_rm.Judgment("", (9, 1), None, (0, 1), False, 1, -1.0)
