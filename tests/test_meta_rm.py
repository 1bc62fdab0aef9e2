"""The meta RM: released heads, logits behind shared prompts, and the vote that they guide."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import GOLDENS
from checkpoints import load as load_params
from tiny import GEMMA, LLAMA, tiny_model

from grm_jax import grm, meta_rm, prompts
from grm_jax.data.chat import encode_chat, encode_read
from grm_jax.datatypes import Example, Judgment, Message, Usage
from grm_jax.models.decoder import bind, split_abstract
from grm_jax.tokenizer import ByteTokenizer, Tokenizer
from grm_jax.verdicts import verdict
from grm_jax.vocab import ByteVocab
from grm_jax.weights.load import read_config
from grm_jax.weights.save import save_hf

EXAMPLE = Example("e", (Message("user", "2 + 2?"),), ("4", "five"), (1.0, 0.0))


def judgment(text: str, order: tuple[int, ...] = (0, 1), scores: tuple[int, ...] | None = (9, 2)) -> Judgment:
    return Judgment(text, scores, None if scores else "no box", order, False, len(text), -1.0)


@pytest.fixture(scope="module")
def guide() -> meta_rm.MetaRm:
    model = tiny_model(dataclasses.replace(GEMMA, scalar=True, logit_softcap=None))
    score = jax.random.normal(jax.random.key(7), (1, GEMMA.dim))
    model = dataclasses.replace(model, params=model.params | {"score": score})
    return meta_rm.MetaRm(model, ByteTokenizer(), prompts.load_template("meta_rm", boxed=False), "tiny")


def test_a_released_head_gives_transformers_logits():
    """Gemma2ForSequenceClassification, float32 to 1e-4: rows without padding, padded left and right."""
    folder = GOLDENS / "gemma2_classifier"
    config, params = read_config(folder), load_params(folder)
    assert config.scalar
    golden = np.load(folder / "expected.npz")
    graph, _ = split_abstract(config)

    @jax.jit
    def scalars(params, tokens, positions):
        model = bind(graph, params)
        return model.scalars(model(tokens, positions)[0])

    for side in ("none", "left", "right"):
        tokens, real, expected = (golden[f"{side}_{name}"] for name in ("tokens", "real", "logits"))
        positions = np.where(real, real.cumsum(-1) - 1, -1).astype(np.int32)
        last = np.array([np.flatnonzero(row)[-1] for row in real])
        found = scalars(params, tokens, positions)[np.arange(len(last)), last]
        np.testing.assert_allclose(found, expected[:, 0], atol=1e-4)


def test_a_head_of_two_labels_is_refused(tmp_path):
    config = json.loads((GOLDENS / "gemma2_classifier/config.json").read_text())
    for labels in ({"id2label": {"0": "bad", "1": "good"}}, {"id2label": None}):
        (tmp_path / "config.json").write_text(json.dumps(config | labels))
        with pytest.raises(ValueError, match="classification head of 2 labels"):
            read_config(tmp_path)


def test_logits_behind_a_shared_prompt_are_those_of_each_text_alone(guide):
    """k judgments of one example in two orders: the prompt of an order is computed once (issue: to 1e-5)."""
    judged = [
        judgment("short"),
        judgment("a longer text", (1, 0)),
        judgment("third \\boxed{1, 2}"),
        judgment("", (1, 0)),
    ]
    found = guide.logits(EXAMPLE, judged)

    @jax.jit
    def alone(params, ids, last):
        model = bind(guide.model.graph, params)
        positions = jnp.where(jnp.arange(ids.shape[0]) <= last, jnp.arange(ids.shape[0]), -1)
        return model.scalars(model(ids[None], positions[None])[0][0, last])

    for logit, one in zip(found, judged, strict=True):
        turns = prompts.render(EXAMPLE, one.order, guide.template)
        ids = [id for part in encode_chat(guide.tokenizer, (*turns, Message("assistant", one.text))) for id in part]
        padded = jnp.array(ids + [0] * (512 - len(ids)))
        np.testing.assert_allclose(logit, alone(guide.model.params, padded, len(ids) - 1), atol=1e-5)
    assert len({round(logit, 3) for logit in found}) == 4
    assert guide.logits(EXAMPLE, judged[2:3]) == pytest.approx(found[2:3], abs=1e-5)


def test_a_conversation_is_read_as_its_chat_template_writes_it(guide):
    """As readers of released classifiers do: trimmed, and to the end of what stands behind the answer."""
    template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<|eos|>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = Tokenizer(ByteVocab(), 256, (257,), template, {"bos_token": "<|bos|>"})
    asked = Message("user", "which?")
    read = [encode_read(tokenizer, (asked, Message("assistant", text))) for text in (" one \n", "other", "")]
    for (prompt, rest), text in zip(read, ("one", "other", ""), strict=True):
        assert prompt + rest == tokenizer.encode(f"<|bos|><user>which?<|eos|>\n<assistant>{text}<|eos|>\n")
        assert prompt == read[0][0], "the texts of one prompt share it"
    own = dataclasses.replace(guide, tokenizer=tokenizer)
    prompt, rest = meta_rm.text_ids(tokenizer, own.template, EXAMPLE, (0, 1), "a <|eos|> b ", 512)
    assert rest.count(257) == 1
    assert rest[-2:] == [257, 10]


def test_a_prompt_that_is_too_long_is_cut(guide):
    long = dataclasses.replace(EXAMPLE, responses=("4" * 3000, "five"))
    limit = guide.model.config.max_positions
    prompt, judged = meta_rm.text_ids(guide.tokenizer, guide.template, long, (1, 0), "fine", limit)
    assert limit - 100 < len(prompt) + len(judged) <= limit
    with pytest.raises(ValueError, match="tokens with every text cut to"):
        meta_rm.text_ids(guide.tokenizer, guide.template, long, (1, 0), "x" * limit, limit)


def test_a_saved_meta_rm_is_loaded_and_a_judge_is_not_one(guide, tmp_path):
    config = dataclasses.replace(GEMMA, scalar=True)
    save_hf(tmp_path / "meta", config, guide.model.params, guide.tokenizer, None, "float32")
    described = json.loads((tmp_path / "meta/config.json").read_text())
    assert described["architectures"] == ["Gemma2ForSequenceClassification"]
    assert len(described["id2label"]) == 1
    loaded = meta_rm.load(str(tmp_path / "meta"))
    judged = [judgment("one"), judgment("two", (1, 0))]
    assert loaded.logits(EXAMPLE, judged) == pytest.approx(guide.logits(EXAMPLE, judged), abs=1e-6)
    with pytest.raises(ValueError, match="scalar head and writes nothing"):
        grm.load(str(tmp_path / "meta"))
    save_hf(tmp_path / "judge", LLAMA, tiny_model().params, ByteTokenizer(), None, "float32")
    with pytest.raises(ValueError, match="has no scalar head"):
        meta_rm.load(str(tmp_path / "judge"))


def test_a_guided_verdict_says_what_was_kept():
    judged = [judgment("a", scores=(9, 1)), judgment("b", scores=(2, 6)), judgment("c", scores=(3, 5))]
    usage = Usage(1, 3, 0.0)
    plain = verdict(EXAMPLE, judged, usage)
    assert (plain.scores, plain.best) == ((14, 12), 0)
    assert {j.kept for j in plain.judgments} == {None}
    guided = verdict(EXAMPLE, [*judged, judgment("d", scores=None)], usage, [-1.0, 2.0, 0.5, 9.0])
    assert (guided.scores, guided.best, guided.valid) == ((5, 11), 1, 3)
    assert [j.kept for j in guided.judgments] == [False, True, True, False]
    assert [j.logit for j in guided.judgments] == [-1.0, 2.0, 0.5, 9.0]
    assert verdict(EXAMPLE, judged, usage, [-1.0, 2.0, 0.5], k_meta=1).scores == (2, 6)
