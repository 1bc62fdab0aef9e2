r"""From an example to the chat turns that a judge reads.

1. `load_template` reads a template file: a header that says what the judge writes, then turns (`=== user` lines split
   the SOURCE, so that no text of an example can open a turn), each a Jinja2 text rendered in the sandbox.
2. `fit` shortens an example whose prompt is over the limit: the middle of the longest response first, always marked.
3. `render` fills the template with the conversation and the responses in the order asked for. Text that is not the
   template's own goes through `neutral.neutralise`, so that it cannot pass for a marker, a score box or a control token.

Markers: docs/spct.md section 2. Departure: instructions, criteria and output format stand before the conversation,
so that all prompts of a run share the longest head.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grm_jax.datatypes import Example, Message
from grm_jax.neutral import neutralise

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
_FITTING = 16  # examples in a row that fit: shorter ones will too
_FAULTS = 20  # examples that do not fit, named at most
TRIES = 16  # prompts counted per search for the cut

Kind = Literal["scores", "choice", "text"]
_HEADER = re.compile(
    r"\s*\{#\s*(?:name:\s*(?P<name>[\w.-]+)\s*;\s*)?"
    r"(?:scores:\s*(?P<low>\d+)\s*\.\.\s*(?P<high>\d+)|(?P<kind>choice|text))\s*#\}[ \t]*\n"
)


@dataclass(frozen=True)
class Template:
    """A template file; each turn's content is Jinja2 source over `variables`.

    What its box holds: `scores`, one a response, from `low` to `high`; or a `choice`, the best response's number, which is
    read as the score 1 for that response and 0 for the others; a `text` has no box.
    """

    name: str
    kind: Kind
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


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def load_template(name_or_path: str, boxed: bool = True) -> Template:
    """A template of the package by its name, or one from a local file; not `boxed`: a text's (a meta RM's, a critic's).

    Raises ValueError: an unknown name (lists the known ones); a file of the other kind, without header, turns, needed
    markers or needed variables, or with broken Jinja2 (file, line and rule).
    """
    path = template_path(name_or_path)
    try:
        source = path.read_bytes()
    except OSError as error:
        known = sorted(path.stem for path in TEMPLATES.glob("*.txt"))
        raise ValueError(f"no template {name_or_path!r} ({error.strerror}); give a file or one of {known}") from error
    return read_template(source, str(path), boxed)


def template_path(name_or_path: str) -> Path:
    """Where a template of that name, or the file, is."""
    packaged = TEMPLATES / f"{name_or_path}.txt"
    return packaged if packaged in TEMPLATES.glob("*.txt") else Path(name_or_path)


def read_template(source_bytes: bytes, path: str, boxed: bool = True) -> Template:
    """The template in a file's bytes. Raises ValueError as `load_template` does; `path` names the file."""
    try:
        source = source_bytes.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is no UTF-8; a template is UTF-8 text: convert it") from error
    header = _HEADER.match(source)
    if header is None or (not header["kind"] and int(header["low"]) >= int(header["high"])):
        raise _broken(path, 1, f"begins with {source[:40]!r}; a template begins with a line {{# scores: 1..10 #}}")
    kind: Kind = header["kind"] or "scores"
    if boxed == (kind == "text"):
        asked = (
            "scores or a choice, this one a text" if boxed else f"a text, this one {kind}: begin it with {{# text #}}"
        )
        raise _broken(path, 1, f"a template for this asks for {asked}")
    turns = _split_turns(path, source, header.end())
    variables = _check_turns(path, turns, boxed)
    low, high = (0, 1) if header["kind"] else (int(header["low"]), int(header["high"]))
    sha256 = hashlib.sha256(source_bytes).hexdigest()
    name = header["name"] or Path(path).stem
    return Template(name, kind, low, high, tuple(turns.values()), variables, sha256)


def template_for(n: int, demos: bool) -> Template:
    """The package's default for n responses, with worked demonstrations for a model that was not tuned to judge."""
    if n < 1:
        raise ValueError(f"n is {n}; a template shows at least one response: give an example with responses")
    return load_template(("listwise" if n > 1 else "single") + ("_demos" if demos else ""))


def _broken(path: str, line: int, rule: str) -> ValueError:
    return ValueError(f"{path}:{line}: {rule}")


def _split_turns(path: str, source: str, start: int) -> dict[int, Message]:
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


def _check_turns(path: str, turns: dict[int, Message], boxed: bool) -> frozenset[str]:
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
    if template.kind == "choice" and n < 2:
        raise ValueError(f"template {name!r} asks for a choice, {example.id!r} has one response; use 'single'")
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

    return cut_to(example, limit, tokens, f"a shorter template than {template.name!r}, or fewer responses")


class DoesNotFit(ValueError):
    """An example with more tokens than the limit when every text is at its floor."""


def check_fit(
    examples: Sequence[Example], template: Template, limit: int, count: Callable[[tuple[Message, ...]], int],
    controls: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Raise ValueError that names the examples which `fit` cannot cut to the limit, before anything is done with others.

    They are tried from the longest on, with every text at its floor, until _FITTING in a row fit or twenty have not: not
    all of a large file are rendered for the sake of a few.
    """

    def least(example: Example) -> int:
        texts = (*(message.content for message in example.messages), *example.responses, example.reference or "")
        return sum(len(_shorten(text, FLOOR).encode()) for text in texts)

    faults, fitting = [], 0
    for example in sorted(examples, key=least, reverse=True):
        try:
            fit(example, template, limit, count, controls)
            fitting += 1
        except DoesNotFit as error:
            faults.append(str(error))
            fitting = 0
        if fitting == _FITTING or len(faults) == _FAULTS:
            break
    if faults:
        many = f"{len(faults)}{' or more' * (len(faults) == _FAULTS)} examples do not fit"
        raise ValueError("\n  ".join([f"{many}, take them out, or leave their prompts more tokens:", *faults]))


def cut_to(example: Example, limit: int, tokens: Callable[[Example], int], otherwise: str) -> tuple[Example, int]:
    """The example cut, as `fit` says, so that `tokens` of it are at most `limit`, and how many that removed.

    Raises ValueError when there are more with every text at its floor; `otherwise`: what helps besides a longer context.
    """
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
    raise DoesNotFit(
        f"the prompt of {example.id!r} has {longest} tokens with every text cut to {FLOOR} characters; the limit is "
        f"{limit}: use a model with a longer context, {otherwise}"
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
