"""Chat templates: released ones compiled, and conversations put into the turns that they take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any


class TemplateRefusal(ValueError):
    """A chat template called raise_exception: it does not take these turns."""


def plain_turns(turns: Sequence[tuple[str, str]], add_generation_prompt: bool) -> str:
    """Turns for a model without a template: "User: ..." and "Assistant: ...", an empty line between."""
    lines = [content if role == "system" else f"{role.capitalize()}: {content}" for role, content in turns]
    return "\n\n".join([*lines, "Assistant:"] if add_generation_prompt else lines)


def fold(turns: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """System texts in front of the next user turn (a turn of their own if none follows), equal neighbours joined."""
    folded: list[tuple[str, str]] = []
    system = ""
    for role, content in [*turns, ("user", "")] if turns[-1][0] == "system" else turns:
        if role == "system":
            system = _join(system, content)
            continue
        if role == "user":
            content, system = _join(system, content), ""
        if folded and folded[-1][0] == role:
            content = _join(folded.pop()[1], content)
        folded.append((role, content))
    return (*folded, ("user", system)) if system else tuple(folded)


def _join(first: str, second: str) -> str:
    return "\n\n".join(text for text in (first, second) if text)


def _refuse(message: str) -> None:
    raise TemplateRefusal(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja2's own tojson escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@lru_cache(maxsize=32)
def compiled(source: str) -> Any:
    """A template in the environment that released ones are written for; ValueError for a syntax error."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the assistant's tokens for training; here its body is printed as it is."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template has a syntax error in line {error.lineno}: {error.message}; put a correct one in "
            "chat_template.jinja"
        ) from error
