"""The layers' matrix products, also of operands rounded to FP8 as DeepSeek-V3 is trained (paper, 3.3).

FP8 here is simulated: values are rounded to what e4m3 with fine-grained scales can hold and multiplied in
float32. Activations and gradients have a scale for every 128 channels of a token, weights for every block of
128 x 128. Embedding, head, router, norms and the attention core are not rounded.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxseek.layers.block import Context

TILE = 128
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4


def linear(x: jax.Array, param: Any, ctx: Context, *axes: str | None, contract: int = 1) -> jax.Array:
    """x times a parameter over x's last `contract` axes, laid out by the result's logical `axes`."""
    w = param if isinstance(param, jax.Array) else ctx.rules.use(param, x.dtype)
    if not ctx.fp8:
        return jnp.tensordot(x, w, contract, out_sharding=ctx.rules.spec(*axes))
    x8, w8 = round_tiles(x, contract), round_blocks(w, contract)
    y = jnp.tensordot(x8, w8, contract, precision=_EXACT, out_sharding=ctx.rules.spec(*axes))
    return round_gradient(y.astype(x.dtype), w.ndim - contract)


def expand(x_BSC: jax.Array, param_NPC: Any, ctx: Context) -> jax.Array:
    """Heads of a latent, [B, N, S, P]: `linear` for a parameter stored heads first."""
    w_NPC, spec = ctx.rules.use(param_NPC, x_BSC.dtype), ctx.rules.spec("batch", "heads", None, None)
    if not ctx.fp8:
        return jnp.einsum("BSC,NPC->BNSP", x_BSC, w_NPC, out_sharding=spec)
    x8, w8 = round_tiles(x_BSC), round_blocks(w_NPC, 2)
    y_BNSP = jnp.einsum("BSC,NPC->BNSP", x8, w8, precision=_EXACT, out_sharding=spec)
    return round_gradient(y_BNSP.astype(x_BSC.dtype))


_EXACT = jax.lax.Precision.HIGHEST


def round_tiles(x: jax.Array, axes: int = 1) -> jax.Array:
    """float32 x rounded in tiles of 1 x 128 over its last `axes`, flattened; its gradient is not."""
    return _straight_through(functools.partial(_tiles, axes=axes), x)


def round_blocks(w: jax.Array, rows: int = 1, lead: int = 0) -> jax.Array:
    """float32 w rounded in blocks of 128 x 128: after `lead` axes, `rows` axes and the rest make a matrix.

    Blocks begin anew on each shard, so where a shard is no multiple of 128 they depend on the mesh.
    """
    return _straight_through(functools.partial(_blocks, rows=rows, lead=lead), w)


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


def _straight_through(rounding: Any, a: jax.Array) -> jax.Array:
    a = a.astype(jnp.float32)
    return a + jax.lax.stop_gradient(_locally(rounding, a) - a)


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
