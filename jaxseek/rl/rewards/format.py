"""What an answer looks like: thinking, then an answer, as R1 rewards it; and how long it is."""

from __future__ import annotations

import re

from jaxseek.rl.problem import Answer


def format(answer: Answer, tags: bool) -> float:
    """1 for `<think>...</think>` around thinking, followed by an answer; neither may be blank.

    Each mark stands once, and nothing before it. The opening one may be missing, as prompts may end with it.
    With `tags` the answer is `<answer>...</answer>` and nothing besides (R1-Zero's template).
    """
    before, closed, after = answer.text.partition("</think>")
    thinking = before.strip().removeprefix("<think>").strip()
    well_formed = (
        bool(closed) and bool(thinking) and "<think>" not in thinking + after and "</think>" not in after
    )
    if not tags:
        return float(well_formed and bool(after.strip()))
    inside = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", after, re.DOTALL)
    marks = answer.text.count("<answer>"), answer.text.count("</answer>")
    return float(well_formed and inside is not None and bool(inside[1].strip()) and marks == (1, 1))


def length(answer: Answer, target: int) -> float:
    """1 up to `target` tokens, then falling linearly to 0 at twice as many."""
    return min(1.0, max(0.0, 2.0 - answer.tokens / target))
