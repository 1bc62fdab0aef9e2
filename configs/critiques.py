"""Judgments to start from, made of written critiques: what teaches a small model the format before stage 1.

    python configs/critiques.py OUTPUT.jsonl FILE ... [--seed N]

A FILE holds labelled rows of ONE response with a text on it, plain or gzipped JSON Lines: {"messages": [...],
"responses": ["..."], "scores": [3.0], "critique": "..."}, or several such texts as "critiques". Its scores are 1 to 10, or
1 to 5, which are doubled; a file whose highest is at most 5 is taken for the second.

Rows on the same conversation are paired, in an order drawn by the seed, unless their scores round to the same; a row that
is alone is left out. OUTPUT has one chat a line: the prompt of `listwise_short` with long responses cut, and a judgment:
criteria drawn from the general four, the first sentences of each critique, the scores. `rft --general` trains on it.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import re
from pathlib import Path

TEMPLATE = "listwise_short"
CRITERIA = ("instruction adherence", "usefulness", "level of detail", "relevance")
WEIGHTS = ((50, 30, 20), (40, 40, 20), (60, 20, 20), (70, 30), (60, 40))
CHARACTERS = 200  # of a critique: whole sentences up to here, or the first one
RESPONSE = 500  # characters of a response, for short rows: the format is what is learned here


def read(file: Path) -> list[dict]:
    """Rows with a whole score from 1 to 10 and a list of critiques."""
    text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode()
    rows = []
    for line, raw in enumerate(filter(None, text.split("\n")), 1):
        row = json.loads(raw)
        said = row.get("critiques") or [row.get("critique")]
        if len(row["responses"]) != 1 or not all(said):
            raise SystemExit(
                f"{file}:{line}: {len(row['responses'])} responses, {len([s for s in said if s])} critiques: a row is one "
                "response in a list, with 'critique' or 'critiques' on it"
            )
        rows.append(row | {"critiques": said})
    factor = 2 if max(row["scores"][0] for row in rows) <= 5 else 1
    return [row | {"score": min(max(round(factor * row["scores"][0]), 1), 10)} for row in rows]


def short(critique: str) -> str:
    """The first sentences of a critique, in one line and without a rating."""
    text = " ".join(re.sub(r"Rating: \[\[.*", "", critique, flags=re.DOTALL).split())
    found = ""
    for sentence in re.split(r"(?<=[.!?]) ", text):
        if found and len(found) + len(sentence) > CHARACTERS:
            break
        found = f"{found} {sentence}".strip()
    return found


def judgment(rng: random.Random, rows: list[dict]) -> str:
    weights = rng.choice(WEIGHTS)
    criteria = ", ".join(
        f"{name} {weight}%" for name, weight in zip(rng.sample(CRITERIA, len(weights)), weights, strict=True)
    )
    said = " ".join(f"Response {i}: {short(rng.choice(row['critiques']))}" for i, row in enumerate(rows, 1))
    scores = ", ".join(str(row["score"]) for row in rows)
    return f"Specific Criteria: {criteria}\nAnalysis: {said}\nScores: \\boxed{{{scores}}}"


def chat(rng: random.Random, rows: list[dict]) -> dict:
    """A prompt that shows the rows' responses in this order, and a judgment of them."""
    from grm_jax import prompts
    from grm_jax.data.jsonl import parse_row

    texts = [row["responses"][0] for row in rows]
    texts = [text if len(text) <= RESPONSE else f"{text[:RESPONSE]} [...]" for text in texts]
    shown = {"messages": rows[0]["messages"], "responses": texts}
    turns = prompts.render(parse_row(shown, "row"), tuple(range(len(rows))), prompts.load_template(TEMPLATE))
    told = [{"role": turn.role, "content": turn.content} for turn in turns]
    return {"messages": [*told, {"role": "assistant", "content": judgment(rng, rows)}]}


def write(output: Path, files: list[Path], seed: int) -> None:
    rng, talks = random.Random(seed), {}
    for row in itertools.chain.from_iterable(map(read, files)):
        talks.setdefault(json.dumps(row["messages"]), []).append(row)
    chats = []
    for rows in talks.values():
        pairs = [pair for pair in itertools.combinations(rows, 2) if pair[0]["score"] != pair[1]["score"]]
        chats += [chat(rng, rng.sample(pair, 2)) for pair in pairs]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(row) + "\n" for row in chats))
    print(f"{len(chats)} judgments of two responses in {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.output, arguments.files, arguments.seed)
