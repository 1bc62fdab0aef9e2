"""Which sampled judgments are kept: the rules of rejective fine-tuning (section 3.1), on the rows that `sample` writes.

1. A wrong judgment is rejected; one that does not parse, or whose top is a tie, is wrong (Eq. 10).
2. An item whose every judgment without a hint is right is too easy: its judgments without a hint are all rejected.
3. A judgment with a hint is rejected only when it is wrong, also where the item is too easy.
4. A right judgment that ran into the budget is no trajectory: what would be trained is to stop in mid-sentence.

The same rows filter RL's items (2, section 3.2) and label the meta RM's data (section 4.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from grm_jax.rewards import is_tie
from grm_jax.spct.sample import Sample


def by_item(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """The samples of each item, items and samples in the order given."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.id, []).append(sample)
    return found


def too_easy_ids(samples: Iterable[Sample]) -> set[str]:
    """Items that are right k of k times without a hint; items that have hinted samples alone are not among them."""
    unhinted = by_item(sample for sample in samples if not sample.hinted)
    return {id for id, group in unhinted.items() if all(sample.correct for sample in group)}


def reject_wrong(samples: Iterable[Sample]) -> list[Sample]:
    """The right ones."""
    return [sample for sample in samples if sample.correct]


def reject_easy(samples: Iterable[Sample]) -> list[Sample]:
    """All but the unhinted samples of items that are too easy."""
    samples = list(samples)
    easy = too_easy_ids(samples)
    return [sample for sample in samples if sample.hinted or sample.id not in easy]


def trajectories(unhinted: Iterable[Sample], hinted: Iterable[Sample] = ()) -> tuple[list[Sample], Counter[str]]:
    """What is fine-tuned on, first without and then with hints, and how many samples were rejected for which reason.

    Raises ValueError for a sample of the other kind, and for one that occurs twice.
    """
    unhinted, hinted = list(unhinted), list(hinted)
    for kind, samples in ((False, unhinted), (True, hinted)):
        for sample in samples:
            if sample.hinted != kind:
                told = "with" if sample.hinted else "without"
                raise ValueError(f"sample {sample.sample} of {sample.id!r} was made {told} a hint: pass it as such")
    everything = unhinted + hinted
    occurring = Counter((sample.id, sample.hinted, sample.sample) for sample in everything)
    for (id, _, index), times in occurring.items():
        if times > 1:
            raise ValueError(f"sample {index} of {id!r} occurs {times} times: pass each file once")
    easy = too_easy_ids(unhinted)
    rejected = Counter(reason for sample in everything if (reason := _fault(sample, easy)))
    return [sample for sample in everything if not _fault(sample, easy)], rejected


def _fault(sample: Sample, easy: set[str]) -> str | None:
    """Why a sample is rejected, None for one that is kept."""
    if sample.correct:
        if sample.ended is False:
            return "cut short"
        return "too easy" if sample.id in easy and not sample.hinted else None
    if sample.scores is None:
        return "unparsed"
    return "tie" if is_tie(sample.scores) else "wrong"


def labelled(samples: Iterable[Sample]) -> list[tuple[Sample, bool]]:
    """The meta RM's data: every unhinted sample, right and wrong, with whether it is right (section 4.2)."""
    return [(sample, sample.correct) for sample in samples if not sample.hinted]
