"""A loop over the layers of a stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxseek.ops.platform import platform

UNROLL_UP_TO = 8  # layers, on CPU: more take long to compile


def scan_layers(body: Callable[..., Any], carry: Any, xs: Any, layers: int) -> tuple[Any, Any]:
    """jax.lax.scan over the layers; on CPU a short stack is unrolled.

    XLA:CPU copies what a scan slices and stacks.
    """
    unroll = layers if platform() == "cpu" and layers <= UNROLL_UP_TO else 1
    return jax.lax.scan(body, carry, xs, unroll=unroll)
