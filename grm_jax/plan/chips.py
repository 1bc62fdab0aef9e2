"""What a chip has, by its maker's word: pages cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x, read in November 2026."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one jax.Device: bytes of memory, bytes a second of it, bytes a second that it sends to its neighbours.

    network: bytes a second between slices; None where its page has no word of it.
    """

    memory: float
    bandwidth: float
    links: float
    network: float | None
    accelerator: str  # TPU_ACCELERATOR_TYPE of one host, which libtpu asks for


GIB = 2**30
CHIPS = {
    "v4": Chip(32 * GIB, 1228e9, 300e9, None, "v4-8"),
    "v5e": Chip(16 * GIB, 819e9, 200e9, 3.125e9, "v5litepod-4"),
    "v5p": Chip(95 * GIB, 2765e9, 600e9, 6.25e9, "v5p-8"),
    "v6e": Chip(32 * GIB, 1640e9, 448e9, 12.5e9, "v6e-4"),
    "tpu7x": Chip(96 * GIB, 3690e9, 600e9, 6.25e9, "tpu7x-8"),  # half of a chip, which is two devices
}
