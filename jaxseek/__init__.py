"""jaxseek: the DeepSeek family in JAX and Flax NNX for TPUs."""

from jaxseek.config import ModelConfig

__all__ = ["ModelConfig"]
