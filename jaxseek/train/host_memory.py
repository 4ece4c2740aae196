"""Memory of the host between training steps on CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys

# <malloc.h> of glibc; a threshold of -1 is none
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step; for a process that trains, before JAX starts threads.

    XLA:CPU allocates its temporary memory for every step. Returned to the kernel in between, it comes back as
    pages to be zeroed: a sixth of a small model's step. Only one arena can keep blocks this large. Elsewhere
    than under glibc, and where there is a TPU, this does nothing.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or importlib.util.find_spec("libtpu") is None
    if on_cpu and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)
