"""Write Hugging Face checkpoints tensor by tensor, copying one layer of one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseek.checkpoint.directory import CheckpointError, new_directory
from jaxseek.checkpoint.models import (
    Savable,
    main_dtype,
    param_dtype,
    same_bits,
    save_beside,
    write_json,
)
from jaxseek.experts.replicate import raise_slots
from jaxseek.model.deepseek import DeepSeek
from jaxseek.sharding.parameters import parameters
from jaxseek_convert.numbers import Form, Rows, to_blocks
from jaxseek_convert.safetensors_io import (
    MAX_SHARD_BYTES,
    Shards,
    Spec,
    bytes_of,
    read_safetensors,
    write_safetensors,
)
from jaxseek_convert.table import Table


def save_hf(
    model: DeepSeek,
    path: str | Path,
    dtype: Any = None,
    tokenizer: Savable | None = None,
    *,
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    check: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], Any] = lambda _: None,
) -> None:
    """Write a directory that transformers and others load: safetensors, config.json, tokenizer files.

    Without `dtype`, tensors have the dtype of their parameters or, with `origin` (HFCheckpoint.origin), of
    the source. The multi-token module's copies of embedding and head are written unless the source lacked
    them. With `check`, every tensor is read back and compared before the directory gets its name. Raises
    CheckpointError if the destination exists or the disk is full.
    """
    table, specs = Table(model.cfg), hf_specs(model, dtype, origin)

    def cast() -> Iterator[tuple[str, np.ndarray]]:
        for name, value in hf_arrays(model, table, specs.keys()):
            value = value.astype(specs[name][1], copy=False)
            progress(value.nbytes)
            yield name, value

    with new_directory(path, bytes_of(specs), overwrite) as partial:
        write_safetensors(partial, specs, cast(), max_shard_bytes)
        if check:
            back = read_safetensors(partial)
            for name, value in cast():
                if not same_bits(back[name], value):
                    raise CheckpointError(
                        f"{path}: {name} was read back with other values; is the disk sound?"
                    )
        write_json(partial / "config.json", model.cfg.replace(dtype=main_dtype(specs.values())).to_hf())
        save_beside(partial, model, tokenizer)


class HFSink:
    """Safetensors files to write, tensor by tensor."""

    def __init__(
        self,
        table: Table,
        forms: Mapping[str, Form],
        dtypes: Mapping[str, str] | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ):
        """`forms` has the tensors to write, `dtypes` the dtypes of scales that are not float32."""
        self.forms = forms
        self.tensors = {name: (row, at) for name, row, at in table if name in forms}
        specs: dict[str, Spec] = {}
        for name, (row, _) in self.tensors.items():
            shape, form = row.layout.shape, forms[name]
            specs[name] = (shape, form.dtype)
            if form.quantized:
                key, blocks = f"{name}_scale_inv", (-(-shape[0] // form.block), form.groups(shape[1]))
                specs[key] = (blocks, jnp.dtype((dtypes or {}).get(key, "float32")))
        self.shards = Shards(specs, max_shard_bytes)
        self.files, self.headers = self.shards.files, self.shards.headers

    def form(self, name: str) -> Form:
        """Return the form that the rows of a tensor must have."""
        return self.forms[name]

    def put(self, name: str, first: int, rows: Rows) -> Iterator[tuple[str, str, int, np.ndarray]]:
        """Yield the writes for rows of a tensor, in order: (digest name, file, offset, bytes)."""
        yield self._part(name, first, rows.values)
        if rows.scale is not None:
            form, key = self.forms[name], f"{name}_scale_inv"
            scale = to_blocks(rows.scale, form).astype(self.shards.specs[key][1], copy=False)
            yield self._part(key, first // form.block, scale)

    def spans(self, name: str) -> Iterator[tuple[str, str, int, int]]:
        """Yield the byte ranges of a tensor, in order: (digest name, file, offset, length)."""
        for key in (name, f"{name}_scale_inv") if self.forms[name].quantized else (name,):
            yield key, *self.shards.place[key], bytes_of({key: self.shards.specs[key]})

    def _part(self, name: str, first: int, data: np.ndarray) -> tuple[str, str, int, np.ndarray]:
        file, start = self.shards.place[name]
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        return name, file, start + first * (raw.nbytes // len(data)), raw


def hf_specs(model: DeepSeek, dtype: Any = None, origin: Mapping[str, Any] | None = None) -> dict[str, Spec]:
    """Return shapes and dtypes of the tensors that `save_hf` writes, in order."""
    raise_slots(model)
    origin, table = origin or {}, Table(model.cfg)
    dtypes = {path: param.get_value().dtype for path, param in parameters(model).items()}
    if dtypes.keys() != table.params.keys():
        raise ValueError("this model has other stacks than its config: save the one it was unrolled from")
    owned = {name for name, row, _ in table if row.kind == "own"}
    names = owned.union(origin["copies"]) if "copies" in origin else table.names()
    kept = origin.get("dtypes", {}) if dtype is None else {}

    def kind(name: str, path: str) -> np.dtype:
        return jnp.dtype(kept.get(name, param_dtype(table.params[path], dtype, dtypes[path])))

    return {name: (row.layout.shape, kind(name, row.paths[0])) for name, row, _ in table if name in names}


def hf_arrays(model: DeepSeek, table: Table, names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors in `names` as a Hugging Face checkpoint of the model has them, in table order."""
    arrays = {path: v.get_value() for path, v in parameters(model).items()}
    for section in table.sections:
        for layer in np.ndindex(section[0].counts[:1]):
            for row in section:
                rests = [r for r in np.ndindex(row.counts[1:]) if row.name_at(layer + r) in names]
                values = [on_host(arrays[p], layer if row.counts else ()) for p in row.paths] if rests else []
                for rest in rests:
                    yield row.name_at(layer + rest), row.layout.join([v[rest] for v in values])


def on_host(array: jax.Array, layer: tuple[int, ...]) -> np.ndarray:
    """Gather one layer of a parameter (all of it if `layer` is empty) from the devices to the host.

    Raises CheckpointError if the array is spread over several hosts.
    """
    if not array.is_fully_addressable:
        raise CheckpointError(
            "the model is spread over several hosts; save a checkpoint and export that on one host"
        )
    out = np.empty(array.shape[len(layer) :], array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            # layers are never sharded; CPU arrays are in host memory, other devices transfer just the layer
            piece = shard.data
            if layer and shard.device.platform != "cpu":
                piece = jax.lax.dynamic_index_in_dim(piece, layer[0], keepdims=False)
                value = np.asarray(piece)
            else:
                value = np.asarray(piece)[layer]
            if value.shape == out.shape:
                return value
            out[shard.index[len(layer) :]] = value
    return out
