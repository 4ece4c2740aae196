"""Run a checkpoint's own chat template in a process that has limits: it is a program from elsewhere.

A template can loop for ever, multiply a text to gigabytes or call itself without end, and Python cannot stop
any of these from outside. So a helper process runs it, within limits on time, memory and output, and is
started anew after one of them was reached. This file is also what that process runs: it imports the standard
library and jinja2 only.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

SECONDS, MEMORY, LENGTH = 3, 512 << 20, 16 << 20  # of CPU, bytes, characters; for one conversation


class TemplateFault(ValueError):
    """A template refused its conversation or failed; the message says why."""


# -------------------------------------------------------------------- in the user's process

_lock = threading.Lock()
_process: subprocess.Popen[bytes] | None = None


def run_template(source: str, variables: Mapping[str, Any]) -> str:
    """Render the template `source`. Raises TemplateFault, whatever the template does."""
    return _ask(source, variables)


@functools.lru_cache(maxsize=8)
def template_variables(source: str) -> frozenset[str]:
    """Return the names of the variables that a template reads. Raises TemplateFault."""
    return frozenset(_ask(source, None))


def _ask(source: str, variables: Mapping[str, Any] | None) -> Any:
    """Have a template rendered, or without variables its names told."""
    try:
        request = json.dumps([source, variables], default=str).encode() + b"\n"
    except (ValueError, TypeError, RecursionError) as e:
        raise TemplateFault(f"cannot be given this conversation ({type(e).__name__}: {e})") from None
    with _lock:
        process, line = _started(), b""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(request)
                process.stdin.flush()
                line = process.stdout.readline()
        finally:  # a process that has not answered would give its answer to the next question
            code = 0 if line.endswith(b"\n") else stop()
    if code == -signal.SIGXCPU:
        raise TemplateFault(f"failed: it took more than {SECONDS} seconds")
    if code:
        raise TemplateFault(f"failed: it needed more than {MEMORY >> 20} MB or too deep a stack ({code})")
    reply = json.loads(line)
    if "fault" in reply:
        raise TemplateFault(reply["fault"])
    return reply["found"]


def _started() -> subprocess.Popen[bytes]:
    global _process
    if _process is not None and _process.poll() is not None:  # killed while it waited
        stop()
    if _process is None:
        paths = os.pathsep.join(filter(None, sys.path))
        _process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    return _process


@atexit.register
def stop() -> int:
    """End the helper process and return its exit code, or minus the signal that ended it; 0 without one."""
    global _process
    process, _process = _process, None
    if process is None:
        return 0
    with contextlib.suppress(BrokenPipeError), process:  # closes its pipes, at which it ends if it waits
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2 if process.poll() is None else 0)
        process.kill()
    return process.returncode or 1


def _forget() -> None:
    """In a child of os.fork, leave the parent's helper process alone."""
    global _lock, _process
    _lock, _process = threading.Lock(), None


os.register_at_fork(after_in_child=_forget)


# -------------------------------------------------------------------- in the helper process


def _serve() -> None:
    """Answer each line of standard input, a template and its variables, with a line."""
    import jinja2

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the user's process
    _limit(resource.RLIMIT_AS, MEMORY)
    _limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + SECONDS)
        try:
            source, variables = json.loads(line)
            reply = {"found": _names(source) if variables is None else _rendered(source, variables)}
        except jinja2.TemplateError as e:
            reply = {"fault": f"refused the conversation: {str(e)[:1000]}"}
        except Exception as e:
            reply = {"fault": f"failed: {type(e).__name__}: {str(e)[:1000]}"}
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


def _rendered(source: str, variables: Mapping[str, Any]) -> str:
    parts, length = [], 0
    for part in _environment().from_string(source).generate(**variables):
        parts.append(part)
        length += len(part)
        if length > LENGTH:
            raise ValueError(f"it writes more than {LENGTH:,} characters")
    return "".join(parts)


def _names(source: str) -> list[str]:
    from jinja2.meta import find_undeclared_variables

    return sorted(find_undeclared_variables(_environment().parse(source)))


def _limit(what: int, most: int) -> None:
    hard = resource.getrlimit(what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS has no limit on memory
        resource.setrlimit(what, (most, hard))


@functools.cache
def _environment() -> Any:
    """Return a sandbox with the helpers of transformers' `apply_chat_template`; it keeps what it compiled."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Renders the contents of `{% generation %}`, with which transformers marks training targets."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.from_string = functools.lru_cache(maxsize=8)(environment.from_string)  # type: ignore[method-assign]
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


if __name__ == "__main__":
    _serve()
