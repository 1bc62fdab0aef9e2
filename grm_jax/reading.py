"""What a judge's text says under its template: scores, or a choice of one response."""

from __future__ import annotations

from collections.abc import Sequence

from grm_jax import scores
from grm_jax.prompts import Template
from grm_jax.scores import ForceTable


def parse(template: Template, text: str, n: int) -> tuple[tuple[int, ...] | None, str | None]:
    """The n scores of a text, in the order shown, or None and the reason why there are none. A text's are (None, None)."""
    if template.kind == "text":
        return None, None
    if template.kind == "choice":
        return scores.parse_choice(text, n)
    return scores.parse(text, n, template.low, template.high)


def numbers_of(template: Template, n: int) -> tuple[int, int, int]:
    """(How many numbers the box holds, the lowest, the highest), with n responses to judge."""
    return (1, 1, n) if template.kind == "choice" else (n, template.low, template.high)


def tail_of(template: Template) -> str:
    """What opens the box where it is forced."""
    return scores.CHOICE_TAIL if template.kind == "choice" else scores.FORCE_TAIL


def force_table(template: Template, token_bytes: Sequence[bytes], n: int) -> ForceTable:
    """The automaton that writes what the box holds, for up to n responses; a choice among exactly n."""
    return scores.force_table(token_bytes, *numbers_of(template, n))
