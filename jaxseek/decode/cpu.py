"""The decode step for few rows on one CPU device: a module per layer, and matrices with outputs first.

XLA:CPU copies the weights of every layer that a scan slices, and its own products of a few rows take two to
three times as long as reading the matrix (ops/few_rows.py).
"""

from __future__ import annotations

import jax

from jaxseek.decode.plain import step as step
from jaxseek.model.cache import split_layers
from jaxseek.model.deepseek import Caches, DeepSeek


def applies(model: DeepSeek) -> str:
    """Why this form cannot serve a model; empty where it can."""
    found = model.mesh.devices.flat[0].platform
    return "" if found == "cpu" else f"it is for the CPU, and the model is on {found}"


def prepare(model: DeepSeek) -> DeepSeek:
    """The same model unrolled; its layers' weights are copied."""
    return model.unrolled()


@jax.jit
def split(caches: Caches) -> Caches:
    """Caches that prefill wrote, one per layer."""
    return tuple(part for cache in caches for part in split_layers(cache))
