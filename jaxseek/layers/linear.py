"""The layers' matrix products, also of operands rounded to FP8 as DeepSeek-V3 is trained (paper, 3.3).

Rounded operands are multiplied and summed in float32. Embedding, head, router, norms and the attention core
are not rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxseek.kernels.fp8 import round_blocks, round_gradient, round_tiles

if TYPE_CHECKING:
    from jaxseek.layers.block import Context

_EXACT = jax.lax.Precision.HIGHEST


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
