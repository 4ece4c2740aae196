"""The layers' matrix products, also of operands rounded to FP8 as DeepSeek-V3 is trained (paper, 3.3).

Rounded operands are multiplied and summed in float32. Embedding, head, router, norms and the attention core
are not rounded.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxseek.model.weight import Quantized, matrix
from jaxseek.ops.few_rows import FEW, product_by_output
from jaxseek.ops.fp8 import round_blocks, round_gradient, round_tiles
from jaxseek.ops.platform import platform
from jaxseek.ops.scaled import Scaled, dequantize, few_times_scaled
from jaxseek.sharding.rules import Rules

if TYPE_CHECKING:
    from jaxseek.model.layer import Context

_EXACT = jax.lax.Precision.HIGHEST


def linear(
    x: jax.Array,
    param: Any,
    ctx: Context,
    *axes: str | None,
    contract: int = 1,
    weight_axes: tuple[str | None, ...] = (),
) -> jax.Array:
    """x times a parameter over x's last `contract` axes, laid out by the result's logical `axes`.

    The parameter is used as its own logical axes say, or else `weight_axes`.
    """
    if isinstance(param, Joined):
        return param(x)[0]
    if isinstance(param, Quantized):
        return _scaled(x, param.laid_out(ctx.rules, *weight_axes), ctx.rules, axes, contract)
    w = ctx.rules.use(param, x.dtype, *weight_axes)
    if not ctx.fp8:
        product = _product if platform() == "cpu" else _tensordot
        return product(x, w, contract, ctx.rules.spec(*axes))
    x8, w8 = round_tiles(x, contract), round_blocks(w, contract)
    y = jnp.tensordot(x8, w8, contract, precision=_EXACT, out_sharding=ctx.rules.spec(*axes))
    return round_gradient(y.astype(x.dtype), w.ndim - contract)


def _scaled(x: jax.Array, w: Scaled, rules: Rules, axes: tuple[str | None, ...], contract: int) -> jax.Array:
    """`linear` of a quantised matrix. Where no input has a scale of its own, the outputs are scaled."""
    tokens, outputs = x.shape[: x.ndim - contract], w.shape[contract:]
    inputs, rows = math.prod(w.shape[:contract]), math.prod(tokens)
    one_device = jax.sharding.get_abstract_mesh().size == 1
    if one_device and platform() == "cpu" and rows <= FEW and x.dtype == jnp.float32:
        w_1IO = Scaled(*(a.reshape(1, -1, math.prod(outputs)) for a in w))
        return few_times_scaled(x.reshape(rows, inputs), w_1IO).reshape(*tokens, *outputs)
    if math.prod(w.scale.shape[:contract]) > 1:
        return _tensordot(x, dequantize(w, x.dtype), contract, rules.spec(*axes))
    y = _tensordot(x, w.value.astype(x.dtype), contract, rules.spec(*axes))
    scale = rules.shard(w.scale.reshape(outputs), *axes[len(tokens) :])
    return (y.astype(jnp.float32) * jnp.expand_dims(scale, range(len(tokens)))).astype(x.dtype)


def _tensordot(x: jax.Array, w: jax.Array, contract: int, spec: Any) -> jax.Array:
    return jnp.tensordot(x, w, contract, out_sharding=spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, w: jax.Array, contract: int, spec: Any) -> jax.Array:
    """tensordot, of whose operands the backward pass transposes x alone, for the weight's gradient.

    JAX's own has XLA:CPU transpose the gradient too, and compute what makes it again for that.
    """
    return _tensordot(x, w, contract, spec)


def _product_fwd(x, w, contract, spec):
    return _tensordot(x, w, contract, spec), (x, w)


def _product_bwd(contract, spec, operands, dy):
    x, w = operands
    tokens, inputs = x.ndim - contract, tuple(range(x.ndim - contract, x.ndim))
    features = tuple(range(tokens, dy.ndim)), tuple(range(contract, w.ndim))
    dx = jax.lax.dot_general(dy, w, (features, ((), ())), out_sharding=jax.typeof(x).sharding.spec)
    xt = jax.lax.optimization_barrier(x.transpose(*inputs, *range(tokens)))
    sums = tuple(range(contract, x.ndim)), tuple(range(tokens))
    return dx, jax.lax.dot_general(xt, dy, (sums, ((), ())), out_sharding=jax.typeof(w).sharding.spec)


_product.defvjp(_product_fwd, _product_bwd)


class Joined(nnx.Module):
    """Weights of the same input as one matrix, outputs first: for few rows on one CPU device."""

    def __init__(self, *params: Any, contract: int = 1):
        weights = [p[...] for p in params]
        I = math.prod(weights[0].shape[:contract])
        self.shapes = tuple(w.shape[contract:] for w in weights)
        self.weight_OI = nnx.Param(jnp.concatenate([w.reshape(I, -1).T for w in weights]))

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """x [B, T, ...] times each of the weights, over all further axes of x."""
        B, T = x.shape[:2]
        y_MO = product_by_output(x.reshape(B * T, -1), self.weight_OI[...])
        ends = list(itertools.accumulate(map(math.prod, self.shapes)))
        parts = jnp.split(y_MO.astype(x.dtype), ends[:-1], axis=1)
        return [y_MX.reshape(B, T, *shape) for y_MX, shape in zip(parts, self.shapes)]


def expand(x_BSC: jax.Array, param_NPC: Any, ctx: Context) -> jax.Array:
    """Heads of a latent, [B, N, S, P]: `linear` for a parameter stored heads first."""
    w_NPC, spec = matrix(param_NPC, ctx.rules, x_BSC.dtype), ctx.rules.spec("batch", "heads", None, None)
    if not ctx.fp8:
        return jnp.einsum("BSC,NPC->BNSP", x_BSC, w_NPC, out_sharding=spec)
    x8, w8 = round_tiles(x_BSC), round_blocks(w_NPC, 2)
    y_BNSP = jnp.einsum("BSC,NPC->BNSP", x8, w8, precision=_EXACT, out_sharding=spec)
    return round_gradient(y_BNSP.astype(x_BSC.dtype))
