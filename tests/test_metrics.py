"""Metrics: rows, TensorBoard's events and log lines of a run that is stopped anywhere, and counts worked by hand."""

import json
import logging
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LLAMA, tiny_model

from grm_jax import metrics
from grm_jax.log import logger
from grm_jax.metrics import Metrics, by_source, device_memory, peak_flops, speed
from grm_jax.models.flops import attention_flops, matrix_weights, model_flops


@pytest.fixture
def lines():
    """The package's log lines."""
    found, handler, level = [], logging.Handler(), logger.level
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def board(folder):
    """What TensorBoard shows, {name: {step: value}}: a restart at a step hides that step's and later events before it."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        raw = file.read_bytes()
        while raw:  # length (8), its checksum (4), the event, its checksum (4)
            size = int.from_bytes(raw[:8], "little")
            event, raw = Event.FromString(raw[12 : 12 + size]), raw[16 + size :]
            if event.session_log.status == SessionLog.START:
                shown = {name: {s: x for s, x in of.items() if s < event.step} for name, of in shown.items()}
            for value in event.summary.value:
                shown.setdefault(value.tag, {})[event.step] = value.simple_value
    return shown


def test_a_row_a_step_for_people_and_programs(tmp_path, lines):
    with Metrics(str(tmp_path / "deep/run"), -1) as out:
        out.write(1, {"loss": 0.1, "tokens": 7}, {"math": {"accuracy": np.float32(0.1)}, "chat": {"accuracy": 1.0}})
        out.write(2, {"loss": jnp.float32(2) / 3, "tokens": 8})
    assert (tmp_path / "deep/run/metrics.jsonl").read_text() == (
        '{"step": 1, "loss": 0.1, "tokens": 7, "accuracy/math": 0.10000000149011612, "accuracy/chat": 1.0}\n'
        '{"step": 2, "loss": 0.6666666865348816, "tokens": 8}\n'
    )
    assert lines == ["step 1: loss 0.1, tokens 7", "step 2: loss 0.6667, tokens 8"]
    shown = board(tmp_path / "deep/run")
    assert shown["loss"] == pytest.approx({1: 0.1, 2: 2 / 3})
    assert shown["accuracy/math"] == pytest.approx({1: 0.1})
    assert set(shown) == {"loss", "tokens", "accuracy/math", "accuracy/chat"}


def test_the_log_shows_the_first_numbers(tmp_path, lines):
    with Metrics(str(tmp_path), -1) as out:
        out.write(3, {f"n{i}": i for i in range(9)})
    assert lines == ["step 3: n0 0, n1 1, n2 2, n3 3, n4 4, n5 5"]
    assert len(rows(tmp_path)[0]) == 10


def test_numbers_that_json_lacks_are_strings(tmp_path):
    with Metrics(str(tmp_path), -1) as out:
        out.write(1, {"a": float("nan"), "b": float("inf"), "c": np.float32("-inf"), "d": 1e300})
        out.samples(1, [{"text": "x", "log_probs": [0.5, float("nan")]}])
    assert rows(tmp_path) == [{"step": 1, "a": "nan", "b": "inf", "c": "-inf", "d": 1e300}]
    assert [float(rows(tmp_path)[0][name]) for name in "bc"] == [float("inf"), -float("inf")]
    assert rows(tmp_path, "samples.jsonl") == [{"step": 1, "text": "x", "log_probs": [0.5, "nan"]}]


@pytest.mark.parametrize("values", [{"step": 1.0}, {"accuracy/a": 1.0}])
def test_a_name_that_comes_twice_is_refused(tmp_path, values):
    with Metrics(str(tmp_path), -1) as out, pytest.raises(ValueError, match=f"two values of '{next(iter(values))}'"):
        out.write(1, values, {"a": {"accuracy": 1.0}})
    assert rows(tmp_path) == []


def test_samples_are_written_in_full_and_one_is_shown(tmp_path, lines):
    texts = [{"id": "a", "text": "long\u2028line\ud800 " * 50, "reward": 1.0}, {"id": "b", "text": "", "reward": -1.0}]
    with Metrics(str(tmp_path), -1) as out:
        out.samples(4, texts)
        out.samples(5, [])
    assert rows(tmp_path, "samples.jsonl") == [{"step": 4, **text} for text in texts]
    assert len(lines) == 1
    assert lines[0].startswith("step 4, one of 2 judgments:\n  id: a\n  text: long")


def test_held_out_rows_stand_apart_and_go_with_later_steps(tmp_path):
    with Metrics(str(tmp_path), -1) as out:
        out.held_out(0, {"accuracy": 0.5})
        out.held_out(8, {"accuracy": 0.75})
    with Metrics(str(tmp_path), 4) as out:
        out.held_out(6, {"accuracy": 1.0})
    assert rows(tmp_path, "held_out.jsonl") == [{"step": 0, "accuracy": 0.5}, {"step": 6, "accuracy": 1.0}]
    assert rows(tmp_path) == []


def test_speed_is_tokens_and_the_share_of_what_the_devices_reach():
    found = speed(tokens=300, flops=0.0, seconds=2.0)
    assert (found["tokens_per_second"], found["mfu"], found["seconds"]) == (150, 0, 2)
    assert speed(1, 2e9, 1.0)["mfu"] == pytest.approx(2 * speed(1, 1e9, 1.0)["mfu"])
    assert 0 < found["memory_gb"] < 100


def test_other_processes_write_nothing(tmp_path, lines):
    with Metrics(str(tmp_path), -1, process_index=1) as out:
        out.write(1, {"loss": 1.0})
        out.samples(1, [{"text": "x"}])
        out.flush()
    assert list(tmp_path.iterdir()) == []
    assert lines == []


# ---------------------------------------------------------------- going on


def run_up_to(folder, step, resume_step=-1, offset=0.0):
    with Metrics(str(folder), resume_step) as out:
        for at in range(resume_step + 1, step + 1):
            out.write(at, {"loss": at + offset})
            out.samples(at, [{"text": f"{at + offset}"}])


def test_a_run_that_goes_on_drops_what_happens_again(tmp_path, lines):
    run_up_to(tmp_path, 5)
    run_up_to(tmp_path, 7, resume_step=3, offset=0.5)
    expected = {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.5, 5: 5.5, 6: 6.5, 7: 7.5}
    assert {row["step"]: row["loss"] for row in rows(tmp_path)} == expected
    assert [row["step"] for row in rows(tmp_path)] == list(expected)
    assert {row["step"]: float(row["text"]) for row in rows(tmp_path, "samples.jsonl")} == expected
    assert board(tmp_path)["loss"] == expected
    assert not [line for line in lines if "dropped" in line]


def test_a_run_that_starts_again_drops_all(tmp_path):
    run_up_to(tmp_path, 3)
    run_up_to(tmp_path, 1, offset=0.5)
    assert rows(tmp_path) == [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 1.5}]
    assert board(tmp_path)["loss"] == {0: 0.5, 1: 1.5}


def test_half_a_row_is_dropped_wherever_it_was_cut(tmp_path, lines):
    run_up_to(tmp_path, 2)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    ends = [0] + [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        lines.clear()
        metrics._Rows(file, 2).close()
        end = max(end for end in ends if end <= cut)
        assert file.read_bytes() == whole[:end]
        assert len(lines) == (end < cut)
    file.write_bytes(whole + b'\0\0\n[1]\n{"loss": 1}\n{"step": 1}\n')
    metrics._Rows(file, 2).close()
    assert file.read_bytes() == whole + b'{"step": 1}\n'
    assert lines[-1] == f"{file}: dropped 3 lines that are half-written or no rows"
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.jsonl",
        "samples.jsonl",
        "held_out.jsonl",
        "tensorboard",
    }


KILLED = """
import sys
from grm_jax.metrics import Metrics
with Metrics(sys.argv[1], -1) as out:
    for step in range(10**9):
        out.write(step, {"loss": step})
        if step == 20:
            print("on", flush=True)
"""


def test_a_killed_run_leaves_whole_rows(tmp_path):
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.kill()
        assert process.wait() == -signal.SIGKILL
    run_up_to(tmp_path, 20, resume_step=10, offset=0.5)
    assert [row["step"] for row in rows(tmp_path)] == list(range(21))
    assert [row["loss"] - row["step"] for row in rows(tmp_path)] == [0] * 11 + [0.5] * 10


IN_A_BUCKET = """
from etils import epath
from grm_jax import metrics
from grm_jax.metrics import Metrics
folder = epath.Path("gs://judge/runs/a")
def losses():
    return [line.split(": ")[-1][:-1] for line in (folder / "metrics.jsonl").read_text().splitlines()]
out = Metrics(str(folder), -1)
for step in range(5):
    out.write(step, {"loss": float(step)})
    if step == 3:
        out.flush()
print(*losses())
metrics.OBJECT_SECONDS = 0.0
out.write(5, {"loss": 5.0})
print(*losses())
del out  # killed
with Metrics(str(folder), 2) as out:
    out.write(3, {"loss": 3.5})
print(*losses(), len(list((folder / "tensorboard").iterdir())))
"""


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the emulator's sockets
def test_metrics_in_a_bucket(bucket):
    command = [sys.executable, "-c", IN_A_BUCKET]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | bucket, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0.0 1.0 2.0 3.0", "0.0 1.0 2.0 3.0 4.0 5.0", "0.0 1.0 2.0 3.5 2"]


# ---------------------------------------------------------------- means and counts


def test_means_by_source_by_hand():
    values = {"accuracy": np.asarray([1.0, 0.0, 1.0]), "length": np.asarray([10, 20, 40])}
    found = by_source(["b", "a", "b"], values)
    assert found == {"b": {"accuracy": 1.0, "length": 25.0}, "a": {"accuracy": 0.0, "length": 20.0}}
    assert list(found) == ["b", "a"]
    assert by_source([], {"accuracy": np.zeros(0)}) == {}
    with pytest.raises(ValueError, match="length has 3 rows, there are 2 sources"):
        by_source(["a", "b"], {"length": np.asarray([10, 20, 40])})


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("cpu", None),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_peak_flops(kind, flops):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == flops


def test_weights_are_those_of_the_models_matrices():
    """All that has more than one axis; here the head is the embedding."""
    params = tiny_model(LLAMA).params.values()
    assert matrix_weights(LLAMA) == sum(weight.size for weight in params if weight.ndim > 1)


def test_flops_by_hand():
    """Layer: q and o 32 x 32, k and v 32 x 16, three of 32 x 64; head 259 x 32. Attention: 4 * 2 layers * 4 * 8 a token."""
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 259 * 32
    assert matrix_weights(LLAMA) == weights
    assert attention_flops(LLAMA, 10) == 2560
    assert model_flops(LLAMA, 100, 0, 10) == 100 * (2 * weights + 2560)
    assert model_flops(LLAMA, 100, 7, 10) == 100 * (2 * weights + 2560) + 7 * (6 * weights + 3 * 2560)


def test_memory_is_what_this_process_holds_at_most():
    before = device_memory()
    held = np.ones(before // 8 + (64 << 20) // 8)  # as much as ever, and 64 MiB
    assert device_memory() >= before + (32 << 20)
    assert held[-1] == 1
