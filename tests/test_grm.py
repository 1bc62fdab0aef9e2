"""The judge: orders, votes and verdicts, with a tiny random model and with sampled texts that are scripted."""

import dataclasses
import itertools
import re

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LLAMA, tiny_model

import grm_jax
from grm_jax import Example, Judgment, Message, Usage
from grm_jax.config import JudgeSettings
from grm_jax.dealing import by_length, orders
from grm_jax.grm import Grm
from grm_jax.judging import plan_of
from grm_jax.sampler import Completion
from grm_jax.tokenizer import ByteTokenizer
from grm_jax.verdicts import verdict

LONG = dataclasses.replace(LLAMA, max_positions=8192)
USAGE = Usage(1, 1, 0.0)


def example(*responses, id="a", **fields):
    return Example(id=id, messages=(Message("user", "Which word is longest?"),), responses=responses, **fields)


@pytest.fixture(scope="module")
def grm():
    return Grm(tiny_model(LONG), ByteTokenizer(), "tiny")


def shown_in(prompt):
    """The responses of a prompt, in the order shown."""
    return re.findall(r"\[The Begin of Response \d+\]\n(.*?)\n\[The End of Response", prompt, re.DOTALL)


def scripted(rate, seen=None):
    """A sampler that writes, for every sample, the scores that `rate` gives the shown responses."""

    def sample(model, requests, key, plan, sampling, head=(), forcing=None, numbers=None):
        tokenizer = ByteTokenizer()
        for request in requests:
            if seen is not None:
                seen.append(request)
            numbers = ", ".join(map(str, rate(shown_in(tokenizer.decode(request.prompt)))))
            text = tuple(tokenizer.encode(f"Analysis: as told.\nScores: \\boxed{{{numbers}}}"))
            for item, j in request.samples:
                yield Completion(request, item, j, text, (-0.5,) * len(text), True, None, 0.0)

    return sample


def test_a_judge_of_text_gives_each_response_its_score_whatever_the_order(grm, monkeypatch):
    monkeypatch.setattr("grm_jax.judging.sample", scripted(lambda shown: [min(len(text), 10) for text in shown]))
    for responses in itertools.permutations(("a", "four", "sevenss")):
        (found,) = grm.score([example(*responses, id="-".join(responses))], votes=7)
        assert found.scores == tuple(7.0 * len(text) for text in responses)
        assert found.best == responses.index("sevenss")
        assert {judgment.scores for judgment in found.judgments} == {tuple(map(len, responses))}


def test_a_judge_of_position_ends_in_a_tie(grm, monkeypatch):
    monkeypatch.setattr("grm_jax.judging.sample", scripted(lambda shown: [10] + [1] * (len(shown) - 1)))
    pair, triple = grm.score([example("x", "y"), example("x", "y", "z", id="b")], votes=6)
    assert pair.tie
    assert triple.tie
    assert pair.scores == (33.0, 33.0)
    assert triple.scores == (24.0, 24.0, 24.0)


@pytest.mark.parametrize(("n", "votes", "prompts"), [(1, 8, 1), (2, 1, 1), (2, 8, 2), (3, 4, 4), (3, 32, 6), (4, 9, 9)])
def test_k_samples_need_no_more_prompts_than_orders(grm, monkeypatch, n, votes, prompts):
    requests = []
    monkeypatch.setattr("grm_jax.judging.sample", scripted(lambda shown: [5] * len(shown), requests))
    grm.score([example(*"abcd"[:n])], votes=votes)
    assert len(requests) == len({request.prompt for request in requests}) == prompts
    assert sorted(j for request in requests for _, j in request.samples) == list(range(votes))


def test_greedy_judgments_beside_the_others(grm):
    """The votes are as without them, and they as a run of their own at temperature 0 gives them, from the same prompts."""
    examples = [example("x", "yy", id=str(i)) for i in range(3)]
    shape = {"max_new_tokens": 6, "slots": 4}

    def judged(votes, greedy=0, **more):
        found = grm.judge(examples, JudgeSettings(votes=votes, **shape, **more), greedy=greedy)
        return {verdict.id: verdict for verdict in found}

    def told(judgments):
        return [dataclasses.replace(judgment, log_prob=0.0) for judgment in judgments]

    both, votes, alone = judged(4, greedy=2), judged(4), judged(2, temperature=0.0)
    for id, found in both.items():
        assert told(found.judgments) == told(votes[id].judgments)
        assert told(found.greedy) == told(alone[id].judgments)
        assert (found.scores, found.votes, found.valid) == (votes[id].scores, 4, votes[id].valid)
        assert found.usage.prompt_tokens == votes[id].usage.prompt_tokens
        assert votes[id].greedy == ()
    with pytest.raises(ValueError, match=r"greedy = 5: it has to be 0 to votes = 4, whose orders they take"):
        judged(4, greedy=5)


def test_equal_responses_make_one_prompt(grm, monkeypatch):
    requests = []
    monkeypatch.setattr("grm_jax.judging.sample", scripted(lambda shown: [5] * len(shown), requests))
    grm.score([example("same", "same")], votes=4)
    assert len(requests) == 1


@pytest.mark.parametrize(
    ("examples", "n", "votes", "slots", "groups", "group"),
    [
        (100, 2, 8, 32, 16, 2),  # two prompts of 4 samples each: a freed row finds another sample of its prompt
        (100, 1, 1, 32, 32, 1),
        (1, 2, 8, 32, 2, 4),  # too few prompts to fill the slots: all samples at once
        (1, 1, 64, 32, 1, 32),
        (100, 3, 8, 32, 32, 1),  # six prompts of 1 or 2
    ],
)
def test_the_batch_fits_what_is_asked(examples, n, votes, slots, groups, group):
    plan = plan_of([example(*"abc"[:n], id=str(i)) for i in range(examples)], JudgeSettings(slots=slots), votes)
    assert (plan.groups, plan.group) == (groups, group)


@pytest.mark.parametrize(
    ("n", "most", "count"), [(1, 2, 1), (2, 1, 1), (2, 2, 2), (3, 4, 4), (4, 3, 3), (4, 99, 24), (9, 2, 2)]
)
def test_shared_orders_come_in_pairs_with_their_reverse(n, most, count):
    dealt = orders("some id", n, 60, seed=3, most=most)
    assert dealt[:7] == orders("some id", n, 7, seed=3, most=most)
    assert len(set(dealt)) == len(set(dealt[:count])) == count
    assert dealt == (dealt[:count] * 60)[:60]
    assert dealt[0] == orders("some id", n, 1, seed=3)[0]
    for even, odd in zip(dealt[: count - 1 : 2], dealt[1:count:2], strict=True):
        assert odd == even[::-1]


def test_two_orders_are_two_prompts_and_cancel_an_even_position_bias(grm, monkeypatch):
    requests = []
    monkeypatch.setattr("grm_jax.judging.sample", scripted(lambda shown: range(1, 1 + len(shown)), requests))
    found = grm.score([example(*"abcd")], votes=8, orders=2)[0]
    assert [len(request.samples) for request in requests] == [4, 4]
    assert found.scores == (20.0, 20.0, 20.0, 20.0)
    assert not grm.score([example(*"abcd")], votes=8)[0].tie
    pair = [example("x", "yy", id=str(i)) for i in range(8)]
    plan = plan_of(pair, JudgeSettings(slots=8, orders=1), 4)
    assert (plan.groups, plan.group) == (4, 2)


def test_orders_are_dealt_evenly_and_do_not_depend_on_the_number_of_votes():
    for n in (1, 2, 3, 4):
        count = len(list(itertools.permutations(range(n))))
        dealt = orders("some id", n, 2 * count, seed=3)
        assert sorted(dealt) == sorted(2 * list(itertools.permutations(range(n))))
        assert orders("some id", n, count + 1, seed=3) == dealt[: count + 1]
    many = orders("some id", 9, 5, seed=3)
    assert len(set(many)) == 5
    assert all(sorted(order) == list(range(9)) for order in many)
    assert many == orders("some id", 9, 8, seed=3)[:5]


def test_the_first_order_is_uniform_over_ids():
    first = [orders(f"row-{i}", 2, 1, seed=0)[0] for i in range(2000)]
    assert abs(sum(order == (0, 1) for order in first) - 1000) < 4 * np.sqrt(500)


def test_every_judgment_has_scores_when_they_are_forced(grm):
    examples = [example("a", "bb"), example("only", id="b"), example("x", "yy", "zzz", id="c", reference="zzz")]
    found = grm.score(examples, votes=3, max_new_tokens=20, temperature=1.0)
    assert [v.id for v in found] == ["a", "b", "c"]
    for v, e in zip(found, examples, strict=True):
        assert v.valid == v.votes == 3
        assert all(judgment.forced and judgment.reason is None for judgment in v.judgments)
        assert all(1 <= s <= 10 for judgment in v.judgments for s in judgment.scores)
        assert v.scores == tuple(float(sum(column)) for column in zip(*(j.scores for j in v.judgments), strict=True))
        assert v.usage.completion_tokens == sum(judgment.tokens for judgment in v.judgments)
        assert v.usage.prompt_tokens > 500
        assert len(v.scores) == len(e.responses)


def test_a_verdict_does_not_depend_on_the_examples_beside_it(grm):
    examples = [example("a" * 3 * i, "b" * i, id=f"row-{i}") for i in range(1, 6)]
    settings = {"votes": 3, "max_new_tokens": 25, "temperature": 1.0, "seed": 11}
    together = grm.score(examples, slots=4, **settings)
    for one, v in zip(examples, together, strict=True):
        (alone,) = grm.score([one], **settings)
        assert [(j.text, j.scores, j.order) for j in alone.judgments] == [
            (j.text, j.scores, j.order) for j in v.judgments
        ]
        assert (alone.scores, alone.best, alone.tie) == (v.scores, v.best, v.tie)


def test_more_votes_keep_the_samples_there_were(grm):
    few, many = (grm.score([example("a", "bb")], votes=k, max_new_tokens=20, seed=5)[0] for k in (2, 5))
    assert [j.text for j in many.judgments[:2]] == [j.text for j in few.judgments]


def told(v):
    """Without log-probabilities, whose last digits are those of the batch that a sample was in."""
    return [(j.text, j.scores, j.order, j.forced, j.tokens) for j in v.judgments]


def test_an_adaptive_vote_is_the_first_judgments_of_the_whole_one(grm):
    examples = [example("one", "three", id=f"e{i}") for i in range(6)]
    known = {"votes": 8, "max_new_tokens": 6, "temperature": 1.0}
    whole = grm.score(examples, **known)
    adaptive = grm.score(examples, **known, stop_risk=0.3)
    for a, w in zip(adaptive, whole, strict=True):
        assert a.votes in (4, 6, 8)
        assert told(a) == told(w)[: a.votes]
        assert a.usage.completion_tokens == sum(judgment.tokens for judgment in a.judgments)
        assert a.usage.prompt_tokens == w.usage.prompt_tokens
    assert len({a.votes for a in adaptive}) > 1


def test_rounds_count_every_distinct_prompt(grm, monkeypatch):
    monkeypatch.setattr("grm_jax.judging.sample", scripted(lambda shown: [5] * len(shown)))
    three = [example("a", "bb", "ccc")]
    whole, rounds = (grm.score(three, votes=6, **more)[0].usage.prompt_tokens for more in ({}, {"stop_risk": 0.0}))
    assert rounds == whole > 0


def test_without_risk_only_what_cannot_change_stops(grm, monkeypatch):
    """Ahead by 9 a judgment: after 4 of 7 the other 3 make up 27 of 36, after 4 of 8 the other 4 all 36, after 6 not."""
    monkeypatch.setattr("grm_jax.judging.sample", scripted(lambda shown: [min(len(text), 10) for text in shown]))
    for votes, drawn in ((7, 4), (8, 6)):
        (found,) = grm.score([example("a", "ten letter")], votes=votes, stop_risk=0.0)
        assert (found.votes, found.scores) == (drawn, (drawn, 10.0 * drawn))


def test_without_forcing_a_text_without_scores_says_why(grm):
    (found,) = grm.score([example("a", "bb")], votes=2, max_new_tokens=8, force_scores=False)
    assert (found.valid, found.scores, found.tie, found.best) == (0, (0.0, 0.0), True, 0)
    for judgment in found.judgments:
        assert judgment.scores is None
        assert not judgment.forced
        assert "boxed" in judgment.reason


def test_an_over_long_prompt_is_cut_and_counted(grm):
    (found,) = grm.score([example("short", "long " * 4000)], votes=2, max_new_tokens=8)
    assert found.usage.cut_tokens > 10_000
    assert found.usage.prompt_tokens <= 2 * 8192


def test_what_cannot_be_cut_to_fit_is_named_before_anything_is_judged(grm, monkeypatch):
    asked = []
    monkeypatch.setattr("grm_jax.judging.sample", scripted(lambda shown: [5] * len(shown), asked))
    turns = tuple(Message("user" if i % 2 == 0 else "assistant", "x" * 200) for i in range(119))
    with pytest.raises(ValueError, match=r"(?s)1 examples do not fit, take them out, or leave.*'long' has \d+ tokens"):
        grm.score([example("a", "b"), Example("long", turns, ("a", "b")), example("c", "d", id="c")])
    several = [Example(f"long-{i}", turns, ("a", "b")) for i in range(30)]
    with pytest.raises(
        ValueError, match="20 or more examples do not fit, take them out, or leave their prompts more tokens"
    ):
        grm.score(several)
    with pytest.raises(ValueError, match="max_new_tokens = 9000: the model has 8192 positions, for a prompt"):
        grm.score([example("a", "b")], max_new_tokens=9000)
    assert asked == []


def test_ids_that_occur_twice_are_refused(grm):
    with pytest.raises(ValueError, match="'a' occurs twice"):
        grm.score([example("x", "y"), example("z", "w")])


@pytest.mark.parametrize(
    ("field", "value"), [("votes", 0), ("max_new_tokens", 0), ("slots", -1), ("orders", 0), ("seed", -3), ("top_p", 2)]
)
def test_settings_out_of_range_name_value_and_rule(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value}: it has to be"):
        JudgeSettings(**{field: value})


def judgment(*scores):
    return Judgment("", scores or None, None if scores else "no box", (0, 1), False, 1, 0.0)


@pytest.mark.parametrize(
    ("judgments", "scores", "best", "tie", "valid"),
    [
        ([judgment(3, 7), judgment(9, 4)], (12.0, 11.0), 0, False, 2),
        ([judgment(3, 7), judgment(), judgment(7, 3)], (10.0, 10.0), 0, True, 2),
        ([judgment(), judgment()], (0.0, 0.0), 0, True, 0),
        ([judgment(1, 2)], (1.0, 2.0), 1, False, 1),
    ],
)
def test_votes_worked_by_hand(judgments, scores, best, tie, valid):
    found = verdict(example("x", "y"), judgments, USAGE)
    assert (found.scores, found.best, found.tie, found.valid) == (scores, best, tie, valid)


def test_logits_are_the_models(grm):
    tokens = np.random.default_rng(0).integers(0, 256, (2, 11))
    found = grm.logits(tokens)
    assert found.shape == (2, 11, 259)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[:, :6], grm.logits(tokens[:, :6]), atol=2e-5)


def test_generate_continues_raw_text(grm):
    rows = grm.generate(["Once", "Twice upon"], k=3, max_new_tokens=9, seed=1)
    assert [len(row) for row in rows] == [3, 3]
    for one in (one for row in rows for one in row):
        assert one.text == grm.tokenizer.decode(one.tokens)
        assert len(one.tokens) == len(one.log_probs) <= 9
    assert rows == grm.generate(["Once", "Twice upon"], k=3, max_new_tokens=9, seed=1)


def test_a_model_without_a_tokenizer_gives_logits_and_says_what_is_missing(grm):
    bare = dataclasses.replace(grm, tokenizer=None)
    assert bare.logits(np.array([[1, 2]])).shape == (1, 2, 259)
    with pytest.raises(ValueError, match=r"tiny has no tokenizer files: put tokenizer\.json"):
        bare.score([example("x", "y")])


def test_the_package_names_what_it_has():
    assert grm_jax.Grm is Grm
    with pytest.raises(AttributeError, match="it has Example"):
        _ = grm_jax.nothing


def test_examples_are_taken_with_neighbours_of_like_length():
    lengths = [9, 1, 5, 3, 8, 2, 7]
    examples = [dataclasses.replace(example("a", "b"), id=str(i), responses=("x" * i, "y")) for i in lengths]
    taken = [len(e.responses[0]) for e in by_length(examples, 4)]
    assert taken == [1, 3, 5, 9, 8, 7, 2]  # up, then down
    assert [len(e.responses[0]) for e in by_length(examples, 100)] == sorted(lengths)
    assert by_length([], 4) == []
