"""Judgments of a benchmark's cases as arrays, and every way to vote over the first k' of them.

1. `table_of` lays the rows of `judgments.jsonl` beside the cases.
2. `votes` gives, for each way to vote, every case's sums after each k'.
3. `scored` turns the sums after one k' into what a metric takes; a single response has its mean.

Letters: E cases, K judgments, N responses (the most that a case has).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from grm_jax import voting
from grm_jax.data.benchmarks import Case, Kind, Scored, query_of
from grm_jax.spct.sample import Sample


@dataclasses.dataclass(frozen=True)
class Table:
    """All judgments. Scores and values are in the cases' own order, 0 behind a case's responses and where not valid.

    rewards: of a baseline with a scalar head. They stand as the scores, and are the same in whatever order.
    """

    cases: Sequence[Case]
    scores: Num[np.ndarray, "E K N"]
    valid: Bool[np.ndarray, "E K"]
    counts: Int[np.ndarray, "E"]
    first: Int[np.ndarray, "E K"]  # which response was shown first
    order: Int[np.ndarray, "E K"]  # equal where the responses of a case were shown in equal order
    tokens: Int[np.ndarray, "E K"]
    logits: Float[np.ndarray, "E K"] | None  # where every judgment has one
    values: Float[np.ndarray, "E K N"] | None  # where every valid judgment has them
    seconds: Float[np.ndarray, "E K"] | None  # where every judgment has them
    rewards: bool = False


@dataclasses.dataclass(frozen=True)
class Votes:
    """Sums after each k', and how many judgments are in them. means: they are weighted means of these already."""

    sums: Float[np.ndarray, "E K N"]
    valid: Int[np.ndarray, "E K"]
    means: bool = False


def cases_of(rows: Sequence[Sample]) -> list[Case]:
    """The cases that these rows judge; a row without a group is of its conversation's."""
    found = {row.id: row for row in rows}.values()
    return [Case(row.example, row.source, row.group or query_of(row.example.messages)) for row in found]


def table_of(cases: Sequence[Case], samples: Sequence[Sample]) -> Table:
    """The table of cases and their judgments. Raises ValueError for a case whose judgments are not all there."""
    of_id: dict[str, list[Sample]] = {}
    for sample in samples:
        of_id.setdefault(sample.id, []).append(sample)
    most = max(map(len, of_id.values()), default=0)
    lacking = [case.example.id for case in cases if len(of_id.get(case.example.id, ())) != most]
    if lacking or not most:
        raise ValueError(
            f"{len(lacking)} of {len(cases)} cases have not {most} judgments, the first {lacking[:1]}: run the command "
            "that wrote them again, it goes on there"
        )
    rows = [of_id[case.example.id] for case in cases]
    widest = max(len(case.example.responses) for case in cases)

    def padded(numbers: Sequence[float] | None) -> list[float]:
        return [*(numbers or ()), *[0] * (widest - len(numbers or ()))]

    flat = [sample for row in rows for sample in row]
    rewards = any(s.values and s.scores is None for s in flat)
    given = [[s.values if rewards else s.scores for s in row] for row in rows]
    valued = not rewards and any(s.values for s in flat) and all(s.values or s.scores is None for s in flat)
    return Table(
        cases=cases,
        scores=np.array([[padded(one) for one in row] for row in given], np.float32 if rewards else np.int32),
        valid=np.array([[one is not None for one in row] for row in given]),
        counts=np.array([len(case.example.responses) for case in cases], np.int32),
        first=np.array([[s.order[0] for s in row] for row in rows], np.int32),
        order=np.array([_alike([s.order for s in row]) for row in rows], np.int32),
        tokens=np.array([[s.tokens for s in row] for row in rows], np.int64),
        logits=np.array([[s.logit for s in row] for row in rows], np.float32)
        if all(s.logit is not None for s in flat)
        else None,
        values=np.array([[padded(s.values) for s in row] for row in rows], np.float32) if valued else None,
        seconds=np.array([[s.seconds for s in row] for row in rows])
        if all(s.seconds is not None for s in flat)
        else None,
        rewards=rewards,
    )


def _alike(orders: Sequence[tuple[int, ...]]) -> list[int]:
    """A number for each, equal for equal ones."""
    known: dict[tuple[int, ...], int] = {}
    return [known.setdefault(tuple(order), len(known)) for order in orders]


def votes(table: Table, k_meta: int | None = None, among: Bool[np.ndarray, "E K"] | None = None) -> dict[str, Votes]:
    """Every way to vote that the judgments allow: `voting`, `expected` (values), `guided` and `softmax` (logits).

    among: the judgments that there are, as if the others had never been drawn; k_meta counts in these.
    """
    if among is not None:
        table = dataclasses.replace(table, valid=table.valid & among)
    given = table.valid, table.counts
    found = {"voting": voting.vote_batch(table.scores, *given)}
    if table.values is not None:
        found["expected"] = voting.vote_batch(table.values, *given)
    if table.logits is not None:
        found["guided"] = voting.guided_batch(table.scores, *given, table.logits, k_meta, among)[0]
        found["softmax"] = voting.softmax_weighted_batch(table.scores, *given, table.logits)
    return {
        name: Votes(np.asarray(tally.sums), np.asarray(tally.valid), means=name == "softmax")
        for name, tally in found.items()
    }


def by_order(table: Table, k_meta: int | None = None) -> dict[str, list[Votes]]:
    """Every way to vote over the judgments alone that showed response i first, for i = 0 and 1; rewards know no order.

    Of each order a guided vote keeps half of what was drawn in it, or half of k_meta.
    """
    if table.rewards:
        return {name: [found, found] for name, found in votes(table).items()}
    parts = [votes(table, _half(k_meta), table.first == i) for i in (0, 1)]
    return {name: [part[name] for part in parts] for name in parts[0]}


def kept(table: Table, k_meta: int | None = None, by_order: bool = False) -> Bool[np.ndarray, "E K"] | None:
    """Which judgments the guided vote sums after all of them; None where they have no logits.

    by_order: that of a metric which reads the votes of each order, as in the function of this name.
    """
    if table.logits is None:
        return None

    def of(among: Bool[np.ndarray, "E K"], k_meta: int | None) -> Bool[np.ndarray, "E K"]:
        shown = table.scores, table.valid & among, table.counts, table.logits
        return np.asarray(voting.guided_batch(*shown, k_meta, among)[1])[:, -1]

    if not by_order:
        return of(np.ones_like(table.valid), k_meta)
    return of(table.first == 0, _half(k_meta)) | of(table.first == 1, _half(k_meta))


def _half(k_meta: int | None) -> int | None:
    return None if k_meta is None else -(-k_meta // 2)


def scored(table: Table, found: Votes, k: int, orders: Sequence[Votes] = ()) -> list[Scored]:
    """What each case has after k judgments; None where none of them could be read. orders: of `by_order`, for pairs."""

    def of(votes: Votes, e: int) -> tuple[float, ...] | None:
        n, valid = int(table.counts[e]), int(votes.valid[e, k - 1])
        if not valid:
            return None
        sums = votes.sums[e, k - 1, :n]
        return tuple((sums / valid if n == 1 and not votes.means else sums).tolist())

    result = []
    for e in range(len(table.cases)):
        both = table.counts[e] == 2 and (k > 1 or table.rewards)
        shown = tuple(of(votes, e) for votes in orders) if both else ()
        result.append(Scored(of(found, e), shown))
    return result


def least(table: Table, kind: Kind) -> int:
    """The judgments of a case that the metric needs: rewards are those of both orders at once."""
    return 1 if table.rewards else kind.least


def points(k: int) -> list[int]:
    """1, 2, 4, ... up to k, and k."""
    return sorted({*(2**i for i in range(k.bit_length()) if 2**i <= k), k})


def longer(cases: Sequence[Case]) -> list[Scored]:
    """What picking the longer response would give, in either order."""
    lengths = [tuple(float(len(response)) for response in case.example.responses) for case in cases]
    return [Scored(of_case, (of_case, of_case)) for of_case in lengths]


def lots(cases: Sequence[Case], rng: np.random.Generator) -> list[Scored]:
    """What drawing lots gives once, anew for either order."""

    def draw(n: int) -> tuple[float, ...]:
        return tuple(rng.normal(size=n).tolist())

    counts = [len(case.example.responses) for case in cases]
    return [Scored(draw(n), (draw(n), draw(n))) for n in counts]
