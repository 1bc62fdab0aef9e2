"""llama.cpp's sampling, through the server of the package xllamacpp, in this process.

1. One request asks for `n_cmpl` = k completions of the prompt, given as token ids: the server reads the prompt once and
   copies its state to the other k - 1 slots (`llama_memory_seq_cp`); then all k slots decode as one batch.
2. `cache_prompt` is off, so that every repeat reads the prompt anew.
3. The variant is how the slots' keys are stored: `split`, a cache for each slot, into which the prompt's is copied, or
   `unified`, one cache for all, where the prompt lies once and every row looks at all cells under a mask.

Its keys are float16 (its default); the sampler chain is the temperature alone.
"""

from __future__ import annotations

import json
import urllib.request

import clock
import xllamacpp

SHARING = {"split": "copied to each sample", "unified": "shared"}


def start(job: clock.Job) -> xllamacpp.Server:
    """A server with k slots that each hold the prompt and its continuation."""
    params = xllamacpp.CommonParams()
    params.model.path = str(job.model)
    params.n_parallel = job.k
    params.kv_unified = job.variant == "unified"
    params.n_ctx = job.k * -(-(len(job.prompt) + job.new_tokens + 1) // 256) * 256
    params.n_predict = job.new_tokens
    params.cache_ram_mib = 0  # prompts of past requests are not kept
    params.fit_params = False
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = clock.threads()
    params.verbosity = 1
    return xllamacpp.Server(params)


def complete(server: xllamacpp.Server, prompt: tuple[int, ...], k: int, new_tokens: int, seed: int) -> list[dict]:
    """The server's answers for k completions of the prompt."""
    body = {
        "prompt": prompt,
        "n_cmpl": k,
        "n_predict": new_tokens,
        "ignore_eos": True,
        "cache_prompt": False,
        "seed": seed,
        "samplers": ["temperature"],
        "temperature": clock.TEMPERATURE,
    }
    request = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        found = json.load(answer)
    return found if isinstance(found, list) else [found]


def main() -> None:
    job = clock.read_job(__doc__)
    server = start(job)

    def sample(seed: int) -> int:
        return sum(each["tokens_predicted"] for each in complete(server, job.prompt, job.k, job.new_tokens, seed))

    clock.measure(
        f"llama.cpp {job.variant}",
        job,
        lambda: complete(server, job.prompt, 1, 8, 0),
        sample,
        f"xllamacpp {xllamacpp.__version__}; prompt read once, its keys {SHARING[job.variant]}",
    )


if __name__ == "__main__":
    main()
