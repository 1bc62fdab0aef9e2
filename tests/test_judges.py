"""Judges that know, guess, or look at one thing alone, on every benchmark: what their reports have to say.

Scores are whole numbers up to a million, so that two responses hardly ever tie by chance.
"""

import dataclasses
import functools
import random

import pytest
from test_evals import judgment

from grm_jax.data.benchmarks import KINDS, Benchmark, Case, metrics
from grm_jax.datatypes import Example, Message
from grm_jax.evals import measure, report, table

PAIR, FOUR, SIX = (1.0, 0.0), (1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
TIES = {"ref": FOUR, "tied": (1.0, 1.0, 0.0, 0.0)}
K = 4
# Subsets with the labels of their cases, and what drawing lots is worth in each, if it is the same number in all.
SHAPES = {
    "reward_bench": ({"alpacaeval-easy": PAIR, "mt-bench-hard": PAIR, "donotanswer": PAIR, "hep-cpp": PAIR}, 1 / 2),
    "reward_bench_2": (dict.fromkeys(("Factuality", "Precise IF", "Math", "Safety", "Focus"), FOUR), 1 / 4),
    "ppe_preference": ({"": PAIR}, 1 / 2),
    "ppe_correctness": (dict.fromkeys(("MMLU-Pro", "MATH", "GPQA", "MBPP-Plus", "IFEval"), PAIR), 1 / 2),
    "rmb": (
        {
            "Helpfulness BoN": FOUR,
            "Harmlessness BoN": FOUR,
            "Helpfulness pairwise": PAIR,
            "Harmlessness pairwise": PAIR,
        },
        (1 / 4 + 1 / 2) / 2,
    ),
    "rm_bench": (dict.fromkeys(("chat", "math", "code", "safety-refuse", "safety-response"), SIX), 1 / 2),
    "judge_bench": ({"mmlu-pro": PAIR, "math": PAIR}, 1 / 4),  # right in both orders
    "real_mistake": ({"a": (1.0,), "b": (0.0,)}, 1 / 2),
    "llm_bar": ({"Natural": PAIR, "Manual": PAIR}, 1 / 2),
    "preferences": ({"s": PAIR, "t": PAIR}, 1 / 2),
}


def cases_of(name: str, count: int | None = None) -> list[Case]:
    """So many cases of each subset, or 480 in all; the labels of pairs and lists of four are turned by chance."""
    rng, found = random.Random(0), []
    count = count or 480 // len(SHAPES[name][0])
    for subset, labels in SHAPES[name][0].items():
        for i in range(count):
            turned = list(labels)
            if len(labels) in (2, 4):
                rng.shuffle(turned)
            responses = tuple(str(j) * rng.randrange(1, 1000) for j in range(len(labels)))
            example = Example(f"{subset}/{i}", (Message("user", f"{subset} {i}?"),), responses, tuple(turned))
            found.append(Case(example, subset, f"{subset} {i}"))
    return found


def judged(name, cases, judge, kind=None):
    """The numbers of a report on what `judge(case, first, rng)` says of each case, K times, another response first."""
    rng, rows = random.Random(1), []
    for case in cases:
        for j in range(K):
            first = j % len(case.example.responses)
            rows.append(judgment(case, j, judge(case, first, rng), first))
    benchmark = Benchmark(name, cases, kind or KINDS[name])
    return benchmark, measure.numbers(benchmark, table.table_of(cases, rows), None, 0)


def knows(case, first, rng):
    return tuple(9 if label == max(case.example.scores) else 1 for label in case.example.scores)


def knows_single(case, first, rng):
    return (9 if case.example.scores[0] else 1,)


def guesses(case, first, rng):
    return tuple(rng.randrange(1, 10**6) for _ in case.example.responses)


def likes_the_first(case, first, rng):
    return tuple(9 if i == first else 1 for i in range(len(case.example.responses)))


def likes_length(case, first, rng):
    return tuple(map(len, case.example.responses))


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(measure, "RESAMPLES", 100)
    monkeypatch.setattr(measure, "baselines", functools.partial(measure.baselines, draws=20))


def last(found):
    return found["curves"]["voting"][str(K)]


@pytest.mark.parametrize("name", SHAPES)
def test_one_who_knows_has_everything_right(name):
    _, found = judged(name, cases_of(name, 10), knows_single if name == "real_mistake" else knows)
    assert last(found)["score"] == 1
    assert found["intervals"]["voting"]["score"] == [1, 1]


@pytest.mark.parametrize("name", SHAPES)
def test_one_who_guesses_is_at_chance(name):
    """Within its interval, which is wide enough to hold chance and narrow enough to say something."""
    _, found = judged(name, cases_of(name), guesses)
    low, high = found["intervals"]["voting"]["score"]
    assert low <= SHAPES[name][1] <= high, (low, high)
    assert high - low < 0.15
    bounds = found["intervals_of_curves"]["voting"]
    assert bounds.keys() == found["curves"]["voting"].keys()
    assert bounds[str(K)] == [low, high]
    assert all(low <= found["curves"]["voting"][k]["score"] <= high for k, (low, high) in bounds.items())
    assert found["baselines"]["random"]["score"] == pytest.approx(SHAPES[name][1], abs=0.025)
    if name != "real_mistake":
        assert abs(found["position_bias"]) < 0.1


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "real_mistake"])
def test_one_who_likes_the_first_has_a_position_bias_of_1(name):
    _, found = judged(name, cases_of(name, 10), likes_the_first)
    assert found["position_bias"] == pytest.approx(1)


@pytest.mark.parametrize("name", SHAPES)
def test_one_who_likes_length_is_the_baseline(name):
    _, found = judged(name, cases_of(name, 40), likes_length)
    assert last(found) == pytest.approx(found["baselines"]["longer"])


def test_ties_of_reward_bench_2():
    """Who knows has 1.01 there: its margins are endless beside a spread of 0, which the official formula pays 0.01 for."""
    cases = []
    for i in range(20):
        for kind, labels in TIES.items():
            example = Example(f"Ties/{kind}:{i}", (Message("user", f"{i}?"),), tuple("abcd"), labels)
            cases.append(Case(example, "Ties", f"{i}"))
    _, found = judged("reward_bench_2", cases, knows)
    assert last(found)["Ties"] == pytest.approx(1.01)
    _, found = judged("reward_bench_2", cases, guesses)
    assert last(found)["Ties"] < 0.5


def test_a_report_of_the_official_rows_has_a_score_and_of_others_a_total():
    """All subsets at their official numbers; one row less; rows of a subset that there is not; a whole part less."""
    kind = dataclasses.replace(KINDS["rm_bench"], official=dict.fromkeys(SHAPES["rm_bench"][0], 8))
    protocol = {"template": {}, "meta_rm": None, "force_scores": True, "votes": K, "temperature": 0.5, "seed": 0}
    protocol |= {"model": "m", "weights": "w"}

    def written(cases):
        benchmark, found = judged("rm_bench", cases, knows, kind)
        return report.whole(benchmark, protocol, found, None)

    cases = cases_of("rm_bench", 8)
    whole, text = written(cases), report.markdown(written(cases))
    assert (whole["complete"], whole["missing"], whole["lacking"]) == (True, {}, {})
    assert "## Score after k judgments" in text
    assert "| score | 100.0 %" in text
    assert "no score" not in text + report.summary(whole)

    own = Case(dataclasses.replace(cases[0].example, id="own/0"), "own", "own")
    for others, missing in ((cases[1:], "chat 7 of 8"), ([*cases, own], "own 1 of 0")):
        text = report.markdown(written(others))
        assert f"Rows that differ from the official set: {missing}" in text
        assert "## Total after k judgments" in text
        assert "| total (no score of the benchmark) | 100.0 %" in text
        assert "| score | 1" not in text

    partial = written([case for case in cases if case.subset != "math"])
    text = report.markdown(partial)
    assert partial["lacking"]["score"] == ["math"]
    assert "| total (no score of the benchmark), 3 of 4 parts | 100.0 %" in text
    assert "| hard, 3 of 4 parts | 100.0 %" in text
    assert "no score of the benchmark, without math" in report.summary(partial)


def test_parts_that_no_file_counts_are_named_when_they_lack():
    """Nothing is known of RMB's numbers of rows, but of its parts."""
    cases = [case for case in cases_of("rmb", 4) if case.subset == "Helpfulness pairwise"]
    benchmark, found = judged("rmb", cases, knows)
    lacks = metrics.lacking(metrics.rmb, last(found))["score"]
    assert lacks == ["Helpfulness BoN", "Harmlessness BoN", "Harmlessness pairwise"]
    assert not benchmark.complete()


def test_a_mean_of_parts_is_drawn_anew_from_all_of_them():
    """Two rows of chat, all right, and 38 of code, all wrong: every draw that holds both is 1/2."""
    cases = [case for case in cases_of("reward_bench", 40) if case.subset in ("alpacaeval-easy", "hep-cpp")]
    cases = cases[:2] + cases[-38:]
    scored = [table.Scored(case.example.scores) for case in cases[:2]]
    scored += [table.Scored(tuple(-label for label in case.example.scores)) for case in cases[2:]]
    found = measure.interval(metrics.reward_bench, cases, scored, 0)
    assert found["score"] == (0.5, 0.5)
    assert found["Chat"] == (1, 1)


def test_the_softmax_vote_of_a_single_response_is_a_mean_already():
    """Four judgments of 9, and one of 3 beside three unread: 9 and 3 on either way."""
    cases, rows = cases_of("real_mistake", 1), []
    for case, scores in zip(cases, ([(9,)] * 4, [(3,), None, None, None]), strict=True):
        rows += [judgment(case, j, score, logit=0.5) for j, score in enumerate(scores)]
    found = table.table_of(cases, rows)
    ways = table.votes(found)
    assert ways.keys() == {"voting", "guided", "softmax"}
    for way in ways.values():
        assert [s.scores[0] for s in table.scored(found, way, 4)] == pytest.approx([9, 3])
