"""Two int4 values in a byte, as checkpoints store them: the store itself would give each a byte."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def packed_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Shape of the bytes that hold int4 values of this shape, in pairs along a (negative) axis."""
    return tuple(-(-n // 2) if i - len(shape) == axis else n for i, n in enumerate(shape))


def pack(values: jax.Array, axis: int) -> jax.Array:
    """int4 as uint8, in pairs along an axis: byte j has value 2j in its low four bits and value 2j + 1 in its
    high ones, both in two's complement. An odd number of values is followed by a zero."""
    last = jnp.moveaxis(values.astype(jnp.int8), axis, -1)
    pad = ((0, 0),) * (last.ndim - 1) + ((0, last.shape[-1] % 2),)
    pairs = jnp.pad(last, pad).astype(jnp.uint8).reshape(*last.shape[:-1], -1, 2)
    return jnp.moveaxis((pairs[..., 0] & 15) | (pairs[..., 1] << 4), -1, axis)


def unpack(stored: jax.Array, size: int, axis: int) -> jax.Array:
    """Invert `pack`, for values of which that axis had this size."""
    signed = jnp.moveaxis(stored, axis, -1).astype(jnp.int8)
    pairs = jnp.stack([(signed << 4) >> 4, signed >> 4], axis=-1)
    values = pairs.reshape(*signed.shape[:-1], -1)[..., :size].astype(jnp.int4)
    return jnp.moveaxis(values, -1, axis)
