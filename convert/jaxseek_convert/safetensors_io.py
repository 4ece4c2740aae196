"""Safetensors files: a memory-mapped reader of one file or of an index, and a writer in shards.

The reader is our own because safetensors cannot give FP8 or parts of bfloat16 to NumPy; the writer because it
streams, so that a checkpoint never has to be in memory whole. A file is a header length (8 bytes, little
endian), the header (JSON: name to dtype, shape and offsets), and the bytes of the tensors in order, no gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxseek.checkpoint import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000
_MAX_HEADER = 100_000_000  # the format's own limit
_AGAIN = "the file is damaged or its download is incomplete: fetch it again"
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I8": np.int8,
        "U8": np.uint8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
        "BOOL": np.bool_,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Spec = tuple[tuple[int, ...], np.dtype]  # of a tensor to be written


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a file, or of a directory with an index or with files, as read-only memory-mapped
    arrays.

    Raises CheckpointError for a directory without safetensors, a truncated or damaged file, an index that
    names files or tensors which are not there, and a tensor that two files hold.
    """
    path = Path(path)
    if path.is_file():
        return _read_file(path)
    index = _read_index(path) if (path / INDEX).is_file() else None
    files = (
        sorted(set(index.values()))
        if index is not None
        else sorted(f.name for f in path.glob("*.safetensors"))
    )
    if not files:
        torch = sorted(f.name for f in path.glob("*.bin"))
        hint = f"; it holds {torch[0]}: save it as safetensors with transformers first" if torch else ""
        raise CheckpointError(f"{path}: no {INDEX} and no .safetensors file{hint}")
    if absent := [f for f in files if not (path / f).is_file()]:
        raise CheckpointError(
            f"{path / INDEX}: names {len(files)} files, of which {len(absent)} are absent ({_some(absent)}); "
            "fetch them"
        )
    tensors: dict[str, np.ndarray] = {}
    home: dict[str, str] = {}
    for file in files:
        found = _read_file(path / file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(
                f"{path}: {len(twice)} tensors stand in two files, such as {twice[0]} in {home[twice[0]]} "
                f"and {file}; remove the files that do not belong to this checkpoint"
            )
        tensors |= found
        home |= dict.fromkeys(found, file)
    if index is not None and home != index:
        wrong = sorted(name for name in home.keys() | index.keys() if home.get(name) != index.get(name))
        name = wrong[0]
        raise CheckpointError(
            f"{path / INDEX}: does not fit its files in {len(wrong)} tensors, such as {name}: the index has "
            f"it in {index.get(name, 'no file')}, it is in {home.get(name, 'no file')}; fetch them all again"
        )
    return tensors


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _read_index(path: Path) -> dict[str, str]:
    where = path / INDEX
    try:
        index = json.loads(where.read_text(encoding="utf-8"))["weight_map"]
        if all(Path(file).name == file for file in index.values()):
            return index
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise CheckpointError(
        f'{where}: expected JSON with "weight_map", tensor names to file names; fetch it again'
    )


def _read_file(path: Path) -> dict[str, np.ndarray]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = int.from_bytes(file.read(8), "little")
        if size < 8 or head > min(size - 8, _MAX_HEADER):
            raise CheckpointError(
                f"{path}: the header should have {head} bytes, the file has {size}; {_AGAIN}"
            )
        raw = file.read(head)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = sorted(
            (tuple(e["data_offsets"]), name, e["dtype"], tuple(e["shape"])) for name, e in header.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(
            f"{path}: the header cannot be read ({type(e).__name__}: {e}); {_AGAIN}"
        ) from None
    body = 8 + head
    expected = body + max((stop for (_, stop), *_ in entries), default=0)
    if size != expected:
        raise CheckpointError(
            f"{path}: the header describes {expected:,} bytes, the file has {size:,}; {_AGAIN}"
        )
    data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    tensors, end = {}, 0
    for (start, stop), name, kind, shape in entries:
        if kind not in DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {kind}; known: {', '.join(DTYPES)}")
        need = math.prod(shape) * DTYPES[kind].itemsize
        if start != end or stop - start != need or any(n < 0 for n in shape):
            raise CheckpointError(
                f"{path}: {name} ({kind}, shape {list(shape)}) should take {need} bytes from {end}, "
                f"the header says {start}..{stop}; {_AGAIN}"
            )
        tensors[name] = data[body + start : body + stop].view(DTYPES[kind]).reshape(shape)
        end = stop
    return tensors


def write_safetensors(
    directory: Path,
    specs: Mapping[str, Spec],
    arrays: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors in the order of `specs`, into `model.safetensors` or into shards with an index.

    `arrays` gives the same names in the same order. Each file gets its name when it is whole; the index is
    last.
    """
    shards = _plan(specs, max_shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    stream = iter(arrays)
    for shard, file in zip(shards, [SINGLE] if len(shards) == 1 else names):
        partial = directory / f"{file}.partial"
        with partial.open("wb") as out:
            out.write(_header({name: specs[name] for name in shard}))
            for expected in shard:
                name, array = next(stream)
                assert (name, (array.shape, array.dtype)) == (expected, specs[expected]), (name, expected)
                out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        os.replace(partial, directory / file)
    if len(shards) > 1:
        where = {name: file for shard, file in zip(shards, names) for name in shard}
        index: dict[str, Any] = {"metadata": {"total_size": bytes_of(specs)}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def bytes_of(specs: Mapping[str, Spec]) -> int:
    """Bytes of all these tensors."""
    return sum(map(_nbytes, specs.values()))


def _nbytes(spec: Spec) -> int:
    return math.prod(spec[0]) * spec[1].itemsize


def _plan(specs: Mapping[str, Spec], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = most
    for name, spec in specs.items():
        if shards[-1] and _nbytes(spec) > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= _nbytes(spec)
    return shards


def _header(specs: Mapping[str, Spec]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (shape, dtype) in specs.items():
        stop = start + _nbytes((shape, dtype))
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the tensors start aligned
    return len(raw).to_bytes(8, "little") + raw
