"""Joining hosts: which environments are clusters, what is said when hosts stay away, and two processes."""

import contextlib
import json
import os
import pickle
import socket
import sys
import time
from types import SimpleNamespace

import pytest
from disk import tree
from jax._src import distributed, xla_bridge
from jax._src.clusters import cloud_tpu_cluster, cluster, k8s_cluster
from oracles import tiny_config
from processes import free_port, start

from jaxseek.checkpoint import models
from jaxseek.cli.main import main
from jaxseek.config.model import ConfigError
from jaxseek.engine.generate import generate
from jaxseek.machine import hosts
from jaxseek.machine.hosts import Cluster
from jaxseek.model.deepseek import DeepSeek
from jaxseek_convert import convert

# ---- Environments. JAX's own detection runs; what it would ask, and what would connect, is not there.

GKE = {"TPU_WORKER_HOSTNAMES": "w0,w1,w2,w3", "TPU_WORKER_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "node[07-10]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
GCE = {
    "agent-worker-number": "2",
    "worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2,c:3:10.0.0.3,d:4:10.0.0.4",
}
SLICES = "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'"
IN_ENVIRONMENT = {
    "MEGASCALE_COORDINATOR_ADDRESS": "s0:1",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}

# environment, metadata server (None: there is none), TPU chips, pods of a job; what JAX is asked to join
ENVIRONMENTS = {
    "nothing": ({}, None, 0, 0, None),
    "a TPU slice of GCE": ({}, GCE | {"tpu-env": ""}, 4, 0, ("10.0.0.1:8482", 4, 2)),
    "two slices of GCE": ({}, GCE | {"tpu-env": SLICES}, 4, 0, ("10.0.0.1:8482", 8, 6)),
    "a TPU VM of one host": (
        {},
        {"agent-worker-number": "0", "worker-network-endpoints": "10.0.0.1", "tpu-env": ""},
        4,
        0,
        None,
    ),
    "a GCE machine without a TPU": ({}, {}, 0, 0, None),
    "a TPU VM whose metadata server is not there": ({}, None, 4, 0, None),
    "Colab": ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None, 8, 0, None),
    "Kaggle": ({"TPU_PROCESS_ADDRESSES": "local"}, None, 8, 0, None),
    "GKE": (GKE, {}, 4, 0, ("w0:8482", 4, 2)),
    "GKE with one host": ({"TPU_WORKER_HOSTNAMES": "w0", "TPU_WORKER_ID": "0"}, {}, 4, 0, None),
    "two slices of GKE": (GKE | IN_ENVIRONMENT, {}, 4, 0, ("s0:8482", 8, 6)),
    "SLURM": (SLURM, None, 0, 0, ("node07:61440", 4, 2)),
    "SLURM with one task": (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None, 0, 0, None),
    "a shell in an allocation": ({"SLURM_JOB_ID": "4096", "SLURM_NTASKS": "4"}, None, 0, 0, None),
    "Open MPI": (OMPI, None, 0, 0, ("10.0.0.1:61441", 4, 2)),
    "Open MPI with one rank": (
        OMPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None, 0, 0, None
    ),
    "an indexed job of Kubernetes": ({"JOB_COMPLETION_INDEX": "2"}, None, 0, 4, ("job-0.pods:55527", 4, 2)),
    "a job with one pod": ({"JOB_COMPLETION_INDEX": "0"}, None, 0, 1, None),
    "a pod that is of no indexed job": ({}, None, 0, 4, None),
    "the three variables": (EXPLICIT, None, 0, 0, ("10.0.0.1:1", 4, 2)),
    "the three variables within SLURM": (
        SLURM | EXPLICIT | {"JAX_PROCESS_ID": "3"}, None, 0, 0, ("10.0.0.1:1", 4, 3)
    ),
    "an address of one's own within SLURM": (
        SLURM | {"JAX_COORDINATOR_ADDRESS": "other:5"}, None, 0, 0, ("other:5", 4, 2)
    ),
    "one process asked for on a slice": ({"JAX_NUM_PROCESSES": "1"}, GCE | {"tpu-env": ""}, 4, 0, None),
}  # fmt: skip


INDICES = {"TPU_WORKER_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"}


@pytest.fixture
def joined(monkeypatch):
    """Where JAX was told to meet: a list of (address, count, index)."""
    found = []
    quiet = SimpleNamespace(connect=lambda: None, initialize=lambda client: None)
    state = distributed.State()
    fake = SimpleNamespace(
        get_distributed_runtime_service=lambda *_, **__: quiet,
        get_distributed_runtime_client=lambda address, index, **_: (
            found.append((address, state.num_processes, index)) or quiet
        ),
        create_preemption_sync_manager=lambda: quiet,
    )
    monkeypatch.setattr(distributed, "global_state", state)
    monkeypatch.setattr(distributed, "_jax", fake)
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    for name in list(os.environ):
        if name.startswith(
            ("JAX_COORD", "JAX_NUM_PROC", "JAX_PROCESS", "TPU_", "MEGASCALE", "SLURM", "OMPI")
        ):
            monkeypatch.delenv(name)
    return found


def set_up(monkeypatch, variables, metadata, chips, pods):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def get(url, **_):
        if metadata is None:
            raise ConnectionError("no such server")
        value = metadata.get(url.rsplit("/", 1)[1])
        return SimpleNamespace(text=value or "", status_code=404 if value is None else 200)

    monkeypatch.setitem(sys.modules, "requests", SimpleNamespace(get=get))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.1")
    for module in (cluster, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", chips > 0)
    monkeypatch.setattr(hosts, "_chips", lambda: chips)
    if pods:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.9")
        monkeypatch.setenv("HOSTNAME", "job-2")
        owner = SimpleNamespace(controller=True, kind="Job")
        about = SimpleNamespace(labels={"job-name": "job"}, owner_references=[owner], name="job-2")
        pod = SimpleNamespace(metadata=about, spec=SimpleNamespace(subdomain="pods"))
        job = SimpleNamespace(
            metadata=SimpleNamespace(labels={}, name="job"), spec=SimpleNamespace(parallelism=pods)
        )
        answer = SimpleNamespace(items=[pod])
        api = SimpleNamespace(list_namespaced_pod=lambda **_: answer, read_namespaced_job=lambda **_: job)
        client = SimpleNamespace(
            CoreV1Api=lambda: api, BatchV1Api=lambda: api, exceptions=SimpleNamespace(ApiException=OSError)
        )
        config = SimpleNamespace(load_incluster_config=lambda: None)
        monkeypatch.setitem(sys.modules, "kubernetes", SimpleNamespace(config=config, client=client))
        jobs = k8s_cluster.K8sCluster
        monkeypatch.setattr(jobs, "_namespace", classmethod(lambda cls: "default"))
        for name in ("_pod", "_job", "_controller"):
            jobs.__dict__[name].__func__.cache_clear()


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_jax_is_told_to_join_where_there_are_several_hosts_and_nowhere_else(monkeypatch, joined, case):
    *environment, expected = ENVIRONMENTS[case]
    set_up(monkeypatch, *environment)
    found = hosts.join()
    assert joined == ([] if expected is None else [expected])
    assert found == (None if expected is None else Cluster(*expected[1:]))


@pytest.mark.parametrize("case", ["a TPU slice of GCE", "GKE", "SLURM", "Open MPI"])
def test_host_0_looks_whether_its_port_is_free(monkeypatch, joined, case):
    variables, metadata, *rest, expected = ENVIRONMENTS[case]
    first = {"agent-worker-number": "0"}
    set_up(
        monkeypatch,
        variables | dict.fromkeys(INDICES & variables.keys(), "0"),
        metadata and metadata | first,
        *rest,
    )
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("JAX_COORDINATOR_PORT", str(port))
        with pytest.raises(
            ConfigError, match=f"meet at {expected[0].split(':')[0]}:{port}: port {port} of host 0 is"
        ):
            hosts.join()
    assert not joined
    assert hosts.join() == Cluster(4, 0)
    assert joined == [(f"{expected[0].split(':')[0]}:{port}", 4, 0)]


def test_a_cluster_that_cannot_be_told_is_said(monkeypatch, joined, capsys):
    set_up(monkeypatch, {}, None, 4, 0)
    assert hosts.join() is None
    said = capsys.readouterr().err
    assert "ConnectionError: no such server" in said
    assert "runs alone; if there are, set JAX_COORDINATOR_ADDRESS" in said


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "4"}, "JAX_NUM_PROCESSES without JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "'4', expected a number of processes and a number below it"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES is 'four'"),
        (EXPLICIT | {hosts.TIMEOUT: "5m"}, "JAXSEEK_HOSTS_TIMEOUT is '5m', expected a number of seconds"),
    ],
)
def test_variables_that_do_not_go_together_are_refused(monkeypatch, joined, variables, message):
    set_up(monkeypatch, variables, None, 0, 0)
    with pytest.raises(ConfigError, match=message):
        hosts.join()


# ---- Commands for one host.


def test_a_command_for_one_host_leaves_the_others_alone(monkeypatch, joined, capsys):
    set_up(monkeypatch, GKE, {}, 4, 0)
    assert main(["chat", "no-such-model"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "jaxseek chat: runs on host 0, not on this one" in printed.err
    assert main(["info", "tiny-v3"]) == 0
    assert "parameters" not in capsys.readouterr().out
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    assert main(["info", "tiny-v3"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert not joined


@pytest.mark.parametrize(("chips", "bounds"), [(1, "1,1,1"), (4, "2,2,1"), (8, "2,4,1")])
def test_host_0_runs_it_on_its_own_chips(monkeypatch, joined, capsys, chips, bounds):
    set_up(
        monkeypatch, GKE | IN_ENVIRONMENT | {"TPU_WORKER_ID": "0", "MEGASCALE_SLICE_ID": "0"}, {}, chips, 0
    )
    for name in ("TPU_PROCESS_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS", "TPU_VISIBLE_CHIPS"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    assert hosts.runs_here("bench", devices=True)
    assert "runs on host 0 of 8 alone" in capsys.readouterr().err
    assert os.environ["TPU_PROCESS_BOUNDS"] == "1,1,1"
    assert os.environ["TPU_CHIPS_PER_PROCESS_BOUNDS"] == bounds
    assert os.environ["TPU_VISIBLE_CHIPS"].count(",") == chips - 1
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "localhost"
    assert not any(name.startswith("MEGASCALE") for name in os.environ)
    assert not joined


def test_without_a_cluster_nothing_is_said_and_nothing_is_set(monkeypatch, joined, capsys):
    set_up(monkeypatch, {}, None, 0, 0)
    before = dict(os.environ)
    assert hosts.runs_here("bench", devices=True)
    assert hosts.runs_here("info", devices=False)
    assert dict(os.environ) == before
    assert capsys.readouterr().err == ""


# ---- Agreeing, with a second host that is not there.


def test_an_error_of_host_0_reaches_the_others_with_its_kind():
    assert hosts.from_first(lambda: {"a": [1]}) == {"a": [1]}
    for error in (ConfigError("value, expectation"), models.CheckpointError("x"), OSError(28, "full")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))


# ---- Processes.


def test_missing_hosts_are_an_error_within_the_stated_time():
    port, command = free_port(), ["generate", "tiny-v3", "-p", "1"]
    with contextlib.ExitStack() as closing:
        for index, seconds in ((2, 100), (0, 8)):
            process = start(command, 3, index, port, JAXSEEK_HOSTS_TIMEOUT=str(seconds))
            closing.enter_context(process)
            closing.callback(process.kill)
        begin = time.monotonic()
        out, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert "host 0 of 3: error: 2 of 3 hosts came within 8 s (JAXSEEK_HOSTS_TIMEOUT)" in error
    assert "--worker=all" in error
    assert "stack trace" not in error
    assert 8 < time.monotonic() - begin < 40


@pytest.mark.parametrize("address", ["localhost", "localhost:99999", "localhost:x", ":80"])
def test_an_address_that_is_none_is_said_on_every_host(address, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    for index in ("0", "1"):
        monkeypatch.setenv("JAX_PROCESS_ID", index)
        with pytest.raises(ConfigError, match="expected HOST:PORT"):
            hosts.cluster()


def test_a_port_that_another_process_has_is_said():
    with socket.create_server(("", 0)) as taken:
        process = start(["generate", "tiny-v3", "-p", "1"], 2, 0, taken.getsockname()[1])
        with process:
            _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "of host 0 is taken" in error
    assert "JAX_COORDINATOR_PORT" in error
    assert "Traceback" not in error


def test_a_host_knows_whether_host_0_is_there():
    with socket.create_server(("localhost", 0)) as there:
        port = there.getsockname()[1]
        assert hosts._answers(f"localhost:{port}")
    assert not hosts._answers(f"localhost:{port}")
    assert not hosts._answers("")


def test_two_hosts_generate_what_one_does_and_print_it_once(tmp_path):
    model = DeepSeek.init(tiny_config("llama", num_hidden_layers=1, vocab_size=64, initializer_range=0.1))
    models.save(model, tmp_path / "model")
    port = free_port()
    command = ["generate", tmp_path / "model", "-p", "-", "-n", "6", "-t", "0", "--json"]
    with start(command, 2, 0, port) as first, start(command, 2, 1, port) as second:
        processes = first, second
        (zero, error), (one, other) = (
            process.communicate(text, timeout=120) for process, text in zip(processes, ("5 6 7", "9 9"))
        )
    assert [process.returncode for process in processes] == [0, 0], error + other
    rows = [json.loads(line) for line in zero.splitlines() if line.startswith("{")]
    assert [row["prompt"] for row in rows] == [[5, 6, 7]]
    assert [int(t) for t in rows[0]["text"].split()] == generate(
        model, None, [[5, 6, 7]], max_new_tokens=6, temperature=0
    )[0]
    assert "{" not in one
    assert "tok/s" in error
    assert "tok/s" not in other


def test_two_hosts_share_a_conversion_and_say_once_what_came_of_it(tmp_path):
    model = DeepSeek.init(tiny_config("llama", num_hidden_layers=1, vocab_size=64))
    models.save(model, tmp_path / "model")
    port, command = free_port(), ["convert", tmp_path / "model", tmp_path / "hf", "--to", "hf", "--json"]
    with start(command, 2, 0, port) as first, start(command, 2, 1, port) as second:
        (zero, error), (one, other) = (p.communicate(timeout=120) for p in (first, second))
    assert [first.returncode, second.returncode] == [0, 0], error + other
    convert(tmp_path / "model", tmp_path / "alone", to="hf", progress=False)
    assert tree(tmp_path / "hf") == tree(tmp_path / "alone")
    assert '"tensors"' in zero
    assert "{" not in one
