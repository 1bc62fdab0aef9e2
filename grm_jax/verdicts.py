"""From an example's judgments, or from rewards that need none, to its verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from grm_jax import voting
from grm_jax.datatypes import Example, Judgment, Usage, Verdict


def verdict(
    example: Example, judgments: Sequence[Judgment], usage: Usage, logits: Sequence[float] | None = None,
    k_meta: int | None = None,
) -> Verdict:  # fmt: skip
    """The vote over an example's judgments (Eq. 14): a failed parse is left out, and when all fail it is a tie of all.

    logits: a meta RM's, one a judgment; the k_meta judgments with the highest ones are then summed alone.
    """
    n = len(example.responses)
    whole = all(judgment.values is None for judgment in judgments)
    table = np.array([judgment.voted or (0,) * n for judgment in judgments], np.int32 if whole else np.float32)
    valid = np.array([judgment.voted is not None for judgment in judgments])
    given = table[None], valid[None], np.array([n], np.int32)
    if logits is None:
        tally = voting.vote_batch(*given)
    else:
        tally, chosen = voting.guided_batch(*given, np.array([logits], np.float32), k_meta)
        judgments = [
            dataclasses.replace(judgment, logit=float(logit), kept=bool(kept))
            for judgment, logit, kept in zip(judgments, logits, np.asarray(chosen)[0, -1], strict=True)
        ]
    sums, best, tie = jax.device_get((tally.sums, tally.best, tally.tie))
    return Verdict(
        id=example.id,
        scores=tuple(float(s) for s in sums[0, -1, :n]),
        best=int(best[0, -1]),
        tie=bool(tie[0, -1]),
        votes=len(judgments),
        valid=int(valid.sum()),
        judgments=tuple(judgments),
        usage=usage,
    )


def of_rewards(example: Example, rewards: Sequence[float], usage: Usage) -> Verdict:
    """The verdict of a model that writes nothing: one vote, whose scores are the rewards, and no judgments."""
    if not all(map(math.isfinite, rewards)):
        raise ValueError(f"{example.id!r} has rewards {list(rewards)}: they have to be finite, try --dtype float32")
    top = [i for i, reward in enumerate(rewards) if reward == max(rewards)]
    return Verdict(example.id, tuple(map(float, rewards)), top[0], len(top) > 1, 1, 1, (), usage)
