"""Quantised matrices, value times scale: their numbers, and their product with few rows on CPU.

On TPU a product reads few bits and makes the numbers on the way. XLA:CPU writes them all out first, which
takes longer than the product where there are few rows.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_BLOCK = 75_000  # numbers of a matrix at a time: they stay in a core's cache


class Scaled(NamedTuple):
    """A matrix as value times scale: each entry of the scale serves n / k neighbours along an axis, of which
    the value has n entries and the scale k. Both are laid out alike, so that a shard of them is one too."""

    value: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


def dequantize(w: Scaled, dtype: Any) -> jax.Array:
    """value * scale in float32, as `dtype`; on each shard by itself."""
    local = functools.partial(_numbers, dtype=dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
        return local(*w)
    specs = [jax.typeof(a).sharding.spec for a in w]
    return jax.shard_map(local, in_specs=tuple(specs), out_specs=specs[0])(*w)


def _numbers(value: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    # the value as [..., k, n / k, ...], the scale as [..., k, 1, ...]
    split = [(k, n // k) for n, k in zip(value.shape, scale.shape)]
    assert value.shape == tuple(map(math.prod, split)), (value.shape, scale.shape)
    numbers = value.astype(jnp.float32).reshape([n for pair in split for n in pair])
    return (numbers * scale.reshape([n for k, _ in split for n in (k, 1)])).reshape(value.shape).astype(dtype)


def few_times_scaled(x_MI: jax.Array, w_EIO: Scaled, e: jax.Array | int = 0) -> jax.Array:
    """float32 rows times the matrix e of a stack, [M, O], some inputs at a time; on one device."""
    value_EIO, scale_EkO = w_EIO
    (_, I, O), k = value_EIO.shape, scale_EkO.shape[1]
    group = I // k
    b = max(d for d in range(1, group + 1) if group % d == 0 and (d == 1 or d * O <= _BLOCK))
    n = I // b
    x_nMb = x_MI.reshape(-1, n, b).swapaxes(0, 1)
    value_nbO, scale_kO = value_EIO.reshape(-1, b, O), scale_EkO.reshape(-1, O)

    def body(j, y_MO):
        part_MO = x_nMb[j] @ value_nbO[e * n + j].astype(jnp.float32)
        return y_MO + part_MO * scale_kO[e * k + j * k // n][None]

    return jax.lax.fori_loop(0, n, body, jnp.zeros((x_MI.shape[0], O)))
