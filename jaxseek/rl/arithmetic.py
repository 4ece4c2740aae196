"""Arithmetic problems that are generated: chains of digits modulo 10, and countdown.

A tiny model learns chains of digits from scratch. They are worked from left to right: `6-2*7*3-2*7=` has the
answer 4, by way of 4;8;4;2;4. One forward pass does not get there easily and a line of thought does, so that
accuracy and the length of replies rise together, as in the R1-Zero paper. `demonstrations` are SFT examples
for it (`python:jaxseek.rl.arithmetic:demonstrations?count=4000`), and `character_tokenizer` has a token for
each of their characters. Countdown is TinyZero's task, in our own words.
"""

from __future__ import annotations

import hashlib
import json
import operator
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from jaxseek.config.model import ConfigError
from jaxseek.rl.problem import Problem
from jaxseek.tokenizer import chat
from jaxseek.tokenizer.tokenizer import Tokenizer

Language = Literal["digits", "en", "zh"]

SEPARATOR = ";"  # between steps
WORDS: dict[Language, tuple[str, ...]] = {
    "digits": tuple("0123456789"),
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "zh": tuple("零一二三四五六七八九"),
}
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_PAD, _BOS, _EOS, _UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"


def set_apart(key: str) -> bool:
    """Return True for problems that are never trained on: one in eight, by the hash of the problem's key."""
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] % 8 == 0


def draw(rng: random.Random, terms: int) -> Problem:
    """Draw a problem of `terms` digits, with its text `problem` and the results `steps` in its record."""
    digits = [rng.randrange(10) for _ in range(terms)]
    signs = [rng.choice("+-*") for _ in digits[1:]]
    steps, text = [], str(digits[0])
    for sign, digit in zip(signs, digits[1:]):
        steps.append(_OPERATORS[sign](steps[-1] if steps else digits[0], digit) % 10)
        text += f"{sign}{digit}"
    text += "="
    return Problem(text, str(steps[-1]), {"problem": text, "steps": steps})


def demonstration(problem: Problem, shown: bool, language: Language | Sequence[Language] = "digits") -> str:
    """Write the reply to a problem from `draw`: its steps as thinking, if `shown`, and the answer in digits.

    `language` is that of the steps: one for all, or a sequence with one for each.
    """
    steps = problem.record["steps"]
    languages: Sequence[Any] = [language] * len(steps) if isinstance(language, str) else language
    thinking = SEPARATOR.join(WORDS[name][step] for name, step in zip(languages, steps, strict=True))
    return f"{chat.THINK}{thinking if shown else ''}{chat.THINK_END}{problem.answer}"


def demonstrations(
    count: int, shown: float = 1.0, terms: int = 6, seed: int = 0, words: str = "digits"
) -> list[dict[str, str]]:
    """Return `count` records {prompt, response, answer} of training problems; a share `shown` has thinking.

    `words` are the numerals of the steps: digits (which no language reward counts), en, zh, or mixed: a
    quarter of the replies is English, a quarter Chinese, and half switches from one to the other midway.
    Raises ConfigError.
    """
    if words not in (*WORDS, "mixed"):
        raise ConfigError(f"words is {words!r}, expected one of {', '.join(WORDS)}, mixed")
    for name, value, least in (("count", count, 1), ("terms", terms, 2)):
        if value < least:
            raise ConfigError(f"{name} is {value}, expected {least} or more")
    if not 0 <= shown <= 1:
        raise ConfigError(f"shown is {shown}, expected 0 to 1")
    rng = random.Random(f"demonstrations {seed}")
    records = []
    while len(records) < count:
        problem = draw(rng, terms)
        if set_apart(problem.record["problem"]):
            continue
        languages: Any = _mixed(rng, terms - 1) if words == "mixed" else words
        response = demonstration(problem, rng.random() < shown, languages)
        record = {"prompt": problem.record["problem"], "response": response, "answer": problem.answer}
        records.append(record)
    return records


def _mixed(rng: random.Random, steps: int) -> list[str]:
    first, second = rng.sample(("en", "zh"), 2)
    change = rng.randrange(1, steps) if steps > 1 and rng.random() < 0.5 else steps
    return [first] * change + [second] * (steps - change)


def character_tokenizer(directory: str | Path) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json into `directory`, for jaxseek and for transformers.

    It has 42 tokens: one for each digit, sign, space and Chinese numeral, for each English digit word, for
    `<think>` and `</think>`, and four special ones. Anything else is `<unk>`. It adds no BOS and has no chat
    template.
    """
    marks = [_PAD, _BOS, _EOS, _UNKNOWN, str(chat.THINK), str(chat.THINK_END)]
    pieces = [*marks, *WORDS["digits"], *_OPERATORS, "=", SEPARATOR, " ", *WORDS["zh"], *WORDS["en"]]
    model = models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=_UNKNOWN)
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(WORDS["en"]) + r"|[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(marks[:4])
    made.add_tokens([AddedToken(mark, normalized=False) for mark in marks[4:]])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        **dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), marks)),
    }
    files = {
        "tokenizer.json": made.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }
    tokenizer = Tokenizer(files)
    tokenizer.save(directory)
    return tokenizer


# -------------------------------------------------------------------- countdown


_LARGEST_NUMBER = 99
_LARGEST_RESULT = 999  # of the target and of intermediate results


def draw_countdown(rng: random.Random, terms: int) -> Problem:
    """Draw a countdown problem of `terms` numbers; its answer is a solution.

    Numbers are joined two by two, by a sign that gives a whole number from 1 to 999, until one is left, the
    target. The record has `numbers` and `target`.
    """
    numbers = [rng.randint(1, _LARGEST_NUMBER) for _ in range(terms)]
    left = [(number, str(number)) for number in numbers]
    while len(left) > 1:
        rng.shuffle(left)
        (a, first), (b, second) = sorted((left.pop(), left.pop()), key=lambda part: part[0], reverse=True)
        results = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if a % b == 0 else 0}
        sign = rng.choice([s for s, result in results.items() if 0 < result <= _LARGEST_RESULT])
        left.append((results[sign], f"({first} {sign} {second})"))
    target, solution = left[0]
    text = (
        f"Write an expression that equals {target}. It uses each of the numbers "
        f"{', '.join(map(str, numbers))} exactly once, and nothing else but +, -, *, / and parentheses."
    )
    return Problem(text, solution[1:-1], {"problem": text, "numbers": numbers, "target": target})


def countdown_key(problem: Problem) -> str:
    """Return a key that is equal for problems that differ only in the order of their numbers."""
    return f"{sorted(problem.record['numbers'])} {problem.record['target']}"
