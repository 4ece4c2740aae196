"""The sharding lab without a TPU compiler: reading programs, the torus, first estimates, reports, errors."""

import dataclasses
import gzip
import importlib.util
import json
import math
from pathlib import Path

import pytest
from oracles import random_model, random_tokens, slow, tiny_config

from jaxseek.cli import main as cli
from jaxseek.config.model import ConfigError, ModelConfig, configs_dir
from jaxseek.config.rl import ReferenceConfig
from jaxseek.engine.engine import Engine
from jaxseek.engine.sampling import Sampling
from jaxseek.hardware import CHIPS, HOP_SECONDS, Topology
from jaxseek.lab import analytic, collectives, compile, hlo, memory, plan, planned_run, report, sweep
from jaxseek.lab.job import Job, room, train_run
from jaxseek.rl.packing import Shapes
from jaxseek.sharding.strategy import Strategy

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = ModelConfig.from_preset("tiny-v3")
NO_LIBTPU = importlib.util.find_spec("libtpu") is None

# Lines of a decode step of tiny-v3 for v5e:2x4 (expert=4, tensor=2), operands and layouts shortened.
PROGRAM = (Path(__file__).parent / "programs" / "decode.hlo").read_text(encoding="utf-8")


def ops(kind):
    return [o for o in hlo.read_program(PROGRAM).ops if o.kind == kind]


# -------------------------------------------------------------------- programs


def test_what_a_loop_holds_counts_as_often_as_it_turns_and_an_unknown_loop_once():
    copy, fusion = ops("xla")
    assert (fusion.name, fusion.times, fusion.cycles, fusion.dispatch) == ("fusion.7", 5, 1826, False)
    assert (copy.name, copy.times, copy.dispatch) == ("copy.9", 1, True)
    assert hlo.read_program(PROGRAM).loops == ["while.130"]


def test_cycles_that_mean_unknown_are_left_out_and_named():
    assert hlo.read_program(PROGRAM).sentinels == ["gather.2"]


def test_kernels_bring_their_own_estimate_or_the_bytes_of_what_they_touch():
    gmm, bare = ops("pallas")
    assert (gmm.flops, gmm.bytes, gmm.times) == (4194304, 212992, 5)
    assert bare.bytes == 2 * (128 * 64 + 8 * 256)
    assert hlo.read_program(PROGRAM).kernels_without_estimate == ["bare.1"]


# A loop over 26 layers, as libtpu 0.0.42 prints elements of tuples and as 0.0.46 and later do.
OLD_LOOP = """
%body (p: (s32[], (bf16[8,64], f32[4]))) -> (s32[], (bf16[8,64], f32[4])) {
  %p = (s32[]{:T(128)}, (bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[4]{0})) parameter(0)
  %pair = (bf16[8,64]{1,0}, f32[4]{0}) get-tuple-element(%p), index=1
  %x = bf16[8,64]{1,0} get-tuple-element(%pair), index=0
  %sum = bf16[8,64]{1,0} all-reduce(%x), replica_groups={{0,1}}
  %kernel.1 = bf16[8,64]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  %start = ((bf16[8,64]{1,0}), bf16[8,64]{1,0}, u32[]) copy-start(%x)
  %done = bf16[8,64]{1,0} copy-done(%start)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %out = (s32[], (bf16[8,64]{1,0}, f32[4]{0})) tuple(%i, %pair)
}
%cond (q: (s32[], (bf16[8,64], f32[4]))) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(26)
  %q = (s32[]{:T(128)}, (bf16[8,64]{1,0}, f32[4]{0})) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %constant.1), direction=LT
}
ENTRY %main (a: (s32[], (bf16[8,64], f32[4]))) -> (s32[], (bf16[8,64], f32[4])) {
  %a = (s32[], (bf16[8,64]{1,0}, f32[4]{0})) parameter(0)
  ROOT %while.1 = (s32[], (bf16[8,64]{1,0}, f32[4]{0})) while(%a), condition=%cond, body=%body
}
"""
NEW_LOOP = "".join(line for line in OLD_LOOP.splitlines(True) if "get-tuple-element" not in line)
for old, new in (("(%x)", "(%p#1#0)"), ("%i, %pair", "%p#0, %p#1"), ("compare(%j,", "compare(%q#0,")):
    NEW_LOOP = NEW_LOOP.replace(old, new)


def test_elements_of_tuples_read_the_same_as_instructions_and_as_marks_on_operands():
    assert "get-tuple-element" not in NEW_LOOP
    old, new = hlo.read_program(OLD_LOOP), hlo.read_program(NEW_LOOP)
    assert new == old
    assert (old.loops, [o.times for o in old.ops]) == ([], [26] * 3)
    assert [o.bytes for o in old.ops] == [1024, 2048, 1024]  # of the element, not of its tuple


def test_an_element_that_a_tuple_has_not_is_refused():
    with pytest.raises(ValueError, match="%p#7, an operand of %out, is no element of"):
        hlo.read_program(NEW_LOOP.replace("tuple(%p#0", "tuple(%p#7"))


@pytest.mark.parametrize("loop", [OLD_LOOP, NEW_LOOP], ids=["instructions", "marks"])
def test_a_plan_warns_under_the_step_of_a_loop_whose_turns_it_cannot_read(loop):
    unknown = loop.replace("direction=LT", "direction=NE")
    program = hlo.read_program(unknown)
    assert program.loops == ["while.1"]
    j = Job(TINY, Strategy.parse("expert=4,tensor=2"), Topology.parse("v5e:2x4"), "prefill", 8, 512)
    memory = dict.fromkeys(("weights", "cache", "optimizer", "temp", "peak"), 0.0)
    r = report.summarise(j, program, memory, tuple((i % 2, i // 2) for i in range(8)))
    text = report.lines("t", r).splitlines()
    (step,) = (n for n, line in enumerate(text) if line.startswith("  step"))
    assert text[step + 1].startswith("  WARNING  1 loop(s) of unknown length (while.1)")
    assert r.to_dict()["warnings"] == r.warnings != []


# Of a training step of DeepSeek-V3 for v5p, shortened: rows gathered by the sparse cores, and sent.
SENT = """
ENTRY %main (x: bf16[8,64]) -> bf16[48,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %at = s32[32]{0} parameter(1)
  %start = ((), (), (s32[32]{0})) async-start(), async_execution_thread="sparsecore", calls=%sparse
  %start.update = ((bf16[8,64]{1,0}, s32[32]{0}), bf16[32,64]{1,0}) async-update(%start, %x, %at)
  %rows = bf16[32,64]{1,0} async-done(%start.update), metadata={op_name="jit(f)/experts/gather"}
  %room = bf16[48,64]{1,0} parameter(2)
  ROOT %sent = bf16[48,64]{1,0} ragged-all-to-all(%rows, %room, %at, %at, %at, %at), replica_groups={{0,1}}
}
"""


def test_a_sum_that_is_fused_with_its_slice_is_a_reduce_scatter():
    text = """
%fused (a: bf16[16,8]) -> bf16[2,8] {
  %a = bf16[16,8]{1,0} parameter(0)
  %sum = bf16[16,8]{1,0} all-reduce(%a), replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %part = bf16[2,8]{1,0} dynamic-slice(%sum), dynamic_slice_sizes={2,8}
}
ENTRY %main (x: bf16[16,8]) -> bf16[2,8] {
  %x = bf16[16,8]{1,0} parameter(0)
  ROOT %part = bf16[2,8]{1,0} fusion(%x), calls=%fused, backend_config={EMITTER}
}
"""
    for emitter, opcode in (("SingleInputAllReduceScatterFusion", "reduce-scatter"), ("Other", "all-reduce")):
        (found,) = hlo.read_program(text.replace("EMITTER", emitter)).ops
        assert (found.opcode, found.bytes) == (opcode, 256)


def test_gathers_of_the_sparse_cores_are_read_and_written_and_an_exchange_sends_no_more_than_fits():
    gather, exchange = hlo.read_program(SENT).ops
    assert (gather.kind, gather.opcode, gather.scope, gather.bytes) == ("copy", "gather", "experts", 2 * 4096)
    assert (exchange.kind, exchange.bytes) == ("collective", 4096)  # the room for 48 rows is not all sent


def test_a_gather_that_the_compiler_does_not_estimate_is_read_and_written():
    text = """
%rows (a: bf16[64,8], at: s32[16]) -> bf16[16,8] {
  %a = bf16[64,8]{1,0} parameter(0)
  %at = s32[16]{0} parameter(1)
  ROOT %found = bf16[16,8]{1,0} gather(%a, %at), offset_dims={1}
}
ENTRY %main (x: bf16[64,8], i: s32[16]) -> bf16[16,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  %i = s32[16]{0} parameter(1)
  ROOT %found = bf16[16,8]{1,0} fusion(%x, %i), kind=kCustom, calls=%rows, backend_config={CYCLES}
}
"""
    (found,) = hlo.read_program(text).ops
    assert (found.kind, found.opcode, found.bytes) == ("pallas", "gather", 2 * 256)
    (found,) = hlo.read_program(text.replace("CYCLES", '"estimated_cycles":"70"')).ops
    assert (found.kind, found.cycles) == ("xla", 70)


def test_operations_are_attributed_to_named_scopes():
    assert [o.scope for o in ops("collective")] == ["mlp/experts", ""]
    assert [o.scope for o in ops("xla")] == ["", "attention"]
    assert ops("xla")[1].what == "dot_general"
    sliced = hlo.Instruction(
        "a", "", "copy", (), 'op_name="jit(f)/while/body/jit(dynamic_index_in_dim)/squeeze"'
    )
    assert hlo.scope_of(sliced) == "layer slices"
    backward = hlo.Instruction(
        "a", "", "add", (), 'op_name="jit(step)/transpose(jvp(mlp))/while/body/router/dot"'
    )
    assert hlo.scope_of(backward) == "mlp/router"


def test_collectives_have_bytes_groups_and_the_compilers_algorithm():
    psum, gather = ops("collective")
    assert (psum.opcode, psum.bytes, psum.times, psum.algorithm) == (
        "all-reduce", 8 * 256 * 2, 5, "SinglePhaseRingSumEmitter",
    )  # fmt: skip
    assert psum.groups == ((0, 2, 4, 6, 1, 3, 5, 7),)
    assert gather.groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert gather.bytes == 8 * 256 * 2


def test_a_collective_that_runs_beside_several_fusions_counts_once():
    line = '  %all-gather.NAME = bf16[8,512]{1,0} all-gather(%param_0), frontend_attributes={chain_id="10"}\n'
    fused = PROGRAM.replace("  ROOT %multiply.1", line + "  ROOT %multiply.1")
    gathers = [o for o in hlo.read_program(fused).ops if o.name == "all-gather.NAME"]
    assert [(o.times, o.scope) for o in gathers] == [(5, "attention")]  # fusion.7 and gather.2 call it


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups=[2,4]<=[8], x", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
        ("replica_groups={}", ()),
    ],
)
def test_every_notation_of_replica_groups_is_read(text, groups):
    assert hlo.replica_groups(text) == groups


def test_a_shape_has_the_bytes_of_all_its_arrays():
    assert (
        hlo.shape_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)}, /*index=1*/f32[], s4[8]{0}, pred[3])")
        == 12 + 4 + 4 + 3
    )
    assert hlo.shape_bytes("f8e4m3fn[16]{0}") == 16


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.read_program("nothing")


# -------------------------------------------------------------------- torus


def op(opcode, size, groups):
    return hlo.Op("a", opcode, "collective", "", "", 1, bytes=size, groups=groups)


GRID = tuple((i % 4, i // 4) for i in range(16))  # 4x4 chips in row order


def test_groups_are_named_by_the_mesh_axes_that_they_join():
    sizes = (("data", 1), ("expert", 4), ("tensor", 2))
    pairs = ((0, 1), (2, 3), (4, 5), (6, 7))
    assert collectives.mesh_axes(pairs, sizes) == "tensor"
    assert collectives.mesh_axes(((0, 2, 4, 6), (1, 3, 5, 7)), sizes) == "expert"
    assert collectives.mesh_axes(((0, 2, 4, 6, 1, 3, 5, 7),), sizes) == "expert+tensor"
    assert collectives.mesh_axes((), sizes) == "expert+tensor"
    assert collectives.mesh_axes(((0, 1, 2),), sizes) == "?"


def test_a_gather_uses_both_ways_of_a_ring_and_one_of_a_line():
    line, ring = Topology(CHIPS["v5e"], (4, 4)), Topology(CHIPS["v5p"], (4, 4))
    group = (tuple(range(4)),)
    a, b = (collectives.cost(op("all-gather", 1e6, group), t, GRID) for t in (line, ring))
    assert a.bandwidth == pytest.approx(3e6 / 4.5e10)
    assert a.latency == pytest.approx(3 * HOP_SECONDS)
    assert b.bandwidth == pytest.approx(3e6 / (2 * 9e10))
    assert b.latency == pytest.approx(2 * HOP_SECONDS)


def test_a_group_over_two_axes_has_the_links_of_both_and_strides_share_theirs():
    slice_ = Topology(CHIPS["v5e"], (4, 4))
    plane = collectives.cost(op("reduce-scatter", 1e6, ()), slice_, GRID)
    assert plane.bandwidth == pytest.approx(1e6 * 15 / 16 / (2 * 4.5e10))
    assert plane.latency == pytest.approx(6 * HOP_SECONDS)
    strided = collectives.cost(op("reduce-scatter", 1e6, ((0, 2),)), slice_, GRID)
    assert strided.bandwidth == pytest.approx(1e6 / 2 / (4.5e10 * 2 / 3))


def test_small_sums_go_round_once_and_large_ones_are_scattered_and_gathered():
    slice_ = Topology(CHIPS["v5e"], (4, 4))
    small, large = (collectives.cost(op("all-reduce", size, ()), slice_, GRID) for size in (1e3, 1e8))
    assert small.latency == pytest.approx(6 * HOP_SECONDS)
    assert large.bandwidth == pytest.approx(2 * 1e8 * 15 / 16 / (2 * 4.5e10))


def test_a_permutation_costs_its_longest_way():
    slice_ = Topology(CHIPS["v5e"], (4, 4))
    found = collectives.cost(op("collective-permute", 9e4, ((0, 1), (0, 3))), slice_, GRID)
    assert found.seconds == pytest.approx(3 * (9e4 / 4.5e10 + HOP_SECONDS))


def test_all_to_all_is_limited_by_the_links_in_the_middle():
    slice_ = Topology(CHIPS["v5e"], (8, 1))
    coords = tuple((i, 0) for i in range(8))
    found = collectives.cost(op("all-to-all", 8e6, ()), slice_, coords)
    assert found.bandwidth == pytest.approx(8e6 * 7 / 4 / 4.5e10)


# -------------------------------------------------------------------- jobs


def job(
    mesh="expert=4,tensor=2", topology="v5e:2x4", workload="decode", batch=8, context=512, cfg=TINY, **more
):
    return Job(cfg, Strategy.parse(mesh), Topology.parse(topology), workload, batch, context, **more)


def test_grouped_matmuls_count_the_rows_that_come_not_the_room_for_them(tmp_path):
    def share(text, **more):
        file = tmp_path / "mine.toml"
        file.write_text("[mesh]\nexpert = 4\ntensor = 2\n" + text)
        return report.filled(job(str(file), **more))

    train = {
        "workload": "train",
        "cfg": dataclasses.replace(TINY, n_routed_experts=16, num_experts_per_tok=2),
    }
    assert share("") == 1 / 4  # nothing is exchanged: every shard has all rows, most for experts elsewhere
    assert share("", **train) == 1 / 4  # all tokens of four shards might come, each for both its experts
    assert share("[train]\nroom_factor = 1.5\n", **train) == 1 / 1.5
    assert share("[train]\ncapacity_factor = 2.0\nroom_factor = 3.0\n", **train) == 1 / 2
    assert share("[train]\nroom_factor = 0.5\n", **train) == 1


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_chips_are_told_by_their_figures(chip):
    assert chip.usable <= chip.hbm * 1.01
    assert {"bf16", "int8", "fp8"} == set(chip.peak)
    multiply_adds = chip.peak["bf16"] / chip.clock / 2 / 128**2
    assert multiply_adds == pytest.approx(round(multiply_adds), rel=0.01)  # whole matrix units
    assert chip.scoped_vmem <= chip.vmem
    assert chip.device.hbm_bandwidth * chip.devices == chip.hbm_bandwidth


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"topology": "h100:8x8"}, "unknown chip 'h100'; known: v4, v5e"),
        ({"topology": "v5e:8"}, "a v5e slice has 2 axes, such as v5e:4x4"),
        ({"topology": "v5e:4x4"}, "expert=4 x tensor=2 is 8 devices, but v5e:4x4 has 16"),
        ({"batch": 6, "mesh": "fsdp=4,tensor=2"}, "batch 6 is not divisible by the 4 parts of batch"),
        ({"context": 511, "mesh": "context=8"}, "context 511 is not divisible by the 8 parts"),
        ({"mesh": "expert=1,tensor=8"}, "heads 4 is not divisible by tensor=8"),
        ({"workload": "train", "weights": "int8"}, "training updates its weights"),
        ({"workload": "grpo", "weights": "int4"}, "training updates its weights"),
        ({"lora": 4}, "lora 4: expected a rank above 0, and workload train or grpo"),
        ({"weights": "int3"}, "weights 'int3': expected one of bf16"),
        ({"workload": "dream"}, "workload 'dream': expected one of decode"),
    ],
)
def test_a_job_that_cannot_be_says_why(given, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        job(**given)


def test_serving_leaves_the_multi_token_module_out_and_training_keeps_it():
    cfg = dataclasses.replace(TINY, num_nextn_predict_layers=1)
    assert job(cfg=cfg).cfg.num_nextn_predict_layers == 0
    assert job(cfg=cfg, workload="train", mesh="expert=4,fsdp=2").cfg.num_nextn_predict_layers == 1


def test_the_key_of_a_job_is_its_content(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")
    assert compile.key_of(job()) == compile.key_of(job())
    keys = {compile.key_of(j) for j in (job(), job(batch=16), job(context=1024), job("expert=8"))}
    assert len(keys) == 4


# -------------------------------------------------------------------- first estimates


def test_the_first_estimate_holds_the_bytes_that_info_counts():
    from jaxseek.lab.info import describe

    j = job("fsdp=2,expert=2,tensor=2", batch=8, context=512)
    found, told = analytic.first_pass(j), describe(j.cfg, j.strategy, "bfloat16", 512, 8)
    assert found.weights == pytest.approx(told["weight_bytes_per_chip"], rel=1e-6)
    assert found.cache == told["cache_bytes_per_chip"]
    assert (
        found.collective_bytes > analytic.first_pass(job("expert=4,tensor=2")).collective_bytes
    )  # fsdp gathers


def test_the_floor_of_r1_is_its_weights_read_once():
    cfg = ModelConfig.from_preset("deepseek-r1")
    j = Job(cfg, Strategy.parse("expert=16,tensor=16"), Topology.parse("v5e:16x16"), "decode", 8192, 128)
    found = analytic.first_pass(j)
    everything = 2 * (cfg.num_params() - cfg.vocab_size * cfg.hidden_size) / 256  # the embedding is looked up
    assert found.hbm_seconds == pytest.approx((everything + found.cache) / 8.19e11, rel=0.05)
    few = analytic.first_pass(dataclasses.replace(j, batch=8))
    touched = 1 - (1 - 8 / 256) ** 8  # 57 of 256 experts
    assert few.hbm_seconds < 0.4 * found.hbm_seconds
    assert few.hbm_seconds > touched * everything / 8.19e11


def test_whole_experts_make_one_chip_wait_for_another_and_columns_of_all_do_not():
    cfg = ModelConfig.from_preset("deepseek-r1")

    def touched(mesh, batch):
        found = Job(cfg, Strategy.parse(mesh), Topology.parse("v5e:8x8"), "decode", batch, 2048, "int8")
        share, most = analytic.touched_experts(found)
        assert (analytic.first_pass(found).expert_seconds > 5e-4) == (most > 1.1 * share)
        return share, most

    share, most = touched("expert=64", 8)
    assert share == pytest.approx(1 - (1 - 8 / 256) ** 8)
    assert 3 < 4 * most < 3.2  # of a chip's 4 experts, counted in docs/lab.md too
    assert touched("tensor=64", 8) == (share, share)
    assert touched("expert=64", 1024)[1] == pytest.approx(1.0)


def test_few_columns_of_an_expert_leave_the_matrix_unit_idle():
    cfg = ModelConfig.from_preset("deepseek-r1")

    def seconds(mesh, batch):
        found = Job(cfg, Strategy.parse(mesh), Topology.parse("v5e:8x8"), "decode", batch, 2048, "int8")
        return analytic.first_pass(found).expert_seconds

    assert seconds("tensor=64", 8) < 0.0005
    assert seconds("tensor=64", 128) > 10 * seconds("deepseek-v3.v5e-8x8.decode.many", 128)


def test_the_first_estimate_knows_where_a_decode_step_is_a_few_kernels():
    def small(mesh):
        cfg = ModelConfig.from_preset("deepseek-r1")
        found = Job(cfg, Strategy.parse(mesh), Topology.parse("v5e:8x8"), "decode", 8, 2048, "int8")
        return analytic.first_pass(found).small_seconds * 1.5e9 / 1832 / 61

    assert small("deepseek-v3.v5e-8x8.decode") == pytest.approx(10)
    assert small("expert=8,tensor=8") == pytest.approx(40)  # shared experts lie on fewer chips
    assert small("fsdp=8,tensor=8") == pytest.approx(70)


def test_sensible_sizes_fit_and_models_without_experts_have_some():
    for name, slice_ in (("deepseek-v2-lite", "v5e:2x4"), ("deepseek-r1-distill-qwen-1.5b", "v5e:1x1")):
        _, j = analytic.sensible(
            ModelConfig.from_preset(name), Topology.parse(slice_), "decode", 8, 2048, "bf16"
        )
        assert j.strategy.num_devices == j.topology.num_devices
        assert analytic.first_pass(j).held < j.topology.chip.usable


# -------------------------------------------------------------------- reports


def summary(**more):
    memory = dict.fromkeys(("cache", "optimizer", "padding", "new_outputs", "code"), 0.0)
    memory |= {"weights": 2.0**30, "temp": 2.0**20, "peak": 1.5 * 2**30} | more
    coords = tuple((i % 2, i // 2) for i in range(8))
    return report.summarise(job(), hlo.read_program(PROGRAM), memory, coords)


def test_a_report_adds_up():
    r = summary()
    assert r.cycles == 5 * 1826
    assert r.seconds["xla"] == pytest.approx(5 * 1826 / 1.5e9)
    assert r.kernel_calls == 2 * 5
    assert r.seconds["pallas"] == pytest.approx(2 * 5 * 1832 / 1.5e9)  # both move less than a call costs
    assert r.lower <= r.upper <= sum(r.seconds.values()) + r.estimate.limit
    assert r.dispatch == pytest.approx(40000 / 1.5e9 + 5 * 8 * 512 * 192 * 2 / 8.19e11)
    assert sum(sum(s.values()) for s in r.scopes.values()) == pytest.approx(sum(r.seconds.values()))
    assert r.fits
    assert not summary(peak=16 * 2.0**30).fits


def test_collectives_that_the_schedule_waits_for_are_added_and_those_it_starts_ahead_run_beside():
    def expected(*awaited):
        found = [
            hlo.Op(str(i), "all-reduce", "collective", "", "", 1, bytes=1e9, groups=((0, 1),), awaited=a)
            for i, a in enumerate(awaited)
        ]
        core = hlo.Op("a", "fusion", "xla", "", "", 1, cycles=150_000_000)
        coords = tuple((i % 2, i // 2) for i in range(8))
        r = report.summarise(job(workload="prefill"), hlo.Program([core, *found]), {"peak": 0.0}, coords)
        return r, r.seconds["collective"]

    waits, collectives = expected(True, True)
    assert waits.expected == pytest.approx(0.1 + collectives) == waits.upper
    beside, collectives = expected(False, False)
    assert beside.expected == pytest.approx(0.1) == beside.lower
    both, collectives = expected(True, False)
    assert both.expected == pytest.approx(0.1 + collectives / 2)
    assert both.lower < both.expected < both.upper
    assert both.to_dict()["expected_ms"] == pytest.approx(1e3 * both.expected)
    assert f"  step     {both.expected * 1e3:.3f} ms; " in report.lines("", both, memory=["..."])


@pytest.mark.parametrize(
    ("line", "awaited"),
    [
        ("%a = bf16[8]{0} all-reduce(%x), replica_groups={}", True),
        ("%a = bf16[8]{0} all-reduce-start(%x), replica_groups={}", False),
        ('%a = bf16[8]{0} all-reduce(%x), replica_groups={}, frontend_attributes={chain_id="1"}', False),
    ],
)
def test_a_collective_is_awaited_unless_it_is_started_ahead(line, awaited):
    text = f"ENTRY %main (x: bf16[8]) -> bf16[8] {{\n  %x = bf16[8]{{0}} parameter(0)\n  {line}\n}}\n"
    assert [o.awaited for o in hlo.read_program(text).ops] == [awaited]


def test_a_kernel_costs_its_bytes_or_flops_and_a_call_at_the_least():
    def seconds(**figures):
        kernel = hlo.Op("a", "custom-call", "pallas", "", "", 3, **figures)
        program = hlo.Program([kernel])
        return report.summarise(job(workload="prefill"), program, dict.fromkeys(("peak",), 0.0), ()).seconds

    assert seconds(bytes=1e3)["pallas"] == pytest.approx(3 * 1832 / 1.5e9)
    assert seconds(bytes=8.19e8)["pallas"] == pytest.approx(3 * 1e-3)
    assert seconds(bytes=1e3, flops=1.97e11)["pallas"] == pytest.approx(3 * 1e-3)
    assert seconds(bytes=0.0)["xla"] == 0


def test_experts_take_as_long_as_on_the_chip_that_reads_the_most_of_them():
    kernel = hlo.Op("chosen_experts.1", "custom-call", "pallas", "", "", 3, bytes=8.19e8)

    def seconds(mesh):
        found = report.summarise(job(mesh), hlo.Program([kernel]), {"peak": 0.0}, ())
        return found.seconds["pallas"]

    assert seconds("tensor=4,context=2") == pytest.approx(3e-3)
    share, most = analytic.touched_experts(job("expert=8", batch=1))
    assert most > share
    assert seconds("expert=8") > 3e-3


def test_a_report_is_json_text_and_a_picture(tmp_path):
    r = summary()
    found = json.loads(json.dumps(r.to_dict()))
    assert [c["axes"] for c in found["collectives"]] == ["expert+tensor", "tensor"]
    assert found["left_out"]["loops_counted_once"] == []  # the steps themselves are expected
    assert len(found["dearest"]) <= 10
    text = report.lines("tiny", r)
    assert found["kernel_calls"] == 10
    for part in (
        "M cycles",
        "(10 calls)",
        "all-reduce",
        "over expert+tensor",
        "fits",
        "mlp/experts",
        "gather.2",
    ):
        assert part in text
    report.draw("tiny", r, str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_the_compilers_reasons_are_read_from_its_log():
    log = "INFO\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total "
    log += "memory required for HLO temporaries (17.06G) exceeds available HBM (15.75G). HLO module: jit_x.\n"
    found = compile.explain(log)
    assert "needs 17.06 GiB of HBM per device of 15.75" in found["text"]
    assert found["needed"] == pytest.approx(17.06 * 2**30)
    log = (
        "x\njax.errors.JaxRuntimeError: INTERNAL: no routes\n\nError encountered while compiling %while.95\n"
    )
    assert compile.explain(log)["text"].endswith("JaxRuntimeError: INTERNAL: no routes")
    assert compile.explain("x\nValueError: no such thing\n") == {
        "text": "the TPU compiler failed: ValueError: no such thing", "needed": None,
    }  # fmt: skip


# -------------------------------------------------------------------- layouts and the command


def test_the_shipped_layout_is_used_for_models_of_its_shape():
    for name in ("deepseek-v2-lite", "deepseek-v2-lite-chat"):
        found, layout = plan.make_job(
            ModelConfig.from_preset(name), "v5e:2x4", None, "rollout", 8, 2048, "bf16"
        )
        assert layout.startswith("deepseek-v2-lite.v5e-2x4.decode.toml")
        assert dict(found.strategy.sizes)["data"] == 8
    _, layout = plan.make_job(TINY, "v5e:2x4", None, "decode", 8, 512, "bf16")
    assert layout.startswith("the default strategy with ")


@pytest.mark.parametrize("path", sorted((configs_dir() / "meshes").glob("*.*.*.toml")), ids=lambda p: p.name)
def test_shipped_layouts_fit_their_model_and_slice(path):
    preset, slice_, workload, *_ = path.name.split(".")
    chip, _, dims = slice_.partition("-")
    strategy = Strategy.from_toml(path)
    assert strategy.num_devices == Topology.parse(f"{chip}:{dims}").num_devices
    assert workload in ("decode", "prefill", "train", "grpo")
    batch = strategy.num_devices if workload in ("train", "grpo") else 128 if ".many." in path.name else 8
    topology = Topology.parse(f"{chip}:{dims}")
    found = Job(ModelConfig.from_preset(preset), strategy, topology, workload, batch, 2048)
    assert path in plan.shipped(found.cfg, topology, workload)
    if workload == "grpo":
        found = dataclasses.replace(found, lora=16 if "lite" in preset else 0)
    found = found if found.trains else dataclasses.replace(found, weights="int8")
    assert analytic.first_pass(found).held < topology.chip.device.usable


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "sizes"),
    [
        ("all-rows", {"data": 2, "expert": 2, "tensor": 2}),
        ("all-rows", {"data": 2, "tensor": 2, "context": 2}),
        ("all-rows-own-cache", {"data": 2, "expert": 2, "tensor": 2}),
    ],
)
def test_tables_of_free_sizes_compute_what_one_device_computes(table, sizes):
    cfg = tiny_config("v3", num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    cfg = cfg.replace(num_attention_heads=8, num_key_value_heads=8)
    prompts = [random_tokens(4, 8)[i % 4, : 3 + i % 4].tolist() for i in range(8)]
    mesh = Strategy.from_toml(configs_dir() / "meshes" / f"{table}.toml", **sizes)

    def tokens(mesh):
        engine = Engine(random_model(cfg, mesh=mesh))
        return [c.tokens for c in engine.generate(prompts, Sampling(max_new_tokens=6, temperature=0.0))]

    assert tokens(mesh) == tokens(None)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("deepseek-v2-lite.v5e-2x4.decode", {}),
        slow("deepseek-v2-lite.v5e-2x4.grpo", {}),
        ("deepseek-v3.v5p-8x8x8.grpo", {"expert": 2, "context": 4}),
    ],
)
def test_a_shipped_layout_computes_what_one_device_computes(name, sizes):
    one = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    cfg = tiny_config("v3", **one, num_attention_heads=8, num_key_value_heads=8)
    prompts = [random_tokens(4, 8)[i, : 3 + i].tolist() for i in range(4)]
    mesh = Strategy.from_toml(configs_dir() / "meshes" / f"{name}.toml", **sizes)

    def tokens(mesh):
        engine = Engine(random_model(cfg, mesh=mesh))
        return [c.tokens for c in engine.generate(prompts, Sampling(max_new_tokens=6, temperature=0.0))]

    assert tokens(mesh) == tokens(None)


def test_plan_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plan", "tiny-v3", "--topology", "v5e:2x4", "--context", "512"]) == 1
    assert "pip install 'jax[tpu]==" in capsys.readouterr().err
    assert cli.main(["plan", "tiny-v3", "--topology", "v9:2x4"]) == 1
    assert "unknown chip 'v9'" in capsys.readouterr().err


def test_a_sweep_leaves_out_what_cannot_fit_or_is_slow_and_what_is_the_same():
    cfg, slice_ = ModelConfig.from_preset("deepseek-v2-lite"), Topology.parse("v5e:2x4")
    found = sweep.layouts(cfg, slice_, "decode", 8, 2048, "bf16", [])
    names = [e.name for e in found]
    assert {"default tensor=8", "attention-data-parallel expert=8"} <= set(names)
    assert len({"spread tensor=4,context=2", "spread expert=4,context=2"} & set(names)) == 1
    kept, left = sweep.prune(found, 5)
    assert len(kept) == 5
    assert len(kept) + len(left) == len(found)
    assert any("holds" in e.reason for e in left)
    assert any("estimated at" in e.reason for e in left)
    given = sweep.layouts(cfg, slice_, "decode", 8, 2048, "bf16", ["tensor=8", "expert=8"])
    assert [e.name for e in given] == ["tensor=8", "expert=8"]


@pytest.mark.parametrize(("note", "batch"), [("", 8), slow(".many", 128)])
def test_what_ships_is_among_the_layouts_of_a_sweep_and_not_left_out(note, batch):
    given = (ModelConfig.from_preset("deepseek-r1"), Topology.parse("v5e:8x8"), "decode", batch, 2048, "int8")
    (ours,) = sweep.layouts(*given, [f"deepseek-v3.v5e-8x8.decode{note}"])
    kept, left = sweep.prune(sweep.layouts(*given, []), 24)
    assert sweep._signature(ours.job) in {sweep._signature(e.job) for e in kept}
    assert {e.name.split()[0] for e in left} <= {e.name.split()[0] for e in kept}  # one of each table


def test_a_sweep_is_a_table_a_front_a_verdict_and_a_picture(tmp_path):
    slow, fast = summary(), summary()
    slow.seconds["collective"] += 0.01
    slow.scopes["mlp/experts"]["collective"] += 0.01
    entries = [
        sweep.Entry("slow", slow.job, slow),
        sweep.Entry("fast", fast.job, fast),
        sweep.Entry("large", fast.job, summary(peak=2.0**35)),
        sweep.Entry("none", fast.job, None, "does not fit: needs 17 GiB"),
    ]
    assert [e.name for e in sweep.pareto(entries)] == ["fast"]
    assert sweep.verdict(entries).startswith("batch 8: fast, ")
    assert sweep.verdict(entries).endswith("+10.00 in mlp/experts")
    rows = sweep.table(entries)
    assert list(rows.columns[1].cells) == ["fast", "large", "slow", "none"]
    sweep.draw("tiny", entries, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


# -------------------------------------------------------------------- GRPO steps and run files


def compiled(folder, given, argument, output=0, alias=0, temp=0):
    memory = {"argument": argument, "output": output, "alias": alias, "temp": temp, "generated_code": 1}
    return compile.Compiled(given, memory, tuple((i % 2, i // 2) for i in range(8)), {}, folder)


def step(folder):
    """The programs of a GRPO step with sizes that are told apart."""
    (folder / "program.hlo.gz").write_bytes(gzip.compress(PROGRAM.encode()))
    return {
        "lay out": compiled(folder, {"weights": 1000}, 1000, output=300, temp=40),
        "read": compiled(folder, {"weights": 320}, 330, output=60, temp=500),
        "seat": compiled(folder, {"weights": 320}, 140, output=80, alias=80, temp=90),
        "rollout": compiled(folder, {"weights": 320, "cache": 70}, 400, output=80, alias=75, temp=9),
        "log-probs": compiled(folder, {"weights": 310, "reference": 310}, 320, output=2, temp=600),
        "grpo": compiled(
            folder, {"weights": 1000, "optimizer": 2000}, 3100, output=3100, alias=3090, temp=800
        ),
    }


@pytest.mark.parametrize(("kind", "more", "later"), [("device", 310, 0), ("host", 0, 310)])
def test_each_point_of_a_grpo_step_has_all_that_is_there_at_a_time(kind, more, later, tmp_path):
    run = train_run(job("fsdp=8", workload="grpo")).replace(reference=ReferenceConfig(kind))
    found = memory.points(job("fsdp=8", workload="grpo", run=run), step(tmp_path))
    trainer = 1000 + 2000 + 100 + more
    assert {p.name: p.total for p in found} == {
        "laying out weights for decoding": trainer + 300 + 41,
        "reading prompts": trainer + 300 + 60 + 501,
        "giving slots to answers": trainer + 300 + 60 + 80 + 91,
        "decoding": trainer + 300 + 60 + 80 + 5 + 10,
        "log-probabilities": trainer + later + 2 + 601,
        "update": trainer + 10 + 801,
    }
    lines = memory.table(found, 3900.0)
    assert lines[0].endswith("reading prompts: DOES NOT FIT" if more else "log-probabilities: DOES NOT FIT")
    assert "fits" in memory.table(found, 2.0**30)[0]
    assert len(lines) == 2 + 6


def test_without_a_reference_nothing_computes_log_probabilities():
    run = train_run(job("fsdp=8", workload="grpo"))
    assert "log-probs" in memory.programs(job("fsdp=8", workload="grpo", run=run))
    without = run.replace(grpo=dataclasses.replace(run.grpo, beta=0.0))
    found = memory.programs(job("fsdp=8", workload="grpo", run=without))
    assert list(found) == ["lay out", "read", "seat", "rollout", "grpo"]
    assert {j.workload for j in found.values()} == set(found)


def test_a_rollout_reads_as_many_prompts_at_a_time_as_the_engine_does():
    run = train_run(job("fsdp=8", workload="grpo", batch=64))
    strategy = Strategy.parse("fsdp=8")
    assert (run.rollout.prompts, run.grpo.group_size) == (4, 16)
    found = room(run, strategy)
    assert (found.slots, found.capacity) == (64, 512)
    assert (found.prompts, found.length, found.prompt_capacity) == (8, 256, 256)  # a prompt on every device
    run = run.replace(rollout=dataclasses.replace(run.rollout, slots=16))
    assert room(run, strategy).slots == 16


RUNS = configs_dir() / "runs"
SLICES = {"v5e-1": "v5e:1x1", "v5e-8": "v5e:2x4", "671b": "v5p:8x8x8"}


@pytest.mark.parametrize(
    ("path", "topology"),
    [(p, s) for p in sorted(RUNS.glob("*.toml")) for part, s in SLICES.items() if part in p.stem],
    ids=lambda value: getattr(value, "stem", value),
)
def test_run_files_for_a_slice_are_planned_as_they_train(path, topology):
    overrides = ["model=deepseek-v3-base"] if path.stem == "r1-671b-reason" else []
    if path.stem == "r1-671b-all":
        overrides = ["stages.rules.model=deepseek-v3-base"]
    for run, model in planned_run.read_runs(str(path), overrides).values():
        found = planned_run.job_of(run, model, topology)
        assert (found.workload, found.lora, found.remat) == (
            planned_run.WORKLOAD[run.objective], run.lora.rank, run.remat,
        )  # fmt: skip
        assert analytic.first_pass(found).held < 0.5 * found.topology.chip.device.usable
        if found.workload == "grpo":
            shapes = Shapes.of(run, found.strategy.parts(found.rules, "batch"), 16)
            assert (found.batch, found.microbatches) == (shapes.rows, run.batch.accumulation)
            rollout = memory.programs(found)["rollout"]
            assert rollout.context >= run.rollout.max_prompt_tokens + run.rollout.max_new_tokens


def test_a_model_that_is_not_here_is_known_by_its_name_and_else_asked_for(tmp_path):
    assert planned_run.config_of("DeepSeek-V3-Base") == ModelConfig.from_preset("deepseek-v3-base")
    assert planned_run.config_of("out/tiny-v3") == TINY
    with pytest.raises(ConfigError, match=r"'runs/mine/model' is not here, .* --set model=deepseek-v3-base"):
        planned_run.config_of("runs/mine/model")


@pytest.fixture
def run_file(tmp_path):
    text = (RUNS / "grpo-smollm2-gsm8k.toml").read_text().replace("out/smollm2", "tiny-v3")
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("[data]", "[lora]\nrank = 4\n[data]"))
    return str(path)


def test_plan_takes_a_run_file_in_place_of_a_model(run_file, tmp_path, monkeypatch, capsys):
    asked = []

    def fake(job, progress):
        asked.append(job)
        return step(tmp_path)[job.workload]

    monkeypatch.setattr(plan, "compile_job", fake)
    arguments = ["plan", run_file, "--topology", "v5e:2x4", "--set", "grpo.beta=0.04"]
    assert cli.main([*arguments, "--workload", "grpo"]) == 0  # which it says too
    text = capsys.readouterr().out
    assert "mine: tiny-v3, grpo with adapters of rank 4" in text
    assert "log-probabilities" in text
    assert "fits" in text
    assert [j.workload for j in asked] == list(memory.NAMES)
    assert {j.run.grpo.beta for j in asked} == {0.04}
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [p["point"] for p in found["points"]] == list(memory.NAMES.values())
    assert all(p["sum"] == sum(p["bytes"].values()) for p in found["points"])
    assert cli.main([*arguments, "--batch", "3", "--lora", "8", "--mesh", "fsdp=8"]) == 1
    error = capsys.readouterr().err
    assert "--mesh fsdp=8 (it has none), --batch 3 (it has 8), --lora 8 (it has 4); leave that out" in error
    assert "--set KEY=VALUE" in error
    assert cli.main([*arguments, "--set", "objective=dpo"]) == 1
    assert "objective dpo has no plan; expected one of pretrain, sft, grpo" in capsys.readouterr().err
    assert cli.main(["plan", "tiny-v3", "--topology", "v5e:2x4", "--set", "steps=3"]) == 2


def test_a_stage_is_planned_with_the_model_that_the_first_one_has():
    found = planned_run.read_runs(str(RUNS / "r1-671b-zero.toml"))
    assert {name: model for name, (_, model) in found.items()} == dict.fromkeys(found, "DeepSeek-V3-Base")
    only = planned_run.read_runs(str(RUNS / "r1-671b-zero.toml"), ["only=to-64k"])
    assert [(name, model) for name, (_, model) in only.items()] == [("to-64k", "DeepSeek-V3-Base")]


@pytest.mark.slow
@pytest.mark.skipif(NO_LIBTPU, reason="needs the lab extra")
@pytest.mark.parametrize("workload", ["decode", "rollout"])
def test_the_tpu_compiler_reports_a_step(workload, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("XLA_FLAGS")  # those of these tests are for CPU
    arguments = [
        "plan",
        "tiny-v3",
        "--topology",
        "v5e:2x4",
        "--mesh",
        "expert=4,tensor=2",
        "--context",
        "512",
    ]
    assert cli.main([*arguments, "--workload", workload, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert 0 < found["seconds"]["lower"] <= found["seconds"]["upper"] < 0.01
    assert found["bytes_per_device"]["temp"] < 64 * 2**20
    names = [c["opcode"] for c in found["collectives"] for _ in range(c["times"])]
    assert (
        names.count("all-reduce") == 3 * 6 - 1 + 1
    )  # a layer: attention, experts, shared; a dense one; embed
    assert names.count("all-gather") == 1  # of the logits
    assert math.isfinite(found["roofline"]["limit_seconds"])
