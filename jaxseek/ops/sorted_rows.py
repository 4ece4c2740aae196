"""Tokens' rows sorted by expert, and back: every gradient is a gather, as every product is.

Ranks are counted: a TPU compiles a sort of some 10,000 numbers for seconds, and a scatter of rows as long,
which is how JAX differentiates a gather.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sorted_by_expert(ids_NK: jax.Array, E: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Place of each assignment in the stable order by expert [N, K], the assignment at each place [N * K],
    and rows per expert [E]. Assignments to expert E (none) get the place N * K."""
    N, K = ids_NK.shape
    hot_NKE = ids_NK[:, :, None] == jnp.arange(E)[None, None]
    hot_NE = hot_NKE.sum(1, dtype=jnp.int32)
    upto_NE = jnp.cumsum(hot_NE, axis=0)
    sizes_E = upto_NE[-1]
    first_NE = upto_NE - hot_NE + (jnp.cumsum(sizes_E) - sizes_E)[None]  # of a token's rows for an expert
    first_NK = jnp.where(hot_NKE, first_NE[:, None], 0).sum(-1)
    earlier_1KK = jnp.tri(K, k=-1, dtype=bool)[None]
    twice_NK = ((ids_NK[:, :, None] == ids_NK[:, None]) & earlier_1KK).sum(-1, dtype=jnp.int32)
    at_NK = jnp.where(ids_NK < E, first_NK + twice_NK, N * K)
    order_M = jnp.zeros(N * K, jnp.int32).at[at_NK.reshape(-1)].set(jnp.arange(N * K), mode="drop")
    return at_NK, order_M, sizes_E


def _at(y_MD: jax.Array, at: jax.Array) -> jax.Array:
    """Rows of y at these places, [..., D]; zeros where there is no place."""
    return y_MD.at[at].get(mode="fill", fill_value=0)


@jax.custom_vjp
def rows_of(x_ND: jax.Array, at_NK: jax.Array, order_M: jax.Array) -> jax.Array:
    """x of every assignment in sorted order, [N * K, D]."""
    return x_ND[order_M // at_NK.shape[1]]


def _rows_fwd(x_ND, at_NK, order_M):
    return rows_of(x_ND, at_NK, order_M), at_NK


def _rows_bwd(at_NK, dy_MD):
    return _at(dy_MD, at_NK).astype(jnp.float32).sum(1).astype(dy_MD.dtype), None, None


rows_of.defvjp(_rows_fwd, _rows_bwd)


@jax.custom_vjp
def combine(y_MD: jax.Array, gates_NK: jax.Array, at_NK: jax.Array, order_M: jax.Array) -> jax.Array:
    """Each token's rows of y, weighted by its gates and summed in float32, [N, D]. Rows without a place
    count as zero; what stands in y where nothing has a place is not read."""
    # a gather for each k: their rows are added as they lie on a TPU, those within a tile four times slower
    y_ND = jnp.zeros((len(at_NK), y_MD.shape[1]), jnp.float32)
    for at_N, gate_N in zip(at_NK.T, gates_NK.T):
        y_ND += _at(y_MD, at_N).astype(jnp.float32) * gate_N[:, None]
    return y_ND.astype(y_MD.dtype)


def _combine_fwd(y_MD, gates_NK, at_NK, order_M):
    return combine(y_MD, gates_NK, at_NK, order_M), (y_MD, gates_NK, at_NK, order_M)


def _combine_bwd(residuals, dy_ND):
    y_MD, gates_NK, at_NK, order_M = residuals
    dy_MD = dy_ND[order_M // gates_NK.shape[1]].astype(jnp.float32) * gates_NK.reshape(-1)[order_M][:, None]
    dgates_NK = jnp.einsum("NKD,ND->NK", _at(y_MD, at_NK).astype(jnp.float32), dy_ND.astype(jnp.float32))
    return dy_MD.astype(y_MD.dtype), dgates_NK.astype(gates_NK.dtype), None, None


combine.defvjp(_combine_fwd, _combine_bwd)
