"""What an answer says in the end, and whether it is the reference: as text, or as mathematics."""

from __future__ import annotations

import re

from jaxseek.rl.problem import Answer

TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
HASHES = re.compile(r"^####[ \t]*(.+)$", re.MULTILINE)
NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)?(\.\d*)?")
# Math-verify computes powers when it reads them: 9^{9^9} must not take the host's memory.
MATH_BYTES = 4 << 30


def tagged(answer: Answer) -> str:
    """What an answer gives as its result: the last `<answer>...</answer>`, else the final part.

    Thinking that never ended has no result.
    """
    if answer.thinking is None and "<think>" in answer.text:
        return ""
    found = TAGGED.findall(answer.final)
    return found[-1] if found else answer.final


def final_answer(answer: Answer) -> str:
    r"""The result alone: the last `\boxed{...}` in it, else what follows GSM8K's `####`, else all of it."""
    text = tagged(answer)
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    hashes = HASHES.findall(text)
    return (hashes[-1] if hashes else text).strip()


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` or `\fbox{...}` whose braces balance."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth, i = 1, match.end()
        while i < len(text) and depth:
            if text[i] == "\\":
                i += 1  # \{ and \} are text
            else:
                depth += {"{": 1, "}": -1}.get(text[i], 0)
            i += 1
        if not depth:
            return text[match.end() : i - 1]
    return None


def exact(answer: Answer) -> float:
    """1 where the final answer is the reference's text, up to white space and the way of writing a number."""
    return float(normal(final_answer(answer)) == normal(answer.problem.answer))


def normal(text: str) -> str:
    """Single spaces; numbers without `$`, thousands' commas, a final point and zeros that say nothing."""
    text = " ".join(text.split())
    number = text.replace("\\$", "").strip("$ ").removesuffix(".").replace("{,}", ",")
    if not NUMBER.fullmatch(number) or not any(c.isdigit() for c in number):
        return text
    whole, _, fraction = number.replace(",", "").lstrip("+-").partition(".")
    value = f"{whole.lstrip('0') or '0'}.{fraction.rstrip('0')}".removesuffix(".")
    return f"-{value}" if number.startswith("-") and value != "0" else value


def math(answer: Answer, seconds: float) -> float:
    """1 where the final answer equals the reference as mathematics, by math-verify.

    Called in the main thread of a worker process: math-verify limits its time by SIGALRM, and its memory is
    limited here. What it cannot read or compare within that is not equal.
    """
    if exact(answer):
        return 1.0
    import resource

    from math_verify import parse, verify

    text = final_answer(answer)
    forms = [f"\\boxed{{{text}}}"]
    if text == answer.final.strip():  # nothing marks the result: math-verify looks for it, too
        forms = [text] if "\n" in text else [text, *forms]
    limit = -int(-seconds // 3)  # seconds for each step, rounded up
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MATH_BYTES, hard))
    try:
        reference = parse(f"\\boxed{{{answer.problem.answer}}}", parsing_timeout=limit)
        return float(
            any(verify(reference, parse(f, parsing_timeout=limit), timeout_seconds=limit) for f in forms)
        )
    except MemoryError:
        return 0.0
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
