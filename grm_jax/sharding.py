"""One mesh, and a table from the parameters' logical axes to its axes.

`data` splits the batch, `fsdp` splits parameters over their model width, `tensor` splits heads, MLP and vocabulary,
`expert` splits a mixture's experts.
Programs are plain `jax.jit`: arrays carry `NamedSharding`s, and the compiler places the collectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "expert")
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "embed": "fsdp",
    "head": None,
}


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None, expert: int = 1
) -> Mesh:
    """A mesh of data x fsdp x tensor x expert devices, the first ones of `devices` (default: this process's).

    Raises ValueError when a size is not positive or there are fewer devices than the mesh wants.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    sizes = (data, fsdp, tensor, expert)
    if min(sizes) < 1 or math.prod(sizes) > len(devices):
        raise ValueError(
            f"a mesh of {' x '.join(AXES)} = {' x '.join(map(str, sizes))} does not fit {len(devices)} devices: "
            f"each size is at least 1 and their product at most {len(devices)}"
        )
    return jax.make_mesh(
        sizes, AXES, devices=devices[: math.prod(sizes)], axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
    )


def parameter_sharding(mesh: Mesh, name: str, shape: Sequence[int], axes: Sequence[str | None]) -> NamedSharding:
    """Where a parameter with these logical axes lies. Raises ValueError, naming it, when a size does not divide."""
    names = [None if axis is None else RULES[axis] for axis in axes]
    for size, axis, logical in zip(shape, names, axes, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{name}: its axis {logical!r} of size {size} does not divide over the mesh axis {axis!r} of "
                f"{mesh.shape[axis]} devices; use a divisor of {size}"
            )
    return _named(mesh, names)


def batch_sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The sharding of an array whose leading axis is the batch; further axes by their logical names."""
    return _named(mesh, ["data", *(None if axis is None else RULES[axis] for axis in axes)])


def _named(mesh: Mesh, names: Sequence[str | None]) -> NamedSharding:
    """A sharding over these mesh axes.

    Mesh axes of one device are left out, as compiled programs leave them out of what they return: the same sharding
    written in another way would compile a program again.
    """
    kept = [name if name and mesh.shape[name] > 1 else None for name in names]
    while kept and kept[-1] is None:
        kept.pop()
    return NamedSharding(mesh, PartitionSpec(*kept))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
