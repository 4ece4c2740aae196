"""Carry the files beside a model along: licence, notes, code. They are data here, and never run."""

from __future__ import annotations

import logging
from pathlib import Path

from jaxseek.checkpoint.directory import MARKERS
from jaxseek.storage.place import Place, write_bytes
from jaxseek_convert.files import open_file
from jaxseek_convert.names import some

log = logging.getLogger("jaxseek")

_WRITTEN = (*MARKERS, "digests.json", "params")  # what a conversion writes itself
_WEIGHTS = (".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth")
_MOST = 32 << 20  # bytes of a file


def carry(source: Place, folder: Path) -> None:
    """Copy the files of `source` that are no weights and that `folder` lacks; name those left out."""
    left = []
    for at in sorted(source.iterdir(), key=str):
        name = at.name
        if name in _WRITTEN or name.startswith((".", "journal")) or (folder / name).exists():
            continue
        if name.endswith((".safetensors", ".safetensors.index.json")):  # read, or told of, as weights
            continue
        file = open_file(at) if at.is_file() else None
        if file is None or file.size > _MOST or name.endswith(_WEIGHTS) or name.startswith("adapter_"):
            left.append(name if file else f"{name}/")
        else:
            write_bytes(folder / name, at.read_bytes())
    if left:
        log.warning("%s: not carried along: %s", source, some(left, 20))
