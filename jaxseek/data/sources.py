"""Files of examples as one random-access sequence of records.

A record is a dict from column names to values; a plain string becomes {"text": string}. Memory holds the line
offsets of .jsonl files, the names of text files, and .json and .parquet files as a whole.
"""

from __future__ import annotations

import bisect
import difflib
import glob
import importlib
import inspect
import itertools
import threading
import urllib.parse
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxseek.config.model import ConfigError
from jaxseek.storage import place as storage
from jaxseek.storage.place import Remote, cached, is_url
from jaxseek.storage.untrusted import parse_json

Record = dict[str, Any]


class Records(Protocol):
    """A sequence of records; `place(i)` names the origin of record i for error messages."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Record: ...
    def place(self, i: int, /) -> str: ...


class Joined:
    """Concatenation of several sources; `starts` has the index of each one's first record."""

    def __init__(self, parts: Sequence[Records]):
        self._parts = parts
        self.starts = [0, *itertools.accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int) -> Record:
        part = bisect.bisect(self.starts, i) - 1
        return self._parts[part][i - self.starts[part]]

    def place(self, i: int) -> str:
        """Return the origin of record i, such as `train.jsonl, line 7`."""
        part = bisect.bisect(self.starts, i) - 1
        return self._parts[part].place(i - self.starts[part])


class _Lines:
    """A .jsonl file; blank lines are skipped. Not memory-mapped, since it may be truncated meanwhile."""

    def __init__(self, path: Path, name: str):
        self._name, self._lock, self._file = name, threading.Lock(), path.open("rb")
        weakref.finalize(self, self._file.close)
        ends, size = [], 0
        while block := self._file.read(1 << 24):
            ends.append(size + np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")))
            size += len(block)
        if not size:
            raise ConfigError(f"{name} is empty, expected a JSON object on each line")
        self._ends = np.concatenate([*ends, [size]])
        begins = np.concatenate([[0], self._ends[:-1] + 1])
        filled = np.ones(len(begins), bool)
        for short in np.flatnonzero(self._ends - begins <= 2):
            filled[short] = bool(self._bytes(int(begins[short]), int(self._ends[short])).strip())
        self._begins = begins[filled]

    def _bytes(self, begin: int, end: int) -> bytes:
        with self._lock:
            self._file.seek(begin)
            return self._file.read(end - begin)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, i: int) -> Record:
        begin = int(self._begins[i])
        line = self._bytes(begin, int(self._ends[np.searchsorted(self._ends, begin)]))
        try:
            value = parse_json(line, "", kind=object)
        except ValueError as error:
            text = line[:60].decode(errors="replace")
            raise ConfigError(f"{self.place(i)}{error}: {text!r}") from None
        return _record(value, lambda: self.place(i))

    def place(self, i: int) -> str:
        return f"{self._name}, line {np.searchsorted(self._ends, self._begins[i]) + 1}"


class _Items:
    """A list of objects or strings, from a .json file or a function."""

    def __init__(self, items: Any, name: str):
        if not isinstance(items, list):
            raise ConfigError(
                f"{name} holds a {type(items).__name__}, expected a list of objects (objects on a line each "
                "belong in a file that ends in .jsonl)"
            )
        self._items, self._name = items, name

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> Record:
        return _record(self._items[i], lambda: self.place(i))

    def place(self, i: int) -> str:
        return f"{self._name}, item {i + 1}"


class _Table:
    """A .parquet file."""

    def __init__(self, path: Path, name: str):
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise ConfigError(f"{name} needs a package to be read: pip install pyarrow") from None
        try:
            self._table = parquet.read_table(path, memory_map=True)
        except (ValueError, OSError) as error:  # ArrowInvalid is a ValueError
            raise ConfigError(f"{name} cannot be read as parquet ({error})") from None
        self._name = name

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, i: int) -> Record:
        return self._table.slice(i, 1).to_pylist()[0]

    def place(self, i: int) -> str:
        return f"{self._name}, row {i + 1}"


class _Text:
    """Any other file, read as one document."""

    def __init__(self, path: Path, name: str):
        self._path, self._name = path, name

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> Record:
        try:
            return {"text": self._path.read_bytes().decode()}
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{self._name} is not UTF-8 text ({error}); files that end in .jsonl, .json and .parquet "
                "hold records, all others are read as text"
            ) from None

    def place(self, i: int) -> str:
        return self._name


def open_sources(names: Sequence[str], key: str) -> Joined:
    """Open the sources `names` of the setting `key`, in order; the files of one name are sorted.

    Raises ConfigError for a name without files, and for a file whose contents do not match its suffix.
    """
    parts: list[Records] = []
    for name in names:
        if name.startswith("python:"):
            parts.append(_call(name))
        elif name.startswith("hf://"):
            parts += [_file(Path(local), shown) for local, shown in _download(name, key)]
        elif is_url(name):
            parts += [_file(cached(at), str(at)) for at in _remote(name, key)]
        else:
            parts += [_file(path, str(path)) for path in _local(name, key)]
    records = Joined(parts)
    if not len(records):
        raise ConfigError(f"{key} = {list(names)} holds no examples")
    return records


def _file(path: Path, name: str) -> Records:
    match path.suffix:
        case ".jsonl":
            return _Lines(path, name)
        case ".json":
            return _Items(parse_json(path.read_bytes(), name, ConfigError, object), name)
        case ".parquet":
            return _Table(path, name)
    return _Text(path, name)


def _local(name: str, key: str) -> list[Path]:
    path = Path(str(storage.place(name)))
    if path.is_file():
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(p for p in found if p.is_file() and not _hidden(p, path))
    if files:
        return files
    if path.is_dir() or glob.has_magic(name):
        raise ConfigError(f"{key}: no file in {name}" if path.is_dir() else f"{key}: no file matches {name}")
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, 1)
    where = f"; did you mean {path.parent / near[0]}?" if near else f" (from {Path.cwd()})"
    raise ConfigError(f"{key}: there is no {name}{where}")


def _remote(name: str, key: str) -> list[Remote]:
    """Return the files of a URL: itself, all files below it, or those that match its pattern."""
    at = storage.place(name)
    assert isinstance(at, Remote)
    if glob.has_magic(name):
        found = at.matches()
    else:
        found = [at] if at.is_file() else [at / below for below in at.sizes() if not below.startswith(".")]
    if not found:
        raise ConfigError(f"{key}: there is no file that {name} names or matches")
    return found


def _hidden(file: Path, directory: Path) -> bool:
    inside = file.relative_to(directory).parts if file.is_relative_to(directory) else ()
    return any(part.startswith(".") for part in inside)


def _download(name: str, key: str) -> list[tuple[str, str]]:
    """Download an hf:// file, directory or glob; return (path in the hub's cache, hf:// name) per file."""
    try:
        import huggingface_hub as hub
    except ImportError:
        raise ConfigError(f"{name} needs a package: pip install huggingface_hub") from None
    try:
        remote = hub.HfFileSystem()
        path = name.removeprefix("hf://")
        found = remote.glob(path) if glob.has_magic(path) else [path]
        files = sorted(file for p in found for file in (remote.find(p) if remote.isdir(p) else [p]))
        places: list[Any] = [remote.resolve_path(file) for file in files]
        local = [
            hub.hf_hub_download(p.repo_id, p.path_in_repo, repo_type=p.repo_type, revision=p.revision)
            for p in places
        ]
    except Exception as error:  # from the hub, the network or the file system
        raise ConfigError(
            f"{key}: {name} cannot be fetched ({type(error).__name__}: {error}); expected "
            "hf://datasets/OWNER/NAME/FILE, and HF_TOKEN set where the data set is gated"
        ) from error
    if not files:
        raise ConfigError(f"{key}: no file matches {name}")
    return [(path, f"hf://{file}") for path, file in zip(local, files)]


def _call(name: str) -> Records:
    """Call `python:MODULE:FUNCTION?key=value&key=value` and return its records."""
    place, asked, query = name.partition("?")
    found = function(place)
    return _Items(found(**(_arguments(found, query, name) if asked else {})), name)


def function(name: str) -> Any:
    """Import the function `python:MODULE:FUNCTION`. Raises ConfigError if it does not exist."""
    module, _, attribute = name.removeprefix("python:").partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}; expected python:MODULE:FUNCTION") from None


def _arguments(found: Any, query: str, name: str) -> dict[str, Any]:
    """Parse a query into keyword arguments, each of its parameter's type: int, float, bool or str."""
    try:
        given = dict(urllib.parse.parse_qsl(query, keep_blank_values=True, strict_parsing=True))
        signature = inspect.signature(found, eval_str=True)
    except (ValueError, NameError, TypeError) as error:
        raise ConfigError(f"{name}: {error}; expected FUNCTION?key=value&key=value") from None
    for key, value in given.items():
        if key not in signature.parameters:
            near = difflib.get_close_matches(key, signature.parameters, 1, 0.5)
            known = f"did you mean {near[0]}?" if near else f"known: {', '.join(signature.parameters)}"
            raise ConfigError(f"{name}: the function has no argument {key}; {known}")
        parameter = signature.parameters[key]
        kind = parameter.annotation if parameter.annotation in _PARSERS else type(parameter.default)
        try:
            given[key] = _PARSERS.get(kind, str)(value)
        except (ValueError, KeyError):
            raise ConfigError(f"{name}: {key} is {value!r}, expected {kind.__name__}") from None
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}; give it as FUNCTION?key=value") from None
    return given


_PARSERS: dict[Any, Any] = {
    int: int,
    float: float,
    bool: {"true": True, "false": False}.__getitem__,
    str: str,
}


def _record(value: Any, place: Any) -> Record:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ConfigError(f"{place()} is a {type(value).__name__}, expected an object or a string")
    return value
