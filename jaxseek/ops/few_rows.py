"""The product of few rows with a matrix on one CPU device, as fast as memory gives the matrix.

XLA:CPU's own products of 2 to 8 rows take two to three times as long as reading the matrix does. A reduction
to several sums at once becomes one loop over the matrix, which keeps the sums in registers and reads each of
its numbers once for all of them, on all cores: if the compiler may sum in any order, see OPTIONS.
"""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

FEW = 8  # rows; from 16 on XLA:CPU's own products are as fast
# For the compiler of any program with such a product, which otherwise is slow. "Fast math" here is the order
# of sums and fused multiply-adds: by XLA's defaults it honours NaN, infinities, division and functions.
OPTIONS = {"xla_cpu_enable_fast_math": True}

_ROWS, _SUMS = 4, 8  # at a time: AVX2 has registers for no more
_BLOCK = 500_000  # numbers of a large matrix that all rows are done with before the next: they stay in cache


class ByOutput(NamedTuple):
    """A stack of matrices [E, I, O], each of whose outputs has its inputs side by side."""

    w_OEI: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        O, E, I = self.w_OEI.shape
        return E, I, O

    def matrix(self, e: jax.Array) -> jax.Array:
        """The matrix e, [O, I]."""
        return jax.lax.dynamic_index_in_dim(self.w_OEI, e, axis=1, keepdims=False)


def product_by_output(x_MI: jax.Array, w_OI: jax.Array) -> jax.Array:
    """Rows times the transpose of a matrix, in float32: [M, O]."""
    if len(x_MI) <= FEW:
        return product_of_few(x_MI, w_OI)
    return jnp.einsum("OI,MI->OM", w_OI.astype(x_MI.dtype), x_MI, preferred_element_type=jnp.float32).T


def product_of_few(x_MI: jax.Array, w_OI: jax.Array) -> jax.Array:
    """`product_by_output` for up to some 16 rows; both operands may have leading axes."""
    (*lead, M, I), O = x_MI.shape, w_OI.shape[-2]
    x_MI = _materialised(x_MI.astype(jnp.float32))
    n = next((n for n in range(1, O // 64) if O % n == 0 and O // n * I <= _BLOCK), 1)
    if lead or M <= _ROWS or O * I < 8 * _BLOCK or n == 1:
        return _product(x_MI, w_OI)
    w_noI = w_OI.reshape(n, -1, I)
    y_nMo = jax.lax.map(lambda i: _product(x_MI, w_noI[i]), jnp.arange(n))
    return y_nMo.swapaxes(0, 1).reshape(M, O)


def _product(x_MI: jax.Array, w_OI: jax.Array) -> jax.Array:
    (*lead, M, _), w_OI = x_MI.shape, w_OI.astype(jnp.float32)
    sums = []
    parts = math.gcd(w_OI.shape[-2], _SUMS // min(M, _ROWS))
    for m in range(0, M, _ROWS):
        rows = [x_MI[..., i, None, :] for i in range(m, min(m + _ROWS, M))]
        products = tuple(row * w for row in rows for w in jnp.split(w_OI, parts, axis=-2))
        zeros = (jnp.zeros((), jnp.float32),) * len(products)
        sums += jax.lax.reduce(products, zeros, lambda a, b: tuple(map(operator.add, a, b)), (len(lead) + 1,))
    # in one dimension XLA copies the pieces; in more it would choose among them for every number
    y_MP = jnp.concatenate([a.reshape(-1) for a in sums]).reshape(M, parts, *lead, -1)
    return jnp.moveaxis(y_MP, (0, 1), (-3, -2)).reshape(*lead, M, -1)


def _materialised(x: jax.Array) -> jax.Array:
    """Materialise x by a product, so that XLA:CPU does not recompute it for every output."""
    b = math.gcd(x.shape[-1], 8)
    return (x.reshape(-1, b) @ jnp.eye(b)).reshape(x.shape) if b > 1 else x
