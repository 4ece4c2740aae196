"""The experts' SwiGLU over rows sorted by expert: Pallas grouped matmuls on TPU, tiles of rows elsewhere.

`jax.lax.ragged_dot` computes every expert for every row on CPU, and compiles to a dilated convolution over
all experts on TPU; both are tens to hundreds of times slower than the work that is asked for.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxseek.kernels.fp8 import round_gradient, round_tiles
from jaxseek.sharding import platform


def grouped_mlp(
    x_MD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    sizes_E: jax.Array,
    fp8: bool = False,
) -> jax.Array:
    """down(silu(gate x) * up x) per expert, dropless: [M, D].

    Row m belongs to the expert whose run of `sizes_E` rows holds it; rows past `sum(sizes_E)` belong to none
    and come back as zeros. For one device or inside shard_map. With `fp8`, activations and gradients are
    rounded to FP8 on their way into each matmul; the weights are expected to be so already.
    Source: DeepSeekMoE paper, eq. 3-5; the expert MLP of HF DeepseekV3Experts.
    """
    implementation = _gmm_mlp if platform() == "tpu" else _tiled_mlp
    return implementation(x_MD, gate_EDF, up_EDF, down_EFD, sizes_E, fp8)


# -------------------------------------------------------------------- TPU


def _gmm_mlp(x_MD, gate_EDF, up_EDF, down_EFD, sizes_E, fp8=False, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    M = x_MD.shape[0]
    live_M1 = (jnp.arange(M) < sizes_E.sum())[:, None]
    # gmm leaves the rows of no expert unwritten, in gradients too: selected away at both ends
    x_MD = jnp.pad(jnp.where(live_M1, x_MD, 0), ((0, -M % 128), (0, 0)))

    def matmul(a_MK, w_EKN) -> Any:
        a_MK = round_tiles(a_MK) if fp8 else a_MK
        y_MN = gmm(a_MK, w_EKN, sizes_E, a_MK.dtype, _tile_sizes, None, None, False, interpret)
        return round_gradient(y_MN) if fp8 else y_MN

    hidden_MF = jax.nn.silu(matmul(x_MD, gate_EDF)) * matmul(x_MD, up_EDF)
    return jnp.where(live_M1, matmul(hidden_MF, down_EFD)[:M], 0).astype(x_MD.dtype)


def _tile_sizes(m: int, k: int, n: int) -> tuple[int, int, int]:
    """Tiles of a grouped matmul [m, k] x [k, n], forward or transposed; m is a multiple of 128."""
    return next(t for t in (512, 256, 128) if m % t == 0), min(512, k), min(512, n)


# -------------------------------------------------------------------- CPU and others


def _tile_mlp(x_TD, gate_DF, up_DF, down_FD, fp8):
    def matmul(a_TK, w_KN) -> Any:
        if not fp8:
            return a_TK @ w_KN
        return round_gradient(jnp.matmul(round_tiles(a_TK), w_KN, precision=jax.lax.Precision.HIGHEST))

    return matmul(jax.nn.silu(matmul(x_TD, gate_DF)) * matmul(x_TD, up_DF), down_FD).astype(x_TD.dtype)


def _tiles(M: int, E: int, sizes_E: jax.Array):
    """Cut each expert's rows into tiles; returns (expert of a tile, its rows with M for none, tile count)."""
    tile = 8 if M <= 256 else 64 if M <= 4096 else 128
    n = min(M, M // tile + E)  # the most there can be
    tiles_E = -(-sizes_E // tile)
    last_E, row_end_E = jnp.cumsum(tiles_E), jnp.cumsum(sizes_E)
    i = jnp.arange(n)
    e = jnp.minimum(jnp.searchsorted(last_E, i, side="right"), E - 1)
    first_row = (row_end_E - sizes_E)[e] + (i - (last_E - tiles_E)[e]) * tile
    rows = first_row[:, None] + jnp.arange(tile)[None]
    return e, jnp.where(rows < row_end_E[e][:, None], rows, M), last_E[-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _tiled_mlp(x_MD, gate_EDF, up_EDF, down_EFD, sizes_E, fp8=False):
    e, rows, count = _tiles(x_MD.shape[0], gate_EDF.shape[0], sizes_E)

    def body(i, y_MD):
        x_TD = x_MD.at[rows[i]].get(mode="fill", fill_value=0)
        y_TD = _tile_mlp(x_TD, gate_EDF[e[i]], up_EDF[e[i]], down_EFD[e[i]], fp8)
        return y_MD.at[rows[i]].set(y_TD, mode="drop")

    return jax.lax.fori_loop(0, count, body, jnp.zeros_like(x_MD))


def _tiled_fwd(*args):
    return _tiled_mlp(*args), args[:5]


def _tiled_bwd(fp8, args, dy_MD):
    x_MD, *weights, sizes_E = args
    e, rows, count = _tiles(x_MD.shape[0], weights[0].shape[0], sizes_E)

    def body(i, grads):
        x_TD = x_MD.at[rows[i]].get(mode="fill", fill_value=0)
        dy_TD = dy_MD.at[rows[i]].get(mode="fill", fill_value=0)
        mlp = functools.partial(_tile_mlp, fp8=fp8)
        dx_TD, *dw = jax.vjp(mlp, x_TD, *(w[e[i]] for w in weights))[1](dy_TD)
        dx_MD, *dws = grads
        dws = (a.at[e[i]].add(d.astype(a.dtype)) for a, d in zip(dws, dw))
        return dx_MD.at[rows[i]].set(dx_TD, mode="drop"), *dws

    # float32: a bfloat16 sum over many tiles loses the later ones
    zeros = (jnp.zeros_like(x_MD), *(jnp.zeros(w.shape, jnp.float32) for w in weights))
    dx_MD, *dws = jax.lax.fori_loop(0, count, body, zeros)
    return dx_MD, *(d.astype(w.dtype) for d, w in zip(dws, weights)), None


_tiled_mlp.defvjp(_tiled_fwd, _tiled_bwd)


@functools.partial(jax.jit, static_argnames="E")
def sort_by_expert(ids_M: jax.Array, E: int) -> tuple[jax.Array, jax.Array]:
    """Stable order of rows by expert, and how many each has: ([M], [E]). Ids >= E sort last, uncounted."""
    order_M = jnp.argsort(ids_M, stable=True)
    return order_M, jnp.bincount(ids_M, length=E)
