"""Text to try things with, where there is no network: `python:jaxseek.data.samples:python_manual`."""

from __future__ import annotations

from pydoc_data.topics import topics

PAGE = 400  # characters at least, up to the end of a paragraph


def python_manual() -> list[dict[str, str]]:
    """The Python language manual that `help()` shows, a few paragraphs each: half a megabyte of English."""
    pages = []
    for _, chapter in sorted(topics.items()):
        page = ""
        for paragraph in chapter.strip().split("\n\n"):
            page += paragraph + "\n\n"
            if len(page) >= PAGE:
                pages.append(page)
                page = ""
        pages += [page] if page else []
    return [{"text": page.strip() + "\n"} for page in pages]
