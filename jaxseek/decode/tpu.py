"""The decode step of Pallas kernels, on TPU: each reads its weights where they lie in the stack of layers."""

from __future__ import annotations

from jaxseek.decode.plain import prepare as prepare
from jaxseek.decode.plain import split as split
from jaxseek.decode.plain import step as step
from jaxseek.model.deepseek import DeepSeek


def applies(model: DeepSeek) -> str:
    """Why this form cannot serve a model; empty where it can."""
    found = model.mesh.devices.flat[0].platform
    return "" if found == "tpu" else f"it is for TPUs, and the model is on {found}"
