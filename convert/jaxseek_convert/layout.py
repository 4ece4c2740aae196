"""Layout lines: how one tensor on disk holds one or more parameters, in the letters of the shape legend.

`"NH Q -> QNH"`: the tensor has two dimensions, its rows run over heads and within a head over H; the
parameter is [Q, N, H]. `"N[P|H] C -> NPC, NHC"`: each head's rows are P of the first parameter, then H of the
second. Both directions follow from that line. Reads are views, so a slice of a parameter touches only its
own bytes of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from jaxseek.checkpoint.store import copy

Index = tuple[slice, ...]  # each with start and stop


class Layout:
    """A layout line, with the size of each letter taken from the parameters' shapes."""

    def __init__(self, line: str, shapes: Sequence[tuple[int, ...]]):
        disk, params = line.split(" -> ")
        self.params = params.split(", ")
        choice = re.search(r"\[(.*)\]", disk)
        self.options = choice[1].split("|") if choice else []
        sizes = [dict(zip(letters, shape, strict=True)) for letters, shape in zip(self.params, shapes)]
        self.dims, self.total, self.offset = [], [], []
        widths = [sizes[i][letter] for i, letter in enumerate(self.options)]
        for i in range(len(self.params)):
            option = {self.options[i]: sum(widths)} if choice else {}
            self.dims.append((disk.replace(choice[0], self.options[i]) if choice else disk).split())
            self.total.append(sizes[i] | option)
            self.offset.append(dict.fromkeys(option, sum(widths[:i])))
        self.shape = tuple(math.prod(self.total[0][c] for c in dim) for dim in self.dims[0])

    def read(self, which: int, index: Index, fetch: Callable[[Index], np.ndarray]) -> np.ndarray:
        """Return a view of slice `index` of parameter `which`; `fetch` returns a slice of the tensor.

        In each dimension on disk, the fetched range is bounded by the major letter alone.
        """
        total, offset = self.total[which], self.offset[which]
        at = {
            c: slice(s.start + offset.get(c, 0), s.stop + offset.get(c, 0))
            for c, s in zip(self.params[which], index)
        }
        outer, shape, inner = [], [], []
        for major, *minor in self.dims[which]:
            stride = math.prod(total[c] for c in minor)
            outer.append(slice(at[major].start * stride, at[major].stop * stride))
            shape += [at[major].stop - at[major].start, *(total[c] for c in minor)]
            inner += [slice(None), *(at[c] for c in minor)]
        block = fetch(tuple(outer)).reshape(shape)[tuple(inner)]
        letters = "".join(self.dims[which])
        return block.transpose([letters.index(c) for c in self.params[which]])

    @property
    def unit(self) -> int:
        """Rows on disk that stay together: all of one major index if parameters share the tensor, else 1."""
        return 1 if len(self.dims) == 1 else math.prod(self.total[0][c] for c in self.dims[0][0][1:])

    def order(self, which: int) -> list[int]:
        """Return the axes of parameter `which` in the order of the letters on disk."""
        return [self.params[which].index(c) for c in "".join(self.dims[which])]

    def split(self, rows: np.ndarray) -> list[np.ndarray]:
        """Split whole units of rows into the rows of each parameter."""
        if len(self.dims) == 1:
            return [rows]
        units = rows.reshape(-1, self.unit, *rows.shape[1:])
        parts = (units[:, start : start + width] for start, width in self._bands())
        return [np.ascontiguousarray(p).reshape(-1, *rows.shape[1:]) for p in parts]

    def merge(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Merge the rows of each parameter into rows on disk; the inverse of `split`."""
        if len(self.dims) == 1:
            return parts[0]
        bands = [p.reshape(-1, width, *p.shape[1:]) for p, (_, width) in zip(parts, self._bands())]
        return np.concatenate(bands, axis=1).reshape(-1, *parts[0].shape[1:])

    def _bands(self) -> list[tuple[int, int]]:
        """Return (first row in a unit, number of rows) of each parameter."""
        inner = math.prod(self.total[0][c] for c in self.dims[0][0][2:])
        starts = [self.offset[i][letter] * inner for i, letter in enumerate(self.options)]
        return [(a, b - a) for a, b in zip(starts, [*starts[1:], self.unit])]

    def join(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Build the whole tensor on disk from its parameters; a view if no copy is needed."""
        parts = [
            value.transpose([letters.index(c) for c in "".join(dims)])
            for value, letters, dims in zip(values, self.params, self.dims)
        ]
        if len(parts) == 1 and parts[0].flags.c_contiguous:
            return parts[0].reshape(self.shape)
        out = np.empty([self.total[0][c] for c in "".join(self.dims[0])], values[0].dtype)
        for i, part in enumerate(parts):
            where = [slice(None)] * out.ndim
            for letter, start in self.offset[i].items():
                axis = "".join(self.dims[i]).index(letter)
                where[axis] = slice(start, start + part.shape[axis])
            copy(out[tuple(where)], part)
        return out.reshape(self.shape)
