"""The text of a compiled module (optimised HLO) taken apart: computations, instructions, the sizes of their types."""

from __future__ import annotations

import dataclasses
import math
import re

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0}
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_NAMES = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its name, result type as text, opcode, operands' names, what its brackets hold and what follows them."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    inner: str
    rest: str
    root: bool


Computations = dict[str, dict[str, Instruction]]


def parse(text: str) -> tuple[Computations, str]:
    """(Computations by name, the entry's name) of a module's text."""
    found: Computations = {}
    current, entry = "", ""
    for line in text.splitlines():
        if line.endswith("{") and ("->" in line or line.startswith("ENTRY")):
            current = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0].split("(")[0]
            entry = current if line.startswith("ENTRY") else entry
            found[current] = {}
        elif (match := _LINE.match(line)) and current:
            instruction = _instruction(match[1], line[match.end() :], line.lstrip().startswith("ROOT"))
            found[current][instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY computation: this is no text of an HLO module")
    return found, entry


def _instruction(name: str, text: str, root: bool) -> Instruction:
    at = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    type_, text = text[:at], text[at:].lstrip()
    opcode, _, text = text.partition("(")
    end = _closing("(" + text, 0) - 1
    inner = text[:end]
    return Instruction(name, type_, opcode, tuple(_NAMES.findall(inner)), inner, text[end + 1 :], root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    return len(text) - 1


def shapes(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of a type, or of each part of a tuple."""
    return [(dtype, tuple(map(int, dims.split(","))) if dims else ()) for dtype, dims in _SHAPE.findall(type_)]


def size(type_: str) -> int:
    """Bytes of a type."""
    return sum(int(math.prod(shape) * width(dtype)) for dtype, shape in shapes(type_))


def width(dtype: str) -> float:
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 0


def called(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs; a loop's condition is not among them."""
    return [name for group in _CALLED.findall(instruction.rest) for name in re.findall(r"[\w.\-]+", group)]


def trips(instruction: Instruction, computations: Computations, unknown: int) -> int:
    """How often a loop's body runs: as XLA says, else the number that its condition holds a counter against."""
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.rest)
    if found:
        return int(found[1])
    condition = re.search(r"condition=%?([\w.\-]+)", instruction.rest)
    lines = list(computations.get(condition[1], {}).values()) if condition else []
    lines += [line for fused in list(lines) for name in called(fused) for line in computations.get(name, {}).values()]
    limits = [int(line.inner) for line in lines if line.opcode == "constant" and re.fullmatch(r"\d+", line.inner)]
    return max(limits, default=unknown) or unknown


def in_memory(type_: str) -> int:
    """Bytes of a type that lie in the device's memory: arrays kept on the chip have an S in their layout."""
    return sum(bytes_ for bytes_, held in array_bytes(type_) if held)


def array_bytes(type_: str) -> list[tuple[int, bool]]:
    """(Bytes, whether they lie in memory) of each array of a type."""
    found = re.findall(_SHAPE.pattern + r"(\{[^}]*\})?", type_)
    return [(size(f"{dtype}[{dims}]"), "S(" not in layout) for dtype, dims, layout in found]
