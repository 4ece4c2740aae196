"""The experts' SwiGLU over rows sorted by expert: Pallas grouped matmuls on TPU, tiles of rows elsewhere.

`jax.lax.ragged_dot` computes every expert for every row on CPU, and compiles to a dilated convolution over
all experts on TPU; both are tens to hundreds of times slower than the work that is asked for.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxseek.ops.few_rows import FEW, ByOutput, product_by_output
from jaxseek.ops.fp8 import round_gradient, round_tiles
from jaxseek.ops.platform import platform
from jaxseek.ops.scaled import Scaled, few_times_scaled, numbers, value_and_scale

Matrices = jax.Array | Scaled | ByOutput  # one per expert, [E, ...]; only plain ones have a gradient

SHARE = 1.25  # of an even share of the rows is computed for all experts at once, on CPU
LEAST = 64  # rows in an even share for that: with fewer, it is not worth the second form to compile


def grouped_mlp(
    x_MD: jax.Array,
    gate_EDF: Matrices,
    up_EDF: Matrices,
    down_EFD: Matrices,
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


# -------------------------------------------------------------------- TPU


def _gmm_mlp(x_MD, gate_EDF, up_EDF, down_EFD, sizes_E, fp8=False, clear=True, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    M = x_MD.shape[0]

    def live(a_MD):
        # gmm leaves the rows of no expert unwritten, in gradients too: selected away at both ends
        return jnp.where((jnp.arange(len(a_MD)) < sizes_E.sum())[:, None], a_MD, 0) if clear else a_MD

    x_MD = jnp.pad(live(x_MD), ((0, -M % 128), (0, 0)))

    def matmul(a_MK, w_EKN) -> Any:
        w_EKN = numbers(w_EKN, a_MK.dtype)
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
def _matmul(a: jax.Array, w: jax.Array) -> jax.Array:
    """Product [T, K] x [K, N], with or without a leading axis E.

    Without one, the backward pass transposes the left operand on its own: XLA:CPU is slow to do that within
    the product.
    """
    return a @ w


def _matmul_fwd(a, w):
    return a @ w, (a, w)


def _matmul_bwd(operands, dy):
    barrier = jax.lax.optimization_barrier
    a, w = operands
    a, dy = barrier((a, dy))  # so that each product does not recompute them
    transposed = a.mT if a.ndim > 2 else barrier(a.mT)
    return dy @ w.mT, transposed @ dy


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _rounded_matmul(a_TK: jax.Array, w_KN: jax.Array) -> jax.Array:
    y_TN: Any = jnp.matmul(round_tiles(a_TK), w_KN, precision=jax.lax.Precision.HIGHEST)
    return round_gradient(y_TN.astype(a_TK.dtype))


def _swiglu_mlp(matmul: Any, x: jax.Array, gate: Any, up: Any, down: Any) -> jax.Array:
    """SwiGLU of one expert, or of all experts with a leading axis E."""
    return matmul(jax.nn.silu(matmul(x, gate)) * matmul(x, up), down)


def _times_expert(matmul: Any, e: jax.Array, a_TK: jax.Array, w_EKN: Matrices) -> jax.Array:
    if isinstance(w_EKN, ByOutput):
        return product_by_output(a_TK, w_EKN.matrix(e)).astype(a_TK.dtype)
    value_EKN, scale_EKN = value_and_scale(w_EKN)
    if scale_EKN is None:
        return matmul(a_TK, value_EKN[e])
    if a_TK.shape[0] <= FEW and a_TK.dtype == jnp.float32:
        return few_times_scaled(a_TK, Scaled(value_EKN, scale_EKN), e)
    return matmul(a_TK, numbers(Scaled(value_EKN[e], scale_EKN[e]), a_TK.dtype))


class _Tiles(NamedTuple):
    """Runs of at most `size` rows of one expert: the expert of each, where its rows start and end, how many
    tiles there are."""

    expert_I: jax.Array
    start_I: jax.Array
    end_I: jax.Array
    how_many: jax.Array
    size: int

    def read(self, a_MX: jax.Array, i: jax.Array) -> jax.Array:
        """The tile's rows, and zeros for those that are not its own."""
        start, own_T1 = self._window(a_MX, i)
        return jnp.where(own_T1, jax.lax.dynamic_slice_in_dim(a_MX, start, self.size), 0)

    def write(self, a_MX: jax.Array, i: jax.Array, new_TX: jax.Array) -> jax.Array:
        start, own_T1 = self._window(a_MX, i)
        old_TX = jax.lax.dynamic_slice_in_dim(a_MX, start, self.size)
        return jax.lax.dynamic_update_slice_in_dim(a_MX, jnp.where(own_T1, new_TX, old_TX), start, 0)

    def _window(self, a_MX, i):
        start = jnp.minimum(self.start_I[i], len(a_MX) - self.size)
        row_T = start + jnp.arange(self.size)
        return start, ((row_T >= self.start_I[i]) & (row_T < self.end_I[i]))[:, None]


def _split(M: int, sizes_E: jax.Array, batched: bool) -> tuple[jax.Array, _Tiles]:
    """The rows [E, C] that all experts compute at once, M for none, and the tiles of what an expert has more.

    One product over all experts uses all cores, those of a tile only one; but its shape cannot follow the
    loads, so C is little more than an even share. Nothing is batched where the shares are small.
    """
    E = len(sizes_E)
    C = min(M, math.ceil(SHARE * M / E)) if batched and M >= LEAST * E else 0
    end_E = jnp.cumsum(sizes_E)
    row_EC = (end_E - sizes_E)[:, None] + jnp.arange(C)[None]
    size = 1 if M <= FEW else 8 if M <= 256 else 64 if M <= 4096 else 128
    more_E = jnp.maximum(sizes_E - C, 0)
    tiles_E = -(-more_E // size)
    last_E = jnp.cumsum(tiles_E)
    i = jnp.arange(min(M, M // size + E))  # the most there can be
    e = jnp.minimum(jnp.searchsorted(last_E, i, side="right", method="compare_all"), E - 1)
    start_I = (end_E - more_E)[e] + (i - (last_E - tiles_E)[e]) * size
    return jnp.where(row_EC < end_E[:, None], row_EC, M), _Tiles(e, start_I, end_E[e], last_E[-1], size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _tiled_mlp(x_MD, gate_EDF, up_EDF, down_EFD, sizes_E, fp8=False):
    return _tiled_fwd(x_MD, gate_EDF, up_EDF, down_EFD, sizes_E, fp8)[0]


def _tiled_fwd(x_MD, gate_EDF, up_EDF, down_EFD, sizes_E, fp8):
    matmul, weights = _rounded_matmul if fp8 else _matmul, (gate_EDF, up_EDF, down_EFD)
    plain = all(isinstance(w, jax.Array) for w in weights)
    row_EC, tiles = _split(len(x_MD), sizes_E, plain)
    y_MD, pull = jnp.zeros_like(x_MD), None
    if row_EC.size:
        x_ECD = x_MD.at[row_EC].get(mode="fill", fill_value=0)
        y_ECD, pull = jax.vjp(functools.partial(_swiglu_mlp, matmul), x_ECD, *weights)
        y_MD = y_MD.at[row_EC].set(y_ECD, mode="drop")

    def body(i, y_MD):
        times = functools.partial(_times_expert, matmul, tiles.expert_I[i])
        return tiles.write(y_MD, i, _swiglu_mlp(times, tiles.read(x_MD, i), *weights))

    return jax.lax.fori_loop(0, tiles.how_many, body, y_MD), (x_MD, weights, pull, row_EC, tiles)


def _tiled_bwd(fp8, residuals, dy_MD):
    matmul = _rounded_matmul if fp8 else _matmul
    x_MD, weights, pull, row_EC, tiles = residuals
    dx_MD, dws = jnp.zeros_like(dy_MD), (jnp.zeros(w.shape, jnp.float32) for w in weights)
    if pull is not None:
        dx_ECD, *dws = pull(dy_MD.at[row_EC].get(mode="fill", fill_value=0))
        dx_MD = dx_MD.at[row_EC].set(dx_ECD, mode="drop")

    def body(i, grads):
        (dx_MD, *dws), e = grads, tiles.expert_I[i]
        weights_e = (w[e] for w in weights)
        _, pull = jax.vjp(functools.partial(_swiglu_mlp, matmul), tiles.read(x_MD, i), *weights_e)
        dx_TD, *new = pull(tiles.read(dy_MD, i))
        return tiles.write(dx_MD, i, dx_TD), *(a.at[e].add(d.astype(a.dtype)) for a, d in zip(dws, new))

    # float32: a bfloat16 sum over many tiles loses the later ones
    grads = dx_MD, *(d.astype(jnp.float32) for d in dws)
    dx_MD, *dws = jax.lax.fori_loop(0, tiles.how_many, body, grads)
    return dx_MD, *(d.astype(w.dtype) for d, w in zip(dws, weights)), None


_tiled_mlp.defvjp(_tiled_fwd, _tiled_bwd)
