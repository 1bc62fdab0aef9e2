"""Every test runs on 8 simulated CPU devices, with warnings as errors and silent rank promotion refused.

GRM_TEST_PLATFORM=cuda runs them on this machine's GPU instead, with products of float32 in float32: test_gpu.py is made
for that, and no other file was tried.
"""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("GRM_TEST_PLATFORM", "cpu")
# All of XLA's passes, but few of LLVM's: programs here run a few times at most, and compile a good deal faster so.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

with install_import_hook("grm_jax", "beartype.beartype"):  # shapes of public functions are checked at every call
    import grm_jax  # noqa: F401

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
if os.environ["JAX_PLATFORMS"] != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")
