"""Labelled examples become items: one response with a label, or several of which EXACTLY ONE is the best (Eq. 10).

1. Blank responses and repeated texts are taken out of an example; a text that is labelled both best and worse goes
   altogether. A list of which one response is left is dropped: its score says nothing without the others.
2. A list that has one best response and is short enough is an item as it is. Of others an item takes one of the best
   responses and some with strictly lower scores, drawn without replacement. Responses keep their own order.
3. A single response's label is on its source's scale, 0 or 1, or 1 to 10, which chooses its template.
4. Conversations are held out, and items limited, by the seed.

Each draw is a function of (seed, id) or (seed, conversation), whatever else the files hold. Eq. 10: docs/spct.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np

from grm_jax import prompts
from grm_jax.data.jsonl import read_examples
from grm_jax.datatypes import Example, Message, stable_hash
from grm_jax.recipes import Items

BINARY, TEN = (0, 1), (1, 10)  # the scales of the packaged templates for one response
_TEMPLATES = {BINARY: "single_binary", TEN: "single"}
_TRIES = 16  # draws for each item wanted of a list, of which equal ones count once

Scales = Mapping[str | None, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class ItemSet:
    """What the files hold, ready to train on.

    `dropped` counts by reason what is in neither list. `scales` are those of single responses by source, over all items:
    a part of them may not show the scale.
    """

    train: list[Example]
    held_out: list[Example]
    dropped: Mapping[str, int]
    scales: Scales = dataclasses.field(default_factory=dict)


def load(settings: Items, seed: int) -> ItemSet:
    """The items of all files; `held_out` has one item of each example held out.

    Ids that several files have get the file's name in front; a row without a source gets it as its source. Raises
    DataError as `read_examples` does, and ValueError: a file given twice, rows without scores, nothing left to train on.
    """
    examples = _read(settings.files, settings.per_file, seed)
    made: dict[str, list[Example]] = {}
    dropped: Counter[str] = Counter()
    for example in examples:
        made[example.id], reasons = items_of(example, settings, seed)
        dropped += reasons
    _check_unique([item for items in made.values() for item in items])
    scales = scale([item for items in made.values() for item in items])
    for example in examples:
        if made[example.id] and not _fits_scale(made[example.id][0], scales):
            made[example.id] = []
            dropped[
                f"single response of {example.source!r}, whose labels are neither all 0 or 1 nor all whole 1..10"
            ] += 1
    usable = [example for example in examples if made[example.id]]
    train, held_out = split(usable, settings.held_out, seed)
    items = [item for example in train for item in made[example.id]]
    if not items and held_out:
        raise ValueError(
            f"held_out = {settings.held_out} of {len(usable)} usable examples leaves none to train on: hold out fewer"
        )
    return ItemSet(limited(items, settings.limit, seed), [made[e.id][0] for e in held_out], dropped, scales)


def make_items(examples: Sequence[Example], settings: Items, seed: int) -> tuple[list[Example], Counter[str]]:
    """The items of labelled examples, at most `settings.limit`, in the examples' order; and what was dropped, by reason.

    Raises ValueError for an example without scores, or an item's id that another item has.
    """
    items: list[Example] = []
    dropped: Counter[str] = Counter()
    for example in examples:
        made, reasons = items_of(example, settings, seed)
        items += made
        dropped += reasons
    _check_unique(items)
    return limited(items, settings.limit, seed), dropped


def items_of(example: Example, settings: Items, seed: int) -> tuple[list[Example], Counter[str]]:
    """The items of one example, none where it has no single best response; and what was dropped of it, by reason."""
    if example.scores is None:
        raise ValueError(
            f"example {example.id!r} has no scores: training needs labels, give every row 'scores', or 'chosen' and "
            "'rejected'"
        )
    top = max((s for s, text in zip(example.scores, example.responses, strict=True) if text.strip()), default=0.0)
    kept, dropped = _clean(example, top)
    if not kept:
        return [], dropped + Counter({"example without a usable response": 1})
    if len(example.responses) > 1 and len(kept) == 1:
        return [], dropped + Counter({"list with one usable response": 1})
    best = [i for i in kept if example.scores[i] == top]
    rest = [i for i in kept if example.scores[i] < top]
    if len(kept) > 1 and not (best and rest):
        return [], dropped + Counter({"no single best": 1})
    if len(kept) == 1 or (len(best) == 1 and len(kept) <= max(settings.n_choices)):
        return [_part(example, kept, example.id)], dropped
    draws = _draws(best, rest, settings, np.random.default_rng([seed, stable_hash(example.id)]))
    ids = [example.id] if settings.per_example == 1 else [f"{example.id}#{i}" for i in range(len(draws))]
    # How much better the best is was said of the whole list.
    whole = dataclasses.replace(example, strength=None)
    return [_part(whole, draw, id) for draw, id in zip(draws, ids, strict=True)], dropped


def _clean(example: Example, top: float) -> tuple[list[int], Counter[str]]:
    """The indices of responses that an item may have, and what was dropped."""
    dropped: Counter[str] = Counter()
    of_text: dict[str, list[int]] = {}
    for i, response in enumerate(example.responses):
        if response.strip():
            of_text.setdefault(response.strip(), []).append(i)
        else:
            dropped["blank response"] += 1
    kept = []
    for same in of_text.values():
        if len({example.scores[i] == top for i in same}) > 1:
            dropped["text labelled both best and worse"] += len(same)
            continue
        kept.append(same[0])
        if len(same) > 1:
            dropped["repeated response"] += len(same) - 1
    return kept, dropped


def _draws(best: list[int], rest: list[int], settings: Items, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Different choices of one of the best and some of the rest: `per_example` of them, or as many as were found."""
    found: dict[tuple[int, ...], None] = {}
    for _ in range(_TRIES * settings.per_example):
        n = min(int(rng.choice(settings.n_choices)), 1 + len(rest))
        chosen = [int(rng.choice(best)), *rng.choice(rest, n - 1, replace=False).tolist()]
        found.setdefault(tuple(sorted(chosen)))
        if len(found) == settings.per_example:
            break
    return list(found)


def _part(example: Example, chosen: Sequence[int], id: str) -> Example:
    responses, scores = ([of[i] for i in chosen] for of in (example.responses, example.scores))
    return dataclasses.replace(example, id=id, responses=tuple(responses), scores=tuple(scores))


def split(examples: Sequence[Example], held_out: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(Those to train on, those held out), each in the order given; a conversation is never on both sides.

    Conversations are ranked by the seed, and whole ones held out until there are at least `held_out` examples.
    """
    by_talk: dict[tuple[Message, ...], list[Example]] = {}
    for example in examples:
        by_talk.setdefault(example.messages, []).append(example)
    out: set[tuple[Message, ...]] = set()
    count = 0
    for talk in sorted(by_talk, key=lambda talk: (stable_hash(f"{seed} {talk}"), str(talk))):
        if count >= held_out:
            break
        out.add(talk)
        count += len(by_talk[talk])
    return [e for e in examples if e.messages not in out], [e for e in examples if e.messages in out]


def limited(items: Sequence[Example], limit: int | None, seed: int, what: str = "") -> list[Example]:
    """At most `limit` items, those that the seed ranks first, in the order given; `what` makes another ranking."""
    if limit is None or len(items) <= limit:
        return list(items)
    ranked = sorted((stable_hash(f"{seed} {what}{item.id}"), item.id) for item in items)
    kept = {id for _, id in ranked[:limit]}
    return [item for item in items if item.id in kept]


def scale(items: Sequence[Example]) -> dict[str | None, tuple[int, int]]:
    """The scale of the single responses of each source: (0, 1) or (1, 10); a source of other labels has none."""
    labels: dict[str | None, set[float]] = {}
    for item in items:
        if len(item.responses) == 1:
            labels.setdefault(item.source, set()).update(item.scores)
    scales = {BINARY: {0, 1}, TEN: set(range(1, 11))}
    fitting = {source: [scale for scale, all in scales.items() if found <= all] for source, found in labels.items()}
    return {source: fits[0] for source, fits in fitting.items() if fits}


def _fits_scale(item: Example, scales: Scales) -> bool:
    return len(item.responses) > 1 or item.source in scales


def template_of(item: Example, scales: Scales, default: str | None) -> str:
    """The name or file of the template that shows the item: `default` or listwise, and for one response its scale's.

    Raises ValueError for a single response whose source has no scale.
    """
    if len(item.responses) > 1:
        return default or "listwise"
    if item.source not in scales:
        raise ValueError(
            f"item {item.id!r} has the label {item.scores} and its source {item.source!r} no scale: label single responses "
            "0 or 1, or whole numbers from 1 to 10, all of a source alike"
        )
    return _TEMPLATES[scales[item.source]]


def hint_of(item: Example) -> prompts.Hint:
    """What hinted sampling tells of the item: its best response and how much better it is, or its one score."""
    if len(item.responses) == 1:
        return prompts.Hint(score=item.scores[0])
    return prompts.Hint(best=item.scores.index(max(item.scores)), strength=item.strength)


def _stem(file: str) -> str:
    """A data file's name without folder and endings: train of gs://bucket/train.jsonl.gz."""
    return functools.reduce(str.removesuffix, (".gz", ".jsonl", ".json"), PurePosixPath(file).name)


def _read(files: Sequence[str], per_file: int | None, seed: int) -> list[Example]:
    """The examples of all files, at most `per_file` of each, with ids of their own and a source."""
    for file in files:
        if files.count(file) > 1:
            raise ValueError(f"items.files names {file} {files.count(file)} times: name each file once")
    names = Counter(map(_stem, files))
    read = [(file, limited(_examples(file), per_file, seed, "file ")) for file in files]
    occurring = Counter(example.id for _, examples in read for example in examples)
    found = []
    for file, examples in read:
        prefix = _stem(file) if names[_stem(file)] == 1 else file  # train.jsonl of two folders
        for example in examples:
            id = example.id if occurring[example.id] == 1 else f"{prefix}/{example.id}"
            found.append(dataclasses.replace(example, id=id, source=example.source or _stem(file)))
    _check_unique(found)
    return found


def _examples(file: str) -> list[Example]:
    """The examples of a file of rows, or of a folder that the command `prepare` has written, by subset."""
    if file.endswith((".jsonl", ".json", ".gz")):
        return read_examples(file, skip_bad=False)[0]
    from grm_jax.data.benchmarks import prepared  # tensorflow-datasets takes seconds to import

    if not prepared.is_prepared(file):
        return read_examples(file, skip_bad=False)[0]
    return [dataclasses.replace(case.example, source=case.subset) for case in prepared.read(file).cases]


def _check_unique(examples: Sequence[Example]) -> None:
    for id, times in Counter(example.id for example in examples).items():
        if times > 1:
            raise ValueError(
                f"id {id!r} occurs {times} times: ids name an item's samples, rename the rows that have it"
            )
