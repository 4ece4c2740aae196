"""Find the one result of an answer, in time proportional to its length, and compare it as text."""

from __future__ import annotations

import re
from collections import deque

from jaxseek.rl.problem import Answer

BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # escaped braces do not count
HASHES = re.compile(r"^####[ \t]*(.+)$", re.MULTILINE)
NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)?(\.\d*)?")


def tagged(answer: Answer) -> str:
    """Return the last `<answer>...</answer>` of an answer, else its final part.

    An answer whose thinking or last `<answer>` never ended is cut off and gives "".
    """
    if answer.thinking is None and "<think>" in answer.text:
        return ""
    _, opened, inside = answer.final.rpartition("<answer>")
    if not opened:
        return answer.final
    inside, closed, _ = inside.partition("</answer>")
    return inside if closed else ""


def final_answer(answer: Answer) -> str:
    """Return the result of an answer: the marked one, else everything it says after thinking."""
    text = tagged(answer)
    result = marked(text)
    return text.strip() if result is None else result


def marked(text: str) -> str | None:
    r"""Return the result that a text marks: the last `\boxed{...}`, else what follows GSM8K's last `####`.

    A last box that never closes is cut off and gives "", whatever stands before it.
    """
    if BOXED.search(text):
        return (last_boxed(text) or "").strip()
    last = deque(HASHES.finditer(text), 1)
    return last[0][1].strip() if last else None


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` or `\fbox{...}`, or None, also if that never closes."""
    last = deque(BOXED.finditer(text), 1)
    begin, depth = last[0].end() if last else len(text), 1
    for brace in BRACES.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[begin : brace.start()]
    return None


def exact(answer: Answer) -> float:
    """Return 1 if the final answer equals the reference as text, up to whitespace and number formatting."""
    return float(normal(final_answer(answer)) == normal(answer.problem.answer))


def normal(text: str) -> str:
    """Collapse whitespace, and strip a number of `$`, thousands separators, a final point and extra zeros."""
    text = " ".join(text.split())
    number = text.replace("\\$", "").strip("$ ").removesuffix(".").replace("{,}", ",")
    if not NUMBER.fullmatch(number) or not any(c.isdigit() for c in number):
        return text
    whole, _, fraction = number.replace(",", "").lstrip("+-").partition(".")
    value = f"{whole.lstrip('0') or '0'}.{fraction.rstrip('0')}".removesuffix(".")
    return f"-{value}" if number.startswith("-") and value != "0" else value
