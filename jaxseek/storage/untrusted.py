"""Read files that may be damaged or hostile: JSON, TOML, and the form of what they hold.

Every JSON or TOML file that is not shipped with jaxseek is read here. Sizes and depths are bounded, only
regular files are opened, and whatever is wrong is one error that names the file. Uses the standard library
only.
"""

from __future__ import annotations

import json
import re
import reprlib
import stat
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20  # of a file; the largest tokenizer.json in use has half of that
_MOST_TOML = 1 << 18
_MOST_DEPTH = 64  # of objects and lists within each other; walking far deeper ones would exhaust the stack
_MOST_DOTS = 400  # in a line of TOML: the time for a dotted key is quadratic in its parts
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", None: "null"}
_KINDS |= {int: "a whole number from 0 on", float: "a number"}
Error = type[ValueError]

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def brief(value: Any) -> str:
    """Return the value as Python writes it, shortened for a message."""
    return _short.repr(value)


def raise_irregular(path: Path, error: Error = ValueError) -> None:
    """Raise `error` for anything but a regular file: opening a pipe would wait, a device may never end.

    Raises FileNotFoundError if there is nothing.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
        raise error(f"{path}: is {what}, expected a file")


def read_bytes(at: Any, error: Error = ValueError, most: int = MOST_BYTES) -> bytes:
    """Return the contents of a small file at a Place. Raises `error`, or FileNotFoundError."""
    if not isinstance(at, Path):
        return at.read_bytes()
    raise_irregular(at, error)
    with at.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise error(f"{at}: is larger than {most:,} bytes, which no such file is")
    return data


def read_json(at: Any, error: Error = ValueError, kind: type = dict) -> Any:
    """Read a JSON file at a Place; see `parse_json`. Raises `error`, or FileNotFoundError."""
    return parse_json(read_bytes(at, error), str(at), error, kind)


def parse_json(data: bytes | str, where: str, error: Error = ValueError, kind: type = dict) -> Any:
    """Parse JSON, in UTF-8 with or without a byte order mark, that holds a `kind` (`object`: anything).

    Raises `error`, whose message begins with `where`: for anything else, a key that stands twice in an
    object, half a surrogate pair, and objects within each other to an absurd depth.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
        value = json.loads(text, object_pairs_hook=_unique)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        raise_deep(value)
    except RecursionError:
        raise error(f"{where}: not valid JSON (it is nested too deep)") from None
    except ValueError as e:
        why = e if data.strip() else "it is empty"
        raise error(f"{where}: not valid JSON ({why}); is the file whole?") from None
    if not isinstance(value, kind):
        raise error(f"{where}: holds {brief(value)}, expected a JSON {'list' if kind is list else 'object'}")
    return value


def parse_toml(data: bytes | str, where: str, error: Error = ValueError) -> dict[str, Any]:
    """Parse TOML. Raises `error`, whose message begins with `where`."""
    try:
        text = data.decode() if isinstance(data, bytes) else data
        if max(map(_dots, text.splitlines()), default=0) > _MOST_DOTS:
            raise ValueError(f"a line has more than {_MOST_DOTS} dots")
        value = tomllib.loads(text)
        raise_deep(value)
    except RecursionError:
        raise error(f"{where}: not valid TOML (it is nested too deep)") from None
    except ValueError as e:
        raise error(f"{where}: not valid TOML ({e})") from None
    return value


def read_toml(at: Any, error: Error = ValueError) -> dict[str, Any]:
    """Read a TOML file at a Place. Raises `error`, or FileNotFoundError."""
    return parse_toml(read_bytes(at, error, _MOST_TOML), str(at), error)


def _dots(line: str) -> int:
    return line.count(".")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{brief(twice)} stands twice in one object")
    return found


def raise_deep(value: Any) -> None:
    """Raise RecursionError if objects and lists are nested too deep for those who walk them."""
    level = [value]
    for _ in range(_MOST_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [x for values in inner for x in values if isinstance(x, dict | list)]
        if not level:
            return
    raise RecursionError


# -------------------------------------------------------------------- the form of what was read


def expect(value: Any, form: Any, where: str, error: Error = ValueError) -> Any:
    """Return `value` if it has this form. Raises `error`, which names `where`, the key and what it expects.

    A form is `str`, `bool`, `int` (whole, from 0 on), `float` (finite, or whole), `dict`, `None`; a tuple of
    such alternatives; `[form]`, a list; `{str: form}`, an object with any keys; or `{"a": form, "b?": form}`,
    an object with these keys, of which b may be absent. It may have further keys.
    """
    if misfit := _misfit(value, form, ""):
        raise error(f"{where}: {misfit}")
    return value


def _misfit(value: Any, form: Any, key: str) -> str | None:
    """Return what is wrong with the value of `key`, or None."""
    fits = True
    if isinstance(form, tuple):
        close = [f for f in form if isinstance(value, _outer(f))]  # tell what is wrong within it
        return _misfit(value, close[0], key) if close else _unlike(value, form, key)
    if isinstance(form, list):
        if isinstance(value, list):
            return next((m for i, v in enumerate(value) if (m := _misfit(v, form[0], f"{key}[{i}]"))), None)
        fits = False
    elif isinstance(form, dict):
        if isinstance(value, dict):
            return _misfit_keys(value, form, key)
        fits = False
    elif form is float:
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max
    elif form is int:
        fits = type(value) is int and 0 <= value < 2**63
    else:
        fits = value is None if form is None else isinstance(value, form)
    return None if fits else _unlike(value, form, key)


def _misfit_keys(value: dict[str, Any], form: dict[Any, Any], key: str) -> str | None:
    at = f"{key}." if key else ""
    if str in form:
        return next((m for name in value if (m := _misfit(value[name], form[str], f"{at}{name}"))), None)
    for name, inner in form.items():
        required, name = not name.endswith("?"), name.removesuffix("?")
        if name in value:
            if misfit := _misfit(value[name], inner, f"{at}{name}"):
                return misfit
        elif required:
            return f"has no {at}{name}, expected {_described(inner)}"
    return None


def _unlike(value: Any, form: Any, key: str) -> str:
    return f"{f'{key} is' if key else 'holds'} {brief(value)}, expected {_described(form)}"


def _outer(form: Any) -> type | tuple[type, ...]:
    found = type(form) if isinstance(form, list | dict) else type(None) if form is None else form
    return (int, float) if found is float else found


def _described(form: Any) -> str:
    if isinstance(form, tuple):
        return " or ".join(map(_described, form))
    return _KINDS[form if form is None or isinstance(form, type) else type(form)]
