"""Tables on the terminal."""

from __future__ import annotations


def table(title: str, rows: dict[str, str]) -> None:
    """Print names and values as a two-column table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title=title)
    for row in rows.items():
        table.add_row(*row)
    Console().print(table)
