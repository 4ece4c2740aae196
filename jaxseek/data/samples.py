"""Sample text without a download: `python:jaxseek.data.samples:python_manual`."""

from __future__ import annotations

from pydoc_data.topics import topics

PAGE = 400  # minimum characters per page, which ends with a paragraph


def python_manual() -> list[dict[str, str]]:
    """Return the Python manual of `help()`, a few paragraphs per record: half a megabyte of English."""
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
