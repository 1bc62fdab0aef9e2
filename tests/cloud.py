"""A cloud for the launch scripts: a `gcloud` that keeps a slice of two hosts in a folder and runs what it is told there.

`python cloud.py FOLDER PROGRAM ARGUMENTS` is one of the programs that the scripts find on their PATH:

gcloud   notes its arguments in calls.jsonl; `ssh` runs the command in the home folder of each host, `scp` copies there,
         `create` makes the homes, `delete` takes them away, and `describe` tells the next word of states.txt
uv       notes its arguments too, and makes an environment whose Python is this file's `python`
python   the run: notes its arguments, its folder and its LAUNCH_* variables in starts.jsonl, and behaves as
         behaviour.txt says for this start of its host: `exit N`, or `wait` for SIGTERM and exit with 130

A word PREEMPTED or SUSPENDED in states.txt kills what runs and empties the hosts; SILENT is a failure of the network.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

LAUNCH = Path(__file__).parents[1] / "launch"
HOSTS = ("host-0", "host-1")
NO_SLICE = "absent"


def note(path: Path, **row: object) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check_out(root: Path) -> Path:
    """A git checkout of the scripts as they are now, committed or not; returns its launch folder."""
    shutil.copytree(LAUNCH, root / "launch")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=all"]):
        subprocess.run([*git, *words], check=True)
    return root / "launch"


def launch(folder: Path, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run the script of that name in a launch folder."""
    command, env = ["bash", str(folder / words[0]), *words[1:]], os.environ | (env or {})
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


def install(folder: Path) -> dict[str, str]:
    """Put the programs into folder/bin; returns the environment in which a script finds them."""
    (folder / "bin").mkdir()
    for name in ("gcloud", "uv", "python"):
        program(folder / "bin" / name, folder, name)
    (folder / "states.txt").write_text(NO_SLICE + "\n")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}


def program(path: Path, folder: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{__file__}" "{folder}" {name} "$@"\n')
    path.chmod(0o755)


def next_state(folder: Path) -> str:
    states = (folder / "states.txt").read_text().split()
    if len(states) > 1:
        (folder / "states.txt").write_text("\n".join(states[1:]) + "\n")
    return states[0]


def empty(folder: Path) -> None:
    """What a preemption leaves of the hosts."""
    for host in HOSTS:
        for pid in (folder / host / "grm_jax").glob("run.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGKILL)
        shutil.rmtree(folder / host, ignore_errors=True)


def describe(folder: Path) -> int:
    state = next_state(folder)
    if state == NO_SLICE:
        print("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'it' was not found", file=sys.stderr)
        return 1
    if state == "SILENT":
        print("ERROR: (gcloud.compute.tpus) There was a problem refreshing the connection", file=sys.stderr)
        return 1
    if state in ("PREEMPTED", "SUSPENDED"):
        empty(folder)
    print(state)
    return 0


def gcloud(folder: Path, args: list[str]) -> int:
    note(folder / "calls.jsonl", args=args)
    flags = dict(word.split("=", 1) for word in args if word.startswith("--") and "=" in word)
    places = [word for word in args if not word.startswith("--")]
    verb = places[3]
    if verb == "describe":
        return describe(folder)
    if verb == "delete":
        empty(folder)
        return 0
    if verb == "create":
        for host in HOSTS:
            (folder / host).mkdir()
        ready = "ACTIVE" if "queued-resources" in args else "READY"
        left = (folder / "states.txt").read_text()
        (folder / "states.txt").write_text(ready + "\n" + (ready if left.split() == [NO_SLICE] else left) + "\n")
        return 0
    hosts = HOSTS if flags["--worker"] == "all" else [HOSTS[int(flags["--worker"])]]
    if verb == "scp":
        for host in hosts:
            shutil.copy(places[4], folder / host / places[5].split(":")[1])
        return 0
    command = ["sh", "-c", flags["--command"]]
    before = len(rows(folder / "starts.jsonl"))
    codes = [subprocess.run(command, cwd=folder / host, env=host_env(folder / host)).returncode for host in hosts]
    while "host.sh run" in command[-1] and not any(codes) and len(rows(folder / "starts.jsonl")) < before + len(hosts):
        time.sleep(0.01)  # so that no test is faster than the runs it has started
    return max(codes)


def host_env(home: Path) -> dict[str, str]:
    return {"HOME": str(home), "PATH": os.environ["PATH"]}


def uv(folder: Path, args: list[str]) -> int:
    note(folder / "uv.jsonl", args=args)
    if args[0] == "venv":
        program(Path(args[-1], "bin", "python"), folder, "python")
    return 0


def python(folder: Path, args: list[str]) -> int:
    host, starts = Path(os.environ["HOME"]).name, folder / "starts.jsonl"
    settings = {key: value for key, value in os.environ.items() if key.startswith("LAUNCH_")}
    before = sum(row["host"] == host for row in rows(starts))
    print("the run says hello", flush=True)
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    note(starts, host=host, args=args, cwd=os.getcwd(), settings=settings)
    behaviour = (folder / "behaviour.txt").read_text().splitlines()
    what = behaviour[min(before, len(behaviour) - 1)].split()
    if what[0] == "exit":
        return int(what[1])
    for _ in range(2000):
        if stopped:
            return 130
        time.sleep(0.01)
    return 1


if __name__ == "__main__":
    programs = {"gcloud": gcloud, "uv": uv, "python": python}
    sys.exit(programs[sys.argv[2]](Path(sys.argv[1]), sys.argv[3:]))
