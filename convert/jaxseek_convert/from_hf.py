"""Read Hugging Face checkpoints: check all names and shapes first, then read slices of tensors.

When loading onto a mesh, each device's shard is read on its own from memory-mapped files: only the layers,
experts and rows that the device holds. Beside the model, memory holds one shard of one parameter at a time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jaxseek.checkpoint.directory import CheckpointError
from jaxseek.checkpoint.models import param_dtype, raise_mismatch, same_bits
from jaxseek.config import hf
from jaxseek.config.model import ModelConfig
from jaxseek.model.deepseek import DeepSeek
from jaxseek.sharding.parameters import fill
from jaxseek.storage.place import Place, Remote, place, small_files
from jaxseek.storage.untrusted import brief, read_json
from jaxseek_convert.layout import Index
from jaxseek_convert.names import check, each_expert, match
from jaxseek_convert.numbers import (
    BF16,
    BLOCK,
    F32,
    FLOATS,
    FP8,
    SCALES,
    Form,
    Memory,
    Rows,
    decode,
    from_blocks,
)
from jaxseek_convert.safetensors_io import Tensor, locate
from jaxseek_convert.table import Table, Tensors

log = logging.getLogger("jaxseek")

_COMPARED = 1 << 24  # bytes compared at a time


def load_hf(path: str | Place, mesh: Any = None, dtype: Any = None, mtp: bool = True) -> DeepSeek:
    """Load the model of a Hugging Face directory onto a mesh.

    Without `dtype` each parameter keeps the dtype of its tensors (float32 if they differ, bfloat16 for FP8).
    Router biases are always float32. Without `mtp` the multi-token module is left out; files without that
    module, as transformers saves them, give a model without it. Raises ConfigError or CheckpointError if
    config.json or the files cannot be used; one error lists all unknown, missing and misshapen tensors.
    """
    return HFCheckpoint(path, mtp).load(mesh, dtype)


class HFCheckpoint:
    """A Hugging Face checkpoint whose tensors match its config: none missing, none unknown."""

    def __init__(self, path: str | Place, mtp: bool = True):
        self.path = place(path)
        folder = small_files(self.path) if isinstance(self.path, Remote) else self.path
        cfg, raw = ModelConfig.from_hf(folder), raw_config(folder)
        self.kept = hf.kept(raw)
        self.quantization = quantization_of(raw)
        self._block = block_of(self.path, self.quantization)
        tensors, notes = locate(self.path)
        tensors = _one_for_each_expert(tensors, cfg.n_routed_experts)
        self.cfg, names = match(self.path, cfg, tensors, mtp, hf.tower(raw) is not raw)
        self.tensors = {name: tensors[on_disk] for name, on_disk in names.items()}
        self._scales = self._take_scales()
        self.table = Table(self.cfg)
        self._check(notes)
        for note in notes:
            log.warning("%s", note)
        self.forms = self._forms()

    # ---------------------------------------------------------------- contents

    def _take_scales(self) -> dict[str, Tensor]:
        """Move the scales of FP8 tensors out of `tensors` and return them by tensor name.

        A scale for a whole tensor or for each row is read as those of blocks, which hold it exactly: `_block`
        and `quantization` then say so. Raises CheckpointError if a scale is missing or has an unexpected
        shape or dtype.
        """
        shapes = {name: t.shape for name, t in self.tensors.items() if t.dtype == FP8}
        scales = {n: self.tensors.pop(f"{n}_scale_inv") for n in shapes if f"{n}_scale_inv" in self.tensors}
        found = {n: s.shape for n, s in scales.items()}
        stated = isinstance(self.quantization, dict) and self.quantization.get("weight_block_size")
        coarse = {n: s for n, s in found.items() if s != self._grid(shapes[n]) and not stated}
        whole = {n for n, s in coarse.items() if math.prod(s) == 1}
        rows = {n for n, s in coarse.items() if s in ((shapes[n][0],), (shapes[n][0], 1))} - whole
        raise_mismatch(
            f"{self.path}: the scales of its FP8 tensors are not those of blocks of {list(self._block)} "
            "(config.json's weight_block_size), of rows or of tensors",
            {f"{n}_scale_inv": s for n, s in found.items()},
            {f"{n}_scale_inv": found[n] if n in whole | rows else self._grid(s) for n, s in shapes.items()},
            "Do config.json and the weights belong together, and is the download complete?",
        )
        if wrong := [n for n, s in scales.items() if s.dtype not in SCALES]:
            raise CheckpointError(
                f"{self.path}: {len(wrong)} scales have a dtype that no scale has, such as {wrong[0]}'s "
                f"({scales[wrong[0]].dtype}); expected one of {', '.join(d.name for d in SCALES)}"
            )
        self._per = {n: shapes[n][0] if n in whole else 1 if n in rows else self._block[0] for n in scales}
        if rows:
            self._block = 1, self._block[1]
        method = self.quantization.get("quant_method") if isinstance(self.quantization, dict) else None
        if scales and (whole | rows or method not in (None, "fp8")):
            kind = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
            self.quantization = {**kind, "weight_block_size": list(self._block)}
        return scales

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scales of blocks for a tensor of this shape."""
        return tuple(-(-n // b) for n, b in zip(shape, self._block))

    def _check(self, notes: Sequence[str]) -> None:
        rows = {name: row for name, row, _ in self.table}
        expected = {n: row.layout.shape for n, row in rows.items() if row.kind == "own" or n in self.tensors}
        cfg = self.cfg
        check(
            f"{self.path}: its tensors are not those of config.json's {cfg.model_type} with "
            f"{cfg.num_hidden_layers} layers",
            {n: t.shape for n, t in self.tensors.items()},
            expected,
            notes,
        )
        if wrong := [n for n, t in self.tensors.items() if t.dtype == FP8 and len(t.shape) != 2]:
            raise CheckpointError(
                f"{self.path}: {wrong[0]} is FP8, expected that of matrices alone; fetch the original weights"
            )
        if wrong := [n for n, t in self.tensors.items() if t.dtype not in (*FLOATS, FP8)]:
            raise CheckpointError(
                f"{self.path}: {len(wrong)} tensors have a dtype that no weight has, such as {wrong[0]} "
                f"({self.tensors[wrong[0]].dtype}); expected bfloat16, float16, float32 or float8_e4m3fn"
            )

    def check_copies(self) -> None:
        """Raise CheckpointError if a copy of a tensor differs from its original: the model keeps one."""
        for name, row, _ in self.table:
            if name in self.tensors and row.kind != "own":
                self._check_copy(name, row)

    def _check_copy(self, name: str, row: Tensors) -> None:
        original = next(n for n, other, _ in self.table if other.kind == "own" and other.paths == row.paths)
        a, b = self.tensors[name], self.tensors[original]
        step = max(1, _COMPARED // (a.nbytes // a.shape[0]))
        for i in range(0, a.shape[0], step):
            last = min(i + step, a.shape[0])
            x = a.rows(i, last).copy()
            y = b.rows(i, last)
            if not (same_bits(x, y) or (x.dtype != y.dtype and np.array_equal(x, y))):
                break
        else:
            return
        advice = (
            "set tie_word_embeddings to false in config.json"
            if row.kind == "tied"
            else "leave the multi-token module out (mtp=False, or --no-mtp)"
        )
        raise CheckpointError(
            f"{self.path}: {name} should be a copy of {original}, but differs from it; {advice}"
        )

    def form(self, name: str) -> Form:
        """Return how a tensor is stored."""
        dtype = self.tensors[name].dtype
        rows, columns = self._block
        powers = dtype == FP8 and (self.quantization or {}).get("scale_fmt") == "ue8m0"
        return Form(dtype.name, columns, rows, powers) if dtype == FP8 else Form(dtype.name)

    def _forms(self) -> dict[str, Form]:
        """Return each parameter's form: that of its tensors, or a float dtype that holds all of them.

        FP8 mixed with others counts as bfloat16.
        """
        found: dict[str, set[Form]] = {}
        for name, row, _ in self.table:
            if name in self.tensors and row.kind == "own":
                for path in row.paths:
                    found.setdefault(path, set()).add(self.form(name))
        return {path: _wider(forms) for path, forms in found.items()}

    def nbytes(self, name: str) -> int:
        """Return the bytes of a tensor and its scales."""
        scale = self._scales.get(name)
        return self.tensors[name].nbytes + (scale.nbytes if scale else 0)

    @property
    def memory(self) -> Memory:
        """Memory that reading takes beside the rows: none."""
        return Memory()

    def position(self, name: str) -> tuple[str, int]:
        """Return (file, offset) of a tensor, a sort key for sequential reads."""
        return str(self.tensors[name].file), self.tensors[name].start

    def identity(self) -> list[Any]:
        """Return the state of all files: it differs for another source, or once a file has changed."""
        files = {str(t.file): t.file for t in (*self.tensors.values(), *self._scales.values())}
        return [files[name].state() for name in sorted(files)]

    def spans(self, name: str) -> Iterator[tuple[str, str, int, int]]:
        """Yield the byte ranges of a tensor and its scales, in order: (digest name, file, offset, length)."""
        for key, t in ((name, self.tensors[name]), (f"{name}_scale_inv", self._scales.get(name))):
            if t is not None:
                yield key, t.file.name, t.start, t.nbytes

    def origin(self, forms: Mapping[str, Form]) -> dict[str, Any]:
        """Return what parameters stored in `forms` do not record, for an exact conversion back.

        `copies`: tensors on disk that repeat a parameter. `dtypes`: dtypes of tensors that the parameter
        stores exactly in another dtype, and of scales that are not float32. `quantization`: the
        `quantization_config` of config.json. `config`: its keys that have no part in the model.
        """
        present = [(name, row.paths[0], row.kind) for name, row, _ in self.table if name in self.tensors]
        dtypes = {}
        for name, path, _ in present:
            stored, unchanged = self.form(name), forms[path] == self.forms[path]
            if stored.quantized and unchanged and self._scales[name].dtype != F32:
                dtypes[f"{name}_scale_inv"] = self._scales[name].dtype.name
            elif (
                not stored.quantized
                and stored != forms[path]
                and (unchanged or self.table.params[path].dtype == F32)
            ):
                dtypes[name] = stored.kind
        copies = [name for name, _, kind in present if kind in ("copy", "tied")]
        kept = {"config": self.kept} if self.kept else {}
        return {"copies": copies, "dtypes": dtypes, "quantization": self.quantization, **kept}

    # ---------------------------------------------------------------- reading

    def rows(self, name: str, first: int, last: int) -> Rows:
        """Return stored rows [first, last), in a buffer that this thread's next read may reuse."""
        form, scale = self.form(name), None
        if form.quantized:
            per = self._per[name]
            parts = self._scales[name].rows(first // per, -(-last // per))
            scale = from_blocks(parts.reshape(len(parts), -1), first % per, last - first, per)
            if scale.shape[1] == 1:
                scale = scale.repeat(form.groups(self.tensors[name].shape[1]), 1)
        return Rows(self.tensors[name].rows(first, last), scale)

    def fetch(self, name: str, index: Index) -> np.ndarray:
        """Return a slice of a tensor: a view of the file, or float32 values if it is FP8."""
        if name not in self._scales:
            return self.tensors[name][index]
        at, *columns = index
        return decode(self.rows(name, at.start, at.stop), self.form(name), F32)[(slice(None), *columns)]

    def load(self, mesh: Any = None, dtype: Any = None) -> DeepSeek:
        """Load the model onto a mesh; see `load_hf`."""
        self.check_copies()
        model = DeepSeek.abstract(self.cfg, mesh, jnp.bfloat16)

        def make(path: str, param: nnx.Variable, sharding: NamedSharding) -> jax.Array:
            abstract, row = param.get_value(), self.table.row_of(path)
            form = self.forms[path]
            kind = param_dtype(abstract, dtype, BF16 if form.quantized else form.dtype)

            def shard(index: Any) -> np.ndarray:
                at = tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, abstract.shape))
                out = np.empty([i.stop - i.start for i in at], kind)
                row.read(path, at, out, self.fetch)
                return out

            return jax.make_array_from_callback(abstract.shape, sharding, shard, dtype=kind)

        return fill(model, model.strategy.make_mesh(), make)


def raw_config(folder: Path) -> dict[str, Any]:
    """Return config.json as it is. Raises CheckpointError."""
    return read_json(folder / "config.json", CheckpointError)


def quantization_of(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return `quantization_config` of config.json, or None."""
    inner = hf.tower(raw)
    return inner.get("quantization_config") or inner.get("compression_config")


def block_of(path: Place, how: Mapping[str, Any] | str | None) -> tuple[int, int]:
    """Return the rows and columns of an FP8 scale block, where scales are of blocks.

    Raises CheckpointError for a quantisation that is not FP8.
    """
    if how is not None and not isinstance(how, dict):
        how = {"quant_method": f"quantization_config {brief(how)}"}
    known = how or {}
    method, block = known.get("quant_method", "fp8"), known.get("weight_block_size")
    eight = method in ("fp8", "fbgemm_fp8") or (method == "modelopt" and known.get("quant_algo") == "FP8")
    if method == "compressed-tensors" and isinstance(groups := known.get("config_groups"), dict):
        weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)]
        weights = [w for w in weights if isinstance(w, dict)]
        eight = {(w.get("type"), w.get("num_bits")) for w in weights} == {("float", 8)}
        block = next((w["block_structure"] for w in weights if w.get("block_structure")), block)
    block = [BLOCK, BLOCK] if block is None else block
    sound = isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)
    if not eight or not sound:
        raise CheckpointError(
            f"{path}: quantized by {brief(method)} with blocks {brief(block)}; expected weights that are not "
            "quantized, or FP8 with a scale for each tensor, row or block of two sizes. Fetch the originals"
        )
    return block[0], block[1]


def _wider(forms: set[Form]) -> Form:
    if len(forms) == 1:
        return next(iter(forms))
    plain = {BF16.name if f.quantized else f.kind for f in forms}
    return Form(plain.pop() if len(plain) == 1 else F32.name)


def _one_for_each_expert(tensors: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """Split fused tensors of so many experts: gate_up [E, 2F, D] is gate, then up; down is [E, D, F]."""
    out: dict[str, Tensor] = {}
    for name, t in tensors.items():
        parts = each_expert(name, experts) if len(t.shape) == 3 and t.shape[0] == experts else []
        if not parts:
            out[name] = t
            continue
        half = t.shape[1] // 2
        rows = {"gate": slice(0, half), "up": slice(half, None), "down": slice(None)}
        out |= {other: t.part(e, rows[part]) for other, e, part in parts}
    return out
