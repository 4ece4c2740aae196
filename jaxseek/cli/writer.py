"""Text of a model on standard output, as it comes.

A pipe or a file gets what the model wrote, byte for byte. A terminal gets it with control characters made
visible, so that no model or file can give it commands; reasoning is dim there.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from jaxseek.machine.terminal import visible
from jaxseek.tokenizer.chat import ReasoningSplitter

_BOLD, _DIM, _RESET = "\x1b[1m", "\x1b[2m", "\x1b[0m"


class Writer:
    """Streams text to standard output."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self._styled = self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._flush: Callable[[], None] | None = None
        self._altered = False

    def plain(self, piece: str, style: str = "") -> None:
        """Write a piece, on a terminal in a style."""
        text = visible(piece) if self.terminal else piece
        self._altered |= text != piece
        sys.stdout.write(f"{style}{text}{_RESET}" if style and self._styled else text)
        sys.stdout.flush()

    def prompt(self, prompt: Any) -> None:
        """Write the text that a reply continues, on a terminal alone."""
        if isinstance(prompt, str) and self.terminal:
            self.plain(prompt, _BOLD)

    def reasoning(self, opened: bool) -> Callable[[str], None]:
        """Return a function that writes pieces of a reply, its reasoning after a [thinking] mark and dim."""
        splitter, before = ReasoningSplitter(opened), "answer"

        def write(parts: list[tuple[str, str]]) -> None:
            nonlocal before
            for kind, text in parts:
                if kind != before:
                    self.plain("[thinking] " if kind == "reasoning" else "\n\n", _DIM)
                    before = kind
                self.plain(text, _DIM if kind == "reasoning" else "")

        self._flush = lambda: write(splitter.flush())
        return lambda piece: write(splitter.feed(piece))

    def end(self) -> None:
        """Write what was held back, and end the line."""
        if self._flush:
            self._flush()
            self._flush = None
        self.plain("\n")
        if self._altered:
            self._altered = False
            print(
                "[control characters are shown as signs; a file or pipe gets them as they are]",
                file=sys.stderr,
            )

    def json(self, value: Any) -> None:
        """Write a line of JSON; text stays readable, control characters are escaped."""
        line = json.dumps(value, ensure_ascii=False)
        self.plain(re.sub("[\x7f-\x9f\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", line) + "\n")


def print_rates(timing: Any) -> None:
    """Print tokens and speed of a batch to standard error."""
    prefill = timing.prefill_tokens / max(timing.prefill_seconds, 1e-9)
    print(
        f"[{timing.prefill_tokens} prompt tokens in {timing.prefill_seconds:.2f} s ({prefill:.0f} tok/s); "
        f"{timing.decode_tokens} new at {timing.decode_rate:.1f} tok/s, compilation included]",
        file=sys.stderr,
    )
