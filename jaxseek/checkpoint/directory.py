"""Directories that are whole or not there: written beside their place and then named, or marked at the end.

On a disk a directory is written under another name and renamed when it is whole. An object store cannot
rename: there the file that makes a directory a checkpoint (`MARKERS`) is written last, and removed first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import jax

from jaxseek.machine import hosts
from jaxseek.storage.hub import model_place
from jaxseek.storage.place import Place, Remote, place, scratch, upload, writable

MANIFEST = "jaxseek.json"
MARKERS = ("config.json", MANIFEST)  # what makes a directory a checkpoint, in the order of writing
PARTIAL, _OLD = ".jaxseek-partial", ".jaxseek-old"  # siblings: what is being written, what is being replaced


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message holds what was found and what to do."""


def kind_of(path: str | Place) -> Literal["jaxseek", "hf"] | None:
    """Tell which kind of checkpoint a directory claims to be; None where it claims nothing.

    In an object store one that a kill has left without its mark claims nothing.
    """
    path = model_place(path, weights=False)
    if (path / MANIFEST).is_file():
        return "jaxseek"
    if (path / "params").is_dir():
        return None if isinstance(path, Remote) else "jaxseek"
    return "hf" if (path / "config.json").is_file() else None


def left(path: Place) -> str:
    """Name what an interrupted save has left, for a message."""
    if isinstance(path, Remote):
        return ""
    left = [p for p in (path.absolute().parent / (path.name + s) for s in (PARTIAL, _OLD)) if p.exists()]
    return "".join(f"; {p} was left by an interrupted save" for p in left)


def check_destination(path: Place, needed: int, overwrite: bool) -> bool:
    """Tell whether there is something to replace. Raises CheckpointError if a save there would fail."""
    path = writable(path).absolute()
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken and not overwrite:
        raise CheckpointError(f"{path}: already exists; choose another name, or overwrite it (--overwrite)")
    if taken and kind_of(path) is None and not (path / "params").is_dir():
        raise CheckpointError(f"{path}: already exists and is no checkpoint, so it is not overwritten")
    if isinstance(path, Path):
        check_room(path, needed)
    return taken


def check_room(path: Path, needed: int) -> None:
    """Raise CheckpointError unless so many bytes are free."""
    parent = existing_parent(path.absolute())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise CheckpointError(f"{path}: needs {_size(needed)}, but {parent} has {_size(free)} free")


def existing_parent(path: Path) -> Path:
    return next(p for p in path.parents if p.exists())


def orbax_writes(path: Place) -> bool:
    """Tell whether Orbax itself reads and writes there, from every host: on disks and at gs://.

    To all other stores a checkpoint goes through a disk of the one host that writes it.
    """
    return isinstance(path, Path) or path.scheme in ("gs", "gcs")


def raise_one_host(path: Place) -> None:
    """Raise CheckpointError where several hosts would have to write a checkpoint through their own disks."""
    if jax.process_count() > 1 and not orbax_writes(path):
        raise CheckpointError(
            f"{path}: {jax.process_count()} hosts write a checkpoint together, which Orbax does at gs:// and "
            "on a disk that they share; choose one of these"
        )


@contextlib.contextmanager
def new_directory(path: str | Place, needed: int, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write into, which becomes `path` when all went well and vanishes when not.

    `needed` bytes must be free. With `overwrite`, `path` may be a checkpoint, which is removed at the end; in
    an object store at the start.
    """
    path = place(path)
    if isinstance(path, Remote):
        with _new_remote(path, needed, overwrite) as folder:
            yield folder
        return
    partial = _partial(path)

    def create() -> bool:
        taken = check_destination(path, needed, overwrite)
        shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left
        partial.mkdir(parents=True)
        return taken

    taken = hosts.from_first(create)
    try:
        hosts.check_shared(partial)
        yield partial
        hosts.meet("checkpoint is written")
        hosts.from_first(lambda: _rename(partial, path.absolute(), taken))
    except BaseException as e:
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        _raise_full(e, path, needed, " now that what was written is removed")
        raise


@contextlib.contextmanager
def _new_remote(path: Remote, needed: int, overwrite: bool) -> Iterator[Path]:
    raise_one_host(path)
    native = orbax_writes(path)
    with scratch("save") as folder:
        if not native:
            check_room(folder, needed)
        taken = hosts.from_first(lambda: check_destination(path, 0, overwrite))

        def settle() -> None:
            if taken and not native:
                clear(path)
            upload(folder, path, MARKERS)

        if taken and native:
            hosts.from_first(lambda: clear(path))
        yield folder
        hosts.meet("checkpoint is written")
        hosts.from_first(settle)


def clear(path: Remote, keep: str = "") -> None:
    """Remove a checkpoint from an object store, first what makes it one."""
    for name in reversed(MARKERS):
        (path / name).unlink(missing_ok=True)
    for name in path.sizes():
        if name != keep:
            (path / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Draft:
    """A directory that is being written.

    `weights` and the journal stay where they are written; `files`, the small ones, are on this machine. On
    a disk they are one. `begin` makes way for the first of them, once it is sure that there will be any;
    `check` raises CheckpointError where another process has begun to write there since.
    """

    files: Path
    weights: Place
    begin: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None


@contextlib.contextmanager
def resumable_directory(path: Place, journal: str, overwrite: bool = False) -> Iterator[Draft]:
    """As `new_directory`, but what was written stays where it failed, and is there the next time.

    The file `journal` in it tells what that is: nothing, as long as it is empty. On a disk it is locked, so
    that one conversion at a time writes; it is removed last of all. On several hosts all call it.
    """
    if isinstance(path, Remote):
        with _resumable_remote(path, journal, overwrite) as draft:
            yield draft
        return
    partial, path = _partial(path), path.absolute()
    with contextlib.ExitStack() as stack:
        held: list[IO[str]] = []  # the journal, on host 0

        def claim() -> bool:
            _forget(path, journal)  # a kill may have left it there
            taken = check_destination(path, 0, overwrite)
            held.append(stack.enter_context(_claimed(partial, journal, path)))
            return taken

        taken = hosts.from_first(claim)
        hosts.check_shared(partial)
        try:
            yield Draft(partial, partial)
        except BaseException as e:
            if held and not os.fstat(held[0].fileno()).st_size:
                shutil.rmtree(partial, ignore_errors=True)
            _raise_full(e, path, None, "; free some and run the same command again: it goes on")
            raise

        def settle() -> None:
            _rename(partial, path, taken)
            _forget(path, journal)

        hosts.from_first(settle)


@contextlib.contextmanager
def _resumable_remote(path: Remote, journal: str, overwrite: bool) -> Iterator[Draft]:
    """Do what `resumable_directory` does. A store has no locks: of two processes the later one writes."""
    mine = path / f"{journal.partition('.')[0]}-owner.jsonl"

    def claim() -> tuple[bool, str]:
        begun = ((path / journal).is_file() or mine.is_file()) and kind_of(path) is None
        taken = not begun and check_destination(path, 0, overwrite)
        token = uuid.uuid4().hex
        mine.write_text(token)  # also tells now whether anything can be written
        return taken, token

    taken, token = hosts.from_first(claim)
    checked = time.monotonic()

    def check() -> None:
        nonlocal checked
        if time.monotonic() - checked > _SECONDS:
            checked = time.monotonic()
            raise_other(mine, token)

    def begin() -> None:
        if taken:
            clear(path, keep=mine.name)

    try:
        with scratch("convert") as folder:
            yield Draft(folder, path, lambda: hosts.from_first(begin), check)

            def settle() -> None:
                raise_other(mine, token)
                upload(folder, path, MARKERS)
                _forget(path, journal)

            hosts.from_first(settle)
    except BaseException:
        if jax.process_index() == 0 and not (path / journal).is_file():
            with contextlib.suppress(CheckpointError):
                raise_other(mine, token)
                mine.unlink()
        raise


_SECONDS = 5.0  # between looks at who writes to a store


def raise_other(mine: Remote, token: str) -> None:
    """Raise CheckpointError where another process has claimed a directory of a store."""
    if not mine.is_file() or mine.read_text() != token:
        raise CheckpointError(
            f"{mine.parent}: another process has begun to convert to there; let one of them do it"
        )


def _forget(path: Place, journal: str) -> None:
    """Remove the journal of a directory that is whole, and those that other hosts have kept beside it."""
    stem, _, suffix = journal.partition(".")
    for kept in list(path.glob(f"{stem}*.{suffix}")) if path.is_dir() else ():
        kept.unlink(missing_ok=True)


@contextlib.contextmanager
def _claimed(partial: Path, journal: str, path: Path) -> Iterator[IO[str]]:
    """The journal of a directory, locked; the directory is made where it is not there."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        file = (partial / journal).open("a")
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be written ({e}); choose another destination") from None
    with file:
        _lock(file, partial / journal)
        yield file


def _lock(file: IO[str], path: Path) -> None:
    """Have a file alone. Raises CheckpointError where another process has it, or was just done with it."""
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return
    raise CheckpointError(f"{path.parent}: another process is converting to there; wait for it")


def _partial(path: Path) -> Path:
    path = path.absolute()
    return path.with_name(path.name + PARTIAL)


def _rename(partial: Path, path: Path, taken: bool) -> None:
    old = path.with_name(path.name + _OLD)
    if taken:
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _raise_full(e: BaseException, path: str | Path, needed: int | None, then: str) -> None:
    if _is_full(e):
        parent = existing_parent(Path(path).absolute())
        free = shutil.disk_usage(parent).free
        need = "" if needed is None else f"{_size(needed)} are needed, "
        raise CheckpointError(
            f"{path}: the disk of {parent} is full; {need}{_size(free)} are free{then}"
        ) from e


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n:,} bytes"


def _is_full(e: BaseException | None) -> bool:
    while e is not None:
        if (isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)) or "No space left" in str(e):
            return True
        e = e.__cause__ or e.__context__
    return False
