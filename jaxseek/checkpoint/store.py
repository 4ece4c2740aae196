"""The conversion store: uncompressed zarr 3 with one array per parameter, which Orbax can restore too.

A chunk holds its elements in the order of a Hugging Face file (declared with zarr's transpose codec), so
conversion in either direction is a copy, and only loading transposes. In that order, chunks cut an array's
bytes into files of at most `CHUNK_BYTES`. Files can be written in parts, and are memory-mapped for reading.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxseek.checkpoint.directory import CheckpointError
from jaxseek.storage.place import Place
from jaxseek.storage.untrusted import brief, expect, raise_irregular, read_json

LAYOUT = "flat"  # name of this layout in the manifest
_FORM = {  # of zarr.json, in the terms of `untrusted.expect`
    "shape": [int],
    "data_type": str,
    "chunk_grid": {"configuration": {"chunk_shape": [int]}},
    "codecs": [{"name": str, "configuration?": {"order?": [int]}}],
}
CHUNK_BYTES = 32 << 20  # other readers read a whole chunk for any element


def copy(out: np.ndarray, view: np.ndarray) -> None:
    """Copy and cast `view` to `out`, in strips: three times faster than assignment for a transposed view."""
    strip = out.shape[-1] if view.strides[-1] == view.itemsize else 32
    for i in range(0, out.shape[-1], strip or 1):
        out[..., i : i + strip] = view[..., i : i + strip]


@dataclass(frozen=True)
class Array:
    """A stored array: its shape, its axes in byte order (`order`), and its chunk shape."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    order: tuple[int, ...]
    chunk: tuple[int, ...] = ()  # default: at most CHUNK_BYTES

    def __post_init__(self):
        if not self.chunk:
            object.__setattr__(self, "chunk", self._chunk())

    def _chunk(self) -> tuple[int, ...]:
        """Choose the chunk shape: split the first possible axis in byte order; axes before it have size 1."""
        sizes = [self.shape[i] for i in self.order]
        room = max(1, CHUNK_BYTES // self.dtype.itemsize)
        axis, inner = next((a, n) for a in range(len(sizes)) if (n := math.prod(sizes[a + 1 :])) <= room)
        most = min(sizes[axis], room // inner)
        even = (n for n in range(most, most // 2, -1) if sizes[axis] % n == 0)  # equal chunks: no padded file
        cut = [1] * axis + [next(even, most)] + sizes[axis + 1 :]
        return tuple(cut[self.order.index(i)] for i in range(len(sizes)))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @functools.cached_property
    def _cut(self) -> tuple[int, int]:
        """Position (in byte order) of the axis that chunks split, and its length in a chunk."""
        sizes, chunk = ([of[i] for i in self.order] for of in (self.shape, self.chunk))
        axis = next(a for a in range(len(sizes)) if sizes[a + 1 :] == chunk[a + 1 :])
        return axis, chunk[axis]

    def files(self) -> dict[str, int]:
        """Return the size in bytes of every file, by name."""
        size = math.prod(self.chunk) * self.dtype.itemsize
        grid = [range(-(-n // c)) for n, c in zip(self.shape, self.chunk)]
        return {self._file(at): size for at in np.ndindex(*map(len, grid))}

    def _file(self, at: tuple[int, ...]) -> str:
        return f"params/{self.path}/c." + ".".join(map(str, at))

    def pieces(self, start: int, stop: int) -> Iterator[tuple[str, int, int, int]]:
        """Locate a byte range of the array: yield (file, offset in file, offset in range, length)."""
        axis, n = self._cut
        sizes = [self.shape[i] for i in self.order]
        inner = math.prod(sizes[axis + 1 :]) * self.dtype.itemsize
        whole, piece = sizes[axis] * inner, n * inner
        at = start
        while at < stop:
            outer, rest = divmod(at, whole)
            k, within = divmod(rest, piece)
            size = min(piece - within, whole - rest, stop - at)
            index = [0] * len(sizes)
            for i, j in zip(self.order, (*np.unravel_index(outer, sizes[:axis]), k) if axis else (k,)):
                index[i] = int(j)
            yield self._file(tuple(index)), within, at - start, size
            at += size

    def read(
        self,
        folder: Place,
        index: tuple[slice, ...],
        dtype: Any,
        check: Callable[[str, np.ndarray], Any] = lambda name, chunk: None,
    ) -> np.ndarray:
        """Read a slice of the array, cast to `dtype`; `index` has a start and stop for every axis.

        `check` is called with the name and contents of each file before it is used. On a disk only what is
        used is read, in an object store whole chunks.
        """
        out = np.empty([i.stop - i.start for i in index], dtype)
        grid = [range(i.start // c, -(-i.stop // c)) for i, c in zip(index, self.chunk)]
        inverse = [self.order.index(i) for i in range(len(self.order))]

        def fill(at: tuple[int, ...]) -> None:
            flat = _numbers(folder / self._file(at), self.dtype)
            check(self._file(at), flat)
            if len(flat) != math.prod(self.chunk):
                raise CheckpointError(
                    f"{folder / self._file(at)}: has {len(flat):,} numbers, expected "
                    f"{math.prod(self.chunk):,}; copy the checkpoint again"
                )
            chunk = flat.reshape([self.chunk[i] for i in self.order]).transpose(inverse)
            first = [k * c for k, c in zip(at, self.chunk)]
            low = [max(i.start, f) for i, f in zip(index, first)]
            high = [min(i.stop, f + c) for i, f, c in zip(index, first, self.chunk)]
            there = tuple(slice(a - f, b - f) for a, b, f in zip(low, high, first))
            here = tuple(slice(a - i.start, b - i.start) for a, b, i in zip(low, high, index))
            copy(out[here], chunk[there])

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            list(pool.map(fill, itertools.product(*grid)))
        return out

    @classmethod
    def of(cls, folder: Place, path: str) -> Array:
        """Read the metadata of an array in an existing store."""
        where = folder / "params" / path / "zarr.json"
        raw = expect(read_json(where, CheckpointError), _FORM, str(where), CheckpointError)
        order = [
            c.get("configuration", {}).get("order", ()) for c in raw["codecs"] if c["name"] == "transpose"
        ]
        shape, chunk = tuple(raw["shape"]), tuple(raw["chunk_grid"]["configuration"]["chunk_shape"])
        axes = tuple(order[0]) if order else tuple(range(len(shape)))
        if sorted(axes) != list(range(len(shape))) or len(chunk) != len(shape) or 0 in chunk:
            raise CheckpointError(f"{where}: order {axes} and chunks {chunk} do not fit the shape {shape}")
        try:
            return cls(path, shape, jnp.dtype(raw["data_type"]), axes, chunk)
        except TypeError:
            raise CheckpointError(f"{where}: data_type is {brief(raw['data_type'])}, which is none") from None

    def metadata(self) -> dict[str, Any]:
        """Return the contents of zarr.json (zarr 3)."""
        codecs: list[dict[str, Any]] = []
        if self.order != tuple(range(len(self.order))):
            codecs.append({"name": "transpose", "configuration": {"order": list(self.order)}})
        endian = {"configuration": {"endian": "little"}} if self.dtype.itemsize > 1 else {}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [*codecs, {"name": "bytes", **endian}],
            "fill_value": 0 if self.dtype.kind in "iu" else 0.0,
        }


def _numbers(file: Place, dtype: np.dtype) -> np.ndarray:
    if isinstance(file, Path):
        raise_irregular(file, CheckpointError)
        return np.memmap(file, dtype, "r").view(np.ndarray) if file.stat().st_size else np.empty(0, dtype)
    return np.frombuffer(file.read_bytes(), dtype)


def write_metadata(folder: Path, arrays: Mapping[str, Array]) -> None:
    """Write the metadata files that zarr and Orbax read first."""
    for array in arrays.values():
        place = folder / "params" / array.path / "zarr.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(array.metadata()), encoding="utf-8")
    tree = {
        f"('{path}',)": {
            "key_metadata": [{"key": path, "key_type": 2}],
            "value_metadata": {
                "value_type": "np.ndarray",  # the type restored without a sharding
                "skip_deserialize": False,
                "write_shape": list(array.chunk),
            },
        }
        for path, array in arrays.items()
    }
    orbax = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (folder / "params" / "_METADATA").write_text(json.dumps(orbax), encoding="utf-8")
