"""Rounding to FP8 as DeepSeek-V3 is trained with it (paper, section 3.3.2), simulated in float32.

Values become what e4m3 holds with fine-grained scales: activations and gradients with a scale for every 128
channels of a token, weights for every block of 128 x 128.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

TILE = 128
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4


def round_tiles(x: jax.Array, axes: int = 1) -> jax.Array:
    """float32 x rounded in tiles of 1 x 128 over its last `axes`, flattened; its gradient is not."""
    return _straight_through(functools.partial(_tiles, axes=axes), x.astype(jnp.float32))


def round_blocks(w: jax.Array, rows: int = 1, lead: int = 0) -> jax.Array:
    """float32 w rounded in blocks of 128 x 128: after `lead` axes, `rows` axes and the rest make a matrix.

    Blocks begin anew on each shard, so where a shard is no multiple of 128 they depend on the mesh.
    """
    return _straight_through(functools.partial(_blocks, rows=rows, lead=lead), w.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def round_gradient(y: jax.Array, axes: int = 1) -> jax.Array:
    """y itself; its gradient is rounded in tiles of 1 x 128 over the last `axes`."""
    del axes
    return y


def _gradient_fwd(y, axes):
    del axes
    return y, None


def _gradient_bwd(axes, _, dy):
    return (_locally(functools.partial(_tiles, axes=axes), dy).astype(dy.dtype),)


round_gradient.defvjp(_gradient_fwd, _gradient_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight_through(rounding: Any, a: jax.Array) -> jax.Array:
    return _locally(rounding, a)


_straight_through.defvjp(lambda rounding, a: (_locally(rounding, a), None), lambda rounding, _, da: (da,))


def _locally(rounding: Any, a: jax.Array) -> jax.Array:
    """On each shard by itself."""
    if jax.sharding.get_abstract_mesh().empty or jax.typeof(a).sharding.mesh.are_all_axes_manual:
        return rounding(a)
    spec = jax.typeof(a).sharding.spec
    return jax.shard_map(rounding, in_specs=spec, out_specs=spec)(a)


def _tiles(x: jax.Array, axes: int) -> jax.Array:
    flat = x.reshape(*x.shape[: x.ndim - axes], math.prod(x.shape[x.ndim - axes :]))
    n = flat.shape[-1]
    pad = ((0, 0),) * (flat.ndim - 1) + ((0, -n % TILE),)
    tiles = jnp.pad(flat.astype(jnp.float32), pad).reshape(*flat.shape[:-1], -1, TILE)
    return _e4m3(tiles, -1).reshape(*flat.shape[:-1], -1)[..., :n].reshape(x.shape)


def _blocks(w: jax.Array, rows: int, lead: int) -> jax.Array:
    first, I, O = (
        math.prod(part) for part in (w.shape[:lead], w.shape[lead : lead + rows], w.shape[lead + rows :])
    )
    matrix = jnp.pad(w.astype(jnp.float32).reshape(first, I, O), ((0, 0), (0, -I % TILE), (0, -O % TILE)))
    _, wide, high = matrix.shape
    blocks = matrix.reshape(first, wide // TILE, TILE, high // TILE, TILE)
    return _e4m3(blocks, (2, 4)).reshape(first, wide, high)[:, :I, :O].reshape(w.shape)


def _e4m3(x: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """x as e4m3 holds it with one scale max|x| / 448 along `axes`."""
    amax = jnp.maximum(jnp.abs(x).max(axis=axes, keepdims=True), AMAX_FLOOR)
    scale = amax / E4M3_MAX
    return (x / scale).astype(jnp.float8_e4m3fn).astype(jnp.float32) * scale
