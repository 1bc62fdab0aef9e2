"""Tunix's own sampler (`tunix.generate.sampler.Sampler`) with its Llama 3 model in this model's numbers.

1. k samples are the prompt k times in the batch, as its RL loops do: k prompts are read and stored.
2. Its tokenizer is only asked for ids here: `Ids` gives the prompt's. No id ends or pads a text, so that every sample
   uses its whole budget, and `max_prompt_length` is the prompt's own length: nothing is padded.
3. `top_p` = 1 and no `top_k` take its fast path: one categorical draw, nothing sorted.

It compiles for the shapes of a job, so its warm-up is the whole job. Version 0.1.7 passes no `rope_theta` to its rotary
embedding, so its texts are not this model's; its time is.
"""

from __future__ import annotations

import importlib.metadata
import json

import clock
import jax
import jax.numpy as jnp
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors

_NO_END, _NO_PAD = -1, -2  # ids that no text holds


class Ids:
    """A tokenizer of one text: whatever it is given, the prompt's ids."""

    def __init__(self, prompt: tuple[int, ...]) -> None:
        self.prompt = prompt

    def encode(self, _: str) -> list[int]:
        return list(self.prompt)

    def decode(self, _: list[int]) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # taken for "none"

    def eos_id(self) -> int:
        return _NO_END

    def pad_id(self) -> int:
        return _NO_PAD


def main() -> None:
    job = clock.read_job(__doc__)
    given = json.loads((job.model / "config.json").read_text())
    config = llama.ModelConfig(
        num_layers=given["num_hidden_layers"],
        vocab_size=given["vocab_size"],
        embed_dim=given["hidden_size"],
        hidden_dim=given["intermediate_size"],
        num_heads=given["num_attention_heads"],
        head_dim=given["hidden_size"] // given["num_attention_heads"],
        num_kv_heads=given["num_key_value_heads"],
        rope_theta=given["rope_theta"],
        norm_eps=given["rms_norm_eps"],
        weight_tying=given["tie_word_embeddings"],
    )
    model = create_model_from_safe_tensors(str(job.model), config, dtype=jnp.dtype(job.dtype))
    total = len(job.prompt) + job.new_tokens
    cache = CacheConfig(total, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler = Sampler(model, Ids(job.prompt), cache)

    def sample(seed: int) -> int:
        output = sampler(
            [""] * job.k,
            max_generation_steps=job.new_tokens,
            max_prompt_length=len(job.prompt),
            eos_tokens=[_NO_END],
            temperature=clock.TEMPERATURE,
            top_p=1.0,
            seed=seed,
        )
        return sum(len(tokens) for tokens in output.tokens)

    version = importlib.metadata.version("google-tunix")
    clock.measure(
        "tunix",
        job,
        lambda: sample(0),
        sample,
        f"google-tunix {version}, jax {jax.__version__}; prompt read k times",
    )


if __name__ == "__main__":
    main()
