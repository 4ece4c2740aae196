"""Extract the result of an answer, and compare it with the reference as text or as mathematics."""

from __future__ import annotations

import re

from jaxseek.rl.problem import Answer

TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
HASHES = re.compile(r"^####[ \t]*(.+)$", re.MULTILINE)
NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)?(\.\d*)?")
# math-verify evaluates powers while parsing: this keeps 9^{9^9} from taking the host's memory.
MATH_BYTES = 4 << 30


def tagged(answer: Answer) -> str:
    """Return the last `<answer>...</answer>` of an answer, else its final part.

    An answer whose thinking never ended gives "".
    """
    if answer.thinking is None and "<think>" in answer.text:
        return ""
    found = TAGGED.findall(answer.final)
    return found[-1] if found else answer.final


def final_answer(answer: Answer) -> str:
    r"""Return the result: the last `\boxed{...}`, else the text after GSM8K's `####`, else everything."""
    text = tagged(answer)
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    hashes = HASHES.findall(text)
    return (hashes[-1] if hashes else text).strip()


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` or `\fbox{...}` with balanced braces, or None."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth, i = 1, match.end()
        while i < len(text) and depth:
            if text[i] == "\\":
                i += 1  # escaped braces do not count
            else:
                depth += {"{": 1, "}": -1}.get(text[i], 0)
            i += 1
        if not depth:
            return text[match.end() : i - 1]
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


def math(answer: Answer, seconds: float) -> float:
    """Return 1 if the final answer equals the reference as mathematics, by math-verify.

    Call it in the main thread of a worker process: math-verify limits its time by SIGALRM, and this function
    limits the memory. An answer that cannot be parsed or compared within these limits is not equal.
    """
    if exact(answer):
        return 1.0
    import resource

    from math_verify import parse, verify

    text = final_answer(answer)
    forms = [f"\\boxed{{{text}}}"]
    if text == answer.final.strip():  # the result is not marked, so math-verify searches for it as well
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
