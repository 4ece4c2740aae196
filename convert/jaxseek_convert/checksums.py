"""SHA-256 checksums that the hub's tools record in their cache or beside a download."""

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
    """Return the recorded SHA-256 of each weight file that has one, by file name.

    A file in the hub's cache is a symlink to a blob named by its SHA-256; `hf download --local-dir` writes
    the hash into a metadata file.
    """
    sums = {}
    for file in sorted(folder.glob("*.safetensors")):
        note = folder / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
        found = [Path(os.readlink(file)).name] if file.is_symlink() else []
        found += note.read_text(encoding="utf-8", errors="replace").split("\n")[1:2] if note.is_file() else []
        if match := next((f.strip() for f in found if _SHA256.fullmatch(f.strip())), None):
            sums[file.name] = match
    return sums


def check_sums(folder: Path, stage: Callable[[str, int], Callable[[int], Any]]) -> None:
    """Raise CheckpointError if a file does not match its recorded checksum."""
    sums = known_sums(folder)
    if not sums:
        return
    done = stage("checksum", sum((folder / name).stat().st_size for name in sums))

    def wrong(name: str) -> bool:
        sha256 = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while piece := file.read(_PIECE):
                sha256.update(piece)
                done(len(piece))
        return sha256.hexdigest() != sums[name]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        bad = [name for name, is_wrong in zip(sums, pool.map(wrong, sums)) if is_wrong]
    if bad:
        raise CheckpointError(
            f"{folder}: {len(bad)} files have another SHA-256 than on the hub, as {bad[0]}; fetch them again"
        )
