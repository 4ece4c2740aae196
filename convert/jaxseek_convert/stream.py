"""Stream a conversion: threads move rows of tensors from a source to files within a memory budget.

Tensors that share files form a group; groups are divided among the hosts. A journal beside the files has one
line per finished tensor, with the digest of every part written. After a kill at any moment, the next run
reads the journal and resumes. On a disk, files have their full size from the start and a partly written
tensor is written again; for an object store, a group's files are uploaded once complete, and only then are
its tensors journalled.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import xxhash

from jaxseek.checkpoint.directory import CheckpointError
from jaxseek.config.model import ModelConfig
from jaxseek.machine.host_memory import resident
from jaxseek.machine.hosts import gather
from jaxseek.storage.place import Log, Place, Remote, cut, read_log
from jaxseek.storage.untrusted import expect, parse_json
from jaxseek_convert.files import Writer, open_file
from jaxseek_convert.numbers import Form, Memory, Rows, change
from jaxseek_convert.table import Table

JOURNAL = "journal.jsonl"
MEMORY = 3 << 29  # bytes, by default: 1.5 GiB
_PIECE = 8 << 20  # bytes of rows processed at a time
# Copies of a piece in a thread's memory: as read, reordered and written; with float32 copies to re-encode.
_COPIES, _CHANGED = 3, 8
_OURS = re.compile(r"journal(\.\d+)?\.jsonl")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Source(Protocol):
    """A checkpoint readable as rows of Hugging Face tensors."""

    @property
    def memory(self) -> Memory: ...
    def form(self, name: str) -> Form: ...
    def identity(self) -> list[Any]: ...
    def nbytes(self, name: str) -> int: ...
    def position(self, name: str) -> tuple[str, int]: ...
    def rows(self, name: str, first: int, last: int) -> Rows: ...


class Described(Protocol):
    """Metadata of a checkpoint, known before any weight is read."""

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
    """Files to write: their sizes, the form of each tensor, and where its rows go."""

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
    """Return how many threads fit into `memory` bytes, each with `piece` bytes, beside `shared` bytes.

    `memory` limits the whole process; by default it is MEMORY on top of what the process holds already, such
    as the caller's model. Raises CheckpointError if not even one thread fits.
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
    """Return (rows of a tensor processed together, bytes per row)."""
    R, *columns = layout.shape
    align = math.lcm(layout.unit, new.block)
    width = math.prod(columns) * (old.dtype.itemsize if old == new else 4)
    return min(R, max(align, _PIECE // width // align * align)), width


def pieces(layout: Any, old: Form, new: Form) -> Iterator[tuple[int, int]]:
    """Yield the ranges (first, last) of rows that are processed together."""
    R, (step, _) = layout.shape[0], _rows(layout, old, new)
    for first in range(0, R, step):
        yield first, min(first + step, R)


def working_memory(layouts: Mapping[str, Any], old: Callable[[str], Form], new: Callable[[str], Form]) -> int:
    """Return the most bytes that a thread needs for any of these tensors."""
    most = _PIECE
    for name, layout in layouts.items():
        before, after = old(name), new(name)
        times = _COPIES if before == after else _CHANGED
        most = max(most, times * math.prod(_rows(layout, before, after)))
    return most


@dataclass(frozen=True)
class Group:
    """Tensors that share files, and those files: the unit of work of a host and of an upload."""

    names: tuple[str, ...]
    files: tuple[str, ...]
    nbytes: int


def groups(sink: Sink) -> list[Group]:
    """Partition the tensors of a sink into groups that share no file."""
    spans = {name: list(sink.spans(name)) for name in sink.tensors}
    joined: dict[str, str] = {}  # union-find over files: a root maps to itself

    def first(file: str) -> str:
        while joined.setdefault(file, file) != file:
            file = joined[file] = joined[joined[file]]
        return file

    for parts in spans.values():
        for _, file, *_ in parts[1:]:
            joined[first(file)] = first(parts[0][1])
    names: dict[str, list[str]] = {}
    files: dict[str, set[str]] = {}
    for name, parts in spans.items():
        root = first(parts[0][1])
        names.setdefault(root, []).append(name)
        files.setdefault(root, set()).update(file for _, file, *_ in parts)
    return [
        Group(tuple(members), tuple(sorted(files[root])), sum(sink.files[file] for file in files[root]))
        for root, members in names.items()
    ]


def share(all_groups: Iterable[Group], host: int, hosts: int) -> list[Group]:
    """Return one host's groups, balanced by bytes across hosts."""
    loads, groups_of_host = [0] * hosts, []
    for group in sorted(all_groups, key=lambda g: (-g.nbytes, g.names[0])):
        least = loads.index(min(loads))
        loads[least] += group.nbytes
        if least == host:
            groups_of_host.append(group)
    return groups_of_host


class Journal:
    """Append-only record of the tensors that a conversion has written; a kill only truncates its last line.

    The first line identifies the conversion. Each later line is a written tensor with its digests, or with
    null if it must be written again. Each host appends to its own file; host 0 reads and merges all of them
    at the start.
    """

    def __init__(self, folder: Place, identity: Mapping[str, Any]):
        """Read the journal in `folder`; remove the files of a conversion with another identity."""
        self.folder = folder
        host, identity = jax.process_index(), json.loads(json.dumps(identity))
        self.restarted = False  # a host rebooted since, so unflushed writes may be lost
        self.done: dict[str, dict[str, str]] = gather(self._read(identity) if host == 0 else None)[0]
        self._log = Log(folder / (f"journal.{host}.jsonl" if host else JOURNAL))
        if host:
            self._log.add(json.dumps({"identity": identity, "boot": _boot()}))

    def _read(self, identity: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """Merge the journals of all hosts into host 0's; remove the files of another conversion."""
        first = self.folder / JOURNAL
        lines = _entries(first, identity)
        if not lines:  # nothing journalled refers to what is removed here
            _clear(self.folder)
            with Log(first) as log:
                log.add(json.dumps({"identity": identity, "boot": _boot()}))
            return {}
        boots = {[line["boot"] for line in lines if "boot" in line][-1]}
        for other in sorted(self.folder.glob("journal.*.jsonl"), key=str):
            theirs = _entries(other, identity)
            boots |= {line["boot"] for line in theirs if "boot" in line}
            with Log(first) as log:
                log.add(*(json.dumps(line) for line in theirs if "name" in line))
            lines += theirs
            other.unlink()
        self.restarted = isinstance(self.folder, Path) and boots != {_boot()}
        done = {line["name"]: line["digests"] for line in lines if "name" in line}
        return {name: digests for name, digests in done.items() if digests}

    def add(self, name: str, digests: Mapping[str, str]) -> None:
        """Record that a tensor is written."""
        self.done[name] = dict(digests)
        self._log.add(json.dumps({"name": name, "digests": digests}))

    def forget(self, names: Iterable[str]) -> None:
        """Record that tensors must be written again."""
        for name in names:
            del self.done[name]
            self._log.add(json.dumps({"name": name, "digests": None}))

    def trust(self) -> None:
        """Record that the journalled tensors were verified on disk since the last boot."""
        self._log.add(json.dumps({"boot": _boot()}))

    def share(self) -> None:
        """Merge `done` over all hosts; every host must call it."""
        for done in gather(self.done):
            self.done |= done

    def close(self) -> None:
        self._log.close()


def _entries(path: Place, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of a journal, or none if it belongs to another conversion."""

    form = {"identity?": dict, "boot?": str, "name?": str, "digests?": ({str: str}, None)}

    def parse(line: bytes, where: str) -> dict[str, Any]:
        entry = expect(parse_json(line, where), form, where)
        if not entry.keys() & {"identity", "boot", "name"} or ("name" in entry and "digests" not in entry):
            raise ValueError(line)
        return entry

    lines = read_log(path, parse)
    return lines if lines and lines[0].get("identity") == identity and "boot" in lines[0] else []


def _clear(folder: Place) -> None:
    """Remove everything in a folder but host 0's locked journal, which is emptied.

    In an object store, remove only the files that a conversion writes.
    """
    if isinstance(folder, Remote):
        for name in folder.sizes():
            if name.startswith("params/") or name.endswith(".safetensors") or _OURS.fullmatch(name):
                (folder / name).unlink(missing_ok=True)
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != JOURNAL:
            path.unlink()
    cut(folder / JOURNAL, 0)


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def converted(source: Source, name: str, first: int, last: int, new: Form) -> Rows:
    """Read rows of a tensor and convert them to another form.

    Raises CheckpointError for values that are not finite if the form cannot store them.
    """
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
    host_groups: Iterable[Group],
    writer: Writer,
    threads: int,
    progress: Callable[[int], Any],
) -> None:
    """Write and journal every tensor of `host_groups` that the journal lacks."""
    if writer.sends:
        host_groups = [group for group in host_groups if not journal.done.keys() >= set(group.names)]
        journal.forget([n for group in host_groups for n in group.names if n in journal.done])
    home = {name: group for group in host_groups for name in group.names}
    left = {group: {n for n in group.names if n not in journal.done} for group in host_groups}
    lock = threading.Lock()

    def one(name: str) -> tuple[str, dict[str, str]]:
        old, new = source.form(name), sink.form(name)
        digests: dict[str, Any] = {}
        R = layouts[name].shape[0]
        for first, last in pieces(layouts[name], old, new):
            for key, file, start, data in sink.put(name, first, converted(source, name, first, last, new)):
                digests.setdefault(key, xxhash.xxh3_128()).update(data)
                writer.write(file, start, data)
            progress(source.nbytes(name) * last // R - source.nbytes(name) * first // R)
        with lock:
            left[home[name]].discard(name)
            whole = not left[home[name]]
        if whole:
            writer.finish(home[name].files)
        return name, {key: d.hexdigest() for key, d in digests.items()}

    def noted(written: Iterable[tuple[str, dict[str, str]]]) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield tensors once they are durable; with uploads, when their whole group is."""
        waiting: dict[Group, list[tuple[str, dict[str, str]]]] = {}
        for name, digests in written:
            group = home[name]
            waiting.setdefault(group, []).append((name, digests))
            if not writer.sends or len(waiting[group]) == len(group.names):
                yield from waiting.pop(group)

    order = {group: min(map(source.position, group.names)) for group in host_groups}
    todo = sorted(
        (name for names in left.values() for name in names),
        key=lambda name: (order[home[name]], source.position(name)),
    )
    try:
        for group in host_groups:
            for file in group.files:
                if file in sink.headers:
                    writer.write(file, 0, np.frombuffer(sink.headers[file], np.uint8))
        for name, digests in noted(_in_threads(one, todo, threads)):
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
    """Yield (tensor, digests) of the bytes that the sink would write, without writing them."""

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
    folder: Place,
    spans: Callable[[str], Iterable[tuple[str, str, int, int]]],
    names: Iterable[str],
    threads: int,
    progress: Callable[[int], Any],
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (tensor, digests) of what is on disk.

    `spans(tensor)` yields (digest name, file, offset, length).
    """

    def one(name: str) -> tuple[str, dict[str, str]]:
        digests: dict[str, Any] = {}
        for key, file, start, n in spans(name):
            hasher = digests.setdefault(key, xxhash.xxh3_128())
            source = open_file(folder / file)
            for at in range(start, start + n, _PIECE):
                size = min(_PIECE, start + n - at)
                hasher.update(source.read(at, at + size))
                progress(size)
        return name, {key: d.hexdigest() for key, d in digests.items()}

    yield from _in_threads(one, names, threads)


def _in_threads(work: Callable[[str], Any], items: Iterable[str], threads: int) -> Iterator[Any]:
    """Yield results as they complete. After an error, yield those still running, then raise it."""
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
