"""Memory that a compiler leaves behind goes back to the system."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, time
import jax, jax.numpy as jnp
from grm_jax import memory

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

memory._LONG, memory._MOMENT = {long}, 0.01
memory.give_back_after_compiling()
memory.give_back_after_compiling()
x = jnp.ones((8, 8))
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
blocks = [libc.malloc(1 << 16) for _ in range(2000)]
for block in blocks:
    ctypes.memset(block, 1, 1 << 16)
for block in blocks[:-1]:  # the last one keeps what lies below it from going back by itself
    libc.free(block)
before = held()
jax.jit(lambda x: jnp.sin(x) @ x)(x).block_until_ready()
time.sleep(1.0)
print((before - held()) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc and /proc are Linux's")
@pytest.mark.parametrize(("long", "least", "most"), [(0.0, 90, 140), (1e9, -100, 60)])
def test_what_is_free_goes_back_after_a_long_compilation(long, least, most):
    """125 MiB are freed below a block that stays; after a compilation that counts as long they are the system's."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(long=long)], capture_output=True, text=True, check=True, timeout=120
    )
    assert least <= int(done.stdout) <= most
