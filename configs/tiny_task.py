"""The judging task of the tiny configs: which of two things costs most, or least?

    python configs/tiny_task.py FOLDER [--seed N]

writes six files into FOLDER: `train.jsonl` and `test.jsonl` (labelled examples, no responses in both), `base.jsonl`
(judgments in the right format by a poor judge, who often takes the most for the least, says so in his criterion and scores
by it, unless the prompt has a hint: what a base model brings), `general.jsonl` (instructions: say a name, say it backwards,
say what a query asks for), and what baselines need of a base: `choice.jsonl` (the same judge's choices of a response) and
`critic.jsonl` (his critiques of one response).

A query asks for the most or the least, a response is a price of one digit and a made-up name: without the query the
best response is unknown, without the responses too. The names make every example new: there are 24 million pairs.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

QUERIES = {"most": "which costs most?", "least": "which costs least?"}
MISREAD = 0.42  # how often the poor judge takes the most for the least, or the least for the most
NOISE = 0.3  # of his scores: a standard deviation
PRICES = (1, 3, 5, 7, 9)
HINTED = 0.2  # the share of his prompts that tell the best response; there he misreads nothing
SIZES = {"train": 6000, "test": 2000, "base": 3000, "general": 800, "choice": 3000, "critic": 2000}


def name(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))


def example(rng: random.Random, id_: str) -> dict:
    """A labelled row: prices are all different, and the best one is the label."""
    asked = rng.choice(list(QUERIES))
    prices = rng.sample(PRICES, 2)
    best = max(prices) if asked == "most" else min(prices)
    return {
        "id": id_,
        "messages": [{"role": "user", "content": f"{name(rng)}: {QUERIES[asked]}"}],
        "responses": [f"{price} {name(rng)}" for price in prices],
        "scores": [float(price == best) for price in prices],
        "source": asked,
    }


def reading(rng: random.Random, row: dict) -> str:
    """What a poor judge takes the query for."""
    asked = row["source"]
    return next(other for other in QUERIES if other != asked) if rng.random() < MISREAD else asked


def judgment(rng: random.Random, row: dict, hinted: bool, choice: bool = False) -> tuple[list[int], str]:
    """An order of the responses, and a poor judge's text on them: a criterion, the prices, and noisy scores by it.

    choice: the number of the response with the highest score instead of the scores.
    """
    asked = row["source"] if hinted else reading(rng, row)
    order = rng.sample(range(len(row["responses"])), len(row["responses"]))
    prices = [int(row["responses"][i][0]) for i in order]
    right = [price + 1 if asked == "most" else 10 - price for price in prices]
    noisy = [min(max(round(score + rng.gauss(0, NOISE)), 1), 10) for score in right]
    said = f"Specific Criteria: {asked}\nAnalysis: {', '.join(map(str, prices))}"
    if choice:
        return order, f"{said}\nBest response: \\boxed{{{noisy.index(max(noisy)) + 1}}}"
    return order, f"{said}\nScores: \\boxed{{{', '.join(map(str, noisy))}}}"


def instruction(rng: random.Random) -> dict:
    """A chat row: say a name again, or backwards, or say what a query asks for."""
    word, kind = name(rng), rng.choice(("again", "backwards", "criterion"))
    if kind == "criterion":
        asked, query = rng.choice(list(QUERIES.items()))
        turns = (
            ("user", f"User: {word}: {query}\nWhat is the criterion?"),
            ("assistant", f"Specific Criteria: {asked}"),
        )
    elif kind == "again":
        turns = (("user", f"Say {word}."), ("assistant", word))
    else:
        turns = (("user", f"Say {word} backwards."), ("assistant", word[::-1]))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(folder: Path, seed: int) -> None:
    from grm_jax import prompts
    from grm_jax.data.items import hint_of
    from grm_jax.data.jsonl import parse_row

    rng = random.Random(seed)
    here = Path(__file__).parent
    template, choice_template = (
        prompts.load_template(str(here / f"tiny_{kind}.txt")) for kind in ("template", "choice")
    )
    text_template = prompts.load_template(str(here / "tiny_text.txt"), boxed=False)
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()

    def unseen(id_: str) -> dict:
        while (key := json.dumps((row := example(rng, id_))["responses"])) in seen:
            pass
        seen.add(key)
        return row

    def base(i: int) -> dict:
        row = unseen(f"base-{i}")
        hinted = rng.random() < HINTED
        order, answer = judgment(rng, row, hinted)
        shown = parse_row(row, row["id"])
        (turn,) = prompts.render(shown, tuple(order), template, hint_of(shown) if hinted else None)
        return {"messages": [{"role": "user", "content": turn.content}, {"role": "assistant", "content": answer}]}

    def choice(i: int) -> dict:
        row = unseen(f"choice-{i}")
        order, answer = judgment(rng, row, hinted=False, choice=True)
        (turn,) = prompts.render(parse_row(row, row["id"]), tuple(order), choice_template)
        return {"messages": [{"role": "user", "content": turn.content}, {"role": "assistant", "content": answer}]}

    def critic(i: int) -> dict:
        row = unseen(f"critic-{i}")
        one = parse_row(
            {name: row[name] for name in ("id", "messages")} | {"responses": row["responses"][:1]}, row["id"]
        )
        (turn,) = prompts.render(one, (0,), text_template)
        said = f"Specific Criteria: {reading(rng, row)}\nAnalysis: {row['responses'][0][0]}"
        return {"messages": [{"role": "user", "content": turn.content}, {"role": "assistant", "content": said}]}

    rows = {
        "train": [unseen(f"train-{i}") for i in range(SIZES["train"])],
        "test": [unseen(f"test-{i}") for i in range(SIZES["test"])],
        "base": [base(i) for i in range(SIZES["base"])],
        "general": [instruction(rng) for _ in range(SIZES["general"])],
        "choice": [choice(i) for i in range(SIZES["choice"])],
        "critic": [critic(i) for i in range(SIZES["critic"])],
    }
    for file, found in rows.items():
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.folder, arguments.seed)
