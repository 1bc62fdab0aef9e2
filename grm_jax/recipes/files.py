"""Recipes from files and command lines, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from grm_jax.config import parse

Recipe = TypeVar("Recipe")


def load(kind: type[Recipe], args: Sequence[str], prog: str) -> Recipe:
    """The recipe of `--config FILE` (or `kind`'s defaults) with the other arguments' fields changed.

    FILE is a Python file that defines `config()`. Raises ValueError: a file that is missing, lacks `config`, or returns
    another kind of recipe; a field out of its range.
    """
    default = None
    rest = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            raise ValueError("--config without a file: name a Python file such as configs/tiny_rl.py")
        default = read(kind, rest[at + 1])
        del rest[at : at + 2]
    return parse(kind, rest, prog, default)


def read(kind: type[Recipe], file: str) -> Recipe:
    """The recipe that a file's `config()` returns. Raises ValueError as `load` does."""
    if not Path(file).is_file():
        raise ValueError(f"no config {file!r}: give a Python file such as configs/tiny_rl.py")
    found = runpy.run_path(file)
    if not callable(found.get("config")):
        raise ValueError(f"{file} defines no config(): add a function of that name that returns {kind.__name__}(...)")
    recipe = found["config"]()
    if not isinstance(recipe, kind):
        raise ValueError(f"{file} returns {type(recipe).__name__}(...), this command needs {kind.__name__}(...)")
    return recipe


def as_json(recipe: object) -> str:
    """The resolved recipe as JSON, keys sorted: the same recipe gives the same text."""
    return json.dumps(dataclasses.asdict(recipe), indent=1, sort_keys=True)


def check_same(saved: str, recipe: object, free: Mapping[str, Any] | Sequence[str] = ()) -> None:
    """Raise ValueError unless a run's saved recipe is this one, but for the fields in `free`; names those that differ."""
    before, now = json.loads(saved), json.loads(as_json(recipe))
    names = sorted((before.keys() | now.keys()) - set(free))
    differing = [name for name in names if before.get(name) != now.get(name)]
    if differing:
        told = "; ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in differing)
        raise ValueError(
            f"the run in this output was started otherwise: {told}. Give another output, or the old values"
        )
