"""What the verbs of the command line share."""

from __future__ import annotations


class WrongUse(Exception):
    """Arguments that do not go together: exit code 2."""


def table(title: str, rows: dict[str, str]) -> None:
    """Print names and values."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title=title)
    for row in rows.items():
        table.add_row(*row)
    Console().print(table)
