"""Checkpoints: what comes back is what was saved, a damaged step is never taken for a whole one, and runs can be killed."""

import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grm_jax import recipes
from grm_jax.checkpoint import Interrupt, Saver, claim, digest
from grm_jax.log import logger
from grm_jax.sharding import make_mesh

DAILY = recipes.Checkpoints(every=2, keep_last=2)
ALL = recipes.Checkpoints(keep_last=100)
RECIPE = recipes.SampleConfig(items=recipes.Items(files=("rows.jsonl",)))


@pytest.fixture
def lines():
    """The package's log lines."""
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def opened(folder, settings=ALL):
    return Saver.open(str(folder), settings, recipes.as_json(RECIPE))


def layout(data, *axes):
    return NamedSharding(make_mesh(data=data, fsdp=8 // data), PartitionSpec(*axes))


def state_of(value, sharding=None):
    """A small state that tells which one it is; `w` does not compress, and is stored in a file of its own."""
    w = np.random.default_rng(value).integers(0, 2**32, (64, 64), np.uint32).view(np.float32)
    return jax.device_put({"w": w, "step": np.int32(value)}, sharding or layout(8))


def abstract(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state)


def bits(tree):
    def of(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return (str(x.dtype), x.shape, np.asarray(x).tobytes())

    return jax.tree.map(of, tree)


def training_state():
    """Every kind of leaf that a run has: sharded and replicated, bf16 with its special values, optax's, typed keys."""
    rng = np.random.default_rng(0)
    w = rng.integers(0, 2**16, (16, 24), np.uint16).view(jnp.bfloat16)  # all sorts of bits: NaNs and subnormals too
    params = {
        "w": jax.device_put(w, layout(4, "data", "fsdp")),
        "norm": jax.device_put(rng.standard_normal(5).astype(np.float32), layout(8)),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16)).init(params)
    rest = {"step": jnp.int32(7), "on": jnp.asarray([True, False]), "key": jax.random.key(3), "empty": ()}
    return {"params": params, "optimizer": optimizer, **jax.device_put(rest, layout(8))}


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state, data = training_state(), {"at": 12, "seen": [1, 2.5, None], "7": "x"}
    with opened(tmp_path) as saver:
        assert saver.save(7, state, data)
    with opened(tmp_path) as saver:
        step, found, found_data = saver.restore(abstract(state))
    assert (step, found_data) == (7, data)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert bits(found) == bits(state)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), found, state))


@pytest.mark.parametrize("sharding", [layout(2, "fsdp", "data"), layout(8)], ids=["turned", "replicated"])
def test_a_state_comes_back_to_another_sharding(tmp_path, sharding):
    values = jnp.arange(16 * 8, dtype=jnp.bfloat16).reshape(16, 8)
    state = {"w": jax.device_put(values, layout(4, "data", "fsdp"))}
    with opened(tmp_path) as saver:
        saver.save(1, state, {})
        _, found, _ = saver.restore(abstract(state, sharding))
    assert bits(found) == bits(state)
    assert found["w"].sharding == sharding


def test_a_state_may_be_donated_as_soon_as_it_is_saved(tmp_path):
    add = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = add(jax.device_put({f"w{i}": jnp.zeros((512, 512)) for i in range(4)}, layout(8, "data")))
    kind = abstract(state)
    with opened(tmp_path) as saver:
        saver.save(1, state, {})
        for _ in range(20):
            state = add(state)
        _, found, _ = saver.restore(kind)
    assert {float(x.min()) for x in found.values()} == {float(x.max()) for x in found.values()} == {1.0}


def test_an_empty_folder_restores_nothing(tmp_path):
    with opened(tmp_path) as saver:
        assert saver.restore(abstract(state_of(0))) is None


def test_what_is_kept(tmp_path):
    """The last two, and those that 4 divides; each step's numbers are its own."""
    with opened(tmp_path, replace(DAILY, keep_every=4)) as saver:
        assert [step for step in range(8) if saver.due(step)] == [2, 4, 6]
        for step in range(1, 11):
            assert saver.save(step, state_of(step), {"at": step})
            assert not saver.save(step, state_of(99), {})  # it is there already
        saver.wait()
        assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 8, 9, 10]
        step, found, data = saver.restore(abstract(state_of(0)))
    assert (step, int(found["step"]), data) == (10, 10, {"at": 10})


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with steps 1 and 2; step 2 has files of every kind. To be copied, not changed."""
    folder = tmp_path_factory.mktemp("whole")
    with opened(folder) as saver:
        for step in (1, 2):
            saver.save(step, state_of(step), {"at": step})
    return folder


def biggest(place):
    return max((file for file in place.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file, at):
    spoiled = bytearray(file.read_bytes())
    spoiled[at] ^= 0x55
    file.write_bytes(spoiled)


def empty(place):
    shutil.rmtree(place)
    place.mkdir()


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


DAMAGE = {
    "an array's file is gone": lambda step: biggest(step / "state/ocdbt.process_0").unlink(),
    "an array's file is cut": lambda step: os.truncate(
        file := biggest(step / "state/ocdbt.process_0"), file.stat().st_size // 2
    ),
    "an array's file is empty": lambda step: os.truncate(biggest(step / "state/ocdbt.process_0"), 0),
    "a byte of the arrays' index": lambda step: flip(biggest(step / "state/d"), 20),
    "a byte of the manifest": lambda step: flip(step / "state/manifest.ocdbt", 0),
    "the manifest is gone": lambda step: (step / "state/manifest.ocdbt").unlink(),
    "the tree's description is cut": lambda step: os.truncate(step / "state/_METADATA", 100),
    "a name in the tree's description": lambda step: edit(step / "state/_METADATA", "key_type", "key_tyqe"),
    "a name in the arrays' description": lambda step: edit(
        next((step / "state/array_metadatas").iterdir()), '"array_metadata"', '"array_metadatb"'
    ),
    "the record is gone": lambda step: (step / "run/metadata").unlink(),
    "the record is cut": lambda step: os.truncate(step / "run/metadata", 50),
    "the record is no text": lambda step: (step / "run/metadata").write_bytes(b"\xff\xfe"),
    "a number of the data's state": lambda step: edit(step / "run/metadata", '"at": 2', '"at": 3'),
    "the record's folder is gone": lambda step: shutil.rmtree(step / "run"),
    "the arrays' folder is gone": lambda step: shutil.rmtree(step / "state"),
    "the arrays' folder is empty": lambda step: empty(step / "state"),
    "the step is empty": empty,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_step_is_put_aside_and_can_be_saved_again(tmp_path, two_steps, lines, kind):
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    DAMAGE[kind](folder / "checkpoints/2")
    with opened(folder) as saver:
        step, found, data = saver.restore(abstract(state_of(0)))
        assert (step, data) == (1, {"at": 1})
        assert bits(found) == bits(state_of(1))
        assert len(lines) == 1
        assert lines[0].startswith(f"step 2 does not restore, moved to {folder}/checkpoints/damaged-2: ")
        assert "\n" not in lines[0]
        assert saver.save(2, state_of(22), {"at": 22})
        step, found, data = saver.restore(abstract(state_of(0)))
    assert (step, int(found["step"]), data) == (2, 22, {"at": 22})
    assert (folder / "checkpoints/damaged-2").is_dir()


def test_reads_that_never_began_are_not_told_of(tmp_path, two_steps, lines, monkeypatch):
    """Orbax leaves them behind when another read fails; whoever collects them is warned, and pytest makes it an error."""

    async def read():
        raise AssertionError("never begun")

    def restore(*args, **kwargs):
        abandoned = [read()]
        abandoned.append(abandoned)  # a cycle, as a task's frames are: it goes when garbage is collected
        raise ValueError("NOT_FOUND")

    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    with opened(tmp_path) as saver:
        monkeypatch.setattr(type(saver.manager), "restore", restore)
        assert saver.restore(abstract(state_of(0))) is None
    assert len(lines) == 2


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_flipped_byte_of_any_file_is_seen_or_without_effect(tmp_path, two_steps, times):
    """No byte of step 2 can be flipped so that something else is restored as step 2."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    chosen, steps = random.Random(0), tmp_path / "checkpoints"
    files = [file for file in sorted((steps / "2").rglob("*")) if file.is_file() and file.stat().st_size]
    seen = set()
    with opened(tmp_path) as saver:
        for file in files * times:
            whole = file.read_bytes()
            flip(file, chosen.randrange(len(whole)))
            step, found, data = saver.restore(abstract(state_of(0)))
            assert bits(found) == bits(state_of(step))
            assert data == {"at": step}
            if step == 1:
                seen.add(file)
                (steps / "damaged-2").rename(steps / "2")
            file.write_bytes(whole)
    assert {steps / "2/run/metadata", steps / "2/state/manifest.ocdbt"} <= seen  # every byte of these counts


def test_a_flipped_byte_of_an_array_is_named(tmp_path, two_steps, lines):
    """Numbers that do not compress are stored as they are: only the digest tells."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    file = biggest(tmp_path / "checkpoints/2/state/ocdbt.process_0")
    flip(file, file.stat().st_size // 2)
    with opened(tmp_path) as saver:
        assert saver.restore(abstract(state_of(0)))[0] == 1
    assert lines[0].endswith(": the values of w are not those that were saved")


def test_damaged_steps_do_not_overwrite_each_other(tmp_path, two_steps):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    with opened(tmp_path) as saver:
        for _ in range(3):
            saver.save(2, state_of(2), {})
            saver.wait()
            empty(tmp_path / "checkpoints/2")
            assert saver.restore(abstract(state_of(0)))[0] == 1
    assert {"damaged-2", "damaged-2-2", "damaged-2-3"} < {p.name for p in (tmp_path / "checkpoints").iterdir()}


def test_storage_that_does_not_answer_is_no_damage(tmp_path, two_steps, monkeypatch):
    """Raising what Tensorstore raises then; the step stays where it is."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    with opened(tmp_path) as saver:

        def unavailable(*_, **__):
            raise ValueError("UNAVAILABLE: Error reading from the bucket")

        monkeypatch.setattr(saver.manager, "restore", unavailable)
        with pytest.raises(ValueError, match="UNAVAILABLE"):
            saver.restore(abstract(state_of(0)))
    assert (tmp_path / "checkpoints/2").is_dir()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"w": replaced(t["w"], shape=(8, 8))}, r"w was float32\[64, 64\], is float32\[8, 8\]"),
        (lambda t: t | {"w": replaced(t["w"], dtype=jnp.bfloat16)}, r"w was float32\[64, 64\], is bfloat16\[64, 64\]"),
        (lambda t: t | {"more": t["w"]}, r"more was absent, is float32\[64, 64\]"),
        (lambda t: {"w": t["w"]}, r"step was int32\[\], is absent"),
    ],
)
def test_another_models_state_is_no_damage(tmp_path, two_steps, change, said):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    with opened(tmp_path) as saver, pytest.raises(ValueError, match=f"another model, 1 of .*{said}"):
        saver.restore(change(abstract(state_of(0))))
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}


def replaced(struct, shape=None, dtype=None):
    return jax.ShapeDtypeStruct(shape or struct.shape, dtype or struct.dtype, sharding=struct.sharding)


def test_what_cannot_be_saved_or_restored_is_named(tmp_path):
    with opened(tmp_path) as saver:
        with pytest.raises(ValueError, match=r"a\.n of the state is a int"):
            saver.save(1, {"a": {"n": 3}}, {})
        with pytest.raises(ValueError, match="a of the state has no elements"):
            saver.save(1, {"a": jnp.zeros((0, 3))}, {})
        with pytest.raises(ValueError, match="2 arrays have 1 names"):
            saver.save(1, {"a.b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}, {})
        with pytest.raises(ValueError, match="w of the target has no sharding"):
            saver.restore({"w": jax.ShapeDtypeStruct((1,), jnp.float32)})
    assert list((tmp_path / "checkpoints").iterdir()) == []


# ---------------------------------------------------------------- the digest


def test_digests_do_not_depend_on_the_layout_and_see_every_bit():
    values = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    whole = int(digest(jnp.asarray(values)))
    assert int(digest(jax.device_put(values, layout(4, "data", "fsdp")))) == whole
    for bit in range(32):
        spoiled = values.view(np.uint32).copy()
        spoiled[3, 5] ^= np.uint32(1 << bit)
        assert int(digest(jnp.asarray(spoiled.view(np.float32)))) != whole
    moved = values.copy()
    moved[[0, 1]] = moved[[1, 0]]
    assert int(digest(jnp.asarray(moved))) != whole
    assert int(digest(jnp.asarray(-values))) != whole


def test_a_digest_by_hand():
    """The finalizer of MurmurHash3 takes 0 to 0 and 1 to 0x514e28b7."""
    assert int(digest(jnp.uint32(0))) == 0
    assert int(digest(jnp.uint32(1))) == 0x514E28B7


# ---------------------------------------------------------------- the recipe


def test_a_run_goes_on_with_its_recipe_alone(tmp_path):
    recipe = recipes.RlConfig(items=recipes.Items(files=("rows.jsonl",)))
    run = str(tmp_path / "deep/run")
    claim(run, recipe)
    free = replace(recipe, output="elsewhere", devices=3, log_samples_every=1, profile=(3,), checkpoints=DAILY)
    claim(run, free)
    assert (tmp_path / "deep/run/recipe.json").read_text() == recipes.as_json(free)
    with pytest.raises(ValueError, match=r"kl_coef was 0\.08, is 0\.1; seed was 0, is 5"):
        claim(run, replace(recipe, seed=5, kl_coef=0.1))
    assert (tmp_path / "deep/run/recipe.json").read_text() == recipes.as_json(free)
    claim(run, replace(recipe, steps=200))  # a constant schedule does not know how long it lasts
    cosine = replace(recipe, optimizer=replace(recipe.optimizer, schedule="cosine"))
    claim(str(tmp_path / "cosine"), cosine)
    with pytest.raises(ValueError, match="steps was 100, is 200"):
        claim(str(tmp_path / "cosine"), replace(cosine, steps=200))
    (tmp_path / "deep/run/recipe.json").write_text("{")
    with pytest.raises(ValueError, match="holds no recipe"):
        claim(run, recipe)


def test_a_step_holds_the_recipe(two_steps):
    run = json.loads((two_steps / "checkpoints/2/run/metadata").read_text())
    assert run["recipe"] == json.loads(recipes.as_json(RECIPE))


# ---------------------------------------------------------------- being stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_a_flag_and_handlers_come_back(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with Interrupt() as interrupt:
        assert not interrupt.asked
        signal.raise_signal(number)
        assert interrupt.asked
        signal.raise_signal(signal.SIGTERM)  # any number of them
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_sigint_stops_at_once():
    before, reached = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), Interrupt():  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        reached.append("after the first")
        signal.raise_signal(signal.SIGINT)
        reached.append("after the second")
    assert reached == ["after the first"]
    assert signal.getsignal(signal.SIGINT) == before


def test_outside_of_the_main_thread_it_does_nothing():
    before, found = signal.getsignal(signal.SIGTERM), []

    def enter():
        with Interrupt() as interrupt:
            found.append((interrupt.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(False, before)]


SAVES = """
import sys
import jax, jax.numpy as jnp
from grm_jax import checkpoint, recipes
folder = sys.argv[1]
here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
target = {f"w{i}": jax.ShapeDtypeStruct((256, 1024), jnp.float32, sharding=here) for i in range(8)}
advance = jax.jit(lambda state: {name: x + 1 for name, x in state.items()}, donate_argnums=0)
with checkpoint.Saver.open(folder, recipes.Checkpoints(every=1, keep_last=2), "{}") as saver:
    found = saver.restore(target)
    step, state, data = found or (0, {name: jnp.zeros(x.shape, x.dtype) for name, x in target.items()}, {"at": 0})
    assert data == {"at": step} and all(bool((x == step).all()) for x in state.values())
    while True:
        state, step = advance(state), step + 1
        saver.save(step, state, {"at": step})
        print(step, flush=True)
"""


def kill_while_saving(folder, kills):
    """Kill a process that saves without a pause, time after time, at random."""
    chosen, env = random.Random(0), os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    for _ in range(kills):
        with subprocess.Popen([sys.executable, "-c", SAVES, str(folder)], stdout=subprocess.PIPE, env=env) as process:
            for _ in range(chosen.randrange(1, 6)):
                assert process.stdout.readline(), "it ended by itself"
            time.sleep(chosen.random() / 5)
            process.kill()
            assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_killed_run_leaves_whole_steps_alone(tmp_path, kills, lines):
    """Each process checks that what it restores is all of one step; so does this one at the end."""
    kill_while_saving(tmp_path, kills)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {f"w{i}": jax.ShapeDtypeStruct((256, 1024), jnp.float32, sharding=one) for i in range(8)}
    with opened(tmp_path) as saver:
        step, found, data = saver.restore(target)
        assert step >= 1
        assert data == {"at": step}
        assert all(bool((x == step).all()) for x in found.values())
        saver.save(step + 1, found, {})
    assert not [line for line in lines if "does not restore" in line]
    assert all(path.name.isdigit() for path in Path(tmp_path, "checkpoints").iterdir())


def test_parts_of_a_step_that_was_being_written_are_removed(tmp_path, two_steps, lines):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    steps = tmp_path / "checkpoints"
    (steps / "2").rename(steps / "5.orbax-checkpoint-tmp")  # so Orbax calls it until all of it is there
    with opened(tmp_path) as saver:
        assert saver.restore(abstract(state_of(0)))[0] == 1
        assert lines == [f"{steps}/5.orbax-checkpoint-tmp: the run ended while this was written; removed"]
        saver.save(2, state_of(2), {})
    assert sorted(place.name for place in steps.iterdir()) == ["1", "2"]


TWO_PROCESSES = """
import os, signal, sys
from pathlib import Path
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
me, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, me)
from grm_jax import checkpoint, recipes
from grm_jax.log import to_stderr
from grm_jax.sharding import make_mesh
to_stderr(process_index=me)
layout = NamedSharding(make_mesh(data=2, devices=jax.devices()), PartitionSpec("data"))
def state(value):
    whole = np.random.default_rng(value).standard_normal((64, 64)).astype(np.float32)
    return {"w": jax.make_array_from_callback(whole.shape, layout, lambda index: whole[index])}
def opened():
    return checkpoint.Saver.open(folder, recipes.Checkpoints(), "{}")
target = {"w": jax.ShapeDtypeStruct((64, 64), np.float32, sharding=layout)}
with opened() as saver:
    saver.save(1, state(1), {})
    saver.save(2, state(2), {})
if me == 0:  # of the part that process 1 wrote, and alone reads
    files = (file for file in Path(folder, "checkpoints/2/state/ocdbt.process_1").rglob("*") if file.is_file())
    os.truncate(max(files, key=lambda file: file.stat().st_size), 100)
multihost_utils.sync_global_devices("cut")
with opened() as saver, checkpoint.Interrupt() as interrupt:
    step, found, _ = saver.restore(target)
    saver.save(2, found, {})
    if me == 1:
        signal.raise_signal(signal.SIGTERM)
    asked = interrupt.asked
    same = all(np.array_equal(a.data, b.data) for a, b in zip(
        found["w"].addressable_shards, state(1)["w"].addressable_shards))
    print(step, same, asked, saver.restore(target)[0])
"""


@pytest.mark.slow
def test_processes_agree_on_the_step_and_on_leaving(tmp_path):
    """Process 1 alone meets the damage, and is alone asked to leave; both do the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(me), str(port), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )
        for me in range(2)
    ]  # fmt: skip
    for process in both:
        out, err = process.communicate(timeout=120)
        assert out.splitlines()[-1:] == ["1 True True 2"], err
    assert sorted(place.name for place in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "damaged-2"]


# ---------------------------------------------------------------- buckets

IN_A_BUCKET = """
import sys
import jax, jax.numpy as jnp
from etils import epath
from grm_jax import checkpoint, recipes
from grm_jax.log import to_stderr
to_stderr()
damaged = sys.argv[1] == "damaged"
run, recipe = "gs://judge/runs/a", recipes.SampleConfig(items=recipes.Items(files=("rows.jsonl",)))
for _ in range(2):
    checkpoint.claim(run, recipe)
here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
state = lambda step: {"w": jnp.full((64, 64), step, jnp.bfloat16)}
target = {"w": jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=here)}
steps = epath.Path(run) / "checkpoints"
def opened():
    return checkpoint.Saver.open(run, recipes.Checkpoints(keep_last=2), recipes.as_json(recipe))
with opened() as saver:
    assert saver.restore(target) is None
    for step in (1, 2, 3):
        saver.save(step, state(step), {"at": step})
if damaged:
    manifest = steps / "3/state/manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:10])
else:
    (steps / "3/commit_success.txt").unlink()
with opened() as saver:
    step, found, data = saver.restore(target)
    assert (step, data) == (2, {"at": 2}) and bool((found["w"] == 2).all()), step
    saver.save(3, state(33), {"at": 33})
    step, found, data = saver.restore(target)
    assert (step, data) == (3, {"at": 33}) and bool((found["w"] == 33).all()), step
print(sorted(path.name for path in steps.iterdir()), (epath.Path(run) / "recipe.json").read_text()[:1])
"""


BUCKET = "gs://judge/runs/a/checkpoints"


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the emulator's sockets
@pytest.mark.parametrize(
    ("kind", "left", "said"),
    [
        ("unfinished", "['2', '3'] {", f"{BUCKET}/3: the run ended while this was written; removed"),
        pytest.param(  # slow: the emulator cannot rename, and gcsfs asks it many times
            *("damaged", "['2', '3', 'damaged-3'] {", f"step 3 does not restore, moved to {BUCKET}/damaged-3"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_checkpoints_in_a_bucket(bucket, kind, left, said):
    command = [sys.executable, "-c", IN_A_BUCKET, kind]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | bucket, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [left]
    assert done.stderr.count(said) == 1
