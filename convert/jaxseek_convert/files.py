"""Checkpoint files on disk or in an object store: ranged reads, positioned writes, whole-file uploads."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxseek.checkpoint.directory import CheckpointError
from jaxseek.storage.place import Place, Remote, file_state
from jaxseek.storage.untrusted import raise_irregular

_libc = ctypes.CDLL(None, use_errno=True)  # calls that it lacks, outside Linux, are skipped
_local = threading.local()
_PAGE = 4096


class File:
    """A local file: byte ranges are copied into a buffer (`read`) or memory-mapped (`view`)."""

    def __init__(self, path: Path):
        raise_irregular(path, CheckpointError)
        self.path, self.name = path, path.name
        self.size = path.stat().st_size

    def state(self) -> list[Any]:
        """Return name, size and modification time, to detect a change."""
        return file_state(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return bytes [start, stop) in a buffer that this thread's next read, of any file, overwrites."""
        low = start // _PAGE * _PAGE  # O_DIRECT reads whole pages
        out = _buffer(-(-stop // _PAGE) * _PAGE - low)
        part = out[start - low : stop - low]
        if self._cached(part, start) == len(part):
            return part
        fd = self._fd if self._direct is None else self._direct
        done = 0
        while low + done < stop:
            n = os.preadv(fd, [out[done:].data], low + done)
            if not n:
                raise CheckpointError(
                    f"{self}: ended at {low + done:,} bytes while it was read, expected {self.size:,}; "
                    "is something else writing it?"
                )
            done += n
        if self._direct is None:
            _advise(fd, start, len(part), "DONTNEED")
        return part

    def _cached(self, out: np.ndarray, start: int) -> int:
        """Read into `out` what is in the page cache and return the bytes read; 0 without RWF_NOWAIT."""
        try:
            return os.preadv(self._fd, [out.data], start, os.RWF_NOWAIT)
        except (OSError, AttributeError):
            return 0

    def view(self, start: int, stop: int) -> np.ndarray:
        """Return bytes [start, stop) as a memory-mapped view."""
        return self._map[start:stop]

    @functools.cached_property
    def _fd(self) -> int:
        fd = os.open(self.path, os.O_RDONLY)
        _advise(fd, 0, 0, "RANDOM")  # read-ahead would make pages look cached
        return fd

    @functools.cached_property
    def _direct(self) -> int | None:
        """Descriptor that bypasses the page cache (O_DIRECT) where supported: a tenth of the CPU work."""
        try:
            return os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        except (OSError, AttributeError):
            return None

    @functools.cached_property
    def _map(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, "r").view(np.ndarray)

    def __del__(self):
        for fd in (self.__dict__.get("_fd"), self.__dict__.get("_direct")):
            if fd is not None:
                os.close(fd)


class RemoteFile:
    """A file in an object store or on the web."""

    def __init__(self, at: Remote):
        self.at, self.name = at, at.name
        size = at.state()[1]
        if size is None:
            raise CheckpointError(f"{self}: the server does not tell its size; download the files first")
        self.size: int = size

    def state(self) -> list[Any]:
        """Return name, size and the store's version stamp, to detect a change."""
        return self.at.state()

    def __str__(self) -> str:
        return str(self.at)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return bytes [start, stop), fetched with one range request. Raises CheckpointError."""
        if start >= stop:
            return np.empty(0, np.uint8)
        try:
            raw = self.at.fs.cat_file(self.at.path, start=start, end=stop)
        except Exception as e:  # drivers raise errors of many classes
            raise CheckpointError(
                f"{self}: cannot be read ({type(e).__name__}: {str(e)[:300]}); the same command goes on"
            ) from e
        if len(raw) != stop - start:
            raise CheckpointError(
                f"{self}: gave {len(raw):,} bytes where {stop - start:,} were asked for (bytes {start:,} to "
                f"{stop:,}); does the server answer requests of a range, and is the file whole?"
            )
        return np.frombuffer(raw, np.uint8)

    view = read


def open_file(at: Place) -> File | RemoteFile:
    """Open a file for ranged reads."""
    return File(at) if isinstance(at, Path) else RemoteFile(at)


def _buffer(n: int) -> np.ndarray:
    """Return n bytes of this thread's reused buffer: faulting in fresh pages costs more than the read."""
    buffer = getattr(_local, "buffer", None)
    if buffer is None or len(buffer) < n:
        _local.buffer = buffer = np.frombuffer(mmap.mmap(-1, n), np.uint8)  # page-aligned
    return buffer[:n]


# -------------------------------------------------------------------- writing


def allocate(path: Path, size: int) -> None:
    """Create a file of `size` bytes and reserve its disk space, so that later writes do not run out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if size and _fallocate(fd, 0, 0, size) and ctypes.get_errno() == errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.ftruncate(fd, size)  # file systems without fallocate still get the size
    finally:
        os.close(fd)


def _fallocate(fd: int, mode: int, start: int, size: int) -> int:
    call = getattr(_libc, "fallocate", None)
    return call(fd, mode, ctypes.c_int64(start), ctypes.c_int64(size)) if call else 0


class Writer:
    """Writes into the files of a folder; written pages are flushed at once and dropped from the page cache.

    Otherwise the cache grows to the size of the checkpoint, which is slower (3 GB on a virtual machine:
    0.27 GB/s against 1.5 GB/s) and evicts everything else.
    """

    sends = False  # whether files reach their destination only once they are complete

    def __init__(self, folder: Path, files: Mapping[str, int]):
        self.folder, self.files = folder, files
        self._allocated: set[str] = set()
        self._in_flight: deque[tuple[int, int, int]] = deque()
        self._bytes_in_flight = 0
        self._lock = threading.Lock()

    def finish(self, names: Iterable[str]) -> None:
        """Handle files that are completely written; nothing to do on a disk."""

    def write(self, name: str, start: int, data: np.ndarray) -> None:
        """Write `data` at byte `start` of a file, allocating the file at its full size first."""
        path = self.folder / name
        with self._lock:
            if name not in self._allocated:
                if not path.exists() or path.stat().st_size != self.files[name]:
                    allocate(path, self.files[name])
                self._allocated.add(name)
        raw, at = data.reshape(-1).view(np.uint8).data, start
        fd = os.open(path, os.O_WRONLY)
        try:
            while raw:
                n = os.pwrite(fd, raw, at)
                raw, at = raw[n:], at + n
            _sync(fd, start, at - start, _START)
        finally:
            with self._lock:
                self._in_flight.append((fd, start, at - start))
                self._bytes_in_flight += at - start
        self._settle(_MAX_IN_FLIGHT)

    def _settle(self, most: int) -> None:
        """Wait until at most `most` bytes, and `most` >> 20 writes, are still on their way to disk."""
        while True:
            with self._lock:
                if not self._in_flight or (
                    self._bytes_in_flight <= most and len(self._in_flight) <= most >> 20
                ):
                    return
                fd, start, n = self._in_flight.popleft()
                self._bytes_in_flight -= n
            _sync(fd, start, n, _WAIT)
            _advise(fd, start, n, "DONTNEED")
            os.close(fd)

    def close(self) -> None:
        """Wait until all writes are on disk."""
        self._settle(0)


class Uploader(Writer):
    """Writes files in a local folder and uploads each to an object store once it is complete."""

    sends = True

    def __init__(self, folder: Path, files: Mapping[str, int], to: Remote, check: Callable[[], None]):
        """`check` runs before each upload and raises if it must not happen."""
        super().__init__(folder, files)
        self.to, self.check = to, check

    def finish(self, names: Iterable[str]) -> None:
        """Upload these files and delete the local copies."""
        for name in names:
            self.check()
            (self.to / name).upload(self.folder / name)
            (self.folder / name).unlink()


_MAX_IN_FLIGHT = 256 << 20
_START, _WAIT = 2, 7  # SYNC_FILE_RANGE_WRITE; and WAIT_BEFORE, WAIT_AFTER


def _sync(fd: int, start: int, n: int, how: int) -> None:
    if call := getattr(_libc, "sync_file_range", None):
        call(fd, ctypes.c_int64(start), ctypes.c_int64(n), how)


def _advise(fd: int, start: int, n: int, what: str) -> None:
    if advise := getattr(os, "posix_fadvise", None):
        advise(fd, start, n, getattr(os, f"POSIX_FADV_{what}"))
