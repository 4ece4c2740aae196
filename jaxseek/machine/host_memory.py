"""Host memory: how much a process uses and used, how much is free, and reuse of it between training steps."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

# option numbers of mallopt, from glibc's <malloc.h>; a threshold of -1 means never
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

_COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's monitoring event after a compilation
_LONG = 1.0  # seconds; a compilation this long leaves much freed memory behind
_MIN_GROWTH = 32 << 20  # bytes; below this growth, trimming is not worth its time
_largest = 0  # bytes resident just before the last trim


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next training step. Call it before JAX starts threads.

    XLA:CPU allocates its temporary memory anew for every step. If it goes back to the kernel in between, it
    returns as pages to be zeroed, which takes a sixth of a small model's step. Only one arena can keep blocks
    this large. Memory that the compiler leaves in fragments is released. Does nothing without glibc, or with
    a TPU.
    """
    if (libc := _glibc()) is None:
        return
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        libc.mallopt(option, value)
    from jax import monitoring

    def compiled(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED and duration_secs > _LONG:
            libc.malloc_trim(0)

    monitoring.register_event_duration_secs_listener(compiled)


def release_freed_memory() -> None:
    """Return freed memory to the kernel if the process has more than at any call before.

    Call it between two programs that take turns. Each wants its memory in one block, and a small allocation
    inside the block of the last turn would split it. Getting pages back costs time, so freed memory is kept
    again once everything has its place.
    """
    global _largest
    if (libc := _glibc()) is not None and (now := resident()) > _largest + _MIN_GROWTH:
        libc.malloc_trim(0)
        _largest = now


def _glibc() -> Any:
    """Return the C library if it is glibc and JAX computes on the CPU, else None."""
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or importlib.util.find_spec("libtpu") is None
    libc = ctypes.CDLL(None) if on_cpu and sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None


def resident() -> int:
    """Return the resident memory of this process in bytes; a guess outside Linux."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 400 << 20


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes, loading and compiling included.

    Linux's VmHWM is preferred to getrusage, whose figure starts from the parent's peak.
    """
    if peak := _kib("/proc/self/status", "VmHWM"):
        return peak << 10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory() -> int:
    """Return the memory still available on this machine in bytes; a guess outside Linux."""
    return (_kib("/proc/meminfo", "MemAvailable") << 10) or 4 << 30


def total_memory() -> int:
    """Return the memory of this machine in bytes; 0 outside Linux."""
    return _kib("/proc/meminfo", "MemTotal") << 10


def _kib(path: str, field: str) -> int:
    """Read a field in KiB from a /proc file; 0 if it is missing."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)
