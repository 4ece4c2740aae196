"""Files of a checkpoint, on a disk or in an object store: read in parts, written in parts or sent whole."""

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

_libc = ctypes.CDLL(None, use_errno=True)  # what it lacks, outside Linux, is left out
_local = threading.local()
_PAGE = 4096


class File:
    """A file on a disk. Parts of it are read into memory of their own, or seen through a map."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.name
        self.size = path.stat().st_size

    def state(self) -> list[Any]:
        """What tells the file from itself before it was changed."""
        return file_state(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes, valid until this thread reads the next (of this or another file)."""
        low = start // _PAGE * _PAGE  # past the system's cache a disk is read by whole pages
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
        """Bytes that were in the system's cache, where that can be asked for."""
        try:
            return os.preadv(self._fd, [out.data], start, os.RWF_NOWAIT)
        except (OSError, AttributeError):
            return 0

    def view(self, start: int, stop: int) -> np.ndarray:
        """Bytes, read by the system when they are looked at."""
        return self._map[start:stop]

    @functools.cached_property
    def _fd(self) -> int:
        fd = os.open(self.path, os.O_RDONLY)
        _advise(fd, 0, 0, "RANDOM")  # what is read ahead would look as if it had been in the cache
        return fd

    @functools.cached_property
    def _direct(self) -> int | None:
        """To read past the system's cache, where that can be done: it costs a tenth of the work."""
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
        """Tell the file from itself before it was changed, by what the store notes."""
        return self.at.state()

    def __str__(self) -> str:
        return str(self.at)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes, by one request of a range."""
        if start >= stop:
            return np.empty(0, np.uint8)
        try:
            raw = self.at.fs.cat_file(self.at.path, start=start, end=stop)
        except Exception as e:  # its errors have many bases
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
    """A file to read parts of."""
    return File(at) if isinstance(at, Path) else RemoteFile(at)


def _buffer(n: int) -> np.ndarray:
    """Memory of this thread that is used again: fresh pages cost more than reading."""
    held = getattr(_local, "buffer", None)
    if held is None or len(held) < n:
        _local.buffer = held = np.frombuffer(mmap.mmap(-1, n), np.uint8)  # begins with a page
    return held[:n]


# -------------------------------------------------------------------- writing


def allocate(path: Path, size: int) -> None:
    """Make a file of this size, with its space, so that writing into it cannot fail for want of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if size and _fallocate(fd, 0, 0, size) and ctypes.get_errno() == errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.ftruncate(fd, size)  # also where the file system cannot reserve
    finally:
        os.close(fd)


def _fallocate(fd: int, mode: int, start: int, size: int) -> int:
    call = getattr(_libc, "fallocate", None)
    return call(fd, mode, ctypes.c_int64(start), ctypes.c_int64(size)) if call else 0


class Writer:
    """Writes into files of a folder. What is written goes to disk at once and then leaves the system's cache.

    Otherwise the cache grows to the size of the checkpoint, which costs more than the writing (3 GB on a
    virtual machine: 0.27 GB/s, and 1.5 GB/s like this), and what was to be kept in it is lost.
    """

    sends = False  # whether a file is where it belongs only when it is whole

    def __init__(self, folder: Path, files: Mapping[str, int]):
        self.folder, self.files = folder, files
        self._made: set[str] = set()
        self._behind: deque[tuple[int, int, int]] = deque()
        self._bytes = 0
        self._lock = threading.Lock()

    def finish(self, names: Iterable[str]) -> None:
        """Take note that files are whole."""

    def write(self, name: str, start: int, data: np.ndarray) -> None:
        """Write bytes into a file, which is made with its full size where it is not there yet."""
        path = self.folder / name
        with self._lock:
            if name not in self._made:
                if not path.exists() or path.stat().st_size != self.files[name]:
                    allocate(path, self.files[name])
                self._made.add(name)
        raw, at = data.reshape(-1).view(np.uint8).data, start
        fd = os.open(path, os.O_WRONLY)
        try:
            while raw:
                n = os.pwrite(fd, raw, at)
                raw, at = raw[n:], at + n
            _sync(fd, start, at - start, _START)
        finally:
            with self._lock:
                self._behind.append((fd, start, at - start))
                self._bytes += at - start
        self._settle(_BEHIND)

    def _settle(self, most: int) -> None:
        """Wait until at most so many bytes, or files, are on their way to the disk."""
        while True:
            with self._lock:
                if not self._behind or (self._bytes <= most and len(self._behind) <= most >> 20):
                    return
                fd, start, n = self._behind.popleft()
                self._bytes -= n
            _sync(fd, start, n, _WAIT)
            _advise(fd, start, n, "DONTNEED")
            os.close(fd)

    def close(self) -> None:
        """Wait for the disk."""
        self._settle(0)


class Uploader(Writer):
    """Writes into files of a folder on this machine; each is sent to an object store when it is whole."""

    sends = True

    def __init__(self, folder: Path, files: Mapping[str, int], to: Remote, check: Callable[[], None]):
        """`check` is called before each file is sent, and raises where it must not be."""
        super().__init__(folder, files)
        self.to, self.check = to, check

    def finish(self, names: Iterable[str]) -> None:
        """Send these files, and remove them here."""
        for name in names:
            self.check()
            (self.to / name).upload(self.folder / name)
            (self.folder / name).unlink()


_BEHIND = 256 << 20
_START, _WAIT = 2, 7  # SYNC_FILE_RANGE_WRITE; and WAIT_BEFORE, WAIT_AFTER


def _sync(fd: int, start: int, n: int, how: int) -> None:
    if call := getattr(_libc, "sync_file_range", None):
        call(fd, ctypes.c_int64(start), ctypes.c_int64(n), how)


def _advise(fd: int, start: int, n: int, what: str) -> None:
    if advise := getattr(os, "posix_fadvise", None):
        advise(fd, start, n, getattr(os, f"POSIX_FADV_{what}"))
