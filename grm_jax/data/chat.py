"""General instruction data: conversations that end in the assistant's answer, as prompt and completion ids.

1. `read_chats` reads JSON Lines of {"messages": [...]} or {"prompt": ..., "completion": ...}, naming every bad row.
2. `encode_chat` renders all turns but the last as the model is prompted, and encodes the last as the model writes it:
   its text, then the id that ends an assistant's turn.
3. `encode_read` encodes a whole conversation as a scalar head reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from grm_jax.data.jsonl import RowError, conversation_of, id_of, read_rows, text_of, turns_of
from grm_jax.datatypes import Message
from grm_jax.tokenizer import Tokenizer

_MARK = "(the answer)"


@dataclass(frozen=True)
class Chat:
    """A conversation whose last turn is the assistant's; `source` names the dataset that it came from."""

    id: str
    messages: tuple[Message, ...]
    source: str | None = None


def read_chats(path: str) -> list[Chat]:
    """The conversations of a JSON Lines file, in its order. Raises DataError as `jsonl.read_rows` does."""
    chats, _ = read_rows(path, parse_chat, skip_bad=False, such_as='{"prompt": "...", "completion": "..."}')
    return chats


def parse_chat(row: object, default_id: str) -> Chat:
    """The conversation in one decoded JSON row. Raises RowError with the value and the rule that it breaks."""
    if not isinstance(row, dict):
        raise RowError(row, "a row is a JSON object with a conversation")
    row = {key: value for key, value in row.items() if value is not None}  # tables export absent cells as null
    messages = (*conversation_of(row), *_completion(row)) if "completion" in row else conversation_of(row)
    *_, asked, answer = (None, *messages)
    if answer.role != "assistant" or not answer.content.strip():
        raise RowError(asdict(answer), "a conversation ends with a turn of the assistant, which is not blank")
    if asked is None or asked.role != "user":
        raise RowError(asked and asdict(asked), "the turn before the last is the user's")
    source = text_of(row["source"], "source") if "source" in row else None
    return Chat(id_of(row.get("id", default_id)), messages, source)


def _completion(row: Mapping[str, object]) -> tuple[Message, ...]:
    if isinstance(row["completion"], list):
        return turns_of(row["completion"], "completion")
    return (Message("assistant", text_of(row["completion"], "completion")),)


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """(Prompt ids, completion ids): what the model is given, and what it is to write, its end id included.

    Strings like control tokens in the answer are text. Raises ValueError: a last turn that is not the assistant's,
    turns that the chat template refuses, a tokenizer without an end id.
    """
    if len(messages) < 2 or messages[-1].role != "assistant":
        roles = ", ".join(message.role for message in messages)
        raise ValueError(f"turns [{roles}]: give a conversation that ends with the assistant's turn")
    prompt = tokenizer.encode(tokenizer.chat(messages[:-1]))
    return prompt, [*tokenizer.encode_plain(messages[-1].content), end_id(tokenizer)]


def encode_read(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """(Prompt ids, the others) of a conversation that a scalar head reads: as its chat template writes the whole of it.

    So do the readers of released reward models, who take the number at the last of these ids: what a template writes
    behind an answer, or trims of it, is as they have it. The prompt is what texts of one prompt share. Without a chat
    template as `encode_chat`. Strings like control tokens in an answer have to be broken. Raises ValueError as
    `encode_chat` does.
    """
    if tokenizer.chat_template is None:
        return encode_chat(tokenizer, messages)
    whole = tokenizer.encode(tokenizer.chat(messages, add_generation_prompt=False))
    asked = tokenizer.encode(tokenizer.chat(messages[:-1]))
    shared = next(
        (i for i, (a, b) in enumerate(zip(whole, asked, strict=False)) if a != b), min(len(whole), len(asked))
    )
    shared = max(1, min(shared, len(whole) - 1))
    return whole[:shared], whole[shared:]


@functools.lru_cache(maxsize=8)
def end_id(tokenizer: Tokenizer) -> int:
    """The end id that the chat template writes behind an assistant's turn, else the tokenizer's first.

    Raises ValueError for a tokenizer without end ids.
    """
    if not tokenizer.eos_ids:
        raise ValueError("the tokenizer has no end id: a model could not learn to stop, give a folder with eos_token")
    turns = (Message("user", "?"), Message("assistant", _MARK))
    _, _, behind = tokenizer.chat(turns, add_generation_prompt=False).rpartition(_MARK)
    return next((id for id in tokenizer.encode(behind) if id in tokenizer.eos_ids), tokenizer.eos_ids[0])
