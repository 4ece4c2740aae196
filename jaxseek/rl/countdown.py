"""Countdown: make a target of some numbers, each used once. TinyZero's task, in words of our own."""

from __future__ import annotations

import random

from jaxseek.rl.problem import Problem

LARGEST = 99  # of the numbers
HIGHEST = 999  # of the target and of the results on the way


def draw(rng: random.Random, terms: int) -> Problem:
    """A problem of `terms` numbers that has a solution, which is its answer. record: `numbers`, `target`.

    The numbers are joined two by two by a sign that leaves a whole number from 1 to 999, until one is left.
    """
    numbers = [rng.randint(1, LARGEST) for _ in range(terms)]
    left = [(number, str(number)) for number in numbers]
    while len(left) > 1:
        rng.shuffle(left)
        (a, first), (b, second) = sorted((left.pop(), left.pop()), key=lambda part: part[0], reverse=True)
        results = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if a % b == 0 else 0}
        sign = rng.choice([s for s, result in results.items() if 0 < result <= HIGHEST])
        left.append((results[sign], f"({first} {sign} {second})"))
    target, solution = left[0]
    text = (
        f"Write an expression that equals {target}. It uses each of the numbers "
        f"{', '.join(map(str, numbers))} exactly once, and nothing else but +, -, *, / and parentheses."
    )
    return Problem(text, solution[1:-1], {"problem": text, "numbers": numbers, "target": target})


def key(problem: Problem) -> str:
    """The same for problems that differ only in the order of their numbers."""
    return f"{sorted(problem.record['numbers'])} {problem.record['target']}"
