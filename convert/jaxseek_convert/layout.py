"""How one tensor on disk holds one or more parameters, in the letters of the shape legend.

`"NH Q -> QNH"` says: two dimensions on disk, rows counted by head and within it by H; the parameter is
[Q, N, H]. `"N[P|H] C -> NPC, NHC"` says: the rows of every head are first P of one parameter, then H of
another. Both directions follow from that one line. Reading is made of views, so a part of a parameter touches
just its own part of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from jaxseek.checkpoint.store import copy

Index = tuple[slice, ...]  # of start and stop, both given


class Layout:
    """A layout line with the sizes of its letters, which the parameters' shapes give."""

    def __init__(self, line: str, shapes: Sequence[tuple[int, ...]]):
        disk, held = line.split(" -> ")
        self.held = held.split(", ")
        choice = re.search(r"\[(.*)\]", disk)
        self.options = choice[1].split("|") if choice else []
        sizes = [dict(zip(letters, shape, strict=True)) for letters, shape in zip(self.held, shapes)]
        self.dims, self.total, self.offset = [], [], []
        widths = [sizes[i][letter] for i, letter in enumerate(self.options)]
        for i in range(len(self.held)):
            option = {self.options[i]: sum(widths)} if choice else {}
            self.dims.append((disk.replace(choice[0], self.options[i]) if choice else disk).split())
            self.total.append(sizes[i] | option)
            self.offset.append(dict.fromkeys(option, sum(widths[:i])))
        self.shape = tuple(math.prod(self.total[0][c] for c in dim) for dim in self.dims[0])

    def read(self, which: int, index: Index, fetch: Callable[[Index], np.ndarray]) -> np.ndarray:
        """A view of the part `index` of parameter `which`; `fetch(index)` gives that part of the tensor.

        Of every dimension on disk the major letter bounds what is fetched.
        """
        total, offset = self.total[which], self.offset[which]
        at = {
            c: slice(s.start + offset.get(c, 0), s.stop + offset.get(c, 0))
            for c, s in zip(self.held[which], index)
        }
        outer, shape, inner = [], [], []
        for major, *minor in self.dims[which]:
            stride = math.prod(total[c] for c in minor)
            outer.append(slice(at[major].start * stride, at[major].stop * stride))
            shape += [at[major].stop - at[major].start, *(total[c] for c in minor)]
            inner += [slice(None), *(at[c] for c in minor)]
        block = fetch(tuple(outer)).reshape(shape)[tuple(inner)]
        letters = "".join(self.dims[which])
        return block.transpose([letters.index(c) for c in self.held[which]])

    @property
    def unit(self) -> int:
        """Rows on disk that belong together: those of one first letter where parameters share them."""
        return 1 if len(self.dims) == 1 else math.prod(self.total[0][c] for c in self.dims[0][0][1:])

    def order(self, which: int) -> list[int]:
        """The axes of a parameter as the letters on disk name them."""
        return [self.held[which].index(c) for c in "".join(self.dims[which])]

    def split(self, rows: np.ndarray) -> list[np.ndarray]:
        """Whole units of rows: what of them belongs to each parameter, as rows."""
        if len(self.dims) == 1:
            return [rows]
        units = rows.reshape(-1, self.unit, *rows.shape[1:])
        parts = (units[:, start : start + width] for start, width in self._bands())
        return [np.ascontiguousarray(p).reshape(-1, *rows.shape[1:]) for p in parts]

    def merge(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `split`."""
        if len(self.dims) == 1:
            return parts[0]
        bands = [p.reshape(-1, width, *p.shape[1:]) for p, (_, width) in zip(parts, self._bands())]
        return np.concatenate(bands, axis=1).reshape(-1, *parts[0].shape[1:])

    def _bands(self) -> list[tuple[int, int]]:
        """Of each parameter: its first row in a unit and how many it has."""
        inner = math.prod(self.total[0][c] for c in self.dims[0][0][2:])
        starts = [self.offset[i][letter] * inner for i, letter in enumerate(self.options)]
        return [(a, b - a) for a, b in zip(starts, [*starts[1:], self.unit])]

    def join(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor on disk from its parameters, whole; a view where that is possible."""
        parts = [
            value.transpose([held.index(c) for c in "".join(dims)])
            for value, held, dims in zip(values, self.held, self.dims)
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
