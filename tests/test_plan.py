"""Plans: what a compiled program does, counted by hand and by `hlo`; and the command, on simulated devices and for TPUs."""

import dataclasses
import re
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_rl_step import RECIPE, SMALL

from grm_jax.config import PlanConfig, parted
from grm_jax.models.flops import model_flops
from grm_jax.plan import chips, hlo, known, programs, report
from grm_jax.sharding import make_mesh

WIDE = dataclasses.replace(SMALL, vocab_size=264)


def text_of(function, *args, **how):
    return jax.jit(function, **how).lower(*args).compile().as_text()


def total(text, mesh=None, steps=1):
    found = hlo.Cost()
    for cost in hlo.costs(text, mesh or {"data": 1}, steps).values():
        found.flops += cost.flops
        found.bytes += cost.bytes
        for key, value in cost.collectives.items():
            found.add_collective(*key, *value)
    return found


def test_a_product_in_a_loop_counts_as_often_as_it_runs():
    w, x = jnp.ones((64, 64)), jnp.ones((64, 32))

    def scanned(w, x):
        return jax.lax.scan(lambda x, _: (w @ x, None), x, None, length=7)[0]

    def until(w, x):
        return jax.lax.while_loop(lambda s: s[1].sum() < 1e30, lambda s: (s[0] + 1, w @ s[1]), (0, x))[1]

    once = 2 * 64 * 64 * 32
    assert total(text_of(lambda w, x: w @ x, w, x)).flops == once
    assert total(text_of(scanned, w, x)).flops == 7 * once
    assert total(text_of(until, w, x), steps=100).flops == 100 * once


def test_slices_and_updates_in_place_move_their_own_size():
    store, row = jnp.zeros((1000, 256)), jnp.ones((1, 256))

    def put(store, row, at):
        return jax.lax.dynamic_update_slice(store, row, (at, 0))

    moved = total(text_of(put, store, row, jnp.int32(3), donate_argnums=0)).bytes
    assert moved < 10 * row.nbytes
    assert total(text_of(lambda x: x + 1, store)).bytes == 2 * store.nbytes


def test_phases_are_named_scopes():
    def step(w, x):
        with jax.named_scope("prefill"):
            x = w @ x
        with jax.named_scope("gradient"):
            return jax.grad(lambda w: jnp.sum(jnp.sin(w @ x)))(w)

    found = hlo.costs(text_of(step, jnp.ones((8, 8)), jnp.ones((8, 4))), {"data": 1}, 1)
    assert found["prefill"].flops == 2 * 8 * 8 * 4
    assert found["gradient"].flops == 2 * 2 * 8 * 8 * 4


def test_collectives_by_axis_and_bytes():
    mesh = make_mesh(2, 2, 2)
    x = jax.device_put(jnp.ones((16, 16)), NamedSharding(mesh, PartitionSpec("data", "fsdp")))
    w = jax.device_put(jnp.ones((16, 16)), NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    out = NamedSharding(mesh, PartitionSpec("data", "tensor"))
    text = text_of(lambda x, w: x @ w, x, w, out_shardings=out)
    found = total(text, dict(mesh.shape)).collectives
    # Each device has half of the sum over the shared axis, [8, 8] floats, and sends it once around a ring of two.
    assert found == {("all-reduce", "fsdp"): (1, 8 * 8 * 4)}
    gathered = text_of(lambda x: x * 2, x, out_shardings=NamedSharding(mesh, PartitionSpec("data")))
    assert total(gathered, dict(mesh.shape)).collectives == {("all-gather", "fsdp"): (1, 8 * 8 * 4)}


def test_products_as_a_tpu_writes_them():
    """A batch of 16 products of [8, 128] and [128, 64] as a dilated convolution; and experts' products as custom calls."""
    line = (
        "ENTRY %e (a: f32[16,8,128], b: f32[16,128,64]) -> f32[16,8,64] {\n"
        "  %a = f32[16,8,128]{2,1,0} parameter(0)\n  %b = f32[16,128,64]{2,1,0} parameter(1)\n"
        "  ROOT %c = f32[16,8,64]{2,1,0} convolution(%a, %b), window={size=16 stride=15 lhs_dilate=16}, "
        "dim_labels=0bf_0io->0bf\n}\n"
    )
    assert total(line).flops == 2 * 16 * 8 * 128 * 64
    line = (
        "ENTRY %e (n: s32[1], a: bf16[96,32], b: bf16[4,32,64]) -> f32[96,64] {\n  %n = s32[1]{0} parameter(0)\n"
        "  %a = bf16[96,32]{1,0} parameter(1)\n  %b = bf16[4,32,64]{2,1,0} parameter(2)\n"
        "  ROOT %ragged-dot-none.1 = f32[96,64]{1,0} custom-call(%n, %a, %b), "
        'custom_call_target="tpu_custom_call", metadata={op_name="ragged-dot-none"}\n}\n'
    )
    assert total(line).flops == 2 * 96 * 32 * 64
    assert total(line, {"expert": 4}).flops == 2 * 96 * 32 * 64 / 4, "an even share of the rows is of experts here"
    line = (
        "ENTRY %e (a: bf16[96,64], b: bf16[96,32]) -> f32[4,64,32] {\n"
        "  %a = bf16[96,64]{1,0} parameter(0)\n  %b = bf16[96,32]{1,0} parameter(1)\n"
        "  ROOT %ragged-dot-x = f32[4,64,32]{2,1,0} custom-call(%a, %b), "
        'custom_call_target="tpu_custom_call", metadata={op_name="ragged-dot-x"}\n}\n'
    )
    assert total(line).flops == 2 * 96 * 32 * 64
    assert total(line.replace("ragged-dot-x", "tgmm.3"), {"expert": 4}).flops == 2 * 96 * 32 * 64 / 4


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("fusion(%a), kind=kLoop, calls=%f", 4 * 1024 * 128 + 4 * 8 * 128),  # reads all of it, writes its result
        ("fusion(%a), kind=kLoop, calls=%g", 2 * 4 * 8 * 128),  # gathers rows
        ("gather(%a, %a)", 2 * 4 * 8 * 128),
        ("dynamic-slice(%a, %a)", 2 * 4 * 8 * 128),
        ("negate(%chip)", 4 * 8 * 128),  # read from the chip
    ],
)
def test_memory_moves_what_is_not_on_the_chip(line, moved):
    text = (
        "%f (p: f32[1024,128]) -> f32[8,128] {\n  %p = f32[1024,128]{1,0} parameter(0)\n"
        "  ROOT %r = f32[8,128]{1,0} reduce(%p)\n}\n"
        "%g (p: f32[1024,128]) -> f32[8,128] {\n  %p = f32[1024,128]{1,0} parameter(0)\n"
        "  ROOT %r = f32[8,128]{1,0} gather(%p, %p)\n}\n"
        "ENTRY %e (a: f32[1024,128]) -> f32[8,128] {\n  %a = f32[1024,128]{1,0} parameter(0)\n"
        "  %chip = f32[8,128]{1,0:T(8,128)S(1)} parameter(1)\n"
    )
    assert total(f"{text}  ROOT %o = f32[8,128]{{1,0}} {line}\n}}\n").bytes == moved
    on_chip = f"{text}  ROOT %o = f32[8,128]{{1,0:T(8,128)S(1)}} {line}\n}}\n"
    assert total(on_chip).bytes == moved - 4 * 8 * 128


def test_memory_moves_what_is_fetched_ahead():
    """A slice by its own size, however large what it is of; a copy on its way to the chip is read alone."""
    text = (
        "ENTRY %e (a: f32[1024,128]) -> f32[8,128] {\n  %a = f32[1024,128]{1,0} parameter(0)\n"
        "  %s = ((f32[1024,128]{1,0}), f32[8,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a)\n"
        "  ROOT %d = f32[8,128]{1,0:S(1)} slice-done(%s)\n}\n"
    )
    assert total(text).bytes == 4 * 8 * 128
    assert total(text.replace(":S(1)", "")).bytes == 2 * 4 * 8 * 128
    text = (
        "ENTRY %e (a: f32[1024,128]) -> f32[1024,128] {\n  %a = f32[1024,128]{1,0} parameter(0)\n"
        "  %s = (f32[1024,128]{1,0:S(1)}, f32[1024,128]{1,0}, u32[]) copy-start(%a)\n"
        "  ROOT %d = f32[1024,128]{1,0:S(1)} copy-done(%s)\n}\n"
    )
    assert total(text).bytes == 4 * 1024 * 128
    back = text.replace("(f32[1024,128]{1,0:S(1)}, f32[1024,128]{1,0}", "(f32[1024,128]{1,0}, f32[1024,128]{1,0}")
    assert total(back).bytes == 2 * 4 * 1024 * 128


def test_splash_attention_counts_its_products_and_its_calls():
    """3 rows, 4 heads, 256 queries, 384 keys of 64 numbers, values of 32: a mix is half of the scores' products."""
    line = (
        "ENTRY %e (b: s8[1,1,1], q: bf16[3,4,256,64], k: bf16[3,2,384,64], v: bf16[3,2,384,32]) -> bf16[3,4,256,32] {\n"
        "  %b = s8[1,1,1]{2,1,0} parameter(0)\n  %q = bf16[3,4,256,64]{3,2,1,0} parameter(1)\n"
        "  %k = bf16[3,2,384,64]{3,2,1,0} parameter(2)\n  %v = bf16[3,2,384,32]{3,2,1,0} parameter(3)\n"
        "  ROOT %splash_mha_PHASE_segmented_residuals.7 = bf16[3,4,256,32]{3,2,1,0} custom-call(%b, %q, %k, %v), "
        'custom_call_target="tpu_custom_call"\n}\n'
    )
    scores, mix = 2 * 3 * 4 * 256 * 384 * 64, 2 * 3 * 4 * 256 * 384 * 32
    for phase, flops in (("fwd", scores + mix), ("dq", 2 * scores + mix), ("dkv", 2 * scores + 2 * mix)):
        cost = hlo.costs(line.replace("PHASE", phase), {"data": 1}, 1)["rest"]
        assert cost.flops == flops
        assert cost.kernels == {f"splash_mha_{phase}": 1}


def test_what_starts_and_is_done_later_moves_once():
    line = (
        "ENTRY %e (a: f32[128]) -> f32[256] {\n  %a = f32[128]{0} parameter(0)\n"
        "  %s = (f32[128]{0}, f32[256]{0}) all-gather-start(%a), replica_groups=[1,2]<=[2], dimensions={0}\n"
        "  ROOT %d = f32[256]{0} all-gather-done(%s)\n}\n"
    )
    found = total(line, {"data": 2})
    assert found.bytes == 4 * (128 + 256)
    assert found.collectives == {("all-gather", "data"): (1, 4 * 128)}


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "tensor"),
        ("replica_groups=[4,2]<=[8]", "tensor"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "data"),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", "data+tensor"),
        ("replica_groups=[1,8]<=[8]", "data+fsdp+tensor"),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", "data"),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", "tensor"),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", "fsdp"),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, dimensions={1}", "data+tensor"),
        ("source_target_pairs={{0,2},{2,0}}", "fsdp"),
    ],
)
def test_groups_lie_along_axes(rest, expected):
    assert hlo.axes_of(rest, {"data": 2, "fsdp": 2, "tensor": 2}) == expected


def test_the_programs_of_a_run_compile_and_do_what_the_formula_says():
    """Decoding of the tiny model on four devices: FLOPs within 5 % of the formula, and nothing gathered in its loop."""
    mesh = make_mesh(1, 2, 2)
    recipe = dataclasses.replace(RECIPE, max_prompt_tokens=64, max_new_tokens=32, slots=8)
    found = {program.name: program for program in programs.programs(recipe, WIDE, mesh)}
    assert list(found) == ["rl", "prefill", "decode"]
    decode = found["decode"]
    text = decode.lowered().compile().as_text()
    cost = hlo.costs(text, dict(mesh.shape), decode.steps)["decode"]
    expected = model_flops(WIDE, 8 * 32, 0, 64 + 128) / 4  # all slots of prompt and ring
    assert cost.flops == pytest.approx(expected, rel=0.05)
    assert hlo.loops_that_gather(text, "decode", least=256) == []  # masks of rows alone
    weights = report.shard_bytes(decode.arguments["weights"])
    assert report.shard_bytes(decode.arguments["cache"]) == (4 * 1 * (64 + 128) * (2 * 8 * 4 + 4))
    assert weights == 2 * report.shard_bytes(found["rl"].arguments["weights"])  # `fsdp` splits the masters alone


def test_weights_that_are_gathered_in_the_loop_are_found():
    mesh = make_mesh(1, 2, 2)
    w = jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, PartitionSpec("fsdp")))
    x = jax.device_put(jnp.ones((64, 8)), NamedSharding(mesh, PartitionSpec()))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def loop(w, x):
        with jax.named_scope("decode"):

            def body(state):
                w, x = state
                return w * 1.5, jax.lax.with_sharding_constraint(w, everywhere) @ x

            return jax.lax.while_loop(lambda state: state[1].sum() < 1e9, body, (w, x))

    assert hlo.loops_that_gather(text_of(loop, w, x), "decode", least=1024)


def test_what_goes_between_slices_is_counted_apart():
    """A sum over 4 slices takes 2 * 3 / 4 of the array, a gathering 3 times what each brings; links carry none of it."""
    line = (
        "ENTRY %e (a: f32[8,128]) -> f32[8,128] {\n  %a = f32[8,128]{1,0} parameter(0)\n  %t = token[] after-all()\n"
        "  %send = (f32[8,128]{1,0}, u32[], token[]) send(%a, %t), channel_id=2, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_transfer_type="KIND"}\n'
        "  ROOT %c = f32[8,128]{1,0} copy(%a)\n}\n"
    )
    for kind, share in (("ALL_REDUCE", 1.5), ("ALL_GATHER", 3.0), ("REDUCE_SCATTER", 0.75), ("ONE_TO_ONE", 1.0)):
        cost = hlo.costs(line.replace("KIND", kind), {"data": 1}, 1, slices=4)["rest"]
        assert (cost.crossed, cost.sent) == (share * 8 * 128 * 4, 0.0), kind
        assert list(cost.collectives) == [(kind.lower().replace("_", "-"), "slices")]


def test_a_bound_is_the_longest_of_four():
    chip = chips.Chip(memory=1.0, bandwidth=10.0, links=2.0, network=1.0, accelerator="-")
    cost = hlo.Cost(flops=100.0, bytes=100.0)
    assert report.bound(cost, chip, peak=5.0) == (20.0, "FLOPs")
    assert report.bound(cost, chip, peak=50.0) == (10.0, "memory")
    cost.add_collective("all-gather", "fsdp", 1, 44.0)
    assert report.bound(cost, chip, peak=50.0) == (22.0, "links")
    cost.add_collective("all-reduce", "slices", 1, 23.0)
    assert report.bound(cost, chip, peak=50.0) == (23.0, "network")


def test_known_numbers_have_the_sizes_of_the_papers():
    from grm_jax.models.decoder import split_abstract

    for name, billions in (
        ("gemma-2-9b", 9.24),
        ("gemma-2-27b", 27.23),
        ("deepseek-v2-lite", 15.7),
        ("qwen2.5-7b", 7.62),
    ):
        shapes = split_abstract(known.numbers(name))[1].values()
        assert sum(jnp.prod(jnp.array(shape, jnp.float32)).item() for shape, _ in shapes) / 1e9 == pytest.approx(
            billions, abs=0.03
        ), name


def test_options_of_the_plan_and_of_the_config_part():
    own, rest = parted(
        ["--config", "c.py", "--mesh.fsdp", "2", "--cpu-devices=4", "--only", "a", "b"],
        {"--config", "--cpu-devices", "--only"},
    )
    assert own == ["--config", "c.py", "--cpu-devices=4", "--only", "a", "b"]
    assert rest == ["--mesh.fsdp", "2"]
    with pytest.raises(ValueError, match="give --topology, such as v5p:4x4x4, or --cpu-devices"):
        PlanConfig("c.py")
    with pytest.raises(ValueError, match="slices = 2: it is at least 1, and of a --topology"):
        PlanConfig("c.py", cpu_devices=8, slices=2)


def plan(*args, config="configs/gemma2_27b_rl.py"):
    command = [sys.executable, "-m", "grm_jax.main", "plan", "--config", config, *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)


def test_bad_plans_say_what_is_wrong():
    done = plan("--cpu-devices", "4", "--numbers", "nobody")
    assert done.returncode == 2
    assert "nobody is not to be read here" in done.stderr
    assert "gemma-2-27b" in done.stderr
    done = plan("--topology", "v9:2x2", "--numbers", "gemma-2-9b")
    assert done.returncode == 2
    assert "begins with one of v4, v5e, v5p, v6e, tpu7x" in done.stderr


needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'grm-jax[tpu]'"
)


@pytest.mark.slow
@needs_libtpu
def test_two_slices_are_joined_by_sums_over_data_alone():
    """A whole step of RL over two slices: gradients cross the network, and nothing does while decoding."""
    tiny = ("--numbers", "tests/goldens/llama", "--topology", "v5e:2x2", "--slices", "2", "--only", "rl")
    done = plan(*tiny, "--mesh.data", "2", "--mesh.fsdp", "4", config="configs/tiny_rl.py")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "mesh: data 2 x fsdp 4 x tensor 1 x expert 1; 2 slices along data" in done.stdout
    decode = next(line for line in done.stdout.splitlines() if "decode" in line)
    assert "slices" not in decode
    assert re.search(r"all-reduce over slices", done.stdout)
    done = plan(*tiny, "--mesh.data", "1", "--mesh.fsdp", "8", config="configs/tiny_rl.py")
    assert done.returncode == 2
    assert "mesh.data = 1 over 2 slices: they are split along data, make it a multiple of 2" in done.stderr


@pytest.mark.slow
@needs_libtpu
def test_a_27b_fits_64_chips():
    done = plan(
        "--topology",
        "v5p:4x4x4",
        "--numbers",
        "gemma-2-27b",
        "--mesh.tensor",
        "4",
        "--mesh.fsdp",
        "16",
        "--mesh.data",
        "1",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "gathers in its decoding loop" not in done.stderr
    assert re.search(r"kernels: .*splash_mha_fwd.*splash_mha_d", done.stdout), "plain attention on a TPU"
