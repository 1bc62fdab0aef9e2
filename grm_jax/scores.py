r"""Scores in a judge's text: read by the host, read from tokens on the device, forced into an answer that lacks them.

1. `parse` reads the last complete `\boxed{s1, ..., sn}` of a text (spct section 1). It is the reference for 2.
2. `token_table` reduces each token's bytes to the few symbols that such a reader can tell apart; `read` runs an
   automaton over the symbols of every row at once, inside a compiled step: no text, no host.
3. `force_table` lists the tokens that may follow an opened box so that n canonical scores and `}` come out; `mask` and
   `advance` apply it to a batch while sampling. Text + FORCE_TAIL + forced tokens always parses.

A box opens at `\boxed{` and closes at the first `}` behind it, unless another `\boxed{` comes before that `}`: then the
earlier opening is forgotten. So an opening that is never closed hides no earlier box, a box inside a box is the inner
one, and braces inside a box end it. Content: n integers in ASCII digits, each with an optional sign, separated by
commas, space, tab, newline or carriage return allowed around each; anything else in the last box is a failed parse.

Letters: B rows, T tokens, N responses, V vocabulary, C distinct tokens to the reader, L symbols of a token, S states,
K tokens that can be forced.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

OPENING = "\\boxed{"
FORCE_TAIL = "\n\nScores: " + OPENING
CHOICE_TAIL = "\n\nBest response: " + OPENING

LIMIT = 9999  # larger magnitudes saturate here before they are clipped, so four digits say all about a number
_SPACES = " \t\n\r"
_INTEGER = re.compile(r"([+-]?)([0-9]+)")


def parse(text: str, n: int, low: int = 1, high: int = 10) -> tuple[tuple[int, ...] | None, str | None]:
    r"""The n scores in the last complete box of a text, clipped to low..high; linear in the text's length.

    Returns (scores, None), or (None, reason) when the text has no box or its last one holds anything but n integers.
    Raises ValueError for n < 1, low > high, or a bound beyond +-LIMIT. Source: spct section 1.
    """
    _check_bounds(low, high)
    if n < 1:
        raise ValueError(f"n is {n}; a text scores at least one response")
    openings = text.split(OPENING)[1:]
    content = next((piece.partition("}")[0] for piece in reversed(openings) if "}" in piece), None)
    if content is None:
        return None, f"{OPENING} is never closed" if openings else f"no {OPENING}...}} in the text"
    if not content.strip(_SPACES):
        return None, f"an empty {OPENING}}} for {n} response{'s' * (n > 1)}"
    scores = []
    for item in content.split(","):
        number = _INTEGER.fullmatch(text := item.strip(_SPACES))
        if number is None:
            return None, f"{text if len(text) <= 40 else text[:37] + '...'!r} is not an integer"
        sign, digits = number.groups()
        significant = digits.lstrip("0") or "0"
        magnitude = int(significant) if len(significant) <= len(str(LIMIT)) else LIMIT
        scores.append(min(max(-magnitude if sign == "-" else magnitude, low), high))
    if len(scores) != n:
        return None, f"{len(scores)} score{'s' * (len(scores) > 1)} for {n} response{'s' * (n > 1)}"
    return tuple(scores), None


def parse_choice(text: str, n: int) -> tuple[tuple[int, ...] | None, str | None]:
    """`parse` of a text whose box holds the number of the best of n responses: 1 for that response, 0 for the others."""
    found, reason = parse(text, 1, -LIMIT, LIMIT)
    if found is None:
        return None, reason.replace(" for 1 response", " where one number was asked for")
    if found[0] not in range(1, n + 1):
        return None, f"{found[0]} is the number of no response, there are {n}"
    return tuple(int(i + 1 == found[0]) for i in range(n)), None


def _check_bounds(low: int, high: int) -> None:
    if not -LIMIT <= low <= high <= LIMIT:
        raise ValueError(f"scores from {low} to {high}: the bounds must satisfy -{LIMIT} <= low <= high <= {LIMIT}")


# Symbols: what the reader can tell apart. A fragment is a piece [start, end) of `\boxed{`, whose 7 characters are all
# different: it moves the match from `start` to `end`, or, when the match stands elsewhere, breaks it. [0, 7) is a whole
# opening. Every other byte is a symbol of its own kind, _OTHER stands for all that no box may hold.
_NONE, _OTHER, _SPACE, _PLUS, _MINUS, _COMMA, _CLOSE = range(7)
_DIGIT = 16
_FRAGMENT = 64

_SYMBOL_OF_BYTE = (
    dict.fromkeys(_SPACES.encode(), _SPACE)
    | {ord("+"): _PLUS, ord("-"): _MINUS, ord(","): _COMMA}
    | {ord("0") + digit: _DIGIT + digit for digit in range(10)}
)
# Separators: the end of an opening at the token's start, a whole opening, a brace, the start of one at the token's end.
_SEPARATORS = re.compile(rb"(\A(?:boxed|oxed|xed|ed|d)?\{|\\boxed\{|\}|\\(?:b(?:o(?:x(?:ed?)?)?)?)?\Z)")
# Whatever does not match is no part of a valid box's content (some of what matches is none either).
_CONTENT = re.compile(
    rb"[ \t\n\r]*(?:[+-]?[0-9]+[ \t\n\r]*)?(?:,[ \t\n\r]*[+-]?[0-9]+[ \t\n\r]*)*(?:,[ \t\n\r]*)?[+-]?"
)
_SPACE_RUN = re.compile(rb"[ \t\n\r]+")
_LONG_NUMBER = re.compile(rb"[0-9]{5,}")


@no_type_check  # JAX rebuilds a pytree around placeholders too
@partial(jax.tree_util.register_dataclass, data_fields=("kinds", "symbols"), meta_fields=())
@dataclass(frozen=True)
class TokenTable:
    """Each token's bytes as the reader sees them. Most of a vocabulary is one kind, so V numbers and a small table."""

    kinds: Int[Array, "V"]  # each token's row in `symbols`
    symbols: UInt8[Array, "C L"]  # padded behind with 0, which the reader ignores; row 0 is the empty token


def token_table(token_bytes: Sequence[bytes]) -> TokenTable:
    r"""The reader's table for a vocabulary, from the bytes that each token adds to the text (b"" for control tokens).

    A token is stored as the shortest symbols that act the same on every state of the reader: " Response" is one symbol,
    200 spaces are one, "boxed{" is one. A vocabulary of 150,000 with tokens of up to 78 bytes comes to C = 52, L = 4.
    """
    kind_of: dict[bytes, int] = {b"": 0}
    kinds = np.array([kind_of.setdefault(_symbols(token), len(kind_of)) for token in token_bytes], np.int32)
    longest = max(1, *map(len, kind_of))
    rows = b"".join(symbols.ljust(longest, b"\0") for symbols in kind_of)
    symbols = np.frombuffer(rows, np.uint8).reshape(len(kind_of), longest)
    return TokenTable(jnp.asarray(kinds), jnp.asarray(symbols))


def _symbols(token: bytes) -> bytes:
    """A token's symbols, less those that change nothing wherever the reader stands when the token begins."""
    opening = OPENING.encode()
    if token and token in opening:
        return bytes([_fragment(token)])
    symbols: list[int] = []
    for index, piece in enumerate(_SEPARATORS.split(token)):
        closed = bool(symbols) and symbols[-1] == _CLOSE  # outside of a box until an opening comes
        if index % 2 == 0:
            symbols += [] if closed else _plain_symbols(piece)
        elif piece == b"}":
            symbols += [] if closed else [_CLOSE]
        else:
            # What begins an opening spoils the box around it, whatever stood in front of it there.
            while symbols and symbols[-1] < _FRAGMENT and symbols[-1] != _CLOSE:
                symbols.pop()
            symbols.append(_fragment(piece))
    return bytes(symbols)


def _fragment(piece: bytes) -> int:
    start = OPENING.encode().index(piece)
    return _FRAGMENT + 8 * start + start + len(piece)


def _plain_symbols(piece: bytes) -> list[int]:
    """The symbols of bytes without a brace and without a part of an opening that could become whole."""
    if not _CONTENT.fullmatch(piece):
        return [_OTHER]
    # A run of spaces acts like one. Behind five digits or more a number differs from LIMIT only by leading zeros.
    short = _LONG_NUMBER.sub(lambda run: b"%04d" % min(int(run[0].lstrip(b"0")[:5] or b"0"), LIMIT), piece)
    return [_SYMBOL_OF_BYTE[byte] for byte in _SPACE_RUN.sub(b" ", short)]


# Where the reader stands: outside of a box; inside, before a number, behind its sign, in its digits, in the space
# behind it; or inside a box that is already spoilt.
_OUTSIDE, _BEFORE, _SIGN, _DIGITS, _AFTER, _SPOILT = range(6)


@no_type_check
@partial(
    jax.tree_util.register_dataclass,
    data_fields=("progress", "place", "index", "sign", "numbers", "scores", "valid"),
    meta_fields=(),
)
@dataclass(frozen=True)
class _Reader:
    """One row's state between two symbols."""

    progress: Int[Array, ""]  # how much of an opening has just been seen
    place: Int[Array, ""]
    index: Int[Array, ""]  # commas seen in this box, at most N
    sign: Int[Array, ""]  # of the number being read
    numbers: Int[Array, "N"]  # of this box, saturated
    scores: Int[Array, "N"]  # of the last complete box
    valid: Bool[Array, ""]  # whether that box held as many integers as there are responses


@partial(jax.jit, static_argnames=("max_n", "low", "high"))
def read(
    table: TokenTable,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    counts: Int[Array, "B"],
    max_n: int,
    low: int = 1,
    high: int = 10,
) -> tuple[Int[Array, "B N"], Bool[Array, "B"]]:
    """The scores of each row of tokens: equal to `parse` of the decoded first `lengths` tokens, for every row.

    counts[b] is row b's number of responses, N = max_n the most there can be; a row with a count outside of 1..max_n is
    not valid. A token outside of the vocabulary adds nothing to the text. Returns (scores, valid); scores are -1 behind
    a row's count and in rows that are not valid.
    Raises ValueError for max_n < 1, low > high, or a bound beyond +-LIMIT. Source: spct section 1.
    """
    _check_bounds(low, high)
    if max_n < 1:
        raise ValueError(f"max_n is {max_n}; a text scores at least one response")
    inside = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]) & (tokens >= 0)
    kinds_BT = jnp.where(inside, table.kinds.at[tokens].get(mode="fill", fill_value=0), 0)
    return jax.vmap(partial(_read_row, max_n=max_n, low=low, high=high))(table.symbols[kinds_BT], counts)


def chosen(
    numbers: Int[Array, "B N"], valid: Bool[Array, "B"], counts: Int[Array, "B"]
) -> tuple[Int[Array, "B N"], Bool[Array, "B"]]:
    """`parse_choice` of rows that `read` has read as one number each, with bounds wide enough; counts: of responses."""
    slots, inside = jnp.arange(1, numbers.shape[1] + 1)[None], valid & (numbers[:, 0] >= 1) & (numbers[:, 0] <= counts)
    shown = inside[:, None] & (slots <= counts[:, None])
    return jnp.where(shown, (slots == numbers[:, :1]).astype(jnp.int32), -1), inside


def _read_row(
    symbols_TL: UInt8[Array, "T L"], count: Int[Array, ""], max_n: int, low: int, high: int
) -> tuple[Int[Array, "N"], Bool[Array, ""]]:
    zero, none = jnp.int32(0), jnp.zeros(max_n, jnp.int32)
    start = _Reader(zero, zero + _OUTSIDE, zero, zero + 1, none, none, jnp.bool_(False))
    symbols = symbols_TL.reshape(-1).astype(jnp.int32)
    end, _ = jax.lax.scan(lambda reader, symbol: (_step(reader, symbol, count), None), start, symbols)
    shown = end.valid & (jnp.arange(max_n) < count)
    return jnp.where(shown, jnp.clip(end.scores, low, high), -1), end.valid


def _step(reader: _Reader, symbol: Int[Array, ""], count: Int[Array, ""]) -> _Reader:
    """The reader behind one more symbol."""
    fragment, digit = symbol >= _FRAGMENT, (symbol >= _DIGIT) & (symbol < _FRAGMENT)
    begin, end = (symbol - _FRAGMENT) >> 3, (symbol - _FRAGMENT) & 7
    matches = fragment & ((begin == 0) | (begin == reader.progress))
    opened = matches & (end == len(OPENING))
    closed = (symbol == _CLOSE) & (reader.place != _OUTSIDE)
    empty = symbol == _NONE

    place = reader.place
    whole = (place == _DIGITS) | (place == _AFTER)
    place_inside = jnp.where(digit & (place >= _BEFORE) & (place <= _DIGITS), _DIGITS, _SPOILT)
    place_inside = jnp.where(symbol == _SPACE, jnp.where(whole, _AFTER, place_inside), place_inside)
    place_inside = jnp.where((symbol == _SPACE) & (place == _BEFORE), _BEFORE, place_inside)
    place_inside = jnp.where(((symbol == _PLUS) | (symbol == _MINUS)) & (place == _BEFORE), _SIGN, place_inside)
    place_inside = jnp.where((symbol == _COMMA) & whole, _BEFORE, place_inside)
    next_place = jnp.where((place == _OUTSIDE) | closed, _OUTSIDE, place_inside)
    next_place = jnp.where(opened, _BEFORE, jnp.where(empty, place, next_place))

    max_n = reader.numbers.shape[0]
    next_index = jnp.where(opened, 0, jnp.minimum(reader.index + (symbol == _COMMA), max_n))
    sign = jnp.where(opened | (symbol == _COMMA), 1, jnp.where(symbol == _MINUS, -1, reader.sign))
    grown = jnp.clip(10 * reader.numbers + sign * (symbol - _DIGIT), -LIMIT, LIMIT)
    numbers = jnp.where(digit & (jnp.arange(max_n) == reader.index), grown, reader.numbers)
    return _Reader(
        progress=jnp.where(empty, reader.progress, jnp.where(matches, end, 0)),
        place=next_place,
        index=next_index,
        sign=sign,
        numbers=jnp.where(opened, 0, numbers),
        scores=jnp.where(closed, reader.numbers, reader.scores),
        valid=jnp.where(closed, whole & (reader.index + 1 == count), reader.valid),
    )


FREE, DONE = 0, 1  # states of a row that is not forced, and of one whose box is closed
_FORCIBLE = re.compile(rb" ?[0-9]{0,4}(?:, ?[0-9]{1,4})*(?:, ?)?\}?")


@no_type_check
@partial(
    jax.tree_util.register_dataclass,
    data_fields=("columns", "tokens", "next_states"),
    meta_fields=("max_n", "low", "high"),
)
@dataclass(frozen=True)
class ForceTable:
    r"""The automaton over the tokens behind an opened box; one table serves every n <= max_n.

    States: FREE, DONE (both allow everything and stay), then for each number of scores still to be written the states
    within a score. Only K tokens of a vocabulary can stand in a box, so transitions are kept for those alone.
    """

    columns: Int[Array, "V"]  # each token's column in `next_states`; K for a token that no box may hold
    tokens: Int[Array, "K"]  # the tokens of columns 0..K-1
    next_states: Int[Array, "S K1"]  # the state behind a token, -1 where it is not allowed; column K is all others
    max_n: int
    low: int
    high: int

    def start(self, n: int) -> int:
        """The state right behind FORCE_TAIL, with n scores to write. Raises ValueError for n outside of 1..max_n."""
        if not 1 <= n <= self.max_n:
            raise ValueError(f"{n} scores to force; this table is made for 1 to {self.max_n}")
        return _block(n, (self.next_states.shape[0] - 2) // self.max_n)


def force_table(token_bytes: Sequence[bytes], max_n: int, low: int = 1, high: int = 10) -> ForceTable:
    """The automaton that writes up to max_n scores of low..high: canonical numbers, "," or ", " between, "}" behind.

    A token may hold several characters ("10", ", 7", "7}"); it is allowed where all of them are, and none follow "}".
    Raises ValueError for bounds outside of 0..LIMIT (canonical numbers have no sign), and for a vocabulary that lacks a
    token for a single character of the grammar: with them no state is a dead end, and every score can be written.
    """
    if not 0 <= low <= high <= LIMIT or max_n < 1:
        raise ValueError(
            f"{max_n} scores from {low} to {high}: forced scores need max_n >= 1, 0 <= low <= high <= {LIMIT}"
        )
    next_byte = _byte_automaton(max_n, low, high)
    known = set(token_bytes)
    for byte in np.flatnonzero((next_byte >= 0).any(axis=0)):
        if byte != ord(" ") and bytes([byte]) not in known:
            state = int(np.flatnonzero(next_byte[:, byte] >= 0)[0])
            left = 1 + (state - 2) // ((len(next_byte) - 2) // max_n)
            raise ValueError(
                f"the vocabulary of {len(token_bytes)} tokens has no token {chr(byte)!r}, which forced scores of {low} "
                f"to {high} need (first in state {state}, {left} to write); sample without forced scores"
            )
    tokens = np.array([i for i, token in enumerate(token_bytes) if token and _FORCIBLE.fullmatch(token)], np.int32)
    next_states = _walk(next_byte, [token_bytes[i] for i in tokens])
    useful = (next_states >= 0).any(axis=0)
    tokens, next_states = tokens[useful], next_states[:, useful]
    next_states = np.pad(next_states, ((0, 0), (0, 1)), constant_values=-1)
    next_states[FREE], next_states[DONE] = FREE, DONE
    columns = np.full(len(token_bytes), len(tokens), np.int32)
    columns[tokens] = np.arange(len(tokens))
    return ForceTable(jnp.asarray(columns), jnp.asarray(tokens), jnp.asarray(next_states), max_n, low, high)


def _block(left: int, width: int) -> int:
    """The first state of those with `left` scores still to write: before a score, where no space may come."""
    return 2 + (left - 1) * width


def _byte_automaton(max_n: int, low: int, high: int) -> np.ndarray:
    """Transitions [S, 256] over bytes, -1 where a byte is not allowed: behind "}" none is, so no token goes on."""
    nodes = _number_automaton(low, high)
    width = len(nodes) + 1  # the last state of a block stands behind a comma: a space may come
    next_byte = np.full((2 + max_n * width, 256), -1, np.int32)
    for left in range(1, max_n + 1):
        first = _block(left, width)
        behind_comma = first + len(nodes)
        for node, (complete, children) in enumerate(nodes):
            for digit, child in children:
                next_byte[first + node, ord(digit)] = first + child
            if complete and left > 1:
                next_byte[first + node, ord(",")] = _block(left - 1, width) + len(nodes)
            elif complete:
                next_byte[first + node, ord("}")] = DONE
        next_byte[behind_comma] = next_byte[first]
        next_byte[behind_comma, ord(" ")] = first
    return next_byte


def _number_automaton(low: int, high: int) -> list[tuple[bool, tuple[tuple[str, int], ...]]]:
    """The smallest automaton for low..high: for each node (is it a whole number, ((digit, next node), ...))."""
    numbers = {str(number) for number in range(low, high + 1)}
    prefixes = {number[:end] for number in numbers for end in range(len(number) + 1)}
    children_of: dict[str, list[tuple[str, int]]] = {prefix: [] for prefix in prefixes}
    node_of: dict[tuple[bool, tuple[tuple[str, int], ...]], int] = {}
    # Longest first, so that what may follow a prefix is numbered before it; prefixes with the same future are one node.
    for prefix in sorted(prefixes, key=lambda prefix: (-len(prefix), prefix)):
        signature = (prefix in numbers, tuple(sorted(children_of[prefix])))
        node = node_of.setdefault(signature, len(node_of))
        if prefix:
            children_of[prefix[:-1]].append((prefix[-1], node))
    last = len(node_of) - 1  # the empty prefix came last, and becomes node 0
    return [
        (complete, tuple((digit, last - child) for digit, child in children))
        for complete, children in reversed(node_of)
    ]


def _walk(next_byte: np.ndarray, tokens: Sequence[bytes]) -> np.ndarray:
    """The state behind each token from each state [S, K], -1 where a byte of it is not allowed."""
    states = np.repeat(np.arange(len(next_byte), dtype=np.int32)[:, None], len(tokens), axis=1)
    for position in range(max(map(len, tokens))):
        longer = np.array([len(token) > position for token in tokens])
        byte = np.array([token[position] if len(token) > position else 0 for token in tokens])
        states = np.where(longer[None] & (states >= 0), next_byte[states, byte[None]], states)
    return states


@jax.jit
def mask(table: ForceTable, states: Int[Array, "B"]) -> Bool[Array, "B V"]:
    """Which tokens each row may sample. All of them in FREE and DONE, none in -1."""
    free = (states == FREE) | (states == DONE)
    allowed_BK = (table.next_states[states, :-1] >= 0) & (states >= 0)[:, None]
    everywhere = jnp.broadcast_to(free[:, None], (states.shape[0], table.columns.shape[0]))
    return everywhere.at[:, table.tokens].set(allowed_BK)


@jax.jit
def advance(table: ForceTable, states: Int[Array, "B"], tokens: Int[Array, "B"]) -> Int[Array, "B"]:
    """Each row's state behind its sampled token: DONE once the box is closed, -1 for good after a token not allowed."""
    other = table.next_states.shape[1] - 1
    columns = table.columns.at[tokens].get(mode="fill", fill_value=other)
    return jnp.where(states >= 0, table.next_states[states, columns], -1)
