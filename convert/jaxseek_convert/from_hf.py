"""Hugging Face checkpoints to models: names and shapes are checked as a whole first, then shards are filled.

Every device's shard is read by itself from the memory-mapped files: just the layers, experts and rows that it
holds. On top of the model, memory holds one shard of one parameter at a time.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jaxseek.checkpoint import CheckpointError, param_dtype, raise_mismatch, same_bits
from jaxseek.config import ModelConfig
from jaxseek.model import DeepSeek
from jaxseek.sharding import fill, parameters
from jaxseek_convert.layout import Index
from jaxseek_convert.quantized import FP8, dequantize, scale_shape
from jaxseek_convert.safetensors_io import read_safetensors
from jaxseek_convert.table import Table, Tensors
from jaxseek_convert.to_hf import hf_arrays

log = logging.getLogger("jaxseek")

_IGNORED = "rotary_emb.inv_freq"  # buffers that old transformers saved
_FLOATS = tuple(np.dtype(t) for t in (jnp.bfloat16, np.float16, np.float32))


def load_hf(path: str | Path, mesh: Any = None, dtype: Any = None, mtp: bool = True) -> DeepSeek:
    """The model of a Hugging Face directory, on any mesh.

    Without `dtype` each parameter keeps its tensors' dtype (float32 where they are mixed; FP8 becomes
    bfloat16). Router biases are always float32. Without `mtp` the multi-token module is left out;
    files that lack it, as transformers saves them, give a model without one. Raises ConfigError or
    CheckpointError where config.json or the files cannot be used: every unknown, missing and misshapen tensor
    is named at once.
    """
    return HFCheckpoint(path, mtp).load(mesh, dtype)


class HFCheckpoint:
    """A Hugging Face checkpoint whose tensors were found to be those of its config, neither more nor less."""

    def __init__(self, path: str | Path, mtp: bool = True):
        self.path = Path(path)
        self.cfg = ModelConfig.from_hf(self.path)
        self._block = self._fp8_block()
        self.tensors = read_safetensors(self.path)
        self._scales = self._take_scales()
        self._choose_mtp(mtp)
        self.table = Table(self.cfg)
        self._check()

    # ---------------------------------------------------------------- what is there

    def _fp8_block(self) -> tuple[int, int]:
        raw = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        how = raw.get("quantization_config") or {}
        method, block = how.get("quant_method", "fp8"), how.get("weight_block_size", [128, 128])
        if method != "fp8" or not isinstance(block, list) or len(block) != 2:
            raise CheckpointError(
                f"{self.path}: quantized by {method!r} with blocks {block}; expected weights that are not "
                "quantized, or 'fp8' with two block sizes. Fetch the original weights"
            )
        return block[0], block[1]

    def _take_scales(self) -> dict[str, np.ndarray]:
        """The scales of the FP8 tensors, which are taken out of the tensors."""
        names = [name for name, t in self.tensors.items() if t.dtype == FP8]
        expected = {f"{n}_scale_inv": scale_shape(self.tensors[n].shape, self._block) for n in names}
        scales = {n: self.tensors.pop(n) for n in expected if n in self.tensors}
        raise_mismatch(
            f"{self.path}: FP8 tensors without their scales",
            {n: s.shape for n, s in scales.items()},
            expected,
            f"each needs one scale for a block of {list(self._block)}; fetch the files again",
        )
        return {n.removesuffix("_scale_inv"): s for n, s in scales.items()}

    def _choose_mtp(self, mtp: bool) -> None:
        """Settle whether there is a multi-token module; the tensors of one that is not wanted are dropped."""
        first, depths = self.cfg.num_hidden_layers, self.cfg.num_nextn_predict_layers
        prefixes = tuple(f"model.layers.{first + k}." for k in range(depths))
        theirs = {name for name in self.tensors if depths and name.startswith(prefixes)}
        if depths and mtp and not theirs:
            log.warning(
                "%s has no tensors of the multi-token module that its config names: none is loaded", self.path
            )
        if not mtp or not theirs:
            self.cfg = self.cfg.replace(num_nextn_predict_layers=0)
            self.tensors = {n: t for n, t in self.tensors.items() if n not in theirs}

    def _check(self) -> None:
        self.tensors = {n: t for n, t in self.tensors.items() if not n.endswith(_IGNORED)}
        expected, copies = {}, []
        fused = {  # parameters and layers that are read from a fused tensor
            (path, at[0])
            for name, row, at in self.table
            if row.kind == "fused" and name in self.tensors
            for path in row.paths
        }
        for name, row, at in self.table:
            here = name in self.tensors
            replaced = row.kind == "own" and any((path, at[0]) in fused for path in row.paths if at)
            if here or (row.kind == "own" and not replaced):
                expected[name] = row.layout.shape
            if here and row.kind in ("copy", "tied"):
                copies.append((name, row))
        cfg = self.cfg
        raise_mismatch(
            f"{self.path}: its tensors are not those of config.json's {cfg.model_type} with "
            f"{cfg.num_hidden_layers} layers",
            {n: t.shape for n, t in self.tensors.items()},
            expected,
            "Do config.json and the weights belong together, and is the download complete?",
        )
        if wrong := [n for n, t in self.tensors.items() if t.dtype not in (*_FLOATS, FP8)]:
            raise CheckpointError(
                f"{self.path}: {len(wrong)} tensors have a dtype that no weight has, such as {wrong[0]} "
                f"({self.tensors[wrong[0]].dtype}); expected bfloat16, float16, float32 or float8_e4m3fn"
            )
        for name, row in copies:
            self._check_copy(name, row)

    def _check_copy(self, name: str, row: Tensors) -> None:
        original = next(n for n, other, _ in self.table if other.kind == "own" and other.paths == row.paths)
        a, b = self.tensors[name], self.tensors[original]
        if same_bits(a, b) or (a.dtype != b.dtype and np.array_equal(a, b)):
            return
        advice = (
            "set tie_word_embeddings to false in config.json"
            if row.kind == "tied"
            else "leave the multi-token module out (mtp=False, or --no-mtp)"
        )
        raise CheckpointError(
            f"{self.path}: {name} should be a copy of {original}, but differs from it; {advice}"
        )

    @functools.cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        """Each parameter's dtype: its tensors', or float32, which holds the others, where they differ."""
        found: dict[str, set[np.dtype]] = {}
        for name, row, _ in self.table:
            if name in self.tensors and row.kind in ("own", "fused"):
                for path in row.paths:
                    found.setdefault(path, set()).add(self._dtype(name))
        return {
            path: kinds.pop() if len(kinds) == 1 else np.dtype(np.float32) for path, kinds in found.items()
        }

    def _dtype(self, name: str) -> np.dtype:
        dtype = self.tensors[name].dtype
        return np.dtype(jnp.bfloat16) if dtype == FP8 else dtype

    def origin(self, model: DeepSeek) -> dict[str, Any]:
        """What the model alone does not say, so that it can be written back as it was.

        `copies`: repetitions of parameters on disk. `dtypes`: those of tensors that differ from the
        parameter's.
        """
        held = {path: param.get_value().dtype for path, param in parameters(model).items()}
        present = [(name, row) for name, row, _ in self.table if name in self.tensors]
        return {
            "copies": [name for name, row in present if row.kind in ("copy", "tied")],
            "dtypes": {
                name: self._dtype(name).name
                for name, row in present
                if row.kind != "fused" and self._dtype(name) != held[row.paths[0]]
            },
        }

    def check(self, model: DeepSeek, progress: Callable[[int], Any] = lambda _: None) -> None:
        """Raise CheckpointError unless the tensors, cast as in the model, are what it would be written as."""
        for name, value in hf_arrays(model, self.table, self.tensors.keys()):
            stored = self.fetch(name, tuple(slice(0, n) for n in value.shape))
            if not same_bits(stored.astype(value.dtype, copy=False), value):
                raise CheckpointError(
                    f"{self.path}: {name} was read with other values at first; is the disk sound?"
                )
            progress(self.tensors[name].nbytes)

    def size(self, dtype: Any = None) -> int:
        """Bytes of the parameters, loaded in `dtype`."""
        values = self.table.params.items()
        return sum(v.size * param_dtype(v, dtype, self.dtypes[path]).itemsize for path, v in values)

    # ---------------------------------------------------------------- reading

    def fetch(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor: a view of the file, or float32 numbers where it is FP8."""
        if name in self._scales:
            return dequantize(self.tensors[name], self._scales[name], index, self._block)
        return self.tensors[name][index]

    def load(
        self, mesh: Any = None, dtype: Any = None, progress: Callable[[int], Any] = lambda _: None
    ) -> DeepSeek:
        """The model on a mesh; `progress` is told bytes as they are read. See `load_hf`."""
        model = DeepSeek.abstract(self.cfg, mesh, jnp.bfloat16)

        def make(path: str, param: nnx.Variable, sharding: NamedSharding) -> jax.Array:
            abstract = param.get_value()
            kind = param_dtype(abstract, dtype, self.dtypes[path])
            own, *fused = self.table.rows_of(path)

            def shard(index: Any) -> np.ndarray:
                at = tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, abstract.shape))
                out = np.empty([i.stop - i.start for i in at], kind)
                if not own.counts:
                    own.read(path, at, out, self.fetch)
                    progress(out.nbytes)
                else:
                    for l in range(at[0].start, at[0].stop):
                        row = next((f for f in fused if f.name_at((l,)) in self.tensors), own)
                        row.read(path, at[1:], out[l - at[0].start], self.fetch, l)
                        progress(out[0].nbytes)
                return out

            return jax.make_array_from_callback(abstract.shape, sharding, shard, dtype=kind)

        return fill(model, model.strategy.make_mesh(), make)
