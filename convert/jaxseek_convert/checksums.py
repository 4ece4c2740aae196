"""Checksums of downloaded files, where the hub's tools left them: in its cache, or beside a download."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxseek.checkpoint.directory import CheckpointError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PIECE = 8 << 20


def known_sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each weight file, where the hub told it.

    It is the name of the blob that a file of the cache links to, and in what `hf download --local-dir` notes.
    """
    sums = {}
    for file in sorted(folder.glob("*.safetensors")):
        note = folder / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
        found = [Path(os.readlink(file)).name] if file.is_symlink() else []
        found += note.read_text(encoding="utf-8").split("\n")[1:2] if note.is_file() else []
        if match := next((f.strip() for f in found if _SHA256.fullmatch(f.strip())), None):
            sums[file.name] = match
    return sums


def check_sums(folder: Path, stage: Callable[[str, int], Callable[[int], Any]]) -> None:
    """Raise CheckpointError unless every file whose checksum is known has it."""
    sums = known_sums(folder)
    if not sums:
        return
    done = stage("checksum", sum((folder / name).stat().st_size for name in sums))

    def wrong(name: str) -> bool:
        made = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while piece := file.read(_PIECE):
                made.update(piece)
                done(len(piece))
        return made.hexdigest() != sums[name]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        bad = [name for name, is_wrong in zip(sums, pool.map(wrong, sums)) if is_wrong]
    if bad:
        raise CheckpointError(
            f"{folder}: {len(bad)} files have another SHA-256 than on the hub, as {bad[0]}; fetch them again"
        )
