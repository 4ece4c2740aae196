"""What the verbs of the command line share."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from jaxseek.machine.accelerators import unused_accelerator
from jaxseek.storage.place import place, writable

_said = False


class WrongUse(Exception):
    """Arguments that do not go together: exit code 2."""


def check_outputs(*names: str | None) -> None:
    """Raise PlaceError for files that cannot be written: asked before the work that ends with them."""
    for name in names:
        if name:
            writable(name)


def say_unused_accelerator(backend: str | None = None) -> None:
    """One line on stderr, once a process, where this machine has an accelerator that JAX does not use.

    Called before a verb runs, which finds what the installed packages cannot drive, and with JAX's `backend`
    where a verb computes with it.
    """
    global _said
    if not _said and (found := unused_accelerator(backend=backend)):
        _said = True
        what, mend = found
        print(f"jaxseek: {what}. Mend it: {mend} (JAX_PLATFORMS=cpu chooses the CPU)", file=sys.stderr)


def load_model(source: str, mesh: str | None, dtype: str | None, quiet: bool = False) -> tuple[Any, Any]:
    """A model and its tokenizer or None, which it says unless `quiet`."""
    import jax

    from jaxseek.api import load

    model, tokenizer = load(source, mesh=mesh, dtype=dtype)
    say_unused_accelerator(jax.default_backend())
    if tokenizer is None and not quiet:
        print("no tokenizer beside the weights: prompts and replies are token ids", file=sys.stderr)
    return model, tokenizer


def read_prompts(given: Sequence[str], file: str | None) -> list[Any]:
    """Texts, or chats as lists of messages: those given, of which - is standard input, then a file's."""
    prompts: list[Any] = [sys.stdin.read() if p == "-" else p for p in given]
    if file:
        lines = place(file).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate((l for l in lines if l.strip()), 1):
            if not file.endswith(".jsonl"):
                prompts.append(line)
                continue
            try:
                row = json.loads(line)
                prompts.append(row["messages"] if "messages" in row else row["prompt"])
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(
                    f'{file}, line {number}: expected JSON with "prompt" or "messages"'
                ) from None
    if not prompts:
        raise WrongUse('no prompt: give -p "text", -p - for standard input, or -f FILE')
    return prompts
