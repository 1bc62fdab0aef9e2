"""The command line: `python -m grm_jax.main COMMAND ...`, one function a command.

Bad input and bad settings end with one line on standard error and exit code 2; `--help` loads nothing heavy. Where the
command runs as several processes, each is watched by a small one of its own (`processes.watched`), which says what to do
when JAX's runtime aborts because another was lost.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from grm_jax import damage, log, processes, recipes
from grm_jax.config import (
    BenchConfig,
    CompareConfig,
    ConvertConfig,
    EvalConfig,
    PlanConfig,
    PrepareConfig,
    ScoreConfig,
    parse,
    parted,
)


def score(args: Sequence[str]) -> None:
    """judge responses and write verdicts"""
    config = parse(ScoreConfig, args, "grm_jax.main score")
    from grm_jax.score import run

    run(config)


def bench(args: Sequence[str]) -> None:
    """`bench sample`: time prefill and decode against this machine's ceilings"""
    if args[:1] != ["sample"]:
        raise ValueError(f"bench {' '.join(args[:1])}: known is `bench sample`; try `bench sample --help`")
    config = parse(BenchConfig, args[1:], "grm_jax.main bench sample")
    from grm_jax.bench import run

    run(config)


def sample(args: Sequence[str]) -> None:
    """judge labelled items and write every judgment with its correctness"""
    config = recipes.load(recipes.SampleConfig, args, "grm_jax.main sample")
    from grm_jax.spct.sample import run

    run(config)


def evaluate(args: Sequence[str]) -> None:
    """judge a benchmark and report every vote for every number of judgments"""
    config = parse(EvalConfig, args, "grm_jax.main eval")
    from grm_jax.evals.run import run

    run(config)


def prepare(args: Sequence[str]) -> None:
    """write a benchmark's official files as a dataset of tensorflow-datasets"""
    config = parse(PrepareConfig, args, "grm_jax.main prepare")
    from grm_jax.data.benchmarks import prepared

    print(prepared.prepare(config.benchmark, config.data, config.output))


def compare(args: Sequence[str]) -> None:
    """lay reports of one benchmark side by side"""
    config = parse(CompareConfig, args, "grm_jax.main compare")
    from grm_jax.evals.compare import run

    run(config)


def convert(args: Sequence[str]) -> None:
    """write a model, adapters or a training run's step in another format"""
    config = parse(ConvertConfig, args, "grm_jax.main convert")
    from grm_jax.convert import run

    run(config)


def rft(args: Sequence[str]) -> None:
    """stage 1 of training: sample judgments, keep right ones, fine-tune on them"""
    recipe = recipes.load(recipes.RftConfig, args, "grm_jax.main rft")
    from grm_jax.spct.rft import run

    run(recipe)


def rl(args: Sequence[str]) -> None:
    """stage 2 of training: reinforcement learning from the correctness of judgments"""
    recipe = recipes.load(recipes.RlConfig, args, "grm_jax.main rl")
    from grm_jax.spct.rl import run

    run(recipe)


def meta_rm(args: Sequence[str]) -> None:
    """train the meta RM that guides a vote, on sampled judgments"""
    recipe = recipes.load(recipes.MetaConfig, args, "grm_jax.main meta_rm")
    from grm_jax.spct.meta import run

    run(recipe)


def bradley_terry(args: Sequence[str]) -> None:
    """baseline: train one reward a response, on preferences"""
    recipe = recipes.load(recipes.PairsConfig, args, "grm_jax.main bradley_terry")
    from grm_jax.spct import baselines

    baselines.bradley_terry(recipe)


def pair_rm(args: Sequence[str]) -> None:
    """baseline: train a scalar that says which of two responses is better"""
    recipe = recipes.load(recipes.PairsConfig, args, "grm_jax.main pair_rm")
    from grm_jax.spct import baselines

    baselines.pair_rm(recipe)


def cloud(args: Sequence[str]) -> None:
    """baseline: train a value head that reads a critic's critiques"""
    recipe = recipes.load(recipes.CloudConfig, args, "grm_jax.main cloud")
    from grm_jax.spct import baselines

    baselines.cloud(recipe)


def plan(args: Sequence[str]) -> int:
    """compile a run's programs for TPUs that are not there: what fits, what bounds"""
    names = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(PlanConfig)}
    own, rest = parted(args, names)
    config = parse(PlanConfig, own, "grm_jax.main plan")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = (
        "false"  # what is compiled for devices that are not there cannot be read
    )
    if config.cpu_devices is not None:
        flag = f"--{SIMULATED}={config.cpu_devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    from grm_jax.plan.run import run

    return run(config, rest)


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "score": score,
    "sample": sample,
    "eval": evaluate,
    "compare": compare,
    "prepare": prepare,
    "rft": rft,
    "rl": rl,
    "meta_rm": meta_rm,
    "bradley_terry": bradley_terry,
    "pair_rm": pair_rm,
    "cloud": cloud,
    "convert": convert,
    "plan": plan,
    "bench": bench,
}


SIMULATED = "xla_force_host_platform_device_count"
ALONE = ("compare", "prepare", "convert", "plan", "bench")  # of one process, also where several are started


def usage() -> str:
    lines = [f"  {name:14}{command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m grm_jax.main [--coordinator HOST:PORT --processes N --process I] COMMAND [--help] ...",
            *("", "commands:", *lines),
        ]
    )


def compilation_cache() -> Path:
    """Where compiled programs are kept between runs, unless JAX_COMPILATION_CACHE_DIR says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grm_jax" / "xla"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for bad input or settings, 75 for a lost process, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    log.to_stderr()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compilation_cache()))
    if SIMULATED in os.environ.get("XLA_FLAGS", ""):  # programs under way at once would wait for each other's threads
        os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")
    if argv[0] == "convert":
        os.environ["JAX_PLATFORMS"] = "cpu"  # it needs no accelerator, and a run may hold this machine's
    try:
        wanted, argv = processes.wanted(argv, os.environ)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not argv or argv[0] not in COMMANDS:
        print(f"{argv[0]!r} is no command\n{usage()}" if argv else usage(), file=sys.stderr)
        return 2
    if wanted is None or set(argv) & {"-h", "--help"}:
        return _run(argv)
    if argv[0] not in ALONE:
        return _run_as_one_of_several(wanted, argv)
    if wanted.coordinator is None:  # the machine could be one of several; nobody said that the command is
        return _run(argv)
    print(f"error: {argv[0]} is one process, which writes everything: start it once, without others", file=sys.stderr)
    return 2


def _run(argv: Sequence[str]) -> int:
    try:
        return COMMANDS[argv[0]](argv[1:]) or 0
    except SystemExit as stop:  # the parser has said what was wrong, or printed its help
        return int(stop.code or 0)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        if damage.of_storage(error):
            print("the storage failed; the same command goes on where the run was saved last", file=sys.stderr)
            return processes.LOST
        return 2
    except KeyboardInterrupt:
        print("interrupted; a run with an output goes on there when run again without --overwrite", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of standard output has gone, as `head` does
        sys.stderr.close()
        return 141


def _run_as_one_of_several(wanted: processes.Wanted, argv: Sequence[str]) -> int:
    """A process that fails does not wait for the others, who may wait for it: it leaves, and they find it gone."""
    if (code := processes.watched()) is not None:
        return code
    import jax

    from grm_jax import hosts

    try:
        try:
            hosts.join(wanted)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            os._exit(2)
        log.to_stderr(process_index=jax.process_index())
        code = _run(argv)
        if code == 0:
            hosts.sync("done")  # a process that leaves early would have the others aborted
    except Exception as error:
        if (first := processes.cause_of(error, jax.errors.JaxRuntimeError)) is None:
            traceback.print_exc()  # whatever it is, it is shown whole, and the others must not wait for this process
            code = 1
        else:
            code = 2 if "RESOURCE_EXHAUSTED" in str(first) else processes.LOST
            told = processes.too_large if code == 2 else processes.lost
            print(f"error: {told(str(first))}", file=sys.stderr)
    if code not in (0, 130):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
