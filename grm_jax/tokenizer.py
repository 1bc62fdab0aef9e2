"""Tokenizers: text to ids and back, and conversations to text.

1. `from_folder` reads a Hugging Face folder (tokenizer.json before tokenizer.model), `from_gguf` a GGUF file; the
   vocabulary itself is one of the three kinds in `vocab`.
2. Around it stand the facts that the files give: the begin id, all ids that end a turn or a text, the chat template.
3. `chat` renders turns through the template in Jinja2's sandbox, or as plain text turns where there is none.

A template that refuses the turns as they are (Gemma-2: no system role, strict alternation), or leaves one of them out,
is given them folded, by this rule: the text of system turns goes in front of the next user turn, and neighbours with
the same role become one turn, always with an empty line between. If that is refused or cut as well, it is an error: no
turn is lost in silence.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import Any

from grm_jax import vocab as vocabs
from grm_jax.datatypes import Message
from grm_jax.log import logger
from grm_jax.turns import TemplateRefusal, compiled, fold, plain_turns
from grm_jax.vocab import ByteVocab, FastVocab, PieceVocab, Vocab

# Strings with which released chat models end a turn or a text; where one is a control token it stops the sampler.
ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>"),
    *("<|end_of_turn|>", "<end_of_turn>", "<｜end▁of▁sentence｜>", "<eos>", "</s>"),
)
# Control tokens, even where a sentencepiece model calls them user-defined text and no config lists them. Not <eos> and
# </s>: where those are no control tokens they are text (Gemma has </s> as an HTML tag).
TURN_MARKERS = (*ENDS[:-2], "<start_of_turn>", "<|im_start|>", "<|start_header_id|>", "<|end_header_id|>")
_BRACKETED = re.compile(r"<<[^<>\s]+>>|<[^<>\s]+>|\[/?[A-Z_]+\]")
# What a template raises for turns that it does not take: its own refusal, and Python's errors inside of it.
_FAILS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A vocabulary, its begin and end ids, and a chat template."""

    def __init__(
        self,
        vocab: Vocab,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        names: Mapping[str, str] | None = None,
        begins: bool = False,
    ):
        """Put the parts together.

        Args:
            vocab: text to ids and bytes.
            bos_id: the id that begins a text, if there is one; `encode` never adds it.
            eos_ids: all ids that end a turn or a text.
            chat_template: a Jinja2 template, None for plain text turns.
            names: what a template may print: bos_token, eos_token, ...
            begins: the model's texts begin with the begin token, so plain text turns do.

        Raises:
            ValueError: an id outside of the vocabulary, or a template with a syntax error.
        """
        for name, id_ in [("bos_id", bos_id), *(("eos_ids", id_) for id_ in eos_ids)]:
            if id_ is not None and not 0 <= id_ < vocab.size:
                raise ValueError(f"{name} has {id_}, but there are {vocab.size} ids: the config is another tokenizer's")
        if chat_template is not None:
            compiled(chat_template)
        self.vocab_size = vocab.size
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.specials = tuple(vocab.specials)
        self.chat_template = chat_template
        self.vocab = vocab
        self.names = dict(names or {})
        self.start = next((text for text, id_ in vocab.specials.items() if begins and id_ == bos_id), "")
        self._bytes: list[bytes] | None = None

    def encode(self, text: str) -> list[int]:
        """Ids of a text; strings in `specials` become their control tokens. No begin token is added."""
        return self.vocab.encode(_valid(text))

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which strings like those in `specials` are text."""
        return self.vocab.encode_plain(_valid(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: control tokens dropped, bytes that are no UTF-8 become U+FFFD.

        Ids past the vocabulary (rows that pad an embedding) have no text either; a negative id is a ValueError.
        """
        table = self.token_bytes()
        parts = []
        for id_ in ids:
            if id_ < 0:
                raise ValueError(f"token id {id_}: ids are 0 or more; cut padding off before decoding")
            parts.append(table[id_] if id_ < len(table) else b"")
        text = b"".join(parts).decode(errors="replace")
        return text.removeprefix(" ") if self.vocab.drops_first_space else text

    def token_bytes(self) -> list[bytes]:
        """The bytes that each of the `vocab_size` ids contributes to a text, b"" for control tokens (made once)."""
        if self._bytes is None:
            self._bytes = self.vocab.token_bytes()
        return self._bytes

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """What may not stand in the text of a turn: `specials`, and what the chat template writes around turns in brackets.

        Such a mark opens or ends a turn whether it is a control token, an added token that no file calls one, or text
        alone ("[INST]").
        """
        found = list(self.specials)
        talks = (("user",), ("user", "assistant"), ("user", "assistant", "user"), ("system", "user"))
        for roles, asked in itertools.product(talks if self.chat_template else (), (True, False)):
            with contextlib.suppress(*_FAILS):
                marks = _BRACKETED.findall(self._render([(role, "x") for role in roles], asked))
                found += [twin for mark in marks for twin in (mark, *_closing(mark))]
        return tuple(dict.fromkeys(found))

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the model expects it, for `encode`; with the begin token where the template writes it.

        Raises:
            ValueError: no messages, or the template fails on them, or it refuses or loses a turn even when folded.
        """
        if not messages:
            raise ValueError("chat needs one message or more, got none")
        turns = tuple((message.role, message.content) for message in messages)
        if self.chat_template is None:
            return self.start + plain_turns(turns, add_generation_prompt)
        reason = ""
        for attempt in (turns, fold(turns)):
            try:
                text = self._render(attempt, add_generation_prompt)
            except TemplateRefusal as refusal:
                reason = f"refuses them: {refusal}"
                continue
            lost = self._lost(attempt, add_generation_prompt)
            if not lost:
                return text
            reason = f"leaves out {' and '.join(lost)}"
        roles = ", ".join(role for role, _ in turns)
        raise ValueError(f"turns [{roles}]: the chat template {reason}; alternate user and assistant, user first")

    def _render(self, turns: Sequence[tuple[str, str]], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            template, given = compiled(self.chat_template), {"tools": None, "documents": None, **self.names}
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **given)
        except TemplateError as error:
            raise ValueError(f"the chat template fails: {error}; put a correct one in chat_template.jinja") from error

    def _lost(self, turns: Sequence[tuple[str, str]], add_generation_prompt: bool) -> list[str]:
        """Roles of the turns that the template does not print: rendered again, with a mark in place of each text."""
        marks = [(role, f"(turn mark {index})") for index, (role, _) in enumerate(turns)]
        try:
            text = self._render(marks, add_generation_prompt)
        except TemplateRefusal:  # it took the real texts, so it looks into them, and marks say nothing
            return []
        return [role for role, mark in marks if mark not in text]


def _closing(mark: str) -> list[str]:
    """What ends what a mark of markup opens: some templates cut an answer at it ("</think>")."""
    return [f"</{mark[1:]}"] if re.fullmatch(r"<\w+>", mark) else []


class ByteTokenizer(Tokenizer):
    """259 ids: the 256 bytes, <|bos|>, <|eos|>, <|pad|>; plain text turns. For tiny models and tests."""

    def __init__(self) -> None:
        super().__init__(ByteVocab(), bos_id=256, eos_ids=(257,))


def _valid(text: str) -> str:
    """The text itself; ValueError if it cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has {text[error.start]!r} at {error.start}, half of a surrogate pair and no character: "
            "replace it, for example by text.encode('utf-8', 'replace').decode()"
        ) from error
    return text


def from_folder(path: str | PathLike[str]) -> Tokenizer:
    """Read the tokenizer of a Hugging Face folder, local or gs://.

    The vocabulary comes from tokenizer.json, else tokenizer.model; control tokens, ids and template from
    tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json, config.json and
    chat_template.jinja (which goes before the config's template), each where there is one.

    Raises:
        FileNotFoundError: no such folder, or neither vocabulary file in it.
        ValueError: a file that is not what its name says, or files that contradict each other.
    """
    from etils import epath

    folder = epath.Path(path).expanduser()
    file = next((folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).exists()), None)
    if file is None:
        what = "has neither tokenizer.json nor tokenizer.model" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(f"{folder} {what}: give a Hugging Face folder that holds one of the two")
    config, mapped = _read_json(folder / "tokenizer_config.json"), _read_json(folder / "special_tokens_map.json")
    numbers = _read_json(folder / "config.json") | _read_json(folder / "generation_config.json")
    names = {name: _content(config.get(name, mapped.get(name))) for name in _NAMES}
    names = {name: text for name, text in names.items() if text}
    specials, added = _special_strings(config, mapped, names), _read_json(folder / "added_tokens.json")
    added |= {token["content"]: int(id_) for id_, token in config.get("added_tokens_decoder", {}).items()}
    try:
        if file.name == "tokenizer.json":
            vocab: Vocab = _fast_vocab(file.read_bytes(), specials, added)
        else:
            vocab = PieceVocab(file.read_bytes(), {*specials, *TURN_MARKERS}, added, config.get("legacy") is True)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    bos_id = vocab.specials.get(names.get("bos_token", ""))
    if "bos_token" not in config and "bos_token" not in mapped:
        bos_id = numbers.get("bos_token_id")
    eos = numbers.get("eos_token_id")
    eos_ids = [*(eos if isinstance(eos, list) else [] if eos is None else [eos])]
    eos_ids += [vocab.specials[text] for text in (names.get("eos_token"), *ENDS) if text in vocab.specials]
    begins = config.get("add_bos_token")
    if begins is None:  # a sentencepiece checkpoint begins with it, a tokenizer.json says so itself
        begins = vocab.starts_with(bos_id) if isinstance(vocab, FastVocab) else True
    try:
        return Tokenizer(vocab, bos_id, eos_ids, _template(folder, config), names, begins)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _read_json(file: Any) -> dict[str, Any]:
    """A JSON object, {} if there is no such file; ValueError with the position if it is broken."""
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}, column {error.colno}: no JSON, {error.msg}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, not a JSON object: fetch the file again")
    return value


def _content(token: Any) -> str | None:
    """The string of a token, which a config writes as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _special_strings(config: Mapping[str, Any], mapped: Mapping[str, Any], names: Mapping[str, str]) -> set[str]:
    """Every string that the configs call a control token."""
    found = set(names.values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        for tokens in (config.get(key), mapped.get(key)):
            listed = tokens.values() if isinstance(tokens, dict) else tokens or ()
            found |= {text for text in map(_content, listed) if text}
    return found | {t["content"] for t in config.get("added_tokens_decoder", {}).values() if t.get("special")}


def _fast_vocab(data: bytes, specials: set[str], added: Mapping[str, int]) -> FastVocab:
    """A tokenizer.json with the strings that the other files add to it, or call control tokens."""
    import tokenizers

    fast = tokenizers.Tokenizer.from_buffer(data)
    for text, id_ in sorted(added.items(), key=lambda item: item[1]):
        if fast.token_to_id(text) is None:
            fast.add_tokens([tokenizers.AddedToken(text, normalized=False)])
        if fast.token_to_id(text) != id_:
            raise ValueError(f"{text!r} has id {fast.token_to_id(text)} here, {id_} in the folder's added tokens")
    flagged = {token.content: token for token in fast.get_added_tokens_decoder().values()}
    for text in sorted(specials):
        token = flagged.get(text, tokenizers.AddedToken(text, normalized=False))
        if fast.token_to_id(text) is not None and not token.special:
            token.special = True
            fast.add_special_tokens([token])
    return FastVocab(fast)


def _template(folder: Any, config: Mapping[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, else the config's only one or the one named 'default'."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if not isinstance(template, list):
        return template
    named = {entry["name"]: entry["template"] for entry in template}
    if "default" not in named:
        raise ValueError(f"chat_template has {', '.join(named)}, no 'default': put one in chat_template.jinja")
    return named["default"]


def from_gguf(source: Any) -> Tokenizer:
    """Read the tokenizer of a GGUF file, of model 'gpt2' (byte-level BPE) or 'llama' (sentencepiece BPE).

    `source` is a path, or the reader that `open_gguf` gave: opened once, it serves tokenizer and weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, one without a vocabulary, or a kind of vocabulary that is not known.
    """
    from grm_jax.gguf_file import open_gguf

    reader = open_gguf(source) if isinstance(source, str | PathLike) else source
    try:
        return _gguf_tokenizer(reader)
    except ValueError as error:
        raise ValueError(f"{reader.source}: {error}") from error


def _gguf_tokenizer(reader: Any) -> Tokenizer:
    def field(key: str, default: Any = None) -> Any:
        found = reader.get_field(f"tokenizer.{key}")
        return default if found is None else found.contents()

    model, tokens, types = field("ggml.model"), field("ggml.tokens", []), field("ggml.token_type", [])
    scores = field("ggml.scores", []) if model == "llama" else tokens
    if model not in ("gpt2", "llama"):
        raise ValueError(
            f"tokenizer.ggml.model is {model!r}, and 'gpt2' and 'llama' are known: load the model's Hugging Face folder "
            "with its tokenizer.json instead"
        )
    if not tokens or not len(tokens) == len(types) == len(scores):
        raise ValueError(
            f"there are {len(tokens)} tokens, {len(types)} types and {len(scores)} scores, not one of each "
            "for each id: convert the file again, or load the model's Hugging Face folder"
        )
    if model == "gpt2":
        pre = field("ggml.pre")
        if pre is None:
            logger.warning("the GGUF file names no tokenizer.ggml.pre: cutting words by 'default', as llama.cpp does")
            pre = "default"
        fast = vocabs.byte_level_tokenizer(tokens, types, field("ggml.merges", []), pre)
        vocab, begins = FastVocab(fast), pre in vocabs.WHOLE_WORDS
    else:
        proto = vocabs.piece_model(tokens, scores, types, field("ggml.add_space_prefix", True))
        vocab, begins = PieceVocab(proto, TURN_MARKERS), True
    numbers = {name: field(f"ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding", "eot", "eom")}
    strings = (numbers[key] for key in ("bos", "eos", "unknown", "padding"))
    names = {name: tokens[id_] for name, id_ in zip(_NAMES, strings, strict=True) if id_ in range(len(tokens))}
    eos_ids = [numbers[key] for key in ("eos", "eot", "eom") if numbers[key] is not None]
    eos_ids += [vocab.specials[text] for text in ENDS if text in vocab.specials]
    begins = field("ggml.add_bos_token", begins)
    return Tokenizer(vocab, numbers["bos"], eos_ids, field("chat_template"), names, begins)
