"""Text to try things with, where there is no network: `python:jaxseek.data.samples:python_manual`."""

from __future__ import annotations

from pydoc_data.topics import topics


def python_manual() -> list[dict[str, str]]:
    """The chapters of the Python language manual that `help()` shows: about half a megabyte of English."""
    return [{"text": text.strip() + "\n"} for _, text in sorted(topics.items())]
