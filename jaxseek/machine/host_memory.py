"""Memory of the host: what a process has and had, what is left, and keeping it between training steps."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

# <malloc.h> of glibc; a threshold of -1 is none
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

_COMPILED = "/jax/core/compile/backend_compile_duration"  # what JAX says after every compilation
_LONG = 1.0  # seconds of a compilation that leaves much memory behind
_MORE = 32 << 20  # bytes that are worth it
_most = 0


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step; for a process that trains, before JAX starts threads.

    XLA:CPU allocates its temporary memory for every step. Returned to the kernel in between, it comes back as
    pages to be zeroed: a sixth of a small model's step. Only one arena can keep blocks this large. What the
    compiler leaves, in pieces, is not kept. Elsewhere than under glibc, and where there is a TPU, this does
    nothing.
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
    """Give freed memory back to the kernel after all, where the process has more than at any call before.

    For between two programs that take turns: each wants its memory in one block, and once anything small came
    to lie in the block of the last turn there are two. To have pages back costs time, so they are kept again
    when all has its place.
    """
    global _most
    if (libc := _glibc()) is not None and (now := resident()) > _most + _MORE:
        libc.malloc_trim(0)
        _most = now


def _glibc() -> Any:
    """The C library, where it is glibc and computation is on the CPU."""
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or importlib.util.find_spec("libtpu") is None
    libc = ctypes.CDLL(None) if on_cpu and sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None


def resident() -> int:
    """Bytes of memory that this process has now; a guess outside Linux."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 400 << 20


def peak_memory() -> int:
    """The most memory that this process has held, in bytes, loading and compiling included.

    Not by getrusage where Linux has better: that figure starts at what the parent held.
    """
    if peak := _kib("/proc/self/status", "VmHWM"):
        return peak << 10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory() -> int:
    """Bytes that this machine can still give; a guess outside Linux."""
    return (_kib("/proc/meminfo", "MemAvailable") << 10) or 4 << 30


def total_memory() -> int:
    """Bytes of memory of this machine; 0 outside Linux."""
    return _kib("/proc/meminfo", "MemTotal") << 10


def _kib(path: str, field: str) -> int:
    """A figure of the kernel's, 0 where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)
