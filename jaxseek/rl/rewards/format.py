"""Format and length rewards: thinking followed by an answer, as in R1, and a limit on the tokens."""

from __future__ import annotations

import re

from jaxseek.rl.problem import Answer


def format(answer: Answer, tags: bool) -> float:
    """Return 1 for `<think>...</think>` with thinking inside, followed by an answer, neither of them blank.

    Each mark occurs once, with nothing before the first. The opening mark may be missing, since prompts may
    end with it. With `tags` the answer is `<answer>...</answer>` and nothing else (R1-Zero's template).
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
    """Return 1 up to `target` tokens, falling linearly to 0 at twice as many."""
    return min(1.0, max(0.0, 2.0 - answer.tokens / target))
