"""A plan as tables: memory by kind, work by phase with the bound that it meets, collectives by mesh axis."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from grm_jax.plan.chips import GIB, Chip
from grm_jax.plan.hlo import Cost


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known of one program on one device; bytes. `failed` is why it did not compile, with its largest arrays."""

    name: str
    seconds: float
    arguments: dict[str, float]  # kind -> bytes
    temporaries: float = 0.0  # at the peak, with what is returned and lies in no argument
    phases: dict[str, Cost] = dataclasses.field(default_factory=dict)
    beside: float = 0.0  # held meanwhile, and no argument
    failed: str | None = None

    @property
    def total(self) -> float:
        """Bytes held at most."""
        return self.beside + sum(self.arguments.values()) + self.temporaries


def shard_bytes(tree: Any) -> float:
    """Bytes of a pytree of ShapeDtypeStructs on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return float(total)


def bound(cost: Cost, chip: Chip, peak: float) -> tuple[float, str]:
    """(Seconds at least, what bounds them): products, memory, links or network, whichever takes longest alone."""
    seconds = {"FLOPs": cost.flops / peak, "memory": cost.bytes / chip.bandwidth, "links": cost.sent / chip.links}
    if chip.network:
        seconds["network"] = cost.crossed / chip.network
    name = max(seconds, key=seconds.__getitem__)
    return seconds[name], name


def fits(program: Compiled, chip: Chip | None) -> bool:
    return program.failed is None and (chip is None or program.total <= chip.memory)


def text(
    programs: Sequence[Compiled], chip: Chip | None, peak: float | None, mesh: Mapping[str, int], slices: int = 1
) -> str:
    """All tables, and for what does not fit the recipe's fields that would help."""
    console = Console(file=io.StringIO(), width=160)
    shape = " x ".join(f"{name} {size}" for name, size in mesh.items())
    if slices > 1:
        shape += f"; {slices} slices along data" + (
            "" if chip and chip.network else ", whose network's speed is not known"
        )
    console.print(f"mesh: {shape}", highlight=False)
    console.print(_memory(programs, chip))
    for program in programs:
        if program.failed:
            console.print(f"{program.name} does not compile: {program.failed}", highlight=False, markup=False)
        else:
            console.print(_work(program, chip, peak))
    if not all(fits(program, chip) for program in programs):
        console.print(ADVICE, highlight=False, markup=False)
    return console.file.getvalue()


ADVICE = """What lowers memory: microbatch_prompts or microbatch_rows (activations), remat = "block" (activations),
mesh.fsdp (weights, optimizer, reference), mesh.tensor (weights of decoding, cache), prompts_per_step, group or slots
(cache), max_prompt_tokens and max_new_tokens (cache, activations), kl_coef = 0 (no reference), lora.rank (optimizer),
optimizer.state_dtype = "bfloat16" (optimizer)."""


def _memory(programs: Sequence[Compiled], chip: Chip | None) -> Table:
    kinds = list(dict.fromkeys(kind for program in programs for kind in program.arguments))
    title = "GiB a device" + (f", of {chip.memory / GIB:.0f}" if chip else "")
    table = Table("program", "compiled in", *kinds, "temporaries", "held beside", "in all", "fits", title=title)
    for program in programs:
        given = [f"{program.arguments.get(kind, 0) / GIB:.2f}" for kind in kinds]
        verdict = ("yes" if fits(program, chip) else "no") if chip or program.failed else "-"
        sizes = (program.temporaries, program.beside, program.total)
        told = ["-"] * 3 if program.failed else [f"{x / GIB:.2f}" for x in sizes]
        table.add_row(program.name, f"{program.seconds:.0f} s", *given, *told, verdict)
    return table


def _work(program: Compiled, chip: Chip | None, peak: float | None) -> Table:
    table = Table(
        "phase", "TFLOP", "GB moved", "GB sent", "seconds at least", "bound", "collectives", title=program.name
    )
    total = 0.0
    for phase, cost in sorted(program.phases.items(), key=lambda item: -item[1].flops):
        sent = cost.sent + cost.crossed
        if not (cost.flops or sent or cost.bytes > 1e6):
            continue
        seconds, name = bound(cost, chip, peak) if chip and peak else (math.nan, "-")
        total += 0 if math.isnan(seconds) else seconds
        joined = ", ".join(
            f"{count:.0f} {kind} over {axes} ({size / 1e9:.3g} GB)"
            for (kind, axes), (count, size) in sorted(cost.collectives.items(), key=lambda item: -item[1][1])[:4]
        )
        shown = "-" if math.isnan(seconds) else f"{seconds:.3g}"
        table.add_row(
            phase, f"{cost.flops / 1e12:.4g}", f"{cost.bytes / 1e9:.4g}", f"{sent / 1e9:.4g}", shown, name, joined
        )
    table.add_row("all", "", "", "", f"{total:.3g}" if total else "-", "", "")
    kernels: dict[str, float] = {}
    for cost in program.phases.values():
        for kernel, count in cost.kernels.items():
            kernels[kernel] = kernels.get(kernel, 0.0) + count
    table.caption = "kernels: " + (", ".join(f"{count:.0f} {name}" for name, count in kernels.items()) or "none")
    return table


def shortened(error: str) -> str:
    """The compiler's word on what did not fit: the sum, and the largest arrays."""
    lines = error.splitlines()
    kept = [
        line.strip() for line in lines if re.search(r"Used .* of|Exceeded|Largest program|Size:|Shape:|Operator:", line)
    ]
    return "\n  ".join(kept[:20] or lines[:3])
