"""`jaxseek convert --dry-run`: plan where every tensor goes, from config.json and the index alone."""

from __future__ import annotations

import itertools
import math
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseek.checkpoint import models
from jaxseek.checkpoint.directory import CheckpointError, existing_parent
from jaxseek.config.formats import Spec
from jaxseek.config.model import ModelConfig
from jaxseek.experts.replicate import place_experts
from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.weight import MATRICES, quantized
from jaxseek.sharding.parameters import device_bytes, parameters
from jaxseek.sharding.strategy import Strategy
from jaxseek.storage.place import Place, Remote, small_files, writable
from jaxseek.storage.untrusted import read_json
from jaxseek_convert.conversion import sink_for, source_place, target_forms
from jaxseek_convert.files import File, Writer
from jaxseek_convert.from_hf import block_of, quantization_of
from jaxseek_convert.numbers import F32, FP8, Form
from jaxseek_convert.safetensors_io import INDEX, bytes_of, read_index
from jaxseek_convert.table import Table
from jaxseek_convert.tensors import StoreCheckpoint, planes
from jaxseek_convert.to_hf import HFSink

_PROBE = 128 << 20  # bytes written to measure the destination's speed
_MULTIPLIED = "multiplied into its numbers"  # scales of FP8 tensors that are written as floats


class Announced:
    """A Hugging Face checkpoint described by its config.json and index; no weight file is opened.

    Without an index, the tensors are those that the config implies. A tensor is FP8 if the index lists
    scales for it; without an index, the linear and expert matrices are FP8 if the config has a
    `quantization_config`.
    """

    def __init__(self, path: Path, mtp: bool = True):
        self.path, self.cfg = path, ModelConfig.from_hf(path)
        self.quantization = quantization_of(path)
        self._block = block_of(path, self.quantization)
        raw = read_json(path / "config.json", CheckpointError)
        self._dtype = models.parse_dtype(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16").name
        if not mtp:
            self.cfg = self.cfg.replace(num_nextn_predict_layers=0)
        self.table = Table(self.cfg)
        self._rows = {name: row for name, row, _ in self.table}
        index = read_index(path) if (path / INDEX).is_file() else None
        self.files = index if index is not None else dict.fromkeys(self._implied(), "")
        last = self.cfg.num_hidden_layers
        beyond = re.compile(r"model\.layers\.(\d+)\.")
        names = {n for n in self.files if mtp or not ((m := beyond.match(n)) and int(m[1]) >= last)}
        self._eight = {n.removesuffix("_scale_inv") for n in names if n.endswith("_scale_inv")}
        tensors = names - {f"{n}_scale_inv" for n in self._eight}
        expected = {n: row for n, row in self._rows.items() if row.kind == "own" or n in tensors}
        models.raise_mismatch(
            f"{path}: its index names other tensors than config.json's {self.cfg.model_type} with "
            f"{last} layers has",
            dict.fromkeys(tensors, ()),
            dict.fromkeys(expected, ()),
            "Do config.json and the index belong together?",
        )
        self.tensors = {n: row for n, row in self._rows.items() if n in tensors}
        owned = [(n, row) for n, row in self.tensors.items() if row.kind == "own"]
        self.forms = {path: self.form(n) for n, row in owned for path in row.paths}

    def _implied(self) -> set[str]:
        names = self.table.names()
        quantized = {n for n in names if self._is_matrix(n)} if self.quantization else set()
        return names | {f"{n}_scale_inv" for n in quantized}

    def _is_matrix(self, name: str) -> bool:
        return all(p.rpartition(".")[2] in MATRICES for p in self._rows[name].paths)

    def form(self, name: str) -> Form:
        """Return how a tensor is stored, as HFCheckpoint.form does."""
        if name in self._eight:
            return Form(FP8.name, self._block[1], self._block[0])
        abstract = self.table.params[self._rows[name].paths[0]]
        return Form(F32.name if abstract.dtype == jnp.float32 else self._dtype)

    def nbytes(self, name: str) -> int:
        """Return the bytes of a tensor and its scales."""
        shape, form = self.tensors[name].layout.shape, self.form(name)
        blocks = [-(-n // b) for n, b in zip(shape, self._block)] if form.quantized else [0]
        return math.prod(shape) * form.dtype.itemsize + 4 * math.prod(blocks)

    def origin(self, forms: Mapping[str, Form]) -> dict[str, Any]:
        """Return the copies and quantisation for `sink_for`, as HFCheckpoint.origin does."""
        del forms
        copies = [n for n, row in self.tensors.items() if row.kind != "own"]
        return {"copies": copies, "dtypes": {}, "quantization": self.quantization}


@dataclass(frozen=True)
class Destination:
    """Target of one tensor: an array and its leading indices, or a file; and the bytes it takes there."""

    source: str
    target: str
    index: tuple[int, ...]
    nbytes: int


def rehearse(
    src: str | Path,
    dst: str | Path,
    to: str = "jaxseek",
    dtype: Any = None,
    mtp: bool = True,
    mesh: Any = None,
) -> dict[str, Any]:
    """Report what `convert` would do with these arguments, ready for JSON; writes only a temporary probe.

    `destinations` lists every source tensor, scales included. `bytes_per_chip` is the size of the weights on
    the fullest chip of `mesh`. `seconds` is an estimate from this machine's measured speed: [with reading
    and writing fully overlapped, without overlap], or None if `dst` cannot be written. Raises
    CheckpointError or ConfigError if config.json and the index do not match.
    """
    to_place = writable(dst)
    with source_place(src, to_place, weights=False) as at:
        ours = models.kind_of(at) == "jaxseek"
        folder = small_files(at) if isinstance(at, Remote) else at
        source = StoreCheckpoint(at, mtp) if ours else Announced(folder, mtp)
        forms = target_forms(source, to, dtype)
        sink, _ = sink_for(source, forms, source.origin(forms), to)
        destinations = list(_destinations(source, sink))
        try:
            rates = _rates(at, to_place) if isinstance(at, Path) and isinstance(to_place, Path) else None
        except OSError:
            rates = None
    read, written = sum(map(source.nbytes, source.tensors)), sum(sink.files.values())
    seconds = (read / rates["read"], written / rates["write"]) if rates else ()
    strategy = Strategy.parse(mesh)
    specs = {p: Spec(f.kind, f.group) for p, f in forms.items() if f.quantized}
    model = quantized(DeepSeek.abstract(source.cfg, strategy, jnp.bfloat16), specs)
    place_experts(model)
    return {
        "src": str(src),
        "dst": str(dst),
        "to": to,
        "model_type": source.cfg.model_type,
        "parameters": source.cfg.num_params(mtp=True),
        "tensors": len(destinations),
        "bytes_read": read,
        "bytes_written": written,
        "files": len(sink.files),
        "disk_free": _free(to_place),
        "mesh": {a: n for a, n in strategy.sizes if n > 1},
        "bytes_per_chip": _bytes_per_chip(model, forms),
        "bytes_per_second": rates and {way: round(rate) for way, rate in rates.items()},
        "seconds": [round(max(seconds)), round(sum(seconds))] if seconds else None,
        "destinations": [vars(d) for d in destinations],
    }


def _free(at: Place) -> int | None:
    """Return the free bytes of a disk, or None for an object store, which has no limit."""
    return None if isinstance(at, Remote) else shutil.disk_usage(existing_parent(at.absolute())).free


def _destinations(source: Announced | StoreCheckpoint, sink: Any) -> Iterator[Destination]:
    """Yield the destination of every source tensor and scale, in table order."""
    for name, row, at in source.table:
        if name not in source.tensors:
            continue
        names = (name, f"{name}_scale_inv") if source.form(name).quantized else (name,)
        if isinstance(sink, HFSink):
            for key in names:
                if key in sink.shards.place:
                    n = bytes_of({key: sink.shards.specs[key]})
                    yield Destination(key, sink.shards.place[key][0], (), n)
                else:
                    yield Destination(key, _MULTIPLIED, (), 0)
        elif row.kind != "own":
            yield Destination(name, f"not stored: a copy of {row.paths[0]}", (), 0)
        else:
            found = planes(sink.arrays, sink.form(name), row, at)
            for key, plane in itertools.zip_longest(names, found[: len(names)]):
                if plane is not None:
                    yield Destination(key, " + ".join(a.path for a in plane.arrays), at, plane.nbytes)
                else:
                    yield Destination(key, _MULTIPLIED, at, 0)


def _rates(folder: Path, dst: Path) -> dict[str, float]:
    """Measure bytes per second written beside `dst`, and read from the source (or from the probe)."""
    parent = existing_parent(dst.absolute())
    data = np.random.default_rng(0).integers(0, 256, 8 << 20, np.uint8)
    with tempfile.TemporaryDirectory(prefix=".jaxseek-probe-", dir=parent) as scratch:
        writer = Writer(Path(scratch), {"probe": _PROBE})
        start = time.perf_counter()
        for at in range(0, _PROBE, len(data)):
            writer.write("probe", at, data)
        writer.close()
        write = _PROBE / (time.perf_counter() - start)
        here = max(folder.glob("*.safetensors"), key=lambda f: f.stat().st_size, default=None)
        file = File(here or Path(scratch) / "probe")
        size = min(file.size, _PROBE)
        start = time.perf_counter()
        for at in range(0, size, 8 << 20):
            file.read(at, min(at + (8 << 20), size))
        return {"write": write, "read": size / (time.perf_counter() - start)}


def _bytes_per_chip(model: DeepSeek, forms: Mapping[str, Form]) -> int:
    """Return the bytes of weights on the fullest chip; replicated weights count on every chip."""
    values = {path: param.get_value() for path, param in parameters(model).items()}
    kinds = {path: forms[path].dtype if path in forms else v.dtype for path, v in values.items()}
    return device_bytes(
        [jax.ShapeDtypeStruct(v.shape, kinds[p], sharding=v.sharding) for p, v in values.items()]
    )


def summary(plan: Mapping[str, Any]) -> list[tuple[str, str, int, int]]:
    """Summarise a rehearsal, one line per kind of tensor: (name pattern, destination, count, bytes)."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for d in plan["destinations"]:
        kind = re.sub(
            r"\.experts\.\d+\.", ".experts.{e}.", re.sub(r"\.layers\.\d+\.", ".layers.{l}.", d["source"])
        )
        groups.setdefault((kind, d["target"]), []).append(d)
    return [(kind, to, len(ds), sum(d["nbytes"] for d in ds)) for (kind, to), ds in groups.items()]
