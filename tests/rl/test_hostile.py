"""Hostile programs: none leaves the sandbox or outlives its limits, and none earns a reward."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxseek.rl.problem import Answer, Problem
from jaxseek.rl.rewards.code import code
from jaxseek.rl.sandbox import execute, jail, seccomp
from tests.rl.test_sandbox import inside

SECONDS = 20.0

# ------------------------------------------------------------------ against the machine

# Each prints "escaped" if it gets what it wants. `call` makes a system call by its number on x86_64.
HEAD = """
import ctypes, functools, mmap, os, resource, signal, sys, threading, time
print = functools.partial(print, flush=True)
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    if os.uname().machine != "x86_64": sys.exit()
    if libc.syscall(*arguments) < 0: raise OSError(ctypes.get_errno(), "held")
    print("escaped")
text = ctypes.create_string_buffer(b"/tmp")
"""
CLONE = """
stacks, made = ctypes.create_string_buffer(600 * 16384 + 64), 0
sleep, base = ctypes.cast(libc.sleep, ctypes.c_void_p), ctypes.addressof(stacks)
for i in range(1, 601):
    top = ctypes.c_void_p((base + i * 16384) // 16 * 16)
    made += libc.clone(sleep, top, 0x50f00, ctypes.c_void_p(20)) > 0
print("escaped" if made > 2 * 64 else made)
"""
MACHINE = {
    "threads by the call itself": CLONE,
    "threads of threads": "n = [0]\ndef f():\n    n.append(threading.active_count())\n"
    "    threading.Thread(target=f).start()\n"
    "    threading.Thread(target=f).start()\n    time.sleep(9)\nthreading.stack_size(1 << 16)\n"
    "threading.excepthook = lambda *a: 0\nthreading.Thread(target=f).start()\ntime.sleep(1)\n"
    "print('escaped' if max(n) > 128 else max(n)); os._exit(0)",
    "vfork": "call(58)",
    "clone without a thread": "call(56, 17, 0, 0, 0, 0)",
    "unshare": "call(272, 0x10000000)",
    "setns": "call(308, 0, 0)",
    "mount": "call(165, text, text, text, 0, 0)",
    "chroot": "call(161, text)",
    "process_vm_readv": "call(310, os.getppid(), 0, 0, 0, 0, 0)",
    "pidfd_open": "call(434, os.getppid(), 0)",
    "kill by tgkill": "call(234, os.getppid(), os.getppid(), 0)",
    "queue a signal": "call(129, os.getppid(), 0, 0)",
    "keyctl": "call(250, 0, -3, 1)",
    "bpf": "call(321, 0, 0, 0)",
    "perf": "call(298, 0, 0, -1, -1, 0)",
    "io_uring": "call(425, 8, text)",
    "userfaultfd": "call(323, 0)",
    "a filter of its own": "call(317, 1, 0, 0)",
    "capabilities": "call(126, text, 0)",
    "no end with the parent": "call(157, 1, 0, 0, 0, 0)",
    "stop the clock": "call(226, 0)",
    "set the clock": "call(223, 0, 0, ctypes.create_string_buffer(32), 0)",
    "priority": "call(141, 0, 0, 5)",
    "affinity": "call(203, 0, 8, ctypes.create_string_buffer(b'\\1' * 8))",
    "locked memory": "call(149, text, 1)",
    "mapping that is locked": "call(9, 0, 4096, 3, 0x2022, -1, 0)",
    "huge pages": "call(9, 0, 1 << 21, 3, 0x40022, -1, 0)",
    "shared memory": "mmap.mmap(-1, 1 << 20); print('escaped')",
    "shared memory of System V": "call(29, 0, 4096, 0o1600)",
    "message queue": "call(68, 0, 0o1600)",
    "poison a page": "call(28, mmap.PAGESIZE * (id(text) // mmap.PAGESIZE), 4096, 100)",
    "merge pages": "call(28, mmap.PAGESIZE * (id(text) // mmap.PAGESIZE), 4096, 12)",
    "sealed file": "call(319, text, 2)",
    "inotify": "call(253)",
    "pipe": "os.pipe(); print('escaped')",
    "write to its input": "os.write(0, b'x'); print('escaped')",
    "map its input": "mmap.mmap(0, 1); print('escaped')",
    "its files": "print('escaped' if len(os.listdir('/proc/self/fd')) > 4 else 'held')",
    "the parent's memory": "open(f'/proc/{os.getppid()}/mem', 'rb'); print('escaped')",
    "memory by threads": "x = []\ndef f():\n    while True: x.append(bytes(10**6))\n"
    "for _ in range(8): threading.Thread(target=f, daemon=True).start()\ntime.sleep(2)\n"
    "print('escaped' if len(x) > 512 else 'held'); os._exit(0)",
    "time by threads": "def f():\n    while time.process_time() < 99: pass\n"
    "for _ in range(8): threading.Thread(target=f).start()\nf(); print('escaped')",
    "no alarm": "signal.alarm(0); signal.setitimer(0, 0)\nsignal.signal(14, signal.SIG_IGN)\n"
    "time.sleep(99); print('escaped')",
}  # fmt: skip
BY_DEFAULT = (
    "threads by the call itself",
    "threads of threads",
    "stop the clock",
    "shared memory",
    "merge pages",
)


def held(names):
    def one(name):
        return execute.run(HEAD + MACHINE[name], "input", 4.0)

    with ThreadPoolExecutor(4) as pool:
        outcomes = dict(zip(names, pool.map(one, names)))
    assert {name: o for name, o in outcomes.items() if "escaped" in o.stdout} == {}
    # They failed for the sandbox's reasons, not by a slip in this file.
    slips = ("NameError", "SyntaxError", "TypeError", "AttributeError", "ArgumentError")
    assert {name: o for name, o in outcomes.items() if any(slip in o.reason for slip in slips)} == {}
    calls = {name: o.reason for name, o in outcomes.items() if MACHINE[name].startswith("call(")}
    if platform.machine() == "x86_64":
        assert {name: r for name, r in calls.items() if "PermissionError: [Errno 1] held" not in r} == {}


@inside
def test_some_programs_against_the_machine_are_held():
    held(BY_DEFAULT)


@inside
@pytest.mark.slow
def test_programs_against_the_machine_are_held():
    held(list(MACHINE))


@inside
def test_threads_are_counted_and_honest_ones_are_enough():
    source = "from threading import Thread\nimport time\nthreads = [Thread(target=time.sleep, args=(1,))"
    source += " for _ in range(N)]\nfor t in threads: t.start()\nprint('all')"
    few, many = (execute.run(f"N = {n}\n{source}", "", SECONDS, 2048) for n in (16, 3 * seccomp.THREADS))
    assert few == execute.Outcome(True, "all\n")
    assert "can't start new thread" in many.reason


# ------------------------------------------------------------------ against the end


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def started(source, tmp_path):
    """A process that runs `source` in the sandbox, the id of the sandboxed process, and the time limit."""
    script = f"from jaxseek.rl.sandbox import execute\nexecute.run({source!r}, '', 2.0)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    trainer = subprocess.Popen([sys.executable, "-c", script], env=environment)
    children = f"/proc/{trainer.pid}/task/{trainer.pid}/children"
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for child in Path(children).read_text().split():
            if "Seccomp:\t2" in Path(f"/proc/{child}/status").read_text():
                return trainer, int(child)
        time.sleep(0.02)
    raise AssertionError("no sandboxed program was seen")


def ends(pid, seconds):
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


@inside
def test_a_program_ends_with_what_started_it_and_leaves_nothing(tmp_path):
    trainer, program = started(
        "import signal, time\nsignal.pthread_sigmask(0, range(1, 65))\ntime.sleep(60)", tmp_path
    )
    trainer.kill()
    trainer.wait()
    assert ends(program, 1.0)
    assert list(tmp_path.iterdir()) == []


@inside
def test_a_program_ends_at_its_limit_also_while_what_started_it_is_stopped(tmp_path):
    trainer, program = started("import time\ntime.sleep(60)", tmp_path)
    os.kill(trainer.pid, signal.SIGSTOP)
    try:
        assert ends(program, 2.0 + 1.0 + 2.0)
    finally:
        trainer.kill()
        trainer.wait()


@inside
def test_a_program_whose_parent_has_ended_before_does_not_begin(monkeypatch):
    monkeypatch.setattr(execute.os, "getpid", lambda: 1 << 21)  # the id of no process
    with pytest.raises(execute.SandboxError):
        execute.run("print('begun')", "", SECONDS)


@inside
def test_namespaces_of_another_jail_hold_it_too(monkeypatch):
    """util-linux's unshare in place of bubblewrap: another parent, other process ids, no network."""
    wrapper = ["unshare", "-r", "-n", "-p", "-f", "--kill-child", "--"]
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    monkeypatch.setitem(execute.WRAPPERS, "bwrap", wrapper)
    execute.check_platform("bwrap")
    assert execute.run("import os\nprint(os.getpid())", "", SECONDS, sandbox="bwrap").stdout == "1\n"
    tests = ["assert f(1) == 2", "assert f(1) == 3"]
    assert execute.judge("def f(x): return 2", tests, seconds=SECONDS, sandbox="bwrap") == [True, False]
    started = time.monotonic()
    assert execute.run("while True: pass", "", 1.0, sandbox="bwrap").reason == "timed out"
    assert time.monotonic() - started < 3.0


# ------------------------------------------------------------------ against the reward

WRONG = "def f(x): return 7\n"  # right is x + 1
ONE = ["assert f(1) == 2"]
JAIL = "import sys\nj = sys.modules['__main__']\n"
EXCEPT = "try: assert f(1) == 2\nexcept {}: pass"


def raises(what):
    return f"def f(x): raise {what}\n"


def returns(base, *methods):
    """Code that returns an instance of a class with these methods."""
    lines = "".join(f"    {method}\n" for method in methods)
    return f"class A({base}):\n{lines}def f(x): return A()\n"


def writes(reply):
    """Code that writes to every file that it finds open."""
    tries = f"    try: os.write(i, {reply!r} * 9)\n    except OSError: pass\n"
    return f"import os\nfor i in range(32):\n{tries}{WRONG}"


def replies(text):
    """Code that replaces what it is asked for by this text."""
    return JAIL + f"j.json.dumps = lambda v: {text!r}\n" + WRONG


ALL, EQUAL = "lambda *a: True", "__eq__ = lambda *a: True"
GETS_ITEMS = "class T:\n    def __getitem__(s, i): return f(i)\nassert list(T()) == []"
HAS_NONE = "class T:\n    v = property(lambda s: f(1))\nassert not hasattr(T(), 'v')"
SUPPRESSED = "import contextlib\nwith contextlib.suppress(BaseException): assert f(1) == 2"
FINALLY = "def t():\n    try: assert f(1) == 2\n    finally: return\nt()"
UNITTEST = "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)\n"
UNITTEST += "unittest.main()"
REWARD = {
    "all of nothing": (raises("StopIteration"), ["assert all(map(lambda x: f(x) == x + 1, [1, 2]))"]),
    "zip of nothing": (raises("StopIteration"), ["for a, b in zip(map(f, [1]), [2]): assert a == b"]),
    "sum of nothing": (raises("StopIteration"), ["assert sum(map(f, [-1])) == 0"]),
    "next of nothing": (raises("StopIteration"), ["assert next(map(f, [1]), 2) == 2"]),
    "a generator ends": (raises("GeneratorExit"), ["assert list(f(x) for x in [1]) == [2]"]),
    "no iterator": (raises("StopAsyncIteration"), [EXCEPT.format("Exception")]),
    "exit": (raises("SystemExit(0)"), ONE),
    "exit, expected": (raises("SystemExit(0)"), [EXCEPT.format("SystemExit")]),
    "interrupt": (raises("KeyboardInterrupt"), [EXCEPT.format("BaseException")]),
    "assertion": (raises("AssertionError"), [EXCEPT.format("AssertionError")]),
    "a kind of it": ("class A(AssertionError): pass\n" + raises("A"), [EXCEPT.format("AssertionError")]),
    "no attribute": (raises("AttributeError"), [HAS_NONE]),
    "no index": (raises("IndexError"), [GETS_ITEMS]),
    "no module": (raises("ImportError"), [EXCEPT.format("ImportError")]),
    "swallowed": (raises("ValueError"), [SUPPRESSED]),
    "swallowed at the end": (raises("ValueError"), [FINALLY]),
    "a bare except": (raises("ValueError"), [EXCEPT.format("")]),
    "another name": (
        "class StopIteration(Exception): pass\n" + raises("StopIteration"), ["assert all(map(f, [1]))"]
    ),
    "builtins": (
        f"all = sorted = len = abs = isinstance = {ALL}\n{WRONG}",
        ["assert all([f(1) == 2])", "assert len([f(1)]) == f(1) - 1", "assert isinstance(f(1), str)"],
    ),
    "a module": (f"class math: isclose = {ALL}\n{WRONG}", ["assert math.isclose(f(1), 2)"]),
    "an import": (f"isclose = {ALL}\n{WRONG}", ["from math import isclose\nassert isclose(f(1), 2)"]),
    "a helper": (f"near = {ALL}\n{WRONG}", ["def near(a, b): return a == b\nassert near(f(1), 2)"]),
    "set-up": (f"half = {ALL}\n{WRONG}", ["assert half(f(1))"]),
    "unittest": (f"import unittest\nunittest.TestCase.assertEqual = {ALL}\n{WRONG}", [UNITTEST]),
    "equal": (returns("", EQUAL, f"__lt__ = {ALL}"), [*ONE, "assert f(1) < 3", "assert 2 in [f(1)]"]),
    "an equal number": (returns("int", EQUAL), [*ONE, "assert [f(1)] == [2]", "assert {f(1): 1} == {2: 1}"]),
    "equal text": (returns("str", EQUAL), ["assert f(1) == 'a'"]),
    "an equal list": (returns("list", EQUAL, "__len__ = lambda s: 1"), ["assert f(1) == [2]"]),
    "an equal tuple": (returns("tuple", EQUAL), ["assert f(1) == (2,)"]),
    "an equal dict": (returns("dict", EQUAL, "__missing__ = lambda *a: 2"), ["assert f(1) == {1: 2}"]),
    "an equal set": (returns("set", EQUAL, f"__contains__ = {ALL}"), ["assert f(1) == {2}"]),
    "false": (returns("", "__bool__ = lambda s: False"), ["assert not f(1)"]),
    "long": (returns("", "__len__ = lambda s: 2", f"__contains__ = {ALL}"), ["assert len(f(1)) == 2"]),
    "its items": (returns("", "__iter__ = lambda s: iter([2])"), ["assert list(f(1)) == [2]"]),
    "an index": (returns("", "__index__ = lambda s: 2"), ["assert [1, 1, 5][f(1)] == 5"]),
    "a hash": (returns("", EQUAL, "__hash__ = lambda s: 2"), ["assert {2: 1}[f(1)] == 1"]),
    "a class": (returns("", "__class__ = int"), ["assert isinstance(f(1), int)"]),
    "its arguments": ("def f(x): x.clear(); return []", ["x = [2, 1]\nassert f(x) == sorted(x)"]),
    "at the end": ("import atexit, os, sys\natexit.register(os._exit, 0)\ndef f(x): sys.exit(0)", ONE),
    "encode": (JAIL + "j.encode = lambda v, h: {'made': ['os', '_exit', [0]]}\n" + WRONG, ONE),
    "a number that is not held": (JAIL + "j.encode = lambda v, h: {'held': 10**30}\n" + WRONG, ONE),
    "another exception": (replies('{"raised": "SystemExit"}'), [EXCEPT.format("SystemExit")]),
    "no exception": (replies('{"raised": "__import__"}'), ONE),
    "no value": (replies("{}"), ONE),
    "no JSON": (replies("["), [EXCEPT.format("Exception")]),
    "early replies": (writes(b'{"value": true}\n'), ONE),
    "the report": (writes(b"true\n"), ONE),
    "the collector": (
        "import gc\nfor o in gc.get_objects():\n    if type(o) is dict and 'passed' in o: o['passed'] = 1\n"
        + WRONG, ONE
    ),
    "names of the judge": ("link = report = run = tell = namespace = tests = None\n" + WRONG, ONE),
    "a deep value": ("def f(x):\n    v = []\n    for _ in range(900): v = [v]\n    return v", ONE),
    "no number": ("def f(x): return float('nan')", [*ONE, "assert f(1) == f(1)"]),
}  # fmt: skip


def earned(names):
    def one(name):
        source, tests = REWARD[name]
        setup = "def half(x): return x == 2" if "half" in source else ""
        try:
            return execute.judge(source, tests, setup=setup, seconds=SECONDS, megabytes=256)
        except execute.BrokenProblem as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        verdicts = dict(zip(names, pool.map(one, names)))
    assert verdicts == {name: [False] * len(REWARD[name][1]) for name in names}


@inside
def test_some_programs_against_the_reward_earn_nothing():
    earned(["all of nothing", "an import", "swallowed", "unittest", "early replies", "long"])


@inside
@pytest.mark.slow
def test_programs_against_the_reward_earn_nothing():
    assert len(REWARD) >= 25
    assert len(REWARD) + len(MACHINE) >= 60
    earned(list(REWARD))


@inside
def test_the_same_tests_are_passed_by_right_code():
    """No test above fails for a reason of its own: those that can be passed are."""
    right = "def f(x): return x + 1\n"
    names = [
        n
        for n in REWARD
        if REWARD[n][1] == ONE or n in ("all of nothing", "an import", "unittest", "swallowed")
    ]
    tests = list(dict.fromkeys(test for n in names for test in REWARD[n][1]))
    assert execute.judge(right, tests, seconds=SECONDS) == [True] * len(tests)


@inside
def test_an_exception_that_a_test_names_reaches_it():
    source = "class Bad(ValueError): pass\ndef f(x):\n    if x < 0: raise Bad('no')\n    return [0][x]\n"
    expects = "try: f({})\nexcept {}: pass\nelse: assert False"
    tests = [
        expects.format(-1, "ValueError"),
        expects.format(3, "(KeyError, IndexError)"),
        expects.format(3, "LookupError"),
    ]
    tests += ["import unittest\nunittest.TestCase().assertRaises(ValueError, f, -1)"]
    assert execute.judge(source, tests, seconds=SECONDS) == [True] * 4
    assert execute.judge(source, [expects.format(-1, "Exception")], seconds=SECONDS) == [False]


# ------------------------------------------------------------------ problems that are broken


def scored(text, **record):
    return code(Answer(Problem("", "", record), text, None, text, 1, "stop"), SECONDS, 256)


BROKEN = {
    "a module that is not here": (
        {"test_list": ONE, "test_setup_code": "import no_such_module"},
        "no_such_module",
    ),
    "set-up": (
        {"tests": ONE, "test_setup_code": "limit = 1 / 0"},
        "set-up of the tests fails: ZeroDivisionError",
    ),
    "a test's module": (
        {"tests": ["import no_such_module\nassert f(1) == 2"]},
        "test 1 fails: ModuleNotFoundError",
    ),
    "no Python": ({"tests": ["assert f( == 2"]}, "cannot be read"),
    "a function": ({"tests": ["assert f(lambda: 1) == 2"]}, "passes a function to the code"),
}


@inside
@pytest.mark.parametrize("name", BROKEN)
def test_tests_that_fail_whatever_the_code_are_the_problems_fault(name):
    record, reason = BROKEN[name]
    for source in ("def f(x): return x + 1", WRONG, raises("ImportError")):
        with pytest.raises(execute.BrokenProblem, match=reason):
            scored(source, **record)


@inside
def test_a_set_up_that_the_code_can_break_is_its_own_fault():
    record = {"tests": ["assert value == 2"], "test_setup_code": "value = f(1)"}
    for source in ("f = 5", "", raises("ImportError"), "def f(x): return 7"):
        assert scored(source, **record) == 0.0
    assert scored("def f(x): return x + 1", **record) == 1.0


def test_what_encode_passes_on_comes_back_from_iterators_too():
    assert list(jail.decode(json.loads(json.dumps(jail.encode(iter([1, 2]), None))), None)) == [1, 2]
