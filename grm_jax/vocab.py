"""Vocabularies: text to ids, and ids to the bytes that they stand for.

1. `FastVocab` wraps a `tokenizers.Tokenizer` (a `tokenizer.json`, or the byte-level BPE of a GGUF file).
2. `PieceVocab` wraps a sentencepiece model (a `tokenizer.model`, or the pieces and scores of a GGUF file).
3. `ByteVocab` is the 256 bytes and three control tokens, for tiny models and tests.
4. `byte_level_tokenizer` and `piece_model` turn the lists of a GGUF file into what 1 and 2 wrap.

All three know which strings are control tokens (`specials`), encode with and without reading those strings as control
tokens, never add a begin token, list the bytes of every id (b"" for control tokens), and write themselves out (`saved`).

Where the references differ, these rules hold:
- Byte-level BPE from a GGUF file gives llama.cpp's ids; as there, no Unicode normalisation is applied, and a byte that
  has no token in the vocabulary (SmolLM2 lacks 21 of 256, among them 0x04 and 0x14) is left out of the ids.
- Sentencepiece text before the first special string is encoded as the sentencepiece library does, with the model's own
  leading space. Text after a special or added string gets no leading space: Hugging Face's fast tokenizers with
  `legacy: false` do that (llama.cpp adds one); a `tokenizer_config.json` that says `"legacy": true` puts it back.
- With a sentencepiece-like vocabulary the visible space in an added token is a space too, as in its decoder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

SPACE = "\u2581"  # the visible space of sentencepiece
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types, the same in GGUF and sentencepiece

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# llama.cpp knows Unicode 15, the regex engine newer versions: digits added since are no digits to the reference.
_DIGIT = (
    "(?![\U00010d40-\U00010d49\U000116d0-\U000116e3\U00011bf0-\U00011bf9\U00011de0-\U00011de9\U00016130-\U00016139"
    "\U00016d70-\U00016d79\U00016ff4-\U00016ff6\U0001ccf0-\U0001ccf9\U0001e5f1-\U0001e5fa])" + r"\p{N}"
)
# `tokenizer.ggml.pre` -> regexes that cut a text into words, one after the other, each inside the last one's pieces.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), (_GPT2,)),
    **dict.fromkeys(("smollm", "smollm2", "starcoder", "refact", "command-r", "exaone"), (_DIGIT, _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), (_QWEN2,)),
}
# A word that is a token as a whole is taken whole, whatever the merges say; these also start a text with their bos.
WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3"})


def byte_symbols() -> dict[str, int]:
    """GPT-2's map from a visible character to the byte that it stands for in a byte-level vocabulary."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a sentencepiece: <0xNN> is a byte, the visible space a space."""
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


def _splitter(strings: Collection[str]) -> re.Pattern[str] | None:
    """A pattern that cuts `strings` out of a text: leftmost first, of several there the longest."""
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


@dataclass(frozen=True)
class Saved:
    """A vocabulary as a file of a Hugging Face folder."""

    file: str  # its name
    content: bytes
    config: dict[str, Any]  # what tokenizer_config.json has to say about it


class FastVocab:
    """The vocabulary of a `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Any):
        """Take over `tokenizer`; ValueError if its decoder is of a kind whose bytes per token are not known."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._added = dict(sorted(tokenizer.get_added_tokens_decoder().items()))
        self._ids = tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(self._ids.values(), default=-1) + 1
        self.specials = {token.content: id_ for id_, token in self._added.items() if token.special}
        self._byte_level, self.drops_first_space = _decoder_kind(tokenizer.decoder)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    @cached_property
    def _plain(self) -> Any:
        """A second tokenizer that reads special strings as text: the switch belongs to the object, not to the call."""
        plain = type(self._tokenizer).from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain

    def token_bytes(self) -> list[bytes]:
        symbols = byte_symbols()
        table = [b""] * self.size
        for token, id_ in self._ids.items():
            if token in self.specials:
                continue
            if not self._byte_level:
                table[id_] = _piece_bytes(token)
            elif id_ in self._added or not symbols.keys() >= set(token):
                table[id_] = token.encode()  # an added token is the text itself
            else:
                table[id_] = bytes(symbols[symbol] for symbol in token)
        return table

    def starts_with(self, bos_id: int | None) -> bool:
        """Whether the tokenizer's own post-processor begins a text with `bos_id`."""
        return bos_id is not None and self._tokenizer.encode("").ids[:1] == [bos_id]

    def saved(self, start: str = "") -> Saved:
        """As a tokenizer.json; where texts start with a control token, its post-processor says so to other readers."""
        from tokenizers import processors

        fast = type(self._tokenizer).from_str(self._tokenizer.to_str())
        if start and not self.starts_with(self.specials[start]):
            fast.post_processor = processors.TemplateProcessing(
                single=[start, "$A"], special_tokens=[(start, self.specials[start])]
            )
        return Saved("tokenizer.json", fast.to_str().encode(), {"tokenizer_class": "PreTrainedTokenizerFast"})


def _decoder_kind(decoder: Any) -> tuple[bool, bool]:
    """(byte-level, drops a first space) of a `tokenizers` decoder; ValueError for a kind not known."""
    steps = [] if decoder is None else [json.loads(decoder.__getstate__())]
    if steps and steps[0]["type"] == "Sequence":
        steps = steps[0]["decoders"]
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return True, False
    metaspace = any(step["type"] == "Metaspace" and step["prepend_scheme"] != "never" for step in steps)
    strip = any(step["type"] == "Strip" and step["content"] == " " and step["start"] > 0 for step in steps)
    replace = any(step["type"] == "Replace" and step["pattern"] == {"String": SPACE} for step in steps)
    if replace or "Metaspace" in kinds:
        return False, metaspace or strip
    raise ValueError(
        f"the tokenizer's decoder is {' + '.join(kinds) or 'missing'}; the bytes of a token are known for ByteLevel, "
        f"Metaspace and Replace of {SPACE!r}: use a folder with such a tokenizer.json, or with only a tokenizer.model"
    )


class PieceVocab:
    """The vocabulary of a sentencepiece model, with the strings that a checkpoint adds to it."""

    def __init__(
        self, model: bytes, specials: Collection[str] = (), added: Mapping[str, int] | None = None, legacy: bool = False
    ):
        """Read a serialised sentencepiece `ModelProto`.

        Args:
            model: the bytes of a `tokenizer.model`.
            specials: strings that are control tokens besides the model's own control and unknown pieces, where they are
                in the vocabulary (Gemma's <start_of_turn> is "user defined" in its model, so any text could write it).
            added: further strings and their ids.
            legacy: put the model's leading space before text that follows a special string, too.

        Raises:
            ValueError: the bytes are no sentencepiece model, or an added id belongs to another piece.
        """
        proto = _parse_proto(model)
        specials = frozenset(specials)
        beyond = _beyond(proto.pieces, added or {})
        for piece in proto.pieces:
            if piece.piece in specials and piece.type != UNKNOWN:
                piece.type = CONTROL  # the library never reads a control piece from text; `encode` below does
        self._model, self._pieces = model, proto.pieces
        self.size = max([len(proto.pieces) - 1, *beyond.values()]) + 1
        self.specials = {
            piece.piece: id_ for id_, piece in enumerate(proto.pieces) if piece.type in (CONTROL, UNKNOWN)
        } | {text: id_ for text, id_ in beyond.items() if text in specials}
        self._added = {text: id_ for text, id_ in beyond.items() if text not in specials}
        self._atoms = self.specials | self._added
        self._split, self._split_plain = _splitter(self._atoms), _splitter(self._added)
        self.drops_first_space = proto.normalizer_spec.add_dummy_prefix
        self._first = self._next = _processor(proto)
        if self.drops_first_space and not legacy:
            proto.normalizer_spec.add_dummy_prefix = False
            self._next = _processor(proto)

    def encode(self, text: str) -> list[int]:
        return self._encode(text, self._split)

    def encode_plain(self, text: str) -> list[int]:
        return self._encode(text, self._split_plain)

    def _encode(self, text: str, split: re.Pattern[str] | None) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(split.split(text) if split else [text]):  # text, atom, text, ..., atom, text
            if index % 2:
                ids.append(self._atoms[part])
            elif part:
                ids += (self._next if index else self._first).encode(part)
        return ids

    def token_bytes(self) -> list[bytes]:
        table = [b""] * self.size
        for id_, piece in enumerate(self._pieces):
            if piece.type == BYTE:
                table[id_] = _piece_bytes(piece.piece)
            elif piece.type in (NORMAL, USER_DEFINED, UNUSED):
                table[id_] = piece.piece.replace(SPACE, " ").encode()
        for text, id_ in self._added.items():
            table[id_] = text.encode()
        return table

    def saved(self, start: str = "") -> Saved:
        """As a tokenizer.model, with the strings beside it; `start` is in the config's own begin token."""
        beyond = {str(id_): text for text, id_ in self._atoms.items() if id_ >= len(self._pieces)}
        return Saved(
            "tokenizer.model",
            self._model,
            {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": self.drops_first_space and self._next is self._first,
                "added_tokens_decoder": {
                    id_: {"content": text, "special": text in self.specials} for id_, text in beyond.items()
                },
                "additional_special_tokens": list(self.specials),
            },
        )


def _parse_proto(model: bytes) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    except DecodeError as error:
        raise ValueError(
            f"{len(model)} bytes that are no sentencepiece model: {error}; fetch the file again"
        ) from error
    if not proto.pieces:
        raise ValueError(f"a sentencepiece model of {len(model)} bytes without pieces: fetch the file again")
    return proto


def _processor(proto: Any) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except RuntimeError as error:
        raise ValueError(f"the sentencepiece library refuses this model: {error}; fetch the file again") from error


def _beyond(pieces: Sequence[Any], added: Mapping[str, int]) -> dict[str, int]:
    """The added strings that are no pieces of the model; ValueError if an added id belongs to another piece."""
    for text, id_ in added.items():
        if id_ < len(pieces) and pieces[id_].piece != text:
            raise ValueError(
                f"id {id_} is {text!r} among the added tokens, but {pieces[id_].piece!r} in the sentencepiece model: "
                "the files do not belong together, or the checkpoint shifts its ids; use one with a tokenizer.json"
            )
    return {text: id_ for text, id_ in added.items() if id_ >= len(pieces)}


class ByteVocab:
    """Ids 0 to 255 are the bytes; then <|bos|>, <|eos|> and <|pad|>."""

    size = 259
    drops_first_space = False

    def __init__(self) -> None:
        self.specials = {"<|bos|>": 256, "<|eos|>": 257, "<|pad|>": 258}
        self._split = _splitter(self.specials)

    def encode(self, text: str) -> list[int]:
        parts = self._split.split(text)
        return [id_ for part in parts for id_ in ([self.specials[part]] if part in self.specials else part.encode())]

    def encode_plain(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self) -> list[bytes]:
        return [bytes([byte]) for byte in range(256)] + [b""] * len(self.specials)

    def saved(self, start: str = "") -> Saved:
        """As the tokenizer.json of a byte-level BPE without merges, which gives the same ids."""
        symbols = sorted(byte_symbols(), key=byte_symbols().get)
        types = [NORMAL] * len(symbols) + [CONTROL] * len(self.specials)
        return FastVocab(byte_level_tokenizer([*symbols, *self.specials], types, [], "gpt-2")).saved(start)


Vocab = FastVocab | PieceVocab | ByteVocab


def byte_level_tokenizer(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str) -> Any:
    """A `tokenizers.Tokenizer` with the vocabulary of a GGUF file of model 'gpt2' (byte-level BPE).

    Args:
        tokens: the token of every id, in GPT-2's visible characters.
        types: the type of every id.
        merges: "left right", best first.
        pre: the name of the pre-tokenizer, a key of `PRE_TOKENIZERS`.

    Raises:
        ValueError: an unknown `pre`, or a merge of or into something that is no token.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre is {pre!r}; known are {', '.join(sorted(PRE_TOKENIZERS))}: use the model's Hugging "
            "Face folder with its tokenizer.json instead"
        )
    ids = {token: id_ for id_, token in enumerate(tokens)}
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not (left in ids and right in ids and left + right in ids):
            raise ValueError(f"merge {merge!r} joins or makes something that is no token: the GGUF file is damaged")
        pairs.append((left, right))
    tokenizer = Tokenizer(models.BPE(ids, pairs, ignore_merges=pre in WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    missing = "".join(symbol for symbol in byte_symbols() if symbol not in ids)
    if missing:
        # BPE drops such a symbol BEFORE it merges, so that its neighbours could join; llama.cpp drops it after.
        splits.append(pre_tokenizers.Split(Regex("[" + re.escape(missing) + "]"), "removed"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    typed = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in typed if kind in (CONTROL, UNKNOWN)]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in typed if kind == USER_DEFINED])
    return tokenizer


def piece_model(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], leading_space: bool) -> bytes:
    """The sentencepiece `ModelProto` of a GGUF file of model 'llama' (BPE by scores), serialised.

    The sentencepiece library merges by score, then leftmost, as llama.cpp does; `tokenizers` would rank the ways to
    build one piece, which neither does.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        text = token.replace(" ", SPACE) if kind == USER_DEFINED else token  # converters write these with plain spaces
        proto.pieces.add(piece=text, score=score, type=kind)
    proto.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = BYTE in types
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = leading_space
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()
