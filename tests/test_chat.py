"""General instruction data: rows of every form, bad ones named, and completions that end as the model ends its turns."""

import gzip
import json

import pytest

from grm_jax.data.chat import Chat, encode_chat, end_id, read_chats
from grm_jax.data.jsonl import DataError
from grm_jax.datatypes import Message
from grm_jax.tokenizer import ByteTokenizer, Tokenizer
from grm_jax.vocab import ByteVocab

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
TALK = (Message("user", "hi"), Message("assistant", "hello"))
TURNS = (
    "{% for m in messages %}<|bos|>{{ m.role }}\n{{ m.content | trim }}<|pad|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)


def write(path, *rows) -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def test_rows_of_every_form(tmp_path):
    path = write(
        tmp_path / "general.jsonl.gz",
        {"id": "a", "messages": [{"role": "system", "content": "s"}, USER, ASSISTANT, USER, ASSISTANT], "extra": 1},
        {"prompt": "hi", "completion": "hello", "source": "web", "messages": None},
        "",
        {"id": 7, "prompt": [USER], "completion": [ASSISTANT]},
    )
    assert read_chats(path) == [
        Chat("a", (Message("system", "s"), *TALK, *TALK)),
        Chat("row-2", TALK, "web"),
        Chat("7", TALK),
    ]


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ([1], "a row is a JSON object with a conversation"),
        ({"messages": [USER]}, "ends with a turn of the assistant.*found .*hi"),
        ({"prompt": "hi", "completion": " "}, "which is not blank"),
        ({"messages": [ASSISTANT]}, "the turn before the last is the user's; found null"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "the turn before the last is the user's; found .*hello"),
        ({"completion": "hello"}, "a row has a conversation, as either 'prompt' or 'messages'"),
        ({"prompt": "hi", "completion": 3}, "'completion' is a string; found 3"),
        ({"prompt": "hi", "completion": []}, "'completion' is a list that is not empty"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, "a role in 'messages' is one of.*found \"bot\""),
        ({"id": "ok", "prompt": "hi", "completion": "x"}, "ids are unique, and line 1 has this one"),
        ("{", "a row is one line of JSON"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, rule):
    path = write(tmp_path / "general.jsonl", {"id": "ok", "prompt": "q", "completion": "a"}, row)
    with pytest.raises(DataError, match=rf"general\.jsonl:2: .*{rule}"):
        read_chats(path)


def test_files_without_rows(tmp_path):
    with pytest.raises(DataError, match=r'is empty; give .*"completion"'):
        read_chats(write(tmp_path / "general.jsonl"))
    with pytest.raises(DataError, match="cannot read"):
        read_chats(str(tmp_path / "absent.jsonl"))


def test_prompt_and_completion_are_what_the_model_reads_and_writes():
    tokenizer = ByteTokenizer()
    prompt, completion = encode_chat(tokenizer, (*TALK, *TALK))
    assert bytes(prompt) == b"User: hi\n\nAssistant: hello\n\nUser: hi\n\nAssistant:"
    assert completion == [*b"hello", 257]


def test_the_end_id_is_the_one_that_the_chat_template_writes():
    tokenizer = Tokenizer(ByteVocab(), 256, (257, 258), TURNS)
    assert end_id(tokenizer) == 258
    assert end_id(ByteTokenizer()) == 257  # plain turns write none
    assert end_id(Tokenizer(ByteVocab(), 256, (257,), TURNS)) == 257  # <|pad|> ends nothing here
    prompt, completion = encode_chat(tokenizer, TALK)
    whole = tokenizer.encode(tokenizer.chat(TALK, add_generation_prompt=False))
    assert [*prompt, *completion] == whole[:-1]  # but for the line's end behind the turn


def test_an_answer_is_text_as_it_is():
    tokenizer = Tokenizer(ByteVocab(), 256, (257, 258), TURNS)
    answer = " <|pad|> é\n"
    _, completion = encode_chat(tokenizer, (Message("user", "hi"), Message("assistant", answer)))
    assert completion == [*answer.encode(), 258]
    assert tokenizer.decode(completion) == answer


def test_what_cannot_be_encoded():
    with pytest.raises(ValueError, match=r"turns \[assistant, user\]: give a conversation that ends"):
        encode_chat(ByteTokenizer(), TALK[::-1])
    with pytest.raises(ValueError, match="ends with the assistant's turn"):
        encode_chat(ByteTokenizer(), TALK[1:])
    with pytest.raises(ValueError, match="no end id"):
        encode_chat(Tokenizer(ByteVocab()), TALK)
