"""One mesh for every program, and tables from the parameters' logical axes to its axes.

The mesh's axes, and what each splits:
1. `data`: the batch, nothing else;
2. `fsdp`: the batch too, and in training every parameter over its model width, gathered when it is used;
3. `tensor`: heads, MLP and vocabulary;
4. `expert`: the experts of a mixture, and elsewhere the batch.

`TRAINING` and `DECODING` are the two layouts of parameters. A decoding loop uses every weight once a token, so there
`fsdp` splits no weights: they are gathered once, before the loop. Programs are plain `jax.jit`: arrays carry
`NamedSharding`s, and the compiler places the collectives. `place` is where arrays of the host become global ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grm_jax.config import MeshSizes

Tree = TypeVar("Tree")
Rules = Mapping[str, str | None]

AXES = ("data", "fsdp", "tensor", "expert")
ROWS = ("data", "fsdp", "expert")  # the mesh axes that split a batch
TRAINING: Rules = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "embed": "fsdp",
    "head": None,
}
DECODING: Rules = {**TRAINING, "embed": None}


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, expert: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of data x fsdp x tensor x expert devices, the first ones of `devices` (default: this process's).

    Neighbours in the mesh are neighbours by the links. Devices of several slices, which only a slow network joins, are
    split along `data`. Raises ValueError when a size is not positive, there are fewer devices than the mesh wants, or
    their links allow no such mesh.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    sizes = (data, fsdp, tensor, expert)
    if min(sizes) < 1 or math.prod(sizes) > len(devices):
        raise ValueError(
            f"a mesh of {_shown(sizes)} does not fit {len(devices)} devices: each size is at least 1 and their product "
            f"at most {len(devices)}"
        )
    chosen = devices[: math.prod(sizes)]
    slices = len({getattr(device, "slice_index", 0) for device in chosen})
    if data % slices:
        raise ValueError(
            f"mesh.data = {data} over {slices} slices: they are split along data, make it a multiple of {slices}"
        )
    try:
        if slices > 1:
            within, among = (data // slices, *sizes[1:]), (slices, 1, 1, 1)
            grid = mesh_utils.create_hybrid_device_mesh(within, among, chosen, allow_split_physical_axes=True)
        else:
            grid = mesh_utils.create_device_mesh(sizes, chosen, allow_split_physical_axes=True)
    except (NotImplementedError, AssertionError) as error:
        raise ValueError(
            f"a mesh of {_shown(sizes)} cannot be laid on these devices: {error}; give other sizes"
        ) from error
    return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def lay_out(
    sizes: MeshSizes, devices: int | None = None, everywhere: bool = False, pool: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of these sizes, -1 filled in, over `devices` devices.

    devices: by default all of them; on one CPU as many as the sizes name. everywhere: over all processes, as training
    needs it; else over this process's own devices, unless the sizes name more than these. pool: other devices, all
    of which are used by default. Raises ValueError for sizes that do not multiply to the number of devices.
    """
    given = (sizes.data, sizes.fsdp, sizes.tensor, sizes.expert)
    named = math.prod(size for size in given if size > 0)
    everywhere = pool is not None or (jax.process_count() > 1 and (everywhere or named > jax.local_device_count()))
    pool = list(pool or (jax.devices() if everywhere else jax.local_devices()))
    if devices is not None and everywhere and devices != len(pool):
        raise ValueError(f"devices = {devices}: the mesh is over all {len(pool)} devices there, leave it out")
    if devices is None:
        few = jax.default_backend() == "cpu" and not everywhere
        devices = named if few or (-1 not in given and not everywhere) else len(pool)
    wanted = f"mesh of {_shown(given)}"
    if devices > len(pool):
        raise ValueError(f"{wanted} on {devices} devices: there are {len(pool)}; use no more")
    if devices % named or (-1 not in given and devices != named):
        rule = "the sizes' product has to be that number, or to divide it where one size is -1"
        raise ValueError(f"{wanted} on {devices} devices: {rule}; the sizes given multiply to {named}")
    filled = [devices // named if size == -1 else size for size in given]
    return make_mesh(*filled, devices=pool)


def spans_processes(mesh: Mesh) -> bool:
    """Whether the mesh has devices of other processes: all of them then have to run the same programs."""
    return any(device.process_index != jax.process_index() for device in mesh.devices.flat)


def rows_of(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_microbatch(name: str, size: int, mesh: Mesh) -> None:
    """Raise ValueError unless the rows of a recipe's microbatch, in its field `name`, can be spread over the mesh."""
    parts = rows_of(mesh)
    if size % parts:
        raise ValueError(
            f"{name} = {size} does not divide over {parts} devices: make it a multiple of {parts}, or set devices or mesh"
        )


def parameter_sharding(
    mesh: Mesh, name: str, shape: Sequence[int], axes: Sequence[str | None], rules: Rules = TRAINING
) -> NamedSharding:
    """Where a parameter with these logical axes lies. Raises ValueError, naming it, when a size does not divide."""
    names = [None if axis is None else rules[axis] for axis in axes]
    for size, axis, logical in zip(shape, names, axes, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            fitting = ", ".join(str(n) for n in range(1, mesh.size + 1) if size % n == 0)
            raise ValueError(
                f"{name}: its axis {logical!r} of size {size} does not divide over the mesh axis {axis!r} of "
                f"{mesh.shape[axis]} devices; sizes of {axis!r} that would: {fitting}"
            )
    return _named(mesh, names)


def batch_sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The sharding of an array whose leading axis is the batch; further axes by their logical names."""
    return _named(mesh, [ROWS, *(None if axis is None else TRAINING[axis] for axis in axes)])


def cache_sharding(mesh: Mesh, kv_heads: int) -> NamedSharding:
    """The sharding of cached keys [B, K, S, H]; heads that do not divide are held by all."""
    return batch_sharding(mesh, *(() if kv_heads % mesh.shape["tensor"] else ("kv_heads",)))


def batch_columns(mesh: Mesh | None, rows: int, x: jax.Array) -> jax.Array:
    """Activations [D, R] of R / rows tokens a row, held to be spread by rows, where the mesh has a part for each.

    Without it the compiler may split them over the model's width as it finds it in the weights, and compute all rows on
    every device.
    """
    parts = 1 if mesh is None else rows_of(mesh)
    if mesh is None or mesh.size == 1 or rows % parts:
        return x
    return jax.lax.with_sharding_constraint(x, _named(mesh, (None, ROWS)))


def _named(mesh: Mesh, names: Sequence[str | tuple[str, ...] | None]) -> NamedSharding:
    """A sharding over these mesh axes.

    Mesh axes of one device are left out, as compiled programs leave them out of what they return: the same sharding
    written in another way would compile a program again.
    """
    kept: list[str | tuple[str, ...] | None] = []
    for name in names:
        several = tuple(axis for axis in ((name,) if isinstance(name, str) else name or ()) if mesh.shape[axis] > 1)
        kept.append(several[0] if len(several) == 1 else several or None)
    while kept and kept[-1] is None:
        kept.pop()
    return NamedSharding(mesh, PartitionSpec(*kept))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array, the same on every process, as a global one: each process puts the parts of its own devices."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index], dtype=value.dtype)


def spread(tree: Tree, mesh: Mesh) -> Tree:
    """A pytree of host arrays on the mesh, their rows spread over it. Raises ValueError for rows that do not divide."""
    sharding = batch_sharding(mesh)

    def put(value: Any) -> jax.Array:
        if len(value) % rows_of(mesh):
            raise ValueError(f"{len(value)} rows for {rows_of(mesh)} parts of the mesh: give a multiple of these")
        return place(value, sharding)

    return jax.tree.map(put, tree)


def fetch(tree: Tree, mesh: Mesh) -> Tree:
    """Device arrays as host arrays, whole on every process; all processes of the mesh have to call it together."""
    if spans_processes(mesh):
        tree = _gatherer(mesh)(tree)
    return jax.device_get(tree)


@functools.cache
def _gatherer(mesh: Mesh) -> Any:
    """One function a mesh, so that its programs are compiled once."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def _shown(sizes: Sequence[int]) -> str:
    return f"{' x '.join(AXES)} = {' x '.join(map(str, sizes))}"
