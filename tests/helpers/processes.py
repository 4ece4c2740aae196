"""Processes on this machine in place of the hosts of a cluster."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(arguments, count, index, port, **env):
    """A process as one of the hosts: a command's, or with -c one of Python's own."""
    shared = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return subprocess.Popen(
        [sys.executable, *(() if arguments[0] == "-c" else ("-m", "jaxseek.cli")), *map(str, arguments)],
        cwd=env.pop("cwd", ROOT),
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'convert'}"} | shared | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
