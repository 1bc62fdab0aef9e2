r"""Text that is not a template's own, broken where it could pass for a marker, a score box or a control token.

E is U+2060, an invisible character. `neutralise` doubles each E of the text, then puts one E behind the first
character of each imitation. An imitation is at least two characters, none of them an E; so an inserted E stands
alone between two other characters, runs of doubled ones have even length, and `restore`, which turns EE to E and drops
a lone E, is exact for every text. The patterns look at no context and their matches hold no E, so a match left in the
result would be a match of the text that was not broken: there is none, overlapping imitations included. No reversible
escape is also idempotent (it would be the identity): neutralising twice is safe and takes two `restore` calls.

Markers: docs/spct.md section 2.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator

ESCAPE = "\u2060"  # word joiner: invisible, and no part of any marker
# Invisible too, but not the escape.
_UNSEEN = r"\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2061-\u2069\ufe00-\ufe0f\ufeff"
_SECTIONS = ("conversation context", "responses to be scored", "response to be scored", "output format requirements")
_HEADINGS = (*_SECTIONS, "evaluation criteria", "reference answer")
_LABELS = ("specific criteria", "analysis", "scores", "best response", "user", "assistant", "system")


def _spaced(text: str) -> str:
    """A regex for `text` with invisible characters anywhere, spaces and emphasis where it has spaces, or none there."""
    gap = rf"[\s*_{_UNSEEN}]*"
    return gap.join(f"[{_UNSEEN}]*".join(map(re.escape, word)) for word in text.split())


@functools.cache
def _imitations() -> re.Pattern[str]:
    r"""Starts of all markers in folded text. Every alternative begins with a literal and looks at no context."""
    headings = [_spaced(f"# {heading}") for heading in _HEADINGS]
    responses = [_spaced(f"[ the {edge} of response").replace(r"\[", r"[\[【〔〖⟦]", 1) for edge in ("begin", "end")]
    labels = [_spaced(f"{label} :") for label in _LABELS]
    return re.compile("|".join([*headings, *responses, *labels, _spaced("boxed {")]))


@functools.lru_cache(maxsize=8)
def _controls(controls: tuple[str, ...]) -> re.Pattern[str] | None:
    for control in controls:
        if ESCAPE in control:
            raise ValueError(f"control {control!r} holds U+2060, the escape of neutralise; leave it out of `controls`")
    # One character cannot be broken; a tokenizer with such a special (a pad "!") uses it as ordinary text as well.
    breakable = [re.escape(control) for control in controls if len(control) > 1]
    return re.compile("|".join(breakable)) if breakable else None


def _fold(text: str) -> str:
    """Lower case, full-width and styled letters as plain ones; the same length, so that positions carry over."""
    if text.isascii():
        return text.lower()
    folded = {char: unicodedata.normalize("NFKC", char).lower() for char in set(text)}
    return text.translate({ord(char): plain for char, plain in folded.items() if len(plain) == 1})


def _starts(pattern: re.Pattern[str], text: str) -> Iterator[int]:
    at = 0
    while match := pattern.search(text, at):  # from the next character on: overlapping matches count too
        yield match.start()
        at = match.start() + 1


def imitations(text: str, controls: tuple[str, ...] = ()) -> list[int]:
    """Positions in `text` where an imitation of a marker, of a score box or of one of `controls` begins, in order."""
    found = set(_starts(_imitations(), _fold(text)))
    if pattern := _controls(controls):
        found.update(_starts(pattern, text))
    return sorted(found)


def neutralise(text: str, controls: tuple[str, ...] = ()) -> str:
    """The text with every imitation broken by an invisible U+2060; `restore` gives the text back, for every text.

    Markers are found in any case, spacing, emphasis and Unicode width; `controls` (the tokenizer's special tokens)
    exactly as written. Controls of one character stay. Raises ValueError for a control that holds U+2060.
    """
    text = text.replace(ESCAPE, ESCAPE * 2)
    return _broken(text, imitations(text, controls))


def without_controls(text: str, controls: tuple[str, ...]) -> str:
    """Text for no template: only what the tokenizer takes for a control token is broken. `restore` does not undo it."""
    return _broken(text, _starts(pattern, text) if (pattern := _controls(controls)) else ())


def _broken(text: str, starts: Iterable[int]) -> str:
    pieces, at = [], 0
    for start in starts:
        pieces.append(text[at : start + 1])
        at = start + 1
    return ESCAPE.join([*pieces, text[at:]])


def restore(text: str) -> str:
    """Undo one `neutralise`: a lone U+2060 goes, of two one stays."""
    return re.sub(f"{ESCAPE}({ESCAPE}?)", r"\1", text)
