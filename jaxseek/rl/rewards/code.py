"""Code reward: the share of a problem's unit tests that an answer's code passes in the sandbox."""

from __future__ import annotations

import re
import time
from typing import Any

from jaxseek.rl.problem import Answer
from jaxseek.rl.rewards.answers import tagged
from jaxseek.rl.sandbox import execute

FENCED = r"^[ \t]*```[ \t]*{}[ \t]*\r?\n(.*?)^[ \t]*```"
PYTHON = re.compile(FENCED.format(r"(?:python\d?|py)"), re.MULTILINE | re.DOTALL | re.IGNORECASE)
PLAIN = re.compile(FENCED.format(""), re.MULTILINE | re.DOTALL)


def extract(answer: Answer) -> str:
    """Return the last Python code block, else the last block without a language, else the whole result."""
    text = tagged(answer)
    for pattern in (PYTHON, PLAIN):
        if blocks := pattern.findall(text):
            return blocks[-1]
    return text


def code(answer: Answer, seconds: float, megabytes: int) -> float:
    """Return the share of the problem's tests that the answer's code passes; `seconds` is for all of them.

    The problem's record has the tests, in one of these forms:
    MBPP       test_list: assert statements; test_setup_code: code that runs before them.
    HumanEval  prompt, test (which defines `check`), and entry_point, by default the prompt's last function.
               It counts as one test. An answer may continue the prompt, or define the function again.
    else       tests: assert statements, or {input, output} of a program; trailing whitespace of lines and of
               the output does not matter.
    Raises ValueError if the record has no tests.
    """
    record, program = answer.problem.record, extract(answer)
    limits: dict[str, Any] = {"seconds": seconds, "megabytes": megabytes}
    if tests := record.get("test_list"):
        # Functions that the reference defines are taken from the answer, even if named like a builtin.
        functions = tuple(re.findall(r"^def (\w+)", record.get("code", ""), re.MULTILINE))
        setup = record.get("test_setup_code") or ""
        verdicts = execute.judge(program, tests, setup=setup, functions=functions, **limits)
    elif "test" in record and "prompt" in record:
        verdicts = _human_eval(record, program, limits)
    elif (tests := record.get("tests")) and all(isinstance(test, str) for test in tests):
        verdicts = execute.judge(program, tests, **limits)
    elif tests:
        verdicts = _programs(tests, program, limits)
    else:
        raise ValueError("the record of the problem has no test_list, no prompt and test, and no tests")
    return sum(verdicts) / len(verdicts)


def _human_eval(record: dict[str, Any], program: str, limits: dict[str, Any]) -> list[bool]:
    functions = re.findall(r"^def (\w+)", record["prompt"], re.MULTILINE)
    name, test = record.get("entry_point") or functions[-1], record["test"]
    if not re.search(r"^check\(", test, re.MULTILINE):
        test += f"\ncheck({name})\n"
    # The test uses the prompt's own helpers, even if the answer redefines them.
    trusted = record["prompt"]
    return execute.judge(trusted + program, [test], trusted=trusted, functions=(name,), **limits)


def _programs(tests: list[dict[str, str]], program: str, limits: dict[str, Any]) -> list[bool]:
    deadline = time.monotonic() + limits["seconds"]
    verdicts = [False] * len(tests)
    for i, test in enumerate(tests):
        left = deadline - time.monotonic()
        if left <= 0 or (i and left < 0.02 * limits["seconds"]):
            break
        outcome = execute.run(program, test["input"], left, limits["megabytes"])
        verdicts[i] = outcome.ok and _lines(outcome.stdout) == _lines(test["output"])
    return verdicts


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
