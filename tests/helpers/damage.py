"""Bits that flip on a disk."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np


def flipped_bits(folder: Path, count: int, seed: int = 0) -> Iterator[str]:
    """Flip one random bit of a random file at a time, and flip it back; yields the file's name."""
    rng = np.random.default_rng(seed)
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.stat().st_size]
    for _ in range(count):
        file = files[rng.integers(len(files))]
        whole = file.read_bytes()
        raw = bytearray(whole)
        raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        file.write_bytes(raw)
        yield str(file.relative_to(folder))
        file.write_bytes(whole)
