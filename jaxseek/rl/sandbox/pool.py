"""Worker processes for rewards that may raise, hang or crash their process.

A worker that exceeds its time limit, or exits, is killed with all processes it started, and a new one takes
its place. Its answers are then scored one by one, so that only those that crash a worker on their own fail.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jaxseek.config.rl import RewardConfig
from jaxseek.rl.problem import Answer

CHUNK = 16  # most answers of one request
LOADING = 120.0  # seconds for a process to start and to import the function
T = TypeVar("T")


class WorkerError(RuntimeError):
    """A request failed; the message gives the reason."""


class Pool:
    """Up to `size` worker processes, started on demand, and as many threads that wait for them."""

    def __init__(self, size: int):
        self.threads = ThreadPoolExecutor(size, thread_name_prefix="rewards")
        self.idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        for _ in range(size):
            self.idle.put(None)
        self.size = size
        self.workers: set[Worker] = set()
        self.closed = False

    def map(self, function: Callable[[Answer], T], answers: list[Answer]) -> list[T]:
        """Apply `function` to each answer in this process, on `size` threads."""
        return list(self.threads.map(function, answers))

    def load(self, config: RewardConfig) -> None:
        """Load a reward in a worker. Raises WorkerError if the worker cannot import what it needs."""
        self._request(config, None)

    def score(self, config: RewardConfig, answers: list[Answer]) -> list[float | str | None]:
        """Return for each answer the reward, None if it does not apply, or the reason why there is none."""
        size = max(1, min(CHUNK, -(-len(answers) // (2 * self.size))))
        chunks = [answers[i : i + size] for i in range(0, len(answers), size)]
        return [
            value for part in self.threads.map(lambda c: self._chunk(config, c), chunks) for value in part
        ]

    def close(self) -> None:
        """Kill the workers, busy ones included."""
        self.closed = True
        for worker in list(self.workers):
            worker.kill()
        self.threads.shutdown(cancel_futures=True)
        for worker in list(self.workers):
            worker.close()
        self.workers.clear()

    def _chunk(self, config: RewardConfig, answers: list[Answer]) -> list[float | str | None]:
        try:
            return self._request(config, answers)
        except WorkerError as error:
            if len(answers) == 1:
                return [str(error)]
        return [self._chunk(config, [answer])[0] for answer in answers]

    def _request(self, config: RewardConfig, answers: list[Answer] | None) -> list[float | str | None]:
        worker = self.idle.get()
        try:
            if self.closed:
                raise RuntimeError("these rewards are closed")
            if worker is None:
                worker = Worker()
                self.workers.add(worker)
            worker.load(config)
            return [] if answers is None else worker.score(config, answers)
        except OSError as error:
            raise WorkerError(f"no process to compute it: {error}") from error
        finally:
            if worker is not None and not worker.usable:
                self.workers.discard(worker)
                worker = None
            self.idle.put(worker)


class Worker:
    """A process that runs worker.py; no longer `usable` after a time-out or its end."""

    def __init__(self):
        requests, self.requests = os.pipe()
        self.replies, replies = os.pipe()
        lifeline, self.lifeline = os.pipe()
        theirs = (requests, replies, lifeline)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jaxseek.rl.sandbox.worker", *map(str, theirs)],
                stdin=subprocess.DEVNULL,
                stdout=2,
                # The worker finds jaxseek where this process does; JAX in a reward stays off the devices.
                env=os.environ
                | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=theirs,
                start_new_session=True,
            )
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self.usable = True
        self.loaded: set[RewardConfig] = set()
        os.set_blocking(self.requests, False)

    def load(self, config: RewardConfig) -> None:
        if config not in self.loaded:
            self._ask(("load", config, sys.path), LOADING)
            self.loaded.add(config)

    def score(self, config: RewardConfig, answers: list[Answer]) -> list[float | str | None]:
        return self._ask(("score", config, answers), config.seconds * len(answers))

    def kill(self) -> None:
        """Kill the process and everything it started."""
        if self.usable:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        if self.usable:
            self.kill()
            self.usable = False
            self.process.wait()
            for descriptor in (self.requests, self.replies, self.lifeline):
                os.close(descriptor)

    def _ask(self, message: Any, seconds: float) -> list[float | str | None]:
        """Send a message and return the values of the reply.

        The process is closed if it sends no valid reply in time. Raises WorkerError.
        """
        deadline = time.monotonic() + seconds
        answered = False
        try:
            self._send(message, deadline)
            reply = json.loads(self._line(deadline))
            answered = True
        except TimeoutError as error:
            raise WorkerError(f"no answer within {seconds:g} seconds") from error
        except (EOFError, BrokenPipeError, ValueError) as error:
            raise WorkerError(f"the process ended: {error}") from error
        finally:
            if not answered:
                self.close()
        if "raised" in reply:
            raise WorkerError(reply["raised"])
        return reply["values"]

    def _send(self, message: Any, deadline: float) -> None:
        data = pickle.dumps(message)
        rest = memoryview(len(data).to_bytes(8, "little") + data)
        while rest:
            _wait(self.requests, select.POLLOUT, deadline)
            rest = rest[os.write(self.requests, rest) :]

    def _line(self, deadline: float) -> bytes:
        line = bytearray()
        while not line.endswith(b"\n"):
            _wait(self.replies, select.POLLIN, deadline)
            if not (piece := os.read(self.replies, 1 << 16)):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(1.0)
                raise EOFError(f"exit status {self.process.returncode}")
            line += piece
        return bytes(line)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Wait until the descriptor is ready for `event`, or its other end is closed. Raises TimeoutError."""
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
