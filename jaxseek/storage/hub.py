"""Resolve model names: a path, a URL, or `hf://OWNER/NAME[@REVISION]` on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from jaxseek.storage.place import Place, PlaceError, place

HUB = "hf://"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.md", "LICENSE*", "NOTICE*")


def model_place(name: str | os.PathLike[str] | Place, weights: bool = True) -> Place:
    """Return the place of a model's files, downloading a hub model into the hub's cache first.

    Without `weights`, only config, index and tokenizer are downloaded. Raises PlaceError if that fails.
    """
    if str(name).startswith(HUB):
        return _snapshot(str(name).removeprefix(HUB).strip("/"), weights)
    return place(name)


def _snapshot(name: str, weights: bool) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise PlaceError(f"{HUB}{name}: hub names need a package: pip install huggingface_hub") from None
    repo, _, revision = name.partition("@")
    kinds = [*_SMALL, *(["*.safetensors"] if weights else [])]
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=kinds))
    except Exception as e:  # the hub raises errors of many classes
        raise PlaceError(
            f"{HUB}{name}: cannot be downloaded ({type(e).__name__}: {str(e)[:300]}); expected "
            "hf://OWNER/NAME or hf://OWNER/NAME@REVISION, and HF_TOKEN set where the model is gated"
        ) from e


def hub_hint(name: Any) -> str:
    """Return a hint to append to an error message, empty unless `name` looks like a hub repository."""
    bare = str(name).strip("/")
    return f"; did you mean {HUB}{bare}?" if _REPOSITORY.fullmatch(bare) else ""
