"""Text of a model on the terminal, as it comes."""

from __future__ import annotations

import sys
from typing import Any


class Writer:
    """Streams text to standard output; reasoning is dim where the terminal can show it."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.flush: Any = None

    def plain(self, piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    def prompt(self, prompt: Any) -> None:
        if isinstance(prompt, str) and self.console.is_terminal:
            self.console.print(prompt, end="", style="bold")

    def reasoning(self, opened: bool) -> Any:
        """A function that writes pieces of a reply, its thinking between [thinking] marks and dimmed."""
        from jaxseek.tokenizer.chat import ReasoningSplitter

        splitter, state = ReasoningSplitter(opened), {"kind": "answer"}

        def parts(parts: list[tuple[str, str]]) -> None:
            for kind, text in parts:
                if kind != state["kind"]:
                    self.console.print("[thinking] " if kind == "reasoning" else "\n\n", end="", style="dim")
                    state["kind"] = kind
                self.console.print(text, end="", style="dim" if kind == "reasoning" else None)
            sys.stdout.flush()

        self.flush = lambda: parts(splitter.flush())
        return lambda piece: parts(splitter.feed(piece))

    def end(self) -> None:
        if self.flush:
            self.flush()
            self.flush = None
        print(flush=True)


def print_rates(timing: Any) -> None:
    prefill = timing.prefill_tokens / timing.prefill_seconds
    print(
        f"[{timing.prefill_tokens} prompt tokens in {timing.prefill_seconds:.2f} s ({prefill:.0f} tok/s); "
        f"{timing.decode_tokens} new at {timing.decode_rate:.1f} tok/s, compilation included]",
        file=sys.stderr,
    )
