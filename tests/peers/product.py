"""The product's own sampling, through its public API: the prompt is read once, and its k samples share those keys.

It compiles, so its warm-up is the whole job. The keys have the model's dtype.
"""

from __future__ import annotations

import clock
import jax
import jax.numpy as jnp

from grm_jax.grm import load
from grm_jax.sampler import Sampling, generate


def main() -> None:
    job = clock.read_job(__doc__)
    grm = load(str(job.model), dtype=jnp.dtype(job.dtype))

    def sample(seed: int) -> int:
        key = jax.random.key(seed, impl="threefry2x32")
        sampling = Sampling(temperature=clock.TEMPERATURE)  # no end ids: every sample uses its whole budget
        [samples] = generate(grm.model, [job.prompt], job.k, key, max_new_tokens=job.new_tokens, sampling=sampling)
        return sum(len(completion.tokens) for completion in samples)

    clock.measure("grm_jax", job, lambda: sample(0), sample, f"jax {jax.__version__}; prompt read once")


if __name__ == "__main__":
    main()
