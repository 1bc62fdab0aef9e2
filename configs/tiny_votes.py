"""How the votes of the tiny task's fine-tuned judge come out: one, eight, and eight guided by its meta RM.

    python configs/tiny_votes.py runs/tiny [--seed N] [--examples N] [--adaptive]

judges `data/test.jsonl` of that folder 8 times with `rft/model`, guided by `meta/model`, and prints accuracy with its 95 %
bootstrap interval. Fails unless 8 votes beat one and 8 guided votes 8 plain ones, by more than the interval of the paired
difference.

--adaptive: 32 votes against judgments in rounds that stop at a risk of 5 %, and 32 votes by expected scores, instead. Fails
unless the rounds lose less than half a point and spend less than half of the tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

GUIDED, ADAPTIVE = 8, 32  # votes
RISK = 0.05


def main(folder: Path, seed: int, count: int | None, adaptive: bool) -> int:
    import grm_jax
    from grm_jax.data.jsonl import read_examples

    examples, _ = read_examples(str(folder / "data/test.jsonl"), skip_bad=False)
    examples = examples[:count]
    grm = grm_jax.load(str(folder / "rft/model"))
    how = {
        "seed": seed,
        "force_scores": False,
        "template": str(Path(__file__).parent / "tiny_template.txt"),
        "max_new_tokens": 72,
        "slots": 256,
    }
    if adaptive:
        return rounds(folder, seed, examples, grm, how)
    return guided(folder, seed, examples, grm, grm_jax.load_meta_rm(str(folder / "meta/model")), how)


def guided(folder: Path, seed: int, examples: Sequence, grm: object, meta_rm: object, how: dict) -> int:
    from grm_jax.spct.curves import curves

    worth = curves(examples, grm.score(examples, GUIDED, meta_rm=meta_rm, **how))
    found = {
        "1 vote": worth["voting"][:, 0],
        f"{GUIDED} votes": worth["voting"][:, -1],
        f"{GUIDED} guided": worth["guided"][:, -1],
        f"{GUIDED} weighted": worth["softmax"][:, -1],
    }
    for name, of_example in found.items():
        show(folder, seed, name, of_example)
    low, _ = gain(folder, seed, found, f"{GUIDED} votes", "1 vote")
    least, _ = gain(folder, seed, found, f"{GUIDED} guided", f"{GUIDED} votes")
    return not (low > 0 and least > 0)


def rounds(folder: Path, seed: int, examples: Sequence, grm: object, how: dict) -> int:
    from grm_jax.spct.curves import curves
    from grm_jax.spct.measure import worth_of

    whole = grm.score(examples, ADAPTIVE, expected_scores=True, **how)
    worth = curves(examples, whole)
    stopped = grm.score(examples, ADAPTIVE, stop_risk=RISK, **how)
    found = {
        "1 vote": worth["voting"][:, 0],
        "1 expected": worth["expected"][:, 0],
        f"{ADAPTIVE} votes": worth["voting"][:, -1],
        f"{ADAPTIVE} expected": worth["expected"][:, -1],
        f"up to {ADAPTIVE}": np.array([worth_of(e, v) for e, v in zip(examples, stopped, strict=True)]),
    }
    for name, of_example in found.items():
        show(folder, seed, name, of_example)
    gain(folder, seed, found, "1 expected", "1 vote")
    gain(folder, seed, found, f"{ADAPTIVE} expected", f"{ADAPTIVE} votes")
    _, mean = gain(folder, seed, found, f"up to {ADAPTIVE}", f"{ADAPTIVE} votes")
    tokens = [sum(verdict.usage.completion_tokens for verdict in verdicts) for verdicts in (stopped, whole)]
    share, votes = tokens[0] / tokens[1], np.mean([verdict.votes for verdict in stopped])
    print(f"{folder}: rounds took {share:.1%} of the tokens, {votes:.1f} votes an example")
    return not (mean > -0.005 and share < 0.5)


def show(folder: Path, seed: int, name: str, of_example: np.ndarray) -> None:
    from grm_jax.spct.measure import interval

    low, high = interval(of_example, seed)
    print(f"{folder}: {name}: {of_example.mean():.1%} ({low:.1%} to {high:.1%}) of {len(of_example)} unseen examples")


def gain(folder: Path, seed: int, found: dict, better: str, worse: str) -> tuple[float, float]:
    """Print the paired difference; its interval's lower end, and its mean."""
    from grm_jax.spct.measure import interval

    difference = found[better] - found[worse]
    low, high = interval(difference, seed)
    print(f"{folder}: {better} over {worse}: {difference.mean():+.1%} ({low:+.1%} to {high:+.1%})")
    return low, float(difference.mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, help="of data/test.jsonl; by default all")
    parser.add_argument("--adaptive", action="store_true")
    arguments = parser.parse_args()
    sys.exit(main(arguments.folder, arguments.seed, arguments.examples, arguments.adaptive))
