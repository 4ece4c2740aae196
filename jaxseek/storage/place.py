"""Local paths and object-store URLs: `place` returns a pathlib.Path, or a Remote with the same methods.

An object store has no folders, no rename and no append. So a file is written by one request (`write_bytes`),
a tree is uploaded with its marker files last (`upload`), and a growing file is rewritten as a whole every few
seconds (`Log`). URLs are fsspec's: gs://, s3://, memory:// and any other installed driver; hf:// and
http(s):// are read-only.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import hashlib
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from jaxseek.storage.untrusted import parse_json

_WEB = ("http", "https")
READ_ONLY = ("hf", *_WEB)
DRIVERS = {"gs": "gcsfs", "s3": "s3fs", "hf": "huggingface_hub"}  # scheme to package
_ALIASES = {"gcs": "gs", "s3a": "s3"}
_URL = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*)://(.*?)\s*", re.DOTALL)
_ALMOST = re.compile(r"\s*(gs|gcs|s3a?|hf|https?|memory):/*(.*)", re.DOTALL | re.IGNORECASE)
# Keys of a driver's file info that change with the file; drivers have different ones.
_CHANGED = ("etag", "md5hash", "checksum", "lastmodified", "mtime", "updated", "created")
_THREADS = 8  # files uploaded or downloaded in parallel
F = TypeVar("F", bound=Callable[..., Any])


class PlaceError(OSError):
    """A place cannot be reached, read or written; the message says which, why and what to do."""


def place(name: str | os.PathLike[str] | Remote) -> Place:
    """Parse a user's path or URL into a Path or Remote; `file://` becomes a Path.

    Raises PlaceError for a URL without an installed driver, and for a malformed one.
    """
    if isinstance(name, Remote):
        return name
    text = os.fspath(name)
    if found := _URL.fullmatch(text):
        scheme = _ALIASES.get(found[1].lower(), found[1].lower())
        rest = found[2].rstrip("/")
        if scheme == "file":
            return Path("/" + rest.lstrip("/"))
        if not rest.strip("/"):
            raise PlaceError(f"{text}: names no bucket; expected {scheme}://BUCKET/...")
        return Remote(
            _driver(scheme, text), scheme, f"{scheme}://{rest}" if scheme in _WEB else rest.lstrip("/")
        )
    if found := _ALMOST.fullmatch(text):
        raise PlaceError(
            f"{text}: is neither a path nor a URL; did you mean {found[1].lower()}://{found[2]}?"
        )
    if "://" in text:
        raise PlaceError(f"{text}: is no URL that can be opened; expected gs://..., s3://... or a path")
    return Path(text).expanduser()


def is_url(name: Any) -> bool:
    """Return whether `name` is in an object store or on the web."""
    return isinstance(name, Remote) or "://" in str(name)


@functools.cache
def _driver(scheme: str, url: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except (ImportError, ValueError) as e:
        how = f"pip install {DRIVERS[scheme]}" if scheme in DRIVERS else "use gs://, s3:// or a path"
        raise PlaceError(f"{url}: {scheme}:// cannot be opened here ({e}); {how}") from None
    except Exception as e:  # drivers fail in many ways to find credentials
        raise _unreachable(url, "opened", e) from e


def _reaching(what: str) -> Callable[[F], F]:
    """Decorate a method so that any driver error becomes a PlaceError that names the place."""

    def wrap(method: F) -> F:
        @functools.wraps(method)
        def call(self: Remote, *args: Any, **named: Any) -> Any:
            try:
                return method(self, *args, **named)
            except (PlaceError, FileExistsError):
                raise
            except FileNotFoundError as e:
                raise FileNotFoundError(errno.ENOENT, "no such file or bucket", str(self)) from e
            except Exception as e:
                raise _unreachable(self, what, e) from e

        return call  # type: ignore[return-value]

    return wrap


def _unreachable(url: Any, what: str, e: BaseException) -> PlaceError:
    return PlaceError(
        f"{url}: cannot be {what} ({type(e).__name__}: {str(e)[:300]}); jaxseek doctor {url} tells whether "
        "it can be reached and with which credentials"
    )


@dataclass(frozen=True)
class Remote:
    """A URL with the methods of pathlib.Path that an object store can support; raises PlaceError."""

    fs: Any  # the fsspec driver
    scheme: str
    path: str  # bucket and key, without a trailing slash

    def __str__(self) -> str:
        return self.path if self.scheme in _WEB else f"{self.scheme}://{self.path}"

    # ---------------------------------------------------------------- names

    def __truediv__(self, part: str | PurePosixPath) -> Remote:
        return Remote(self.fs, self.scheme, f"{self.path}/{part}".strip("/"))

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self.path)

    @property
    def name(self) -> str:
        return self._pure.name

    @property
    def stem(self) -> str:
        return self._pure.stem

    @property
    def suffix(self) -> str:
        return self._pure.suffix

    @property
    def parent(self) -> Remote:
        return Remote(self.fs, self.scheme, str(self._pure.parent))

    def with_name(self, name: str) -> Remote:
        return self.parent / name

    def with_suffix(self, suffix: str) -> Remote:
        return Remote(self.fs, self.scheme, str(self._pure.with_suffix(suffix)))

    def relative_to(self, other: Remote) -> PurePosixPath:
        return self._pure.relative_to(other._pure)

    def absolute(self) -> Remote:
        return self

    resolve = absolute

    # ---------------------------------------------------------------- contents

    @_reaching("looked at")
    def _kind(self) -> str | None:
        """Return "file", "directory" or None, as the store reports it; an error raises.

        The drivers' isfile and isdir would report an unreachable store as empty.
        """
        try:
            return self.fs.info(self.path)["type"]
        except (FileNotFoundError, NotADirectoryError):
            return None

    def exists(self) -> bool:
        return self._kind() is not None

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Return whether any file lies below: an object store has no empty folders."""
        return self._kind() == "directory"

    @_reaching("listed")
    def iterdir(self) -> Iterator[Remote]:
        names = [PurePosixPath(found.rstrip("/")).name for found in self.fs.ls(self.path, detail=False)]
        return iter([self / name for name in names if name != self.name])

    def glob(self, pattern: str) -> Iterator[Remote]:
        """Yield the direct children whose name matches the pattern."""
        found = self.iterdir() if self.is_dir() else ()
        return (p for p in found if fnmatch.fnmatchcase(p.name, pattern))

    @_reaching("listed")
    def matches(self) -> list[Remote]:
        """Return the files that match this URL as a glob pattern."""
        found = (name.lstrip("/") for name in sorted(self.fs.glob(self.path)) if self.fs.isfile(name))
        return [Remote(self.fs, self.scheme, name) for name in found]

    @_reaching("listed")
    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file below, by relative name."""
        found = self.fs.find(self.path, detail=True)
        root = self.fs._strip_protocol(self.path).rstrip("/") + "/"
        named = {name.removeprefix(root): info["size"] for name, info in sorted(found.items())}
        # a cloud console creates an empty file, named like the folder, for each folder
        return {name: size for name, size in named.items() if name}

    @_reaching("looked at")
    def state(self) -> list[Any]:
        """Return name, size, and the store's version stamp (etag, checksum or time)."""
        info = {re.sub("[-_]", "", key).lower(): value for key, value in self.fs.info(self.path).items()}
        told = next((info[key] for key in _CHANGED if info.get(key)), "")
        return [str(self), info["size"], str(told)]

    # ---------------------------------------------------------------- reading and writing

    @_reaching("read")
    def read_bytes(self) -> bytes:
        return self.fs.cat_file(self.path)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    @_reaching("read")
    def open_binary(self) -> BinaryIO:
        return self.fs.open(self.path, "rb")

    @_reaching("read")
    def download(self, to: Path) -> None:
        """Download the file to a local path."""
        to.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(self.path, str(to))

    @_reaching("written")
    def write_bytes(self, data: bytes) -> None:
        """Write the whole file with one request."""
        raise_read_only(self)
        self.fs.pipe_file(self.path, bytes(data))

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    @_reaching("written")
    def upload(self, file: Path) -> None:
        """Upload a local file as the whole file."""
        raise_read_only(self)
        self.fs.put_file(str(file), self.path)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder exists as soon as a file is in it."""

    @_reaching("removed")
    def unlink(self, missing_ok: bool = False) -> None:
        if missing_ok and not self.is_file():
            return
        self.fs.rm_file(self.path)


Place = Path | Remote


def raise_read_only(at: Place) -> None:
    """Raise PlaceError if `at` cannot be written; call it before any work."""
    if isinstance(at, Remote) and at.scheme in READ_ONLY:
        raise PlaceError(f"{at}: {at.scheme}:// is read-only; expected a path, gs://... or s3://...")


def writable(name: Any) -> Place:
    """Return the place of an output. Raises PlaceError if it is read-only."""
    at = place(name)
    raise_read_only(at)
    return at


# -------------------------------------------------------------------- whole files and trees


def write_bytes(at: Place, data: bytes) -> None:
    """Write a file atomically: a reader sees the old contents or the new ones."""
    if isinstance(at, Remote):
        at.write_bytes(data)
        return
    at.parent.mkdir(parents=True, exist_ok=True)
    partial = at.with_name(f"{at.name}.partial")
    with _naming(at), partial.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(at)


@contextlib.contextmanager
def _naming(at: Path) -> Iterator[None]:
    """Make errors name a file, as those of writing, of a full disk, do not."""
    try:
        yield
    except OSError as e:
        if e.filename is None and e.errno is not None:
            e.filename = str(at)
        raise


def write_text(at: Place, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(at, text.encode())


def save_figure(figure: Any, at: str | Place, **options: Any) -> None:
    """Write a matplotlib figure in the format of the file's suffix (default: PNG)."""
    at, drawn = place(at), io.BytesIO()
    figure.savefig(drawn, format=at.suffix.removeprefix(".") or "png", **options)
    write_bytes(at, drawn.getvalue())


def open_binary(at: Place) -> BinaryIO:
    """Open a file for reading from its start."""
    return at.open("rb") if isinstance(at, Path) else at.open_binary()


def file_sizes(folder: Place) -> dict[str, int]:
    """Return the bytes of every file below a folder, by relative name."""
    if isinstance(folder, Remote):
        return folder.sizes()
    return {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}


def remove(at: Place) -> None:
    """Remove a tree, if it exists."""
    if isinstance(at, Path):
        shutil.rmtree(at, ignore_errors=True)
        return
    for name in at.sizes() if at.is_dir() else ():
        (at / name).unlink(missing_ok=True)


def upload(folder: Path, to: Remote, last: tuple[str, ...] = ()) -> None:
    """Upload a tree to an object store; the files in `last` go after all others, in this order.

    They mark the tree as complete, so that a reader never uses a partial one.
    """
    names = [name for name in file_sizes(folder) if name not in last]
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda name: (to / name).upload(folder / name), names))
    for name in last:
        if (folder / name).is_file():
            (to / name).upload(folder / name)


def download(at: Remote, to: Path) -> None:
    """Download a tree from an object store; local files of the right size are kept."""

    def one(name: str, size: int) -> None:
        local = to / name
        if not local.is_file() or local.stat().st_size != size:
            (at / name).download(local)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(one, *zip(*at.sizes().items())) if at.is_dir() else ())


@contextlib.contextmanager
def scratch(what: str) -> Iterator[Path]:
    """Yield a temporary local folder for transfers to or from an object store."""
    with temporary(what) as folder:
        yield Path(folder)


def temporary(what: str) -> tempfile.TemporaryDirectory[str]:
    """Create a temporary folder named after this process; remove those of dead processes."""
    for folder in Path(tempfile.gettempdir()).glob("jaxseek-*"):
        found = _TEMPORARY.fullmatch(folder.name)
        if found and not _alive(int(found[1])):
            shutil.rmtree(folder, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"jaxseek-{what}-{os.getpid()}-")


_TEMPORARY = re.compile(r"jaxseek-[a-z]+-(\d+)-\w+")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # runs as another user
        pass
    return True


def local_tree(at: Remote) -> Path:
    """Return a local copy of a tree as it is now, kept until the process ends."""
    return _local_tree(at, repr(at.sizes()))


@functools.cache
def _local_tree(at: Remote, version: str) -> Path:
    folder = temporary("copy")
    _folders.append(folder)
    download(at, Path(folder.name))
    return Path(folder.name)


@functools.cache
def small_files(at: Remote) -> Path:
    """Return a local folder with the small files of a remote checkpoint: config, index, tokenizer.

    It is kept until the process ends.
    """
    folder = temporary("files")
    _folders.append(folder)
    for found in at.iterdir():
        if found.name.endswith((".json", ".model", ".txt", ".jinja")):
            found.download(Path(folder.name) / found.name)
    return Path(folder.name)


_folders: list[tempfile.TemporaryDirectory[str]] = []  # removed as the process ends


def cached(at: Remote) -> Path:
    """Return the file in the user's cache, downloading it unless this version is cached."""
    state = repr(file_state(at))
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxseek" / "files"
    local = cache / hashlib.sha256(state.encode()).hexdigest()[:24] / at.name
    if not local.is_file():
        partial = local.with_name(f"{local.name}.{os.getpid()}.partial")
        at.download(partial)
        partial.replace(local)
    return local


def file_state(at: Place) -> list[Any]:
    """Return name, size and modification time (or version stamp), to detect a changed file."""
    if isinstance(at, Remote):
        return at.state()
    status = at.stat()
    return [str(at), status.st_size, status.st_mtime_ns]


class Mirror:
    """Local folder for a tool that writes only to disks; `send` uploads it, at most every `seconds`.

    If the place is on a disk, `local` is that place itself.
    """

    def __init__(self, at: Place, seconds: float = 30.0):
        self.at, self.seconds, self._sent = at, seconds, time.monotonic()
        self._scratch = None if isinstance(at, Path) else temporary("mirror")
        self.local = at if isinstance(at, Path) else Path(self._scratch.name)  # type: ignore[union-attr]

    def send(self, now: bool = False) -> None:
        """Upload all files if `seconds` have passed since the last upload, or `now`."""
        if isinstance(self.at, Remote) and (now or time.monotonic() - self._sent > self.seconds):
            upload(self.local, self.at)
            self._sent = time.monotonic()

    def close(self) -> None:
        """Upload all files and remove the local copy."""
        self.send(now=True)
        if self._scratch is not None:
            self._scratch.cleanup()


# -------------------------------------------------------------------- logs


class Log:
    """Appends lines to a file; call `close` when done.

    On a disk, lines are written at once. In an object store, the whole file is rewritten every `seconds` and
    at the end, so a kill loses the lines since the last write.
    """

    def __init__(self, at: Place, seconds: float = 10.0):
        self.at, self.seconds, self._written = at, seconds, time.monotonic()
        self._file, self._lines, self._unwritten = None, b"", False
        if isinstance(at, Path):
            at.parent.mkdir(parents=True, exist_ok=True)
            self._file = at.open("ab")
        elif at.is_file():
            self._lines = at.read_bytes()

    def add(self, *lines: str) -> None:
        """Append lines with one write; a reader may find only the last one cut off."""
        block = "".join(f"{line}\n" for line in lines).encode()
        if self._file is not None:
            with _naming(Path(self._file.name)):
                self._file.write(block)
                self._file.flush()
            return
        self._lines, self._unwritten = self._lines + block, True
        if time.monotonic() - self._written > self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write pending lines to the object store."""
        if self._unwritten:
            self.at.write_bytes(self._lines)
            self._unwritten, self._written = False, time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _any(line: bytes, where: str) -> Any:
    return parse_json(line, where, kind=object)


def read_log(at: Place, parse: Callable[[bytes, str], Any] = _any) -> list[Any]:
    """Read the lines of a log up to the first that is incomplete or that `parse` rejects.

    The rest of the file is truncated, so that appended lines follow those that were read.
    """
    found, whole = [], 0
    for line in at.read_bytes().splitlines(keepends=True) if at.is_file() else ():
        try:
            if not line.endswith(b"\n"):
                break
            found.append(parse(line, str(at)))
        except ValueError:
            break
        whole += len(line)
    cut(at, whole)
    return found


def cut(at: Place, size: int) -> None:
    """Truncate a file, if it exists, to its first `size` bytes; on a disk in place (same inode)."""
    if not at.is_file():
        return
    if isinstance(at, Path):
        if at.stat().st_size > size:
            os.truncate(at, size)
        return
    blob = at.read_bytes()
    if len(blob) > size:
        at.write_bytes(blob[:size])
