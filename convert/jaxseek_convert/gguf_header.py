"""Check the header of a GGUF file before the package `gguf` reads it, which believes every count in it.

A header that says 2^60 would have it make lists until the memory is full. The layout is that of the GGUF
specification, version 3: magic, version, counts of tensors and of keys; each key with its type and value;
each tensor with its name, dimensions, type and offset.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from jaxseek.checkpoint.directory import CheckpointError
from jaxseek.storage.untrusted import brief, raise_irregular

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a type of number
_STRING, _ARRAY = 8, 9
_MOST_KEYS, _MOST_TENSORS, _MOST_ITEMS = 1 << 12, 1 << 18, 1 << 22
_MOST_AXES, _MOST_NAME = 8, 1 << 10
_MOST_TEXT = 1 << 24


def check_header(path: Path) -> None:
    """Raise CheckpointError, which names what is wrong, unless the header can be read at a bounded cost."""
    raise_irregular(path, CheckpointError)
    if path.stat().st_size < 24:
        raise CheckpointError("not a whole GGUF file (it is empty or cut off); is the download complete?")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _Header(data).check()
        except (struct.error, UnicodeDecodeError) as e:
            raise CheckpointError(f"not a whole GGUF file ({e}); is the download complete?") from None


class _Header:
    def __init__(self, data: mmap.mmap):
        self._data, self._at, self._items = data, 0, 0

    def check(self) -> None:
        magic, version, tensors, keys = self._read("<4sIQQ")
        if magic != b"GGUF":
            raise CheckpointError(f"not a whole GGUF file (its magic is {magic!r}, expected b'GGUF')")
        if version & 0xFFFF == 0:
            raise CheckpointError("it has the byte order of another machine; convert it there")
        if keys > _MOST_KEYS or tensors > _MOST_TENSORS:
            raise CheckpointError(
                f"the header counts {keys:,} keys and {tensors:,} tensors, expected at most {_MOST_KEYS:,} "
                f"and {_MOST_TENSORS:,}; fetch it again"
            )
        for _ in range(keys):
            self._value(self._text(_MOST_NAME), *self._read("<I"))
        seen: set[str] = set()
        for _ in range(tensors):
            name = self._text(_MOST_NAME)
            (axes,) = self._read("<I")
            if name in seen or axes > _MOST_AXES:
                what = "is there twice" if name in seen else f"has {axes:,} dimensions"
                raise CheckpointError(f"tensor {brief(name)} {what}; fetch it again")
            seen.add(name)
            dims = self._read(f"<{axes}Q")
            if 0 in dims or math.prod(dims) > 1 << 48:
                raise CheckpointError(f"tensor {brief(name)} has shape {list(dims)}; fetch it again")
            self._read("<IQ")

    def _read(self, form: str) -> tuple:
        found = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return found

    def _text(self, most: int) -> str:
        start = self._skip_text(most)
        return self._data[start : self._at].decode()

    def _skip_text(self, most: int) -> int:
        """Move behind a string and return where it begins."""
        (n,) = self._read("<Q")
        if n > most:
            raise CheckpointError(f"a text of {n:,} bytes, expected at most {most:,}; fetch it again")
        start = self._at
        self._skip(n)
        return start

    def _skip(self, n: int) -> None:
        self._at += n
        if self._at > len(self._data):
            raise CheckpointError("not a whole GGUF file (it ends in its header); is the download complete?")

    def _value(self, key: str, kind: int) -> None:
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _STRING:
            self._skip_text(_MOST_TEXT)
        elif kind == _ARRAY:
            of, n = self._read("<IQ")
            self._items += n
            if self._items > _MOST_ITEMS:
                raise CheckpointError(
                    f"{brief(key)} has {n:,} items, more than such a file has; fetch it again"
                )
            if of in _SIZES:
                self._skip(n * _SIZES[of])
            elif of == _STRING:
                for _ in range(n):
                    self._skip_text(_MOST_TEXT)
            else:
                raise CheckpointError(f"{brief(key)} has items of type {of}, expected numbers or texts")
        else:
            raise CheckpointError(f"{brief(key)} has type {kind}, which is none; fetch it again")
