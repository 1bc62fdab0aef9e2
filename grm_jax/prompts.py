r"""From an example to the chat turns that a judge reads.

1. `load_template` reads a template file: a header with the range of the scores, then turns (`=== user` lines split the
   SOURCE, so that no text of an example can open a turn), each a Jinja2 text rendered in the sandbox.
2. `fit` shortens an example whose prompt is over the limit: the middle of the longest response first, always marked.
3. `render` fills the template with the conversation and the responses in the order asked for. Text that is not the
   template's own goes through `neutralise`, so that it cannot pass for a marker, a score box or a control token.

The escape. E is U+2060, an invisible character. `neutralise` doubles each E of the text, then puts one E behind the
first character of each imitation. An imitation is at least two characters, none of them an E; so an inserted E stands
alone between two other characters, runs of doubled ones have even length, and `restore`, which turns EE to E and drops
a lone E, is exact for every text. The patterns look at no context and their matches hold no E, so a match left in the
result would be a match of the text that was not broken: there is none, overlapping imitations included. No reversible
escape is also idempotent (it would be the identity): neutralising twice is safe and takes two `restore` calls.

Markers: docs/spct.md section 2. Departure: instructions, criteria and output format stand before the conversation,
so that all prompts of a run share the longest head.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grm_jax.datatypes import Example, Message

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent / "templates"
MARKERS = (
    "#### Conversation Context ####",
    "#### Responses to be Scored ####",
    "[The Begin of Response",
    "[The End of Response",
)
VARIABLES = frozenset({"messages", "conversation", "responses", "response", "n", "reference", "hint", "low", "high"})
FLOOR = 128  # characters that a cut leaves of a text at least, its mark included
TRIES = 16  # prompts counted per search for the cut

_HEADER = re.compile(r"\s*\{#\s*(?:name:\s*([\w.-]+)\s*;\s*)?scores:\s*(\d+)\s*\.\.\s*(\d+)\s*#\}[ \t]*\n")
ESCAPE = "\u2060"  # word joiner: invisible, and no part of any marker
# Invisible too, but not the escape.
_UNSEEN = r"\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2061-\u2069\ufe00-\ufe0f\ufeff"
_SECTIONS = ("conversation context", "responses to be scored", "response to be scored", "output format requirements")
_HEADINGS = (*_SECTIONS, "evaluation criteria", "reference answer")
_LABELS = ("specific criteria", "analysis", "scores", "user", "assistant", "system")


@dataclass(frozen=True)
class Template:
    """A template file: scores run from `low` to `high`; each turn's content is Jinja2 source over `variables`."""

    name: str
    low: int
    high: int
    turns: tuple[Message, ...]
    variables: frozenset[str]
    sha256: str


@dataclass(frozen=True)
class Hint:
    """The truth told to the judge in hinted sampling (spct.md section 3).

    `best` is the index of the best response in the example's OWN order (n >= 2), `strength` how much better it is where
    the data says so; `score` is the true score of a single response (n = 1).
    """

    best: int | None = None
    strength: float | None = None
    score: float | None = None


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
    pieces, at = [], 0
    for start in imitations(text, controls):
        pieces.append(text[at : start + 1])
        at = start + 1
    return ESCAPE.join([*pieces, text[at:]])


def restore(text: str) -> str:
    """Undo one `neutralise`: a lone U+2060 goes, of two one stays."""
    return re.sub(f"{ESCAPE}({ESCAPE}?)", r"\1", text)


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def load_template(name_or_path: str, boxed: bool = True) -> Template:
    """A template of the package by its name, or one from a local file; not `boxed`: it asks for no scores (a meta RM's).

    Raises ValueError: an unknown name (lists the known ones); a file without header, turns, needed markers or needed
    variables, or with broken Jinja2 (file, line and rule).
    """
    known = sorted(path.stem for path in TEMPLATES.glob("*.txt"))
    path = TEMPLATES / f"{name_or_path}.txt" if name_or_path in known else Path(name_or_path)
    try:
        source_bytes = path.read_bytes()
        source = source_bytes.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise ValueError(f"no template {name_or_path!r} ({error.strerror}); give a file or one of {known}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is no UTF-8; a template is UTF-8 text: convert it") from error
    header = _HEADER.match(source)
    if header is None or int(header[2]) >= int(header[3]):
        raise _broken(path, 1, f"begins with {source[:40]!r}; a template begins with a line {{# scores: 1..10 #}}")
    turns = _split_turns(path, source, header.end())
    variables = _check_turns(path, turns, boxed)
    sha256 = hashlib.sha256(source_bytes).hexdigest()
    return Template(header[1] or path.stem, int(header[2]), int(header[3]), tuple(turns.values()), variables, sha256)


def template_for(n: int, demos: bool) -> Template:
    """The package's default for n responses, with worked demonstrations for a model that was not tuned to judge."""
    if n < 1:
        raise ValueError(f"n is {n}; a template shows at least one response: give an example with responses")
    return load_template(("listwise" if n > 1 else "single") + ("_demos" if demos else ""))


def _broken(path: Path, line: int, rule: str) -> ValueError:
    return ValueError(f"{path}:{line}: {rule}")


def _split_turns(path: Path, source: str, start: int) -> dict[int, Message]:
    """The turns, by the line that each one's text begins at; their roles are those of a chat, the last the user's."""
    before, *pieces = re.split(r"^===[ \t]+(\S+)[ \t]*$\n?", source[start:], flags=re.MULTILINE)
    line = source.count("\n", 0, start) + 1
    if before.strip() or not pieces:
        raise _broken(path, line, "text without a turn; behind the header comes a line such as '=== user'")
    line += before.count("\n")
    turns, due = {}, ("system", "user")
    for role, text in zip(pieces[::2], pieces[1::2], strict=True):
        # An optional system turn, then user and assistant by turns: what every chat template accepts.
        if role not in due:
            raise _broken(path, line, f"turn {role!r} where {' or '.join(due)} is due; put the turns in a chat's order")
        due = ("assistant",) if role == "user" else ("user",)
        turns[line + 1 + len(text) - len(text.lstrip("\n"))] = Message(role, text.strip("\n"))
        line += 1 + text.count("\n")
    if role != "user":
        raise _broken(path, max(turns), f"the last turn is the {role}'s; end the template with '=== user'")
    return turns


def _check_turns(path: Path, turns: dict[int, Message], boxed: bool) -> frozenset[str]:
    """The variables that the turns use. Raises ValueError for broken Jinja2 and missing or unknown parts."""
    import jinja2
    from jinja2 import meta, nodes

    environment, used = _environment(), set()
    for line, turn in turns.items():
        try:
            tree = environment.parse(turn.content)
            environment.from_string(turn.content)  # unknown filters and tests show up here only
        except jinja2.TemplateSyntaxError as error:
            raise _broken(path, line + error.lineno - 1, f"{error.message}; correct the Jinja2 syntax") from error
        names = meta.find_undeclared_variables(tree) - set(environment.globals)
        for node in tree.find_all(nodes.Name):
            if node.name in names - VARIABLES:
                known = ", ".join(sorted(VARIABLES))
                raise _broken(path, line + node.lineno - 1, f"unknown variable {node.name!r}; a template has {known}")
        used |= names
    for marker in MARKERS:
        if marker not in turn.content:
            raise _broken(path, line, f"the last turn lacks {marker!r}; judges are tuned to read it: add it")
    if boxed and not any(r"\boxed{" in turn.content for turn in turns.values()):
        raise _broken(path, line, r"no turn asks for '\boxed{'; scores are read from that box: describe it")
    for either in (("conversation", "messages"), ("responses", "response")):
        if not used.intersection(either):
            raise _broken(path, line, f"neither {either[0]!r} nor {either[1]!r} is used; show it with a {{{{ }}}}")
    return frozenset(used)


@functools.lru_cache(maxsize=16)
def _compiled(template: Template) -> tuple[tuple[str, jinja2.Template], ...]:
    return tuple((turn.role, _environment().from_string(turn.content)) for turn in template.turns)


def render(
    example: Example,
    order: tuple[int, ...],
    template: Template,
    hint: Hint | None = None,
    controls: tuple[str, ...] = (),
) -> tuple[Message, ...]:
    """The prompt's chat turns, the last one the user's; `order[i]` is the index of the response shown in slot i.

    The conversation is printed one turn after the other as `User: ...`, `Assistant: ...` and `System: ...` (a system
    turn stands where it stands in the conversation). A hint is shown only when given, by the template's own words.
    Raises ValueError: `order` is no permutation, a hint that does not fit the example, or a template without a place
    for what the example or the call brings.
    """
    n = len(example.responses)
    if sorted(order) != list(range(n)):
        raise ValueError(f"order {order} for {n} responses of {example.id!r}; give a permutation of 0..{n - 1}")
    check_places(example, template, hint)
    safe = functools.partial(neutralise, controls=controls)
    messages = [{"role": message.role, "content": safe(message.content)} for message in example.messages]
    responses = [safe(example.responses[i]) for i in order]
    values = {
        "messages": messages,
        "conversation": "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages),
        "responses": responses,
        "n": n,
        "reference": None if example.reference is None else safe(example.reference),
        "hint": None if hint is None else _shown_hint(example, order, hint),
        "low": template.low,
        "high": template.high,
    } | ({"response": responses[0]} if n == 1 else {})
    return tuple(Message(role, _fill(template, source, values)) for role, source in _compiled(template))


def _fill(template: Template, source: jinja2.Template, values: Mapping[str, Any]) -> str:
    import jinja2

    try:
        return source.render(values)
    except (jinja2.UndefinedError, jinja2.TemplateRuntimeError) as error:
        raise ValueError(f"template {template.name!r}: {error.message}; correct the template") from error


def check_places(example: Example, template: Template, hint: Hint | None = None) -> None:
    """Raise ValueError unless the template has a place for all that the example and the hint bring."""
    n, name, used = len(example.responses), template.name, template.variables
    if "responses" not in used and n > 1:
        raise ValueError(f"template {name!r} shows one response, {example.id!r} has {n}; use 'listwise'")
    if example.reference is not None and "reference" not in used:
        raise ValueError(f"template {name!r} does not show 'reference', which {example.id!r} has; add it, or drop that")
    if hint is not None and "hint" not in used:
        raise ValueError(f"template {name!r} does not show 'hint'; add it, or sample without hints")


def _shown_hint(example: Example, order: tuple[int, ...], hint: Hint) -> dict[str, int | str]:
    """What the hint tells, as a template sees it: `best` counts from 1 in the SHOWN order; numbers are text."""
    n = len(example.responses)
    if n == 1 and hint.score is not None:
        return {"score": f"{hint.score:g}"}
    if n > 1 and hint.best in range(n):
        strength = {} if hint.strength is None else {"strength": f"{hint.strength:g}"}
        return {"best": order.index(hint.best) + 1} | strength
    raise ValueError(f"{hint} for {n} responses of {example.id!r}; give `score` for one, `best` below n for more")


def fit(
    example: Example,
    template: Template,
    limit: int,
    count: Callable[[tuple[Message, ...]], int],
    controls: tuple[str, ...] = (),
) -> tuple[Example, int]:
    """The example cut so that its prompt has at most `limit` tokens, and how many tokens that removed (0: as it was).

    First the longest response loses its middle, then whichever is longest, down to FLOOR characters each; only when
    that is not enough, the conversation's turns and the reference in the same way, whichever is longest, no turn
    preferred. Each cut is marked `[... 1234 characters cut ...]`. `count` is called at most TRIES + 3 times.
    The result does not depend on any order: tokens are counted with the responses in the example's own order, and one
    token a response is kept free for what another order may take. A hint's tokens are the caller's to keep free.
    Raises ValueError when the prompt is too long with every text at its floor.
    """
    order = tuple(range(len(example.responses)))
    spare = len(order) if len(order) > 1 else 0

    def tokens(candidate: Example) -> int:
        return count(render(candidate, order, template, controls=controls)) + spare

    before = longest = tokens(example)
    if before <= limit:
        return example, 0
    for cut, length in (
        (_cut_responses, max(map(len, example.responses))),
        (_cut_context, max(len(text) for text in (*(m.content for m in example.messages), example.reference or ""))),
    ):
        shortest = cut(example, FLOOR)
        least = tokens(shortest)
        if least <= limit:
            fitted, after = _longest_fit(functools.partial(cut, example), tokens, limit, length, least, longest)
            return fitted, before - after
        example, longest = shortest, least
    raise ValueError(
        f"the prompt of {example.id!r} has {longest} tokens with every text cut to {FLOOR} characters; the limit is "
        f"{limit}: use a model with a longer context, a shorter template than {template.name!r}, or fewer responses"
    )


def _longest_fit(
    cut: Callable[[int], Example], tokens: Callable[[Example], int], limit: int, length: int, least: int, most: int
) -> tuple[Example, int]:
    """The example cut to the highest level found that fits, and its tokens: `least` at FLOOR, `most` at `length`."""
    low, high, best = FLOOR, length, cut(FLOOR)
    slack = limit // 128  # near enough: a few tokens are not worth another pass over the text
    for attempt in range(TRIES):
        if high - low <= 1 or limit - least <= slack:
            break
        share = (limit - slack / 2 - least) / (most - least) if attempt % 2 == 0 else 0.5
        level = min(max(low + int((high - low) * share), low + 1), high - 1)
        candidate = cut(level)
        found = tokens(candidate)
        if found <= limit:
            low, least, best = level, found, candidate
        else:
            high, most = level, found
    return best, least


def _cut_responses(example: Example, length: int) -> Example:
    return replace(example, responses=tuple(_shorten(text, length) for text in example.responses))


def _cut_context(example: Example, length: int) -> Example:
    messages = tuple(replace(message, content=_shorten(message.content, length)) for message in example.messages)
    reference = None if example.reference is None else _shorten(example.reference, length)
    return replace(example, messages=messages, reference=reference)


def _shorten(text: str, length: int) -> str:
    """At most `length` characters: the text, or its two ends with a mark of what is missing between them."""
    if len(text) <= length:
        return text
    room = length - len(f" [... {len(text)} characters cut ...] ")
    head, tail = room - room // 2, len(text) - room // 2
    for _ in range(8):  # an accent goes with its letter; a longer pile of marks is no text worth keeping whole
        head -= _joins(text, head)
        tail += _joins(text, tail)
    return f"{text[:head]} [... {tail - head} characters cut ...] {text[tail:]}"


def _joins(text: str, at: int) -> bool:
    """Whether the character at `at` continues the one before it."""
    return 0 < at < len(text) and (unicodedata.category(text[at])[0] == "M" or "\u200d" in text[at - 1 : at + 1])
