"""Script inside the sandbox: it locks itself in, and then executes untrusted code.

Started by execute.py as `python -S -P -s -B jail.py FD`, with a job in JSON at file descriptor FD. It ties
its life to its parent's and to a timer of the kernel, and gives up, in this order: resources (setrlimit),
capabilities, files (Landlock: only the Python installation can be read) and system calls (seccomp.py). Only
then does it read the code. Three roles:

program    runs the code as `__main__`, with its own standard input and output.
candidate  runs the code as a module, and then calls its functions on the judge's request.
judge      runs the tests. Its stand-ins for the candidate's functions pass plain data to the candidate and
           back. No code of the model runs in this process: the model can only return values.

Standard library only, and no import of jaxseek: this file is a program of its own.
"""

from __future__ import annotations

import _socket
import builtins
import collections
import ctypes
import importlib
import itertools
import json
import os
import resource
import signal
import struct
import sys
import types

TYPE_CHECKING = False  # typing takes time to import
if TYPE_CHECKING:
    from typing import Any

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 8
CLOCK_MONOTONIC, CAPABILITY_VERSION_3 = 1, 0x20080522
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
READ_FILE, READ_DIR = 1 << 2, 1 << 3
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # number of LANDLOCK_ACCESS_FS_* by ABI; later ones have 16
MESSAGE = 1 << 23  # largest value between candidate and judge, in bytes
ITEMS = 1 << 18  # longest iterator that is passed on

# Modules to import in advance, where no file can be opened afterwards.
COMMON = [
    "abc", "array", "ast", "base64", "bisect", "calendar", "cmath", "collections", "contextlib", "copy",
    "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "io",
    "itertools", "json", "math", "numbers", "operator", "pprint", "queue", "random", "re", "statistics",
    "string", "struct", "symtable", "textwrap", "threading", "time", "traceback", "typing", "unicodedata",
    "_strptime",
]  # fmt: skip


# Confinement


def limit_life(libc, calls, parent, seconds):
    """Have the kernel kill this process when its parent ends, and at the latest in `seconds`.

    Neither can be undone once the filter is in force. The timer of the process that started this one comes
    first; this is for when that is gone, or stopped.
    """
    call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent and os.getppid() != parent:  # it ended before it could be noticed
        os._exit(1)
    timer, event = ctypes.c_int(), struct.pack("=qii48x", 0, signal.SIGKILL, 0)
    whole, part = divmod(seconds + 1.0, 1.0)
    value = struct.pack("=qqqq", 0, 0, int(whole), int(part * 1e9))
    call(libc.syscall, calls["timer_create"], CLOCK_MONOTONIC, event, ctypes.byref(timer))
    call(libc.syscall, calls["timer_settime"], timer, 0, value, None)


def limit_resources(megabytes, seconds):
    for name, value in {
        "RLIMIT_AS": megabytes << 20,
        "RLIMIT_CPU": int(seconds) + 1,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NOFILE": 32,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_CORE": 1,  # 0 would still start a collector of core dumps, if the host has one
    }.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (least, least))


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


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    def __init__(self, code):
        super().__init__(len(code) // 8, code)


def restrict_calls(libc, program):
    filled = ctypes.byref(Program(program))
    call(libc.prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filled, 0, 0)


def hand_over_threads(libc, number, program, report):
    """Install the filter that asks before each thread, and send its listener along with the report."""
    filled, flag = ctypes.byref(Program(program)), SECCOMP_FILTER_FLAG_NEW_LISTENER
    listener = call(libc.syscall, number, SECCOMP_SET_MODE_FILTER, flag, filled)
    rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("=i", listener))
    link = _socket.socket(fileno=report)
    link.sendmsg([b"\n"], [rights])
    link.detach()
    os.close(listener)


def lock_in(job):
    libc = ctypes.CDLL(None, use_errno=True)
    if not job["landlock"]:
        for name in COMMON:
            importlib.import_module(name)
    calls = job["calls"]
    limit_life(libc, calls, job["parent"], job["seconds"])
    limit_resources(job["megabytes"], job["seconds"])
    header, none = struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24)
    call(libc.syscall, calls["capset"], header, none)
    call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if job["landlock"]:
        restrict_files(libc, job["landlock"], job["readable"])
    if job["threads"]:
        hand_over_threads(libc, calls["seccomp"], bytes.fromhex(job["threads"]), job["report"])
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
    if isinstance(value, (map, filter, zip, reversed, types.GeneratorType, type(iter([])))):
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
    module.__file__ = "program.py"
    sys.modules["__main__"] = module
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
                known = (k.__name__ for k in type(error).__mro__ if getattr(builtins, k.__name__, 0) is k)
                reply = {"raised": next(known)}
            replies.write(json.dumps(reply).encode() + b"\n")
            replies.flush()


class Raised(BaseException):
    """The candidate raised something: no test catches it, and none passes that has met it."""


class Unpassable(Exception):
    """A test gives the candidate what is not plain data, such as a function of its own."""


class Link:
    """The judge's connection to the candidate. The candidate may send anything; none of it is executed.

    `failed` is set by whatever goes wrong with a request, so that a test that swallows the exception has
    still not passed. An exception of the candidate reaches the test only if it is of a builtin class that the
    test names (`expected`), as in `except ValueError`; never one by which Python ends an iteration, a test
    tells that it failed, or the judge that a module is not here.
    """

    PROTOCOL = (StopIteration, StopAsyncIteration, AssertionError, ImportError)

    def __init__(self, descriptor):
        self.replies = open(descriptor, "rb")  # noqa: SIM115 - open for the life of the process
        self.requests = open(descriptor, "wb", closefd=False)  # noqa: SIM115
        self.failed, self.expected = False, set()

    def ask(self, *message):
        before, self.failed = self.failed, True
        self.requests.write(json.dumps(encode(list(message), self.refuse)).encode() + b"\n")
        self.requests.flush()
        line = self.replies.readline(MESSAGE)
        if not line.endswith(b"\n"):
            raise Raised("the candidate has ended, or its value is too large")
        reply = json.loads(line)
        if "raised" not in reply:
            value = decode(reply["value"], lambda number: Remote(self, int(number)))
            self.failed = before
            return value
        kind = getattr(builtins, str(reply["raised"]), None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, self.PROTOCOL):
            raise Raised(str(reply["raised"]))
        named = {k.__name__ for k in kind.__mro__ if issubclass(k, Exception) and k is not Exception}
        if not named & self.expected:
            raise Raised(kind.__name__)
        error = (ValueError if issubclass(kind, UnicodeError) else kind)("raised by the candidate")
        self.failed = before
        raise error

    @staticmethod
    def refuse(value):
        if isinstance(value, Remote):
            return value._number
        raise Unpassable(f"a test passes a {type(value).__name__} to the code, which takes plain data only")


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


def names_in(source):
    """Return the names that code looks up in its module, and those that it imports or defines there."""
    import symtable

    top = symtable.symtable(source, "test", "exec")
    own = {s.get_name() for s in top.get_symbols() if s.is_imported() or s.is_namespace()}
    used, tables = set(), [top]
    for table in tables:
        looked_up = (s for s in table.get_symbols() if s.is_referenced() and (table is top or s.is_global()))
        used |= {s.get_name() for s in looked_up}
        tables += table.get_children()
    return used, own


def run_judge(job):
    """Execute the tests one by one, and report for each true, false, or why the problem itself is broken.

    The candidate supplies `functions`, as far as the tests use them; a problem that does not say which these
    are gets from it the names that nothing else defines. Everything else comes from here: builtins, `trusted`
    code, the standard library, and what set-up and tests define.
    """
    import ast  # here and not above, since it takes a fifth of the time in which the other roles start

    module = sys.modules["__main__"] = types.ModuleType("__main__")
    namespace: dict[str, Any] = module.__dict__
    link, setup, tests = Link(job["link"]), job["setup"], job["tests"]
    with open(job["report"], "w") as report:

        def tell(verdict):
            report.write(json.dumps(verdict) + "\n")
            report.flush()

        def run(what, source):
            """Return whether code ran well, and what it raised."""
            link.failed = False
            try:
                exec(compile(source, what, "exec"), namespace)
            except SystemExit as end:  # unittest.main ends so
                return not (end.code or link.failed), end
            except BaseException as error:
                return False, error
            return not link.failed, None

        try:
            exec(compile(job["trusted"], "prompt", "exec"), namespace)
            sources = [setup, *tests]
            used, own = (set().union(*names) for names in zip(*map(names_in, sources)))
            nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
            attributes = [n.value for n in nodes if isinstance(n, ast.Attribute)]
            based = {n.id for n in attributes if isinstance(n, ast.Name)} & sys.stdlib_module_names
            missing = used - own - set(namespace) - set(dir(builtins))
            wanted = used & set(job["functions"]) or missing - based
            modules = {name: importlib.import_module(name) for name in (missing & based) - wanted}
            namespace.update(modules)
            link.expected = {n.id for n in nodes if isinstance(n, ast.Name)}
            in_setup = names_in(setup)[0] & wanted
        except BaseException as error:
            return tell(f"the tests cannot be read: {type(error).__name__}: {error}")
        for name in wanted & set(namespace):  # such as the beginning of a function in HumanEval's prompt
            del namespace[name]
        found = link.ask("names", sorted(wanted))
        namespace.update((name, value) for name, value in found.items() if name in wanted)
        fine, error = run("set-up", setup)
        # Code that a candidate has no part in, or a module that is not there, cannot be its fault.
        absent = isinstance(error, ImportError) and not link.failed
        if not fine and (absent or not in_setup):
            return tell(f"the set-up of the tests fails: {type(error).__name__}: {error}")
        for number, test in enumerate(tests, 1):
            passed, error = run(f"test {number}", test) if fine else (False, None)
            absent = isinstance(error, ImportError) and not link.failed
            if absent or isinstance(error, Unpassable):
                return tell(f"test {number} fails: {type(error).__name__}: {error}")
            tell(passed)


def main():
    with open(int(sys.argv[1])) as file:
        job = json.load(file)
    role = {"program": run_program, "candidate": run_candidate, "judge": run_judge}[job["role"]]
    lock_in(job)
    builtins.exit = builtins.quit = sys.exit  # `python FILE` has them, but not with -S
    sys.argv = ["program.py"]
    os.write(job["report"], b"ready\n")
    if job["role"] != "judge":  # the judge alone may report more
        os.close(job["report"])
    role(job)


if __name__ == "__main__":
    main()
