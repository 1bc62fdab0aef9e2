"""Several real processes on this machine, over gloo: the same run as one process, one lost, a run that goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jax.errors import JaxRuntimeError

from grm_jax.data.jsonl import DataError
from grm_jax.data.shares import shared_writer
from grm_jax.datatypes import Example, Message
from grm_jax.hosts import Share
from grm_jax.processes import LOST, Wanted, cause_of, managed, wanted

TEMPLATE = str(Path(__file__).parents[1] / "configs/tiny_template.txt")
CONFIG = """
from grm_jax.config import MeshSizes
from grm_jax.recipes import Checkpoints, Fresh, Items, Optimizer, {kind}

def config():
    return {kind}(
        output="run", model={model!r}, fresh=Fresh(dim=32, layers=1, heads=2, mlp_dim=64, max_positions=512),
        template={template!r}, mesh=MeshSizes(fsdp=2),
        optimizer=Optimizer(learning_rate=1e-2), checkpoints=Checkpoints(every=2), slots=8, max_new_tokens=8,
        compute_dtype="float32", remat="none", {numbers}
    )
"""
RFT = (
    "general=('chats.jsonl',), general_share=1.0, batch_tokens=8 * 64, sequence_tokens=64, "
    "microbatch_rows=8, steps={steps}"
)
RL = (
    "items=Items(files=('items.jsonl',), held_out=3), prompts_per_step=4, group=2, microbatch_prompts=4, "
    "max_prompt_tokens=448, steps={steps}, log_samples_every=1, kl_coef=0.01"
)


def write_inputs(folder, kind, numbers, model="fresh"):
    folder.mkdir()
    item = {"scores": [1.0, 0.0]}
    asked = [[{"role": "user", "content": f"which of {i}?"}] for i in range(9)]
    rows = [item | {"messages": asked[i], "id": f"i{i}", "responses": [f"{i} yes", f"{i} no"]} for i in range(9)]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * 5}] for i in range(40)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    text = CONFIG.format(kind=kind, numbers=numbers, template=TEMPLATE, model=model)
    (folder / "config.py").write_text(text)


def launch(folder, command, processes, devices, *more):
    """The processes of a run, each with its own simulated devices; what they say goes to files."""
    if command != "eval":
        more = ("--config", "config.py", *more)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    started = []
    for i in range(processes):
        several = ["--coordinator", f"localhost:{port}", "--processes", str(processes), "--process", str(i)]
        line = [sys.executable, "-m", "grm_jax.main", *(several if processes > 1 else []), command, *more]
        with (folder / f"said-{processes}-{i}.txt").open("w") as said:
            started.append(subprocess.Popen(line, cwd=folder, env=env, stdout=said, stderr=subprocess.STDOUT))
    return started


def said(folder, processes, i):
    return (folder / f"said-{processes}-{i}.txt").read_text()


def finish(folder, started):
    for i, process in enumerate(started):
        assert process.wait(timeout=400) == 0, said(folder, len(started), i)[-3000:]


def metrics_of(folder, names):
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {row["step"]: [row[name] for name in names] for row in rows}


def held_out_of(folder):
    return (folder / "run/held_out.jsonl").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Fine-tuning as one process on four devices."""
    folder = tmp_path_factory.mktemp("alone") / "rft"
    write_inputs(folder, "RftConfig", RFT.format(steps=6))
    finish(folder, launch(folder, "rft", 1, 4, "--devices", "4"))
    return folder


@pytest.mark.parametrize(("processes", "devices"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_processes_train_to_the_metrics_of_one(tmp_path, alone, processes, devices):
    folder = tmp_path / "rft"
    write_inputs(folder, "RftConfig", RFT.format(steps=6))
    finish(folder, launch(folder, "rft", processes, devices))
    names = ("loss", "grad_norm", "tokens", "trained_tokens")
    found, expected = metrics_of(folder, names), metrics_of(alone, names)
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert found[6][0] < 0.9 * found[1][0], "nothing was learned, so nothing is compared"
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=2e-5), step
    assert "step 1:" in said(folder, processes, 0)
    assert "step 1:" not in said(folder, processes, 1), "other processes are quiet"


@pytest.mark.slow
def test_processes_roll_out_what_one_does(tmp_path):
    """Every rollout that RL logs, and its metrics, from two processes and from one."""
    names = ("reward", "length", "entropy", "kl", "drift_max", "parse_failures")
    found = []
    for processes, devices, more in ((1, 4, ("--devices", "4")), (2, 2, ())):
        folder = tmp_path / f"rl-{processes}"
        write_inputs(folder, "RlConfig", RL.format(steps=2))
        finish(folder, launch(folder, "rl", processes, devices, *more))
        found.append((metrics_of(folder, names), (folder / "run/samples.jsonl").read_text(), held_out_of(folder)))
    (metrics, samples, held_out), expected = found
    assert samples == expected[1]
    assert held_out == expected[2]
    for step, values in metrics.items():
        assert values == pytest.approx(expected[0][step], rel=1e-4, abs=1e-5), step


def test_what_another_number_of_processes_wrote_is_refused_or_removed(tmp_path):
    path, example = str(tmp_path / "rows.jsonl"), Example("a", (Message("user", "?"),), ("x", "y"))
    for name in ("rows.jsonl-00000-of-00002", "rows.jsonl-00001-of-00002", "rows.jsonl-00001-of-00002.run.json"):
        (tmp_path / name).write_text("")
    alone = Share(0, 1, True)
    with pytest.raises(DataError, match=r"another number of processes wrote rows.jsonl-00000-of-00002, .*--overwrite"):
        shared_writer(alone, path, [example], {})
    shared_writer(alone, path, [example], {}, overwrite=True).close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.jsonl", "rows.jsonl.run.json"]
    with pytest.raises(DataError, match=r"another number of processes wrote rows\.jsonl; go on with as many"):
        shared_writer(Share(1, 2, True), path, [example], {})
    with pytest.raises(DataError, match="several processes write parts of a file"):
        shared_writer(Share(1, 2, True), "-", [example], {})


@pytest.mark.slow
def test_samples_and_verdicts_are_shared_among_processes(tmp_path, alone):
    """With a mesh a process, `sample` and `score` write parts, which together are what one process writes."""
    model = str(alone / "run/model")
    how = ("--template", TEMPLATE, "--model", model, "--max-new-tokens", "8")
    lines = {}
    for processes in (1, 2):
        folder = tmp_path / f"judged-{processes}"
        write_inputs(folder, "SampleConfig", "")
        recipe = "from grm_jax.recipes import Items, SampleConfig\n\n\ndef config():\n"
        recipe += "    return SampleConfig(items=Items(files=('items.jsonl',)), output='run/s.jsonl')\n"
        (folder / "config.py").write_text(recipe)
        finish(folder, launch(folder, "sample", processes, 1, *how))
        lines[processes] = sorted(
            line for part in (folder / "run").glob("s.jsonl*") if "run.json" not in part.name
            for line in part.read_text().splitlines()
        )  # fmt: skip
    assert len(lines[1]) == 27
    assert lines[1] == lines[2]


@pytest.mark.slow
def test_a_report_of_two_processes_is_that_of_one(tmp_path, alone):
    """Judgments and the greedy ones beside them, in parts of two files; and again, when both are there already."""
    how = ["--benchmark", "preferences", "--data", "items.jsonl", "--template", TEMPLATE, "--force-scores"]
    how += ["--model", str(alone / "run/model"), "--max-new-tokens", "8", "--votes", "4", "--output", "out"]
    reports = []
    for processes in (1, 2, 2):
        folder = tmp_path / f"judged-{processes}"
        if not folder.exists():
            write_inputs(folder, "SampleConfig", "")
        finish(folder, launch(folder, "eval", processes, 1, *how))
        reports.append(json.loads((folder / "out/report.json").read_text()))
        seconds = reports[-1].pop("seconds_of_verdict")
        assert seconds > 0
    assert reports[0]["greedy"]["numbers"]
    assert reports[0] == reports[1] == reports[2]


@pytest.mark.slow
def test_a_lost_process_ends_the_run_and_another_number_goes_on(tmp_path, alone):
    folder = tmp_path / "rft"
    write_inputs(folder, "RftConfig", RFT.format(steps=400))
    started = launch(folder, "rft", 2, 2)
    until = time.monotonic() + 300
    while not any((folder / "run/checkpoints").glob("[4-9]")) and time.monotonic() < until:
        time.sleep(0.2)
    started[1].kill()
    started[1].wait()
    assert started[0].wait(timeout=200) == LOST, said(folder, 2, 0)[-2000:]
    assert "another process of this run was lost" in said(folder, 2, 0)
    assert "Start the same command again" in said(folder, 2, 0)
    write_config = CONFIG.format(kind="RftConfig", numbers=RFT.format(steps=400), template=TEMPLATE, model="fresh")
    (folder / "config.py").write_text(write_config)
    again = launch(folder, "rft", 1, 8, "--devices", "8", "--mesh.fsdp", "4")
    while "going on behind step" not in said(folder, 1, 0) and again[0].poll() is None:
        time.sleep(0.2)
    while (last := max(metrics_of(folder, ("loss",)))) < 12 and again[0].poll() is None:
        time.sleep(0.2)
    again[0].send_signal(signal.SIGTERM)
    assert again[0].wait(timeout=100) == 130, said(folder, 1, 0)[-2000:]
    assert last >= 12
    found, expected = metrics_of(folder, ("loss",)), metrics_of(alone, ("loss",))
    assert sorted(found) == list(range(1, max(found) + 1))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4), step


SLURM = {
    "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"
}  # fmt: skip


JOINED = """
import sys, time
from grm_jax import hosts
from grm_jax.processes import Wanted
hosts.join(Wanted(sys.argv[1], 2, int(sys.argv[2])))
print("joined", flush=True)
time.sleep(60)
"""


def test_a_process_that_is_asked_to_go_before_training_goes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    two = [
        subprocess.Popen([sys.executable, "-c", JOINED, place, str(i)], env=env, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        assert [process.stdout.readline() for process in two] == ["joined\n"] * 2
        two[1].send_signal(signal.SIGTERM)
        assert two[1].wait(timeout=20) == -signal.SIGTERM
    finally:
        for process in two:
            process.kill()
            process.stdout.close()
            process.wait()


def test_an_error_is_told_by_what_it_was_raised_from():
    """A checkpoint that waits for a lost process ends with a TimeoutError, raised from the runtime's."""
    first = JaxRuntimeError("INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE")
    late, other = TimeoutError("Timed out while waiting for async_write_complete barrier."), KeyError("met on the way")
    late.__cause__ = other.__context__ = first
    assert cause_of(late, JaxRuntimeError) is first
    assert cause_of(first, JaxRuntimeError) is first
    assert cause_of(other, JaxRuntimeError) is None


def test_who_is_one_of_several():
    named = Wanted("10.0.0.2:1234", 4, 1)
    flags = ["--coordinator", "10.0.0.2:1234", "--processes=4", "--process", "1", "rl", "--steps", "2"]
    assert wanted(flags, {}, Path("/nowhere")) == (named, ["rl", "--steps", "2"])
    environment = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "1"}
    assert wanted(["rl"], environment, Path("/nowhere")) == (named, ["rl"])
    assert wanted(["--process", "2", "rl"], environment, Path("/nowhere"))[0].process == 2
    assert wanted(["rl"], {}, Path("/nowhere")) == (None, ["rl"])
    assert wanted(["rl"], SLURM, Path("/nowhere")) == (Wanted(), ["rl"])
    assert not managed(SLURM | {"SLURM_NTASKS": "1"}, Path("/nowhere"))
    batch = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert not managed(batch, Path("/nowhere")), "a batch script that srun did not start is one process"
    assert managed({"OMPI_COMM_WORLD_SIZE": "8"}, Path("/nowhere"))


def test_a_machine_with_tpus_knows_its_processes(tmp_path, monkeypatch):
    (tmp_path / "dev/vfio").mkdir(parents=True)
    monkeypatch.setattr("grm_jax.processes.find_spec", lambda name: name == "libtpu")
    assert not managed({}, tmp_path)
    (tmp_path / "dev/vfio/0").touch()
    assert managed({}, tmp_path)
    assert managed({"JAX_PLATFORMS": "tpu,cpu"}, tmp_path)
    assert not managed({"JAX_PLATFORMS": "cpu"}, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator", "a:1"], "--processes and --process are not given: give all three"),
        (["--coordinator", "a", "--processes", "2", "--process", "0"], "coordinator = 'a': it has to be host:port"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "process = 2 of processes = 2"),
        (["--process"], "--process has no value"),
    ],
)
def test_a_part_of_it_says_what_is_missing(flags, message):
    with pytest.raises(ValueError, match=message):
        wanted([*flags], {}, Path("/nowhere"))
