"""Judges that choose a response: their template, their box on the host and on the device, their votes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LLAMA, tiny_model

from grm_jax import Example, Message, prompts, reading, scores
from grm_jax.grm import Grm
from grm_jax.tokenizer import ByteTokenizer

TEMPLATE = prompts.load_template("choice")
TABLE = scores.token_table([bytes([i]) for i in range(256)])
EXAMPLE = Example("e", (Message("user", "which?"),), ("a", "b", "c"))


@pytest.mark.parametrize(
    ("text", "n", "found"),
    [
        ("Best response: \\boxed{2}", 3, (0, 1, 0)),
        ("\\boxed{1} no, \\boxed{ 3 }", 3, (0, 0, 1)),
        ("\\boxed{4}", 3, "4 is the number of no response, there are 3"),
        ("\\boxed{0}", 3, "0 is the number of no response, there are 3"),
        ("\\boxed{1, 2}", 3, "2 scores where one number was asked for"),
        ("\\boxed{b}", 3, "'b' is not an integer"),
        ("none", 3, "no \\boxed{...} in the text"),
    ],
)
def test_a_choice_is_one_for_the_chosen_response(text, n, found):
    assert scores.parse_choice(text, n) == ((found, None) if isinstance(found, tuple) else (None, found))


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.text("\\boxed{}0123456789, +-", max_size=12), min_size=1, max_size=6), st.integers(1, 4))
def test_the_device_reads_choices_as_the_host_does(parts, n):
    text = "".join(parts) + "\\boxed{" + parts[0][:2] + "}"
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : len(text)] = list(text.encode())
    wide = scores.LIMIT
    numbers = scores.read(TABLE, tokens, jnp.array([len(text)]), jnp.array([1]), 4, -wide, wide)
    found, valid = scores.chosen(*numbers, jnp.array([n]))
    expected, _ = scores.parse_choice(text, n)
    assert bool(valid[0]) == (expected is not None)
    assert tuple(np.asarray(found)[0, :n].tolist()) == (expected or (-1,) * n)
    assert (np.asarray(found)[0, n:] == -1).all()


def test_the_template_asks_for_a_number_and_shows_every_response():
    (turn,) = prompts.render(EXAMPLE, (2, 0, 1), TEMPLATE, prompts.Hint(best=0))
    assert turn.content.index("[The Begin of Response 1]\nc") < turn.content.index("[The Begin of Response 3]\nb")
    assert "with i from 1 to 3" in turn.content
    assert "Hint: response 2 is the best" in turn.content
    assert (TEMPLATE.kind, TEMPLATE.low, TEMPLATE.high) == ("choice", 0, 1)


def test_kinds_of_templates_are_not_mixed_up(tmp_path):
    with pytest.raises(ValueError, match="asks for scores or a choice, this one a text"):
        prompts.load_template("meta_rm")
    with pytest.raises(ValueError, match=r"asks for a text, this one choice: begin it with \{# text #\}"):
        prompts.load_template("choice", boxed=False)
    bare = tmp_path / "bare.txt"
    bare.write_text("{# choose #}\n=== user\n")
    with pytest.raises(ValueError, match="begins with"):
        prompts.load_template(str(bare))


@pytest.mark.parametrize("n", [pytest.param(3, marks=pytest.mark.slow), 11])
def test_forced_choices_are_numbers_of_responses_and_votes_count_them(n):
    grm = Grm(tiny_model(dataclasses.replace(LLAMA, max_positions=4096)), ByteTokenizer(), "tiny")
    examples = [
        Example(f"{i}", (Message("user", "?"),), tuple(f"answer {j}" for j in range(m)))
        for i, m in enumerate((n, 2, n))
    ]
    how = {"votes": 12, "max_new_tokens": 4, "temperature": 1.0, "template": "choice"}
    for verdict in grm.score(examples, **how):
        count = len(verdict.scores)
        assert verdict.valid == 12
        assert all(sorted(j.scores) == [0] * (count - 1) + [1] for j in verdict.judgments)
        assert sum(verdict.scores) == 12
        assert verdict.best == int(np.argmax(verdict.scores))
        for judgment in verdict.judgments:
            shown = int(judgment.text.rpartition("{")[2].rstrip("}"))
            assert judgment.text.endswith(f"Best response: \\boxed{{{shown}}}")
            assert judgment.order[shown - 1] == judgment.scores.index(1)
    (weighted,) = grm.score(examples[:1], **how, expected_scores=True)
    for judgment in weighted.judgments:
        assert [value > 0 for value in judgment.values] == [score == 1 for score in judgment.scores]
        assert max(judgment.values) < 1
    assert weighted.scores == pytest.approx(np.sum([j.values for j in weighted.judgments], axis=0))


def test_reading_follows_the_template():
    listwise = prompts.load_template("listwise")
    assert reading.parse(listwise, "\\boxed{2}", 2) == (None, "1 score for 2 responses")
    assert reading.parse(TEMPLATE, "\\boxed{2}", 2) == ((0, 1), None)
    assert reading.parse(prompts.load_template("meta_rm", boxed=False), "\\boxed{2}", 2) == (None, None)
    assert reading.numbers_of(listwise, 3) == (3, 1, 10)
    assert reading.numbers_of(TEMPLATE, 3) == (1, 1, 3)


def test_compiled_rewards_of_choices():
    numbers = jnp.array([[2, -1], [1, -1], [3, -1]])
    found, valid = jax.jit(scores.chosen)(numbers, jnp.array([True, False, True]), jnp.array([2, 2, 2]))
    assert found.tolist() == [[0, 1], [-1, -1], [-1, -1]]
    assert valid.tolist() == [True, False, False]
