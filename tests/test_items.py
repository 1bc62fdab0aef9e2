"""From labelled examples to items: one best response each, drawn by (seed, id) alone, held out by conversation."""

import dataclasses
import gzip
import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grm_jax.data import items as labelled
from grm_jax.data.items import hint_of, items_of, limited, load, make_items, scale, split, template_of
from grm_jax.data.jsonl import DataError
from grm_jax.datatypes import Example, Message
from grm_jax.prompts import Hint
from grm_jax.recipes import Items


def rated(*scores, id="a", texts=None, query="q", **fields) -> Example:
    texts = texts or [f"answer {i}" for i in range(len(scores))]
    return Example(id, (Message("user", query),), tuple(texts), tuple(map(float, scores)), **fields)


LISTS = st.lists(
    st.tuples(st.sampled_from(["", " ", "x", "x ", "y", "z", "u", "v", "w"]), st.integers(0, 3)), min_size=1, max_size=9
)
CLASH = "text labelled both best and worse"
CHOICES = st.lists(st.integers(2, 5), min_size=1, max_size=3).map(tuple)


@given(LISTS, CHOICES, st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None, max_examples=400)
def test_every_item_is_a_part_of_its_list_with_one_best(rows, choices, per_example, seed):
    texts, scores = zip(*rows, strict=True)
    example = rated(*scores, texts=texts, reference="r", source="s")
    items, _ = items_of(example, Items(n_choices=choices, per_example=per_example), seed)
    pairs = list(zip(example.responses, example.scores, strict=True))
    top = max((score for text, score in pairs if text.strip()), default=None)
    for item in items:
        n = len(item.responses)
        assert max(item.scores) == top
        assert n == 1 == len(rows) or (item.scores.count(top) == 1 and 2 <= n <= max(choices))
        assert len({text.strip() for text in item.responses} - {""}) == n
        places = [pairs.index(pair) for pair in zip(item.responses, item.scores, strict=True)]
        assert places == sorted(places)  # their own order
        right = {text.strip() for text, score in pairs if score == top}
        wrong = {text.strip() for text, score in pairs if score < top}
        assert not {text.strip() for text in item.responses} & right & wrong
        assert (item.messages, item.reference, item.source) == (example.messages, "r", "s")
    assert len(items) <= per_example
    assert len({item.id for item in items}) == len({(item.responses, item.scores) for item in items}) == len(items)


def test_lists_that_are_items_stay_as_they_are():
    examples = [rated(0), rated(3, 9, id="b", strength=2.0), rated(5, 4, 9, 1, id="c")]
    assert make_items(examples, Items(n_choices=(2, 4), per_example=3), 0) == (examples, Counter())


def test_right_and_wrong_answers_of_a_long_list_are_mixed():
    example = rated(1, 0, 1, 0, 0, 1, 0, strength=2.0)
    items, dropped = make_items([example], Items(n_choices=(3,), per_example=5), 0)
    assert [item.id for item in items] == [f"a#{i}" for i in range(5)]
    assert all(sorted(item.scores) == [0, 0, 1] and item.strength is None for item in items)
    assert not dropped
    (one,), _ = make_items([example], Items(n_choices=(3,)), 0)
    assert (one.id, one.responses) == ("a", items[0].responses)
    # One best and two others make two pairs and no third.
    assert [i.id for i in make_items([rated(0, 5, 0)], Items(per_example=9), 0)[0]] == ["a#0", "a#1"]


def test_all_are_drawn_equally():
    winners, others, sizes = Counter(), Counter(), Counter()
    for i in range(600):
        (item,), _ = items_of(rated(7, 2, 7, 1, 3, id=str(i)), Items(n_choices=(2, 3)), 0)
        sizes[len(item.responses)] += 1
        winners.update(text for text, score in zip(item.responses, item.scores, strict=True) if score == 7)
        others.update(text for text, score in zip(item.responses, item.scores, strict=True) if score < 7)
    # 600 items: n is 2 or 3, one of two winners, and 1.5 of the three others on average.
    for counts, share in ((sizes, 300), (winners, 300), (others, 300)):
        assert all(abs(count - share) < 60 for count in counts.values()), counts
    assert (len(sizes), len(winners), len(others)) == (2, 2, 3)


@pytest.mark.parametrize(
    ("example", "kept", "dropped"),
    [
        (rated(1, 1, 1), 0, {"no single best": 1}),
        (rated(1, 0, texts=(" ", "\n")), 0, {"blank response": 2, "example without a usable response": 1}),
        (rated(1, 0, texts=("", "b")), 0, {"blank response": 1, "list with one usable response": 1}),
        (rated(1, texts=("",)), 0, {"blank response": 1, "example without a usable response": 1}),
        (rated(1, 0, 0, texts=("", "b", "c")), 0, {"blank response": 1, "no single best": 1}),
        (rated(1, 0, texts=("a", "a ")), 0, {CLASH: 2, "example without a usable response": 1}),
        (rated(2, 0, 0, 1, texts=("a", "a", "b", "c")), 0, {CLASH: 2, "no single best": 1}),
        (rated(2, 1, 0, texts=("a", "b", "b")), 1, {"repeated response": 1}),
        (rated(2, 2, 0, texts=("a", "a", "b")), 1, {"repeated response": 1}),
    ],
)  # fmt: skip
def test_what_is_dropped_is_counted(example, kept, dropped):
    items, found = make_items([example], Items(), 0)
    assert (len(items), dict(found)) == (kept, dropped)


def test_items_need_labels_and_ids_of_their_own():
    with pytest.raises(ValueError, match=r"'b' has no scores.*give every row"):
        make_items([rated(1), dataclasses.replace(rated(1, id="b"), scores=None)], Items(), 0)
    with pytest.raises(ValueError, match=r"'a#1' occurs 2 times.*rename"):
        make_items([rated(0, 1, 0, 0), rated(1, id="a#1")], Items(per_example=2), 0)


def many(count=40) -> list[Example]:
    return [rated(*np.random.default_rng(i).integers(0, 4, 6), id=f"e{i}", query=f"q{i % 25}") for i in range(count)]


def test_an_item_is_a_function_of_seed_and_id():
    config = Items(n_choices=(2, 3), per_example=2)
    whole, _ = make_items(many(), config, 7)
    order = many()
    random.Random(0).shuffle(order)
    by_id = {item.id: item for item in whole}
    assert {item.id: item for item in make_items(order, config, 7)[0]} == by_id
    part, _ = make_items(many()[10:20], config, 7)
    assert part == [by_id[item.id] for item in part]
    assert make_items(many(), config, 8)[0] != whole


def test_a_limit_keeps_the_same_items_whatever_the_order():
    items, _ = make_items(many(), Items(), 3)
    few = limited(items, 10, 3)
    assert len(few) == 10
    assert few == [item for item in items if item in few]
    assert {i.id for i in limited(items[::-1], 10, 3)} == {i.id for i in few} <= {i.id for i in limited(items, 20, 3)}
    assert few != limited(items, 10, 4)
    assert limited(items, None, 3) == limited(items, 999, 3) == items
    assert make_items(many(), Items(limit=10), 3)[0] == few


def test_conversations_are_held_out_whole():
    examples = many()
    train, out = split(examples, 9, 0)
    assert 9 <= len(out) <= 10  # 15 of 25 conversations have two examples
    assert not {e.messages for e in train} & {e.messages for e in out}
    assert sorted([*train, *out], key=examples.index) == examples
    shuffled = random.Random(1).sample(examples, len(examples))
    assert {e.id for e in split(shuffled, 9, 0)[1]} == {e.id for e in out}
    renamed = [dataclasses.replace(e, id=f"new {e.id}", scores=None) for e in examples]
    assert [e.id for e in split(renamed, 9, 0)[1]] == [f"new {e.id}" for e in out]
    assert split(examples, 9, 1)[1] != out
    assert split(examples, 0, 0) == (examples, [])
    # Without another conversation in between, the ranks of the others stay.
    fewer = [e for e in examples if e.messages != train[0].messages]
    assert {e.id for e in split(fewer, 9, 0)[1]} == {e.id for e in out}


def test_a_source_has_the_scale_that_all_its_labels_are_on():
    rows = [
        ("b", 0),
        ("b", 1),
        ("t", 1),
        ("t", 10),
        ("half", 0.5),
        ("half", 1),
        ("zero", 0),
        ("zero", 7),
        ("e", 11),
        (None, 2),
    ]
    items = [rated(label, id=str(i), source=source) for i, (source, label) in enumerate(rows)]
    scales = scale([*items, rated(0, 99, source="list")])
    assert scales == {"b": (0, 1), "t": (1, 10), None: (1, 10)}
    assert template_of(items[0], scales, "mine.txt") == "single_binary"
    assert template_of(items[2], scales, None) == "single"
    assert template_of(rated(0, 1), scales, None) == "listwise"
    assert template_of(rated(0, 1), scales, "mine.txt") == "mine.txt"
    with pytest.raises(ValueError, match=r"label \(0.5,\).*'half' no scale.*0 or 1, or whole"):
        template_of(items[4], scales, None)


def test_hints_tell_the_best_or_the_score():
    assert hint_of(rated(1, 5, 2, strength=0.5)) == Hint(best=1, strength=0.5)
    assert hint_of(rated(5, 1)) == Hint(best=0)
    assert hint_of(rated(7)) == Hint(score=7.0)


def write(path, *rows) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def test_files_become_items(tmp_path):
    pair = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    listed = {"id": "l", "prompt": "s", "responses": list("abc"), "scores": [1, 2, 1]}
    one = write(tmp_path / "one.jsonl.gz", pair, pair | {"id": "x", "prompt": "r"}, listed)
    graded = [{"id": f"g{i}", "prompt": f"p{i}", "responses": ["a"], "scores": [s]} for i, s in enumerate((0, 4, 2))]
    two = write(tmp_path / "two.jsonl", pair | {"source": "web"}, *graded)
    found = load(Items((one, two), per_example=2), 0)
    assert [(i.id, i.source) for i in found.train] == [
        ("one/row-1", "one"), ("x", "one"), ("l#0", "one"), ("l#1", "one"), ("two/row-1", "web"),
    ]  # fmt: skip
    assert found.held_out == []
    assert list(found.dropped.values()) == [3]  # the labels 0, 4, 2 are on no scale
    assert "'two'" in next(iter(found.dropped))

    # Of a list that is held out one item is measured.
    lists = [item.id for seed in range(9) for item in load(Items((one, two), per_example=2, held_out=2), seed).held_out]
    assert "l#0" in lists
    assert "l#1" not in lists
    held = load(Items((one, two), per_example=2, held_out=2, limit=2), 0)
    assert len(held.train) == 2
    assert not {i.messages for i in held.train} & {i.messages for i in held.held_out}
    # Both rows of conversation q go together.
    assert len(held.held_out) in (2, 3)
    turned = load(Items((two, one), per_example=2, held_out=2, limit=2), 0)
    assert {item.id for item in turned.train} == {item.id for item in held.train}


def test_a_large_file_does_not_crowd_out_others(tmp_path):
    rows = [{"id": f"r{i}", "prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(9)]
    large, small = write(tmp_path / "large.jsonl", *rows), write(tmp_path / "small.jsonl", *rows[:2])
    found = load(Items((large, small), per_file=3, held_out=1), 0)
    ids = [item.id for item in (*found.train, *found.held_out)]
    assert sum(item.source == "large" for item in (*found.train, *found.held_out)) == 3
    assert len(ids) == 5
    # What is left of a large file is no likelier to be within the limit.
    wide = [
        write(
            tmp_path / f"{name}.jsonl",
            *({"id": f"{name}{i}", "prompt": f"{name}{i}", "chosen": "yes", "rejected": "no"} for i in range(count)),
        )
        for name, count in (("a", 2000), ("b", 100))
    ]
    drawn = load(Items(tuple(wide), per_file=100, limit=100), 0).train
    assert 35 < sum(item.source == "a" for item in drawn) < 65
    seeds = {tuple(i.id for i in load(Items((large,), per_file=3), seed).train) for seed in range(9)}
    assert len(seeds) > 1
    with pytest.raises(ValueError, match="per_file = 0"):
        Items((large,), per_file=0)


def test_files_of_one_name_in_two_folders(tmp_path):
    row = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    files = tuple(write(tmp_path / folder / "train.jsonl", row) for folder in ("a", "b"))
    assert [i.id for i in load(Items(files), 0).train] == [f"{file}/row-1" for file in files]
    assert [i.id for i in load(Items(files[:1]), 0).train] == ["row-1"]


def test_bad_files_are_errors(tmp_path):
    bad = write(tmp_path / "bad.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": 3})
    with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
        load(Items((bad,)), 0)
    good = write(tmp_path / "good.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(ValueError, match="2 times: name each file once"):
        load(Items((good, good)), 0)
    with pytest.raises(ValueError, match=r"held_out = 1 of 1 usable .* hold out fewer"):
        load(Items((good,), held_out=1), 0)
    unlabelled = write(tmp_path / "no.jsonl", {"id": "u", "prompt": "q", "responses": ["a"]})
    with pytest.raises(ValueError, match="'u' has no scores"):
        load(Items((unlabelled,)), 0)


def test_scales_are_those_of_all_items(tmp_path):
    rows = [{"id": str(i), "prompt": str(i), "responses": ["a"], "scores": [1 + 9 * (i == 0)]} for i in range(30)]
    config = Items((write(tmp_path / "s.jsonl", *rows),), held_out=15, limit=3)
    for seed in range(4):  # the one label of 10 is on either side
        found = load(config, seed)
        assert found.scales == {"s": (1, 10)}
        assert any(labelled.scale(part) == {"s": (0, 1)} for part in (found.train, found.held_out))
