"""Process that computes rewards: `python -m jaxseek.rl.sandbox.worker REQUESTS REPLIES LIFELINE`.

The arguments are file descriptors. Requests are pickles prefixed by their length (8 bytes): ("load", config,
search path) and ("score", config, answers). A reply is one line of JSON: {"values": [...]} with a number or a
textual reason for each answer (null where the reward does not apply), or {"raised": text}. Prints of a reward
go to standard error. The lifeline is a pipe that nobody writes to: it closes when the trainer ends, and this
process then ends too.
"""

from __future__ import annotations

import fcntl
import functools
import importlib
import json
import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

from jaxseek.config.rl import RewardConfig
from jaxseek.rl.problem import Answer
from jaxseek.rl.rewards import mathematics, terms

Function = Callable[[list[Answer]], list[Any]]


def load(config: RewardConfig) -> Function:
    """Return the function of a reward of kind `math` or `python`."""
    if config.kind == "math":
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every slow comparison
        importlib.import_module("math_verify")
        return lambda answers: [mathematics.math(answer, config.seconds) for answer in answers]
    module, _, name = config.function.partition(":")
    function = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    if not callable(function):
        raise TypeError(f"{config.function} is a {type(function).__name__} and cannot be called")
    return function


def read(requests: IO[bytes]) -> Any:
    size = requests.read(8)
    return pickle.loads(requests.read(int.from_bytes(size, "little"))) if size else None


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    functions: dict[tuple[str, str, float], Function] = {}
    while request := read(requests):
        action, config, content = request
        key = (config.kind, config.function, config.seconds)
        try:
            if action == "load":
                sys.path[:] = content
                functions[key] = load(config)
                reply: dict[str, Any] = {"values": []}
            else:
                reply = {"values": terms.numbers(functions[key](list(content)), len(content))}
        except BaseException as error:
            reply = {"raised": f"{type(error).__name__}: {error}"[:500]}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def end_with(lifeline: int) -> None:
    """Have this process group killed when the lifeline closes.

    The kernel does it on Linux, since a reward may keep the interpreter's lock, for which a thread would
    wait.
    """
    if sys.platform == "linux":
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
    threading.Thread(target=_watch, args=(lifeline,), daemon=True).start()


def _watch(lifeline: int) -> None:
    os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    requests, replies, lifeline = map(int, sys.argv[1:])
    end_with(lifeline)
    with open(requests, "rb") as source, open(replies, "wb") as sink:
        serve(source, sink)


if __name__ == "__main__":
    main()
