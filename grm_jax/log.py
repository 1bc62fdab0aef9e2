"""One logger for the package: plain lines on standard error, from process 0 only."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("grm_jax")


def to_stderr(level: int = logging.INFO, process_index: int = 0) -> None:
    """Send the package's log lines to standard error; other processes than 0 only warn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(level if process_index == 0 else logging.WARNING)
    logger.propagate = False
