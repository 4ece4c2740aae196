"""Run untrusted code in processes that can compute, and nothing else.

Each run is a fresh Python process (jail.py) in its own session, with an empty folder and an empty
environment, under limits on memory, processor time and output; a seccomp filter denies it sockets, processes,
signals and changes to files, and Landlock denies any file outside the Python installation. On a kernel
without Landlock (before 5.13) the code cannot open any file, and can import only the modules that jail.py has
imported. SIGKILL ends a run at its time limit at the latest.

Verdicts do not come from the process that runs the code. Output is compared here; assertions run in a second
process (`judge`), which asks the first for the values of function calls and accepts plain data only. Code can
therefore exit early, print, patch builtins or return objects that equal everything: it passes a test only by
returning the right value. Limits of this design: a test does not see an argument that a function changes in
place, cannot pass functions of its own, and accepts any object where it only checks for truth.

A process can still use its share of the processor, read the Python installation, and ask whether a file
exists. It shares the kernel; this is not a virtual machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import logging
import os
import platform
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jaxseek.config.model import ConfigError
from jaxseek.rl.sandbox import seccomp

OUTPUT = 1 << 20  # bytes that a program may print; it is ended if it prints more
JAIL = Path(__file__).with_name("jail.py")
# PYTHONHASHSEED=0 makes output that depends on hashes reproducible.
ENVIRONMENT = {"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
LANDLOCK_CREATE_RULESET, LANDLOCK_CREATE_RULESET_VERSION = 444, 1


log = logging.getLogger(__name__)


class SandboxError(RuntimeError):
    """The sandbox itself did not start, which says nothing about the code."""


@dataclass(frozen=True)
class Outcome:
    """Result of a program: `ok` means exit status 0 within all limits, otherwise `reason` says why not."""

    ok: bool
    stdout: str
    reason: str = ""


def run(code: str, stdin: str = "", seconds: float = 5.0, megabytes: int = 512) -> Outcome:
    """Run `code` as a program, for at most `seconds` of wall-clock time in `megabytes` of address space.

    Raises SandboxError if the sandbox does not start.
    """
    deadline = time.monotonic() + seconds
    with (
        _file(stdin.encode(errors="replace")) as text,
        _jail("program", seconds, megabytes, {"code": code}, stdin=text, output=subprocess.PIPE) as (
            process,
            report,
        ),
    ):
        (ready, stdout, stderr), reason = _read([report, process.stdout, process.stderr], deadline)
        if not reason:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                reason = "timed out"
        _check_ready(ready, stderr)
        status = process.returncode
    if not reason and status:
        last = stderr.decode(errors="replace").strip().splitlines()[-1:] or [""]
        reason = f"killed by signal {-status}" if status < 0 else f"exit status {status}: {last[0][:200]}"
    return Outcome(not reason, stdout.decode(errors="replace"), reason)


def judge(
    code: str, tests: list[str], *, setup: str = "", trusted: str = "", functions: tuple[str, ...] = (),
    seconds: float = 5.0, megabytes: int = 512,
) -> list[bool]:  # fmt: skip
    """Return for each of `tests` (statements that raise if the code is wrong) whether it passed.

    `setup` runs before them and, like them, may use the names that the code defines. `trusted` runs before
    that, without access to the code; its names take precedence over the code's, except `functions`. All of it
    shares one time limit: a test that is not reached in `seconds` has not passed. Raises SandboxError, and
    ValueError for tests that do not parse.
    """
    deadline = time.monotonic() + seconds
    asked = {"tests": tests, "setup": setup, "trusted": trusted, "functions": [*functions]}
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        _jail("candidate", seconds, megabytes, {"code": code}, link=theirs.fileno()) as (_, candidate_report),
        _jail("judge", seconds, megabytes, asked, link=ours.fileno()) as (_, judge_report),
    ):
        ours.close()  # so that each of the two processes notices when the other ends
        theirs.close()
        (candidate, lines), reason = _read([candidate_report, judge_report], deadline)
    _check_ready(candidate)
    _check_ready(lines)
    _, parsed, *verdicts = [*lines.decode().splitlines(), ""][: len(tests) + 2]
    if not parsed and not reason:
        raise ValueError("the tests of this problem cannot be read as Python")
    passed = [verdict == "true" for verdict in verdicts]
    return passed + [False] * (len(tests) - len(passed))


@functools.cache
def check_platform() -> None:
    """Raise ConfigError if untrusted code cannot run safely on this machine."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in seccomp.MACHINES:
        raise ConfigError(
            f"rewards that run code need Linux on {' or '.join(seccomp.MACHINES)}, and this is "
            f"{sys.platform} on {machine}: run on such a machine, or without the code reward"
        )
    try:
        outcome = run("print(6 * 7)", seconds=60.0)
    except SandboxError as error:
        raise ConfigError(f"rewards that run code need seccomp filters: {error}") from error
    if outcome.stdout != "42\n":
        raise ConfigError(f"the sandbox for code rewards does not run a first program: {outcome.reason}")
    if not _landlock():
        log.warning(
            "no Landlock in this kernel: code that is rewarded imports only the modules listed in jail.py"
        )


@functools.cache
def _landlock() -> int:
    """Return the kernel's Landlock version, 0 if it has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_size_t(0)
    return max(0, libc.syscall(LANDLOCK_CREATE_RULESET, None, size, LANDLOCK_CREATE_RULESET_VERSION))


@functools.cache
def _readable() -> list[str]:
    """Return the paths of the Python installation and of the shared libraries that extension modules need."""
    installation = [f"{prefix}/{lib}" for prefix in (sys.base_prefix, "/usr", "") for lib in ("lib", "lib64")]
    return [path for path in [*installation, "/etc/ld.so.cache"] if Path(path).exists()]


def _file(content: bytes) -> IO[bytes]:
    """Create an unnamed file with this content, positioned at its start."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    file.write(content)
    file.seek(0)
    return file


@contextlib.contextmanager
def _jail(
    role: str, seconds: float, megabytes: int, job: dict[str, Any], *, link: int = -1,
    stdin: IO[bytes] | int = subprocess.DEVNULL, output: int = subprocess.DEVNULL,
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:  # fmt: skip
    """Start jail.py and yield it with the pipe it reports on; at the end, kill its whole process group."""
    landlock = _landlock()
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxseek-sandbox-"))
        reading, writing = os.pipe()
        report = stack.enter_context(open(reading, "rb", buffering=0))
        with open(writing, "wb", buffering=0):
            limits = {
                "seconds": seconds,
                "megabytes": megabytes,
                "landlock": landlock,
                "readable": _readable(),
            }
            rules = {"filter": seccomp.program(platform.machine(), opens=landlock > 0).hex()}
            ends = {"role": role, "report": writing, "link": link}
            description = stack.enter_context(_file(json.dumps(job | limits | rules | ends).encode()))
            process = subprocess.Popen(
                [sys.executable, "-S", "-P", "-s", "-B", str(JAIL), str(description.fileno())],
                stdin=stdin,
                stdout=output,
                stderr=output,
                cwd=home,
                env=ENVIRONMENT,
                pass_fds=[fd for fd in (description.fileno(), writing, link) if fd >= 0],
                start_new_session=True,
            )
        stack.enter_context(process)
        try:
            yield process, report
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


def _read(files: list[Any], deadline: float) -> tuple[list[bytes], str]:
    """Read each of `files` to its end or the deadline; return the contents, and why reading stopped early."""
    parts: dict[Any, bytearray] = {file: bytearray() for file in files}
    with selectors.DefaultSelector() as selector:
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        reason = ""
        while selector.get_map() and not reason:
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                piece = os.read(key.fd, 1 << 16)
                parts[key.fileobj] += piece
                if not piece:
                    selector.unregister(key.fileobj)
                if len(parts[key.fileobj]) > OUTPUT:
                    reason = f"printed more than {OUTPUT} bytes"
            if time.monotonic() >= deadline and selector.get_map():
                reason = reason or "timed out"
    return [bytes(part) for part in parts.values()], reason


def _check_ready(report: bytes, complaint: bytes = b"") -> None:
    if not report.startswith(b"ready\n"):
        raise SandboxError(f"it did not start: {complaint.decode(errors='replace')[-500:] or 'out of time'}")
