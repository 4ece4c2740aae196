"""Text and tables on the terminal, to which no text of a model or a file may give a command."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Control characters but for tab and newline: as their pictures, and those from U+0080 on as codes.
_VISIBLE = {c: 0x2400 + c for c in range(0x20) if chr(c) not in "\t\n"} | {0x7F: 0x2421}
_VISIBLE |= {c: f"\\x{c:x}" for c in range(0x80, 0xA0)}


def visible(text: str) -> str:
    """Return the text with its control characters made visible: no part of it is an escape sequence."""
    return text.translate(_VISIBLE)


class PlainConsole(Console):
    """A rich console that prints strings as they are: no markup, no emoji codes, no control sequences."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def on_broken_pipe(self) -> None:
        raise  # rich would end the process


def table(title: str, rows: dict[str, str]) -> None:
    """Print names and values."""
    table = Table(show_header=False, title=title)
    for row in rows.items():
        table.add_row(*row)
    PlainConsole().print(table)
