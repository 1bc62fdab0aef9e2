"""How prompts are cut into what they share and padded to few sizes, on the host: each size is compiled once."""

from __future__ import annotations

from collections.abc import Sequence


def power_of_two(n: int, least: int) -> int:
    """The bucket of n: the smallest power of two times `least` that holds it; 0 holds 0."""
    return 0 if n == 0 else max(least, 1 << (n - 1).bit_length())


def stepped(n: int, least: int, step: int) -> int:
    """As `power_of_two`, with buckets between: multiples of `step`, or of an eighth of that power where it is more."""
    whole = power_of_two(n, least)
    apart = max(step, whole // 8)
    return min(whole, -(-n // apart) * apart)


def common_prefix(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens that all prompts start with, short of each one's last token, which is always fed."""
    first, last = min(prompts), max(prompts)  # in lexicographic order all others lie between them
    shortest = min(map(len, prompts)) - 1
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return tuple(first[: min(same, shortest)])
