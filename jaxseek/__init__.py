"""jaxseek: the DeepSeek family in JAX and Flax NNX for TPUs.

model, tokenizer = jaxseek.load("path/or-preset")
logits_BTV = model(tokens_BT)
texts = jaxseek.generate(model, tokenizer, ["Hello"], max_new_tokens=32)
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxseek.config.model import ConfigError, ModelConfig

if TYPE_CHECKING:
    from jaxseek.api import load
    from jaxseek.engine.generate import generate
    from jaxseek.model.deepseek import DeepSeek

__version__ = "0.1.0"
__all__ = ["ConfigError", "DeepSeek", "ModelConfig", "generate", "load"]

_HOMES = {
    "DeepSeek": "jaxseek.model.deepseek",
    "generate": "jaxseek.engine.generate",
    "load": "jaxseek.api",
}


def __getattr__(name: str) -> Any:
    """Import names that need JAX on first use, so that reading a config stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxseek' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
