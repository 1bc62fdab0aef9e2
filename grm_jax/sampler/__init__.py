"""Floor 3: from prompts to sampled completions."""

from grm_jax.sampler.batching import generate, sample
from grm_jax.sampler.draw import Sampling
from grm_jax.sampler.requests import Completion, Forcing, Plan, Request, common_prefix

__all__ = ["Completion", "Forcing", "Plan", "Request", "Sampling", "common_prefix", "generate", "sample"]
