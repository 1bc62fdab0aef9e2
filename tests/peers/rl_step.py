"""Speed of one RL step, side by side: this package, TRL and Tunix, on this machine.

    python tests/peers/rl_step.py --peers-python ENV/bin/python --tunix-python ENV/bin/python --out rl_step.json

1. The prompts (real text, 4 of 256 tokens) and a float32 folder of the weights are written into --work, once.
2. In each round every engine runs once, one at a time, in a process of its own: it loads, takes its warm-up steps, then
   whole GRPO steps are timed: rollouts, rewards, reference, gradients, AdamW. The order turns by one each round.
3. A table of seconds a step and of the process's peak memory, then what one engine is to another, round by round. All
   timings go to --out after every process, so an interrupted run keeps what it had.

tests/peers/README.md says how the environments are made and what each engine does with the shared job.
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
from dataclasses import dataclass
from pathlib import Path

import speed

HERE = Path(__file__).parent
OURS = "grm_jax"


@dataclass(frozen=True)
class Engine:
    """A line of the table: which script runs it, in whose environment, from which form of the weights."""

    script: str
    python: str  # product | peers | tunix
    model: str  # embedded | folder


ENGINES = {
    OURS: Engine("product_step.py", "product", "embedded"),
    "trl": Engine("trl_step.py", "peers", "folder"),
    "tunix": Engine("tunix_step.py", "tunix", "folder"),
}


def prepare(work: Path, prompts: int, prompt_tokens: int) -> dict[str, str]:
    """Write the prompts and the weights that are not there yet; where each is, by name."""
    found = speed.prepare(work, prompts * prompt_tokens)
    ids = json.loads(Path(found["prompt"]).read_text())
    parted = [ids[at : at + prompt_tokens] for at in range(0, len(ids), prompt_tokens)]
    file = work / f"prompts-{prompts}x{prompt_tokens}.json"
    file.write_text(json.dumps(parted))
    return found | {"prompts": str(file)}


def run(name: str, args: argparse.Namespace, files: dict[str, str]) -> dict:
    """One process of one engine: what it printed, or `error`."""
    engine = ENGINES[name]
    command = [getattr(args, f"{engine.python}_python"), str(HERE / engine.script), "--prompts", files["prompts"]]
    command += ["--model", files[engine.model]]
    for field in ("group", "new_tokens", "warm_up", "steps", "microbatch_prompts"):
        command += [f"--{field.replace('_', '-')}", str(getattr(args, field))]
    environment = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | os.environ
    log = args.work / f"step-{name}.log"
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


def measures(results: list[dict], names: list[str]) -> list[str]:
    """Seconds a step over all timed steps, and the largest peak of a process."""
    lines = [speed.row("engine", "seconds a step", "peak GiB"), "|---" * 3 + "|"]
    for name in names:
        found = [r for r in results if r["name"] == name and "error" not in r]
        peak = f"{max(r['peak_bytes'] for r in found) / 2**30:.1f}" if found else "failed"
        lines.append(speed.row(name, speed.spread([x for r in found for x in r["seconds"]], 1), peak))
    return lines


def ratios(results: list[dict], names: list[str]) -> list[str]:
    """How many times as fast this package's step is as each peer's, in the rounds that measured both."""
    lines = [speed.row(f"{OURS} to", "times as fast"), "|---" * 2 + "|"]
    medians = {
        name: {r["round"]: statistics.median(r["seconds"]) for r in results if r["name"] == name and "error" not in r}
        for name in (OURS, *names)
    }
    for peer in (name for name in names if name != OURS):
        rounds = medians[OURS].keys() & medians[peer].keys()
        times = [medians[peer][turn] / medians[OURS][turn] for turn in rounds]
        lines.append(speed.row(peer, speed.spread(times, 2)))
    return lines


def report(results: list[dict], names: list[str]) -> str:
    """The two tables in Markdown, what each engine said of itself, and what failed."""
    said = {r["name"]: f"- {r['name']}: {r['notes']}" for r in results if "notes" in r}
    failed = [f"- FAILED {r['name']}, round {r['round']}: {r['error']}" for r in results if "error" in r]
    blocks = [measures(results, names), ratios(results, names), list(said.values()) + failed]
    return "\n\n".join("\n".join(block) for block in blocks)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--product-python", default=sys.executable, help="has this package (default: this one)")
    parser.add_argument("--peers-python", default=sys.executable, help="has torch, transformers, trl, datasets")
    parser.add_argument("--tunix-python", default=sys.executable, help="has google-tunix")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--group", type=int, default=4, help="rollouts of each prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each rollout")
    parser.add_argument("--microbatch-prompts", type=int, default=1, help="whose gradients are computed at once")
    parser.add_argument("--warm-up", type=int, default=1, help="steps a process that are not counted")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a process")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds a process may take")
    parser.add_argument("--work", type=Path, help="a folder for the weights and logs (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path("rl_step.json"), help="all timings, as JSON")
    args = parser.parse_args()
    if args.prompts % args.microbatch_prompts:
        parser.error(
            f"--prompts {args.prompts} is no multiple of --microbatch-prompts {args.microbatch_prompts}: "
            "every microbatch has the same size"
        )
    return args


def main() -> None:
    args = read_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        args.work = (args.work or Path(temporary)).resolve()
        args.work.mkdir(parents=True, exist_ok=True)
        files = prepare(args.work, args.prompts, args.prompt_tokens)
        results: list[dict] = []
        machine = f"{platform.platform()}, {os.cpu_count()} processors"
        for turn in range(args.rounds):
            shift = turn % len(args.engines)
            for name in [*args.engines[shift:], *args.engines[:shift]]:
                load = os.getloadavg()[0]  # a quiet machine shows in it that the last engine alone was running
                result = {"name": name, "round": turn, "load": load} | run(name, args, files)
                results.append(result)
                said = result.get("error") or ", ".join(f"{x:.1f}" for x in result["seconds"]) + " s"
                print(f"round {turn + 1}, {name}: {said}", file=sys.stderr, flush=True)
                args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
        print(report(results, args.engines))


if __name__ == "__main__":
    main()
