"""What a compiled program does, counted from its text (optimised HLO): FLOPs, bytes, and collectives by mesh axis.

XLA's own `cost_analysis` counts the body of a loop once. Here each instruction counts as often as it runs:
1. `hlo_text.parse` reads the computations of a module, each a list of instructions with shapes;
2. `costs` walks from the entry, into fusions, calls, branches and loops, whose bodies count as often as their trip count,
   which XLA writes down, or their condition; a loop without one counts as often as the caller says;
3. what is counted is kept by phase: the innermost `jax.named_scope` among PHASES in an instruction's name.

Bytes are those that an instruction outside of fusions reads from the device's memory and writes to it, slices at their own
size; what the compiler keeps on the chip between two instructions, as it says in an array's layout, moves nothing. A
collective's bytes are those that one device sends.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from grm_jax.plan.hlo_text import (
    Computations,
    Instruction,
    array_bytes,
    called,
    in_memory,
    parse,
    shapes,
    size,
    trips,
    width,
)

PHASES = ("prefill", "decode", "reference", "gradient", "update")
SLICES = "slices"
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_FREE = frozenset(
    {
        "parameter",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "constant",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
    }
    | {"while", "conditional", "call", "opt-barrier", "async-start", "async-update", "async-done", "copy-done"}
)


@dataclasses.dataclass
class Cost:
    """Of one device. collectives: (opcode, mesh axes) -> (how many, bytes sent); kernels: name -> how often it runs.

    Those that join slices have no axes but SLICES: their bytes go over the network, the others' over the links.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[tuple[str, str], tuple[float, float]] = dataclasses.field(default_factory=dict)
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)

    def add_collective(self, kind: str, axes: str, count: float, size: float) -> None:
        before = self.collectives.get((kind, axes), (0.0, 0.0))
        self.collectives[kind, axes] = before[0] + count, before[1] + size

    @property
    def sent(self) -> float:
        return sum(size for (_, axes), (_, size) in self.collectives.items() if axes != SLICES)

    @property
    def crossed(self) -> float:
        return sum(size for (_, axes), (_, size) in self.collectives.items() if axes == SLICES)


def costs(text: str, mesh: Mapping[str, int], steps: int, slices: int = 1) -> dict[str, Cost]:
    """The cost of each phase, on one device.

    mesh: its axes' sizes, within one of the slices; steps: trips of a loop that XLA has no count of.
    """
    computations, entry = parse(text)
    found: dict[str, Cost] = {}
    for phase, instruction, times, within, fused in _walk(computations, entry, steps):
        cost = found.setdefault(phase, Cost())
        share = mesh.get("expert", 1) if _is_grouped(instruction) else 1  # rows of other devices' experts are skipped
        cost.flops += times * product_flops(instruction, within) / share
        kind = instruction.opcode.removesuffix("-start")
        if kind in _COLLECTIVES and not instruction.opcode.endswith("-done"):
            cost.add_collective(kind, axes_of(instruction.rest, mesh), times, times * _sent(instruction, within, mesh))
        if instruction.opcode == "send" and (
            between := re.search(r'megascale_transfer_type="(\w+)"', instruction.rest)
        ):
            kind, (whole, *_) = between[1].lower().replace("_", "-"), shapes(instruction.type)
            sent = math.prod(whole[1]) * width(whole[0]) * _share(kind, slices)
            cost.add_collective(kind, SLICES, times, times * sent)
        if instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.rest:
            name = re.sub(r"(_segmented|_residuals|_no_residuals|_clone|[.\d])+$", "", instruction.name)
            cost.kernels[name] = cost.kernels.get(name, 0.0) + times
        if not fused and instruction.opcode not in _FREE:
            cost.bytes += times * _moved(instruction, within, computations)
    return found


def _walk(
    computations: Computations, entry: str, steps: int
) -> Iterator[tuple[str, Instruction, float, dict[str, Instruction], bool]]:
    """(phase, instruction, how often it runs, its computation, whether inside of a fusion) of all that is run."""
    waiting: list[tuple[str, float, str, bool]] = [(entry, 1.0, "rest", False)]
    while waiting:
        name, times, around, fused = waiting.pop()
        for instruction in computations.get(name, {}).values():
            phase = _phase(instruction, around)
            yield phase, instruction, times, computations[name], fused
            again = times * (trips(instruction, computations, steps) if instruction.opcode == "while" else 1)
            inside = fused or instruction.opcode == "fusion"
            if instruction.opcode in ("reduce", "sort", "scatter", "map", "reduce-window", "select-and-scatter"):
                continue  # of single numbers
            if instruction.opcode.removesuffix("-start") in _COLLECTIVES:
                continue
            waiting += [(other, again, phase, inside) for other in called(instruction)]


def _phase(instruction: Instruction, around: str) -> str:
    named = re.search(r'op_name="([^"]*)"', instruction.rest)
    parts = named[1].split("/") if named else []
    inside = [re.sub(r"^(?:\w+\()*|\)+$", "", part) for part in parts]
    return next((part for part in reversed(inside) if part in PHASES), around)


def product_flops(instruction: Instruction, within: Mapping[str, Instruction]) -> float:
    """Two for each multiplication of a product; other instructions count nothing.

    TPU programs write batched products as convolutions over dilated arrays, where most places multiply nothing, and the
    grouped products of experts as custom calls, which count as if each row belonged to one of the experts here. Splash
    attention counts whole: the blocks that its mask lets it skip, almost half of a causal one's, are not in the text.
    """
    if instruction.opcode == "custom-call":
        operands = [array for name in instruction.operands if name in within for array in shapes(within[name].type)]
        arrays = [shape for dtype, shape in operands if dtype in ("bf16", "f16", "f32") and len(shape) > 1]
        if phase := re.match(r"splash_mha_(fwd|dq|dkv)", instruction.name):
            return _attention_flops(phase[1], arrays)
        return _experts_flops(arrays, shapes(instruction.type)[0][1]) if _is_grouped(instruction) else 0.0
    sides = [shapes(within[name].type)[0][1] for name in instruction.operands[:2] if name in within]
    if len(sides) < 2 or not shapes(instruction.type):
        return 0.0
    (_, out), *_ = shapes(instruction.type)
    if instruction.opcode == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        return 2.0 * math.prod(out) * math.prod(sides[0][int(d)] for d in dims[1].split(",") if d) if dims else 0.0
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction.rest, sides[0], sides[1], out)
    return 0.0


def _is_grouped(instruction: Instruction) -> bool:
    """Whether it is the product of a mixture's experts, each with its run of rows."""
    said = instruction.name + instruction.rest.split("backend_config")[0]
    return instruction.opcode == "custom-call" and ("ragged" in said or instruction.name.startswith("tgmm"))


def _experts_flops(arrays: Sequence[tuple[int, ...]], out: tuple[int, ...]) -> float:
    """[A, I] by [E, I, O] or [E, O, I] to [A, O]; or, for the matrices' gradient, [A, O] by [A, I] to [E, O, I]."""
    if not arrays or len(arrays[0]) != 2:
        return 0.0
    return 2.0 * math.prod(arrays[0]) * out[1] if len(out) == 2 else 2.0 * arrays[0][0] * math.prod(out[1:])


def _attention_flops(phase: str, arrays: Sequence[tuple[int, ...]]) -> float:
    """Of splash attention for queries [..., N, L, H], keys [..., K, S, H] and values [..., K, S, V], its first arrays."""
    arrays = [shape for shape in arrays if len(shape) > 2]
    if len(arrays) < 3:
        return 0.0
    queries, keys, values = arrays[:3]
    pairs = math.prod(queries[:-1]) * keys[-2]
    products = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}[phase]  # of size H and V: scores again, and each gradient
    return 2.0 * pairs * (products[0] * queries[-1] + products[1] * values[-1])


def _convolution_flops(rest: str, left: Sequence[int], right: Sequence[int], out: Sequence[int]) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    if not labels:
        return 0.0
    places, kernel, result = labels.groups()
    pairs = 1.0
    for at, digit in enumerate(sorted(c for c in places if c.isdigit())):
        pairs *= _pairs(rest, at, left[places.index(digit)], right[kernel.index(digit)], out[result.index(digit)])
    inner = right[kernel.index("i")]
    return 2.0 * out[result.index("b")] * out[result.index("f")] * inner * pairs


def _pairs(rest: str, at: int, size: int, kernel: int, out: int) -> int:
    """How many places of one spatial axis multiply a number that is there, not padding or a gap of a dilation."""

    def given(name: str, default: str) -> str:
        found = re.search(rf"[{{ ]{name}=([\d_x\-]+)", rest)
        return found[1].split("x")[at] if found else default

    stride, gap, step = (int(given(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(given("pad", "0_0").split("_")[0])
    kept = (o * stride - low + k * step for o in range(out) for k in range(kernel))
    return sum(0 <= place <= (size - 1) * gap and place % gap == 0 for place in kept)


def _moved(instruction: Instruction, within: Mapping[str, Instruction], computations: Computations) -> float:
    """Bytes of memory read and written; of a slice, a gathering or an array updated in place, those of the part alone."""
    operands = [within[name].type for name in instruction.operands if name in within]
    if instruction.opcode in ("dynamic-slice", "gather"):
        return min(size(instruction.type), in_memory(operands[0])) + in_memory(instruction.type)
    if instruction.opcode == "dynamic-update-slice":
        return in_memory(operands[1]) + min(size(operands[1]), in_memory(instruction.type))
    if instruction.opcode.endswith("-done"):
        return 0.0  # its start has counted it
    if instruction.opcode.endswith("-start"):
        # A copy gives (result, operand, ...), all others (operands, results, ...).
        taken = sum(len(array_bytes(type_)) for type_ in operands)
        first = 0 if instruction.opcode == "copy-start" else taken
        results = array_bytes(instruction.type)[first : first + taken]
        most = sum(bytes_ for bytes_, _ in results) if instruction.opcode == "slice-start" else math.inf
        return min(sum(map(in_memory, operands)), most) + sum(bytes_ for bytes_, held in results if held)
    if instruction.opcode != "fusion":
        return in_memory(instruction.type) + sum(map(in_memory, operands))
    inside = computations.get(next(iter(called(instruction)), ""), {})
    read = sum(_read(inside, i, in_memory(type_)) for i, type_ in enumerate(operands))
    roots = [other for other in inside.values() if other.root]
    if roots and roots[0].opcode == "tuple":
        roots = [inside[name] for name in roots[0].operands if name in inside]
    results = array_bytes(instruction.type)
    if len(roots) != len(results):
        return read + in_memory(instruction.type)
    for root, (bytes_, held) in zip(roots, results, strict=True):
        updated = root.opcode == "dynamic-update-slice" and root.operands[1] in inside
        read += held * (size(inside[root.operands[1]].type) if updated else bytes_)
    return read


def _read(inside: Mapping[str, Instruction], index: int, whole: int) -> float:
    """Bytes of a fusion's operand that it reads: slices or rows of it, where all that uses it takes some."""
    name = next((i.name for i in inside.values() if i.opcode == "parameter" and i.inner == str(index)), None)
    users = [i for i in inside.values() if name in i.operands]
    if not users or not whole:
        return whole
    parts = 0.0
    for user in users:
        if user.opcode in ("dynamic-slice", "gather") and user.operands[0] == name:
            parts += size(user.type)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # updated in place
        else:
            return whole
    return min(parts, whole)


def groups_of(rest: str, devices: int) -> list[int]:
    """The first group of devices that a collective joins; by default all."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return [int(d) for d in listed[1].split(",")]
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
    if pairs:
        return [int(pairs[1]), int(pairs[2])]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
    if named:
        return _named_group(*named.groups())
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if not iota:
        return list(range(devices))
    ids = np.arange(devices).reshape([int(d) for d in iota[2].split(",")])
    if iota[3]:
        ids = ids.transpose([int(d) for d in iota[3].split(",")])
    return ids.reshape([int(d) for d in iota[1].split(",")])[0].ravel().tolist()


def _named_group(mesh: str, chosen: str) -> list[int]:
    """The first group along named axes, such as "'a'=2,'b'=4" and "'b'", or a part of one, "'b':(2)2" (behind, size)."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    ids, taken = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values())), []
    for name, before, count in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", chosen):
        whole = sizes[name]
        before, count = (int(before), int(count)) if count else (1, whole)
        taken.append((list(sizes).index(name), whole // (before * count), count))
    offsets = np.zeros(1, np.int64)
    strides = [math.prod(ids.shape[i + 1 :]) for i in range(ids.ndim)]
    for axis, behind, count in taken:
        offsets = (offsets[:, None] + np.arange(count)[None] * behind * strides[axis]).ravel()
    return offsets.tolist()


def axes_of(rest: str, mesh: Mapping[str, int]) -> str:
    """The mesh axes along which a collective's first group lies, such as "fsdp" or "data+fsdp"."""
    sizes = tuple(mesh.values())
    group = groups_of(rest, math.prod(sizes))
    places = np.array(np.unravel_index(group, sizes))
    varying = [name for name, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1]
    return "+".join(varying) or "none"


def _sent(instruction: Instruction, within: Mapping[str, Instruction], mesh: Mapping[str, int]) -> float:
    """Bytes that a device sends."""
    devices = len(groups_of(instruction.rest, math.prod(mesh.values())))
    operands = sum(size(within[name].type) for name in instruction.operands if name in within)
    return operands * _share(instruction.opcode.removesuffix("-start"), devices)


def _share(kind: str, members: int) -> float:
    """How often each member sends what it brings, by the ring algorithms: to sum is to scatter, then to gather."""
    scattered = (members - 1) / members
    often = {"all-gather": members - 1, "all-reduce": 2 * scattered, "collective-permute": 1, "one-to-one": 1}
    return often.get(kind, scattered)


def loops_that_gather(text: str, phase: str, least: int) -> Sequence[str]:
    """Gatherings of at least so many bytes within the loops of a phase: none is to be in a decoding loop."""
    computations, entry = parse(text)
    found = []
    for where, instruction, times, within, _ in _walk(computations, entry, steps=1000):
        kind = instruction.opcode.removesuffix("-start")
        gathered = kind == "all-gather" and times >= 1000
        if (
            where == phase
            and gathered
            and sum(size(within[n].type) for n in instruction.operands if n in within) >= least
        ):
            found.append(f"{instruction.name} {instruction.type}")
    return found
