"""Official benchmark files as cases to judge, and their metrics."""

from grm_jax.data.benchmarks.cases import Benchmark, Case, Scored
from grm_jax.data.benchmarks.loaders import BENCHMARKS

__all__ = ["BENCHMARKS", "Benchmark", "Case", "Scored"]
