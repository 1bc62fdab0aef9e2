"""The scripts beside the configs: judgments made of written critiques, and the tiny task's data."""

import json
import re
import runpy
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[1] / "configs"


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def critique(query: str, response: str, score: float, said: str | list[str]) -> dict:
    said = {"critiques": said} if isinstance(said, list) else {"critique": said}
    return {"messages": [{"role": "user", "content": query}], "responses": [response], "scores": [score]} | said


def test_critiques_become_judgments_of_pairs(tmp_path):
    """Scores of a file that ends at 5 are doubled; a conversation's rows are paired unless they score the same."""
    make = runpy.run_path(str(CONFIGS / "critiques.py"))["write"]
    ten = write(
        tmp_path / "ten.jsonl",
        critique("a?", "good " * 200, 8, "It is good. It is long." + " More." * 60 + "\n\nRating: [[8]]"),
        critique("a?", "bad", 2, "It is wrong."),
        critique("a?", "worse", 2, "It is wrong too."),
        critique("alone?", "yes", 7, "Fine."),
    )
    five = write(
        tmp_path / "five.jsonl",
        critique("b?", "fair", 3.3333, ["Fair.", "Middling."]),
        critique("b?", "best", 5, ["Best.", "Great."]),
    )
    make(tmp_path / "chats.jsonl", [ten, five], 0)
    chats = rows_of(tmp_path / "chats.jsonl")
    assert len(chats) == 3  # two of a?, one of b?
    scores = {"good": 8, "bad": 2, "worse": 2, "fair": 7, "best": 10}
    for chat in chats:
        asked, answer = (turn["content"] for turn in chat["messages"])
        shown = re.findall(r"\[The Begin of Response \d\]\n(\w+)", asked)
        assert answer.endswith(f"Scores: \\boxed{{{scores[shown[0]]}, {scores[shown[1]]}}}")
        assert re.match(
            r"Specific Criteria: ([a-z ]+ \d+%, )+[a-z ]+ \d+%\nAnalysis: Response 1: .* Response 2: ", answer
        )
        assert "Rating" not in answer
        assert len(answer) < 500
        assert ("[...]" in asked) == ("good" in shown)
    write(tmp_path / "bad.jsonl", critique("a?", "x", 3, ""))
    with pytest.raises(SystemExit, match=r"bad\.jsonl:1: 1 responses, 0 critiques"):
        make(tmp_path / "chats.jsonl", [tmp_path / "bad.jsonl"], 0)


def test_the_tiny_task_is_new_everywhere_and_its_poor_judge_heeds_hints(tmp_path):
    script = runpy.run_path(str(CONFIGS / "tiny_task.py"))
    script["write"](tmp_path, 3)
    train, test, base = (rows_of(tmp_path / f"{name}.jsonl") for name in ("train", "test", "base"))
    assert not {tuple(row["responses"]) for row in train} & {tuple(row["responses"]) for row in test}
    assert {len(set(row["scores"])) for row in train} == {2}
    read, followed = {False: [], True: []}, []
    for row in base:
        asked, answer = (turn["content"] for turn in row["messages"])
        prices = [int(price) for price in re.findall(r"Response \d\](\d)", asked)]
        first, second = map(int, re.search(r"boxed\{(\d+), (\d+)\}", answer).groups())
        criterion = re.match(r"Specific Criteria: (\w+)\n", answer)[1]
        read["Best: " in asked].append(f"costs {criterion}?" in asked)
        followed.append(first != second and (first > second) == ((prices[0] > prices[1]) == (criterion == "most")))
    assert len(read[True]) / len(base) == pytest.approx(0.2, abs=0.03)
    assert all(read[True])
    assert sum(read[False]) / len(read[False]) == pytest.approx(0.58, abs=0.04)
    assert sum(followed) / len(followed) > 0.85


def test_the_tiny_task_has_what_baselines_need_of_a_base(tmp_path):
    runpy.run_path(str(CONFIGS / "tiny_task.py"))["write"](tmp_path, 3)
    followed = []
    for row in rows_of(tmp_path / "choice.jsonl"):
        asked, answer = (turn["content"] for turn in row["messages"])
        prices = [int(price) for price in re.findall(r"Response \d\](\d)", asked)]
        criterion, chosen = re.match(r"Specific Criteria: (\w+)\n.*\nBest response: \\boxed\{(\d)\}$", answer).groups()
        followed.append((int(chosen) == 1) == ((prices[0] > prices[1]) == (criterion == "most")))
    assert sum(followed) / len(followed) > 0.9
    read = []
    for row in rows_of(tmp_path / "critic.jsonl"):
        asked, answer = (turn["content"] for turn in row["messages"])
        (price,) = re.findall(r"Response \d\](\d)", asked)
        criterion = re.fullmatch(rf"Specific Criteria: (\w+)\nAnalysis: {price}", answer)[1]
        read.append(f"costs {criterion}?" in asked)
    assert sum(read) / len(read) == pytest.approx(0.58, abs=0.04)
