"""The platform that a program is traced for, by which ops choose their form."""

from __future__ import annotations

import jax


def platform() -> str:
    """Platform of the devices of the current mesh ("cpu", "tpu", ...), also when compiling for other devices.

    `jax.lax.platform_dependent` would trace the forms of every platform.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
