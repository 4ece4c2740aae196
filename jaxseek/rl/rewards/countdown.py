"""Countdown reward: reach a target with each of the given numbers once, by + - * / and parentheses."""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction

from jaxseek.rl.problem import Answer
from jaxseek.rl.rewards.answers import final_answer

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SIGNS = {"×": "*", "⋅": "*", "·": "*", "÷": "/", "−": "-", r"\times": "*", r"\cdot": "*", r"\div": "/",
         r"\left": "", r"\right": "", "$": ""}  # fmt: skip
LONGEST = 40  # characters of an expression per given number: digits, spaces and parentheses


def countdown(answer: Answer) -> float:
    """Return 1 if the final answer uses each of record["numbers"] once to reach record["target"].

    `expression = target` is accepted too. The value is computed in fractions from the syntax tree, without
    executing anything. Raises ValueError for a problem without numbers and target.
    """
    record = answer.problem.record
    if "numbers" not in record or "target" not in record:
        raise ValueError("the record of the problem has no numbers and target")
    numbers, target = [int(n) for n in record["numbers"]], Fraction(record["target"])
    text = final_answer(answer)
    for sign, plain in SIGNS.items():
        text = text.replace(sign, plain)
    text, equals, result = (part.strip() for part in text.partition("="))
    if len(text) > LONGEST * len(numbers) or not re.fullmatch(r"[0-9+\-*/() ]+", text):
        return 0.0
    if equals and not re.fullmatch(r"-?[0-9]{1,20}(/[0-9]{1,20})?", result):
        return 0.0
    used: list[int] = []
    try:
        value = _value(ast.parse(text, mode="eval").body, used)
        stated = Fraction(result) if equals else value
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return 0.0
    return float(sorted(used) == sorted(numbers) and value == target == stated)


def _value(node: ast.expr, used: list[int]) -> Fraction:
    """Evaluate an expression, appending the numbers in it to `used`. Raises ValueError for other syntax."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError(f"{type(node).__name__} is no part of the game")
