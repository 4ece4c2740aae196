"""Run the programs of a benchmark in processes of their own, which step on command.

They take turns, so that a drift in the machine's speed affects all, and each has its own memory. Every
program has as many threads as this process has CPUs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from jaxseek.config.model import ConfigError

QUIET = 0.05  # seconds between turns, long enough for spinning worker threads to go to sleep


class Worker:
    """A program of `module` in a process of its own, which answers every command with a line of JSON."""

    def __init__(self, program: str, task: dict[str, Any], module: str):
        self.program = program
        # Without the compilation cache, so that the first step includes compiling.
        environ = {"OMP_NUM_THREADS": str(cpus()), "JAX_ENABLE_COMPILATION_CACHE": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, program, json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environ,
            start_new_session=True,  # ctrl-C reaches this process alone, which then ends the worker
        )

    def ask(self, word: str) -> dict[str, Any]:
        """Send a command and return the answer.

        Raises ConfigError with the program's message if it failed, ChildProcessError if it died.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # readline below then returns nothing
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            hint = ", which is out of memory more often than not" if code == -signal.SIGKILL else ""
            raise ChildProcessError(f"the process of {self.program} ended with {code}{hint}")
        answer = json.loads(line)
        if "error" in answer:
            raise ConfigError(answer["error"])
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.communicate()


def take_turns(workers: Sequence[Worker], repeats: int) -> None:
    """Step every worker in turn, `repeats` times."""
    for turn in range(repeats):
        for worker in workers:
            time.sleep(QUIET)
            worker.ask("step")
        print(f"step {turn + 1}/{repeats}", end="\r", file=sys.stderr, flush=True)
    print(" " * 40, end="\r", file=sys.stderr)


def listen() -> None:
    """Wait in a worker for the next command; exit if the parent has closed the pipe."""
    if not sys.stdin.readline():
        raise SystemExit(1)


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def export(source: str, folder: str) -> None:
    """Write the model as a Hugging Face directory in float32, without multi-token modules."""
    import jax
    from flax import nnx

    from jaxseek.api import load
    from jaxseek_convert import save_hf

    if jax.default_backend() != "cpu":
        raise ConfigError("--against transformers compares on CPU; this process uses an accelerator")
    model, _ = load(source, dtype="float32")
    model.cfg, model.mtp = model.cfg.replace(num_nextn_predict_layers=0), nnx.List([])
    save_hf(model, folder)
