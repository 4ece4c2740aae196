"""The platform that a program is traced for: the one question by which ops choose their form."""

from __future__ import annotations

import jax


def platform() -> str:
    """Of the devices of the mesh in use ("cpu", "tpu", ...), also when compiling for devices elsewhere.

    Kernels choose their implementation by it: `jax.lax.platform_dependent` would trace them all.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
