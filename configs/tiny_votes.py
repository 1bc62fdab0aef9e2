"""How the votes of the tiny task's fine-tuned judge come out: one, eight, and eight guided by its meta RM.

    python configs/tiny_votes.py runs/tiny [--seed N]

judges `data/test.jsonl` of that folder 8 times with `rft/model`, guided by `meta/model`, and prints accuracy with its 95 %
bootstrap interval. Fails unless 8 votes beat one and 8 guided votes 8 plain ones, by more than the interval of the paired
difference.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

VOTES = 8


def main(folder: Path, seed: int) -> int:
    import grm_jax
    from grm_jax.data.jsonl import read_examples
    from grm_jax.spct.curves import curves
    from grm_jax.spct.measure import interval

    examples, _ = read_examples(str(folder / "data/test.jsonl"), skip_bad=False)
    grm = grm_jax.load(str(folder / "rft/model"))
    verdicts = grm.score(
        examples,
        VOTES,
        seed,
        grm_jax.load_meta_rm(str(folder / "meta/model")),
        force_scores=False,
        template=str(Path(__file__).parent / "tiny_template.txt"),
        max_new_tokens=72,
        slots=256,
    )
    worth = curves(examples, verdicts)
    found = {
        "1 vote": worth["voting"][:, 0],
        f"{VOTES} votes": worth["voting"][:, -1],
        f"{VOTES} guided": worth["guided"][:, -1],
        f"{VOTES} weighted": worth["softmax"][:, -1],
    }
    for name, of_example in found.items():
        low, high = interval(of_example, seed)
        print(f"{folder}: {name}: {of_example.mean():.1%} ({low:.1%} to {high:.1%}) of {len(examples)} unseen examples")
    beaten = True
    for better, worse in ((f"{VOTES} votes", "1 vote"), (f"{VOTES} guided", f"{VOTES} votes")):
        gain = found[better] - found[worse]
        low, high = interval(gain, seed)
        print(f"{folder}: {better} over {worse}: {gain.mean():+.1%} ({low:+.1%} to {high:+.1%})")
        beaten &= low > 0
    return not beaten


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(main(arguments.folder, arguments.seed))
