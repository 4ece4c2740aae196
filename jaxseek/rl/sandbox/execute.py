"""Run untrusted code in processes that can compute, and nothing else.

Each run is a fresh Python process (jail.py) in its own session, with an empty environment and no folder of
its own, under limits on memory, processor time, threads and output; it has no capabilities, even where root
starts it. A seccomp filter denies it sockets, processes, signals and changes to files, and Landlock denies
any file outside the Python installation. On a kernel without Landlock (before 5.13) the code cannot open any
file, and can import only the modules that jail.py has imported; on one that cannot ask about threads (before
5.5) it has one alone. SIGKILL ends a run at its time limit at the latest, and with the process that started
it. Nothing of it is on a disk.

All of this needs neither root nor namespaces. Where bubblewrap or nsjail is installed, the process can be put
into namespaces of its own in addition (`WRAPPERS`).

Verdicts do not come from the process that runs the code. Output is compared here; assertions run in a second
process (`judge`), which asks the first for the values of function calls and accepts plain data only. Code can
therefore exit early, print, raise anything, patch builtins or return objects that equal everything: it passes
a test only by returning the right value. An instance of the code's own class stays there; a test can call its
methods, read and set its attributes and pass it on, but comparing, measuring and iterating it are the
judge's: it equals only itself. Limits of this design: a test does not see an argument that a function changes
in place, cannot pass functions of its own, and accepts any object where it only checks for truth.

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
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
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
# Programs that start the jail in namespaces of its own, by their names in a run file.
WRAPPERS = {
    "bwrap": ["bwrap", "--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--ro-bind", "/", "/",
                   "--chdir", "/", "--"],
    "nsjail": ["nsjail", "--mode", "o", "--quiet", "--chroot", "/", "--cwd", "/", "--keep_env",
               "--disable_rlimits", "--disable_proc"],
}  # fmt: skip
# What the first program of a run tries, since a container may take a filter and not heed it.
PROBE = """
import os, threading
try:
    os.fork()
except PermissionError:
    print(6 * 7)
"""


log = logging.getLogger(__name__)


class SandboxError(RuntimeError):
    """The sandbox itself did not start, which says nothing about the code."""


class BrokenProblem(ValueError):
    """The tests of a problem fail whatever the code is, which says nothing about the code."""


@dataclass(frozen=True)
class Outcome:
    """Result of a program: `ok` means exit status 0 within all limits, otherwise `reason` says why not."""

    ok: bool
    stdout: str
    reason: str = ""


def run(code: str, stdin: str = "", seconds: float = 5.0, megabytes: int = 512, sandbox: str = "") -> Outcome:
    """Run `code` as a program, for at most `seconds` of wall-clock time in `megabytes` of address space.

    Raises SandboxError if the sandbox does not start.
    """
    deadline = time.monotonic() + seconds
    job = {"code": code}
    with (
        _file(stdin.encode(errors="replace")) as text,
        _jail("program", seconds, megabytes, sandbox, job, stdin=text, output=subprocess.PIPE) as jail,
    ):
        process, report = jail
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
    seconds: float = 5.0, megabytes: int = 512, sandbox: str = "",
) -> list[bool]:  # fmt: skip
    """Return for each of `tests` (statements that raise if the code is wrong) whether it passed.

    `setup` runs before them. `functions` are what the code is asked for, where tests and set-up use them; if
    they use none of these, it is asked for every name that is defined nowhere else. `trusted` runs before
    both, without access to the code. All of it shares one time limit: a test that is not reached in `seconds`
    has not passed. Raises SandboxError, and BrokenProblem for tests that do not parse, need a module that is
    not here or pass functions to the code, and for a set-up that fails by itself.
    """
    deadline = time.monotonic() + seconds
    asked = {"tests": tests, "setup": setup, "trusted": trusted, "functions": [*functions]}
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        _jail("candidate", seconds, megabytes, sandbox, {"code": code}, link=theirs.fileno()) as candidate,
        _jail("judge", seconds, megabytes, sandbox, asked, link=ours.fileno()) as judge,
    ):
        ours.close()  # so that each of the two processes notices when the other ends
        theirs.close()
        (ready, lines), _ = _read([candidate[1], judge[1]], deadline)
    _check_ready(ready)
    _check_ready(lines)
    _, *said = [line for line in lines.lstrip().splitlines(keepends=True) if line.endswith(b"\n")]
    verdicts = [json.loads(line) for line in said]
    for verdict in verdicts:
        if isinstance(verdict, str):
            raise BrokenProblem(verdict)
    return verdicts + [False] * (len(tests) - len(verdicts))


@functools.cache
def check_platform(sandbox: str = "") -> None:
    """Raise ConfigError if untrusted code cannot run safely on this machine, in the sandbox of this name."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in seccomp.MACHINES:
        raise ConfigError(
            f"rewards that run code need Linux on {' or '.join(seccomp.MACHINES)}, and this is "
            f"{sys.platform} on {machine}: run on such a machine, or without the code reward"
        )
    program = WRAPPERS[sandbox][0] if sandbox else sys.executable
    if not shutil.which(program):
        raise ConfigError(
            f'rewards: sandbox = "{sandbox}" needs the program {program}, which is not on PATH; install '
            "it, or leave out the key"
        )
    try:
        outcome = run(PROBE, seconds=60.0, sandbox=sandbox)
    except (SandboxError, OSError) as error:
        needs = f"{program}, seccomp filters" if sandbox else "seccomp filters"
        raise ConfigError(f"rewards that run code need {needs} and memory files: {error}") from error
    if outcome.stdout != "42\n":
        raise ConfigError(
            "the sandbox for code rewards does not hold a first program: "
            f"{outcome.reason or 'it may start processes'}"
        )
    if not _threads():
        log.warning("this kernel is older than 5.5: code that is rewarded cannot start threads")
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
def _threads() -> bool:
    """Return whether the kernel can ask whether a program may have another thread (5.5)."""
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    return release is not None and tuple(map(int, release.groups())) >= (5, 5)


@functools.cache
def _readable() -> list[str]:
    """Return the paths of the Python installation and of the shared libraries that extension modules need."""
    installation = [f"{prefix}/{lib}" for prefix in (sys.base_prefix, "/usr", "") for lib in ("lib", "lib64")]
    return [p for p in [*installation, "/usr/share/zoneinfo", "/etc/ld.so.cache"] if Path(p).exists()]


def _file(content: bytes) -> IO[bytes]:
    """Create a file in memory, positioned at its start, that can only be read."""
    with open(os.memfd_create("jaxseek"), "wb") as file:
        file.write(content)
        file.flush()
        return open(f"/proc/self/fd/{file.fileno()}", "rb", buffering=0)


@contextlib.contextmanager
def _jail(
    role: str, seconds: float, megabytes: int, sandbox: str, job: dict[str, Any], *, link: int = -1,
    stdin: IO[bytes] | int = subprocess.DEVNULL, output: int = subprocess.DEVNULL,
) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:  # fmt: skip
    """Start jail.py and yield it with the socket it reports on; at the end, kill its whole process group."""
    landlock, threads, machine = _landlock(), _threads(), platform.machine()
    report, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(report)
        with theirs:
            limits = {"seconds": seconds, "megabytes": megabytes}
            limits |= {"landlock": landlock, "readable": _readable()}
            limits |= {"filter": seccomp.program(machine, landlock > 0, threads).hex()}
            limits |= {"threads": seccomp.thread_filter(machine).hex() if threads else ""}
            # In namespaces of its own the parent is another, which ends with this process.
            limits |= {"calls": seccomp.numbers(machine), "parent": 0 if sandbox else os.getpid()}
            ends = {"role": role, "report": theirs.fileno(), "link": link}
            description = stack.enter_context(_file(json.dumps(job | limits | ends).encode()))
            passed = [fd for fd in (description.fileno(), theirs.fileno(), link) if fd >= 0]
            wrapper = list(WRAPPERS.get(sandbox, []))
            if sandbox == "nsjail":  # it closes what it is not told of, and does not end with its parent
                given = [word for fd in passed for word in ("--pass_fd", str(fd))]
                wrapper += [*given, "--time_limit", str(int(seconds) + 1), "--"]
            process = subprocess.Popen(
                [*wrapper, sys.executable, "-S", "-P", "-s", "-B", str(JAIL), str(description.fileno())],
                executable=shutil.which(wrapper[0]) if wrapper else None,
                stdin=stdin,
                stdout=output,
                stderr=output,
                cwd="/",
                env=ENVIRONMENT,
                pass_fds=passed,
                start_new_session=True,
            )
        stack.enter_context(process)
        try:
            yield process, report
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


def _read(files: list[Any], deadline: float) -> tuple[list[bytes], str]:
    """Read each of `files` to its end or the deadline; return the contents, and why reading stopped early.

    Meanwhile, answer what comes from listeners to threads, which arrive along with the contents of sockets.
    """
    parts: dict[Any, bytearray] = {file: bytearray() for file in files}
    listeners: set[int] = set()
    unfinished, reason = len(files), ""
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        while unfinished and not reason:
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                if key.fd in listeners:
                    if not seccomp.grant_thread(key.fd):
                        selector.unregister(key.fd)
                    continue
                received: list[int] = []
                if isinstance(key.fileobj, socket.socket):
                    piece, received, *_ = socket.recv_fds(key.fileobj, 1 << 16, 1)
                else:
                    piece = os.read(key.fd, 1 << 16)
                for descriptor in received:
                    stack.callback(os.close, descriptor)
                    selector.register(descriptor, selectors.EVENT_READ)
                    listeners.add(descriptor)
                parts[key.fileobj] += piece
                if not piece:
                    selector.unregister(key.fileobj)
                    unfinished -= 1
                if len(parts[key.fileobj]) > OUTPUT:
                    reason = f"printed more than {OUTPUT} bytes"
            if time.monotonic() >= deadline and unfinished:
                reason = reason or "timed out"
    return [bytes(part) for part in parts.values()], reason


def _check_ready(report: bytes, complaint: bytes = b"") -> None:
    if not report.lstrip().startswith(b"ready\n"):
        *_, last = ["out of time", *complaint.decode(errors="replace").strip().splitlines()]
        raise SandboxError(f"it did not start: {last[:500]}")
