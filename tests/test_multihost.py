"""Two processes on this machine, as two hosts of a slice: they train as one, save, go on and agree."""

import contextlib
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_train_loop import ROOT, home, losses, run, toml  # noqa: F401

from jaxseek.train.loop import train

HOSTS = 2


def on_hosts(config, path, devices=1):
    """The result of the run on each host. What a host prints is kept beside the run file."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(HOSTS),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-m", "jaxseek.cli", "train", toml(config, path), "--json"]
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(path.with_suffix(f".{i}.log").open("w")) for i in range(HOSTS)]
        processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | shared | {"JAX_PROCESS_ID": str(i)},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            for i, log in enumerate(logs)
        ]
        for process in processes:
            stack.callback(process.kill)
        outs = [process.communicate(timeout=300)[0] for process in processes]
        said = "".join(path.with_suffix(f".{i}.log").read_text()[-2000:] for i in range(HOSTS))
    assert [process.returncode for process in processes] == [0] * HOSTS, said
    return [json.loads(out.splitlines()[-1]) for out in outs]


@pytest.mark.slow
def test_two_hosts_train_save_and_go_on_as_one(home, tmp_path):  # noqa: F811
    alike = {
        "model": str(home / "sparse"),
        "data": {"shuffle": False, "packing": False, "eval": str(home / "text.jsonl")},
        "eval": {"rows": 6},
    }
    for steps in (3, 6):
        config = run(home, tmp_path / "two", steps=steps, mesh="expert=2,fsdp=2", **alike)
        results = on_hosts(config, tmp_path / "two.toml", devices=2)
        assert results[0] == results[1]
        assert results[0]["steps"] == steps
    train(run(home, tmp_path / "one", steps=6, **alike))
    for name in ("loss", "eval_loss"):
        one, two = losses(tmp_path / "one", name), losses(tmp_path / "two", name)
        assert {5} <= one.keys() <= two.keys()
        np.testing.assert_allclose([two[s] for s in one], list(one.values()), rtol=1e-5)


@pytest.mark.slow
def test_two_hosts_share_the_reference_of_all_pairs(home, tmp_path):  # noqa: F811
    results = on_hosts(
        run(home, tmp_path / "two", "dpo", mesh="fsdp=2", data={"length": 64}), tmp_path / "two.toml"
    )
    assert results[0] == results[1]
    with np.load(tmp_path / "two/reference.npz") as kept:
        assert set(range(8)) <= set(kept["train_index"].tolist())  # two steps are an epoch, in another order
    margins = losses(tmp_path / "two", "margin")
    assert abs(margins[0]) < 1e-4
    assert margins[7] > 0.01
    assert (tmp_path / "two/model").is_dir()
