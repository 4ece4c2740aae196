"""Model checkpoints: a directory that Orbax restores directly onto any mesh, in any dtype.

    config.json     the model config, in Hugging Face's format
    params/         Orbax: one array per parameter, named by its dotted path
    jaxseek.json    format version, shapes and dtypes, quantised matrices and their group sizes, file sizes,
                    and the origin of the weights
    digests.json    digests of all these files (digests.py), which `restore` compares
    tokenizer files, if there is a tokenizer; generation_config.json, if the model has one

A quantised matrix is two arrays, PATH.value and PATH.scale (model/weight.py). int4 values are packed into
bytes (ops/int4.py), while jaxseek.json gives their logical shape and dtype.

A checkpoint is written beside its destination and renamed once complete, so a directory with the final name
is complete.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jaxseek.checkpoint import digests
from jaxseek.checkpoint.digests import Digests
from jaxseek.checkpoint.directory import (
    MANIFEST,
    PARTIAL,
    CheckpointError,
    adapter_at,
    kind_of,
    left,
    new_directory,
    orbax_writes,
)
from jaxseek.checkpoint.store import LAYOUT, Array
from jaxseek.config.formats import Spec
from jaxseek.config.model import ModelConfig, presets
from jaxseek.experts.replicate import raise_slots
from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.weight import MATRICES, quantization, quantized
from jaxseek.ops import int4
from jaxseek.sharding.parameters import fill, parameters
from jaxseek.storage.hub import HUB, hub_hint, model_place
from jaxseek.storage.place import Place, Remote, file_sizes, local_tree, place, write_text
from jaxseek.storage.untrusted import brief, expect, parse_json, raise_irregular, read_bytes

FORMAT = 1
DTYPES = ("bfloat16", "float16", "float32")
_STORED = (*DTYPES, "float8_e4m3fn", "float8_e8m0fnu", "int8", "int4", "uint8")  # dtypes of arrays
_FORM = {  # of the manifest, in the terms of `untrusted.expect`
    "format": int,
    "params": {str: {"shape": [int], "dtype": str}},
    "origin": {"copies?": [str], "dtypes?": {str: str}, "quantization?": (dict, str, None)},
    "files": {str: int},
    "quantization?": {str: (int, None)},
    "layout?": str,
}
_CHUNK_BYTES = 64 << 20  # storage chunk: the smallest read, and the smallest write that replicas share


class Savable(Protocol):
    """A tokenizer to save beside the weights."""

    def save(self, path: Place, /) -> None: ...


def save(
    model: DeepSeek,
    path: str | Place,
    tokenizer: Savable | None = None,
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    check: bool = False,
) -> None:
    """Write a checkpoint, each parameter in its own dtype. Every host must call this.

    `origin` goes into the manifest (`read_manifest`). With `overwrite`, an older checkpoint is replaced once
    this one is complete. With `check`, every parameter is read back and compared first. Raises
    CheckpointError if the destination exists or the disk is full.
    """
    raise_slots(model)
    arrays, specs = {p: v.get_value() for p, v in parameters(model).items()}, quantization(model)
    plain = arrays.keys() - {f"{p}.{part}" for p in specs for part in ("value", "scale")}
    if plain | specs.keys() != parameters(DeepSeek.abstract(model.cfg)).keys():
        raise ValueError("this model has other stacks than its config: save the one it was unrolled from")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "params": {p: {"shape": list(a.shape), "dtype": a.dtype.name} for p, a in arrays.items()},
        "origin": dict(origin or {}),
    }
    if specs:
        manifest["quantization"] = {p: spec.group for p, spec in specs.items()}
    arrays = {p: _as_stored(p, a, model.mesh) for p, a in arrays.items()}
    path = place(path)
    with new_directory(path, sum(a.nbytes for a in arrays.values()), overwrite) as partial:
        weights = path if isinstance(path, Remote) and orbax_writes(path) else partial
        _orbax_save(weights / "params", arrays)
        if check:
            _check(weights / "params", arrays)
        noted = digests.note_shared(weights / "params")
        if jax.process_index() == 0:
            write_json(partial / "config.json", model.cfg.replace(dtype=stored_dtype(model)).to_hf())
            save_beside(partial, model, tokenizer)
            manifest["files"] = dict(sorted((file_sizes(weights) | file_sizes(partial)).items()))
            write_json(partial / MANIFEST, manifest)
            besides = (name for name in file_sizes(partial) if not name.startswith("params/"))
            noted = {f"params/{name}": found for name, found in noted.items()}
            digests.write(partial, noted | digests.note(partial, besides))


def save_beside(folder: Place, model: DeepSeek, tokenizer: Savable | None) -> None:
    """Write the tokenizer's files, and how to sample from the model, which may be read without the former."""
    if tokenizer is not None:
        tokenizer.save(folder)
    if model.cfg.generation:
        write_json(folder / "generation_config.json", model.cfg.generation)


def restore(path: str | Place, mesh: Any = None, dtype: Any = None, mtp: bool = True) -> DeepSeek:
    """Load the model of a checkpoint onto a mesh.

    `dtype` casts all parameters but quantised ones and those that are always float32. Without `mtp` the
    multi-token module is left out. Raises CheckpointError if the directory is not a checkpoint, is
    incomplete or damaged, has a newer format, or does not match its config.
    """
    path = place(path)
    manifest = read_manifest(path)
    if isinstance(path, Remote) and not orbax_writes(path) and manifest.get("layout") != LAYOUT:
        path = local_tree(path)
    raise_incomplete(path, manifest["files"])
    noted = Digests.of(path)
    noted.check_small()
    stored, cfg = manifest["params"], ModelConfig.from_hf(path / "config.json")
    if not mtp:
        cfg = cfg.replace(num_nextn_predict_layers=0)
        stored = {p: h for p, h in stored.items() if not p.startswith("mtp.")}
    model = DeepSeek.abstract(cfg, mesh, jnp.bfloat16)
    specs = {p: spec for p, spec in stored_quantization(manifest).items() if p in parameters(model)}
    model = quantized(model, specs)
    expected = {p: v.get_value() for p, v in parameters(model).items()}
    raise_mismatch(
        f"{path / MANIFEST} and config.json do not fit each other",
        {p: tuple(h["shape"]) for p, h in stored.items()},
        {p: a.shape for p, a in expected.items()},
        "they were written together: restore the original config.json",
    )
    mesh = model.strategy.make_mesh()
    shardings = {p: _stored_sharding(p, a, mesh) for p, a in expected.items()}
    shapes = {
        p: int4.packed_shape(a.shape, _packed_axis(p)) if a.dtype == jnp.int4 else a.shape
        for p, a in expected.items()
    }
    dtypes = {p: param_dtype(a, dtype, stored[p]["dtype"]) for p, a in expected.items()}
    dtypes |= {p: np.dtype(np.uint8) for p, kind in dtypes.items() if kind == jnp.int4}
    flat = manifest.get("layout") == LAYOUT
    if not flat:
        noted.check()
    if flat:
        arrays = {p: _from_store(path, p, shapes[p], shardings[p], dtypes[p], noted) for p in shapes}
    else:
        arrays = _orbax_restore(path / "params", shapes, shardings, dtypes)

    def value(p: str, param: nnx.Variable, sharding: NamedSharding) -> jax.Array:
        array, abstract = arrays.pop(p), param.get_value()
        if abstract.dtype != jnp.int4:
            return array
        return _unpack(array, abstract.shape[_packed_axis(p)], _packed_axis(p), sharding)

    with jax.set_mesh(mesh):
        return fill(model, mesh, value)


def _from_store(
    path: Place, name: str, shape: tuple[int, ...], sharding: Sharding, dtype: Any, noted: Digests
) -> jax.Array:
    """Load an array of a conversion store, reading only the chunks of this host's shards."""
    array = Array.of(path, name)
    if array.shape != shape:
        raise CheckpointError(
            f"{path / 'params' / name}: its zarr.json has shape {list(array.shape)}, {MANIFEST} "
            f"{list(shape)}; copy the checkpoint again"
        )

    def shard(index: Any) -> np.ndarray:
        at = tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, array.shape))
        return array.read(path, at, dtype, noted.check_file)

    return jax.make_array_from_callback(array.shape, sharding, shard, dtype=dtype)


def read_manifest(path: Place) -> dict[str, Any]:
    """Read `jaxseek.json` of a checkpoint. Raises CheckpointError as `restore` does."""
    where = str(path / MANIFEST)
    try:
        raw = read_bytes(path / MANIFEST, CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(_why_not(path)) from None
    if (path / digests.NAME).is_file():
        Digests.noted(path).check_file(MANIFEST, np.frombuffer(raw, np.uint8))
    manifest = parse_json(raw, where, CheckpointError)
    if manifest.get("format", FORMAT) != FORMAT:
        version = brief(manifest["format"])
        raise CheckpointError(f"{path}: has format {version}, this jaxseek reads {FORMAT}; update jaxseek")
    expect(manifest, _FORM, where, CheckpointError)
    params = manifest["params"]
    for p, group in manifest.get("quantization", {}).items():
        if group == 0:
            raise CheckpointError(f"{where}: quantization.{p} is 0, expected the size of a group or null")
        if lost := [n for n in (f"{p}.value", f"{p}.scale") if n not in params]:
            raise CheckpointError(f"{where}: quantization names {p}, but params has no {lost[0]}")
    kinds = [(f"params.{p}.dtype", held["dtype"]) for p, held in params.items()]
    kinds += [(f"origin.dtypes.{n}", kind) for n, kind in manifest["origin"].get("dtypes", {}).items()]
    for key, kind in kinds:
        if kind not in _STORED:
            raise CheckpointError(f"{where}: {key} is {brief(kind)}, expected one of {', '.join(_STORED)}")
    return manifest


def stored_quantization(manifest: Mapping[str, Any]) -> dict[str, Spec]:
    """Return the quantisation of each quantised parameter in a manifest, by path."""
    groups = manifest.get("quantization", {})
    return {p: Spec(manifest["params"][f"{p}.value"]["dtype"], group) for p, group in groups.items()}


def raise_incomplete(path: Place, files: Mapping[str, int]) -> None:
    """Raise CheckpointError if files in params/ are missing or resized, which Orbax is slow to notice."""
    found = file_sizes(path / "params")
    expected = {name.removeprefix("params/"): n for name, n in files.items() if name.startswith("params/")}
    if wrong := [name for name in expected if found.get(name) != expected[name]]:
        name = wrong[0]
        raise CheckpointError(
            f"{path}: {len(wrong)} of {len(expected)} files in params/ are not as they were written, such as "
            f"{name} ({found.get(name, 'no')} bytes, expected {expected[name]}); copy the checkpoint again"
        )


def not_a_checkpoint(path_or_preset: str | Place) -> CheckpointError:
    """Build the error for a name that has no weights, with advice for what it seems to be."""
    path, known = model_place(path_or_preset, weights=False), presets()
    name = path.name.lower()
    if name in known and not path.exists():
        if name.startswith("tiny-"):
            return CheckpointError(f"{name}: is a preset with random weights, so there is nothing to convert")
        source = known[name].read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        return CheckpointError(
            f"{name}: is the name of a released model, whose weights are not part of jaxseek. Convert them "
            f"into a directory of that name: jaxseek convert {HUB}{source} {name}"
        )
    if path.name.endswith(".gguf") and path.is_file():
        return CheckpointError(f"{path}: is a GGUF file; convert it first: jaxseek convert {path} DST")
    for marker in (path / "config.json", path / MANIFEST):
        if isinstance(marker, Path) and marker.exists():
            raise_irregular(marker, CheckpointError)
    if adapter := adapter_at(path):
        return CheckpointError(adapter)
    what = f"exists, but is none{_inside(path)}" if path.exists() else f"does not exist{left(path)}"
    near = difflib.get_close_matches(name, known, 3, 0.4)
    hint = hub_hint(path_or_preset) or (
        f"; presets with a similar name: {', '.join(near)}"
        if near
        else "; jaxseek info --list names the presets"
    )
    return CheckpointError(
        f"{path}: expected a jaxseek checkpoint (a directory with {MANIFEST}), a Hugging Face directory "
        f"(with config.json) or the name of a preset; this {what}{hint}"
    )


def _inside(path: Place) -> str:
    """Name what lies in a folder that is no checkpoint itself."""
    if not isinstance(path, Path) or not path.is_dir():
        return ""
    below = sorted(p.parent for pattern in ("*", "snapshots/*") for p in path.glob(f"{pattern}/config.json"))
    if below:
        return f", but holds {' and '.join(map(str, below[-2:]))}: give one of these"
    parts = sorted(
        p.name for pattern in ("zero_to_fp32.py", "*.distcp", "*.bin", "*.pth") for p in path.glob(pattern)
    )
    return f", but holds {parts[0]}: save the model as Hugging Face safetensors first" if parts else ""


def _why_not(path: Place) -> str:
    if (path / "params").is_dir() or path.name.endswith(PARTIAL):
        return f"{path}: has no {MANIFEST}, so the save was interrupted; save it again"
    if kind_of(path) == "hf":
        return f"{path}: is a Hugging Face checkpoint; convert it first (jaxseek convert {path} DST)"
    if not path.exists():
        return f"{path}: no such checkpoint{left(path)}{hub_hint(path)}"
    return f"{path}: is no checkpoint; expected a directory with {MANIFEST}, config.json and params/"


# -------------------------------------------------------------------- shared with the converter


def parse_dtype(dtype: Any) -> np.dtype:
    """Return a weight dtype by name. Raises CheckpointError for any other."""
    with contextlib.suppress(TypeError):
        if jnp.dtype(dtype).name in DTYPES:
            return jnp.dtype(dtype)
    raise CheckpointError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")


def param_dtype(abstract: jax.ShapeDtypeStruct, dtype: Any, source: Any) -> np.dtype:
    """Return a parameter's dtype: `dtype`, or else `source`.

    A parameter that is not bfloat16 in a bfloat16 model has a fixed dtype and keeps it.
    """
    if abstract.dtype != jnp.bfloat16:
        return np.dtype(abstract.dtype)
    return parse_dtype(source if dtype is None else dtype)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether dtype, shape and every bit are equal."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    bits = f"u{a.itemsize}"
    return np.array_equal(a.view(bits), b.view(bits))


def main_dtype(specs: Iterable[tuple[tuple[int, ...], np.dtype]]) -> str:
    """Return the dtype with the most elements, which config.json names."""
    count = Counter()
    for shape, dtype in specs:
        count[dtype.name] += math.prod(shape)
    return count.most_common(1)[0][0]


def stored_dtype(model: DeepSeek) -> str:
    """Return the dtype with the most weights, not counting quantised ones."""
    specs = quantization(model)
    values = (v.get_value() for p, v in parameters(model).items() if p.rpartition(".")[0] not in specs)
    return main_dtype((v.shape, v.dtype) for v in values)


def write_json(path: Place, value: Any, indent: int | None = 2) -> None:
    """Write a value as JSON, atomically."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def raise_mismatch(
    what: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], advice: str
) -> None:
    """Raise one CheckpointError that lists all missing, unknown and misshapen names, if there are any."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{n} is {list(found[n])}, expected {list(expected[n])}"
            for n in expected
            if n in found and tuple(found[n]) != tuple(expected[n])
        ],
    }
    lines = [
        f"  {len(names)} {problem}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for problem, names in problems.items()
        if names
    ]
    if lines:
        raise CheckpointError("\n".join([f"{what}:", *lines, f"  {advice}"]))


# -------------------------------------------------------------------- Orbax


def _check(path: Place, arrays: dict[str, jax.Array]) -> None:
    """Read parameters back, one at a time. Raises CheckpointError unless all bits are equal."""

    def survived(p: str, a: jax.Array) -> bool:
        back = _orbax_restore(path, {p: a.shape}, {p: a.sharding}, {p: a.dtype})[p]
        shards = zip(a.addressable_shards, back.addressable_shards)
        return all(same_bits(np.asarray(x.data), np.asarray(y.data)) for x, y in shards)

    for p, a in arrays.items():
        if not survived(p, a):
            raise CheckpointError(f"{path.parent}: {p} was read back with other values; is the disk sound?")


def _packed_axis(path: str) -> int:
    """Return the (negative) axis along which int4 values are packed in pairs: the last contracted axis."""
    name = path.split(".")[-2]
    letters = name.rsplit("_", 1)[1]
    return letters.index(MATRICES[name][-1]) - len(letters)


def _stored_sharding(path: str, a: Any, mesh: Mesh) -> NamedSharding:
    """Return the sharding of a stored array: the packed axis is replicated if a shard would split a byte."""
    spec = [*a.sharding.spec, *(None,) * (a.ndim - len(a.sharding.spec))]
    if a.dtype == jnp.int4 and spec[_packed_axis(path)] is not None:
        axes = spec[_packed_axis(path)]
        parts = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
        if a.shape[_packed_axis(path)] % (2 * parts):
            spec[_packed_axis(path)] = None
    return NamedSharding(mesh, P(*spec))


def _as_stored(path: str, a: jax.Array, mesh: Mesh) -> jax.Array:
    if a.dtype != jnp.int4:
        return a
    sharding, axis = _stored_sharding(path, a, mesh), _packed_axis(path)
    with jax.set_mesh(mesh):
        return jax.jit(lambda values: int4.pack(jax.sharding.reshard(values, sharding), axis))(a)


@functools.partial(jax.jit, static_argnames=("size", "axis", "sharding"))
def _unpack(stored: jax.Array, size: int, axis: int, sharding: NamedSharding) -> jax.Array:
    return jax.sharding.reshard(int4.unpack(stored, size, axis), sharding)


def _unchunked_axes(path: str, a: jax.Array) -> tuple[int, ...]:
    """Return the axes with chunk size 1 in a large array: layers and experts, which are converted singly."""
    # skip the .value or .scale of a quantised matrix
    name = next(part for part in reversed(path.split(".")) if "_" in part)
    letters = name.rsplit("_", 1)[1]
    lead = a.ndim - len(letters) + letters.startswith("E")
    return tuple(range(lead)) if a.nbytes > _CHUNK_BYTES else ()


def orbax_writers() -> Any:
    """Return Orbax's array handlers with a minimum slice size for replica-parallel writes.

    Without it, Orbax splits every small array between its replicas, and compiles a program for each.
    """
    import orbax.checkpoint as ocp

    writer = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_CHUNK_BYTES)
    return ocp.type_handlers.create_type_handler_registry((jax.Array, writer))


def orbax_place(at: Place) -> Any:
    """Return the path for Orbax; for a store that it does not support, that of a local copy to read."""
    from etils import epath

    if isinstance(at, Remote):
        return epath.Path(str(at)) if orbax_writes(at) else epath.Path(local_tree(at))
    return epath.Path(at.absolute())


def _orbax_save(path: Place, arrays: dict[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp  # slow: a third of a second

    args = {
        p: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=_unchunked_axes(p, a))
        for p, a in arrays.items()
    }
    largest = max(shard.data.nbytes for a in arrays.values() for shard in a.addressable_shards)
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=orbax_writers(),
        use_compression=False,  # a fifth smaller, but two to three times slower
        save_concurrent_gb=1 + -(-largest // 10**9),  # more would copy the whole model at once
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(orbax_place(path), args=ocp.args.PyTreeSave(arrays, save_args=args))


def _orbax_restore(
    path: Place,
    shapes: Mapping[str, tuple[int, ...]],
    shardings: Mapping[str, Sharding],
    dtypes: Mapping[str, np.dtype],
) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    args = {
        p: ocp.ArrayRestoreArgs(sharding=shardings[p], global_shape=shape, dtype=dtypes[p])
        for p, shape in shapes.items()
    }
    wanted = ocp.args.PyTreeRestore(dict.fromkeys(args, 0), restore_args=args, partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(orbax_place(path), args=wanted)
    except Exception as e:  # Orbax's readers raise errors of many classes on damaged files
        raise CheckpointError(
            f"{path}: cannot be restored, so the checkpoint is damaged or its copy incomplete "
            f"({type(e).__name__}: {str(e)[:500]})"
        ) from e
