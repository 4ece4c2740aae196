"""Convert Hugging Face safetensors to jaxseek checkpoints and back, through one weight table."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxseek_convert.conversion import convert
    from jaxseek_convert.from_hf import load_hf
    from jaxseek_convert.table import hf_tensors
    from jaxseek_convert.to_hf import save_hf

__all__ = ["convert", "hf_tensors", "load_hf", "save_hf"]

_HOMES = {"convert": "conversion", "hf_tensors": "table", "load_hf": "from_hf", "save_hf": "to_hf"}


def __getattr__(name: str) -> Any:
    """Import a name on first use, so that reading a GGUF file does not import JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxseek_convert' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxseek_convert.{_HOMES[name]}"), name)
