"""What `jaxseek doctor` runs in processes of their own, since it may hang, crash or fail to import.

`python -m jaxseek.cli.probe jax` prints a line of JSON for every stage it passes: imports, then devices.
`python -m jaxseek.cli.probe bucket URL` prints one: listed, written and deleted.
"""

from __future__ import annotations

import importlib
import json
import sys
import uuid
from typing import Any

IMPORTS = (
    *("numpy", "jax", "flax.nnx", "optax", "orbax.checkpoint", "grain", "tokenizers"),
    "sentencepiece.sentencepiece_model_pb2",  # fails where protobuf is older than it was generated for
)
_EXTRAS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "hf": "huggingface_hub"}


def probe_jax() -> None:
    """Import what jaxseek needs, then ask JAX for its devices."""
    for name in IMPORTS:
        try:
            importlib.import_module(name)
            _tell(imported=name)
        except Exception as e:  # whatever a broken installation raises is the finding
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
    """List a directory at an fsspec URL, write a small file there and delete it."""
    try:
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
        names = fs.ls(path, detail=False) if fs.exists(path) else None
        name = f"{path.rstrip('/')}/.jaxseek-doctor-{uuid.uuid4().hex}"
        fs.pipe_file(name, b"jaxseek doctor")
        fs.rm_file(name)
        _tell(url=url, entries=None if names is None else len(names), writable=True)
    except ImportError as e:
        extra = _EXTRAS.get(url.partition("://")[0])
        _tell(url=url, error=_one_line(e), mend=f"pip install {extra}" if extra else None)
    except Exception as e:
        _tell(url=url, error=_one_line(e))


def _tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


if __name__ == "__main__":
    probe_jax() if sys.argv[1] == "jax" else probe_bucket(sys.argv[2])
