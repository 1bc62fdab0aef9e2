"""Generative reward models in JAX: `grm_jax.load(...)` gives a judge; `python -m grm_jax.main` is the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grm_jax.datatypes import Example, Judgment, Message, Usage, Verdict

if TYPE_CHECKING:
    from grm_jax.baselines import BradleyTerry, Cloud, PairRm
    from grm_jax.grm import Grm
    from grm_jax.meta_rm import MetaRm

__version__ = "0.1.0"
__all__ = ["Example", "Grm", "Judgment", "Message", "Usage", "Verdict", "load", "load_baseline", "load_meta_rm"]


def load(model: str = "smollm2-135m", **options: Any) -> Grm:
    """A judge over the named model, or over a Hugging Face folder or GGUF file; see `grm_jax.grm.load`."""
    from grm_jax.grm import load as load_grm  # jax is imported when a model is, not for `--help`

    return load_grm(model, **options)


def load_meta_rm(path: str, **options: Any) -> MetaRm:
    """A meta RM from a folder, for `grm.score(..., meta_rm=...)`; see `grm_jax.meta_rm.load`."""
    from grm_jax.meta_rm import load as load_guide

    return load_guide(path, **options)


def load_baseline(kind: str, path: str, **options: Any) -> BradleyTerry | PairRm | Cloud:
    """A scalar reward model, of kind "bradley_terry", "pair_rm" or "cloud"; see `grm_jax.baselines.load`."""
    from grm_jax.baselines import load as load_scalar

    return load_scalar(kind, path, **options)


def __getattr__(name: str) -> Any:
    if name == "Grm":
        from grm_jax.grm import Grm

        return Grm
    raise AttributeError(f"module 'grm_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
