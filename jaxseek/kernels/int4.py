"""Two int4 values in a byte, as checkpoints store them: the store itself would give each a byte."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the bytes of int4 values of this shape."""
    return (*shape[:-1], -(-shape[-1] // 2))


def pack(values: jax.Array) -> jax.Array:
    """int4 as uint8, along the last axis: byte j has value 2j in its low four bits and value 2j + 1 in its
    high ones, both in two's complement. An odd number of values is followed by a zero."""
    pad = ((0, 0),) * (values.ndim - 1) + ((0, values.shape[-1] % 2),)
    pairs = jnp.pad(values.astype(jnp.int8), pad).astype(jnp.uint8).reshape(*values.shape[:-1], -1, 2)
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4)


def unpack(stored: jax.Array, size: int) -> jax.Array:
    """What `pack` was given, of which the last axis had this size."""
    signed = stored.astype(jnp.int8)
    pairs = jnp.stack([(signed << 4) >> 4, signed >> 4], axis=-1)
    return pairs.reshape(*stored.shape[:-1], -1)[..., :size].astype(jnp.int4)
