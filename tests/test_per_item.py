"""Metrics on what the benchmarks' own repositories publish of single items, and their rows as those repositories have them.

`goldens/per_item.json` holds no texts, and says where each is from. Rows have the official keys and made-up texts.
Of two of JudgeBench's output files, 350 pairs each, it has the whole pairs of some stretches (23 and 21 pairs).
RM-Bench's and RewardBench 2's rules are worked by hand instead: what they publish of items is texts.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_benchmarks import case, scored, write

from grm_jax.data.benchmarks import BENCHMARKS, KINDS, Scored, metrics

PEERS = json.loads((Path(__file__).parent / "goldens/per_item.json").read_text())
PAIR = (1.0, 0.0)


# ---------------------------------------------------------------- published items


def test_llm_bar_has_the_published_statistics_of_its_published_verdicts():
    """47 pairs in both orders: the first order's accuracy, the second's, their mean, and how often they are equal."""
    rows, published = PEERS["llm_bar"]["rows"], PEERS["llm_bar"]["published"]
    assert len(rows) == KINDS["llm_bar"].official["GPTOut"]
    cases = [case("GPTOut", PAIR if label == 1 else PAIR[::-1]) for label, *_ in rows]

    def shown(winner):
        return (1, 0) if winner == 1 else (0, 1)

    found = metrics.llm_bar(cases, [Scored((0, 0), tuple(map(shown, winners))) for _, *winners in rows])
    assert 100 * found["GPTOut"] == pytest.approx(published["correct_average"])
    assert 100 * found["agreement"] == pytest.approx(published["equal"])
    for order, name in enumerate(("correct_False", "correct_True")):
        alone = metrics.preferences(cases, scored(*(shown(winners[order]) for _, *winners in rows)))
        assert 100 * alone["score"] == pytest.approx(published[name])


@pytest.mark.parametrize("judge", PEERS["judge_bench"]["judges"])
def test_judge_bench_counts_its_published_decisions_as_the_official_code_does(judge):
    """The second is said of the swapped pair and is turned back. `right` is counted by the rule of its utils/metrics.py."""
    published = PEERS["judge_bench"]["judges"][judge]
    shown = {"A": (1, 0), "B": (0, 1), "=": (0, 0)}
    cases, judged = [], []
    for subset, decisions in published["decisions"].items():
        for label, first, second in decisions.values():
            cases.append(case(subset, PAIR if label == "A" else PAIR[::-1]))
            judged.append(Scored(None, (shown[first], shown[second][::-1])))
    accuracies = {subset: right / len(published["decisions"][subset]) for subset, right in published["right"].items()}
    accuracies["score"] = sum(published["right"].values()) / len(cases)
    assert metrics.judge_bench(cases, judged) == pytest.approx(accuracies)


def test_judge_benchs_published_total_is_that_of_all_pairs():
    """Every accuracy in the tables is a whole number of the subset's pairs; their mean would be another number."""
    tables = PEERS["judge_bench"]["tables"]
    sizes = tables["subsets"]
    assert sum(sizes.values()) == KINDS["judge_bench"].rows
    for *percents, total in tables["judges"].values():
        cases, judged = [], []
        for (subset, size), percent in zip(sizes.items(), percents, strict=True):
            right = round(percent / 100 * size)
            cases += [case(subset, PAIR)] * size
            judged += [Scored(None, (PAIR, PAIR))] * right + [Scored(None, (PAIR, PAIR[::-1]))] * (size - right)
        found = metrics.judge_bench(cases, judged)
        assert [round(100 * found[name], 2) for name in (*sizes, "score")] == [*percents, total]


def test_rmb_calls_right_what_its_published_rewards_are_called():
    rows = PEERS["rmb"]["rows"]
    pair = case("Helpfulness pairwise", PAIR)
    assert [metrics.strictly_best(pair, (chosen, reject)) for chosen, reject, _ in rows] == [
        right for *_, right in rows
    ]
    found = metrics.rmb([pair] * len(rows), scored(*((chosen, reject) for chosen, reject, _ in rows)))
    assert found["Helpfulness pairwise"] == pytest.approx(45 / 56)


def test_reward_bench_weighs_its_published_subsets_as_the_official_code_does():
    """Every accuracy is a whole number of the official rows, so it is the verdicts; XSTest's weights are not its rows."""
    accuracies, official = PEERS["reward_bench"]["accuracies"], KINDS["reward_bench"].official
    assert accuracies.keys() == official.keys()
    cases, judged = [], []
    for subset, accuracy in accuracies.items():
        right = round(accuracy * official[subset])
        assert right / official[subset] == pytest.approx(accuracy, abs=1e-12)
        cases += [case(subset, PAIR)] * official[subset]
        judged += scored(*[(1, 0)] * right, *[(0, 1)] * (official[subset] - right))
    found = metrics.reward_bench(cases, judged)
    assert {subset: found[subset] for subset in accuracies} == pytest.approx(accuracies)
    sections = {
        "Chat": (50 + 56 + 67 + 16 + 29) / 358,
        "Chat Hard": (20 + 52 + 58 + 36 + 22 + 17) / 456,
        "Safety": (97 + 100 + 250 * 1 + 154 * 71 / 250 + 112) / 740,
        "Reasoning": (984 * 132 / 447 + 103 + 104 + 116 + 109 + 90 + 106) / 1968,
    }
    assert {name: found[name] for name in sections} == pytest.approx(sections)
    assert found["score"] == pytest.approx(sum(sections.values()) / 4)


def test_the_auc_of_real_mistakes_published_verdicts_is_their_mean_recall():
    """Of verdicts of two kinds the area is (recall of errors + recall of the rest) / 2; ties count as half."""
    cases, judged, expected = [], [], {}
    for task, model, total, recall, *rates in PEERS["real_mistake"]["cells"]:
        subset = f"{task} {model}"
        assert total == KINDS["real_mistake"].official[subset]
        right_fine, called_wrong, missed, right_wrong = (round(rate * total) for rate in rates)
        for label, score, count in ((1, 1, right_fine), (1, 0, called_wrong), (0, 1, missed), (0, 0, right_wrong)):
            cases += [case(subset, (float(label),))] * count
            judged += scored(*[(score,)] * count)
        expected[subset] = (recall + rates[0] / (rates[0] + rates[1])) / 2
    found = metrics.real_mistake(cases, judged)
    assert len(cases) == 900
    assert {subset: found[subset] for subset in expected} == pytest.approx(expected)
    assert found["mean of subsets"] == pytest.approx(np.mean(list(expected.values())))


# ---------------------------------------------------------------- official rules, by hand


def test_judge_bench_counts_a_pair_whose_other_order_failed():
    """utils/metrics.py of ScalerLab/JudgeBench: +1, -1, or 0 for a tie or None; right above 0."""
    pair = case("livebench-math", PAIR)
    orders = [((2, 1), None), (None, (1, 2)), ((1, 1), (1, 1)), ((1, 2), (1, 1)), ((2, 1), (2, 1)), (None, None)]
    found = metrics.judge_bench([pair] * 6, [Scored(None, order) for order in orders])
    assert found == {"livebench-math": 2 / 6, "score": 2 / 6}


def test_rm_bench_pools_both_kinds_of_safety_and_its_two_means_are_one():
    """README of THU-KEG/RM-Bench-Leaderboard: overall is the mean of the domains, and that of hard, normal and easy."""
    rng = np.random.default_rng(0)
    domains = ["chat", "math", "math", "code", "safety-refuse", "safety-refuse", "safety-response"]
    judged = scored(*map(tuple, rng.normal(size=(7, 6))))
    found = metrics.rm_bench([case(domain, (1.0,) * 3 + (0.0,) * 3) for domain in domains], judged)
    whole = np.mean([found["hard"], found["normal"], found["easy"]])
    assert found["score"] == pytest.approx(whole)
    normal = [one.scores[i] > one.scores[3 + i] for one in judged[4:] for i in range(3)]  # 3 rows alike
    assert found["safety normal"] == pytest.approx(np.mean(normal))


def test_reward_bench_2s_ties_without_a_spread():
    """A margin over no spread is tanh(inf) = 1, none over none adds nothing: as rewardbench/utils.py."""
    cases = [case("Ties", PAIR, f"Ties/ref:{i}") for i in (1, 2)]
    cases += [case("Ties", (1.0, 1.0, 0.0), f"Ties/tied:{i}") for i in (1, 2)]
    found = metrics.ties_score(cases, scored((5, 3), (6, 3), (4, 4, 3), (5, 5, 5)))
    assert found == pytest.approx(
        0.3 * 1 / 2 + 0.3 * 1 + 0.2 * 1 / 2 + 0.2 * 1 / 2 + 0.01 * (math.tanh(math.inf) + 0) / 2
    )


# ---------------------------------------------------------------- official rows


def test_rows_of_ppe_correctness_are_told_apart_by_their_model(tmp_path):
    """One question, answered by two models; a pair that is drawn twice counts twice."""
    row = {
        "question_id": "q1", "model_name": "model-one", "prompt": "?", "ground_truth": "b", "mean_score": 0.5,
        "response_1": "a", "response_2": "b", "scores": [False, True], "sampled_conflict_pairs": [[1, 0], [1, 0]],
    }  # fmt: skip
    for name in ("MMLU-Pro", "MATH", "GPQA", "MBPP-Plus", "IFEval"):
        write(tmp_path / f"PPE-{name}-Best-of-K/train.parquet", [row, row | {"model_name": "model-two"}])
    cases = BENCHMARKS["ppe_correctness"](str(tmp_path)).cases
    assert [c.example.id for c in cases[:4]] == [
        "MMLU-Pro/q1/model-one/1-0", "MMLU-Pro/q1/model-one/1-0#2",
        "MMLU-Pro/q1/model-two/1-0", "MMLU-Pro/q1/model-two/1-0#2",
    ]  # fmt: skip
    assert {c.group for c in cases[:4]} == {"MMLU-Pro/q1"}
    assert len({c.example.id for c in cases}) == len(cases) == 20


def test_real_mistakes_examples_and_outputs_are_no_cases(tmp_path):
    told = {"id": "x_gpt-4-0613", "task_name": "answerability_classification", "llm_response_model": "gpt-4-0613"}
    row = {
        "input": "?", "llm_response": "a", "error_label": "error", "human_explanation": "so", "error_categories": [],
        "metadata": told | {"task_source": "hotpotqa", "dataset": "realmistake", "difficulty": "easy"},
    }  # fmt: skip
    write(tmp_path / "data/answerability_classification/gpt-4-0613.jsonl", [row])
    write(tmp_path / "data/example.jsonl", [row])
    write(tmp_path / "error_detection_outputs/majority_vote/a/b/c/d.jsonl", [{"prediction": "error", "metadata": told}])
    for folder in (tmp_path, tmp_path / "data"):
        found = BENCHMARKS["real_mistake"](str(folder))
        assert [c.example.id for c in found.cases] == ["answerability_classification gpt-4-0613/x_gpt-4-0613"]
    assert found.missing()["answerability_classification gpt-4-0613"] == (1, 140)
    assert sum(found.kind.official.values()) == 900


def test_judge_benchs_outputs_are_no_cases(tmp_path):
    row = {
        "pair_id": "p", "original_id": None, "source": "mmlu-pro-computer science", "question": "?",
        "response_model": "gpt-4o-2024-05-13", "response_A": "a", "response_B": "b", "label": "A>B",
    }  # fmt: skip
    name = "dataset=judgebench,response_model=gpt-4o-2024-05-13"
    write(tmp_path / f"data/{name}.jsonl", [row])
    write(tmp_path / f"outputs/{name},judge_name=arena_hard,judge_model=m.jsonl", [row | {"judgments": []}])
    found = BENCHMARKS["judge_bench"](str(tmp_path))
    assert [(c.example.id, c.subset) for c in found.cases] == [("p", "mmlu-pro")]


def test_rows_of_rmb_and_rm_bench_with_all_their_keys(tmp_path):
    talk = [{"content": "help", "language": "English", "role": "user"}]
    answers = [{"llm_name": "m", "answer": text, "score": 2.0} for text in (" a", "b", "c")]
    pair = {
        "pair_uid": "1",
        "conversation_input": talk,
        "chosen": answers[0],
        "reject": answers[1],
        "category_path": "x",
    }
    best = {"bon_uid": "1", "conversation_input": talk, "bon_best": answers[0], "loser_list": answers[1:]}
    for part, file in (("Helpfulness", "Closed QA/OptionBased"), ("Harmlessness", "S1"), ("Harmlessness", "multi")):
        write(tmp_path / f"RMB_dataset/Pairwise_set/{part}/{file}.json", [pair])
        write(tmp_path / f"RMB_dataset/BoN_set/{part}/{file}.json", [best])
    found = BENCHMARKS["rmb"](str(tmp_path)).cases
    assert [c.example.responses for c in found[:2]] == [(" a", "b"), (" a", "b", "c")]
    assert [c.example.id for c in found if c.subset == "Harmlessness BoN"] == [
        "Harmlessness BoN/1",
        "Harmlessness BoN/1#2",
    ]
    row = {"id": 7, "prompt": "?", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "safety-refuse"}
    write(tmp_path / "rm/data/total_dataset.json", [row])
    write(tmp_path / "rm/data/safety-refuse_filtered.json", [row])
    (only,) = BENCHMARKS["rm_bench"](str(tmp_path / "rm")).cases
    assert (only.example.id, only.subset) == ("safety-refuse/7", "safety-refuse")
