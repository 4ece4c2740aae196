"""The experts' SwiGLU over rows sorted by expert: Pallas grouped matmuls on TPU, tiles of rows elsewhere.

`jax.lax.ragged_dot` computes every expert for every row on CPU, and compiles to a dilated convolution over
all experts on TPU; both are tens to hundreds of times slower than the work that is asked for.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxseek.kernels.few_rows import FEW, ByOutput, product_by_output, product_of_few
from jaxseek.kernels.fp8 import round_gradient, round_tiles
from jaxseek.kernels.scaled import Scaled, dequantize, few_times_scaled
from jaxseek.sharding import platform

Experts = jax.Array | Scaled | ByOutput  # a stack of matrices; those quantised or by output only forward


def grouped_mlp(
    x_MD: jax.Array,
    gate_EDF: Experts,
    up_EDF: Experts,
    down_EFD: Experts,
    sizes_E: jax.Array,
    fp8: bool = False,
    clear: bool = True,
) -> jax.Array:
    """down(silu(gate x) * up x) per expert, dropless: [M, D].

    Row m belongs to the expert whose run of `sizes_E` rows holds it; rows past `sum(sizes_E)` belong to none
    and come back as zeros, or without `clear` as anything, in gradients too. For one device or inside
    shard_map. With `fp8`, activations and gradients are rounded to FP8 on their way into each matmul; the
    weights are expected to be so already.
    Source: DeepSeekMoE paper, eq. 3-5; the expert MLP of HF DeepseekV3Experts.
    """
    if platform() == "tpu":
        return _gmm_mlp(x_MD, gate_EDF, up_EDF, down_EFD, sizes_E, fp8, clear)
    return _tiled_mlp(x_MD, gate_EDF, up_EDF, down_EFD, sizes_E, fp8)


def every_expert_mlp(
    x_ND: jax.Array,
    gates_NE: jax.Array,
    gate_EDF: jax.Array | Scaled,
    up_EDF: jax.Array | Scaled,
    down_EFD: jax.Array | Scaled,
) -> jax.Array:
    """Sum of gate times expert output over all experts, [N, D], zero gates included: for few rows on TPU.

    A step that reads every expert anyway gains nothing by sorting rows, and batched products read the experts
    where they are, quantised ones as they are: a Pallas call would have each layer's slice copied, and made
    bfloat16, first. For one device or inside shard_map.
    """

    def product(equation: str, a: jax.Array, w: jax.Array | Scaled) -> jax.Array:
        scale = 1.0
        if isinstance(w, Scaled):
            by_output = w.scale.shape[1] == 1
            w, scale = (w.value.astype(a.dtype), w.scale) if by_output else (dequantize(w, a.dtype), 1.0)
        return jnp.einsum(equation, a, w, preferred_element_type=jnp.float32) * scale

    gate_ENF, up_ENF = (product("ND,EDF->ENF", x_ND, w) for w in (gate_EDF, up_EDF))
    hidden_ENF = (jax.nn.silu(gate_ENF) * up_ENF).astype(x_ND.dtype)
    y_END = product("ENF,EFD->END", hidden_ENF, down_EFD)
    return jnp.einsum("END,NE->ND", y_END, gates_NE).astype(x_ND.dtype)


def every_expert_mlp_by_output(
    x_ND: jax.Array, gates_NE: jax.Array, gate_EDF: ByOutput, up_EDF: ByOutput, down_EFD: ByOutput
) -> jax.Array:
    """`every_expert_mlp` for few rows on one CPU device: all experts as one wide SwiGLU."""
    E, D, F = gate_EDF.shape
    gate_NFE, up_NFE = (
        product_of_few(x_ND, w.w_OEI.reshape(F * E, D)).reshape(-1, F, E) for w in (gate_EDF, up_EDF)
    )
    hidden_NFE = jax.nn.silu(gate_NFE) * up_NFE * gates_NE[:, None]
    hidden_NX = hidden_NFE.swapaxes(1, 2).reshape(-1, E * F)
    return product_of_few(hidden_NX, down_EFD.w_OEI.reshape(D, E * F)).astype(x_ND.dtype)


# -------------------------------------------------------------------- TPU


def _gmm_mlp(x_MD, gate_EDF, up_EDF, down_EFD, sizes_E, fp8=False, clear=True, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    M = x_MD.shape[0]

    def live(a_MD):
        # gmm leaves the rows of no expert unwritten, in gradients too: selected away at both ends
        return jnp.where((jnp.arange(len(a_MD)) < sizes_E.sum())[:, None], a_MD, 0) if clear else a_MD

    x_MD = jnp.pad(live(x_MD), ((0, -M % 128), (0, 0)))

    def matmul(a_MK, w_EKN) -> Any:
        w_EKN = dequantize(w_EKN, a_MK.dtype) if isinstance(w_EKN, Scaled) else w_EKN
        a_MK = round_tiles(a_MK) if fp8 else a_MK
        y_MN = gmm(a_MK, w_EKN, sizes_E, a_MK.dtype, _tile_sizes, None, None, False, interpret)
        return round_gradient(y_MN) if fp8 else y_MN

    hidden_MF = jax.nn.silu(matmul(x_MD, gate_EDF)) * matmul(x_MD, up_EDF)
    return live(matmul(hidden_MF, down_EFD)[:M]).astype(x_MD.dtype)


def _tile_sizes(m: int, k: int, n: int) -> tuple[int, int, int]:
    """Tiles of a grouped matmul [m, k] x [k, n], forward or transposed; m is a multiple of 128."""
    return next(t for t in (512, 256, 128) if m % t == 0), min(512, k), min(512, n)


# -------------------------------------------------------------------- CPU and others


@jax.custom_vjp
def _matmul(a_TK: jax.Array, w_KN: jax.Array) -> jax.Array:
    """Their product. Backward the left operand is transposed apart: XLA:CPU does it slowly in the product."""
    return a_TK @ w_KN


def _matmul_fwd(a_TK, w_KN):
    return a_TK @ w_KN, (a_TK, w_KN)


def _matmul_bwd(operands, dy_TN):
    barrier = jax.lax.optimization_barrier
    a_TK, w_KN = operands
    a_TK, dy_TN = barrier((a_TK, dy_TN))  # else what makes them is computed again in each product
    return dy_TN @ w_KN.T, barrier(a_TK.T) @ dy_TN


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _rounded_matmul(a_TK: jax.Array, w_KN: jax.Array) -> jax.Array:
    y_TN: Any = jnp.matmul(round_tiles(a_TK), w_KN, precision=jax.lax.Precision.HIGHEST)
    return round_gradient(y_TN.astype(a_TK.dtype))


def _times_expert(matmul: Any, a_TK: jax.Array, w_EKN: Experts, e: jax.Array) -> jax.Array:
    if isinstance(w_EKN, ByOutput):
        return product_by_output(a_TK, w_EKN.matrix(e)).astype(a_TK.dtype)
    if not isinstance(w_EKN, Scaled):
        return matmul(a_TK, w_EKN[e])
    if a_TK.shape[0] <= FEW and a_TK.dtype == jnp.float32:
        return few_times_scaled(a_TK, w_EKN, e)
    return matmul(a_TK, dequantize(Scaled(*(a[e] for a in w_EKN)), a_TK.dtype))


def _swiglu(gate_TF: jax.Array, up_TF: jax.Array) -> jax.Array:
    return jax.nn.silu(gate_TF) * up_TF


def _tiles(M: int, E: int, sizes_E: jax.Array):
    """Cut each expert's rows into tiles; returns (expert of a tile, its rows with M for none, tile count)."""
    tile = 1 if M <= FEW else 8 if M <= 256 else 64 if M <= 4096 else 128
    n = min(M, M // tile + E)  # the most there can be
    tiles_E = -(-sizes_E // tile)
    last_E, row_end_E = jnp.cumsum(tiles_E), jnp.cumsum(sizes_E)
    i = jnp.arange(n)
    e = jnp.minimum(jnp.searchsorted(last_E, i, side="right", method="compare_all"), E - 1)
    first_row = (row_end_E - sizes_E)[e] + (i - (last_E - tiles_E)[e]) * tile
    rows = first_row[:, None] + jnp.arange(tile)[None]
    return e, jnp.where(rows < row_end_E[e][:, None], rows, M), last_E[-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _tiled_mlp(x_MD, gate_EDF, up_EDF, down_EFD, sizes_E, fp8=False):
    return _tiled_fwd(x_MD, gate_EDF, up_EDF, down_EFD, sizes_E, fp8)[0]


def _tiled_fwd(x_MD, gate_EDF, up_EDF, down_EFD, sizes_E, fp8):
    matmul = _rounded_matmul if fp8 else _matmul
    e, rows, count = _tiles(x_MD.shape[0], gate_EDF.shape[0], sizes_E)
    x_ITD = x_MD.at[rows].get(mode="fill", fill_value=0)

    def body(i, tiles):
        y_ITD, gate_ITF, up_ITF = tiles  # a tile of y takes the place of x's
        gate_TF, up_TF = (_times_expert(matmul, y_ITD[i], w, e[i]) for w in (gate_EDF, up_EDF))
        y_TD = _times_expert(matmul, _swiglu(gate_TF, up_TF), down_EFD, e[i])
        return y_ITD.at[i].set(y_TD), gate_ITF.at[i].set(gate_TF), up_ITF.at[i].set(up_TF)

    hidden = [jnp.zeros((*rows.shape, gate_EDF.shape[2]), x_MD.dtype)] * 2
    y_ITD, *hidden = jax.lax.fori_loop(0, count, body, (x_ITD, *hidden))
    residuals = (x_ITD, *hidden, gate_EDF, up_EDF, down_EFD, e, rows, count)
    return jnp.zeros_like(x_MD).at[rows].set(y_ITD, mode="drop"), residuals


def _tiled_bwd(fp8, residuals, dy_MD):
    matmul = _rounded_matmul if fp8 else _matmul
    x_ITD, gate_ITF, up_ITF, *weights, e, rows, count = residuals
    dy_ITD = dy_MD.at[rows].get(mode="fill", fill_value=0)

    def body(i, grads):
        dx_ITD, *dws = grads  # a tile of dx takes the place of dy's
        gate_DF, up_DF, down_FD = (w[e[i]] for w in weights)
        hidden_TF, pull_swiglu = jax.vjp(_swiglu, gate_ITF[i], up_ITF[i])
        dhidden_TF, ddown_FD = jax.vjp(matmul, hidden_TF, down_FD)[1](dx_ITD[i])
        dgate_TF, dup_TF = pull_swiglu(dhidden_TF)
        dx_TD, dgate_DF = jax.vjp(matmul, x_ITD[i], gate_DF)[1](dgate_TF)
        dx2_TD, dup_DF = jax.vjp(matmul, x_ITD[i], up_DF)[1](dup_TF)
        new = (dgate_DF, dup_DF, ddown_FD)
        dws = (a.at[e[i]].add(d.astype(a.dtype)) for a, d in zip(dws, new))
        return dx_ITD.at[i].set(dx_TD + dx2_TD), *dws

    # float32: a bfloat16 sum over many tiles loses the later ones
    zeros = (jnp.zeros(w.shape, jnp.float32) for w in weights)
    dx_ITD, *dws = jax.lax.fori_loop(0, count, body, (dy_ITD, *zeros))
    dx_MD = jnp.zeros_like(dy_MD).at[rows].set(dx_ITD, mode="drop")
    return dx_MD, *(d.astype(w.dtype) for d, w in zip(dws, weights)), None


_tiled_mlp.defvjp(_tiled_fwd, _tiled_bwd)
