"""Probes of `jaxseek doctor`, each run in a process of its own: it may hang, crash or fail to import.

`python -m jaxseek.cli.probe jax` prints a line of JSON for every stage it passes: imports, then devices.
`python -m jaxseek.cli.probe bucket URL` prints one: listed, written and deleted.
"""

from __future__ import annotations

import importlib
import json
import sys
import uuid
from typing import Any

from jaxseek.storage.place import DRIVERS, READ_ONLY, PlaceError, Remote, place

IMPORTS = (
    *("numpy", "jax", "flax.nnx", "optax", "orbax.checkpoint", "grain", "tokenizers"),
    "sentencepiece.sentencepiece_model_pb2",  # fails where protobuf is older than it was generated for
)


def probe_jax() -> None:
    """Import what jaxseek needs, then ask JAX for its devices."""
    for name in IMPORTS:
        try:
            importlib.import_module(name)
            _tell(imported=name)
        except Exception as e:  # a broken installation may raise anything, and that is the finding
            _tell(imported=name, error=_one_line(e))
    try:
        import jax

        devices = jax.local_devices()
        _tell(
            backend=jax.default_backend(),
            devices=len(devices),
            kind=devices[0].device_kind,
            memory=(devices[0].memory_stats() or {}).get("bytes_limit"),
        )
    except Exception as e:
        _tell(backend=None, error=_one_line(e))


def probe_bucket(url: str) -> None:
    """List a directory; where it can be written, write a small file there and delete it."""
    try:
        at = place(url)
        names = list(at.iterdir()) if at.is_dir() else None
        writable = not (isinstance(at, Remote) and at.scheme in READ_ONLY)
        if writable:
            there = (
                at if isinstance(at, Remote) else next(p for p in (at, *at.absolute().parents) if p.exists())
            )
            file = there / f".jaxseek-doctor-{uuid.uuid4().hex}"
            file.write_bytes(b"jaxseek doctor")
            file.unlink()
        _tell(url=url, entries=None if names is None else len(names), writable=writable)
    except Exception as e:
        missing = isinstance(e, PlaceError) and "cannot be opened here" in str(e)
        driver = DRIVERS.get(url.partition("://")[0].lower())
        mend = f"pip install {driver}" if missing and driver else None
        _tell(url=url, error=" ".join(str(e).split())[:600], mend=mend)


def _tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


if __name__ == "__main__":
    probe_jax() if sys.argv[1] == "jax" else probe_bucket(sys.argv[2])
