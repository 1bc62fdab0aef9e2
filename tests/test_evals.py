"""Evaluation: tables and reports of scripted judgments, and the command on a tiny random judge."""

import dataclasses
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import LLAMA, tiny_model

from grm_jax.data.benchmarks import Benchmark, Case, Kind, metrics
from grm_jax.datatypes import Example, Message
from grm_jax.evals import compare, measure, table
from grm_jax.main import main
from grm_jax.spct.sample import Sample, read_samples
from grm_jax.tokenizer import ByteTokenizer
from grm_jax.weights.save import save_hf

TEMPLATE = str(Path(__file__).parents[1] / "configs/tiny_template.txt")


def pair(i: int, best: int = 0, subset: str = "s", lengths: tuple[int, int] = (1, 1)) -> Case:
    labels = (1.0, 0.0) if best == 0 else (0.0, 1.0)
    responses = tuple(letter * length for letter, length in zip("ab", lengths, strict=True))
    return Case(Example(f"{i}", (Message("user", f"{i}?"),), responses, labels), subset, f"{i}")


def judgment(case: Case, j: int, scores: tuple[int, ...] | None, first: int = 0, **more) -> Sample:
    e = case.example
    order = (first, *(i for i in range(len(e.responses)) if i != first))
    known = {"text": "text", "correct": None, "hinted": False, "tokens": 10 + j, "ended": True, "template": "t"}
    told = (e.id, case.subset, e.messages, e.responses, e.scores, None, None, order)
    return Sample(*told, scores=scores, reason=None, sample=j, **known | more)


def test_a_table_and_its_votes_by_hand():
    cases = [
        pair(0),
        Case(dataclasses.replace(pair(1).example, responses=("a", "b", "c"), scores=(0.0, 2.0, 1.0)), "s", "1"),
    ]
    rows = [
        judgment(cases[1], 0, (1, 5, 9)), judgment(cases[1], 1, None), judgment(cases[1], 2, (1, 9, 1), first=2),
        judgment(cases[0], 0, (3, 4)), judgment(cases[0], 1, (9, 1), first=1), judgment(cases[0], 2, (2, 2)),
    ]  # fmt: skip
    found = table.table_of(cases, rows)
    assert found.scores[0].tolist() == [[3, 4, 0], [9, 1, 0], [2, 2, 0]]
    assert found.valid.tolist() == [[True] * 3, [True, False, True]]
    assert found.first.tolist() == [[0, 1, 0], [0, 0, 2]]
    assert (found.logits, found.values) == (None, None)
    ways = table.votes(found)
    assert list(ways) == ["voting"]
    assert ways["voting"].sums[0].tolist() == [[3, 4, 0], [12, 5, 0], [14, 7, 0]]
    one, three = (table.scored(found, ways["voting"], k, table.by_order(found)["voting"]) for k in (1, 3))
    assert one[0].scores == (3, 4)
    assert one[0].first == ()
    assert three[0].first == ((5, 6), (9, 1))
    assert three[1].scores == (2, 14, 10)
    with pytest.raises(ValueError, match=r"1 of 2 cases have not 3 judgments, the first \['0'\]"):
        table.table_of(cases, rows[:-1])


def test_values_and_logits_have_their_own_votes():
    case = pair(0)
    rows = [judgment(case, j, s, values=v, logit=g) for j, (s, v, g) in enumerate(
        [((5, 6), (5.5, 5.0), -1.0), ((6, 5), (5.8, 5.2), 2.0)]
    )]  # fmt: skip
    ways = table.votes(table.table_of([case], rows))
    assert list(ways) == ["voting", "expected", "guided", "softmax"]
    np.testing.assert_allclose(ways["expected"].sums[0], [[5.5, 5.0], [11.3, 10.2]], rtol=1e-6)
    assert ways["guided"].sums[0].tolist() == [[5, 6], [6, 5]]
    rows += [judgment(case, 2, (1, 9), first=1, values=(1.0, 9.0), logit=5.0)]
    found = table.table_of([case], rows)
    first, second = table.by_order(found, k_meta=1)["guided"]
    assert first.sums[0, -1].tolist() == [6, 5]  # of its two judgments the better one
    assert second.sums[0, -1].tolist() == [1, 9]
    assert table.kept(found, k_meta=2).tolist() == [[False, True, True]]


def test_a_guided_vote_of_one_order_keeps_half_of_that_order():
    """Eight judgments in both orders by turns; those that are right have the highest logits."""
    cases = [dataclasses.replace(pair(i), subset="Natural") for i in range(2)]
    scores = {0: (1, 9), 1: (1, 9), 2: (1, 9), 3: (1, 9), 4: (9, 1), 5: (1, 9), 6: (9, 1), 7: (9, 1)}
    rows = [judgment(c, j, s, first=j % 2, logit=float(s[0]) - j / 9) for c in cases for j, s in scores.items()]
    found = table.table_of(cases, rows)
    first, second = table.by_order(found)["guided"]
    assert first.sums[0, -1].tolist() == [18, 2]  # judgments 4 and 6 of 0, 2, 4, 6
    assert second.sums[0, -1].tolist() == [10, 10]  # 1 and 7 of 1, 3, 5, 7
    assert [v.valid[0].tolist() for v in (first, second)] == [[1, 1, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 2]]
    assert [v.sums[0, -1].tolist() for v in table.by_order(found, k_meta=2)["guided"]] == [[9, 1], [9, 1]]
    assert np.flatnonzero(table.kept(found, by_order=True)[0]).tolist() == [1, 4, 6, 7]
    assert np.flatnonzero(table.kept(found)[0]).tolist() == [0, 4, 6, 7]
    by_order = table.by_order(found)
    plain, guided = (
        metrics.llm_bar(cases, table.scored(found, table.votes(found)[way], 8, by_order[way]))["score"]
        for way in ("voting", "guided")
    )
    assert (plain, guided) == (0.25, 0.75)


def scripted(judge, count: int = 400, k: int = 4, seed: int = 0):
    """A benchmark of pairs and what `judge(case, first, rng)` says of each, k times in both orders by turns."""
    rng = random.Random(seed)
    cases = [
        pair(i, rng.randrange(2), rng.choice("st"), (rng.randrange(1, 9), rng.randrange(1, 9))) for i in range(count)
    ]
    rows = [judgment(case, j, judge(case, j % 2, rng), first=j % 2) for case in cases for j in range(k)]
    benchmark = Benchmark("preferences", cases, Kind(metrics.preferences))
    return measure.numbers(benchmark, table.table_of(cases, rows), None, seed)


def test_agreement_of_orders_of_lists_by_hand():
    three = dataclasses.replace(pair(0).example, responses=("a", "b", "c"), scores=(0.0, 2.0, 1.0))
    cases = [Case(three, "s", "0"), Case(dataclasses.replace(three, id="other"), "s", "1")]
    one, other = cases
    rows = [
        judgment(one, 0, (1, 9, 2)), judgment(one, 1, (5, 6, 2)),  # this order's vote: the second
        judgment(one, 2, (1, 4, 2), first=1), judgment(one, 3, (9, 1, 1), first=2),  # the second; the first
        judgment(other, 0, (9, 1, 1)), judgment(other, 1, (9, 1, 1)),  # the first, in one order
        judgment(other, 2, (7, 7, 1), first=1), judgment(other, 3, None, first=2),  # a tie, and nothing
    ]  # fmt: skip
    assert measure.order_agreement(table.table_of(cases[:1], rows[:4])) == 1 / 3
    assert measure.order_agreement(table.table_of(cases, rows)) == 1 / 3
    assert math.isnan(measure.order_agreement(table.table_of(cases[1:], rows[4:])))
    agreeing = [*rows[:6], judgment(other, 2, (7, 5, 1), first=1), rows[7]]
    assert measure.order_agreement(table.table_of(cases, agreeing)) == (1 / 3 + 1) / 2


def test_judges_that_know_guess_or_look_at_one_thing_alone(monkeypatch):
    monkeypatch.setattr(measure, "RESAMPLES", 200)

    def lots(case, first, rng):
        return rng.randrange(1, 11), rng.randrange(1, 11)

    knowing = scripted(lambda case, first, rng: (9, 2) if case.example.scores[0] else (2, 9))
    assert knowing["curves"]["voting"]["4"]["score"] == 1
    assert knowing["intervals"]["voting"]["score"] == [1, 1]
    assert knowing["order_agreement"] == 1
    assert abs(knowing["position_bias"]) < 1e-9
    guessing = scripted(lots)
    low, high = guessing["intervals"]["voting"]["score"]
    assert low < 0.5 < high
    assert abs(guessing["position_bias"]) < 0.15
    assert guessing["curves"]["voting"].keys() == {"1", "2", "4"}
    first = scripted(lambda case, first, rng: (9, 2) if first == 0 else (2, 9))
    assert first["position_bias"] == 1
    assert first["order_agreement"] == 0
    assert first["curves"]["voting"]["4"]["score"] == 0.5  # both orders tie
    assert first["ties"] == 1
    longer = scripted(lambda case, first, rng: tuple(map(len, case.example.responses)))
    for k in ("1", "4"):
        assert longer["curves"]["voting"][k] == longer["baselines"]["longer"]
    unread = scripted(lambda case, first, rng: None)
    assert (unread["unread_judgments"], unread["unread_cases"]) == (1, 1)
    assert unread["curves"]["voting"]["4"]["score"] == 0  # never a hidden half
    assert unread["position_bias"] is None


def test_calibration_of_the_votes_share_by_hand():
    """Three of four judgments for the winner, right; all four, wrong."""
    cases = [pair(0, 0), pair(1, 0)]
    rows = [judgment(cases[0], j, (9, 1) if j else (1, 2)) for j in range(4)]
    rows += [judgment(cases[1], j, (1, 2)) for j in range(4)]
    found = table.table_of(cases, rows)
    told = measure.calibration(found, table.votes(found)["voting"])
    assert [(row["told"], row["right"], row["cases"]) for row in told["table"]] == [(0.75, 1.0, 1), (1.0, 0.0, 1)]
    assert told["gap"] == pytest.approx((0.25 + 1) / 2)
    assert measure.histogram(found) == {"1": 8, "2": 5, "9": 3}


def test_queries_are_drawn_anew_with_all_their_cases():
    """Two queries of many cases each, one right and one wrong: the mean of a draw is 0, 1/2 or 1."""
    cases = [dataclasses.replace(pair(i), group="right" if i < 50 else "wrong") for i in range(100)]
    judged = [table.Scored((2.0, 1.0) if i < 50 else (1.0, 2.0)) for i in range(100)]
    seen = set()

    def metric(drawn, scored):
        seen.add(found := metrics.preferences(drawn, scored)["score"])
        return {"score": found}

    assert measure.interval(metric, cases, judged, 0, resamples=50) == {"score": (0.0, 1.0)}
    assert seen == {0.0, 0.5, 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random judge, and LLMBar as its repository has it, made small."""
    place = tmp_path_factory.mktemp("evals")
    config = dataclasses.replace(LLAMA, max_positions=2048)
    save_hf(place / "judge", config, tiny_model(config).params, ByteTokenizer(), None, "float32")
    for subset, count in (("Natural", 3), ("Adversarial/GPTOut", 2)):
        rows = [
            {"input": f"{i}?", "output_1": "yes", "output_2": "no" * i, "label": 1 + i % 2} for i in range(1, 1 + count)
        ]
        path = place / f"LLMBar/{subset}/dataset.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(rows))
    return place


def evaluate(folder, output, *more):
    known = ["--model", str(folder / "judge"), "--template", TEMPLATE, "--max-new-tokens", "6", "--votes", "4"]
    where = ["--benchmark", "llm_bar", "--data", str(folder / "LLMBar"), "--output", str(output)]
    return main(["eval", *where, *known, *more])


def test_eval_reports_and_goes_on(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "RESAMPLES", 20)
    started = time.monotonic()
    assert evaluate(folder, tmp_path / "out", "--force-scores") == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["cases"], report["complete"], report["missing"]["Natural"]) == (
        5,
        False,
        {"rows": 3, "official": 100},
    )
    assert report["curves"]["voting"].keys() == {"2", "4"}  # one judgment has one order
    assert report["unread_judgments"] == 0
    assert 0 <= report["greedy"]["numbers"]["score"] <= 1
    assert sum(report["histogram"].values()) == 5 * 4 * 2
    assert len(report["protocol"]["weights"]) == 16
    text = (tmp_path / "out/report.md").read_text()
    assert "**These totals are no score of the benchmark. Rows that differ from the official set: Natural 3 of" in text
    assert "total (no score of the benchmark)" in text
    assert f"; data {folder / 'LLMBar'}" in text
    page = (tmp_path / "out/report.html").read_text()
    shown = json.loads(re.search(r'id="data">(.*)</script>\n<script>', page, re.DOTALL)[1])
    assert len(shown["cases"]) == 5
    assert [len(case["judgments"]) for case in shown["cases"]] == [4] * 5
    assert page.count("<polyline") == 2
    samples = read_samples(str(tmp_path / "out/judgments.jsonl"))
    assert all(sample.forced for sample in samples)
    assert len({sample.group for sample in samples}) == report["queries"] == 3  # "1?" and "2?" stand in both subsets

    rows = tmp_path / "out/judgments.jsonl"
    seconds = sum(sample.seconds for sample in samples)
    assert report["seconds_of_verdict"] == pytest.approx(seconds / 5)
    assert 0 < seconds < time.monotonic() - started
    lines = rows.read_bytes().splitlines(keepends=True)
    for kept in (0, 7, 12):  # interrupted three times, twice within a case
        rows.write_bytes(b"".join(lines[:kept]) + lines[kept][:20] * (kept > 0))
        assert evaluate(folder, tmp_path / "out", "--force-scores") == 0
        found = json.loads((tmp_path / "out/report.json").read_text())
        assert found | {"seconds_of_verdict": report["seconds_of_verdict"]} == report

    greedy = tmp_path / "out/greedy.jsonl"
    beside = [dataclasses.replace(row, seconds=None) for row in read_samples(str(greedy))]
    assert len(beside) == 5 * 2  # both orders
    greedy.write_bytes(b"".join(greedy.read_bytes().splitlines(keepends=True)[:3]))
    assert evaluate(folder, tmp_path / "out", "--force-scores") == 0  # what is missing is drawn by itself
    assert [dataclasses.replace(row, seconds=None) for row in read_samples(str(greedy))] == beside
    assert json.loads((tmp_path / "out/report.json").read_text())["greedy"] == report["greedy"]

    assert main(["eval", "--from", str(rows), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/report.json").read_bytes() == (tmp_path / "out/report.json").read_bytes()
    assert main(["eval", "--from", str(rows), "--benchmark", "rmb", "--output", str(tmp_path / "again")]) == 2
    assert "has judgments of llm_bar, not of rmb" in " ".join(capsys.readouterr().err.split())
    assert evaluate(folder, tmp_path / "out", "--seed", "1") == 2
    assert "was begun with" in capsys.readouterr().err


def test_forced_scores_are_dropped_from_a_report(folder, tmp_path, capsys, monkeypatch):
    """What is left is the report of a run without them, but for tokens; scores that were not forced stay."""
    monkeypatch.setattr(measure, "RESAMPLES", 20)
    for name in ("forced", "free"):
        more = ["--force-scores"] if name == "forced" else []
        assert evaluate(folder, tmp_path / name, "--no-greedy", *more) == 0
    rows = tmp_path / "forced/judgments.jsonl"
    again = ["eval", "--from", str(rows), "--output", str(tmp_path / "again")]

    def reported(name):
        found = json.loads((tmp_path / name / "report.json").read_text())
        assert found["protocol"].pop("force_scores") == (name != "free")
        assert found["protocol"].pop("drop_forced", False) == (name == "again")
        return {key: value for key, value in found.items() if "token" not in key and "seconds" not in key}

    assert main([*again, "--drop-forced"]) == 0
    assert reported("again") == reported("free")
    assert reported("again")["unread_judgments"] == 1
    assert "scores forced, and those counted as unread" in (tmp_path / "again/report.md").read_text()
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for line in lines[:7]:
        del line["forced"]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([*again, "--drop-forced"]) == 0
    assert reported("again")["unread_judgments"] == pytest.approx(13 / 20)
    assert main([*again[:2], str(tmp_path / "free/judgments.jsonl"), *again[3:], "--drop-forced"]) == 2
    assert "was judged without forced scores: leave --drop-forced out" in capsys.readouterr().err
    assert evaluate(folder, tmp_path / "free", "--drop-forced") == 2
    assert "give --from, or --no-force-scores" in capsys.readouterr().err


IN_A_BUCKET = """
import sys
import time
from pathlib import Path
from etils import epath
from grm_jax.evals import measure
from grm_jax.main import main
measure.RESAMPLES = 10
data, judge, template = sys.argv[1:]
for file in Path(data).rglob("*.json"):
    epath.Path(f"gs://judge/{file.relative_to(Path(data).parent)}").write_text(file.read_text())
asked = ["eval", "--benchmark", "llm_bar", "--data", "gs://judge/LLMBar", "--output", "gs://judge/out", "--model", judge]
asked += ["--template", template, "--votes", "2", "--max-new-tokens", "4", "--no-greedy"]
assert main(asked) == 0
report = epath.Path("gs://judge/out/report.json").read_text()
assert main(asked) == 0 and epath.Path("gs://judge/out/report.json").read_text() == report
assert main(["eval", "--from", "gs://judge/out/judgments.jsonl", "--output", "gs://judge/again"]) == 0
assert epath.Path("gs://judge/again/report.json").read_text() == report
print(*sorted(file.name for file in epath.Path("gs://judge/out").iterdir()))
"""


def test_an_output_has_the_judgments_of_one_model(folder, tmp_path, capsys, monkeypatch):
    """And its greedy point is that of its judgments, or none."""
    monkeypatch.setattr(measure, "RESAMPLES", 10)
    out = tmp_path / "out"
    assert evaluate(folder, out) == 0
    rows, greedy = out / "judgments.jsonl", out / "greedy.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    config = dataclasses.replace(LLAMA, max_positions=2048)
    save_hf(tmp_path / "other", config, tiny_model(config, seed=1).params, ByteTokenizer(), None, "float32")
    known = (out / "protocol.json").read_text()
    (folder / "judge").rename(folder / "kept")
    (tmp_path / "other").rename(folder / "judge")
    try:
        for path, left in ((rows, b"".join(lines[:9])), (greedy, greedy.read_bytes()[:-9])):
            whole = path.read_bytes()
            path.write_bytes(left)
            assert evaluate(folder, out) == 2
            said = " ".join(capsys.readouterr().err.split())
            assert f"was begun with weights {json.loads(known)['weights']}" in said
            assert "give the model as it was, another --output, or start anew with --overwrite" in said
            assert (out / "protocol.json").read_text() == known
            path.write_bytes(whole)
        assert evaluate(folder, out, "--overwrite", "--no-greedy") == 0
    finally:
        (folder / "judge").rename(tmp_path / "other")
        (folder / "kept").rename(folder / "judge")
    assert json.loads((out / "protocol.json").read_text())["weights"] != json.loads(known)["weights"]
    assert not greedy.exists()
    assert main(["eval", "--from", str(out), "--output", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again/report.json").read_text())["greedy"] is None


def test_the_greedy_point_of_parts_is_reported_anew(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESAMPLES", 10)
    assert evaluate(folder, tmp_path / "out") == 0
    for name in ("judgments.jsonl", "greedy.jsonl"):
        path = tmp_path / "out" / name
        lines, each = path.read_bytes().splitlines(keepends=True), 4 if name == "judgments.jsonl" else 2
        for part in range(2):  # case i is in part i mod 2
            mine = [line for i, line in enumerate(lines) if i // each % 2 == part]
            path.with_name(f"{name}-0000{part}-of-00002").write_bytes(b"".join(mine))
        path.unlink()
    again = ["eval", "--from", str(tmp_path / "out/judgments.jsonl"), "--output", str(tmp_path / "again")]
    assert main(again) == 0
    assert json.loads((tmp_path / "again/report.json").read_text()) == json.loads(
        (tmp_path / "out/report.json").read_text()
    )
    for part in (tmp_path / "out").glob("greedy.jsonl-*"):
        part.unlink()
    assert main(again) == 0
    assert json.loads((tmp_path / "again/report.json").read_text())["greedy"] is None
    assert main([*again, "--no-greedy"]) == 0
    assert json.loads((tmp_path / "again/report.json").read_text())["greedy"] is None


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the emulator's sockets
def test_data_judgments_and_reports_in_a_bucket(folder, bucket):
    done = subprocess.run(
        [sys.executable, "-c", IN_A_BUCKET, str(folder / "LLMBar"), str(folder / "judge"), TEMPLATE],
        capture_output=True, text=True, env=os.environ | bucket, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = "judgments.jsonl judgments.jsonl.run.json protocol.json report.html report.json report.md"
    assert done.stdout.splitlines()[-1] == expected


def test_paired_differences_by_hand(monkeypatch):
    """Another judge that is right where the first is wrong, in one case of four, and right in all others."""
    cases = [pair(i) for i in range(4)]
    one = [(case, table.Scored((1.0, 2.0) if i == 0 else (2.0, 1.0))) for i, case in enumerate(cases)]
    other = [(case, table.Scored((2.0, 1.0))) for case in cases]
    gain, low, high = compare.differences(metrics.preferences, one, other, 0, resamples=400)["score"]
    assert (gain, low) == (0.25, 0.0)
    assert 0.5 <= high <= 1
    same = compare.differences(metrics.preferences, other, other, 0, resamples=10)
    assert same["score"] == (0.0, 0.0, 0.0)


def test_reports_are_compared(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "RESAMPLES", 10)
    for name, more in (("a", []), ("b", ["--seed", "1", "--orders", "2"])):
        assert evaluate(folder, tmp_path / name, "--no-greedy", "--force-scores", *more) == 0
    assert "responses in 2 orders of each case drawn by seed 1" in (tmp_path / "b/report.md").read_text()
    assert "responses in orders drawn by seed 0" in (tmp_path / "a/report.md").read_text()
    assert evaluate(folder, tmp_path / "a", "--no-greedy", "--force-scores", "--orders", "2") == 2
    assert "was begun with" in capsys.readouterr().err
    again = ["eval", "--from", str(tmp_path / "b/judgments.jsonl"), "--output", str(tmp_path / "again")]
    assert main(again) == 0  # with the seed that the judgments were made with
    assert (tmp_path / "again/report.json").read_bytes() == (tmp_path / "b/report.json").read_bytes()
    unforced = ["eval", "--from", str(tmp_path / "b"), "--drop-forced", "--output", str(tmp_path / "unforced")]
    assert main(unforced) == 0
    kept = (tmp_path / "b/protocol.json").read_bytes()
    assert main([*again[:-1], f"{tmp_path / 'b'}/"]) == 0  # into its own folder, spelled otherwise
    assert (tmp_path / "b/protocol.json").read_bytes() == kept
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "5 cases that all judged, of up to 5; vote: voting" in said
    assert "not the official rows: no score of the benchmark" in said
    assert "total (no score" in said
    assert "agreement" in said
    assert main(["compare", *(str(tmp_path / name) for name in ("b", "again", "unforced"))]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Natural │ (\d+\.\d) % │ \1 % \(\+0.0, │ 0.0 % \(-\1,", said), (
        said
    )  # without forced ones, none is read
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--vote", "guided"]) == 2
    assert "has no vote 'guided': it has voting" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a")]) == 2
    assert main(["compare", str(tmp_path / "a"), str(tmp_path)]) == 2
    assert "no " in capsys.readouterr().err


def test_cases_of_one_name_that_differ_are_not_compared():
    case, scored = pair(0), table.Scored((2.0, 1.0))
    turned = dataclasses.replace(case, example=dataclasses.replace(case.example, scores=(0.0, 1.0)))
    moved = dataclasses.replace(turned, subset="t")
    compare.check_same(["a", "b"], [{"0": (case, scored)}, {"0": (pair(0), scored)}], ["0"])
    with pytest.raises(
        ValueError, match="case '0' has another labels and subset in b than in a: compare reports of the"
    ):
        compare.check_same(["a", "b"], [{"0": (case, scored)}, {"0": (moved, scored)}], ["0"])


def test_samples_are_reported_as_judgments_are(folder, tmp_path, capsys, monkeypatch):
    """`sample` and `eval` write one format; what its pairs are worth is what `sample` itself counts."""
    monkeypatch.setattr(measure, "RESAMPLES", 10)
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}], "responses": ["yes", "no"], "scores": [1, 0]} for i in "ab"
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = ["--model", str(folder / "judge"), "--template", TEMPLATE, "--max-new-tokens", "6", "--votes", "2"]
    samples = str(tmp_path / "samples.jsonl")
    assert main(["sample", "--items.files", str(tmp_path / "rows.jsonl"), "--output", samples, *known]) == 0
    capsys.readouterr()
    assert main(["eval", "--from", samples, "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert (found["benchmark"], found["cases"], found["complete"], found["greedy"]) == ("preferences", 2, False, None)
    assert found["unread_judgments"] == np.mean([row.scores is None for row in read_samples(samples)])
    assert "2 judgments a case at temperature" in (tmp_path / "out/report.md").read_text()


def test_bad_input_is_named(folder, tmp_path, capsys):
    for args, said in (
        (["--benchmark", "llmbar", "--data", "x"], "benchmark = 'llmbar': known are reward_bench"),
        (["--benchmark", "llm_bar"], "give --benchmark NAME and --data PATH, or --from judgments.jsonl"),
        (["--benchmark", "llm_bar", "--data", "x", "--stop-risk", "0.1"], "a curve needs all judgments"),
        (["--benchmark", "llm_bar", "--data", str(tmp_path)], "take the folder Dataset/LLMBar"),
        (["--from", str(tmp_path / "none.jsonl")], "no " + str(tmp_path / "protocol.json")),
        (["--from", "x", "--votes", "2"], "votes = 2 with --from: nothing is judged anew, leave it out"),
    ):
        assert main(["eval", "--output", str(tmp_path / "out"), *args]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    for name in ("votes", "orders"):  # before a model is loaded
        assert evaluate(folder, tmp_path / "one", f"--{name}", "1", "--model", str(tmp_path / "one")) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"{name} = 1: llm_bar compares both orders, give --{name} 2 or more" in said
