"""The pump of a conversion: rows of tensors go from a source to files, by threads, within a budget of memory.

What is done stands in a journal beside the files, a line for each tensor with the digest of every part that
was written. Killed at any moment, the next run reads the journal and goes on: the files have their full
size from the start, so a tensor that was written in part is simply written again.
"""

from __future__ import annotations

import itertools
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

from jaxseek.config import ModelConfig
from jaxseek.directory import CheckpointError
from jaxseek.host_memory import resident
from jaxseek_convert.files import File, Writer
from jaxseek_convert.numbers import Form, Memory, Rows, change
from jaxseek_convert.table import Table

JOURNAL = "journal.jsonl"
MEMORY = 3 << 29  # bytes, by default: 1.5 GiB
_PIECE = 8 << 20  # bytes of rows at a time
_COPIES, _CHANGED = 3, 8  # of them in memory: as read, put in order, written; and float32 several times
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Source(Protocol):
    """A checkpoint as tensors of the Hugging Face format, of which rows are read."""

    @property
    def memory(self) -> Memory: ...
    def form(self, name: str) -> Form: ...
    def identity(self) -> list[Any]: ...
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


def threads_for(memory: int | None, piece: int = 2 * _PIECE, shared: int = 0) -> int:
    """How many threads fit into `memory` bytes of the process, beside what it has and what they share.

    Without `memory` they may take MEMORY beside what it has, be that the caller's model. `piece` bytes are
    what a thread holds at a time. Raises CheckpointError where not even one fits.
    """
    base, each = resident() + shared, piece
    memory = MEMORY + resident() if memory is None else memory
    n = (memory - base) // each
    if n < 1:
        raise CheckpointError(
            f"--memory is {memory / 2**30:.2f} GiB, of which the program itself takes {base / 2**30:.2f}; "
            f"expected at least {(base + each) / 2**30:.2f}"
        )
    return int(min(n, 2 * len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4, 32))


def _rows(layout: Any, old: Form, new: Form) -> tuple[int, int]:
    """How many rows of a tensor are handled together, and the bytes of one."""
    R, *columns = layout.shape
    align = math.lcm(layout.unit, new.block)
    width = math.prod(columns) * (old.dtype.itemsize if old == new else 4)
    return min(R, max(align, _PIECE // width // align * align)), width


def pieces(layout: Any, old: Form, new: Form) -> Iterator[tuple[int, int]]:
    """Ranges of a tensor's rows that are handled together."""
    R, (step, _) = layout.shape[0], _rows(layout, old, new)
    for first in range(0, R, step):
        yield first, min(first + step, R)


def working_memory(layouts: Mapping[str, Any], old: Callable[[str], Form], new: Callable[[str], Form]) -> int:
    """The most bytes that a thread needs at a time for one of these tensors."""
    most = _PIECE
    for name, layout in layouts.items():
        before, after = old(name), new(name)
        times = _COPIES if before == after else _CHANGED
        most = max(most, times * math.prod(_rows(layout, before, after)))
    return most


class Journal:
    """What a conversion has done, on disk. Lines are only ever added, so a kill can just cut the last off.

    The first is what tells the conversion from others. Then there is one for each tensor that is written,
    with its digests, or with none where it turned out that it has to be written again.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        """Where the folder holds another conversion, what that has left there is removed."""
        self.folder, self.path = folder, folder / JOURNAL
        self.done: dict[str, dict[str, str]] = {}
        identity, boot = json.loads(json.dumps(identity)), None
        whole = 0  # bytes of lines that make sense
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []:
            try:
                entry: dict[str, Any] = json.loads(line)
                if not line.endswith(b"\n") or (not whole and entry["identity"] != identity):
                    break
                boot = entry.get("boot", boot)
                if "name" in entry:
                    self.done[entry["name"]] = entry["digests"]
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            whole += len(line)
        self.done = {name: digests for name, digests in self.done.items() if digests}
        self.path.touch()
        os.truncate(self.path, whole)
        if not whole:  # and so nothing is taken for done that is removed now
            _clear(folder)
        self._file = self.path.open("ab")
        if not whole:
            self._add(identity=identity, boot=_boot())
        # whether the machine went down since, and with it perhaps what was not on disk
        self.restarted = bool(whole) and boot != _boot()

    def _add(self, **entry: Any) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def add(self, name: str, digests: Mapping[str, str]) -> None:
        """Note that a tensor is written."""
        self.done[name] = dict(digests)
        self._add(name=name, digests=digests)

    def forget(self, names: Iterable[str]) -> None:
        """Of tensors that are to be written again."""
        for name in names:
            del self.done[name]
            self._add(name=name, digests=None)

    def trust(self) -> None:
        """Note that what is done was found on the disk."""
        self._add(boot=_boot())

    def close(self) -> None:
        self._file.close()


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != JOURNAL:
            path.unlink()


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def converted(source: Source, name: str, first: int, last: int, new: Form) -> Rows:
    """Rows of a tensor in another form."""
    old = source.form(name)
    rows = change(source.rows(name, first, last), old, new)
    if rows.scale is not None and old != new and not np.isfinite(rows.scale).all():
        raise CheckpointError(
            f"{name}: has numbers that are not finite in rows {first} to {last}, which cannot be stored as "
            f"{new.kind}; convert to a float dtype, and see where they come from"
        )
    return rows


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

    def one(name: str) -> tuple[str, dict[str, str]]:
        old, new = source.form(name), sink.form(name)
        digests: dict[str, Any] = {}
        R = layouts[name].shape[0]
        for first, last in pieces(layouts[name], old, new):
            for key, file, start, data in sink.put(name, first, converted(source, name, first, last, new)):
                digests.setdefault(key, xxhash.xxh3_128()).update(data)
                writer.write(file, start, data)
            progress(source.nbytes(name) * last // R - source.nbytes(name) * first // R)
        return name, {key: d.hexdigest() for key, d in digests.items()}

    todo = sorted((n for n in sink.tensors if n not in journal.done), key=source.position)
    try:
        for file, header in sink.headers.items():
            writer.write(file, 0, np.frombuffer(header, np.uint8))
        for name, digests in _in_threads(one, todo, threads):
            journal.add(name, digests)
    finally:
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
            for key, _, _, data in sink.put(name, first, converted(source, name, first, last, new)):
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
    """Results as they come. After the first error those that were under way come, and then it is raised."""
    todo, waiting, error = iter(items), set[Future[Any]](), None
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                if error is None:
                    more = itertools.islice(todo, 2 * threads - len(waiting))
                    waiting |= {pool.submit(work, item) for item in more}
                if not waiting:
                    break
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    if future.cancelled():
                        continue
                    if future.exception() is None:
                        yield future.result()
                    elif error is None:
                        error = future.exception()
                        for other in waiting:
                            other.cancel()
        finally:
            for future in waiting:
                future.cancel()
    if error is not None:
        raise error
