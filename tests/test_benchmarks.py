"""Benchmarks: their official files, made small, and their metrics on numbers worked by hand."""

import gzip
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from grm_jax import config
from grm_jax.data import items as labelled
from grm_jax.data.benchmarks import BENCHMARKS, KINDS, Case, Scored, load, metrics, prepared
from grm_jax.data.jsonl import DataError
from grm_jax.datatypes import Example, Message
from grm_jax.main import main
from grm_jax.recipes import Items


def case(subset: str, labels: tuple[float, ...], id: str = "x") -> Case:
    return Case(Example(id, (Message("user", "?"),), tuple("abcdef"[: len(labels)]), labels), subset, id)


def scored(*scores: tuple[float, ...] | None) -> list[Scored]:
    return [Scored(one) for one in scores]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    text = json.dumps(rows) if path.name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


# ---------------------------------------------------------------- metrics


def test_ties_are_worth_their_share_and_failures_nothing():
    three = case("s", (0.0, 2.0, 1.0))
    assert metrics.worth(three, (1, 5, 2)) == 1
    assert metrics.worth(three, (5, 5, 2)) == 1 / 2
    assert metrics.worth(three, (5, 1, 2)) == 0
    assert metrics.worth(three, None) == 0
    assert metrics.strictly_best(three, (5, 5, 2)) == 0
    assert metrics.strictly_best(three, (4, 5, 4)) == 1


def test_reward_bench_counts_math_as_984():
    """Reasoning by hand: math 1 of 2 right at 984, cpp 1 of 1 at 164; the sections' mean is the score."""
    cases = [case("math-prm", (1.0, 0.0)), case("math-prm", (1.0, 0.0)), case("hep-cpp", (1.0, 0.0))]
    cases += [case(name, (1.0, 0.0)) for name in ("alpacaeval-easy", "donotanswer", "mt-bench-hard", "llmbar-natural")]
    found = metrics.reward_bench(cases, scored((2, 1), (1, 2), (2, 1), (1, 1), (2, 1), (2, 1), (1, 2)))
    reasoning = (0.5 * 984 + 164) / (984 + 164)
    assert found["Reasoning"] == pytest.approx(reasoning)
    assert found["Chat"] == 0.5
    assert found["Chat Hard"] == pytest.approx(37 / 137)
    assert found["score"] == pytest.approx((0.5 + 37 / 137 + 1 + reasoning) / 4)
    without = metrics.reward_bench(cases[:3], scored((2, 1), (1, 2), (2, 1)))
    assert without["score"] == without["Reasoning"] == pytest.approx(reasoning)
    assert "Chat" not in without  # a section that is not there is no number, and counts in no mean
    assert sum(metrics.SECTIONS["Chat"].values()) == 358
    assert sum(metrics.SECTIONS["Chat Hard"].values()) == 456
    assert sum(metrics.SECTIONS["Safety"].values()) == 740
    assert sum(metrics.SECTIONS["Reasoning"].values()) == 1968


def test_ties_of_reward_bench_2_by_hand():
    """Prompt 1: margins 3 (ref) and 2 (tied), spread 1. Prompt 2: margins -1 and 1, spread 2."""
    cases = [
        case("Ties", (1.0, 0.0), "Ties/ref:1"),
        case("Ties", (1.0, 1.0, 0.0), "Ties/tied:1"),
        case("Ties", (1.0, 0.0), "Ties/ref:2"),
        case("Ties", (1.0, 1.0, 0.0), "Ties/tied:2"),
    ]
    found = metrics.ties_score(cases, scored((8, 5), (9, 8, 6), (4, 5), (9, 7, 6)))
    margins = (math.tanh(2 / 1 - 1) + math.tanh(-1 / 2 - 1)) / 2
    assert found == pytest.approx(0.3 * 1 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margins)
    assert math.isnan(metrics.ties_score(cases[:1], scored((8, 5))))
    twice = metrics.ties_score([*cases[:2], *cases], scored((8, 5), (9, 8, 6), (8, 5), (9, 8, 6), (4, 5), (9, 7, 6)))
    margins = (2 * math.tanh(2 / 1 - 1) + math.tanh(-1 / 2 - 1)) / 3  # prompt 1 drawn twice by a bootstrap
    assert twice == pytest.approx(0.3 * 1 + (0.3 + 0.2 + 0.2) * 2 / 3 + 0.01 * margins)
    four = [case("Math", (1.0, 0.0, 0.0, 0.0))] * 2
    assert metrics.reward_bench_2(four, scored((5, 5, 1, 1), (1, 2, 1, 1)))["Math"] == 0.25


def test_rm_benchs_triangle_by_hand():
    """chosen (3, 5, 1) against rejected (4, 0, 3): M = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]; ties lose."""
    cases = [case(domain, (1.0,) * 3 + (0.0,) * 3) for domain in ("chat", "math", "code", "safety")]
    found = metrics.rm_bench(cases, [*scored((3, 5, 1, 4, 0, 3)), *scored(*[(2, 2, 2, 1, 1, 1)] * 2), Scored(None)])
    assert found["chat hard"] == pytest.approx(2 / 3)  # (0, 1), (0, 2), (1, 2)
    assert found["chat normal"] == pytest.approx(1 / 3)
    assert found["chat easy"] == pytest.approx(2 / 3)  # (1, 0), (2, 0), (2, 1)
    assert found["score"] == pytest.approx((5 / 9 + 1 + 1 + 0) / 4)
    assert found["hard"] == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)
    without = metrics.rm_bench(cases[:1] + cases[2:], [*scored((3, 5, 1, 4, 0, 3), (2, 2, 2, 1, 1, 1)), Scored(None)])
    assert without["score"] == pytest.approx((5 / 9 + 1 + 0) / 3)
    assert without["easy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert math.isnan(metrics.rm_bench([], [])["score"])


def test_judge_bench_needs_both_orders_to_add_up():
    """A label of B: right twice; right and tied; right and wrong; wrong and unread."""
    pair = case("mmlu-pro", (0.0, 1.0))
    judged = [
        Scored((3, 9), ((1, 5), (2, 4))),
        Scored((3, 9), ((1, 5), (4, 4))),
        Scored((3, 9), ((5, 1), (2, 9))),
        Scored((3, 9), ((5, 1), None)),
    ]
    assert metrics.judge_bench([pair] * 4, judged) == {"mmlu-pro": 0.5, "score": 0.5}
    with pytest.raises(ValueError, match="was not judged in both orders"):
        metrics.judge_bench([pair], scored((1, 2)))


def test_llm_bars_orders_by_hand():
    cases = [case("Natural", (1.0, 0.0)), case("Manual", (0.0, 1.0)), case("GPTOut", (0.0, 1.0))]
    judged = [Scored((1, 0), ((5, 1), (4, 2))), Scored((1, 0), ((5, 1), (1, 5))), Scored((1, 0), ((3, 3), (3, 3)))]
    found = metrics.llm_bar(cases, judged)
    assert found == {
        "Natural": 1.0, "Manual": 0.5, "GPTOut": 0.5, "Adversarial": 0.5, "agreement": pytest.approx(1 / 3),
        "score": pytest.approx(2 / 3),
    }  # fmt: skip


def test_auc_counts_ties_as_half():
    assert metrics.auc([3, 1, 2], [True, False, False]) == 1
    assert metrics.auc([2, 1, 2, 3], [True, False, False, False]) == pytest.approx(1.5 / 3)
    assert math.isnan(metrics.auc([1, 2], [True, True]))
    cases = [case("a", (1.0,)), case("a", (0.0,)), case("b", (1.0,)), case("b", (0.0,))]
    found = metrics.real_mistake(cases, scored((7,), (3,), None, (1,)))
    assert found == {"a": 1.0, "b": 0.0, "mean of subsets": 0.5, "score": 0.5}
    assert metrics.real_mistake(cases, scored((7,), None, (8,), (1,)))["score"] == 0.5  # an unread error is not told
    assert metrics.real_mistake(cases, [Scored(None)] * 4)["score"] == 0  # nor is it a draw


def test_a_judge_without_a_clue_is_at_chance_and_one_who_knows_at_1():
    rng = np.random.default_rng(0)
    cases = [case("s", (1.0, 0.0), str(i)) for i in range(4000)]
    found = metrics.preferences(cases, scored(*map(tuple, rng.normal(size=(4000, 2)))))
    assert found["score"] == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)
    assert metrics.preferences(cases, scored(*(c.example.scores for c in cases)))["score"] == 1


# ---------------------------------------------------------------- files


def test_reward_bench_from_parquet(tmp_path):
    row = {"prompt": "1+1?", "chosen": "2", "rejected": "3", "subset": "math-prm", "id": 7}
    write(
        tmp_path / "data/filtered-00000.parquet",
        [row, row | {"subset": "alpacaeval-easy"}, row | {"subset": "anthropic"}],
    )
    write(tmp_path / "data/raw.parquet", [{"something": "else"}])
    found = BENCHMARKS["reward_bench"](str(tmp_path))
    assert [(c.example.id, c.example.responses, c.example.scores, c.subset) for c in found.cases] == [
        ("math-prm/7", ("2", "3"), (1.0, 0.0), "math-prm"),
        ("alpacaeval-easy/7", ("2", "3"), (1.0, 0.0), "alpacaeval-easy"),
    ]
    assert found.dropped == {"subset anthropic is not in the score": 1}
    assert found.missing()["math-prm"] == (1, 447)
    assert sum(found.kind.official.values()) == 2985


def test_reward_bench_2_keeps_which_ties_belong_together(tmp_path):
    row = {"id": "tied:3", "prompt": "Name a color", "chosen": ["red", "blue"], "rejected": ["dog"], "subset": "Ties"}
    write(tmp_path / "test.jsonl", [row, row | {"id": "ref:3", "chosen": ["red"]}])
    first, second = BENCHMARKS["reward_bench_2"](str(tmp_path)).cases
    assert (first.example.id, first.example.scores) == ("Ties/tied:3", (1.0, 1.0, 0.0))
    assert second.example.responses == ("red", "dog")
    write(tmp_path / "test.jsonl", [row | {"id": "three"}])
    with pytest.raises(DataError, match=r"test.jsonl:1: an id of Ties is ref:N or tied:N; found \"three\""):
        BENCHMARKS["reward_bench_2"](str(tmp_path))


def test_ppe(tmp_path):
    row = {
        "question_id": "q",
        "prompt": "?",
        "response_1": "a",
        "response_2": "b",
        "winner": "model_b",
        "language": "English",
    }
    write(tmp_path / "human/test.jsonl.gz", [row, row | {"question_id": "r", "winner": "tie (bothbad)"}])
    found = BENCHMARKS["ppe_preference"](str(tmp_path / "human"))
    assert [(c.example.scores, c.subset) for c in found.cases] == [((0.0, 1.0), "English")]
    assert found.dropped == {"tie": 1}
    assert found.missing() == {"all": (2, 16_038)}  # those that are dropped are official too
    row = {
        "question_id": 5, "prompt": "?", "response_1": "a", "response_2": "b", "response_3": "c",
        "scores": [False, True, False], "sampled_conflict_pairs": [[1, 0], [2, 1]],
    }  # fmt: skip
    for name in ("MMLU-Pro", "MATH", "GPQA", "MBPP-Plus", "IFEval"):
        write(tmp_path / f"correct/PPE-{name}-Best-of-K/data/train.parquet", [row])
    cases = BENCHMARKS["ppe_correctness"](str(tmp_path / "correct")).cases
    assert [(c.example.responses, c.example.scores, c.group) for c in cases[:2]] == [
        (("b", "a"), (1.0, 0.0), "MMLU-Pro/5"),
        (("c", "b"), (0.0, 1.0), "MMLU-Pro/5"),
    ]
    found = metrics.ppe_correctness(cases, [Scored(c.example.scores) for c in cases])
    assert found["score"] == 1


def test_rmb(tmp_path):
    talk = [{"role": "user", "content": "help"}]
    pair = {"pair_uid": "p", "conversation_input": talk, "chosen": {"answer": "a"}, "reject": {"answer": "b"}}
    best = {
        "bon_uid": "b",
        "conversation_input": talk,
        "bon_best": {"answer": "a"},
        "loser_list": [{"answer": "b"}, {"answer": "c"}],
    }
    for part in ("Helpfulness", "Harmlessness"):
        write(tmp_path / f"RMB_dataset/Pairwise_set/{part}/Open QA/x.json", [pair])
        write(tmp_path / f"RMB_dataset/BoN_set/{part}/Open QA/x.json", [best])
    found = BENCHMARKS["rmb"](str(tmp_path))
    assert [c.subset for c in found.cases] == [
        "Helpfulness pairwise", "Helpfulness BoN", "Harmlessness pairwise", "Harmlessness BoN",
    ]  # fmt: skip
    assert found.cases[1].example.responses == ("a", "b", "c")
    judged = scored((2, 1), (2, 2, 1), (1, 1), (3, 2, 1))
    assert found.kind.metric(found.cases, judged)["score"] == (1 + 0 + 0 + 1) / 4


def test_rm_bench_judge_bench_llm_bar_and_real_mistake(tmp_path):
    write(
        tmp_path / "rm/total_dataset.json",
        [{"id": 1, "prompt": "?", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "code"}],
    )
    (found,) = BENCHMARKS["rm_bench"](str(tmp_path / "rm")).cases
    assert (found.example.responses, found.subset) == (tuple("abcdef"), "code")
    assert sum(KINDS["rm_bench"].official.values()) == 1_327
    row = {
        "pair_id": "p",
        "source": "livebench-math-x",
        "question": "?",
        "response_A": "a",
        "response_B": "b",
        "label": "B>A",
    }
    write(tmp_path / "jb/gpt.jsonl", [row])
    whole = BENCHMARKS["judge_bench"](str(tmp_path / "jb"))
    (found,) = whole.cases
    assert whole.missing() == {"all": (1, 350)}
    assert (found.subset, found.example.scores) == ("livebench-math", (0.0, 1.0))
    row = {"input": "?", "output_1": "a", "output_2": "b", "label": 2}
    write(tmp_path / "lb/LLMBar/Adversarial/GPTOut/dataset.json", [row])
    write(tmp_path / "lb/LLMBar/Natural/dataset.json", [row | {"label": 1}])
    found = BENCHMARKS["llm_bar"](str(tmp_path / "lb"))
    assert [(c.subset, c.example.scores) for c in found.cases] == [("GPTOut", (0.0, 1.0)), ("Natural", (1.0, 0.0))]
    assert found.missing()["Natural"] == (1, 100)
    told = {"task_name": "math", "llm_response_model": "gpt-4"}
    row = {"input": "?", "llm_response": "a", "error_label": "no_error", "metadata": told}
    write(tmp_path / "re/x.jsonl", [row, row | {"error_label": "error"}])
    cases = BENCHMARKS["real_mistake"](str(tmp_path / "re")).cases
    assert [(c.example.scores, c.subset) for c in cases] == [((1.0,), "math gpt-4"), ((0.0,), "math gpt-4")]


def test_generic_preferences(tmp_path):
    rows = [
        {"id": "a", "prompt": "?", "chosen": "x", "rejected": "y"},
        {"id": "b", "prompt": "?", "responses": ["x", "y", "z"], "scores": [1, 3, 2], "subset": "hard"},
        {"id": "c", "prompt": "?", "responses": ["x", "y"], "scores": [0.5, 0.5]},
    ]
    write(tmp_path / "mine.jsonl", rows)
    found = BENCHMARKS["preferences"](str(tmp_path / "mine.jsonl"))
    assert [(c.example.id, c.subset) for c in found.cases] == [("a", "mine"), ("b", "hard")]
    assert found.dropped == {"no single best response": 1}


def test_a_prepared_benchmark_is_the_same_and_needs_no_tensorflow(tmp_path, capsys):
    row = {"input": "é?", "output_1": "a", "output_2": "b", "label": 2}
    write(tmp_path / "lb/LLMBar/Natural/dataset.json", [row | {"output_1": f"a{i}"} for i in range(5)])
    folder = str(tmp_path / "prepared/llm_bar/1.1.0")
    named = ["--benchmark", "llm_bar", "--data", str(tmp_path / "lb")]
    assert main(["prepare", *named, "--output", str(tmp_path / "prepared")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == folder
    assert load("llm_bar", folder) == load("llm_bar", str(tmp_path / "lb"))
    source = tfds.data_source("llm_bar", data_dir=str(tmp_path / "prepared"), split="test")
    assert len(source) == 5
    assert "tensorflow" not in sys.modules
    trained_on = labelled.load(Items(files=(folder,)), 0).train
    assert [(item.source, item.scores) for item in trained_on] == [("Natural", (0.0, 1.0))] * 5
    with pytest.raises(DataError, match="holds llm_bar, not rmb: give --benchmark llm_bar"):
        load("rmb", folder)
    assert main(["prepare", *named, "--output", str(tmp_path / "prepared")]) == 0
    write(tmp_path / "lb/LLMBar/Natural/dataset.json", [row])
    assert main(["prepare", *named, "--output", str(tmp_path / "prepared")]) == 2
    assert "1.1.0 was prepared from other data" in " ".join(capsys.readouterr().err.split())
    write(
        tmp_path / "my/own.jsonl",
        [{"prompt": "?", "responses": ["a", "b"], "scores": [1, 0], "source": "S", "strength": 2}],
    )
    mine = prepared.prepare("preferences", str(tmp_path / "my/own.jsonl"), str(tmp_path / "prepared"))
    assert load("preferences", mine) == load("preferences", str(tmp_path / "my/own.jsonl"))
    features = Path(mine) / "features.json"
    before = features.read_text()
    known = json.loads(before)
    del known["featuresDict"]["features"]["source"]
    features.write_text(json.dumps(known))
    with pytest.raises(DataError, match="written by an earlier version, which kept less: prepare it again"):
        load("preferences", mine)
    features.write_text(before)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/dataset_info.json").write_text('{"builder_name": "json", "features": {"a": 1}}')
    with pytest.raises(DataError, match="not of tensorflow-datasets"):
        load("preferences", str(tmp_path / "hub"))
    with pytest.raises(DataError, match="reward-bench"):
        prepared.prepare("reward_bench", str(tmp_path / "lb"), str(tmp_path / "prepared"))


def test_a_line_ends_with_a_line_feed_alone(tmp_path):
    row = {"prompt": "a\u2028b\x85c?", "chosen": "x\u2029", "rejected": "y"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    (found,) = BENCHMARKS["preferences"](str(tmp_path)).cases
    assert (found.example.messages[0].content, found.example.responses) == (row["prompt"], ("x\u2029", "y"))


def test_equal_conversations_are_one_query(tmp_path):
    rows = [{"prompt": prompt, "chosen": f"x{i}", "rejected": "y"} for i, prompt in enumerate(["a", "b", "a"])]
    write(tmp_path / "x.jsonl", rows)
    first, second, third = BENCHMARKS["preferences"](str(tmp_path)).cases
    assert first.group == third.group != second.group
    row = {"prompt": "?", "chosen": ["a"], "rejected": ["b"], "subset": "Ties"}
    write(
        tmp_path / "two/x.jsonl", [row | {"id": "ref:7"}, row | {"id": "tied:7", "prompt": "!"}, row | {"id": "ref:8"}]
    )
    assert [c.group for c in BENCHMARKS["reward_bench_2"](str(tmp_path / "two")).cases] == [
        "Ties/7",
        "Ties/7",
        "Ties/8",
    ]


def test_a_file_is_not_taken_for_a_benchmark_of_several_kinds(tmp_path):
    write(tmp_path / "PPE-MATH-Best-of-K.jsonl", [{"prompt": "?"}])
    for name in ("ppe_correctness", "rmb"):
        with pytest.raises(FileNotFoundError, match=r"is one file, and a folder with .* is due: (download|take)"):
            BENCHMARKS[name](str(tmp_path / "PPE-MATH-Best-of-K.jsonl"))


_TWO = {"id": "a", "subset": "Math", "prompt": "?", "rejected": ["b"]}


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("reward_bench_2", _TWO | {"chosen": None}, "'chosen' is a list"),
        ("reward_bench_2", _TWO | {"chosen": "abc"}, "'chosen' is a list"),
        (
            "rm_bench",
            {"id": 1, "domain": "chat", "prompt": "?", "chosen": "abc", "rejected": "def"},
            "'chosen' is a list",
        ),
        ("real_mistake", {"input": "?", "llm_response": "a", "error_label": "error", "metadata": None}, "other types"),
    ],
)
def test_a_row_of_other_types_is_named_with_the_way_to_the_files(tmp_path, name, row, said):
    write(tmp_path / "x.jsonl", [row])
    with pytest.raises(
        DataError, match=rf"official files have them; (download|take|unpack)[^\n]*\n.*x.jsonl:1: .*{said}"
    ):
        BENCHMARKS[name](str(tmp_path))


def test_the_command_line_knows_every_benchmark():
    assert tuple(BENCHMARKS) == tuple(KINDS) == config.BENCHMARKS


def test_what_is_missing_or_wrong_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"filtered.*allenai/reward-bench, split filtered"):
        BENCHMARKS["reward_bench"](str(tmp_path))
    write(tmp_path / "x.jsonl", [{"prompt": "?", "chosen": "a"}])
    with pytest.raises(DataError, match=r"x.jsonl:1: a row has the key 'subset'; found chosen, prompt"):
        BENCHMARKS["reward_bench"](str(tmp_path))
    (tmp_path / "x.jsonl").write_text("\n{")
    with pytest.raises(DataError, match=r"x.jsonl:2: .*; give the official file"):
        BENCHMARKS["reward_bench"](str(tmp_path))
    write(
        tmp_path / "y/total_dataset.json",
        [{"id": 1, "prompt": "?", "chosen": ["a"], "rejected": ["b"], "domain": "chat"}],
    )
    with pytest.raises(DataError, match=r'three rejected responses; found {"chosen": 1, "rejected": 1}'):
        BENCHMARKS["rm_bench"](str(tmp_path / "y"))
