"""Accuracy against the number of judgments, for each way to vote: all k' <= k from one run of k samples (section 5).

1. `worth` holds the verdict after each k' against the labels: 1, 0, or at a tie its share of the right one (section 1).
2. `curves` does that for the plain vote, and where judgments have logits for the vote that a meta RM guides, and for sums
   weighted by the softmax of the logits; where they have expected scores, for those too.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from grm_jax import voting
from grm_jax.datatypes import Example, Verdict

_expected = jax.jit(jax.vmap(voting.expected_accuracy))


def curves(
    examples: Sequence[Example], verdicts: Sequence[Verdict], k_meta: int | None = None
) -> dict[str, Float[np.ndarray, "E K"]]:
    """What each example's verdict is worth after 1..K judgments, by way of voting.

    `voting`: the sum of scores. `guided`, `softmax`: where every judgment has a logit. `expected`: the sum of values, where
    every judgment with scores has them (`JudgeSettings.expected_scores`). Examples and their verdicts in one order, with
    labels and two or more responses; all verdicts have K judgments. Raises ValueError for an example of one response or
    without labels.
    """
    for example, verdict in zip(examples, verdicts, strict=True):
        if example.scores is None or len(example.responses) < 2 or example.id != verdict.id:
            raise ValueError(
                f"example {example.id!r}, verdict {verdict.id!r}: a curve needs labelled examples of two or more "
                "responses, beside their own verdicts"
            )
    counts = np.array([len(example.responses) for example in examples], np.int32)
    right = np.array([int(np.argmax(example.scores)) for example in examples], np.int32)
    widest = int(counts.max())
    scores = np.array([[_padded(j.scores or (), widest) for j in verdict.judgments] for verdict in verdicts], np.int32)
    valid = np.array([[j.scores is not None for j in verdict.judgments] for verdict in verdicts])
    tallies = {"voting": voting.vote_batch(scores, valid, counts)}
    if any(j.values for verdict in verdicts for j in verdict.judgments):
        values = np.array(
            [[_padded(j.voted or (), widest) for j in verdict.judgments] for verdict in verdicts], np.float32
        )
        tallies["expected"] = voting.vote_batch(values, valid, counts)
    if all(j.logit is not None for verdict in verdicts for j in verdict.judgments):
        logits = np.array([[j.logit for j in verdict.judgments] for verdict in verdicts], np.float32)
        tallies["guided"] = voting.guided_batch(scores, valid, counts, logits, k_meta)[0]
        tallies["softmax"] = voting.softmax_weighted_batch(scores, valid, counts, logits)
    return {name: np.asarray(_expected(tally.sums, counts, right)) for name, tally in tallies.items()}


def _padded(scores: Sequence[int] | Sequence[float], widest: int) -> tuple[int | float, ...]:
    return (*scores, *(0,) * (widest - len(scores)))
