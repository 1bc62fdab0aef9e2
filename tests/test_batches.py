"""Prompt batches: a pure function of the step, every item once an epoch, prompts as the judge renders them."""

import dataclasses
import functools
import json
from collections import Counter

import jax
import numpy as np
import pytest

from grm_jax import prompts
from grm_jax.buckets import power_of_two
from grm_jax.data import batches
from grm_jax.data.batches import LEAST_TOKENS, PromptBatches, head_of, stream
from grm_jax.datatypes import Example, Message, stable_hash
from grm_jax.judging import prompt_ids
from grm_jax.prompts import load_template
from grm_jax.tokenizer import ByteTokenizer, Tokenizer
from grm_jax.vocab import ByteVocab

TOKENIZER = ByteTokenizer()
LISTWISE, SINGLE = load_template("listwise"), load_template("single_binary")
SHORT = """{# name: short; scores: 1..10 #}
=== user
Judge it.
#### Conversation Context ####
{{ conversation }}
#### Responses to be Scored ####
{% for response in responses %}[The Begin of Response {{ loop.index }}]
{{ response }}
[The End of Response {{ loop.index }}]
{% endfor %}
Scores: \\boxed{
"""


def item_of(i: int, n: int = 0, long: int = 40) -> Example:
    rng = np.random.default_rng(i)
    n = n or int(rng.integers(2, 5))
    talk = (Message("system", "Be brief."), Message("user", f"q{i}")) if i % 7 == 0 else (Message("user", f"q{i}?"),)
    responses = tuple(f"{i}:{j} " + "x" * int(rng.integers(0, long)) for j in range(n))
    best = int(rng.integers(n))
    return Example(f"i{i}", talk, responses, tuple(9.0 if j == best else float(j) for j in range(n)))


def items_of(count: int, singles: int = 0, **fields) -> list[Example]:
    many = [item_of(i, **fields) for i in range(count)]
    return many + [dataclasses.replace(item_of(i, 1), id=f"s{i}", scores=(float(i % 2),)) for i in range(singles)]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    path = tmp_path_factory.mktemp("templates") / "short.txt"
    path.write_text(SHORT)
    return load_template(str(path))


def by_n(many: prompts.Template):
    return lambda item: many if len(item.responses) > 1 else SINGLE


def source_of(items, many, size=4, steps=100, limit=4096, seed=0, **process) -> PromptBatches:
    return PromptBatches(items, by_n(many), TOKENIZER, seed, steps, size, limit, **process)


def same(a, b) -> bool:
    return a[1] == b[1] and all(
        np.array_equal(getattr(a[0], f.name), getattr(b[0], f.name)) for f in dataclasses.fields(a[0])
    )


def test_prompts_and_labels_are_those_of_the_order_shown(short):
    items = items_of(9, 5)
    for many, head in ((LISTWISE, True), (short, False)):
        source = source_of(items, many)
        for step in range(source.epoch_steps):
            batch, shown = source[step]
            assert batch.head.size % 64 == 0
            assert (batch.head.size > 0) == (head or shown.template == "single_binary")
            for p, (item, order) in enumerate(zip(shown.items, shown.orders, strict=True)):
                template = by_n(many)(item)
                rendered = prompt_ids(TOKENIZER, prompts.render(item, order, template, controls=TOKENIZER.specials))
                assert (*batch.head, *batch.tokens[p, : batch.lengths[p]]) == rendered
                assert not batch.tokens[p, batch.lengths[p] :].any()
                n = len(item.responses)
                assert batch.counts[p] == n
                assert batch.labels[p].tolist() == [item.scores[i] for i in order] + [0.0] * (4 - n)
                assert (batch.low[p], batch.high[p]) == ((1, 10) if n > 1 else (0, 1))
                assert shown.template == template.name
            width = batch.tokens.shape[1]
            longest = batch.lengths.max()
            assert width == max(32, 1 << int(np.ceil(np.log2(longest))))
            assert shown.cut == [0] * 4


def test_each_epoch_has_every_item_once_and_fills_up_from_itself(short):
    source = source_of(items_of(150, 6), short)
    assert source.epoch_steps == 38 + 2
    for epoch in range(2):
        steps = range(epoch * 40, epoch * 40 + 40)
        seen = Counter(item.id for step in steps for item in source[step][1].items)
        assert set(seen) == {item.id for item in source.items}
        again = [id for id, count in seen.items() if count == 2]
        assert sum(seen.values()) == 160
        assert (len(again), sum(id.startswith("s") for id in again)) == (4, 2)


def test_epochs_mix_items_and_templates_anew(short):
    source = source_of(items_of(24, 24), short, steps=48)
    epochs = [[source[step][1] for step in range(start, start + 12)] for start in (0, 12, 24, 36)]
    together = [{frozenset(item.id for item in shown.items) for shown in epoch} for epoch in epochs]
    assert all(len(a & b) < 6 for i, a in enumerate(together) for b in together[:i])
    names = [[shown.template for shown in epoch] for epoch in epochs]
    assert all(sorted(of) != of != sorted(of, reverse=True) for of in names)
    assert len({tuple(of) for of in names}) == 4


def test_a_group_smaller_than_a_batch_repeats_under_other_keys_and_orders(short):
    source = source_of([item_of(1, 4)], short, size=64)
    batch, shown = source[0]
    assert source.epoch_steps == 1
    assert len(set(batch.items.tolist())) == 64
    assert stable_hash("i1") in batch.items
    assert len(set(shown.orders)) == len({tuple(row) for row in batch.tokens.tolist()}) > 10
    assert len(set(source_of(items_of(64), short, size=64)[0][0].items.tolist())) == 64


def test_batches_hold_items_of_like_length(short):
    source = source_of(items_of(256, long=1000), short, size=4)
    spent, least = 0, 0
    for step in range(source.epoch_steps):
        batch, _ = source[step]
        spent += batch.tokens.size
        least += sum(power_of_two(int(length), LEAST_TOKENS) for length in batch.lengths)
    assert spent < 1.15 * least  # every row at the width of its own power of two; unsorted: 1.34


def test_orders_are_uniform_and_change_with_the_epoch(short):
    source = source_of(items_of(60, n=2), short, steps=1000)
    orders = {}
    for step in range(4 * source.epoch_steps):
        _, shown = source[step]
        for item, order in zip(shown.items, shown.orders, strict=True):
            orders.setdefault(item.id, []).append(order)
    first = [order == (0, 1) for of in orders.values() for order in of]
    assert len(first) == 240
    assert 90 < sum(first) < 150
    assert sum(len(set(of)) == 1 for of in orders.values()) < 20  # 60 / 8 expected


def test_a_batch_is_a_function_of_seed_and_step(short):
    items = items_of(30, 5)
    source, other = source_of(items, short), source_of(items, short)
    forward = {step: source[step] for step in (0, 3, 25, 57)}
    assert all(same(other[step], forward[step]) for step in (57, 3, 25, 0))
    assert not same(source_of(items, short, seed=1)[3], forward[3])
    assert [e.id for e in source[0][1].items] != [e.id for e in source[source.epoch_steps][1].items]
    with pytest.raises(IndexError, match="step 100 of a run of 100"):
        source[100]


def test_long_prompts_are_cut_as_the_judge_cuts_them(short):
    items = items_of(4, long=3000)
    batch, shown = source_of(items, short, limit=1200)[0]
    assert max(shown.cut) > 0
    assert (len(batch.head) + batch.lengths).max() <= 1200
    for p, (item, order, cut) in enumerate(zip(shown.items, shown.orders, shown.cut, strict=True)):
        assert item in items  # uncut
        count = functools.partial(lambda messages: len(prompt_ids(TOKENIZER, messages)))
        fitted, removed = prompts.fit(item, short, 1200, count, TOKENIZER.specials)
        rendered = prompt_ids(TOKENIZER, prompts.render(fitted, order, short, controls=TOKENIZER.specials))
        assert (*batch.head, *batch.tokens[p, : batch.lengths[p]]) == rendered
        assert removed == cut
    with pytest.raises(ValueError, match=r"prompt of 'i\d' has .* the limit is 200"):
        source_of(items, short, limit=200)[0]


def test_a_stream_goes_on_at_its_state(short):
    source = source_of(items_of(20, 5), short, steps=17)
    run = stream(source)
    found = [next(run) for _ in range(6)]
    state = json.loads(json.dumps(run.get_state()))
    rest = list(run)
    assert len(rest) == 11
    assert all(same(element, source[step]) for step, element in enumerate([*found, *rest]))
    for begun in (stream(source), stream(source, 3)):
        begun.set_state(state)
        assert all(same(a, b) for a, b in zip(begun, rest, strict=True))
    assert same(next(stream(source, 6)), rest[0])
    assert list(stream(source, 17)) == []


def test_a_batch_is_a_tree_of_its_arrays(short):
    batch, _ = source_of(items_of(4), short)[0]
    assert len(jax.tree.leaves(batch)) == 9
    assert {leaf.dtype.name for leaf in jax.tree.leaves(batch)} == {"int32", "float32", "bool"}
    assert jax.jit(lambda b: b)(batch).tokens.shape == batch.tokens.shape


def test_heads_are_no_longer_than_what_the_template_fixes(short):
    pair = items_of(3)
    head = TOKENIZER.decode(head_of(TOKENIZER, LISTWISE, pair))
    fixed = LISTWISE.turns[0].content.partition("{{ conversation }}")[0]
    assert f"User: {fixed}".startswith(head)
    assert len(f"User: {fixed}".encode()) - len(head.encode()) < 8 + 64
    assert head_of(TOKENIZER, short, pair) == ()
    # What a template says of the number of responses before they are shown parts only prompts of different numbers.
    counted = dataclasses.replace(LISTWISE, turns=(Message("user", "{{ n }} here. " + LISTWISE.turns[0].content),))
    assert head_of(TOKENIZER, counted, [item_of(1, 2), item_of(2, 3)]) == ()
    assert len(head_of(TOKENIZER, counted, [item_of(1, 2)])) > 1000
    rule = "{% if messages[0].role == 'system' %}Mind the system's rules. {% endif %}"
    ruled = dataclasses.replace(LISTWISE, turns=(Message("user", rule + LISTWISE.turns[0].content),))
    assert head_of(TOKENIZER, ruled, pair) == ()


def test_a_prompt_without_the_head_is_an_error():
    class Changing(Tokenizer):
        """Its chat template prints the date, and the day ends."""

        day = "1"

        def chat(self, messages, add_generation_prompt=True):
            return f"Day {self.day}. " + super().chat(messages, add_generation_prompt)

    tokenizer = Changing(ByteVocab(), eos_ids=(257,))
    source = PromptBatches(items_of(4), lambda _: LISTWISE, tokenizer, 0, 9, 4, 4096)
    source[0]
    tokenizer.day = "2"
    with pytest.raises(ValueError, match=r"item 'i\d' does not begin with the \d+ tokens that template 'listwise'"):
        source[1]


def test_items_that_cannot_be_shown_are_errors(short):
    with pytest.raises(ValueError, match="no items"):
        source_of([], short)
    with pytest.raises(ValueError, match="'i1' has no scores"):
        source_of([dataclasses.replace(item_of(1, 2), scores=None)], short)
    with pytest.raises(ValueError, match="does not show 'reference'"):
        source_of([dataclasses.replace(item_of(1, 2), reference="r")], short)
    turns = tuple(Message("user" if i % 2 == 0 else "assistant", "x" * 200) for i in range(81))
    long = dataclasses.replace(item_of(1, 2), id="long", messages=turns)
    with pytest.raises(
        ValueError, match=r"(?s)1 examples do not fit, take them out, or leave.*'long' has \d+ tokens with every"
    ):
        source_of([*items_of(40), long], short)


def test_nothing_is_tokenised_before_its_batch_is_due(short, monkeypatch):
    source = source_of(items_of(20), short)
    asked = []  # from here on: when it was made, it looked at the longest
    render = prompts.render
    monkeypatch.setattr(
        batches.prompts, "render", lambda e, *rest, **more: asked.append(e.id) or render(e, *rest, **more)
    )
    _, shown = source[2]
    assert set(asked) == {item.id for item in shown.items}
