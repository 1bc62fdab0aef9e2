"""Every test runs on 8 simulated CPU devices, with warnings as errors and silent rank promotion refused.

GRM_TEST_PLATFORM=cuda runs them on this machine's GPU instead, with products of float32 in float32: test_gpu.py is made
for that, and no other file was tried.
"""

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = os.environ.get("GRM_TEST_PLATFORM", "cpu")
# Programs here run a few times at most: few of LLVM's passes and, where that can be said, no emitters of fusions compile
# them in half the time. Flags that are set already come last and win, so the suite runs with XLA's own under
# XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true".
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        # jaxlib 0.11 has no such flag, and refuses it
        *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
        os.environ.get("XLA_FLAGS", ""),
    ]
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

with install_import_hook("grm_jax", "beartype.beartype"):  # shapes of public functions are checked at every call
    import grm_jax  # noqa: F401

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
if os.environ["JAX_PLATFORMS"] != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def bucket() -> Iterator[dict[str, str]]:
    """The environment of a client of Google storage, emulated on this machine, with an empty bucket called judge."""
    import storage  # here, as other tests run without the emulator too

    with storage.bucket("judge") as environment:
        yield environment


def pytest_collection_finish() -> None:
    """What is there by now stays, and is not looked through again by each of the many collections of garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
