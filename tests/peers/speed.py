"""Speed of sampling, side by side: this package, transformers, Tunix's sampler and llama.cpp, on this machine.

    python tests/peers/speed.py --peers-python ENV/bin/python --tunix-python ENV/bin/python --out speed.json

1. The prompt (real text, 1,024 tokens) and the peers' forms of the weights are written into --work, once.
2. In each round, for each k, every engine runs once, one at a time, in a process of its own: it loads, warms up, then
   is timed from the prompt's ids to the last sampled id on the host. The order turns by one each round.
3. A table of tokens/s (median, least and most), then what one engine is to another, round by round, then what k samples
   cost in times of one. All timings go to --out after every process, so an interrupted run keeps what it had.

tests/peers/README.md says how the environments are made and what each peer does with the shared prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import checkpoints

HERE = Path(__file__).parent
_TEXTS = ("listwise.txt", "single.txt")  # of the templates in the package: real text, repeated to the wanted length


@dataclass(frozen=True)
class Engine:
    """A line of the table: which script runs it, in whose environment, from which form of the weights."""

    script: str
    python: str  # product | peers | tunix
    dtype: str
    model: str  # embedded | folder | gguf
    variant: str = ""


ENGINES = {
    "grm_jax-float32": Engine("product.py", "product", "float32", "embedded"),
    "grm_jax-bfloat16": Engine("product.py", "product", "bfloat16", "embedded"),
    "transformers-float32": Engine("hf_transformers.py", "peers", "float32", "folder"),
    "tunix-float32": Engine("tunix_sampler.py", "tunix", "float32", "folder"),
    "llama.cpp-bfloat16-split": Engine("llama_cpp.py", "peers", "bfloat16", "gguf", "split"),
    "llama.cpp-bfloat16-unified": Engine("llama_cpp.py", "peers", "bfloat16", "gguf", "unified"),
}


def prepare(work: Path, prompt_tokens: int) -> dict[str, str]:
    """Write the prompt and the weights that are not there yet; where each is, by name."""
    import grm_jax
    from grm_jax import tokenizer
    from grm_jax.weights.embedded import find_embedded

    source = find_embedded()
    found = {"embedded": "smollm2-135m", "folder": str(work / "folder"), "gguf": str(work / "bf16.gguf")}
    if not (work / "folder" / "model.safetensors").exists():
        checkpoints.write_folder(source, work / "folder")
    if not (work / "bf16.gguf").exists():
        checkpoints.write_gguf(source, work / "bf16.part")
        (work / "bf16.part").rename(work / "bf16.gguf")
    templates = Path(grm_jax.__file__).parent / "templates"
    text = "\n".join((templates / name).read_text() for name in _TEXTS)
    ids = tokenizer.from_gguf(source).encode_plain(text)
    ids = (ids * (prompt_tokens // len(ids) + 1))[:prompt_tokens]
    prompt = work / f"prompt-{prompt_tokens}.json"
    prompt.write_text(json.dumps(ids))
    return found | {"prompt": str(prompt)}


def turns(args: argparse.Namespace) -> Iterator[tuple[int, int, str]]:
    """(round, k, engine) in the order of running."""
    for turn in range(args.rounds):
        for k in args.k:
            shift = turn % len(args.engines)
            for name in [*args.engines[shift:], *args.engines[:shift]]:
                if turn == 0 or name not in args.once:
                    yield turn, k, name


def run(name: str, k: int, args: argparse.Namespace, files: dict[str, str]) -> dict:
    """One process of one engine: what it printed, or `error`."""
    engine = ENGINES[name]
    python = getattr(args, f"{engine.python}_python")
    command = [python, str(HERE / engine.script), "--prompt", files["prompt"], "--k", str(k)]
    command += ["--new-tokens", str(args.new_tokens), "--repeats", str(args.repeats), "--dtype", engine.dtype]
    command += ["--model", files[engine.model], "--variant", engine.variant]
    environment = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | os.environ
    log = args.work / f"{name}-{k}.log"
    with log.open("w") as errors:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, timeout=args.timeout
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {args.timeout} s"}
    if done.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        return {"error": f"status {done.returncode}: {''.join(last)[:300]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def of(results: list[dict], name: str, k: int) -> dict[int, float]:
    """Seconds of the job by round, each the median of the round's repeats."""
    return {
        r["round"]: statistics.median(r["seconds"])
        for r in results
        if r["name"] == name and r["k"] == k and "error" not in r
    }


def spread(values: list[float], digits: int) -> str:
    """Median (least to most)."""
    if not values:
        return "-"
    low, middle, high = (f"{x:.{digits}f}" for x in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def speeds(results: list[dict], names: list[str], ks: list[int]) -> list[str]:
    """Sampled tokens a second, prefill included, over all timed repeats."""
    lines = [row("tokens/s, prefill included", *(f"k = {k}" for k in ks)), "|---" * (len(ks) + 1) + "|"]
    for name in names:
        cells = []
        for k in ks:
            found = [r for r in results if r["name"] == name and r["k"] == k]
            values = [x for r in found for x in r.get("tokens_per_second", [])]
            cells.append("failed" if found and not values else spread(values, 1))
        lines.append(row(name, *cells))
    return lines


def ratios(results: list[dict], names: list[str], ks: list[int]) -> list[str]:
    """How many times as fast this package is as each peer, in the rounds that measured both."""
    lines = [row("times as fast", *(f"k = {k}" for k in ks)), "|---" * (len(ks) + 1) + "|"]
    for ours in (name for name in names if name.startswith("grm_jax")):
        for peer in (name for name in names if not name.startswith("grm_jax")):
            cells = []
            for k in ks:
                mine, theirs = of(results, ours, k), of(results, peer, k)
                cells.append(spread([theirs[turn] / mine[turn] for turn in mine.keys() & theirs.keys()], 2))
            lines.append(row(f"{ours} / {peer}", *cells))
    return lines


def costs(results: list[dict], names: list[str], ks: list[int]) -> list[str]:
    """What all k samples take, in times of the least k."""
    least = min(ks)
    lines = [row(f"time, in that of k = {least}", *(f"k = {k}" for k in ks)), "|---" * (len(ks) + 1) + "|"]
    for name in names:
        one = of(results, name, least)
        cells = []
        for k in ks:
            many = of(results, name, k)
            cells.append(spread([many[turn] / one[turn] for turn in many.keys() & one.keys()], 2))
        lines.append(row(name, *cells))
    return lines


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def report(results: list[dict], names: list[str], ks: list[int]) -> str:
    """The three tables in Markdown, what each engine said of itself, and what failed."""
    tables = [make(results, names, ks) for make in (speeds, ratios, costs)]
    said = {r["name"]: f"- {r['name']}: {r['notes']}" for r in results if "notes" in r}
    failed = [f"- FAILED {r['name']}, k = {r['k']}, round {r['round']}: {r['error']}" for r in results if "error" in r]
    return "\n\n".join("\n".join(block) for block in [*tables, list(said.values()) + failed])


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--product-python", default=sys.executable, help="has this package (default: this one)")
    parser.add_argument("--peers-python", default=sys.executable, help="has torch, transformers, xllamacpp")
    parser.add_argument("--tunix-python", default=sys.executable, help="has google-tunix")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--once", nargs="*", default=[], choices=list(ENGINES), help="engines of the first round only")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="timed runs a process, after its warm-up")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a process may take")
    parser.add_argument("--work", type=Path, help="a folder for the weights and logs (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path("speed.json"), help="all timings, as JSON")
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        args.work = (args.work or Path(temporary)).resolve()
        args.work.mkdir(parents=True, exist_ok=True)
        files = prepare(args.work, args.prompt_tokens)
        results: list[dict] = []
        machine = f"{platform.platform()}, {os.cpu_count()} processors"
        for turn, k, name in turns(args):
            load = os.getloadavg()[0]  # a quiet machine shows in it that the last engine alone was running
            result = {"name": name, "round": turn, "k": k, "load": load} | run(name, k, args, files)
            results.append(result)
            said = result.get("error") or ", ".join(f"{x:.1f}" for x in result["seconds"]) + " s"
            print(f"round {turn + 1}, k = {k}, {name}: {said}", file=sys.stderr, flush=True)
            args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
        print(report(results, args.engines, args.k))


if __name__ == "__main__":
    main()
