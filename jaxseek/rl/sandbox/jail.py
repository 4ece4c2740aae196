"""Script inside the sandbox: it locks itself in, and then executes untrusted code.

Started by programs.py as `python -S -P -s -B jail.py FD`, with a job in JSON at file descriptor FD. It gives
up, in this order: resources (setrlimit), files (Landlock: only the Python installation can be read) and
system calls (seccomp.py). Only then does it read the code. Three roles:

program    runs the code as `__main__`, with its own standard input and output.
candidate  runs the code as a module, and then calls its functions on the judge's request.
judge      runs the tests. Its stand-ins for the candidate's functions pass plain data to the candidate and
           back. No code of the model runs in this process: the model can only return values.

Standard library only, and no import of jaxseek: this file is a program of its own.
"""

import ast
import builtins
import collections
import ctypes
import importlib
import itertools
import json
import os
import resource
import struct
import sys
import types
from typing import Any

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
READ_FILE, READ_DIR = 1 << 2, 1 << 3
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # number of LANDLOCK_ACCESS_FS_* by ABI; later ones have 16
MESSAGE = 1 << 23  # largest value between candidate and judge, in bytes
ITEMS = 1 << 18  # longest iterator that is passed on

# Modules to import in advance, where no file can be opened afterwards.
COMMON = [
    "abc", "array", "base64", "bisect", "calendar", "cmath", "collections", "contextlib", "copy",
    "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "io",
    "itertools", "json", "math", "numbers", "operator", "pprint", "queue", "random", "re", "statistics",
    "string", "struct", "textwrap", "threading", "time", "traceback", "typing", "unicodedata",
    "_strptime",
]  # fmt: skip


# Confinement


def limit_resources(megabytes, seconds):
    for name, value in {
        "RLIMIT_AS": megabytes << 20,
        "RLIMIT_CPU": int(seconds) + 1,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NOFILE": 32,
        "RLIMIT_CORE": 0,
    }.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def call(function, *arguments):
    result = function(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def restrict_files(libc, abi, paths):
    """Allow only reading, and only below `paths`, by Landlock (landlock(7))."""
    handled = ctypes.c_uint64((1 << FILE_RIGHTS.get(abi, 16)) - 1)
    ruleset = call(libc.syscall, LANDLOCK_CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(8), 0)
    for path in paths:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, place))
        call(libc.syscall, LANDLOCK_ADD_RULE, ruleset, 1, rule, 0)
        os.close(place)
    call(libc.syscall, LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def restrict_calls(libc, program):
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    filled = Program(len(program) // 8, program)
    call(libc.prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filled), 0, 0)


def lock_in(job):
    libc = ctypes.CDLL(None, use_errno=True)
    if not job["landlock"]:
        for name in COMMON:
            importlib.import_module(name)
    limit_resources(job["megabytes"], job["seconds"])
    call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if job["landlock"]:
        restrict_files(libc, job["landlock"], job["readable"])
    restrict_calls(libc, bytes.fromhex(job["filter"]))


# Plain data between candidate and judge

MADE = {("decimal", "Decimal"), ("fractions", "Fraction")} | {
    ("datetime", name) for name in ("date", "time", "datetime", "timedelta")
}
TYPES = {
    t.__name__: t
    for t in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, type(None))
}
COLLECTIONS = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque,
    "iterator": lambda items: iter(list(items)),
}  # fmt: skip


def encode(value: Any, hold) -> Any:
    """Encode plain data as JSON, subclasses as their base; `hold` replaces any other object by a number."""
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 53 else {"int": hex(value)}
    if isinstance(value, (str, float)):
        return str.__str__(value) if isinstance(value, str) else float(value)
    if isinstance(value, list):
        return [encode(v, hold) for v in value]
    if isinstance(value, dict):
        return {"dict": [[encode(k, hold), encode(v, hold)] for k, v in value.items()]}
    for name in ("tuple", "set", "frozenset", "deque"):
        if isinstance(value, COLLECTIONS[name]):
            return {name: [encode(v, hold) for v in value]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if (kind.__module__, kind.__name__) in MADE:
        arguments = value.__reduce__()[1]
        return {"made": [kind.__module__, kind.__name__, [encode(v, hold) for v in arguments]]}
    if TYPES.get(getattr(value, "__name__", "")) is value:
        return {"type": value.__name__}
    if isinstance(value, (map, filter, zip, reversed, types.GeneratorType)):
        items = list(itertools.islice(value, ITEMS + 1))
        if len(items) > ITEMS:
            raise ValueError(f"an iterator of more than {ITEMS} items")
        return {"iterator": [encode(v, hold) for v in items]}
    return {"held": hold(value)}


def decode(data: Any, held) -> Any:
    """Decode JSON made by `encode`; `held` returns the object of a number."""
    if isinstance(data, list):
        return [decode(v, held) for v in data]
    if not isinstance(data, dict):
        return data
    ((name, content),) = data.items()
    if name == "int":
        return int(content, 16)
    if name == "dict":
        return {decode(k, held): decode(v, held) for k, v in content}
    if name in COLLECTIONS:
        return COLLECTIONS[name](decode(v, held) for v in content)
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "complex":
        return complex(*content)
    if name == "range":
        return range(*content)
    if name == "made" and tuple(content[:2]) in MADE:
        return getattr(importlib.import_module(content[0]), content[1])(*decode(content[2], held))
    if name == "type":
        return TYPES[content]
    if name == "held":
        return held(content)
    raise ValueError(f"a value of unknown kind {name!r}")


# Roles


def run_program(job):
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program"]
    exec(compile(job["code"], "program", "exec"), module.__dict__)


def run_candidate(job):
    """Execute the code, then serve the requests of Link and Remote below: names, call, get and set."""
    objects = []

    def hold(value):
        objects.append(value)
        return len(objects) - 1

    with open(job["link"], "rb") as requests, open(job["link"], "wb", closefd=False) as replies:
        module = types.ModuleType("candidate")
        sys.modules["candidate"] = module
        namespace = module.__dict__
        exec(compile(job["code"], "candidate", "exec"), namespace)
        for line in requests:
            action, *message = decode(json.loads(line), objects.__getitem__)
            try:
                if action == "names":
                    result = {name: namespace[name] for name in message[0] if name in namespace}
                elif action == "call":
                    function, arguments, keywords = message
                    result = function(*arguments, **keywords)
                elif action == "get":
                    result = getattr(*message)
                else:
                    result = setattr(*message)
                reply = {"value": encode(result, hold)}
            except BaseException as error:
                reply = {"raised": type(error).__name__}
            replies.write(json.dumps(reply).encode() + b"\n")
            replies.flush()


class Link:
    """The judge's connection to the candidate. The candidate may send anything; none of it is executed."""

    def __init__(self, descriptor):
        self.replies = open(descriptor, "rb")  # noqa: SIM115 - open for the life of the process
        self.requests = open(descriptor, "wb", closefd=False)  # noqa: SIM115

    def ask(self, *message):
        self.requests.write(json.dumps(encode(list(message), self.refuse)).encode() + b"\n")
        self.requests.flush()
        line = self.replies.readline(MESSAGE)
        if not line.endswith(b"\n"):
            raise ConnectionError("the candidate has ended, or its value is too large")
        reply = json.loads(line)
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), None)
            known = (
                isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError)
            )
            raise (kind if known and kind else RuntimeError)("raised by the candidate")
        return decode(reply["value"], lambda number: Remote(self, int(number)))

    @staticmethod
    def refuse(value):
        if isinstance(value, Remote):
            return value._number
        raise TypeError(f"a {type(value).__name__} cannot be passed to the candidate")


class Remote:
    """Proxy of an object in the candidate: it can be called, has attributes, and equals only itself."""

    def __init__(self, link, number):
        self.__dict__.update(_link=link, _number=number)

    def __call__(self, *arguments, **keywords):
        return self._link.ask("call", self, list(arguments), keywords)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask("get", self, name)

    def __setattr__(self, name, value):
        self._link.ask("set", self, name, value)


def run_judge(job):
    """Execute the tests one by one, and report for each whether it ended without an exception.

    Names are resolved from the builtins, then `trusted` code, then the standard library, and only then from
    the candidate, so that it cannot substitute its own `abs` or `math`. `functions` always come from the
    candidate.
    """
    namespace: dict[str, Any] = {"__name__": "tests"}
    exec(compile(job["trusted"], "trusted", "exec"), namespace)
    nodes = [node for source in [job["setup"], *job["tests"]] for node in ast.walk(ast.parse(source))]
    missing = {n.id for n in nodes if isinstance(n, ast.Name)} - set(namespace) - set(dir(builtins))
    named = {n.value.id for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
    modules = missing & named & sys.stdlib_module_names
    namespace.update({name: importlib.import_module(name) for name in modules})
    wanted = [*sorted(missing - modules), *job["functions"]]
    link = Link(job["link"])
    with open(job["report"], "w") as report:
        report.write("parsed\n")
        report.flush()
        found = link.ask("names", wanted)
        namespace.update((name, value) for name, value in found.items() if name in wanted)
        exec(compile(job["setup"], "setup", "exec"), namespace)
        for test in job["tests"]:
            try:
                exec(compile(test, "test", "exec"), namespace)
                passed = True
            except Exception:
                passed = False
            report.write(json.dumps(passed) + "\n")
            report.flush()


def main():
    with open(int(sys.argv[1])) as file:
        job = json.load(file)
    role = {"program": run_program, "candidate": run_candidate, "judge": run_judge}[job["role"]]
    lock_in(job)
    os.write(job["report"], b"ready\n")
    if job["role"] != "judge":
        os.close(job["report"])
    role(job)


if __name__ == "__main__":
    main()
