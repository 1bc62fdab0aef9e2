"""What a compiler leaves behind in this process: memory that it has freed and the allocator still holds.

XLA's compiler and the tracing before it free most of what they took when a program is done, in pieces that glibc keeps
for later. On a CPU it stands beside the arrays: 0.7 of 5.6 GiB in a step of RL of a 135M model. `give_back_after_compiling`
returns it a moment after each compilation, when JAX has let go of the program's text; by then the program runs. Where
there is no glibc, it does nothing.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_LONG = 5.0  # seconds; a shorter compilation leaves little
_MOMENT = 1.0


@functools.cache
def give_back_after_compiling() -> None:
    """Return freed memory to the system after each long compilation of this process, from now on."""
    if sys.platform != "linux":
        return
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library
        return

    def compiled(event: str, seconds: float, **_: object) -> None:
        if event == _COMPILED and seconds > _LONG:
            later = threading.Timer(_MOMENT, trim, (0,))
            later.daemon = True
            later.start()

    jax.monitoring.register_event_duration_secs_listener(compiled)
