"""The pump of a conversion: rows of tensors go from a source to files, by threads, within a budget of memory.

Tensors that share files are a group; groups are divided among the hosts. What is done stands in a journal
beside the files, a line for each tensor with the digest of every part that was written. Killed at any moment,
the next run reads the journal and goes on. On a disk the files have their full size from the start, so a
tensor that was written in part is simply written again; to an object store a group's files go when they are
whole, and its tensors are noted then.
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
from jaxseek_convert.files import Writer, open_file
from jaxseek_convert.numbers import Form, Memory, Rows, change
from jaxseek_convert.table import Table

JOURNAL = "journal.jsonl"
MEMORY = 3 << 29  # bytes, by default: 1.5 GiB
_PIECE = 8 << 20  # bytes of rows at a time
_COPIES, _CHANGED = 3, 8  # of them in memory: as read, put in order, written; and float32 several times
_OURS = re.compile(r"journal(\.\d+)?\.jsonl")
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


@dataclass(frozen=True)
class Group:
    """Tensors that share files, and these files: what one host writes, and sends to an object store whole."""

    names: tuple[str, ...]
    files: tuple[str, ...]
    nbytes: int


def groups(sink: Sink) -> list[Group]:
    """The tensors of a sink in groups that have no file in common."""
    spans = {name: list(sink.spans(name)) for name in sink.tensors}
    joined: dict[str, str] = {}  # a file to another of its group, the first of a group to itself

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
        Group(tuple(own), tuple(sorted(files[root])), sum(sink.files[file] for file in files[root]))
        for root, own in names.items()
    ]


def share(all_groups: Iterable[Group], host: int, hosts: int) -> list[Group]:
    """One host's part of the groups; all have about as many bytes."""
    loads, own = [0] * hosts, []
    for group in sorted(all_groups, key=lambda g: (-g.nbytes, g.names[0])):
        least = loads.index(min(loads))
        loads[least] += group.nbytes
        if least == host:
            own.append(group)
    return own


class Journal:
    """Tensors that a conversion has written. Lines are only ever added, so a kill can just cut the last off.

    The first line tells the conversion from others. Then there is one for each tensor that is written, with
    its digests, or with none where it turned out that it has to be written again. On several hosts each adds
    to a file of its own; the first host reads them all at the start, for all.
    """

    def __init__(self, folder: Place, identity: Mapping[str, Any]):
        """Where the folder holds another conversion, what that has left there is removed."""
        self.folder = folder
        host, identity = jax.process_index(), json.loads(json.dumps(identity))
        self.restarted = False  # whether a machine went down since, and with it what was not on disk
        self.done: dict[str, dict[str, str]] = gather(self._read(identity) if host == 0 else None)[0]
        self._log = Log(folder / (f"journal.{host}.jsonl" if host else JOURNAL))
        if host:
            self._log.add(json.dumps({"identity": identity, "boot": _boot()}))

    def _read(self, identity: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """Read what all hosts have done, into one file. What is of another conversion is removed."""
        first = self.folder / JOURNAL
        lines = _entries(first, identity)
        if not lines:  # and so nothing is taken for done that is removed now
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
        """Note that a tensor is written."""
        self.done[name] = dict(digests)
        self._log.add(json.dumps({"name": name, "digests": digests}))

    def forget(self, names: Iterable[str]) -> None:
        """Note that tensors are to be written again."""
        for name in names:
            del self.done[name]
            self._log.add(json.dumps({"name": name, "digests": None}))

    def trust(self) -> None:
        """Note that what is done was found on the disk."""
        self._log.add(json.dumps({"boot": _boot()}))

    def share(self) -> None:
        """Let every host know what any has done; all call it."""
        for done in gather(self.done):
            self.done |= done

    def close(self) -> None:
        self._log.close()


def _entries(path: Place, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of a journal; none where it is of another conversion."""

    def parse(line: bytes) -> dict[str, Any]:
        entry = json.loads(line)
        if not entry.keys() & {"identity", "boot", "name"} or ("name" in entry and "digests" not in entry):
            raise ValueError(line)
        return entry

    lines = read_log(path, parse)
    return lines if lines and lines[0].get("identity") == identity and "boot" in lines[0] else []


def _clear(folder: Place) -> None:
    """Remove all but the first host's journal, which is locked, and empty that; of a store what we write."""
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
    own: Iterable[Group],
    writer: Writer,
    threads: int,
    progress: Callable[[int], Any],
) -> None:
    """Write every tensor of these groups that the journal does not have."""
    if writer.sends:
        own = [group for group in own if not journal.done.keys() >= set(group.names)]
        journal.forget([n for group in own for n in group.names if n in journal.done])
    home = {name: group for group in own for name in group.names}
    left = {group: {n for n in group.names if n not in journal.done} for group in own}
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
        """Tensors that are where they belong: of files that are sent whole, once all of a group are."""
        waiting: dict[Group, list[tuple[str, dict[str, str]]]] = {}
        for name, digests in written:
            group = home[name]
            waiting.setdefault(group, []).append((name, digests))
            if not writer.sends or len(waiting[group]) == len(group.names):
                yield from waiting.pop(group)

    order = {group: min(map(source.position, group.names)) for group in own}
    todo = sorted(
        (name for names in left.values() for name in names),
        key=lambda name: (order[home[name]], source.position(name)),
    )
    try:
        for group in own:
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
    folder: Place,
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
            source = open_file(folder / file)
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
