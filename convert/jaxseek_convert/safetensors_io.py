"""Safetensors files: locate tensors in a file or an indexed directory, and write sharded files.

The reader is our own because safetensors cannot return FP8 or slices of bfloat16 to NumPy; the writer because
it streams and never holds a whole checkpoint in memory. A file is the header length (8 bytes, little endian),
the header (JSON: name to dtype, shape and offsets), and the tensors' bytes, without gaps.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxseek.checkpoint.directory import CheckpointError, adapter_at
from jaxseek.storage.place import Place
from jaxseek.storage.untrusted import MOST_BYTES, brief, expect, parse_json, read_json
from jaxseek_convert.files import File, RemoteFile, open_file
from jaxseek_convert.names import some

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000
_MOST_AXES = 8  # of a tensor
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
Spec = tuple[tuple[int, ...], np.dtype]  # shape and dtype


@dataclass(frozen=True)
class Tensor:
    """Location of a tensor in a file; none of its data is in memory."""

    file: File | RemoteFile
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte offset in the file

    @property
    def nbytes(self) -> int:
        return _nbytes((self.shape, self.dtype))

    def rows(self, first: int, last: int) -> np.ndarray:
        """Return rows [first, last), in a buffer that this thread's next read overwrites."""
        size = _nbytes((self.shape[1:], self.dtype))
        raw = self.file.read(self.start + first * size, self.start + last * size)
        return raw.view(self.dtype).reshape(last - first, *self.shape[1:])

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return a slice: a view for a local file, a copy for a remote one."""
        raw = self.file.view(self.start, self.start + self.nbytes)
        return raw.view(self.dtype).reshape(self.shape)[index]

    def part(self, *at: int | slice) -> Tensor:
        """Return the sub-tensor at leading indices, of which the last is a slice."""
        shape, start = list(self.shape), self.start
        for i in at:
            size = _nbytes((tuple(shape[1:]), self.dtype))
            first, last, _ = i.indices(shape[0]) if isinstance(i, slice) else (i, i + 1, 1)
            start += first * size
            shape = [last - first, *shape[1:]] if isinstance(i, slice) else shape[1:]
        return Tensor(self.file, self.dtype, tuple(shape), start)


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Return every tensor of a file or directory as a read-only mapped array; raises as `find_tensors`."""
    return {name: tensor[...] for name, tensor in find_tensors(Path(path)).items()}


def find_tensors(path: Place) -> dict[str, Tensor]:
    """Locate every tensor of a file or directory; see `locate`."""
    return locate(path)[0]


def locate(path: Place) -> tuple[dict[str, Tensor], list[str]]:
    """Locate every tensor of a file, or of a directory, and tell what is odd about its files.

    Raises CheckpointError for a directory without a model's safetensors, a truncated or damaged file, absent
    files, and a tensor that is in two files.
    """
    if isinstance(path, Path) and path.is_file():
        return _read_file(File(path)), []
    files, index, notes = weight_files(path)
    tensors: dict[str, Tensor] = {}
    home: dict[str, str] = {}
    for file in files:
        found = _read_file(open_file(path / file))
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
        notes.append(
            f"{path / INDEX}: does not fit its files in {len(wrong)} tensors, such as {name}: the index has "
            f"it in {index.get(name, 'no file')}, it is in {home.get(name, 'no file')}"
        )
    return tensors, notes


def weight_files(path: Place) -> tuple[list[str], dict[str, str] | None, list[str]]:
    """Choose the files that are the model, as transformers does; return them, their index, and notes.

    `model.safetensors` is the model whatever lies beside it. Else it is the files that the index names, or,
    if some of these are absent or there is no index, a whole set of numbered shards, or all files that are no
    adapter and not in the authors' own layout. Raises CheckpointError if there are none.
    """
    there = {found.name for found in path.glob("*")}
    weights = {name for name in there if name.endswith(".safetensors")}
    index = read_index(path) if INDEX in there else None
    listed = set() if index is None else set(index.values())
    absent = sorted(listed - weights)
    files, parts = _shards(weights)
    if SINGLE in weights:
        files = [SINGLE]
    elif listed and not absent:
        files = sorted(listed)
    elif not files and absent:
        raise CheckpointError(
            f"{path / INDEX}: names {len(listed)} files, of which {len(absent)} are absent ({some(absent)}); "
            "fetch them"
        )
    elif not files and parts:
        raise CheckpointError(f"{path}: files of a set are absent ({some(parts)}); fetch them")
    if not files:
        raise CheckpointError(adapter_at(path) or _no_weights(path, there))
    notes = []
    if unread := sorted(weights - set(files)):
        notes.append(
            f"{path}: {some(unread)} beside {files[0]} not read" + _ADAPTER * unread[0].startswith("adapter")
        )
    if listed and listed != set(files):
        notes.append(f"{path / INDEX}: names other files ({some(sorted(listed - set(files)))}), not followed")
        index = None
    return files, index, notes


_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_OTHERS = ("adapter", "consolidated", "optimizer")  # not, or not in this layout, the model
_ADAPTER = ": the adapter is not applied; merge it into the model first to use it"


def _shards(weights: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the files of the model where no index names them, or else those missing from its set."""
    sets: dict[tuple[str, str], list[str]] = {}
    single = []
    for name in sorted(weights):
        if found := _NUMBERED.fullmatch(name):
            sets.setdefault((found[1], found[3]), []).append(name)
        elif not name.startswith(_OTHERS):
            single.append(name)
    whole = [kind for kind, names in sets.items() if len(names) == int(kind[1])]
    if whole:
        return sorted([*sets[max(whole, key=lambda kind: kind[0] == "model")], *single]), []
    missing = [
        f"{int(total) - len(names)} of {names[0]}'s {int(total)}" for (_, total), names in sets.items()
    ]
    return ([], missing) if missing else (single, [])


def _no_weights(path: Place, there: Collection[str]) -> str:
    torch = sorted(name for name in there if name.endswith((".bin", ".pt", ".pth")))
    own = sorted(name for name in there if name.startswith("consolidated"))
    hint = f"; it holds {torch[0]}: save it as safetensors with transformers first" if torch else ""
    hint = f"; {own[0]} is in its authors' own layout: fetch the Hugging Face files" if own else hint
    return f"{path}: no {INDEX} and no .safetensors file of a model{hint}"


def read_index(path: Place) -> dict[str, str]:
    where = path / INDEX
    form = {"weight_map": {str: str}}
    index = expect(read_json(where, CheckpointError), form, str(where), CheckpointError)["weight_map"]
    if wrong := next((file for file in index.values() if Path(file).name != file), None):
        raise CheckpointError(f"{where}: names the file {brief(wrong)}, expected one beside it")
    return index


_ENTRY = {"dtype": str, "shape": [int], "data_offsets": [int]}


def _read_file(file: File | RemoteFile) -> dict[str, Tensor]:
    size = file.size
    if size < 8:
        raise CheckpointError(f"{file}: is {'cut off' if size else 'empty'} ({size} bytes); {_AGAIN}")
    head = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if head > min(size - 8, MOST_BYTES):
        raise CheckpointError(f"{file}: the header should have {head} bytes, the file has {size}; {_AGAIN}")
    header = parse_json(file.read(8, 8 + head).tobytes(), f"{file}: the header", CheckpointError)
    header.pop("__metadata__", None)
    expect(header, {str: _ENTRY}, f"{file}: the header", CheckpointError)
    for name, entry in header.items():
        if len(entry["data_offsets"]) != 2 or len(entry["shape"]) > _MOST_AXES:
            raise CheckpointError(
                f"{file}: {name} has offsets {brief(entry['data_offsets'])} and shape "
                f"{brief(entry['shape'])}, expected two and at most {_MOST_AXES} numbers; {_AGAIN}"
            )
    entries = sorted(
        (tuple(e["data_offsets"]), name, e["dtype"], tuple(e["shape"])) for name, e in header.items()
    )
    expected = 8 + head + max((stop for (_, stop), *_ in entries), default=0)
    if size != expected:
        raise CheckpointError(
            f"{file}: the header describes {expected:,} bytes, the file has {size:,}; {_AGAIN}"
        )
    tensors, end = {}, 0
    for (start, stop), name, kind, shape in entries:
        if kind not in DTYPES:
            raise CheckpointError(f"{file}: {name} has dtype {brief(kind)}; known: {', '.join(DTYPES)}")
        need = math.prod(shape) * DTYPES[kind].itemsize
        if start != end or stop - start != need:
            raise CheckpointError(
                f"{file}: {name} ({kind}, shape {list(shape)}) should take {need} bytes from {end}, "
                f"the header says {start}..{stop}; {_AGAIN}"
            )
        tensors[name] = Tensor(file, DTYPES[kind], shape, 8 + head + start)
        end = stop
    return tensors


class Shards:
    """Plan of the files to write: each tensor's file and offset, in `model.safetensors` or indexed shards."""

    def __init__(self, specs: Mapping[str, Spec], max_shard_bytes: int = MAX_SHARD_BYTES):
        shards = _plan(specs, max_shard_bytes)
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        self.specs = specs
        self.headers: dict[str, bytes] = {}
        self.files: dict[str, int] = {}
        self.place: dict[str, tuple[str, int]] = {}
        for shard, file in zip(shards, [SINGLE] if len(shards) == 1 else names):
            self.headers[file] = _header({name: specs[name] for name in shard})
            end = len(self.headers[file])
            for name in shard:
                self.place[name] = file, end
                end += _nbytes(specs[name])
            self.files[file] = end

    def write_index(self, folder: Path) -> None:
        """Write the index if there are several files."""
        if len(self.files) > 1:
            where = {name: file for name, (file, _) in self.place.items()}
            index: dict[str, Any] = {"metadata": {"total_size": bytes_of(self.specs)}, "weight_map": where}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(
    directory: Path,
    specs: Mapping[str, Spec],
    arrays: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors into `model.safetensors`, or into shards with an index.

    `arrays` yields the names of `specs` in the same order. Each file is renamed into place once complete; the
    index comes last.
    """
    shards = Shards(specs, max_shard_bytes)
    stream = iter(arrays)
    for file, header in shards.headers.items():
        partial = directory / f"{file}.partial"
        with partial.open("wb") as out:
            out.write(header)
            for expected in (n for n, (where, _) in shards.place.items() if where == file):
                name, array = next(stream)
                assert (name, (array.shape, array.dtype)) == (expected, specs[expected]), (name, expected)
                out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        os.replace(partial, directory / file)
    shards.write_index(directory)


def bytes_of(specs: Mapping[str, Spec]) -> int:
    """Return the total bytes of tensors with these specs."""
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
    raw += b" " * (-len(raw) % 8)  # align the tensors to 8 bytes
    return len(raw).to_bytes(8, "little") + raw
