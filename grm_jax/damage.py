"""Reading what Orbax has written, where damage is a value and not an exception.

A failed read of Orbax leaves its other reads behind, which end later and are nobody's news: they are kept silent here.
"""

from __future__ import annotations

import dataclasses
import gc
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

# What reading a damaged step raises once its record fits what is wanted of it: seen by cutting, emptying and deleting each
# file and folder of a step, and by flipping bytes of each. The last two come from Orbax reading its JSON with names
# spoiled. A read of an array fails with a bare Exception whose cause is one of these.
_DAMAGE = (ValueError, KeyError, FileNotFoundError, NotADirectoryError, AttributeError, AssertionError)
# Tensorstore's errors are ValueErrors that begin with a status; these tell of the storage, not of the step.
_OUTAGE = "UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|INTERNAL|UNKNOWN"
_STORAGE = re.compile(f"{_OUTAGE}|PERMISSION_DENIED|UNAUTHENTICATED")
_PASSES = re.compile(f"({_OUTAGE}|OUT_OF_RANGE|DATA_LOSS): ")
Value = TypeVar("Value")


def of_storage(error: Exception) -> bool:
    """Whether an error tells of storage that failed, and may serve again: no fault of the input or the settings."""
    return isinstance(error, ValueError) and _PASSES.match(str(error)) is not None


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why it does not restore."""

    reason: str


def attempt(read: Callable[[], Value]) -> Value | Fault:
    """What `read` gives, or why the step is damaged; errors that do not mean damage are raised."""
    before = sys.unraisablehook
    sys.unraisablehook = before if isinstance(before, _AbandonedReadsUnsaid) else _AbandonedReadsUnsaid(before)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
        found = _caught(read)
        if isinstance(found, Fault):
            gc.collect()  # the other reads, now; some end later, in Tensorstore's threads, so the hook stays
        else:
            sys.unraisablehook = before
    return found


def _caught(read: Callable[[], Value]) -> Value | Fault:
    try:
        return read()
    except Exception as error:
        cause = error.__cause__ if type(error) is Exception else error  # Orbax wraps what Tensorstore says
        if not isinstance(cause, _DAMAGE) or _STORAGE.match(str(cause)):
            raise
        reason = " ".join(str(cause).split())
        return Fault(f"{type(cause).__name__}: {reason if len(reason) <= 300 else f'{reason[:296]} ...'}")


@dataclasses.dataclass(frozen=True)
class _AbandonedReadsUnsaid:
    """When a read fails, Orbax leaves the step's other reads, and Python would print a page about each as it ends.

    Some have not even begun: where warnings are errors, what Python warns of such a coroutine comes here too.
    """

    otherwise: Callable[[Any], object]

    def __call__(self, ignored: Any) -> None:
        said = str(ignored.exc_value)
        begun = "while reading array index" in said or said == "Event loop is closed"
        if not begun and not said.endswith("was never awaited"):
            self.otherwise(ignored)
