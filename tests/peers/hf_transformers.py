"""transformers' `generate` with `num_return_sequences` = k.

It repeats the prompt k times BEFORE it reads it, so k prompts are read and stored. Attention and cache are its defaults
(sdpa, dynamic). Nothing compiles: a short warm-up is enough.
"""

from __future__ import annotations

import clock
import torch
import transformers


def main() -> None:
    job = clock.read_job(__doc__)
    torch.set_num_threads(clock.threads())
    model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype)).eval()
    model.generation_config.eos_token_id = None  # every sample uses its whole budget
    prompt = torch.tensor([job.prompt])

    def generate(k: int, new_tokens: int, seed: int) -> int:
        torch.manual_seed(seed)
        with torch.inference_mode():
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=clock.TEMPERATURE,
                top_k=0,
                top_p=1.0,
                num_return_sequences=k,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        return tokens[:, prompt.shape[1] :].numel()

    clock.measure(
        "transformers",
        job,
        lambda: generate(1, 8, 0),
        lambda seed: generate(job.k, job.new_tokens, seed),
        f"transformers {transformers.__version__}, torch {torch.__version__}; prompt read k times",
    )


if __name__ == "__main__":
    main()
