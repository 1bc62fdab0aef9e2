"""Official benchmark files as cases to judge, and their metrics."""

from grm_jax.data.benchmarks.cases import Benchmark, Case, Kind, Scored, query_of
from grm_jax.data.benchmarks.loaders import BENCHMARKS, KINDS

__all__ = ["BENCHMARKS", "KINDS", "Benchmark", "Case", "Kind", "Scored", "load", "query_of"]


def load(name: str, data: str) -> Benchmark:
    """A benchmark from its official files, or from a folder that `prepared.prepare` has written.

    Raises FileNotFoundError and DataError as the loaders do, and DataError for a folder that holds another benchmark.
    """
    from grm_jax.data.benchmarks import prepared  # tensorflow-datasets takes seconds to import
    from grm_jax.data.jsonl import DataError

    if not prepared.is_prepared(data):
        return BENCHMARKS[name](data)
    found = prepared.read(data)
    if found.name != name:
        raise DataError(f"{data} holds {found.name}, not {name}: give --benchmark {found.name}")
    return found
