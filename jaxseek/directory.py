"""Directories that are whole or not there: a checkpoint is written beside its place, then named."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import jax

from jaxseek import hosts

MANIFEST = "jaxseek.json"
PARTIAL, _OLD = ".jaxseek-partial", ".jaxseek-old"  # siblings: what is being written, what is being replaced


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message holds what was found and what to do."""


def kind_of(path: str | Path) -> Literal["jaxseek", "hf"] | None:
    """Which kind of checkpoint a directory claims to be; None where it claims nothing."""
    path = Path(path)
    if (path / MANIFEST).is_file() or (path / "params").is_dir():
        return "jaxseek"
    return "hf" if (path / "config.json").is_file() else None


def left(path: Path) -> str:
    left = [p for p in (path.absolute().parent / (path.name + s) for s in (PARTIAL, _OLD)) if p.exists()]
    return "".join(f"; {p} was left by an interrupted save" for p in left)


def check_destination(path: str | Path, needed: int, overwrite: bool) -> bool:
    """Whether there is something to replace at `path`. Raises CheckpointError if a save there would fail."""
    path = Path(path).absolute()
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken and not overwrite:
        raise CheckpointError(f"{path}: already exists; choose another name, or overwrite it (--overwrite)")
    if taken and kind_of(path) is None:
        raise CheckpointError(f"{path}: already exists and is no checkpoint, so it is not overwritten")
    check_room(path, needed)
    return taken


def check_room(path: Path, needed: int) -> None:
    """Raise CheckpointError unless so many bytes are free."""
    parent = existing_parent(path.absolute())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise CheckpointError(f"{path}: needs {_size(needed)}, but {parent} has {_size(free)} free")


def existing_parent(path: Path) -> Path:
    return next(p for p in path.parents if p.exists())


@contextlib.contextmanager
def new_directory(path: str | Path, needed: int, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write into, which becomes `path` when all went well and vanishes when not.

    `needed` bytes must be free. With `overwrite`, `path` may be a checkpoint, which is removed at the end.
    """
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
        hosts.from_first(lambda: _rename(partial, Path(path).absolute(), taken))
    except BaseException as e:
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        _raise_full(e, path, needed, " now that what was written is removed")
        raise


@contextlib.contextmanager
def resumable_directory(path: str | Path, journal: str, overwrite: bool = False) -> Iterator[Path]:
    """As `new_directory`, but what was written stays where it failed, and is there the next time.

    The file `journal` in it tells what that is: nothing, as long as it is empty. It is locked, so that one
    process at a time writes, and is removed last of all.
    """
    partial, path = _partial(path), Path(path).absolute()
    with contextlib.suppress(OSError):
        (path / journal).unlink()  # a kill may have left it there
    taken = check_destination(path, 0, overwrite)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        file = (partial / journal).open("a")
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be written ({e}); choose another destination") from None
    with file:
        _lock(file, partial / journal)
        try:
            yield partial
        except BaseException as e:
            if not os.fstat(file.fileno()).st_size:
                shutil.rmtree(partial, ignore_errors=True)
            _raise_full(e, path, None, "; free some and run the same command again: it goes on")
            raise
        _rename(partial, path, taken)
        (path / journal).unlink(missing_ok=True)


def _lock(file: IO[str], path: Path) -> None:
    """Have a file alone. Raises CheckpointError where another process has it, or was just done with it."""
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return
    raise CheckpointError(f"{path.parent}: another process is converting to there; wait for it")


def _partial(path: str | Path) -> Path:
    path = Path(path).absolute()
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
