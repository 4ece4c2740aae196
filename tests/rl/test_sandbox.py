"""Code that tries to leave the sandbox stays in, and passes a test only by returning the right value."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxseek.config.model import ConfigError
from jaxseek.rl.problem import Answer, Problem
from jaxseek.rl.rewards.code import code, extract, form_of_tests, programs
from jaxseek.rl.sandbox import execute, jail, seccomp
from jaxseek.tokenizer import template_process

DATA = Path(__file__).parents[3] / "shared" / "data"
SUPPORTED = sys.platform == "linux" and platform.machine() in seccomp.MACHINES
inside = pytest.mark.skipif(not SUPPORTED, reason="the sandbox needs Linux on x86_64 or aarch64")
SECONDS = 20.0  # far more than is needed, for tests of other things than time


def answer(text, /, **record):
    return Answer(Problem("", "", record), text, None, text, 1, "stop")


def score(text, /, **record):
    return code(answer(text, **record), SECONDS, 512)


@inside
def test_a_program_reads_its_input_and_is_heard():
    outcome = execute.run("import sys\nprint(sum(map(int, sys.stdin)), 'é')", "1\n2\n", SECONDS)
    assert outcome == execute.Outcome(True, "3 é\n")


MODULES = "math re collections itertools functools heapq bisect string json random datetime typing decimal"
MODULES += " fractions statistics copy operator threading dataclasses enum"
THREADS = """
import sys, threading
sys.setrecursionlimit(10**5); threading.stack_size(16 << 20)
def depth(n): return n and 1 + depth(n - 1)
thread = threading.Thread(target=lambda: print(depth(5000)))
thread.start(); thread.join()
"""


@inside
def test_a_program_may_use_what_python_file_has():
    ends = ["exit()", "quit()", "exit(0)", "sys.exit()", "raise SystemExit", "print(__file__[-3:])"]
    outcomes = [execute.run(f"import sys\nprint(open(0).read())\n{end}", "4", SECONDS) for end in ends]
    assert [o.stdout for o in outcomes] == ["4\n"] * 5 + ["4\n.py\n"]
    assert all(o.ok for o in outcomes)
    deep = "import resource\nresource.setrlimit(resource.RLIMIT_STACK, (1 << 26, 1 << 26))\nprint(1)"
    assert execute.run(deep, "", SECONDS) == execute.Outcome(True, "1\n")
    assert execute.run("exit(3)", "", SECONDS).reason == "exit status 3: "


@inside
@pytest.mark.parametrize("landlock", [True, False])
def test_what_honest_programs_use_works(landlock, monkeypatch):
    if landlock and not execute._landlock():
        pytest.skip("this kernel has no Landlock")
    if not landlock:
        monkeypatch.setattr(execute, "_landlock", lambda: 0)
    imports = f"import {MODULES.replace(' ', ', ')}\n"
    dates = "print(datetime.datetime.strptime('2024-02-29', '%Y-%m-%d').year)\n"
    data = "@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\nprint(A())\n"
    ending = "import sys\nsys.exit(0)"
    outcome = execute.run(imports + dates + data + THREADS + ending, "", SECONDS)
    assert outcome == execute.Outcome(True, "2024\nA(x=1)\n5000\n")
    assert "Operation not permitted" in execute.run("open('x', 'w')", "", SECONDS).reason
    assert "not permitted" in execute.run("open('/etc/passwd')", "", SECONDS).reason or landlock


# Each prints "escaped" if it gets what it wants, and fails or is ended otherwise. None does harm
# where it succeeds: signals are of the kinds that nobody notices.
TRY = "import os, sys, signal, socket, subprocess, ctypes, resource\n"
ESCAPES = {
    "fork": "os.fork(); print('escaped')",
    "fork through ctypes": "print('escaped' if ctypes.CDLL(None).fork() >= 0 else 'held')",
    "clone3": "print('escaped' if ctypes.CDLL(None).syscall(435, 0, 0) >= 0 else 'held')",
    "shell": "print('escaped' if os.system('true') == 0 else 'held')",
    "subprocess": "subprocess.run(['/bin/true']); print('escaped')",
    "exec": "os.execv(sys.executable, ['python', '-c', 'print(\"escaped\")'])",
    "socket": "socket.socket(); print('escaped')",
    "socket pair": "socket.socketpair(); print('escaped')",
    "write": "open('here', 'w'); print('escaped')",
    "write elsewhere": "open('/tmp/jaxseek-escaped', 'w'); print('escaped')",
    "append": "open('/dev/null', 'a'); print('escaped')",
    "delete": "os.unlink(TARGET); print('escaped')",
    "rename": "os.rename(TARGET, TARGET + '2'); print('escaped')",
    "truncate": "os.truncate(TARGET, 0); print('escaped')",
    "mode": "os.chmod(TARGET, 0); print('escaped')",
    "folder": "os.mkdir('folder'); print('escaped')",
    "link": "os.symlink(TARGET, 'link'); print('escaped')",
    "read": "open(TARGET).read(); print('escaped')",
    "passwords": "open('/etc/passwd').read(); print('escaped')",
    "listing": "os.listdir('/'); print('escaped')",
    "parent's environment": "open(f'/proc/{os.getppid()}/environ').read(); print('escaped')",
    "signal the parent": "os.kill(os.getppid(), signal.SIGURG); print('escaped')",
    "signal all": "os.kill(-1, 0); print('escaped')",
    "question the parent": "os.kill(os.getppid(), 0); print('escaped')",
    "raise limits": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print('escaped')",
    "trace": "print('escaped' if ctypes.CDLL(None).ptrace(0, 0, 0, 0) >= 0 else 'held')",
    "memory file": "os.memfd_create('x'); print('escaped')",
    "environment": "print('escaped' if 'JAXSEEK_SECRET' in os.environ else 'held')",
    "files": "for i in range(3, 32): os.fstat(i); print('escaped')",
    "site packages": "import numpy; print('escaped')",
}


@inside
def test_no_escape_succeeds(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.write_text("untouched")
    monkeypatch.setenv("JAXSEEK_SECRET", "1")
    sources = [TRY + f"TARGET = {str(target)!r}\n" + e for e in ESCAPES.values()]
    with ThreadPoolExecutor(2) as pool:
        outcomes = dict(zip(ESCAPES, pool.map(lambda s: execute.run(s, "", SECONDS), sources)))
    assert {name: o for name, o in outcomes.items() if "escaped" in o.stdout or o.reason == "timed out"} == {}
    # They failed for the sandbox's reasons, not by a slip in this file.
    slips = [
        o.reason for o in outcomes.values() if re.search("NameError|SyntaxError|AttributeError", o.reason)
    ]
    assert slips == []
    assert target.read_text() == "untouched"
    assert list(tmp_path.iterdir()) == [target]


@inside
def test_the_escapes_would_succeed_outside(tmp_path):
    """The attempts are real: without the sandbox, those that harm nobody get what they want."""
    (tmp_path / "target").write_text("")
    harmless = ("fork", "shell", "subprocess", "socket", "write", "read", "passwords", "memory file")
    for name in harmless:
        source = TRY + "TARGET = 'target'\n" + ESCAPES[name]
        run = subprocess.run(
            [sys.executable, "-S", "-c", source], cwd=tmp_path, capture_output=True, text=True
        )
        assert "escaped" in run.stdout, name


GREEDY = {
    "memory": ("x = bytes(1 << 28)", "MemoryError"),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytes(10**6))", "MemoryError"),
    "open files": ("import os\nfor _ in range(100): os.dup(1)", "Too many open files"),
    "depth": ("def f(): f()\nf()", "RecursionError"),
    "digits": ("print(10**10**4)", "ValueError"),
    "output": ("while True: print('x' * 1000)", "printed more than"),
    "errors": ("import sys\nwhile True: print('x' * 1000, file=sys.stderr)", "printed more than"),
    "NUL": ("\0", "SyntaxError"),
    "syntax": ("def", "SyntaxError"),
    "half a character": ("x = '\ud800'", "UnicodeEncodeError"),
    "abort": ("import os\nos.abort()", "killed by signal"),
    "status": ("import sys\nsys.exit(3)", "exit status 3"),
}


@inside
@pytest.mark.parametrize("name", GREEDY)
def test_a_greedy_or_broken_program_ends_with_a_reason(name):
    source, reason = GREEDY[name]
    started = time.monotonic()
    outcome = execute.run(source, "", SECONDS, 128)
    assert not outcome.ok
    assert reason in outcome.reason
    assert len(outcome.stdout) < 2 * execute.OUTPUT
    assert time.monotonic() - started < SECONDS / 2


HANGS = {
    "loop": "while True: pass",
    "loop in C": "sum(range(10**12))",
    "power": "9**9**9",
    "sleep": "import time; time.sleep(1000)",
    "no signals": "import signal\nfor s in {*signal.valid_signals()} - {9, 19}:\n"
    "    signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "closed output": "import os; os.close(1); os.close(2)\nwhile True: pass",
    "thread": "import threading\ndef f():\n    while True: pass\nthreading.Thread(target=f).start()",
}


@inside
def test_a_program_that_hangs_is_killed_in_time():
    started = time.monotonic()
    with ThreadPoolExecutor(len(HANGS)) as pool:
        outcomes = dict(zip(HANGS, pool.map(lambda s: execute.run(s, "", 1.5), HANGS.values())))
    took = time.monotonic() - started
    assert {name: o.reason for name, o in outcomes.items()} == dict.fromkeys(HANGS, "timed out")
    assert 1.5 <= took < 6.5


@inside
def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    template_process.stop()  # which renders chat templates for other tests
    descriptors = len(os.listdir("/proc/self/fd"))
    execute.run("print(1)", "", SECONDS)
    execute.run("while True: pass", "", 1.0)
    execute.judge("def f(): return 1", ["assert f() == 1"], seconds=SECONDS)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# What the code is for is "assert f(1) == 2"; nothing here returns 2.
SOCKET = """import os, stat
LINK = next(i for i in range(3, 32) if stat.S_ISSOCK(os.fstat(i).st_mode))
"""
FORGERIES = {
    "nothing": "",
    "wrong": "def f(x): return 3",
    "end well": "import sys\nsys.exit(0)",
    "end at once": "import os\nos._exit(0)",
    "end when called": "import os\ndef f(x): os._exit(0)",
    "raise SystemExit": "def f(x): raise SystemExit(0)",
    "interrupt": "def f(x): raise KeyboardInterrupt",
    "equal to everything": "class A(int):\n    def __eq__(self, o): return True\ndef f(x): return A(7)",
    "equal object": "class A:\n    def __eq__(self, o): return True\ndef f(x): return A()",
    "a lying dict": "class A(dict):\n    def __eq__(self, o): return True\ndef f(x): return A()",
    "builtins": "import builtins as b\nb.compile = b.exec = lambda *a, **k: None\ndef f(x): return 3",
    "AssertionError": "import builtins\nbuiltins.AssertionError = None\ndef f(x): return 3",
    "print": "print('true\\n' * 9)\ndef f(x): print('true'); return 3",
    "write everywhere": "import os\nfor i in range(32):\n    try: os.write(i, b'ready\\nparsed\\ntrue\\n')\n"
    "    except OSError: pass\ndef f(x): return 3",
    "frames": "import sys\nframe = sys._getframe()\nwhile frame:\n    for k in frame.f_locals:\n"
    "        if k == 'passed': frame.f_locals[k] = True\n    frame = frame.f_back\ndef f(x): return 3",
    "strange replies": SOCKET + "def f(x):\n"
    '    os.write(LINK, b\'{"value": {"made": ["os", "_exit", [0]]}}\\n\')',
    "a long reply": "def f(x): return 'x' * 10**8",
    "a deep reply": "def f(x):\n    v = []\n    for _ in range(10**5): v = [v]\n    return v",
    "endless": "def f(x):\n    while True: yield 2",
}


@inside
def test_a_test_is_not_passed_by_other_means():
    def judged(source):
        return execute.judge(source, ["assert f(1) == 2"], seconds=SECONDS, megabytes=256)

    with ThreadPoolExecutor(2) as pool:
        verdicts = dict(zip(FORGERIES, pool.map(judged, FORGERIES.values())))
    assert verdicts == {name: [False] for name in FORGERIES}
    assert judged("def f(x): return 2") == [True]


@inside
def test_a_test_has_its_own_builtins_and_modules():
    cheat = (
        "abs = len = set = lambda *a: 0\n"
        "class math: isclose = lambda *a: True\n"
        "def helper(x): return 0\ndef f(x): return 100\n"
    )
    tests = ["assert abs(f(1) - 2) < 1", "assert math.isclose(f(1), 2)", "assert set([f(1)]) == set([2])"]
    tests.append("assert helper(f(1)) == 0")
    trusted = "def helper(x): return x - 2"
    right = cheat.replace("return 100", "return 2")
    assert execute.judge(cheat, tests, trusted=trusted, seconds=SECONDS) == [False] * 4
    assert execute.judge(right, tests, trusted=trusted, seconds=SECONDS) == [True] * 4


@inside
def test_plain_data_and_objects_pass_between_test_and_code():
    source = (
        "from collections import Counter, deque, namedtuple\nfrom fractions import Fraction\n"
        "import datetime\nP = namedtuple('P', 'a b')\nLIMIT = 5\n"
        "class Node:\n    def __init__(self, v): self.v, self.next = v, None\n"
        "    def total(self): return self.v + (self.next.total() if self.next else 0)\n"
        "def same(x): return x\ndef total(n): return n.total()\n"
        "def of(t, *xs, key=1): return [x for x in xs if isinstance(x, t)] * key\n"
        "def bad(): raise KeyError('k')\ndef squares(): return (i * i for i in range(3))\n"
    )
    values = (
        "[None, True, 1.5, float('inf'), 10**5000, 'é\\ud800', b'x', 1j, (1, (2,)), {1, 2}, frozenset('a'),"
    )
    values += " {(1, 2): [3]}, range(3), __import__('fractions').Fraction(1, 3),"
    values += " __import__('datetime').date(2024, 2, 29), int]"
    tests = [
        f"for v in {values}: assert same(v) == v and type(same(v)) is type(v), v",
        "assert P(1, 2) == (1, 2) and LIMIT == 5",
        "a = Node(1); a.next = Node(2); a.next.next = Node(4); assert total(a) == 7 and a.next.v == 2",
        "assert of(int, 1, 'a', 2, key=2) == [1, 2, 1, 2]",
        "try: bad()\nexcept KeyError: pass\nelse: raise AssertionError",
        "assert list(squares()) == [0, 1, 4]",
        "assert total(Node(3)) == 4",
    ]
    assert execute.judge(source, tests, seconds=SECONDS) == [True] * 6 + [False]


def test_what_is_read_from_the_candidate_makes_plain_data_only():
    value = {"a": [1, (2.5, {3}), b"x", None], 10**30: range(3)}
    data = json.loads(json.dumps(jail.encode(value, None)))
    assert jail.decode(data, None) == value
    for hostile in (
        {"made": ["os", "getpid", []]},
        {"made": ["builtins", "eval", ["1"]]},
        {"pickle": "gASVAA=="},
    ):
        with pytest.raises(ValueError, match="unknown kind"):
            jail.decode(hostile, None)


@inside
def test_tests_before_a_hang_count_and_those_after_it_do_not():
    source = "def f(x):\n    while x == 2: pass\n    return x"
    tests = ["assert f(1) == 1", "assert f(0) == 0", "assert f(2) == 2", "assert f(1) == 1"]
    assert execute.judge(source, tests, seconds=2.0) == [True, True, False, False]


@inside
def test_tests_that_are_no_python_are_an_error():
    with pytest.raises(execute.BrokenProblem, match="cannot be read"):
        execute.judge("def f(): return 1", ["assert f( == 1"], seconds=SECONDS)


def test_elsewhere_than_on_linux_code_rewards_are_refused(monkeypatch):
    execute.check_platform.cache_clear()
    monkeypatch.setattr(execute.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"need Linux on x86_64 or aarch64.*darwin"):
        execute.check_platform()
    monkeypatch.setattr(execute.sys, "platform", "linux")
    monkeypatch.setattr(execute.platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match="riscv64"):
        execute.check_platform()


@inside
def test_a_machine_without_what_is_needed_is_refused_with_the_reason(monkeypatch):
    execute.check_platform.cache_clear()
    monkeypatch.setitem(execute.WRAPPERS, "nsjail", ["no-such-jail"])
    with pytest.raises(ConfigError, match=r'"nsjail" needs the program no-such-jail, which is not on PATH'):
        execute.check_platform("nsjail")
    monkeypatch.setattr(execute, "PROBE", "exit(3)")
    with pytest.raises(ConfigError, match=r"does not hold a first program: exit status 3"):
        execute.check_platform()
    monkeypatch.setattr(seccomp, "program", lambda *a: b"\0" * 8)  # no filter that a kernel takes
    with pytest.raises(ConfigError, match=r"seccomp filters.* did not start: OSError: .*Invalid argument$"):
        execute.check_platform()


@inside
def test_without_a_listener_a_program_has_one_thread(monkeypatch):
    monkeypatch.setattr(execute, "_threads", lambda: False)
    source = "import threading\nthreading.Thread(target=print).start()"
    assert "can't start new thread" in execute.run(source, "", SECONDS).reason
    assert execute.judge("def f(): return 1", ["assert f() == 1"], seconds=SECONDS) == [True]


def interpret(program, number, arguments=(), arch=None, machine="x86_64"):
    """What a classic BPF program returns for a system call: the oracle for both machines."""
    words = {0: number, 4: seccomp.MACHINES[machine][0] if arch is None else arch}
    words |= {16 + 8 * i: a & 0xFFFFFFFF for i, a in enumerate(arguments)}
    at = value = 0
    while True:
        word = program[8 * at : 8 * at + 8]
        operation, yes, no = int.from_bytes(word[:2], "little"), word[2], word[3]
        k = int.from_bytes(word[4:], "little")
        at += 1
        if operation == 0x06:
            return k
        if operation == 0x20:
            value = words.get(k, 0)
        else:
            at += yes if (value == k if operation == 0x15 else value & k) else no


@pytest.mark.parametrize(
    ("machine", "openat", "clone", "execve"), [("x86_64", 257, 56, 59), ("aarch64", 56, 220, 221)]
)
def test_the_filter_decides_as_written(machine, openat, clone, execve):
    allow, deny, kill = 0x7FFF0000, 0x00050001, 0x80000000
    program = seccomp.program(machine, opens=True)
    column = seccomp.MACHINES[machine][1]

    def decide(number, *arguments, **other):
        return interpret(program, number, arguments, machine=machine, **other)

    assert decide(openat, -100, 0, os.O_RDONLY | os.O_CLOEXEC) == allow
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND):
        assert decide(openat, -100, 0, flags) == deny
    assert interpret(seccomp.program(machine, opens=False), openat, (-100, 0, 0), machine=machine) == deny
    assert decide(clone, 0x3D0F00) == allow  # what pthread_create asks for
    assert decide(clone, signal.SIGCHLD) == deny
    assert decide(435) == 0x00050000 | 38
    assert decide(execve) == deny
    assert decide(0, arch=0x40000003) == kill  # 32-bit calls on x86_64
    assert decide(0x40000000 | execve) == deny
    ioctl, fcntl = seccomp.IOCTL[column], seccomp.FCNTL[column]
    assert [decide(ioctl, 1, k) for k in (0x5401, 0x5412)] == [allow, deny]  # TCGETS, TIOCSTI
    assert [decide(fcntl, 1, k) for k in (3, 1030, 8)] == [allow, allow, deny]  # F_SETOWN
    mmap, madvise = seccomp.MMAP[column], seccomp.MADVISE[column]
    private, shared, locked, huge = 0x22, 0x21, 0x2022, 0x40022  # anonymous, with PROT_READ | PROT_WRITE
    assert [decide(mmap, 0, 1, 3, f) for f in (private, shared, locked, huge)] == [allow, deny, deny, deny]
    assert decide(mmap, 0, 1, 1, 1) == allow  # a file, shared and read alone
    assert [decide(madvise, 0, 1, a) for a in (4, 12, 14, 100)] == [allow, deny, deny, deny]
    allowed = {n[column] for n in seccomp.ALLOWED.values() if n[column] is not None}
    prlimit = seccomp.PRLIMIT64[column]
    assert [decide(prlimit, *a) for a in ((0, 3), (0, 9), (1, 3))] == [allow, deny, deny]  # RLIMIT_STACK, _AS
    special = {openat, clone, 435, ioctl, fcntl, mmap, madvise, *([2] if machine == "x86_64" else [])}
    assert {n for n in range(1024) if decide(n) == allow} - special == allowed
    assert (
        interpret(seccomp.program(machine, True, threads=False), clone, (0x3D0F00,), machine=machine) == deny
    )
    asks = seccomp.thread_filter(machine)
    assert [interpret(asks, n, machine=machine) for n in (clone, openat)] == [0x7FC00000, allow]


def test_the_last_block_of_python_is_the_code():
    assert extract(answer("a\n```python\nx = 1\n```\nb\n```python\nx = 2\n```\nc")) == "x = 2\n"
    assert extract(answer("```python\nx = 1\n```\n```\noutput\n```")) == "x = 1\n"
    assert extract(answer("```\nx = 3\n```")) == "x = 3\n"
    assert extract(answer("<answer>```py\n  x\n```</answer> ```python\ny\n```")) == "  x\n"
    assert extract(answer("x = 4")) == "x = 4"
    assert extract(answer("```bash\nls\n```\n```\nx = 5\n```")) == "x = 5\n"
    assert extract(answer("```python\nx = 1\n```\n```python\nx =")) == ""  # cut off


@pytest.mark.parametrize("unit", ["```python\n", "```\n", "``` ", "```" + " " * 999, "\n", "<answer>"])
def test_finding_the_code_takes_time_in_proportion(unit):
    started = time.monotonic()
    extract(answer(unit * (10**6 // len(unit))))
    assert time.monotonic() - started < 2.0


@inside
def test_the_score_is_the_share_of_tests_that_pass():
    tests = ["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 4", "assert g() == 1"]
    good = "```python\ndef f(x): return x + 1\n```"
    assert score(good, tests=tests) == 0.75
    assert score(good, test_list=tests[:2], test_setup_code="") == 1.0
    assert score("no code at all", tests=tests) == 0.0
    assert (
        score("def sum(a): return 1", test_list=["assert sum([5]) == 1"], code="def sum(a): return 1") == 1.0
    )
    programs = [{"input": "1 2\n", "output": "3"}, {"input": "5 5\n", "output": "10 \n\n"}]
    assert score("```python\nprint(sum(map(int, input().split())))\n```", tests=programs) == 1.0
    assert score("```python\nprint(3)\n```", tests=programs) == 0.5
    assert score("```python\nprint(3)\nprint(1/0)\n```", tests=programs) == 0.0
    assert score(good) is None


FORMS = [
    ([{"input": "1 2\n", "output": "3\n"}], ("1 2\n", "3\n")),
    ({"inputs": ["1 2\n"], "outputs": ["3\n"]}, ("1 2\n", "3\n")),
    ({"input": [5], "output": [["3", 4]]}, ("5", "3\n4")),
    ([{"input": ["1 2", "3"], "output": 3}], ("1 2\n3", "3")),
    ('{"inputs": ["1"], "outputs": ["2"]}', ("1", "2")),
]
NO_FORMS = [
    {"tests": {"inputs": ["1"], "outputs": []}},
    {"tests": {"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}},
    {"tests": [{"input": "1"}]},
    {"tests": [{"input": [[1]], "output": "1"}]},
    {"tests": [{"input": {"a": 1}, "output": "1"}]},
    {"tests": ["f(1) == 2"]},  # asserts nothing, so that everything would pass
    {"tests": ["assert f(1) == 2", None]},
    {"tests": "assert f(1) == 2"},
    {"tests": 5},
    {"test_list": [{"input": "1", "output": "1"}]},
    {"test_list": ["assert f(1)"], "test_setup_code": ["import math"]},
    {"prompt": "def f(x):\n", "test": "class T: pass"},
    {"prompt": "Write f.", "test": "assert f(1) == 2"},
]


@pytest.mark.parametrize(("tests", "first"), FORMS)
def test_tests_of_programs_come_in_several_forms(tests, first):
    assert form_of_tests({"tests": tests}) == "tests"
    assert programs(tests) == [first]


@pytest.mark.parametrize("record", NO_FORMS)
def test_tests_of_no_known_form_are_refused(record):
    with pytest.raises(ValueError, match="expected"):
        form_of_tests(record)


@inside
def test_human_eval_takes_a_continuation_or_the_whole_function():
    prompt = 'def helper(x):\n    return x\n\n\ndef f(x):\n    """Adds one."""\n'
    test = "def check(candidate):\n    assert helper(candidate(1)) == 2\n"
    record = {"prompt": prompt, "test": test, "entry_point": "f"}
    assert score("```python\n    return x + 1\n```", **record) == 1.0
    assert score("```python\ndef f(x):\n    return x + 1\n```", **record) == 1.0
    assert score("```python\ndef helper(x): return 2\ndef f(x): return 5\n```", **record) == 0.0
    del record["entry_point"]
    assert score("```python\n    return x + 1\n```", **record) == 1.0


def records(path, count):
    if not (DATA / path).exists():
        pytest.skip(f"shared/data/{path} is not here")
    lines = (DATA / path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:: len(lines) // count][:count]]


@inside
@pytest.mark.parametrize(
    ("path", "key"),
    [("mbpp/data__mbpp.jsonl", "code"), ("humaneval/data__humaneval-python.jsonl", "canonical_solution")],
)
def test_reference_solutions_pass_and_broken_ones_fail(path, key):
    def both(record):
        broken = re.sub(r"\breturn\b[^\n]*", "return 'broken'", record[key])
        return [score(f"```python\n{text}\n```", **record) for text in (record[key], broken)]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(both, records(path, 8))) == [[1.0, 0.0]] * 8
