"""Atomic checkpoint directories: complete, or absent; and written by one process at a time.

On a disk, a directory is written under a temporary name and renamed once complete. An object store cannot
rename: there, the files that make a directory a checkpoint (`MARKERS`) are written last and removed first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import jax

from jaxseek.machine import hosts
from jaxseek.storage.hub import model_place
from jaxseek.storage.place import Place, Remote, place, scratch, upload, writable
from jaxseek.storage.untrusted import read_json

log = logging.getLogger("jaxseek")

MANIFEST = "jaxseek.json"
MARKERS = ("config.json", MANIFEST)  # make a directory a checkpoint; in write order
LOCK = ".jaxseek-lock"  # name of a lock file, or its suffix beside the directory that it is for
PARTIAL, _OLD = ".jaxseek-partial", ".jaxseek-old"  # suffixes of siblings: being written, being replaced


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message says what was found and what to do."""


def kind_of(path: str | Place) -> Literal["jaxseek", "hf"] | None:
    """Return the kind of checkpoint that a directory holds, or None.

    In an object store, a directory that a kill left without its marker file is None.
    """
    path = model_place(path, weights=False)
    if (path / MANIFEST).is_file():
        return "jaxseek"
    if (path / "params").is_dir():
        return None if isinstance(path, Remote) else "jaxseek"
    return "hf" if (path / "config.json").is_file() else None


def adapter_at(path: Place) -> str:
    """Return what to tell a user who gave a LoRA adapter's folder as a model; empty for any other place."""
    note = path / "adapter_config.json"
    if not note.is_file():
        return ""
    base: Any = None
    with contextlib.suppress(ValueError, OSError):
        base = read_json(note).get("base_model_name_or_path")
    return (
        f"{path}: is an adapter (LoRA), not a model: it changes the weights of {base or 'its base model'}. "
        "Merge it first, with peft: AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload()"
        ".save_pretrained(MODEL), and give MODEL"
    )


def left(path: Place) -> str:
    """Describe, for an error message, what an interrupted save has left beside `path`."""
    if isinstance(path, Remote):
        return ""
    left = [p for p in (path.absolute().parent / (path.name + s) for s in (PARTIAL, _OLD)) if p.exists()]
    return "".join(f"; {p} was left by an interrupted save" for p in left)


def check_destination(path: Place, needed: int, overwrite: bool) -> bool:
    """Return whether `path` holds a checkpoint to replace. Raises CheckpointError if a save would fail."""
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
    """Raise CheckpointError unless `needed` bytes are free on the disk of `path`."""
    parent = existing_parent(path.absolute())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise CheckpointError(f"{path}: needs {_size(needed)}, but {parent} has {_size(free)} free")


def existing_parent(path: Path) -> Path:
    return next(p for p in path.parents if p.exists())


def orbax_writes(path: Place) -> bool:
    """Return whether Orbax reads and writes `path` directly, from every host: disks and gs://.

    Checkpoints in other stores go through the local disk of a single host.
    """
    return isinstance(path, Path) or path.scheme in ("gs", "gcs")


def raise_one_host(path: Place) -> None:
    """Raise CheckpointError if several hosts would have to write through their own disks."""
    if jax.process_count() > 1 and not orbax_writes(path):
        raise CheckpointError(
            f"{path}: {jax.process_count()} hosts write a checkpoint together, which Orbax does at gs:// and "
            "on a disk that they share; choose one of these"
        )


@contextlib.contextmanager
def new_directory(path: str | Place, needed: int, overwrite: bool = False) -> Iterator[Path]:
    """Yield a directory to write into; it becomes `path` on success and is removed on an error.

    `needed` bytes must be free. With `overwrite`, `path` may be a checkpoint, which is removed at the end, or
    at the start if Orbax writes it at gs://.
    """
    path = place(path)
    if isinstance(path, Remote):
        with _new_remote(path, needed, overwrite) as folder:
            yield folder
        return
    partial = _partial(path)

    def create() -> bool:
        taken = check_destination(path, needed, overwrite)
        shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted run
        partial.mkdir(parents=True)
        return taken

    hosts.from_first(lambda: check_destination(path, needed, overwrite))  # before the lock makes a folder
    with alone(_lock_of(path)):
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
    """Remove a checkpoint from an object store, marker files first; the file `keep` stays."""
    for name in reversed(MARKERS):
        (path / name).unlink(missing_ok=True)
    for name in path.sizes():
        if name != keep:
            (path / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Draft:
    """A directory being written.

    `weights` is the final place of the weights and the journal, `files` a local folder for small files; on a
    disk they are the same. Call `begin` before the first write: it removes the checkpoint to be replaced from
    an object store. `check` raises CheckpointError if another process has claimed the directory since.
    """

    files: Path
    weights: Place
    begin: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None


@contextlib.contextmanager
def resumable_directory(path: Place, journal: str, overwrite: bool = False) -> Iterator[Draft]:
    """Yield a draft of `path` as `new_directory` does, but keep it after an error, for the next call.

    The file `journal` records what was written; while it is empty, nothing is kept. It is removed last. Every
    host must call this.
    """
    if isinstance(path, Remote):
        with _resumable_remote(path, journal, overwrite) as draft:
            yield draft
        return
    partial, path = _partial(path), path.absolute()

    def create() -> bool:
        taken = check_destination(path, 0, overwrite)
        partial.mkdir(parents=True, exist_ok=True)
        (partial / journal).touch()
        return taken

    def free() -> None:
        _remove_journals(path, journal)  # left if a kill came after the rename
        check_destination(path, 0, overwrite)

    hosts.from_first(free)  # before the lock makes a folder
    with alone(_lock_of(path)):
        taken = hosts.from_first(create)
        hosts.check_shared(partial)
        try:
            yield Draft(partial, partial)
        except BaseException as e:
            if jax.process_index() == 0 and not (partial / journal).stat().st_size:
                shutil.rmtree(partial, ignore_errors=True)
            _raise_full(e, path, None, "; free some and run the same command again: it goes on")
            raise

        def settle() -> None:
            _rename(partial, path, taken)
            _remove_journals(path, journal)

        hosts.from_first(settle)


@contextlib.contextmanager
def _resumable_remote(path: Remote, journal: str, overwrite: bool) -> Iterator[Draft]:
    """Implement `resumable_directory` for a store."""
    lock = path / f"{journal.partition('.')[0]}-owner.jsonl"

    def begin_anew() -> bool:
        begun = ((path / journal).is_file() or lock.is_file()) and kind_of(path) is None
        return not begun and check_destination(path, 0, overwrite)

    taken = hosts.from_first(begin_anew)
    with alone(lock) as check, scratch("convert") as folder:

        def begin() -> None:
            if taken:
                clear(path, keep=lock.name)

        yield Draft(folder, path, lambda: hosts.from_first(begin), check)

        def settle() -> None:
            check(0)
            upload(folder, path, MARKERS)
            _remove_journals(path, journal)

        hosts.from_first(settle)


def _remove_journals(path: Place, journal: str) -> None:
    """Remove the journals of all hosts from a complete directory."""
    stem, _, suffix = journal.partition(".")
    for kept in list(path.glob(f"{stem}*.{suffix}")) if path.is_dir() else ():
        kept.unlink(missing_ok=True)


# -------------------------------------------------------------------- one process at a time


def _lock_of(path: Path) -> Path:
    path = path.absolute()
    return path.with_name(path.name + LOCK)


@contextlib.contextmanager
def alone(lock: Place) -> Iterator[Callable[..., None]]:
    """Be the one process, or the hosts of one run, at work where this lock file is; every host calls this.

    On a disk the file is locked on host 0, which ends with the process, however that ends: another process is
    refused with a CheckpointError. A store, and a file system without locks, refuses nobody: the later
    process takes over, and the function that this yields then raises in the earlier one. It looks at most
    every few seconds, or those that it is given.
    """
    with contextlib.ExitStack() as stack:
        claimed: list[Callable[..., None]] = []  # on host 0
        hosts.from_first(lambda: claimed.append(stack.enter_context(_claimed(lock))))
        yield claimed[0] if claimed else lambda seconds=0.0: None


@contextlib.contextmanager
def _claimed(lock: Place) -> Iterator[Callable[..., None]]:
    me = f"process {os.getpid()} on {socket.gethostname()}"
    token, looked = f"{me}, {uuid.uuid4().hex}", time.monotonic()
    file = _locked(lock) if isinstance(lock, Path) else None

    def check(seconds: float = _SECONDS) -> None:
        nonlocal looked
        if file is None and time.monotonic() - looked >= seconds:
            looked, found = time.monotonic(), lock.read_text() if lock.is_file() else ""
            if found != token:
                who = f" ({found.partition(',')[0]})" if found else ""
                raise CheckpointError(
                    f"{lock.parent}: another process{who} has begun to write there; let one of them do it"
                )

    if file is None:
        lock.write_text(token)
    else:
        with contextlib.suppress(OSError):  # on a full disk it holds without a name
            file.truncate(0)
            file.write(token.encode())
    try:
        yield check
    finally:
        with contextlib.suppress(CheckpointError, OSError):
            check(0)
            lock.unlink()
        if file is not None:
            file.close()


_SECONDS = 5.0  # between looks at a lock file that cannot be locked
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def _locked(path: Path) -> FileIO | None:
    """Open and lock a file; None on a file system without locks. Raises CheckpointError if another has it."""
    at = path.parent if path.name == LOCK else path.with_name(path.name.removesuffix(LOCK))
    try:
        with contextlib.suppress(FileExistsError):  # a file, as opening says better
            path.parent.mkdir(parents=True)
        file = path.open("ab+", buffering=0)
    except OSError as e:
        raise CheckpointError(f"{at}: cannot be written ({e}); choose another destination") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):  # held, or just removed by its holder
        pass
    except OSError as e:
        file.close()
        if e.errno not in _NO_LOCKS:
            raise
        log.warning("%s: has no file locks (%s), so a second process there stops the first", at, e.strerror)
        return None
    file.seek(0)
    who = file.read().decode().partition(",")[0] or "it has just ended"
    file.close()
    raise CheckpointError(
        f"{at}: another process is at work there ({who}); wait for it, or choose another destination"
    )


# -------------------------------------------------------------------- names and room


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
    if is_full(e):
        parent = existing_parent(Path(path).absolute())
        free = shutil.disk_usage(parent).free
        need = "" if needed is None else f"{_size(needed)} are needed, "
        raise CheckpointError(
            f"{path}: the disk of {parent} is full; {need}{_size(free)} are free{then}"
        ) from e


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n:,} bytes"


def is_full(e: BaseException | None) -> bool:
    """Return whether an error, or one that led to it, says that there is no room: disk, quota, file size."""
    while e is not None:
        numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if (isinstance(e, OSError) and e.errno in numbers) or any(os.strerror(n) in str(e) for n in numbers):
            return True
        e = e.__cause__ or e.__context__
    return False
