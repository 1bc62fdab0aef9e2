"""Runs on a fake cloud (cloud.py): they start on all hosts as they were asked for, and survive preemptions."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import cloud
import pytest

PLACE = ("--zone=us-east5-a", "--project=my-project")
SLICE = (*PLACE, "--type=v5p-128", "--version=v2-alpha-tpuv5")
HARD = ("rl", "--a b", "it's", '"', "$HOME", "`x`", "\\", "*", "", "a=b&c;d|e", "--x=~/y", "é", "{1..3}", "-n", "!!")


@dataclasses.dataclass
class Cloud:
    folder: Path
    root: Path
    env: dict[str, str]

    def launch(self, *words: str) -> subprocess.CompletedProcess:
        return cloud.launch(self.root, *words, env=self.env)

    def set(self, behaviour: str, *states: str) -> None:
        """What the run does at each start, and gcloud's next words for the state of the slice."""
        (self.folder / "behaviour.txt").write_text(behaviour)
        (self.folder / "states.txt").write_text("\n".join(states or (cloud.NO_SLICE,)) + "\n")

    def calls(self) -> list[str]:
        """The verbs that gcloud was called with, in order; of those over ssh what the host script was to do."""
        said = []
        for row in cloud.rows(self.folder / "calls.jsonl"):
            verb = row["args"][3]
            if verb == "ssh":
                verb = re.findall(r"host\.sh (\w+)", row["args"][-1])[0]
            said.append(verb)
        return said

    def starts(self) -> list[dict]:
        return cloud.rows(self.folder / "starts.jsonl")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cloud.check_out(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def here(tmp_path: Path, checkout: Path) -> Iterator[Cloud]:
    if shutil.which("flock") is None:
        pytest.skip("hosts are Linux machines with flock and setsid")
    made = Cloud(tmp_path, checkout, cloud.install(tmp_path))
    yield made
    cloud.empty(tmp_path)


def test_arguments_reach_every_host_unchanged(here: Cloud) -> None:
    here.set("exit 0")
    assert here.launch("tpu_vm.sh", "create", "judge", *SLICE).returncode == 0
    assert here.launch("tpu_vm.sh", "setup", "judge", *PLACE).returncode == 0
    done = here.launch("tpu_vm.sh", "run", "judge", *PLACE, "--env", "LAUNCH_A=it's $1", "--", *HARD)
    assert done.returncode == 0, done.stderr
    watched = here.launch("tpu_vm.sh", "watch", "judge", *PLACE)
    assert watched.returncode == 0
    assert "the run says hello" in watched.stdout
    starts = {row["host"]: row for row in here.starts()}
    assert sorted(starts) == list(cloud.HOSTS)
    for host, row in starts.items():
        assert row["args"] == ["-m", "grm_jax.main", *HARD]
        assert row["settings"] == {"LAUNCH_A": "it's $1"}
        assert row["cwd"] == str(here.folder / host / "grm_jax/source")  # configs/... are found there
    installed = [row["args"] for row in cloud.rows(here.folder / "uv.jsonl")]
    base = here.folder / cloud.HOSTS[0] / "grm_jax"
    assert installed[0][-3:] == ["--python", "3.12", str(base / "venv")]
    assert installed[1][-1] == f"{base}/source[tpu]"


def test_a_run_is_stopped_and_its_code_is_told(here: Cloud) -> None:
    here.set("wait\nexit 3")
    place = ("judge", *SLICE)
    assert here.launch("tpu_vm.sh", "resume", *place, "--", "rl").returncode == 0
    assert here.launch("tpu_vm.sh", "status", *place).stdout.splitlines() == ["judge: READY", *["grm_jax: running"] * 2]
    assert "a run is going on here" in here.launch("tpu_vm.sh", "run", *place, "--", "rl").stderr
    assert "a run is going on here" in here.launch("tpu_vm.sh", "setup", *place).stderr
    assert "another run goes on" in here.launch("tpu_vm.sh", "resume", *place, "--", "rft").stderr
    assert here.launch("tpu_vm.sh", "resume", *place, "--", "rl").returncode == 0  # which changes nothing
    watch = ["bash", str(here.root / "tpu_vm.sh"), "watch", *place]
    with subprocess.Popen(watch, env=os.environ | here.env, stdout=subprocess.PIPE, text=True) as watched:
        begun = [watched.stdout.readline() for _ in range(2)]  # it follows a run that goes on
        assert begun[1] == "the run says hello\n"
        assert here.launch("tpu_vm.sh", "stop", *place).returncode == 0
        assert "exit code 130" in watched.stdout.read()
    assert watched.returncode == 130
    assert here.launch("tpu_vm.sh", "run", *place, "--", "rl", "again").returncode == 0
    assert here.launch("tpu_vm.sh", "watch", *place).returncode == 3
    assert len(here.starts()) == 4


@pytest.mark.parametrize(("script", "lost"), [("tpu_vm.sh", "PREEMPTED"), ("queued.sh", "SUSPENDED")])
def test_keep_runs_the_same_again_after_a_preemption(here: Cloud, script: str, lost: str) -> None:
    ready = "ACTIVE" if script == "queued.sh" else "READY"
    here.set("wait\nexit 0", cloud.NO_SLICE, ready, "SILENT", ready, lost, ready)
    done = here.launch(script, "keep", "judge", *SLICE, "--spot", "--every=0", "--", "rl", "--output=gs://a")
    assert done.returncode == 0, done.stderr
    assert f"judge: {lost}; making it anew" in done.stderr
    assert "judge: the run is finished" in done.stderr
    made = ["create", "describe", "status", "scp", "setup", "run"]
    calls = here.calls()
    assert calls[: len(made) + 1] == ["describe", *made]
    again = calls.index("delete")
    assert calls[again + 1 : again + 1 + len(made)] == made
    assert calls.count("delete") == 1
    assert [row["args"] for row in here.starts()] == [["-m", "grm_jax.main", "rl", "--output=gs://a"]] * 4


def test_keep_waits_in_the_queue(here: Cloud) -> None:
    here.set("exit 0", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    for host in cloud.HOSTS:
        (here.folder / host).mkdir()
    done = here.launch("queued.sh", "keep", "judge", *SLICE, "--every=0", "--", "rl")
    assert done.returncode == 0, done.stderr
    assert "create" not in here.calls()


@pytest.mark.parametrize(("code", "starts"), [(2, 1), (1, 3)])
def test_keep_gives_up_on_a_run_that_fails(here: Cloud, code: int, starts: int) -> None:
    here.set(f"exit {code}")
    done = here.launch("tpu_vm.sh", "keep", "judge", *SLICE, "--every=0", "--max-restarts=2", "--", "rl")
    assert done.returncode == code
    assert f"error: the run ended with exit code {code}" in done.stderr
    assert len(here.starts()) == starts * len(cloud.HOSTS)


def test_a_host_that_restarted_takes_the_run_with_it(here: Cloud) -> None:
    here.set("wait\nexit 0")
    place = ("judge", *SLICE)
    assert here.launch("tpu_vm.sh", "resume", *place, "--", "rl").returncode == 0
    base = here.folder / cloud.HOSTS[1] / "grm_jax"
    run = int((base / "run.pid").read_text())
    parent = Path(f"/proc/{run}/stat").read_text().rpartition(")")[2].split()[1]
    os.kill(int(parent), 9)
    os.kill(run, 9)
    assert "grm_jax: lost" in here.launch("tpu_vm.sh", "status", *place).stdout
    assert here.launch("tpu_vm.sh", "keep", *place, "--every=0", "--", "rl").returncode == 0
    assert len(here.starts()) == 4


def test_a_shutdown_leaves_a_code_and_the_run_goes_on(here: Cloud) -> None:
    here.set("wait\nexit 0")
    place = ("judge", *SLICE)
    assert here.launch("tpu_vm.sh", "resume", *place, "--", "rl").returncode == 0
    for host in cloud.HOSTS:  # all processes get SIGTERM, the run and its parent
        os.killpg(os.getpgid(int((here.folder / host / "grm_jax/run.pid").read_text())), signal.SIGTERM)
    assert here.launch("tpu_vm.sh", "watch", *place).returncode == 130
    assert here.launch("tpu_vm.sh", "keep", *place, "--every=0", "--max-restarts=0", "--", "rl").returncode == 0
    assert len(here.starts()) == 4


def test_nothing_is_deleted_on_an_error_of_the_network(here: Cloud) -> None:
    here.set("exit 0", "SILENT")
    done = here.launch("queued.sh", "resume", "judge", *SLICE, "--", "rl")
    assert done.returncode == 1
    assert here.calls() == ["describe"]
