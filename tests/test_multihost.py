"""Processes on this machine, as the hosts of a slice: they compute what one process does, and say it once."""

import contextlib
import json
import shutil
import time

import buckets
import numpy as np
import policies
import pytest
from disk import tree
from hf_checkpoints import ODD, fp8_tensors, write_shards
from processes import ROOT, free_port, start
from training_runs import TEXT, losses, make_home, run, toml, write_jsonl

from jaxseek.api import load
from jaxseek.bench.convert import synthetic
from jaxseek.recipes.pipeline import run_stage as train
from jaxseek.storage import place as places
from jaxseek.train import distill
from jaxseek_convert import convert, save_hf

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def on_hosts(command, count, devices=1, **env):
    """(exit code, stdout, stderr) of each of `count` processes."""
    port, env = free_port(), {"JAX_NUM_CPU_DEVICES": str(devices)} | env
    with contextlib.ExitStack() as closing:
        processes = []
        for index in range(count):
            process = start(command, count, index, port, **env)
            processes.append(closing.enter_context(process))
            closing.callback(process.kill)
        said = [process.communicate(timeout=500) for process in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, said)]


def trained(config, path, count, devices=1):
    """The run's result, by processes with these devices each or, for count 1, in this one."""
    if count == 1:
        train(config)
        return
    ends = on_hosts(["train", toml(config, path), "--json"], count, devices)
    assert [code for code, *_ in ends] == [0] * count, ends
    assert json.loads(ends[0][1].splitlines()[-1])["out"] == config.out
    assert not any("{" in out or "step" in out + error for _, out, error in ends[1:])


def assert_losses_equal(one, other, names=("loss", "eval_loss")):
    for name in names:
        a, b = losses(one, name), losses(other, name)
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=2e-5, atol=1e-6)


def with_evaluation(home, out, mesh, steps, objective="sft", **sections):
    data = {"length": 64, "holdout": 0.2} | sections.pop("data", {})
    return run(
        home, out, objective, steps=steps, mesh=mesh, data=data, eval={"every": 2, "rows": 6}, **sections
    )


def test_a_run_goes_on_with_any_number_of_hosts(home, tmp_path):
    for i, count in enumerate((1, 2, 4, 2, 1), 1):
        config = with_evaluation(home, tmp_path / "many", f"fsdp={count}", 2 * i)
        trained(config, tmp_path / "many.toml", count)
    trained(with_evaluation(home, tmp_path / "one", "fsdp=1", 10), tmp_path / "one.toml", 1)
    assert losses(tmp_path / "one").keys() == set(range(10))
    assert_losses_equal(tmp_path / "one", tmp_path / "many", ("loss",))
    one, many = losses(tmp_path / "one", "eval_loss"), losses(tmp_path / "many", "eval_loss")
    np.testing.assert_allclose(list(many.values()), list(one.values()), rtol=2e-5)


@pytest.mark.parametrize(
    ("count", "devices", "mesh"), [(2, 2, "expert=2,fsdp=2"), (4, 1, "tensor=2,fsdp=2"), (2, 1, "tensor=2")]
)
def test_pretraining_equals_that_of_one_process(home, tmp_path, count, devices, mesh):
    sparse = {"objective": "pretrain", "model": str(home / "sparse")}
    one = with_evaluation(home, tmp_path / "one", "fsdp=1", 4, **sparse)
    trained(one, tmp_path / "one.toml", 1)
    many = with_evaluation(home, tmp_path / "many", mesh, 4, **sparse)
    trained(many, tmp_path / "many.toml", count, devices)
    assert_losses_equal(tmp_path / "one", tmp_path / "many")


def test_preferences_and_their_reference_equal_those_of_one_process(home, tmp_path):
    for name, count in (("one", 1), ("many", 2)):
        config = run(home, tmp_path / name, "dpo", steps=4, mesh=f"fsdp={count}", data={"length": 64})
        trained(config, tmp_path / f"{name}.toml", count)
    assert_losses_equal(tmp_path / "one", tmp_path / "many", ("loss", "margin"))
    with np.load(tmp_path / "one/reference.npz") as one, np.load(tmp_path / "many/reference.npz") as many:
        assert one["train_index"].tolist() == many["train_index"].tolist()
        np.testing.assert_allclose(many["train_pair"], one["train_pair"], rtol=1e-5)


def test_a_teachers_samples_are_those_of_one_process(home, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "BATCH", 16)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"the {w}"} for w in TEXT.split()[:6]])
    given = {"teacher": str(home / "teacher"), "by": "samples", "max_new_tokens": 12, "per_prompt": 2}
    data = {"train": str(tmp_path / "prompts.jsonl")}
    for name, count in (("one", 1), ("many", 2)):
        config = run(
            home, tmp_path / name, "distill", distill=given, data=data, steps=2, mesh=f"fsdp={count}"
        )
        trained(config, tmp_path / f"{name}.toml", count)
    assert (tmp_path / "one/samples.jsonl").read_text() == (tmp_path / "many/samples.jsonl").read_text()
    assert_losses_equal(tmp_path / "one", tmp_path / "many", ("loss",))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return policies.make_home(tmp_path_factory.mktemp("policies"))


def test_grpo_equals_that_of_one_process_and_goes_on_with_others(policy, tmp_path):
    much = {"grpo": {"beta": 0.04, "group_size": 4, "routing_replay": True}, "eval": {"every": 2}}
    for name, stages in (("one", [(1, 3)]), ("two", [(2, 3)]), ("changed", [(2, 2), (4, 3)])):
        for count, steps in stages:
            config = policies.config(
                policy, tmp_path / name, mesh=f"fsdp={count}", rollout={"prompts": 4}, steps=steps, **much
            )
            trained(config, tmp_path / f"{name}.toml", count)
    one, *others = (policies.steps_of(tmp_path / name) for name in ("one", "two", "changed"))
    for other in others:
        for name in ("reward", "loss", "grad_norm", "tokens", "entropy"):
            np.testing.assert_allclose(
                [r[name] for r in other], [r[name] for r in one], rtol=1e-3, atol=1e-6, err_msg=name
            )


def test_rejection_sampling_keeps_what_one_process_does(policy, tmp_path):
    for name, count in (("one", 1), ("many", 2)):
        sections = {"objective": "reject", "reject": {"problems": 8, "per_problem": 4}}
        config = policies.config(policy, tmp_path / name, "dense", mesh=f"fsdp={count}", **sections)
        trained(config, tmp_path / f"{name}.toml", count)
    assert (tmp_path / "one/samples.jsonl").read_text() == (tmp_path / "many/samples.jsonl").read_text()


@pytest.mark.parametrize(
    ("source", "mesh"), [("sparse", None), ("sparse", "fsdp=4"), ("hf", "data=2,tensor=2")]
)
def test_four_hosts_generate_what_one_does(home, tmp_path, source, mesh):
    if source == "hf":
        whole, tokenizer = load(home / "sparse")
        save_hf(whole, tmp_path / "hf", tokenizer=tokenizer)
    model = tmp_path / "hf" if source == "hf" else home / "sparse"
    command = ["generate", model, "-p", "the king", "-p", "green tea", "-n", "8", "-t", "0", "--json"]
    ((_, alone, _),) = on_hosts(command, 1)
    ends = on_hosts([*command, *(("--mesh", mesh) if mesh else ())], 4)
    assert [code for code, *_ in ends] == [0] * 4, ends
    rows = [[line for line in out.splitlines() if line.startswith("{")] for _, out, _ in ends]
    assert rows == [alone.splitlines(), [], [], []]


def test_a_mesh_that_leaves_a_host_without_a_device_is_refused_on_all(home, tmp_path):
    ends = on_hosts(["train", toml(run(home, tmp_path / "run", mesh="fsdp=1"), tmp_path / "run.toml")], 2)
    assert [code for code, *_ in ends] == [1, 1]
    for index, (_, _, error) in enumerate(ends):
        assert f"host {index}: the mesh has 1 devices, which leaves some of 2 hosts without one" in error
    assert not (tmp_path / "run").exists()


ENGINES = """
from jaxseek.machine.hosts import join
join()
from oracles import tiny_config
from jaxseek.engine.engine import Engine
from jaxseek.engine.sampling import Sampling
from jaxseek.hardware import Topology
from jaxseek.lab.job import Job
from jaxseek.lab.measure import measure
from jaxseek.model.deepseek import DeepSeek
from jaxseek.sharding.strategy import Strategy
cfg = tiny_config("v3", num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0)
for workload, mesh in (("decode", "expert=4,tensor=2"), ("train", "fsdp=2,expert=4")):
    job = Job(cfg, Strategy.parse(mesh), Topology.parse("v5e:2x4"), workload, 8, 64, "bf16")
    assert len(measure(job, job.strategy.make_mesh(), 2).seconds) == 2
model = DeepSeek.init(cfg, Strategy.parse("tensor=2,data=4"))
greedy = [[1, 2, 3]] * 4, Sampling(6, 0.0)
plain = [c.tokens for c in Engine(model).generate(*greedy)]
for owns in (False, True):
    engine = Engine(model, form="plain", lay_out=True, owns=owns)
    assert plain == [c.tokens for c in engine.generate(*greedy)]
"""


def test_hosts_run_what_the_lab_measures_and_decode_in_layouts_of_the_compilers_choice():
    ends = on_hosts(
        ["-c", ENGINES], 2, devices=4, PYTHONPATH=f"{ROOT}:{ROOT / 'convert'}:{ROOT / 'tests/helpers'}"
    )
    assert [code for code, *_ in ends] == [0, 0], ends


def test_a_place_that_the_hosts_do_not_share_is_an_error_on_all(home, tmp_path):
    path = toml(run(home, "mine", mesh="fsdp=2"), tmp_path / "run.toml")
    port = free_port()
    with contextlib.ExitStack() as closing:
        processes = []
        for index in range(2):
            (tmp_path / str(index)).mkdir()
            process = start(["train", path], 2, index, port, cwd=tmp_path / str(index))
            processes.append(closing.enter_context(process))
        errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    for index, error in enumerate(errors):
        assert f"error: host {index}: mine is on host 0's own disk: host 1 does not see it" in error
    assert not list(tmp_path.glob("*/mine/.jaxseek*"))


@pytest.mark.parametrize(("failing", "seconds"), [(0, 60), (1, 200)])
def test_when_a_host_fails_the_others_end_too(home, tmp_path, failing, seconds):
    for index in range(2):
        (tmp_path / str(index)).mkdir()
        if index != failing:
            (tmp_path / str(index) / "sparse").symlink_to(home / "sparse")
    port, begin = free_port(), time.monotonic()
    command = ["generate", "sparse", "-p", "the king", "--mesh", "fsdp=2"]
    with contextlib.ExitStack() as closing:
        processes = [start(command, 2, index, port, cwd=tmp_path / str(index)) for index in range(2)]
        for process in processes:
            closing.enter_context(process)
        errors = [process.communicate(timeout=seconds)[1] for process in processes]
    assert processes[failing].returncode == 1
    assert f"error: host {failing}: sparse: expected a jaxseek checkpoint" in errors[failing]
    assert processes[1 - failing].returncode != 0
    assert time.monotonic() - begin < seconds


# ---- Conversion: each host writes its own files.


def converted(src, dst, count, *options, **env):
    """The last line that host 0 says, of a conversion by these processes."""
    ends = on_hosts(["convert", src, dst, "--json", *options], count, **env)
    assert [code for code, *_ in ends] == [0] * count, ends
    assert not any("{" in out or "GB of weights" in error for _, out, error in ends[1:])
    return json.loads(next(l for l in ends[0][1].splitlines() if l.startswith("{")))


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "fp8", ODD, fp8_tensors(ODD), 3, weight_block_size=[128, 128])


@pytest.mark.parametrize("count", [2, 4])
def test_a_conversion_by_several_hosts_has_the_bytes_of_one(shards, tmp_path, count):
    for to, options in (("jaxseek", ()), ("hf", ("--dtype", "bf16"))):
        convert(shards, tmp_path / f"one-{to}", to=to, dtype=(options or (None,))[-1], progress=False)
        found = converted(shards, tmp_path / f"many-{to}", count, "--to", to, "--verify", *options)
        assert tree(tmp_path / f"many-{to}") == tree(tmp_path / f"one-{to}")
        assert found["tensors_resumed"] == 0
    assert sorted(p.name for p in tmp_path.iterdir() if "many" in p.name) == ["many-hf", "many-jaxseek"]


def test_a_conversion_that_was_killed_goes_on_with_another_number_of_hosts(tmp_path):
    synthetic(tmp_path / "hf", 0.3, 8)
    convert(tmp_path / "hf", tmp_path / "one", progress=False)
    for count in (2, 3, 1):
        port = free_port()
        command = ["convert", tmp_path / "hf", tmp_path / "many", "--memory", "2GiB"]
        processes = [start(command, count, index, port) for index in range(count)]
        left = tmp_path / "many.jaxseek-partial"
        until = time.monotonic() + 60
        while time.monotonic() < until and not list(left.glob("params/*/c.*")):
            time.sleep(0.05)
        time.sleep(0.3)
        for process in processes:
            process.kill()
            process.communicate()
    found = converted(tmp_path / "hf", tmp_path / "many", 4)
    assert found["tensors_resumed"] > 0
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


def test_several_hosts_convert_into_a_bucket_and_train_there(shards, home, tmp_path):
    convert(shards, tmp_path / "one", progress=False)
    with buckets.running("gcs") as (url, env):
        converted(shards, f"{url}/ours", 2, "--verify", **env)
        with pytest.MonkeyPatch.context() as m:
            for name, value in env.items():
                m.setenv(name, value)
            places._driver.cache_clear()
            convert(f"{url}/ours", tmp_path / "back", to="hf", progress=False)
            convert(tmp_path / "one", tmp_path / "own", to="hf", progress=False)
            assert tree(tmp_path / "back") == tree(tmp_path / "own")
            for steps, count in ((2, 2), (4, 1)):  # and goes on with one
                config = run(
                    home, f"{url}/run", "sft", steps=steps, mesh=f"fsdp={count}", data={"length": 64}
                )
                if count == 2:
                    ends = on_hosts(["train", toml(config, tmp_path / "run.toml"), "--json"], 2, **env)
                    assert [code for code, *_ in ends] == [0, 0], ends
                else:
                    train(config)
            alone = run(home, tmp_path / "alone", "sft", steps=4, mesh="fsdp=1", data={"length": 64})
            train(alone)
            assert_losses_equal(tmp_path / "alone", f"{url}/run", ("loss",))
            tokens = [[1, 2, 3]]
            a, b = load(f"{url}/run/model")[0](tokens), load(tmp_path / "alone/model")[0](tokens)
            np.testing.assert_allclose(a, b, atol=1e-4)
    places._driver.cache_clear()


def test_several_hosts_quantize_and_say_that_they_do_not_compare(shards, tmp_path):
    ends = on_hosts(["quantize", shards, tmp_path / "many", "--weights", "int8", "--json"], 2)
    assert [code for code, *_ in ends] == [0, 0], ends
    found = json.loads(next(l for l in ends[0][1].splitlines() if l.startswith("{")))
    assert "compared on one host, and this ran on 2" in found["error"]["why"]
    convert(shards, tmp_path / "one", dtype="int8", progress=False)
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


def test_an_error_of_one_host_ends_a_conversion_on_all(shards, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    file = sorted(broken.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1])
    begin = time.monotonic()
    ends = on_hosts(["convert", broken, tmp_path / "new"], 2)
    assert [code for code, *_ in ends] == [1, 1]
    assert all("the header describes" in error and "Traceback" not in error for _, _, error in ends), ends
    assert time.monotonic() - begin < 60
    assert not (tmp_path / "new").exists()
