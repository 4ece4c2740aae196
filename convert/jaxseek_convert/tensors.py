"""Read and write the store of a jaxseek checkpoint as if it were Hugging Face tensors."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxseek.checkpoint import models
from jaxseek.checkpoint.digests import Digests, Part
from jaxseek.checkpoint.digests import digest as xxh3
from jaxseek.checkpoint.directory import CheckpointError
from jaxseek.checkpoint.store import LAYOUT, Array
from jaxseek.config.model import ModelConfig
from jaxseek.model.weight import group_size, scale_shape
from jaxseek.storage.place import Place, Remote, file_state
from jaxseek_convert.files import File, RemoteFile, open_file
from jaxseek_convert.numbers import BLOCK, FLOAT8, Form, Memory, Rows
from jaxseek_convert.table import Table, Tensors

_CACHE_BYTES = 128 << 20  # cache of decoded Orbax chunks
_CHUNK_BYTES = 64 << 20  # largest chunk that Orbax writes


def arrays_of(table: Table, forms: Mapping[str, Form]) -> dict[str, Array]:
    """Return the stored arrays of all parameters by path; a quantised one has `.value` and `.scale`."""
    out = {}
    for section in table.sections:
        for row in section:
            for which, path in enumerate(row.paths if row.kind == "own" else ()):
                shape, form = table.params[path].shape, forms[path]
                lead = len(row.counts)
                order = (*range(lead), *(lead + i for i in row.layout.order(which)))
                if not form.quantized:
                    out[path] = Array(path, shape, form.dtype, order)
                    continue
                last = order[-1]
                stored = tuple(form.columns(n) if i == last else n for i, n in enumerate(shape))
                scales = scale_shape(path.rpartition(".")[2], shape, form.group)
                out[f"{path}.value"] = Array(f"{path}.value", stored, form.dtype, order)
                out[f"{path}.scale"] = Array(f"{path}.scale", scales, np.dtype(np.float32), order)
    return out


def described(table: Table, forms: Mapping[str, Form]) -> dict[str, Any]:
    """Return the manifest's entries for the parameters: shapes, dtypes and quantisation groups."""
    params = {}
    for path, array in arrays_of(table, forms).items():
        base, _, part = path.rpartition(".")
        quantized = part == "value" and base in forms
        params[path] = {
            "shape": list(table.params[base].shape if quantized else array.shape),
            "dtype": forms[base].kind if quantized else array.dtype.name,
        }
    return {"params": params, "quantization": {p: f.group for p, f in forms.items() if f.quantized}}


class StoreCheckpoint:
    """A jaxseek checkpoint readable as rows of Hugging Face tensors."""

    def __init__(self, path: Place, mtp: bool = True, checksums: bool = True):
        self.path, self.manifest = path, models.read_manifest(path)
        self.digests = Digests.of(path) if checksums else Digests.unchecked(path, "--no-checksum")
        self.digests.check_small()
        models.raise_incomplete(path, self.manifest["files"])
        self.cfg = ModelConfig.from_hf(path / "config.json")
        if not mtp:
            self.cfg = self.cfg.replace(num_nextn_predict_layers=0)
        self.table = Table(self.cfg)
        params = {p: h for p, h in self.manifest["params"].items() if mtp or not p.startswith("mtp.")}
        self.forms = {path: self._form(path, params) for path in self.table.params}
        expected = described(self.table, self.forms)["params"]
        models.raise_mismatch(
            f"{path / models.MANIFEST} and config.json do not fit each other",
            {p: tuple(h["shape"]) for p, h in params.items()},
            {p: tuple(h["shape"]) for p, h in expected.items()},
            "they were written together: restore the original config.json",
        )
        rows = {name: (row, at) for name, row, at in self.table}
        owned = {name for name, (row, _) in rows.items() if row.kind == "own"}
        origin = self.manifest["origin"]
        names = owned.union(origin["copies"]) if "copies" in origin else self.table.names()
        self.tensors = {name: rows[name] for name in rows if name in names}
        self.flat = self.manifest.get("layout") == LAYOUT
        self.arrays = {p: self._as_written(a) for p, a in arrays_of(self.table, self.forms).items()}
        self.quantization = origin.get("quantization")

    def _form(self, path: str, params: Mapping[str, Any]) -> Form:
        groups = self.manifest.get("quantization", {})
        if path not in groups:
            return Form(params.get(path, {"dtype": "bfloat16"})["dtype"])
        how = self.manifest["origin"].get("quantization") or {}
        kind = params[f"{path}.value"]["dtype"]
        block = (how.get("weight_block_size") or [BLOCK])[0]
        return Form(kind, groups[path], block if kind == FLOAT8.kind else 1)

    def _as_written(self, array: Array) -> Array:
        """Return the array with its chunk shape on disk. Raises CheckpointError if anything else differs."""
        if not self.flat:
            return array
        try:
            found = Array.of(self.path, array.path)
        except (ValueError, KeyError, TypeError, IndexError) as e:
            found = f"{type(e).__name__}: {e}"
        if not isinstance(found, Array) or replace(found, chunk=array.chunk) != array:
            raise CheckpointError(
                f"{self.path}/params/{array.path}/zarr.json: expected {array}, found {found}; was it "
                "changed? Convert the source again"
            )
        return found

    def origin(self, forms: Mapping[str, Form]) -> dict[str, Any]:
        """Return what parameters stored in `forms` do not record; see HFCheckpoint.origin."""
        origin = self.manifest["origin"]
        same = {n for n, (row, _) in self.tensors.items() if forms[row.paths[0]] == self.forms[row.paths[0]]}
        dtypes = {n: d for n, d in origin.get("dtypes", {}).items() if n.removesuffix("_scale_inv") in same}
        copies = {"copies": [n for n in origin["copies"] if n in self.tensors]} if "copies" in origin else {}
        kept = {"config": origin["config"]} if "config" in origin else {}
        return {**copies, "dtypes": dtypes, "quantization": origin.get("quantization"), **kept}

    def form(self, name: str) -> Form:
        """Return how a tensor is stored."""
        return self.forms[self.tensors[name][0].paths[0]]

    def nbytes(self, name: str) -> int:
        """Return the bytes of a tensor and its scales."""
        return sum(plane.nbytes for plane in self.planes(name))

    def position(self, name: str) -> tuple[str, int]:
        """Return (array, offset) of a tensor, a sort key for sequential reads."""
        plane = self.planes(name)[0]
        return plane.arrays[0].path, plane.ranges(0, 0)[0][0]

    def planes(self, name: str) -> list[Plane]:
        """Locate a tensor's values and, if quantised, its scales."""
        row, at = self.tensors[name]
        return planes(self.arrays, self.forms[row.paths[0]], row, at)

    def identity(self) -> list[Any]:
        """Return a state that differs for another source, or once a file has changed."""
        if isinstance(self.path, Remote):
            return [file_state(self.path / models.MANIFEST), (self.path / "params").sizes()]
        files = [self.path / models.MANIFEST, *(self.path / "params").rglob("*")]
        return [str(self.path.absolute()), len(files), max(file.stat().st_mtime_ns for file in files)]

    @property
    def memory(self) -> Memory:
        """Memory that reading takes beside the rows: none for a flat store, decoded chunks for Orbax."""
        return Memory() if self.flat else Memory(2 * _CHUNK_BYTES, _CACHE_BYTES)

    def spans(self, name: str) -> Iterator[tuple[str, str, int, int]]:
        """Yield the byte ranges of a tensor as HFCheckpoint.spans does; only for a store by `convert`."""
        return spans(self.planes(name))

    def check_files(self, stage: Callable[[str, int], Callable[[int], Any]]) -> None:
        """Compare the files of an Orbax checkpoint with their digests; `rows` does so for chunks.

        Every host calls this. Raises CheckpointError.
        """
        if not self.flat:
            self.digests.check(stage("checksum", self.digests.nbytes))

    def rows(self, name: str, first: int, last: int) -> Rows:
        """Return stored rows [first, last) of a tensor, to be read from its first to its last.

        Raises CheckpointError if they end a part of a file that is damaged.
        """
        row, _ = self.tensors[name]
        values, *scale = (self._read(plane, first, last) for plane in self.planes(name))
        values = values if len(row.layout.shape) > 1 else values.reshape(-1)
        return Rows(values, scale[0][:, :: repeats(row, self.form(name))] if scale else None)

    def _read(self, plane: Plane, first: int, last: int) -> np.ndarray:
        """Return rows [last - first, columns]; `first` and `last` are multiples of the layout's unit."""
        read = self._read_flat if self.flat else self._read_orbax
        parts = [read(plane, i, *r) for i, r in enumerate(plane.ranges(first, last))]
        return plane.row.layout.merge([p.view(plane.dtype).reshape(-1, plane.columns) for p in parts])

    def _read_flat(self, plane: Plane, which: int, start: int, stop: int) -> np.ndarray:
        out = np.empty(stop - start, np.uint8)
        for name, there, here, n in plane.arrays[which].pieces(start, stop):
            out[here : here + n] = self._file(name).read(there, there + n)
            self.digests.follow(name, there, out[here : here + n])
        return out

    def _read_orbax(self, plane: Plane, which: int, start: int, stop: int) -> np.ndarray:
        """Read bytes [start, stop) of an array in disk order from Orbax chunks, which are in model order."""
        array, lead = plane.arrays[which], len(plane.at)
        rows = [array.shape[i] for i in array.order[lead : lead + len(plane.row.layout.dims[which][0])]]
        row = array.nbytes // math.prod(array.shape[:lead]) // math.prod(rows)
        matrix = self._opened(array.path)[plane.at] if lead else self._opened(array.path)
        matrix = matrix.transpose([i - lead for i in array.order[lead:]])
        out, at = np.empty(stop - start, np.uint8), 0
        for box in boxes(rows, *((i - plane.start(which)) // row for i in (start, stop))):
            part = np.ascontiguousarray(matrix[box].read(order="C").result()).reshape(-1).view(np.uint8)
            out[at : at + len(part)] = part
            at += len(part)
        return out

    @functools.cached_property
    def _context(self) -> Any:
        """Context with one cache for all arrays; chunks are decoded one at a time to bound memory."""
        import tensorstore

        one = {"limit": 1}
        return tensorstore.Context(
            {
                "cache_pool": {"total_bytes_limit": _CACHE_BYTES},
                "data_copy_concurrency": one,
                "file_io_concurrency": one,
            }
        )

    @functools.cache  # noqa: B019 - the object lives as long as a conversion
    def _opened(self, path: str) -> Any:
        import tensorstore

        base = f"{models.orbax_place(self.path / 'params').as_uri()}/"
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": path + "/"}}
        return tensorstore.open(spec, context=self._context, read=True).result()

    @functools.cache  # noqa: B019
    def _file(self, name: str) -> File | RemoteFile:
        return open_file(self.path / name)


@dataclass(frozen=True)
class Plane:
    """The values, or the scales, of a tensor in the arrays of its parameters.

    Every unit of rows is split between the arrays in the same proportion.
    """

    row: Tensors
    at: tuple[int, ...]
    arrays: tuple[Array, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.arrays[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays) // math.prod(self.row.counts)

    @property
    def columns(self) -> int:
        """Elements per row."""
        return self.nbytes // self.dtype.itemsize // self.row.layout.shape[0]

    def start(self, which: int) -> int:
        """Return the byte offset of the tensor in array `which`."""
        matrix = int(np.ravel_multi_index(self.at, self.row.counts)) if self.at else 0
        return matrix * (self.arrays[which].nbytes // math.prod(self.row.counts))

    def key(self, which: int) -> str:
        """Return the digest name of the tensor's part of array `which`."""
        return self.arrays[which].path + (f"[{','.join(map(str, self.at))}]" if self.at else "")

    def ranges(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the byte range of rows [first, last), whole units, in each array."""
        R = self.row.layout.shape[0]
        sizes = [a.nbytes // math.prod(self.row.counts) for a in self.arrays]
        return [(self.start(i) + n * first // R, self.start(i) + n * last // R) for i, n in enumerate(sizes)]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    """Yield the boxes that cover elements [start, stop) of an array, in C order."""
    inner = math.prod(shape[1:])
    while start < stop:
        i, rest = divmod(start, inner)
        n = (stop - start) // inner
        if rest or not n:  # part of one row
            last = min(inner, rest + stop - start)
            for box in boxes(shape[1:], rest, last):
                yield slice(i, i + 1), *box
            start += last - rest
        else:
            yield slice(i, i + n), *(slice(0, size) for size in shape[1:])
            start += n * inner


def planes(arrays: Mapping[str, Array], form: Form, row: Tensors, at: tuple[int, ...]) -> list[Plane]:
    """Locate a tensor's values and, if quantised, its scales."""
    suffixes = (".value", ".scale") if form.quantized else ("",)
    return [Plane(row, at, tuple(arrays[p + suffix] for p in row.paths)) for suffix in suffixes]


def spans(planes: list[Plane]) -> Iterator[tuple[str, str, int, int]]:
    """Yield the byte ranges of a tensor, in order: (digest name, file, offset, length)."""
    for plane in planes:
        for i, (start, stop) in enumerate(plane.ranges(0, plane.row.layout.shape[0])):
            for file, there, _, n in plane.arrays[i].pieces(start, stop):
                yield plane.key(i), file, there, n


def repeats(row: Tensors, form: Form) -> int:
    """Return how often the store repeats each scale: more than once if a group spans heads."""
    if form.group is None:
        return 1
    name = row.paths[0].rpartition(".")[2]
    return form.group // group_size(name, row.shapes[0], form.group)


class StoreSink:
    """A store to write, tensor by tensor."""

    def __init__(self, table: Table, forms: Mapping[str, Form]):
        self.forms = forms
        self.arrays = arrays_of(table, forms)
        self.tensors = {name: (row, at) for name, row, at in table if row.kind == "own"}
        self.headers: dict[str, bytes] = {}
        self.files = {name: n for array in self.arrays.values() for name, n in array.files().items()}

    def form(self, name: str) -> Form:
        """Return the form that the rows of a tensor must have."""
        return self.forms[self.tensors[name][0].paths[0]]

    def spans(self, name: str) -> Iterator[tuple[str, str, int, int]]:
        """Yield the byte ranges of a tensor, in order: (digest name, file, offset, length).

        Each file has a digest of its own, so that a reader can check a chunk alone.
        """
        for _, file, start, n in spans(planes(self.arrays, self.form(name), *self.tensors[name])):
            yield file, file, start, n

    def digests(self, written: Mapping[str, Mapping[str, str]]) -> dict[str, list[Part]]:
        """Return the parts of every file from the digests of every tensor, by tensor and file.

        The last chunk of an array may be padded with zeros, which are a part too.
        """
        found: dict[str, dict[int, Part]] = {}
        for name, of_files in written.items():
            starts, sizes = {}, Counter()
            for file, _, start, n in self.spans(name):
                starts.setdefault(file, start)
                sizes[file] += n
            for file, digest in of_files.items():
                found.setdefault(file, {})[starts[file]] = (sizes[file], digest)
        out = {file: [parts[start] for start in sorted(parts)] for file, parts in found.items()}
        for file, parts in out.items():
            if padding := self.files[file] - sum(n for n, _ in parts):
                parts.append((padding, xxh3(bytes(padding))))
        return out

    def put(self, name: str, first: int, rows: Rows) -> Iterator[tuple[str, str, int, np.ndarray]]:
        """Yield the writes for rows of a tensor, in order: (digest name, file, offset, bytes)."""
        row, at = self.tensors[name]
        for plane, data in zip(planes(self.arrays, self.form(name), row, at), (rows.values, rows.scale)):
            assert data is not None
            if data is rows.scale:
                data = data.repeat(repeats(row, self.form(name)), 1)[:, : plane.columns]
            ranges = plane.ranges(first, first + len(data))
            for i, (part, (start, stop)) in enumerate(zip(row.layout.split(data), ranges)):
                raw = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
                for file, there, here, n in plane.arrays[i].pieces(start, stop):
                    yield file, file, there, raw[here : here + n]
