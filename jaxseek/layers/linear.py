"""The layers' matrix products, also of operands rounded to FP8 as DeepSeek-V3 is trained (paper, 3.3).

Rounded operands are multiplied and summed in float32. Embedding, head, router, norms and the attention core
are not rounded.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxseek.kernels.fp8 import round_blocks, round_gradient, round_tiles

if TYPE_CHECKING:
    from jaxseek.layers.block import Context

_EXACT = jax.lax.Precision.HIGHEST


def linear(x: jax.Array, param: Any, ctx: Context, *axes: str | None, contract: int = 1) -> jax.Array:
    """x times a parameter over x's last `contract` axes, laid out by the result's logical `axes`."""
    if isinstance(param, Joined):
        return param(x)[0]
    w = param if isinstance(param, jax.Array) else ctx.rules.use(param, x.dtype)
    if not ctx.fp8:
        return jnp.tensordot(x, w, contract, out_sharding=ctx.rules.spec(*axes))
    x8, w8 = round_tiles(x, contract), round_blocks(w, contract)
    y = jnp.tensordot(x8, w8, contract, precision=_EXACT, out_sharding=ctx.rules.spec(*axes))
    return round_gradient(y.astype(x.dtype), w.ndim - contract)


class Joined(nnx.Module):
    """Weights of the same input as one matrix, outputs first, on one device: for few rows on CPU.

    XLA:CPU uses a second core only where a product is large, and reads a matrix faster by the rows of its
    outputs.
    """

    def __init__(self, *params: Any, contract: int = 1):
        weights = [p[...] for p in params]
        I = math.prod(weights[0].shape[:contract])
        self.shapes = tuple(w.shape[contract:] for w in weights)
        self.weight_OI = nnx.Param(jnp.concatenate([w.reshape(I, -1).T for w in weights]))

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """x [B, T, ...] times each of the weights, over all further axes of x."""
        (B, T), weight_OI = x.shape[:2], self.weight_OI[...].astype(x.dtype)
        y_OM = jnp.einsum("OI,MI->OM", weight_OI, x.reshape(B * T, -1))
        ends = list(itertools.accumulate(map(math.prod, self.shapes)))
        return [y_XM.T.reshape(B, T, *shape) for y_XM, shape in zip(jnp.split(y_OM, ends[:-1]), self.shapes)]


def expand(x_BSC: jax.Array, param_NPC: Any, ctx: Context) -> jax.Array:
    """Heads of a latent, [B, N, S, P]: `linear` for a parameter stored heads first."""
    w_NPC, spec = ctx.rules.use(param_NPC, x_BSC.dtype), ctx.rules.spec("batch", "heads", None, None)
    if not ctx.fp8:
        return jnp.einsum("BSC,NPC->BNSP", x_BSC, w_NPC, out_sharding=spec)
    x8, w8 = round_tiles(x_BSC), round_blocks(w_NPC, 2)
    y_BNSP = jnp.einsum("BSC,NPC->BNSP", x8, w8, precision=_EXACT, out_sharding=spec)
    return round_gradient(y_BNSP.astype(x_BSC.dtype))
