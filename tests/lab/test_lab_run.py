"""Running what the lab compiles: arguments made real, calls timed; on CPU devices, which the verb refuses."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import slow, tiny_config

from jaxseek.cli import main as cli
from jaxseek.config.model import ConfigError
from jaxseek.config.run import LoraConfig
from jaxseek.hardware import Topology
from jaxseek.lab import analytic, measure, memory, plan
from jaxseek.lab.job import Job, abstract_step, train_run
from jaxseek.lab.report import Report
from jaxseek.model.deepseek import DeepSeek
from jaxseek.rl.rollout import as_engine
from jaxseek.sharding.parameters import device_bytes, parameters
from jaxseek.sharding.strategy import Strategy
from jaxseek.train import lora

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = tiny_config("v3", num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0)


def job(workload, mesh="expert=4,tensor=2", **more):
    return Job(SMALL, Strategy.parse(mesh), Topology.parse("v5e:2x4"), workload, 8, 64, **more)


@functools.cache
def real(*args, **more):
    """A job's step, its arguments as they are compiled for, and with values."""
    j = job(*args, **more)
    mesh = j.strategy.make_mesh()
    with jax.set_mesh(mesh):
        step, abstract, _ = abstract_step(j, mesh)
        return step, abstract, [measure.realise(a, j) for a in abstract]


@pytest.mark.parametrize(
    ("workload", "mesh", "more"),
    [
        ("decode", "expert=4,tensor=2", {"weights": "int8"}),
        slow("rollout", "expert=4,context=2", {}),
        slow("prefill", "fsdp=2,expert=4", {"weights": "int4"}),
        slow("train", "fsdp=2,expert=4", {}),
        slow("grpo", "fsdp=2,expert=4", {"lora": 2}),
    ],
)
def test_every_workload_runs_and_is_timed(workload, mesh, more, tmp_path):
    trace = tmp_path / "trace"
    j = job(workload, mesh, **more)
    found = measure.measure(j, j.strategy.make_mesh(), 2, str(trace) if workload == "prefill" else None)
    assert len(found.seconds) == 2
    assert all(0 < s < 60 for s in found.seconds)
    assert found.device == "cpu"
    assert any(trace.rglob("*.xplane.pb")) == (workload == "prefill")


def test_arguments_have_the_shapes_dtypes_and_layouts_that_were_compiled():
    for weights in ("bf16", "int8"):
        _, abstract, made = real("decode", weights=weights)
        for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(made)):
            if isinstance(a, jax.ShapeDtypeStruct):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_with_adapters_nothing_else_has_moments_and_the_first_estimate_counts_them():
    def given(**more):
        j = job("grpo", "fsdp=2,expert=4", **more)
        mesh = j.strategy.make_mesh()
        with jax.set_mesh(mesh):
            bytes_of = abstract_step(j, mesh)[2]
        return analytic.first_pass(j), bytes_of

    (_, whole), (estimate, few) = given(), given(lora=2)
    bias = 4 * SMALL.n_routed_experts  # the router's stays float32
    frozen = (whole["weights"] - bias) / 2 + bias
    adapters = few["weights"] - frozen
    assert 0 < adapters < 0.5 * frozen
    assert few["optimizer"] == pytest.approx(2 * adapters, abs=8)  # two moments in float32, and a count
    assert whole["optimizer"] == pytest.approx(whole["weights"], rel=0.01)
    assert estimate.weights == pytest.approx(few["weights"], rel=1e-6)
    assert estimate.optimizer == pytest.approx(2 * adapters, rel=1e-6)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_rollout_that_is_planned_has_the_arrays_that_a_sampler_makes(rank):
    j = job("grpo", "fsdp=2,expert=4", lora=rank)
    policy = DeepSeek.init(SMALL, "fsdp=2,expert=4", dtype=jnp.bfloat16 if rank else jnp.float32)
    if rank:
        policy = lora.adapt(policy, LoraConfig(rank), 0)
    made = as_engine(policy, "bfloat16").model
    mesh = j.strategy.make_mesh()
    with jax.set_mesh(mesh):
        program = memory.programs(j)["rollout"]
        _, (planned, *_), given = abstract_step(program, mesh)
        _, (_, (dtype,)), _ = abstract_step(memory.programs(j)["lay out"], mesh)
    assert dtype == "bfloat16"
    assert given["weights"] == device_bytes(made)
    for a, b in zip(jax.tree.leaves(planned), jax.tree.leaves(made), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize("program", ["seat", slow("lay out"), slow("read"), slow("log-probs")])
def test_every_program_of_a_grpo_step_can_be_compiled(program):
    j = job("grpo", "fsdp=2,expert=4")
    mesh = j.strategy.make_mesh()
    with jax.set_mesh(mesh):
        step, args, given = abstract_step(memory.programs(j)[program], mesh)
        found = step.trace(*args).lower().compile().memory_analysis()
    assert given["weights"] > 0
    assert found.argument_size_in_bytes > 0


def test_the_experts_of_a_rollout_are_part_of_the_update_that_replays_them():
    j = job("grpo", "fsdp=2,expert=4")
    measure = train_run(j)
    measure = measure.replace(grpo=dataclasses.replace(measure.grpo, routing_replay=True))
    mesh = j.strategy.make_mesh()
    with jax.set_mesh(mesh):
        _, (_, batch, *_), _ = abstract_step(dataclasses.replace(j, run=measure), mesh)
    assert batch.experts_BTLK.shape == (1, 8, 64, 1, SMALL.num_experts_per_tok)
    assert batch.experts_BTLK.sharding.spec[1] == batch.tokens_BT.sharding.spec[1]


def test_random_numbers_are_of_the_wanted_spread_on_any_mesh_and_norms_are_one():
    _, _, (model, state, *_) = real("decode")
    values = parameters(model)
    embed = np.asarray(values["embed_VD"].get_value(), np.float32)
    assert embed.std() == pytest.approx(SMALL.initializer_range, rel=0.05)
    assert abs(embed.mean()) < 0.05 * SMALL.initializer_range
    assert abs(np.corrcoef(embed[:-1].ravel(), embed[1:].ravel())[0, 1]) < 0.05
    norms = [v.get_value() for v in values.values() if v.get_metadata("fill") == 1.0]
    assert len(norms) >= 4
    assert all((np.asarray(a, np.float32) == 1).all() for a in norms)
    tokens_B = np.asarray(state.token_B)
    assert len(set(tokens_B.tolist())) > 4
    assert ((tokens_B >= 0) & (tokens_B < SMALL.vocab_size)).all()
    _, _, (other, *_) = real("decode", "tensor=8" if SMALL.num_attention_heads % 8 == 0 else "context=8")
    assert (embed == np.asarray(parameters(other)["embed_VD"].get_value(), np.float32)).all()


def test_quantised_weights_use_the_range_of_their_dtype():
    _, _, (model, *_) = real("decode", weights="int8")
    values = {p: np.asarray(v.get_value()) for p, v in parameters(model).items()}
    matrix = next(v for p, v in values.items() if p.endswith(".value"))
    assert matrix.dtype == np.int8
    assert len(np.unique(matrix)) > 150


def test_a_decode_dispatch_goes_to_the_end_of_the_cache_every_time():
    j = job("decode")
    step, abstract, _ = real("decode")
    with jax.set_mesh(j.strategy.make_mesh()):
        calls = measure._Calls(j, step, abstract)
        for _ in range(2):
            state, _, taken = calls()
            assert int(taken) == 32
            assert np.asarray(state.position_B).tolist() == [63] * 8  # the next token has no slot any more


def test_a_step_takes_what_the_clock_says(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(measure, "abstract_step", lambda job, mesh: (lambda: 0, (), {}))
    j = job("prefill")
    found = measure.measure(j, j.strategy.make_mesh(), 3)
    assert found.seconds == (3.0, 1.0, 2.0)
    assert found.to_dict() == {"seconds": 2.0, "least": 1.0, "most": 3.0, "calls": 3, "device": "cpu"}


# -------------------------------------------------------------------- the slice


def tpus(kind="TPU v5 lite", shape=(4, 2, 1), each=1):
    return [
        SimpleNamespace(platform="tpu", device_kind=kind, coords=(x, y, z))
        for z in range(shape[2]) for y in range(shape[1]) for x in range(shape[0]) for _ in range(each)
    ]  # fmt: skip


def test_the_devices_of_the_slice_are_taken_and_others_refused():
    assert len(measure.devices_of(Topology.parse("v5e:4x2"), tpus())) == 8
    assert len(measure.devices_of(Topology.parse("tpu7x:2x2x1"), tpus("TPU7x", (2, 2, 1), 2))) == 8
    for devices, found in (
        (tpus("TPU v4"), r"8 x TPU v4 \(tpu\)"),
        (tpus(shape=(2, 2, 1)), r"4 x TPU v5 lite \(tpu\)"),
        (tpus(shape=(8, 1, 1)), r"8 x TPU v5 lite \(tpu\) as 8x1;"),
        (jax.devices(), r"8 x cpu \(cpu\)"),
        ([], "no devices"),
    ):
        with pytest.raises(ConfigError, match=f"needs the 8 devices of v5e:4x2 .*there are {found}"):
            measure.devices_of(Topology.parse("v5e:4x2"), devices)


def test_the_command_refuses_a_cpu_before_it_compiles(monkeypatch, capsys):
    monkeypatch.setattr(plan, "compile_job", lambda *a: pytest.fail("compiled"))
    arguments = ["plan", "tiny-v3", "--topology", "v5e:2x4", "--context", "512"]
    assert cli.main([*arguments, "--run"]) == 1
    assert (
        "needs the 8 devices of v5e:2x4 (TPU v5 lite or TPU v5e), but there are 8 x cpu"
        in capsys.readouterr().err
    )
    assert cli.main([*arguments, "--trace", "x"]) == 2


def test_measured_stands_beside_the_estimate():
    j = dataclasses.replace(job("decode"), context=2048)
    seconds = {"xla": 3e-3, "pallas": 0.0, "collective": 1e-3, "copy": 0.0}
    r = Report(j, analytic.first_pass(j), {"peak": 1.0}, 1, seconds, {}, [], dispatch=32e-3, left_out={})
    text = plan.beside(r, measure.Measured((6e-3, 5e-3, 4e-3), "TPU v5 lite"))
    assert "measured 5.000 ms a step, median of 3 (4.000 to 6.000) on TPU v5 lite" in text
    assert "the estimate is 0.80 to 1.00 of it" in text  # 3 to 4 ms, and 1 of the dispatch
