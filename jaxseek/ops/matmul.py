"""Matrix products of activations and weights, also with operands rounded to FP8 or stored quantised.

DeepSeek-V3 trains with both operands rounded to FP8 (paper, section 3.3); rounded operands are multiplied and
summed in float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxseek.ops.few_rows import FEW
from jaxseek.ops.fp8 import round_blocks, round_gradient, round_tiles
from jaxseek.ops.platform import platform
from jaxseek.ops.scaled import Scaled, dequantize, few_times_scaled
from jaxseek.sharding.rules import Rules

_EXACT = jax.lax.Precision.HIGHEST


def matmul(x: jax.Array, w: jax.Array, contract: int, spec: Any, fp8: bool = False) -> jax.Array:
    """x times w over the last `contract` axes of x and the first of w, laid out by a PartitionSpec."""
    if fp8:
        x8, w8 = round_tiles(x, contract), round_blocks(w, contract)
        y = jnp.tensordot(x8, w8, contract, precision=_EXACT, out_sharding=spec)
        return round_gradient(y.astype(x.dtype), w.ndim - contract)
    product = _product_with_cpu_gradient if platform() == "cpu" else _tensordot
    return product(x, w, contract, spec)


def expand_heads(x_BSC: jax.Array, w_NPC: jax.Array, spec: Any, fp8: bool = False) -> jax.Array:
    """Heads of a latent, [B, N, S, P]: `matmul` for a matrix that is stored heads first."""
    if not fp8:
        return jnp.einsum("BSC,NPC->BNSP", x_BSC, w_NPC, out_sharding=spec)
    x8, w8 = round_tiles(x_BSC), round_blocks(w_NPC, 2)
    y_BNSP = jnp.einsum("BSC,NPC->BNSP", x8, w8, precision=_EXACT, out_sharding=spec)
    return round_gradient(y_BNSP.astype(x_BSC.dtype))


def scaled_matmul(
    x: jax.Array, w: Scaled, rules: Rules, axes: tuple[str | None, ...], contract: int
) -> jax.Array:
    """`matmul` of a quantised matrix, laid out by logical `axes`.

    With one scale per output, the product is scaled; otherwise the matrix is dequantised first.
    """
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
def _product_with_cpu_gradient(x: jax.Array, w: jax.Array, contract: int, spec: Any) -> jax.Array:
    """tensordot whose backward pass transposes x alone for the weight's gradient.

    JAX's own gradient makes XLA:CPU transpose dy too, and recompute what produces it for that.
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


_product_with_cpu_gradient.defvjp(_product_fwd, _product_bwd)
