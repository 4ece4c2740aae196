"""Quantised matrices, value * scale: dequantising them, and their product with few rows on CPU.

On TPU a product reads the few bits and dequantises on the way. XLA:CPU writes all numbers out first, which
takes longer than a product of few rows.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_BLOCK = 75_000  # numbers of a matrix at a time: they stay in a core's cache


class Scaled(NamedTuple):
    """A matrix as value * scale: along an axis with n values and k scales, each scale serves n / k of them.

    Both are laid out alike, so a shard of each makes a shard of the matrix.
    """

    value: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


def value_and_scale(w: jax.Array | Scaled) -> tuple[jax.Array, jax.Array | None]:
    """The stored values of a matrix, and its scale if it is quantised."""
    return (w.value, w.scale) if isinstance(w, Scaled) else (w, None)


def value_of(w: jax.Array | Scaled) -> jax.Array:
    """The stored values of a matrix."""
    return value_and_scale(w)[0]


def scales_of(*weights: jax.Array | Scaled) -> list[jax.Array]:
    """The scales of those matrices that are quantised."""
    return [scale for w in weights if (scale := value_and_scale(w)[1]) is not None]


def numbers(w: jax.Array | Scaled, dtype: Any) -> jax.Array:
    """The matrix itself, dequantised as `dtype` if it is quantised."""
    return dequantize(w, dtype) if isinstance(w, Scaled) else w


def dequantize(w: Scaled, dtype: Any) -> jax.Array:
    """value * scale in float32, as `dtype`; each shard by itself."""
    local = functools.partial(_local, dtype=dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
        return local(*w)
    specs = [jax.typeof(a).sharding.spec for a in w]
    return jax.shard_map(local, in_specs=tuple(specs), out_specs=specs[0])(*w)


def _local(value: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
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
