"""The pump of a conversion: rows of tensors go from a source to files, by threads, within a budget of memory.

What is done stands in a journal beside the files, a line for each tensor with the digest of every part that
was written. Killed at any moment, the next run reads the journal and goes on: the files have their full
size from the start, so a tensor that was written in part is simply written again.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from jaxseek.checkpoint import CheckpointError
from jaxseek.config import ModelConfig
from jaxseek_convert.files import File, Writer
from jaxseek_convert.numbers import Form, Rows, change
from jaxseek_convert.table import Table

JOURNAL = "journal.jsonl"
MEMORY = 3 << 29  # bytes, by default: 1.5 GiB
_PIECE = 8 << 20  # bytes of rows at a time
_PER_THREAD = 8 * _PIECE  # rows as read, as float32, in between, and as written
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Source(Protocol):
    """A checkpoint as tensors of the Hugging Face format, of which rows are read."""

    def form(self, name: str) -> Form: ...
    def nbytes(self, name: str) -> int: ...
    def position(self, name: str) -> tuple[str, int]: ...
    def rows(self, name: str, first: int, last: int) -> Rows: ...


class Described(Protocol):
    """What is known of a checkpoint before it is read."""

    @property
    def cfg(self) -> ModelConfig: ...
    @property
    def table(self) -> Table: ...
    @property
    def tensors(self) -> Mapping[str, Any]: ...
    @property
    def quantization(self) -> Mapping[str, Any] | None: ...
    @property
    def forms(self) -> dict[str, Form]: ...


class Sink(Protocol):
    """Files to be written: their sizes, the form that a tensor has there, and where its rows go."""

    @property
    def files(self) -> Mapping[str, int]: ...
    @property
    def headers(self) -> Mapping[str, bytes]: ...
    @property
    def tensors(self) -> Mapping[str, Any]: ...

    def form(self, name: str) -> Form: ...
    def put(self, name: str, first: int, rows: Rows) -> Iterable[tuple[str, str, int, np.ndarray]]: ...
    def spans(self, name: str) -> Iterable[tuple[str, str, int, int]]: ...


def threads_for(memory: int, changed: bool) -> int:
    """How many threads fit into `memory` bytes beside what the process has already.

    Raises CheckpointError where not even one does.
    """
    base, each = resident(), _PER_THREAD if changed else 2 * _PIECE
    n = (memory - base) // each
    if n < 1:
        raise CheckpointError(
            f"--memory is {memory / 2**30:.2f} GiB, of which the program itself takes {base / 2**30:.2f}; "
            f"expected at least {(base + each) / 2**30:.2f}"
        )
    return int(min(n, 2 * len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4, 32))


def resident() -> int:
    """Bytes of memory that this process has now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 400 << 20  # not Linux


def pieces(layout: Any, old: Form, new: Form) -> Iterator[tuple[int, int]]:
    """Ranges of a tensor's rows that are handled together."""
    R, *columns = layout.shape
    align = math.lcm(layout.unit, new.block)
    width = math.prod(columns) * (old.dtype.itemsize if old == new else 4)
    step = max(align, _PIECE // width // align * align)
    for first in range(0, R, step):
        yield first, min(first + step, R)


class Journal:
    """What a conversion has done, on disk. One process at a time has it."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self.folder, self.path = folder, folder / JOURNAL
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder}: another process is converting to there; wait for it") from None
        self._identity = {"identity": dict(identity), "boot": _boot()}
        self.done: dict[str, dict[str, str]] = {}
        self.restarted = (
            False  # whether the machine went down since, and with it perhaps what was not on disk
        )
        self._file.seek(0)
        head, *lines = self._file.read().splitlines() or [""]
        if self._same(head):
            for line in lines:
                try:
                    entry = json.loads(line)
                    self.done[entry["name"]] = entry["digests"]
                except (ValueError, KeyError):
                    break  # cut off by a kill: what follows it is done again
        else:
            self._clear()
        self._rewrite()

    def _clear(self) -> None:
        """Away with what another conversion left."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != self.path:
                path.unlink()

    def _same(self, head: str) -> bool:
        try:
            found = json.loads(head)
        except ValueError:
            return False
        self.restarted = found.get("boot") != self._identity["boot"]
        return found.get("identity") == json.loads(json.dumps(self._identity["identity"]))

    def _rewrite(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(self._identity) + "\n")
        for name, digests in self.done.items():
            self._file.write(_line(name, digests))
        self._file.flush()

    def add(self, name: str, digests: Mapping[str, str]) -> None:
        """Note that a tensor is written."""
        self.done[name] = dict(digests)
        self._file.write(_line(name, digests))
        self._file.flush()

    def forget(self, names: Iterable[str]) -> None:
        """Of tensors that are to be written again."""
        for name in names:
            self.done.pop(name, None)
        self._rewrite()

    def close(self) -> None:
        self._file.close()


def _line(name: str, digests: Mapping[str, str]) -> str:
    return json.dumps({"name": name, "digests": digests}) + "\n"


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def pump(
    source: Source,
    sink: Sink,
    layouts: Mapping[str, Any],
    journal: Journal,
    threads: int,
    progress: Callable[[int], Any],
) -> None:
    """Write every tensor of the sink that the journal does not have."""
    writer = Writer(journal.folder, sink.files)
    for file, header in sink.headers.items():
        writer.write(file, 0, np.frombuffer(header, np.uint8))

    def one(name: str) -> tuple[str, dict[str, str]]:
        old, new = source.form(name), sink.form(name)
        digests: dict[str, Any] = {}
        R = layouts[name].shape[0]
        for first, last in pieces(layouts[name], old, new):
            rows = change(source.rows(name, first, last), old, new)
            for key, file, start, data in sink.put(name, first, rows):
                digests.setdefault(key, xxhash.xxh3_128()).update(data)
                writer.write(file, start, data)
            progress(source.nbytes(name) * last // R - source.nbytes(name) * first // R)
        return name, {key: d.hexdigest() for key, d in digests.items()}

    todo = sorted((n for n in sink.tensors if n not in journal.done), key=source.position)
    for name, digests in _in_threads(one, todo, threads):
        journal.add(name, digests)
    writer.close()


def digest_source(
    source: Source,
    sink: Sink,
    layouts: Mapping[str, Any],
    names: Iterable[str],
    threads: int,
    progress: Callable[[int], Any],
) -> Iterator[tuple[str, dict[str, str]]]:
    """The digests of what the source would be written as."""

    def one(name: str) -> tuple[str, dict[str, str]]:
        old, new = source.form(name), sink.form(name)
        digests: dict[str, Any] = {}
        for first, last in pieces(layouts[name], old, new):
            rows = change(source.rows(name, first, last), old, new)
            for key, _, _, data in sink.put(name, first, rows):
                digests.setdefault(key, xxhash.xxh3_128()).update(data)
        progress(source.nbytes(name))
        return name, {key: d.hexdigest() for key, d in digests.items()}

    yield from _in_threads(one, sorted(names, key=source.position), threads)


def digest(
    folder: Path,
    spans: Callable[[str], Iterable[tuple[str, str, int, int]]],
    names: Iterable[str],
    threads: int,
    progress: Callable[[int], Any],
) -> Iterator[tuple[str, dict[str, str]]]:
    """The digests of what is on disk; `spans` gives (name of a digest, file, position, bytes) of a tensor."""

    def one(name: str) -> tuple[str, dict[str, str]]:
        digests: dict[str, Any] = {}
        for key, file, start, n in spans(name):
            made = digests.setdefault(key, xxhash.xxh3_128())
            source = File(folder / file)
            for at in range(start, start + n, _PIECE):
                size = min(_PIECE, start + n - at)
                made.update(source.read(at, at + size))
                progress(size)
        return name, {key: d.hexdigest() for key, d in digests.items()}

    yield from _in_threads(one, names, threads)


def _in_threads(work: Callable[[str], Any], items: Iterable[str], threads: int) -> Iterator[Any]:
    """Results as they come; the first error ends it."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: set[Future[Any]] = set()
        try:
            for item in items:
                waiting.add(pool.submit(work, item))
                if len(waiting) >= 4 * threads:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (f.result() for f in done)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (f.result() for f in done)
        finally:
            for f in waiting:
                f.cancel()
