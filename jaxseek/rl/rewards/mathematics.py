r"""Compare the result of an answer with the reference as mathematics, by math-verify.

math-verify looks for results in a text and is lenient with what it finds: in "3, 4", "1 2 3 4" and "3=4" it
finds 4. A model in training learns to use that. Here it only compares, and what it is given is one result:

1. The result is the marked one (answers.py). Of a text that marks none it is what follows "answer is" or the
   like, else the last line, unless another is a bare number too.
2. In a sentence it is the only formula between dollar signs, else the only number.
3. It has no sign that separates or relates values (SEVERAL), such as a comma, "or", `<` and `\pm`, and no two
   numbers side by side, unless the reference has such signs. It has no sign that neither the reference nor
   arithmetic knows, since math-verify would read one side of it.
4. Where it is an equation, its last side counts. The first names something unknown, as in `x = 4` and
   `f(2) = 4`, or has the same value, as in `2 + 2 = 4`, and so do those between, but without a number beside
   the unknown.
"""

from __future__ import annotations

import itertools
import re

from jaxseek.rl.problem import Answer
from jaxseek.rl.rewards.answers import exact, marked, tagged

LONGEST = 1000  # characters of a result that is looked at, beyond those of the reference
# math-verify evaluates powers while parsing: this keeps 9^{9^9} from taking the host's memory.
MATH_BYTES = 4 << 30

TAIL = 5000  # characters at the end of a text that are searched for a result that is not marked
ANCHOR = re.compile(r"(?:answer|result)s?\b[^.\n]{0,40}?(?:\b(?:is|are|equals)\b|[:=])", re.IGNORECASE)
FORMULA = re.compile(r"(?<!\\)\$\$?([^$]+)(?<!\\)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
BOLD = re.compile(r"(?<!\w)(\*\*|__)(?=\S)(.+?)\1(?!\w)")
# A line that is one of several values.
BARE = re.compile(r"[\s*$]*(?:[A-Za-z]\s*=\s*)?[-+−]?[\d.,/]+[\s*$]*")
# A number in a sentence, with what is computed of numbers around it.
VALUE = re.compile(r"(?<![\w^])[-+−(]*\.?\d(?:[\d.,]|\s*[-+−*/×÷^=()]+\s*(?=[-+−(.]*\d))*[)!%]*")
MORE = re.compile(r"(?<!\^)\d")  # cm^2 is no number
LETTER, WORD = re.compile(r"[^\W\d_]"), re.compile(r"[^\W\d_]{2,}")
COMMANDS = re.compile(r"\\[A-Za-z]+")
TEXT = re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox|operatorname)\s*\{([^{}\\]*)\}")
# Not in (12,102) and \{1,200\}, which have two numbers.
THOUSANDS = re.compile(r"(?<![\d.,(\[])(?<!\\\{)(\d{1,3})((?:(?:,|\{,\}|\\,|\\!,|,\\!\s?)\d{3})+)(?![\d,])")
SPACES = re.compile(r"(?<!\\)\\[,!;: ]|~|\\q?quad(?![A-Za-z])|\s")
SUBSCRIPT = re.compile(r"(?<=[A-Za-z)}])_\s*(?:\{[^{}]*\}|\w)")
ARGUMENTS = re.compile(r"[A-Za-z]\s*(?:\\left\s*)?\([^()]*\)")
FRACTION = re.compile(r"(\\[dtc]?(?:frac|binom))\s*(\d)\s*")
# An empty group, and a fraction of one part.
HALF = re.compile(r"\{\s*\}|\\[dtc]?(?:frac|binom)\s*(?:\d(?!\d)|\{[^{}]*\})\s*(?![\s{\d\\A-Za-z])")
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+(?:\.\d*)?|[^\W\d_]+|\S", re.DOTALL)
EQUALS = re.compile(r"(?<![<>!\\])=|≈|\\approx(?![A-Za-z])")


def _commands(names: str) -> set[str]:
    return {"\\" + name for name in names.split()}


# What separates or relates values.
SEVERAL = {*",;&<>≤≥≠±∓∈∪∩∨∧", "or", "and"} | _commands(
    r"\ { } cup cap lor land vee wedge pm mp le leq leqslant lt ge geq geqslant gt ne neq in notin begin end "
    "mid setminus mathbb"
)
# What an equation may name.
UNKNOWNS = _commands(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi "
    "varphi chi psi omega ell angle triangle"
)
# What joins no numbers; math-verify would add the numbers beside it.
NEUTRAL = {*"{}|%'.°!$€£¥"} | _commands("$ % degree prime")
OPERATIONS = {*"+-−*/^()[]:=≈×÷·√∞"} | _commands(
    "frac dfrac tfrac cfrac sqrt cdot times div pi infty left right big bigl bigr approx sin cos "
    "tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp binom dbinom tbinom lfloor rfloor "
    "lceil rceil sum prod int lim max min gcd lcm overline bar hat vec displaystyle"
)


def math(answer: Answer, seconds: float) -> float:
    """Return 1 if the result of an answer equals the reference as mathematics.

    Call it in the main thread of a worker process: math-verify limits its time by SIGALRM, and this function
    limits the memory. An answer that cannot be parsed or compared within these limits is not equal.
    """
    if exact(answer):
        return 1.0
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MATH_BYTES, hard))
    try:
        result = one_result(tagged(answer), answer.problem.answer)
        return float(
            bool(result) and _sides_agree(result, seconds) and _equal(answer.problem.answer, result, seconds)
        )
    except MemoryError:
        return 0.0
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def one_result(text: str, reference: str) -> str:
    """Return the one result of a text, as far as it can be compared with the reference, else ""."""
    result = marked(text)
    if result is None:
        *_, tail = ANCHOR.split(text[-TAIL:])
        lines = [line for line in tail.lstrip(" \t\n:=").splitlines() if line.strip()] or [""]
        result = lines[0 if ANCHOR.search(text[-TAIL:]) else -1]
        if result is not lines[0] and any(BARE.fullmatch(line) for line in lines[:-1]):
            return ""
    if len(result) > LONGEST + len(reference):
        return ""
    result = SPACES.sub(" ", _without_separators(BOLD.sub(r"\2", result))).lstrip(" *:=").rstrip(" *.")
    result = result.replace("**", "^")
    if formulas := [next(filter(None, groups)) for groups in FORMULA.findall(result)]:
        rest = FORMULA.sub(" ", result)
        result = formulas[0] if len(formulas) == 1 and not MORE.search(rest) else ""
    elif _is_sentence(result) and not _is_sentence(reference) and not SEVERAL & {*_tokens(reference)}:
        sentence = TEXT.sub(r" \1 ", result)
        values, rest = VALUE.findall(sentence), VALUE.sub(" ", sentence)
        result = values[0].strip(",. =") if len(values) == 1 and not MORE.search(rest) else ""
    return result if _comparable(result, reference) else ""


def _is_sentence(text: str) -> bool:
    """Return whether a text has words, and no formula among them."""
    words = TEXT.sub(r" \1 ", text)
    return not COMMANDS.search(words) and bool(WORD.search(words))


def _comparable(result: str, reference: str) -> bool:
    """Return whether every sign of a result is one of the reference or of one value."""
    found, known = _tokens(result), set(_tokens(reference))
    allowed = OPERATIONS | UNKNOWNS | NEUTRAL | known | (SEVERAL if known & SEVERAL else set())
    if any(not (token in allowed or token[0].isalnum()) for token in found):
        return False
    if HALF.search(result) or found.count(r"\left") != found.count(r"\right"):
        return False
    if known & SEVERAL:
        return True
    solid = [token for token in found if token not in NEUTRAL and not token.isalpha()]
    neighbours = any(a[0].isdigit() and b[0].isdigit() for a, b in itertools.pairwise(solid))
    return not neighbours and not SEVERAL & set(found)


def _tokens(text: str) -> list[str]:
    """Return the signs, numbers and words of a formula, without what separates no values."""
    text = SUBSCRIPT.sub("", _without_separators(TEXT.sub(r" \1 ", text)))
    text = ARGUMENTS.sub(lambda m: m[0].replace(",", "+"), text)
    if "frac" in text or "binom" in text:
        text = re.sub(r"\}\s*(?=[{\d])", "}/", FRACTION.sub(r"\1{\2}/", text))
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "°", text)
    return [token.lower() for token in TOKEN.findall(SPACES.sub(" ", text))]


def _without_separators(text: str) -> str:
    return THOUSANDS.sub(lambda m: m[1] + re.sub(r"\D", "", m[2]), text)


def _sides_agree(result: str, seconds: float) -> bool:
    *before, last = EQUALS.split(result)
    return bool(SEVERAL & {*_tokens(result)}) or all(
        (_names_something(side) and (not i or not re.search(r"\d", side))) or _equal(side, last, seconds)
        for i, side in enumerate(before)
    )


def _names_something(side: str) -> bool:
    return bool(UNKNOWNS & {*COMMANDS.findall(side)} or LETTER.search(COMMANDS.sub(" ", side)))


def _equal(reference: str, result: str, seconds: float) -> bool:
    from math_verify import parse, verify

    limit = -int(-seconds // 3)  # seconds for each step, rounded up
    known, found = (parse(f"\\boxed{{{text}}}", parsing_timeout=limit) for text in (reference, result))
    return verify(known, found, timeout_seconds=limit)
