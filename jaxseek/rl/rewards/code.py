"""Code reward: the share of a problem's unit tests that an answer's code passes in the sandbox."""

from __future__ import annotations

import json
import re
import time
from typing import Any

from jaxseek.rl.problem import Answer
from jaxseek.rl.rewards.answers import tagged
from jaxseek.rl.sandbox import execute

PYTHON = {"python", "python2", "python3", "py"}
FUNCTION = re.compile(r"^def (\w+)", re.MULTILINE)
ASSERTS = re.compile(r"\b(?:assert|raise|check\()")
DEFINED = re.compile(r"^(?:async[ \t]+def|def|class)[ \t]+(\w+)", re.MULTILINE)


def extract(answer: Answer) -> str:
    """Return the last Python code block, else the last block without a language, else the whole result.

    A Python block that never ends is cut off and gives "".
    """
    text = tagged(answer)
    blocks: dict[bool, str] = {}  # the last of Python, and the last without a language
    language, lines = None, []
    for line in text.splitlines(keepends=True):
        mark = line.strip()
        if language is None and mark.startswith("```"):
            language, lines = mark[3:].strip().lower(), []
        elif language is not None and mark.startswith("```"):
            if language in PYTHON or not language:
                blocks[bool(language)] = "".join(lines)
            language = None
        elif language is not None:
            lines.append(line)
    if language in PYTHON:
        return ""
    return blocks.get(True, blocks.get(False, text))


def code(answer: Answer, seconds: float, megabytes: int, sandbox: str = "") -> float | None:
    """Return the share of the problem's tests that the answer's code passes; `seconds` is for all of them.

    The problem's record has the tests, in one of these forms:
    MBPP       test_list: assert statements; test_setup_code: code that runs before them. The answer is
               asked for what the reference, `code`, defines.
    else       tests: assert statements, or pairs of input and output of a program (`programs`).
    HumanEval  prompt, test (which defines `check`), and entry_point, by default the prompt's last function.
               It counts as one test. An answer may continue the prompt, or define the function again.
    None if the record has no tests. Raises ValueError for tests of another form, and BrokenProblem for those
    that fail whatever the code is.
    """
    record, program = answer.problem.record, extract(answer)
    limits: dict[str, Any] = {"seconds": seconds, "megabytes": megabytes, "sandbox": sandbox}
    form = form_of_tests(record)
    if form is None:
        return None
    if form == "test":
        verdicts = _human_eval(record, program, limits)
    elif pairs := programs(record[form]):
        verdicts = _programs(pairs, program, limits)
    else:
        setup = record.get("test_setup_code") or ""
        functions = DEFINED.findall(record.get("code") or "") or [record.get("entry_point") or ""]
        verdicts = execute.judge(program, record[form], setup=setup, functions=tuple(functions), **limits)
    return sum(verdicts) / len(verdicts)


def form_of_tests(record: dict[str, Any]) -> str | None:
    """Return the column that has a record's tests: test_list, tests, test, or None.

    Raises ValueError for tests of a form that `code` does not know, and for such as assert nothing.
    """
    form = next((name for name in ("test_list", "tests", "test") if record.get(name)), None)
    texts = ("test_setup_code", "code", "entry_point", *(["prompt", "test"] if form == "test" else []))
    for name in texts if form else ():
        if not isinstance(record.get(name) or "", str):
            raise ValueError(f"{name} is {record[name]!r:.80}, expected text")
    if form == "test":
        if not FUNCTION.search(record.get("prompt") or "") or not ASSERTS.search(record["test"]):
            raise ValueError(
                "prompt defines no function or test asserts nothing, expected a problem as in HumanEval"
            )
    elif form and not (form == "tests" and programs(record[form])):
        tests = record[form]
        if not isinstance(tests, list) or not all(isinstance(t, str) and ASSERTS.search(t) for t in tests):
            pairs = ', of {"input": ..., "output": ...}, or {"inputs": [...], "outputs": [...]}'
            expected = f"a list of assert statements{pairs if form == 'tests' else ''}"
            raise ValueError(f"{form} is {tests!r:.80}, expected {expected}")
    return form


def programs(tests: Any) -> list[tuple[str, str]] | None:
    """Return (input, output) of each test of a program, or None if the tests have another form.

    A list of {input, output}, or one such of lists, as inputs and outputs too (APPS, TACO, CodeContests).
    Texts may be lists of lines, and numbers; trailing whitespace of lines and of the output does not matter.
    """
    if isinstance(tests, str):  # APPS and TACO have it as JSON
        try:
            tests = json.loads(tests)
        except (ValueError, RecursionError):
            return None
    if isinstance(tests, dict):
        for names in (("inputs", "outputs"), ("input", "output")):
            given, wanted = (tests.get(name) for name in names)
            if set(tests) == set(names) and isinstance(given, list) and isinstance(wanted, list):
                if len(given) != len(wanted):
                    return None
                tests = [{"input": i, "output": o} for i, o in zip(given, wanted)]
                break
    if not tests or not isinstance(tests, list):
        return None
    if not all(isinstance(test, dict) and {"input", "output"} <= set(test) for test in tests):
        return None
    texts = [(_text(test["input"]), _text(test["output"])) for test in tests]
    pairs = [(given, wanted) for given, wanted in texts if given is not None and wanted is not None]
    return pairs if len(pairs) == len(tests) else None


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        lines = [_text(line) for line in value if not isinstance(line, list)]
        if len(lines) == len(value) and None not in lines:
            return "\n".join(map(str, lines))
    return None


def _human_eval(record: dict[str, Any], program: str, limits: dict[str, Any]) -> list[bool]:
    name, test = record.get("entry_point") or FUNCTION.findall(record["prompt"])[-1], record["test"]
    if re.search(r"^def check\(", test, re.MULTILINE) and not re.search(r"^check\(", test, re.MULTILINE):
        test += f"\ncheck({name})\n"
    # The test uses the prompt's own helpers, even if the answer redefines them.
    trusted = record["prompt"]
    return execute.judge(trusted + program, [test], trusted=trusted, functions=(name,), **limits)


def _programs(tests: list[tuple[str, str]], program: str, limits: dict[str, Any]) -> list[bool]:
    deadline = time.monotonic() + limits["seconds"]
    verdicts = [False] * len(tests)
    for i, (given, wanted) in enumerate(tests):
        left = deadline - time.monotonic()
        if left <= 0 or (i and left < 0.02 * limits["seconds"]):
            break
        outcome = execute.run(program, given, left, limits["megabytes"], limits["sandbox"])
        verdicts[i] = outcome.ok and _lines(outcome.stdout) == _lines(wanted)
    return verdicts


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
