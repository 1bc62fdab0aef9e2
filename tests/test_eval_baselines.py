"""`eval --baseline`: what scalar reward models say of a benchmark's cases, in the same rows and the same report."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from test_evals import judgment, pair
from tiny import LLAMA, tiny_model

from grm_jax import baselines, meta_rm, prompts, scalar_rm
from grm_jax.config import JudgeSettings
from grm_jax.data.benchmarks import Case, Scored, load, metrics
from grm_jax.datatypes import Judgment, Usage
from grm_jax.evals import judge, measure, page, table
from grm_jax.main import main
from grm_jax.spct.sample import read_samples
from grm_jax.tokenizer import ByteTokenizer
from grm_jax.verdicts import verdict
from grm_jax.weights.save import save_hf

TEXT = Path(__file__).parents[1] / "configs/tiny_text.txt"
CLOUD = ("--votes", "2", "--max-new-tokens", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A scalar model with a template, a critic, and two pairs of LLMBar in each of two subsets."""
    place = tmp_path_factory.mktemp("eval_baselines")
    config = dataclasses.replace(LLAMA, scalar=True)
    score = jnp.asarray(np.random.default_rng(4).normal(size=(1, LLAMA.dim)), jnp.float32)
    params = tiny_model(config).params
    save_hf(place / "reward", config, params | {"score": score}, ByteTokenizer(), None, "float32")
    shutil.copy(TEXT, place / "reward/template.txt")
    written = {name: value for name, value in params.items() if name != "score"}
    save_hf(place / "critic", LLAMA, written, ByteTokenizer(), None, "float32")
    for subset in ("Natural", "Adversarial/GPTOut"):
        rows = [{"input": f"{i}?", "output_1": "yes", "output_2": "no" * i, "label": i} for i in (1, 2)]
        (place / "LLMBar" / subset).mkdir(parents=True)
        (place / "LLMBar" / subset / "dataset.json").write_text(json.dumps(rows))
    return place


def evaluate(folder, output, kind, *more):
    where = ["--benchmark", "llm_bar", "--data", str(folder / "LLMBar"), "--output", str(output)]
    critic = ["--critic", str(folder / "critic"), *CLOUD] if kind == "cloud" else []
    return main(["eval", *where, "--baseline", kind, "--model", str(folder / "reward"), *critic, *more])


def reported(output) -> tuple[dict, str, str]:
    """report.json, report.md and report.html, made anew from the rows alone as they were at first."""
    again = output.parent / "again"
    assert main(["eval", "--from", str(output / "judgments.jsonl"), "--output", str(again)]) == 0
    assert (again / "report.json").read_bytes() == (output / "report.json").read_bytes()
    report = json.loads((output / "report.json").read_text())
    return report, (output / "report.md").read_text(), (output / "report.html").read_text()


def in_both_orders(cases, verdicts) -> dict[str, float]:
    """LLMBar's numbers where a response has the same reward wherever it is shown."""
    told = [verdicts[case.example.id] for case in cases]
    return metrics.llm_bar(cases, [Scored(scores, (scores, scores)) for scores in told])


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("pair_rm", "cloud")]


@pytest.mark.parametrize("kind", ["bradley_terry", *SLOW])
def test_a_report_is_of_the_baselines_verdicts(folder, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(measure, "RESAMPLES", 10)
    assert evaluate(folder, tmp_path / "out", kind) == 0
    report, text, shown = reported(tmp_path / "out")
    cases, k = load("llm_bar", str(folder / "LLMBar")).cases, 2 if kind == "cloud" else 1
    model = baselines.load(kind, str(folder / "reward"), critic=str(folder / "critic") if kind == "cloud" else None)
    settings = JudgeSettings(votes=k, max_new_tokens=4)
    verdicts = {v.id: v.scores for v in model.judge([case.example for case in cases], settings)}
    assert report["curves"]["voting"][str(k)] == in_both_orders(cases, verdicts)
    assert (report["protocol"]["baseline"], report["protocol"]["votes"]) == (kind, k)
    samples = read_samples(str(tmp_path / "out/judgments.jsonl"))
    assert len(samples) == 4 * k
    for id, scores in verdicts.items():
        assert np.sum([sample.values for sample in samples if sample.id == id], axis=0) == pytest.approx(
            scores, rel=1e-5
        )
    for sample in samples:
        assert sample.scores is None
        assert sample.correct == (np.argmax(sample.values) == np.argmax(sample.labels))
    if kind == "cloud":
        return
    left = "greedy point, scores given, position bias, agreement of orders, the vote's share"
    assert f"4 cases of 2 queries. Left out, as rewards have none: {left}." in text
    assert f"rewards of the baseline {kind}, ties" in text
    assert "Scores given" not in text
    assert report["greedy"] is None
    assert shown.count("<polyline") == 1  # it writes nothing, and spends no tokens
    assert "rewards " in shown
    assert "unread: " not in shown


@dataclasses.dataclass(frozen=True)
class Script:
    """A CLoud that knows its rewards: critique j of response i is worth `rewards[j][i]`, and at temperature 0 the last."""

    rewards: tuple[tuple[float, float], ...]
    model: SimpleNamespace

    def judge(self, examples, settings):
        given = self.rewards[: settings.votes] if settings.temperature else self.rewards[-1:]
        for example in examples:
            judgments = [Judgment(f"so {j}", None, None, (0, 1), False, 5, -1.0, values=v) for j, v in enumerate(given)]
            yield verdict(example, judgments, Usage(1, 5 * len(given), 0.0))


def test_a_cloud_has_a_curve_and_a_greedy_point(folder, tmp_path, monkeypatch):
    """By hand: the first critiques prefer response 1, the sum of both response 2, the greedy one response 2."""
    monkeypatch.setattr(measure, "RESAMPLES", 10)
    script = Script(((0.5, 0.25), (-1.0, 0.5)), SimpleNamespace(params={"w": jnp.ones(2)}))
    monkeypatch.setattr(judge, "open_judge", lambda config: judge.Judge(script))
    assert evaluate(folder, tmp_path / "out", "cloud") == 0
    report, text, shown = reported(tmp_path / "out")
    cases = load("llm_bar", str(folder / "LLMBar")).cases
    for k, scores in (("1", (0.5, 0.25)), ("2", (-0.5, 0.75))):
        assert report["curves"]["voting"][k] == in_both_orders(
            cases, dict.fromkeys((c.example.id for c in cases), scores)
        )
    assert report["curves"].keys() == {"voting"}
    assert report["greedy"]["numbers"] == report["curves"]["voting"]["2"]
    assert report["tokens_after"] == {"1": 20, "2": 40}
    told = report["calibration"]["table"]  # one critique of two prefers the winner, which is right in half of the cases
    assert [(row["told"], row["right"], row["cases"]) for row in told] == [(0.5, 0.5, 4)]
    assert "Left out, as rewards have none: scores given, position bias, agreement of orders." in text
    assert "2 critiques a response at temperature 0.5 by" in text
    assert report["protocol"]["template"].keys() == {"tiny_text"}
    assert shown.count("<polyline") == 2


def test_rewards_vote_by_their_sums_in_both_orders_at_once():
    cases = [
        pair(0),
        Case(dataclasses.replace(pair(1).example, responses=("a", "b", "c"), scores=(0.0, 2.0, 1.0)), "s", "1"),
    ]
    given = {0: ((0.5, -1.0), (-0.25, 1.0)), 1: ((1.0, 2.5, 0.0), (0.0, 0.25, 0.0))}
    rows = [judgment(cases[i], j, None, values=values) for i, of in given.items() for j, values in enumerate(of)]
    found = table.table_of(cases, rows)
    assert found.rewards
    assert found.valid.all()
    assert (found.values, list(table.votes(found))) == (None, ["voting"])
    ways, orders = table.votes(found)["voting"], table.by_order(found)["voting"]
    one, two = (table.scored(found, ways, k, orders) for k in (1, 2))
    assert (one[0].scores, one[0].first) == ((0.5, -1.0), ((0.5, -1.0), (0.5, -1.0)))
    assert (two[0].scores, two[1].scores, two[1].first) == ((0.25, 0.0), (1.0, 2.75, 0.0), ())
    assert "rewards 0.5, -1" in page._head(rows[0], None)


def test_bad_input_is_named(folder, tmp_path, capsys):
    told = {"task_name": "t", "llm_response_model": "m"}
    lone = {"input": "?", "llm_response": "a", "error_label": "error", "metadata": told}
    (tmp_path / "lone.jsonl").write_text(json.dumps(lone) + "\n")
    pairs = ["--benchmark", "llm_bar", "--data", str(folder / "LLMBar")]
    for args, said in (
        ([*pairs, "--baseline", "cloud"], "cloud has a critic, and nothing else"),
        ([*pairs, "--critic", "x"], "critic = x and baseline = None"),
        ([*pairs, "--baseline", "pair_rm", "--template", "choice"], "baseline pair_rm has no use for it"),
        ([*pairs, "--baseline", "bradley_terry", "--model", "/no/such"], "/no/such does not exist"),
        (
            ["--benchmark", "real_mistake", "--data", str(tmp_path), "--baseline", "pair_rm"],
            "1 cases do not fit the template: 't m/lone.jsonl-1' has one response: a pair RM compares two or more",
        ),
    ):
        assert main(["eval", "--output", str(tmp_path / "out"), *args]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_a_model_of_the_wrong_kind_empties_no_output(folder, tmp_path, capsys):
    """Nor does a folder without a tokenizer: its config and its files' names say so before any weights are read."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "verdicts.jsonl"
    rows.write_text(json.dumps({"prompt": "?", "responses": ["a", "b"]}) + "\n")
    shutil.copytree(folder / "critic", tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    for more, said in (
        (["--model", str(folder / "reward")], "has a scalar head and writes nothing"),
        (["--model", str(folder / "critic"), "--meta-rm", str(folder / "critic")], "has no scalar head"),
        (["--model", str(tmp_path / "bare")], "has no tokenizer files"),
    ):
        out.write_text("judged before\n")
        assert main(["score", "--input", str(rows), "--output", str(out), "--overwrite", *more]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
        assert out.read_text() == "judged before\n"


@pytest.mark.parametrize("kind", ["pair_rm", "cloud", "meta_rm"])
def test_a_template_that_a_model_keeps_is_held_against_the_rows_first(tmp_path, capsys, kind):
    """The folder has a template and no model: nothing else is read before the rows are known to fit."""
    name = {"cloud": baselines.CRITIQUE, "pair_rm": baselines.PAIR, "meta_rm": meta_rm.TEMPLATE}[kind]
    text = prompts.template_path(name).read_text()
    model = tmp_path / "model"
    model.mkdir()
    (model / scalar_rm.TEMPLATE_FILE).write_text(re.sub(r"{% if reference .*?{% endif %}\n", "", text, flags=re.DOTALL))
    row = {"prompt": "?", "responses": ["a", "b"], "scores": [1, 0], "reference": "a"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    asked = {"pair_rm": ["--model"], "cloud": ["--critic", "smollm2-135m", "--model"], "meta_rm": ["--meta-rm"]}[kind]
    more = [*(["--baseline", kind] if kind != "meta_rm" else []), *asked, str(model)]
    for command in (
        ["score", "--input", str(tmp_path / "rows.jsonl")],
        ["eval", "--benchmark", "preferences", "--data", str(tmp_path / "rows.jsonl")],
    ):
        assert main([*command, "--output", str(tmp_path / "out"), *more]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "do not fit the template" in said
        assert "does not show 'reference'" in said
