"""Digests of the files of a checkpoint: noted when it is written, compared before anything read is used.

    digests.json    {"algorithm": "xxh3-128", "files": {NAME: [[bytes, digest], ...]}}

A file is a sequence of parts with a digest each; most files are one part. A training checkpoint by several
hosts has a digests.HOST.json of each. JAXSEEK_NO_CHECKSUM=1 reads everything unchecked, and says so.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import xxhash

from jaxseek.checkpoint.directory import CheckpointError
from jaxseek.machine.hosts import from_first, gather
from jaxseek.storage.place import Place, PlaceError, file_sizes, open_binary, write_text
from jaxseek.storage.untrusted import expect, read_json

log = logging.getLogger("jaxseek")

NAME = "digests.json"
NO_CHECKSUM = "JAXSEEK_NO_CHECKSUM"
_PIECE = 4 << 20  # bytes read at a time
_THREADS = 8
_NUMBERS = re.compile(r"params/([^/]+/c\.|d/|ocdbt)")  # files of a conversion's chunks, and of Orbax
Part = tuple[int, str]  # bytes, digest
Progress = Callable[[int], Any]  # takes the bytes done since the last call
digest = xxhash.xxh3_128_hexdigest
hasher = xxhash.xxh3_128


def note(folder: Place, names: Iterable[str]) -> dict[str, list[Part]]:
    """Return the digests of files as they are now, one part each."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: parts(folder / name), names)))


def note_shared(folder: Place) -> dict[str, list[Part]]:
    """Return the digests of all files of a folder, each read by one of the hosts; every host calls this."""
    names = from_first(lambda: list(file_sizes(folder)))
    own = note(folder, names[jax.process_index() :: jax.process_count()])
    return {name: found for host in gather(own) for name, found in host.items()}


def parts(at: Place, sizes: Sequence[int] = (), progress: Progress = lambda _: None) -> list[Part]:
    """Return the digests of the parts of a file: those of the given sizes, and the bytes that follow."""
    found: list[Part] = []
    with open_binary(at) as file:
        for size in (*sizes, None):
            done, running = 0, hasher()
            while data := file.read(_PIECE if size is None else min(_PIECE, size - done)):
                running.update(data)
                done += len(data)
                progress(len(data))
            if done or size is not None or not sizes:
                found.append((done, running.hexdigest()))
    return found


def write(folder: Place, files: Mapping[str, Sequence[Part]], host: int = 0) -> None:
    """Write the digests that a host has noted, a line for every file."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(files.items()))
    at = folder / (f"digests.{host}.json" if host else NAME)
    write_text(at, f'{{"algorithm": "xxh3-128", "files": {{\n{lines}\n}}}}\n')


class Digests:
    """Digests of the files of a directory; where it has none, nothing is compared."""

    def __init__(self, folder: Place, files: Mapping[str, Sequence[Part]]):
        self.folder, self.files = folder, files
        self._sound: set[str] = set()
        self._running: dict[tuple[int, str, int], Any] = {}  # by thread, file and next byte

    @classmethod
    def of(cls, folder: Place) -> Digests:
        """Read the digests of a directory; a line says if there are none, or if checks are switched off.

        Raises CheckpointError if they cannot be read.
        """
        if os.environ.get(NO_CHECKSUM):
            return cls.unchecked(folder, NO_CHECKSUM)
        found = cls.noted(folder)
        if not found.files:
            why = "an older jaxseek wrote it, or a kill came first"
            _say(f"{folder}: has no digests ({why}); it is read unchecked")
        return found

    @classmethod
    def noted(cls, folder: Place) -> Digests:
        """Read the digests of a directory as `of` does, and say nothing."""
        files: dict[str, list[Part]] = {}
        for at in () if os.environ.get(NO_CHECKSUM) else folder.glob("digests*.json"):
            try:
                raw = expect(read_json(at), {"tensors?": dict, "files?": {str: [list]}}, str(at))
                found = {} if "tensors" in raw else raw["files"]  # by tensor: by an older jaxseek
                files |= {name: [_part(*part) for part in of_file] for name, of_file in found.items()}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                raise CheckpointError(
                    f"{at}: cannot be read ({type(e).__name__}: {str(e)[:200]}), so the checkpoint is "
                    f"damaged; copy it again, or with {NO_CHECKSUM}=1 read it unchecked"
                ) from None
        return cls(folder, files)

    @classmethod
    def unchecked(cls, folder: Place, why: str) -> Digests:
        """Compare nothing in a directory, by the user's choice."""
        _say(f"{folder}: is read unchecked, by {why}")
        return cls(folder, {})

    @property
    def nbytes(self) -> int:
        return sum(n for parts in self.files.values() for n, _ in parts)

    def damaged(
        self, names: Iterable[str] | None = None, progress: Progress = lambda _: None
    ) -> list[tuple[str, int]]:
        """Read files; return (file, first byte) of each part that is not as it was noted, or is gone."""
        names = list(self.files if names is None else names)

        def wrong(name: str) -> list[tuple[str, int]]:
            at, noted = self.folder / name, self.files[name]
            try:  # anything but a file could be read without end
                found = parts(at, [n for n, _ in noted], progress) if at.is_file() else []
            except PlaceError:
                raise
            except OSError:  # a bad sector
                found = []
            starts = list(itertools.accumulate((n for n, _ in noted), initial=0))
            bad = [starts[i] for i, part in enumerate(noted) if found[i : i + 1] != [part]]
            return [(name, at) for at in bad or starts[len(noted) : len(found)]]

        with ThreadPoolExecutor(_THREADS) as pool:
            return [part for bad in pool.map(wrong, names) for part in bad]

    def damaged_files(self, progress: Progress = lambda _: None) -> list[str]:
        """Name the files that are not as noted, each read by one of the hosts; every host calls this."""
        own = sorted(self.files)[jax.process_index() :: jax.process_count()]
        return sorted({name for host in gather(self.damaged(own, progress)) for name, _ in host})

    def check(self, progress: Progress = lambda _: None) -> None:
        """Raise CheckpointError if a file is not as noted, each read by one host; every host calls this."""
        if bad := self.damaged_files(progress):
            raise self._error(bad[0], len(bad))

    def check_small(self) -> None:
        """Raise CheckpointError if a file is not as noted, but for those that hold numbers."""
        small = [name for name in self.files if not _NUMBERS.match(name)]
        if bad := self.damaged(small):
            raise self._error(bad[0][0], len({name for name, _ in bad}))

    def check_file(self, name: str, data: np.ndarray) -> None:
        """Compare the bytes of a whole file, unless it was before. Raises CheckpointError."""
        if not self.files or name in self._sound:
            return
        raw, at = data.reshape(-1).view(np.uint8), 0
        for n, noted in self.files.get(name, [(0, "")]):
            if digest(raw[at : at + n].data) != noted:
                raise self._error(name)
            at += n
        if at != len(raw):
            raise self._error(name)
        self._sound.add(name)

    def follow(self, name: str, start: int, data: np.ndarray) -> None:
        """Compare a part that is read piece by piece, in order and by one thread, once its end is reached.

        Raises CheckpointError.
        """
        if not self.files:
            return
        thread = threading.get_ident()
        running = self._running.pop((thread, name, start), None) or hasher()
        running.update(data.data)
        end, at = start + len(data), 0
        for n, noted in self.files.get(name, [(end, "")]):
            at += n
            if at == end and running.hexdigest() != noted:
                raise self._error(name)
            if at >= end:
                break
        if at != end:
            self._running[thread, name, end] = running

    def _error(self, name: str, count: int = 1) -> CheckpointError:
        more = f" and {count - 1} other files are" if count > 1 else " is"
        return CheckpointError(
            f"{self.folder}: is damaged: {name}{more} not as written, by the digests; copy the checkpoint "
            f"again, or make it again (if you have changed a file yourself, take it out of {NAME})"
        )


def _part(size: Any, noted: Any) -> Part:
    if not (isinstance(size, int) and size >= 0 and isinstance(noted, str)):
        raise ValueError(f"a part is [{size!r}, {noted!r}], expected bytes and a digest")
    return size, noted


@functools.cache
def _say(text: str) -> None:
    """Warn once a process."""
    log.warning(text)
