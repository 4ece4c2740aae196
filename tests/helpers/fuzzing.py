"""Mutations of JSON values, texts and bytes, and what a command may do with them: end in a line, soon, in
little memory."""

import contextlib
import copy
import io
import json
import random
import time
from pathlib import Path

from jaxseek.cli.main import main

SECONDS, BYTES = 10, 1 << 30  # of CPU and memory, that one input may take
PATIENCE = 60  # seconds, however busy the machine is
VALUES = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        2**31,
        2**63,
        10**9,
        10**18,
        10**30,
        10**400,
        0.0,
        -0.5,
        1e-300,
        1e300,
    ),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        "x",
        "x" * 5000,
        "\ud800",
        "\x00",
        "\x1b[31m",
        "é\u2028",
    ),
    *(
        [],
        [[]],
        [1, "a", None],
        {},
        {"a": 1},
        {"": {}},
        [0] * 1000,
        "[" * 500,
        "a.b",
        "../x",
        "/dev/zero",
        "10",
    ),
)
NUMBERS = (
    "-1",
    "0",
    "1",
    "2",
    "nan",
    "inf",
    "-inf",
    "1e30",
    "1e999",
    "9" * 40,
    "",
    "x",
    "1.5",
    "0x10",
    "٣",
    "--",
)


def deep(rng: random.Random):
    value = rng.choice((1, "x", None))
    for _ in range(rng.choice((10, 70, 300))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def spots(value, found=None):
    """Every (container, key) within a JSON value."""
    found = [] if found is None else found
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append((value, key))
        spots(value[key], found)
    return found


def mutate(value, rng: random.Random, times=None):
    """A copy of a JSON value in which some entries are replaced, removed, renamed or exchanged."""
    holder = [copy.deepcopy(value)]
    for _ in range(times or rng.choice((1, 1, 1, 2, 4))):
        where = spots(holder)
        container, key = rng.choice(where)
        kind = rng.random()
        if kind < 0.65:
            container[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind < 0.7:
            container[key] = deep(rng)
        elif kind < 0.8 and container is not holder:
            del container[key]
        elif kind < 0.9:
            other, name = rng.choice(where)
            container[key] = copy.deepcopy(other[name])
        elif isinstance(container, dict):
            container[rng.choice(("", "x", key + "x", "__class__"))] = container.pop(key)
        elif container is not holder:
            container.append(container[key])
    return holder[0]


def spoil(data: bytes, rng: random.Random, times=None) -> bytes:
    """The bytes with some flipped, cut, repeated or put in."""
    data = bytearray(data)
    for _ in range(times or rng.choice((1, 1, 2, 5))):
        at, kind = rng.randrange(len(data) + 1), rng.random()
        if kind < 0.5 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind < 0.65:
            data[at : at + rng.choice((1, 8, 100))] = bytes([rng.choice((0, 255, 34, 123, 91))]) * rng.choice(
                (1, 8)
            )
        elif kind < 0.75:
            del data[at:]
        elif kind < 0.9:
            data[at:at] = data[at : at + rng.choice((1, 16, 300))]
        else:
            data[at:at] = rng.choice(
                (b"[" * 200, b'{"a":' * 99, b"\xff\xfe", b"\n", "\u2028".encode(), b"\xef\xbb\xbf")
            )
    return bytes(data)


def as_json(value, rng: random.Random) -> bytes:
    """JSON text, at times with a fault that no value has: a key twice, another encoding, spoilt bytes."""
    text, kind = json.dumps(value), rng.random()
    if kind < 0.05 and text.startswith("{") and len(text) > 2:
        text = f"{text[:-1]}, {text[1:-1]}}}"
    if kind > 0.95:
        return rng.choice((b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"), spoil(text.encode(), rng)))
    return text.encode()


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


@contextlib.contextmanager
def bounded(what):
    """Check the time, and the growth of memory at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the last peak
    before, start, begin = _memory("VmRSS"), time.process_time(), time.monotonic()
    yield
    assert time.process_time() - start < SECONDS, what
    assert time.monotonic() - begin < PATIENCE, what
    assert _memory("VmHWM") - before < BYTES, what


def command(*argv) -> tuple[int, str]:
    """Run a command in this process: its exit code and its last line on standard error."""
    out, err = io.StringIO(), io.StringIO()
    with bounded(argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code
    shown = err.getvalue()
    assert code in (0, 1, 2), argv
    assert "Traceback" not in shown, (argv, shown)
    assert "fault of jaxseek" not in shown, (argv, shown)
    errors = [line for line in shown.splitlines() if "error: " in line]
    assert code == 0 or errors or out.getvalue(), (argv, shown)
    assert all(len(line) < 3000 for line in errors), argv
    return code, errors[-1] if errors else ""


def refused_or_done(what, call) -> bool:
    """Call a function of Python, which may raise an error that a user is told; True where it did not."""
    with bounded(what), contextlib.suppress(ValueError, OSError):
        call()
        return True
    return False


def toml(table: dict, head: str = "") -> str:
    """A table as TOML, of what TOML can say."""
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    text = f"[{head}]\n" if head else ""
    text += "".join(f"{_key(k)} = {_toml_value(v)}\n" for k, v in plain.items())
    for key, value in table.items():
        if isinstance(value, dict):
            text += toml(value, f"{head}.{_key(key)}" if head else _key(key))
    return text


def _key(key: str) -> str:
    return json.dumps(key)


def _toml_value(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if value is None:
        return "1979-05-27"
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return json.dumps(value)
