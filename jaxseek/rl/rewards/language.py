"""Language reward: rewards thinking in one language, against mixing (R1 paper, section 2.3.2)."""

from __future__ import annotations

import re
from typing import Literal

from jaxseek.rl.problem import Answer

# Code, formulas and tags, which belong to no language. A dollar sign opens a formula only if another one
# closes it, so that prices do not. A formula does not open within another, so that a text of marks that never
# close is read once.
NEUTRAL = re.compile(
    r"```.*?(?:```|$)|`[^`\n]*`"
    r"|\$\$.*?\$\$|\\\[(?:(?!\\\[).)*?\\\]|\\\((?:(?!\\\().)*?\\\)|\$(?!\s)[^$\n]*(?<!\s)\$(?!\d)"
    r"|\\[A-Za-z]+|</?(?:think|answer)>",
    re.DOTALL,
)
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
LATIN = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f"
WORD = re.compile(rf"(?P<zh>[{HAN}])|(?P<en>[{LATIN}]+(?:['’][{LATIN}]+)*)|(?P<other>[^\W\d_{HAN}{LATIN}]+)")


def language(answer: Answer, target: Literal["en", "zh"]) -> float:
    """Return the share of words in the thinking (or the whole text) that are in `target`; 1 without words.

    A word is a run of Latin letters (en, by script and not by dictionary), one Chinese character (zh), or a
    run of other letters (neither). Single Latin letters are names of variables and do not count, nor do
    digits, signs, formulas, TeX commands and code.
    """
    text = NEUTRAL.sub(" ", answer.text if answer.thinking is None else answer.thinking)
    words = [m for m in WORD.finditer(text) if m.lastgroup != "en" or len(m[0]) > 1]
    return sum(m.lastgroup == target for m in words) / len(words) if words else 1.0
