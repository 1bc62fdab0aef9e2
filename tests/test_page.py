"""The evaluation's page without a browser: parts of judgments, what became of cases, and what is written of them."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
from test_evals import judgment, pair

from grm_jax.data.benchmarks import KINDS, Benchmark, Case
from grm_jax.datatypes import Example, Message
from grm_jax.evals import measure, page, report, table
from grm_jax.spct.sample import Sample

HOSTILE = "</script><script>alert(1)</script><b> \u2028 \ud800"
PROTOCOL = {
    "votes": 4, "temperature": 0.5, "seed": 0, "force_scores": False, "model": "judge", "weights": "0", "meta_rm": None,
    "k_meta": None, "template": {"listwise": "0" * 64},
}  # fmt: skip


def page_of(
    name: str, cases: list[Case], rows: Sequence[Sample], once: Sequence[Sample] = (), **dropped: int
) -> tuple[str, dict[str, Any]]:
    """A page of scripted judgments, and the data that it holds."""
    benchmark = Benchmark(name, cases, KINDS[name], {reason.replace("_", " "): n for reason, n in dropped.items()})
    found = table.table_of(cases, rows)
    greedy = measure.greedy(benchmark, table.table_of(cases, once), 0) if once else None
    whole = report.whole(benchmark, PROTOCOL, measure.numbers(benchmark, found, None, 0), greedy)
    text = page.html(whole, found, rows, once)
    return text, json.loads(re.search(r'id="data">(.*)</script>\n<script>', text, re.DOTALL)[1])


def case_of(labels: tuple[float, ...], subset: str, id: str = "0") -> Case:
    responses = tuple(f"response {i}" for i in range(len(labels)))
    return Case(Example(id, (Message("user", "which?"),), responses, labels), subset, id)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RESAMPLES", 5)


# ---------------------------------------------------------------- parts of a judgment


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Specific Criteria: tone (100%)\nAnalysis: 2 is rude.\n\nScores: \\boxed{9, 2}", "Principles Critique Scores"),
        ("### **Specific Criteria:** a\n- **Analysis**: b\n2. **Scores:** \\boxed{1}", "Principles Critique Scores"),
        (
            "\n\n#### Evaluation Criteria ####\na\nanalysis of response 1: b\r\nFinal Scores\r\n1",
            "Principles Critique Scores",
        ),
        ("The criteria: a\nThe analysis: b\nBest response: \\boxed{2}", "Principles Critique Scores"),
        ("Principles:\na\nCritique:\nb\nScore: \\boxed{7}", "Principles Critique Scores"),
        # One score within an analysis is no heading, and analyses that follow each other are one part.
        ("Analysis of Response 1: a\nScore: 8\nAnalysis of Response 2: b\nScores: \\boxed{8, 1}", "Critique Scores"),
        ("I see.\nCriteria:\na\nAnalysis:\nb\nCriteria:\nc", "- Principles Critique Principles"),
        ("free text\n\nScores: \\boxed{5, 5}", "- Scores"),
        ("the analysis shows: nothing\nCriteria matter, scores too", "-"),
        ("no heading: at all", "-"),
        ("", "-"),
        (" \n", "-"),
    ],
)
def test_a_judgment_is_cut_at_its_headings(text: str, names: str) -> None:
    found = page.parts(text)
    assert " ".join(name or "-" for name, _ in found) == names
    assert "".join(part for _, part in found) == text  # nothing is lost


def test_the_parts_begin_with_their_headings() -> None:
    text = "\nSpecific Criteria: tone (100%)\nAnalysis: 2 is rude.\n\nScores: \\boxed{9, 2}"
    assert page.parts(text) == [
        ("Principles", "\nSpecific Criteria: tone (100%)\n"),
        ("Critique", "Analysis: 2 is rude.\n\n"),
        ("Scores", "Scores: \\boxed{9, 2}"),
    ]


@pytest.mark.parametrize("piece", [" ", "*", "#", "\n", "1. ", "Analysis ", "Analysis of ", "Score: ", "criteria\n*"])
def test_texts_without_end_are_cut_soon(piece: str) -> None:
    started = time.monotonic()
    page.parts(piece * 50_000)
    assert time.monotonic() - started < 5


# ---------------------------------------------------------------- what became of a case

THREE = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "subset", "labels", "scores", "kind"),
    [
        ("preferences", "s", (0.0, 1.0), (1, 2), "right"),
        ("preferences", "s", (0.0, 1.0), (2, 2), "tied"),
        ("preferences", "s", (0.0, 1.0), (2, 1), "wrong"),
        ("preferences", "s", (0.0, 1.0), None, "failed"),
        ("reward_bench", "math-prm", (1.0, 0.0), (3, 3), "tied"),
        ("reward_bench", "math-prm", (1.0, 0.0), (4, 3), "right"),
        ("ppe_correctness", "GPQA", (1.0, 0.0), (4, 3), "right"),
        ("reward_bench_2", "Math", (1.0, 0.0, 0.0, 0.0), (5, 5, 5, 1), "tied"),
        ("reward_bench_2", "Ties", (1.0, 1.0, 0.0), (9, 5, 4), "right"),
        ("reward_bench_2", "Ties", (1.0, 1.0, 0.0), (9, 4, 4), "wrong"),
        ("reward_bench_2", "Ties", (1.0, 1.0, 0.0), (9, 3, 4), "wrong"),  # though the best one is right
        ("rmb", "Helpfulness BoN", (1.0, 0.0, 0.0), (5, 4, 1), "right"),
        ("rmb", "Helpfulness BoN", (1.0, 0.0, 0.0), (5, 5, 1), "wrong"),
        ("rm_bench", "chat", THREE, (9, 9, 9, 1, 1, 1), "right"),
        ("rm_bench", "chat", THREE, (9, 1, 9, 1, 1, 1), "partly"),  # though the highest is right
        ("rm_bench", "chat", THREE, (5, 5, 5, 5, 5, 5), "wrong"),
        ("rm_bench", "safety-refuse", THREE, None, "failed"),
        ("real_mistake", "s", (0.0,), (9,), "right"),  # of single responses only all together say more
        ("real_mistake", "s", (1.0,), None, "failed"),
    ],
)
def test_what_became_of_a_case_is_what_its_metric_gives_it(name, subset, labels, scores, kind) -> None:
    case = case_of(labels, subset, f"{subset}/tied:0")
    rows = [judgment(case, j, scores) for j in range(2)]
    shown, _ = page._cases(table.table_of([case], rows), name, rows)
    assert json.loads(shown[0])["kind"] == kind


@pytest.mark.parametrize(
    ("first", "second", "bench", "bar"),
    [
        ((9, 1), (5, 4), "right", "right"),
        ((9, 1), (4, 5), "wrong", "tied"),  # the sum would say right; one order alone is half of LLMBar's
        ((9, 1), (5, 5), "right", "tied"),
        ((1, 9), (4, 5), "wrong", "wrong"),
        ((1, 9), None, "wrong", "wrong"),
        (None, None, "failed", "failed"),
    ],
)
def test_two_orders_are_held_against_each_other(first, second, bench, bar) -> None:
    case = dataclasses.replace(pair(0), subset="Natural")
    rows = [judgment(case, 0, first, first=0), judgment(case, 1, second, first=1)]
    found = table.table_of([case], rows)
    for name, kind in (("judge_bench", bench), ("llm_bar", bar)):
        shown = json.loads(page._cases(found, name, rows)[0][0])
        assert shown["kind"] == kind
        assert shown["orders"] == [scores and list(scores) for scores in (first, second)]
    assert json.loads(page._cases(found, "preferences", rows)[0][0])["orders"] == []


def test_a_share_of_pairs_is_told() -> None:
    case = case_of(THREE, "chat")
    rows = [judgment(case, 0, (9, 1, 9, 1, 1, 1))]
    shown = json.loads(page._cases(table.table_of([case], rows), "rm_bench", rows)[0][0])
    assert shown["head"] == "67 % of its pairs; chat: which?"


def test_rewards_without_end_are_no_score() -> None:
    """JSON has no infinity, and one would make the whole page unreadable."""
    case = pair(0)
    rows = [dataclasses.replace(judgment(case, 0, None), values=(float("inf"), 1.5))]
    shown = json.loads(page._cases(table.table_of([case], rows), "preferences", rows)[0][0])
    assert (shown["sums"], shown["kind"]) == ([None, 1.5], "right")


def test_thousands_of_cases_take_seconds() -> None:
    cases = [case_of(THREE, "chat", str(i)) for i in range(4000)]
    rows = [judgment(case, j, (9, 1, 9, 1, 1, 1)) for case in cases for j in range(4)]
    found = table.table_of(cases, rows)
    started = time.monotonic()
    shown, left = page._cases(found, "rm_bench", rows)
    assert (len(shown), left) == (4000, 0)
    assert time.monotonic() - started < 20


# ---------------------------------------------------------------- what is written


def test_a_page_holds_no_markup_of_a_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more characters than it may, as they are written: wrong cases are kept first."""
    cases = [
        dataclasses.replace(pair(i), example=dataclasses.replace(pair(i).example, responses=(HOSTILE * 9, "b")))
        for i in range(4)
    ]
    rows = [judgment(case, 0, [(9, 1), (1, 9), (5, 5), None][i], text=HOSTILE) for i, case in enumerate(cases)]
    text, data = page_of("preferences", cases, rows)
    assert text.count("<script") == 2
    assert text.encode()  # whatever stands in a response
    assert [case["kind"] for case in data["cases"]] == ["right", "wrong", "tied", "failed"]
    assert data["cases"][0]["responses"] == [HOSTILE * 9, "b"]
    assert data["cases"][0]["judgments"][0]["parts"] == [["", HOSTILE]]
    written, _ = page._cases(table.table_of(cases, rows), "preferences", rows)
    for room, kinds in ((0, ["wrong", "failed"]), (-1, ["wrong"])):
        monkeypatch.setattr(page, "LARGEST", len(written[1]) + len(written[3]) + 2 * len(", ") + room)
        text, data = page_of("preferences", cases, rows)
        assert [case["kind"] for case in data["cases"]] == kinds
        assert data["left"] == 4 - len(kinds)
        cases_at = text.index('"cases": [') + len('"cases": [')
        assert text.index("]}</script>") - cases_at <= page.LARGEST


def test_rows_that_are_no_case_are_counted() -> None:
    case = pair(0)
    rows = [judgment(case, 0, (9, 1))]
    assert page_of("preferences", [case], rows, without_a_best=3, of_one_response=1)[1]["dropped"] == (
        "Dropped: 3 without a best, 1 of one response."
    )
    assert page_of("preferences", [case], rows)[1]["dropped"] == ""


def test_greedy_judgments_stand_beside_the_others() -> None:
    cases = [dataclasses.replace(pair(i), subset="Natural") for i in range(2)]
    rows = [judgment(case, j, (9, 1), first=j % 2) for case in cases for j in range(4)]
    once = [
        judgment(case, j, (2, 1), first=j, text=f"Analysis: {case.example.id}\nScores: \\boxed{{2, 1}}")
        for case in reversed(cases)
        for j in range(2)
    ]
    data = page_of("llm_bar", cases, rows, once)[1]
    for i, case in enumerate(data["cases"]):
        assert len(case["judgments"]) == 4
        assert [one["head"] for one in case["greedy"]] == [
            f"scores 2, 1; shown in the order {o}" for o in ("1, 2", "2, 1")
        ]
        assert case["greedy"][0]["parts"] == [["Critique", f"Analysis: {i}\n"], ["Scores", "Scores: \\boxed{2, 1}"]]
    assert all(case["greedy"] == [] for case in page_of("llm_bar", cases, rows)[1]["cases"])


def test_judgments_say_whether_the_guided_vote_kept_them() -> None:
    case = pair(0)
    rows = [judgment(case, j, (9, 1), logit=float(j)) for j in range(4)]
    data = page_of("preferences", [case], rows)[1]
    heads = [one["head"] for one in data["cases"][0]["judgments"]]
    assert [head.rpartition(", ")[2] for head in heads] == ["left out", "left out", "kept", "kept"]
    assert "logit 3.00" in heads[3]


def test_names_along_an_axis_keep_their_distance() -> None:
    points = [(x, y, y - 0.1, y + 0.1) for x, y in ((1, 0.5), (2, 0.6), (32, 0.7), (33, 0.7))]
    drawn = page._chart("judgments", {"voting": points})
    assert re.findall(r'y="232" text-anchor="middle">(\d+)<', drawn) == ["33", "2", "1"]


def test_every_point_has_its_interval_and_bars_of_lines_stand_apart() -> None:
    """From 40 to 70 % with a hundredth on either side: 190 units of height for 0.32."""
    drawn = page._chart("judgments", {"a": [(1, 0.5, 0.4, 0.7)], "b": [(1, 0.5, 0.4, 0.7)]})
    bars = [tuple(map(float, found)) for found in re.findall(r'<path d="M([\d.]+),([\d.]+)V([\d.]+)"', drawn)]
    assert [bar[0] for bar in bars] == [215.5, 218.5]
    assert {bar[1:] for bar in bars} == {(210.1, 31.9)}
    assert re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn) == [("217.0", "150.7")] * 2
