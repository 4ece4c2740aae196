"""One decode step of a latent-attention, mixture-of-experts layer in a few Pallas kernels, for TPU.

With one token for each of few rows a layer is the reading of its weights. XLA makes some seventy operations
of it, of which most cost more to start than to run, and slices each layer's parameters out of their stack.
These kernels are given the stacks of all layers and the layer's index, read each matrix once as it lies,
and do all that stands between two collectives at a time:

    latents   norm, query latent, key-value latent with its norm and rotary part
    queries   norm of the query latent, heads, rotary part, keys' expansion absorbed
    outputs   values' expansion, output projection
    router    norm, scores, the choice of experts, which of them have a token

Between `queries` and `outputs` stands decode_attention.py, after `router` chosen_experts.py. Matrices are
plain or Scaled with a scale for each output. All are for one device or inside shard_map; rows are [B, ...].
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxseek.config.model import ModelConfig
from jaxseek.decode.choice import affinities, choose, listed, to_slots
from jaxseek.ops.scaled import Scaled, scales_of, value_of

_VMEM = 48 << 20  # bytes that a kernel may use
_TILE = 4 << 20  # bytes of a tile of weights
_EXACT = jax.lax.Precision.HIGHEST
_NT = (((1,), (1,)), ((), ()))  # [B, I] times [O, I]
_NN = (((1,), (0,)), ((), ()))


def latents(
    x_BD: jax.Array,
    norm_LD: jax.Array,
    q_a_LDQ: jax.Array | Scaled,
    kv_a_LDA: jax.Array | Scaled,
    kv_norm_LC: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    layer: jax.Array | int,
    eps: tuple[float, float],
    interleaved: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The query latent before its norm, [B, Q], and what the cache keeps of a token, [B, A].

    `rope` are cos and sin [B, R / 2], `eps` those of the layer's norm and of the latents'. Sources as MLA's.
    """
    (B, D), C = x_BD.shape, kv_norm_LC.shape[1]
    q_LQD, kv_LAD = _transposed(q_a_LDQ), _transposed(kv_a_LDA)
    Q, A = q_LQD.shape[1], kv_LAD.shape[1]
    tile = _divisor(D, _TILE // ((Q + A) * q_LQD.dtype.itemsize))
    scales = scales_of(q_a_LDQ, kv_a_LDA)

    def kernel(layer_ref, x_ref, norm_ref, kv_norm_ref, cos_ref, sin_ref, q_ref, kv_ref, *refs):
        *scale_refs, cq_ref, latent_ref, q_sum, kv_sum = refs
        d = pl.program_id(0)

        @pl.when(d == 0)
        def _():
            q_sum[...], kv_sum[...] = jnp.zeros_like(q_sum), jnp.zeros_like(kv_sum)

        at = pl.ds(d * tile, tile)
        inverse_B1 = _inverse_rms(x_ref[...], eps[0])
        x_BI = _scaled(x_ref[:, at], inverse_B1, _row(norm_ref, layer_ref[0], at))
        q_sum[...] += _dot(x_BI, q_ref[...], _NT)
        kv_sum[...] += _dot(x_BI, kv_ref[...], _NT)

        @pl.when(d == pl.num_programs(0) - 1)
        def _():
            q_BQ, kv_BA = (
                s[...] * scale_refs[i][...] if scale_refs else s[...] for i, s in enumerate((q_sum, kv_sum))
            )
            cq_ref[...], kv_BA = q_BQ.astype(cq_ref.dtype), kv_BA.astype(x_ref.dtype)
            latent_ref[:, :C] = _normed(kv_BA[:, :C], _row(kv_norm_ref, layer_ref[0]), eps[1])
            latent_ref[:, C:] = _rotated(kv_BA[:, C:], cos_ref[...], sin_ref[...], interleaved)

    stack = functools.partial(_of_layer, rank=2)
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((B, n), x_BD.dtype) for n in (Q, A)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(D // tile,),
            in_specs=[
                _whole(B, D), _near_layer(norm_LD), _near_layer(kv_norm_LC), _whole(*rope[0].shape),
                _whole(*rope[1].shape),
                pl.BlockSpec((None, Q, tile), lambda d, layer: (layer[0], 0, d)),
                pl.BlockSpec((None, A, tile), lambda d, layer: (layer[0], 0, d)),
                *([stack(1, Q), stack(1, A)] if scales else []),
            ],
            out_specs=[_whole(B, Q), _whole(B, A)],
            scratch_shapes=[pltpu.VMEM((B, n), jnp.float32) for n in (Q, A)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM),
        cost_estimate=_cost(B, (Q + A) * D, q_LQD.dtype),
        interpret=interpret,
        name="latents",
    )(_index(layer), x_BD, norm_LD, kv_norm_LC, *rope, q_LQD, kv_LAD, *scales)  # fmt: skip


def queries(
    cq_BQ: jax.Array,
    norm_LQ: jax.Array,
    q_b_LQNH: jax.Array | Scaled,
    k_b_LNPC: jax.Array | Scaled,
    rope: tuple[jax.Array, jax.Array],
    layer: jax.Array | int,
    eps: float,
    interleaved: bool,
    interpret: bool = False,
) -> jax.Array:
    """Queries against the latents, [N, B, A], with the keys' expansion absorbed."""
    q_LNHQ = jnp.moveaxis(value_of(q_b_LQNH), 1, 3)
    k_LNPC = value_of(k_b_LNPC)
    (B, Q), (_, N, H, _), (_, _, P, C) = cq_BQ.shape, q_LNHQ.shape, k_LNPC.shape
    scales = []
    if found := scales_of(q_b_LQNH, k_b_LNPC):
        scales = [found[0][:, 0], found[1]]  # [L, N, H] and [L, N, P, 1]

    def kernel(layer_ref, cq_ref, norm_ref, cos_ref, sin_ref, q_ref, k_ref, *refs):
        *scale_refs, out_ref = refs
        dtype = cq_ref.dtype
        q_BH = _dot(_normed(cq_ref[...], _row(norm_ref, layer_ref[0]), eps), q_ref[...], _NT)
        k_PC = k_ref[...]
        if scale_refs:
            q_BH *= _pick(scale_refs[0][...], pl.program_id(0))
            k_PC = k_PC.astype(jnp.float32) * scale_refs[1][...]
        q_BH = q_BH.astype(dtype)
        out_ref[:, :C] = _dot(q_BH[:, :P], k_PC, _NN).astype(dtype)
        out_ref[:, C:] = _rotated(q_BH[:, P:], cos_ref[...], sin_ref[...], interleaved)

    A = C + H - P

    def head(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda n, layer: (layer[0], n, 0, 0))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((N, B, A), cq_BQ.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(N,),
            in_specs=[
                _whole(B, Q), _near_layer(norm_LQ), _whole(*rope[0].shape), _whole(*rope[1].shape),
                head(H, Q), head(P, C), *([_of_layer(N, H, rank=2), head(P, 1)] if scales else []),
            ],
            out_specs=pl.BlockSpec((None, B, A), lambda n, layer: (n, 0, 0)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM),
        cost_estimate=_cost(B, N * (H * Q + P * C), q_LNHQ.dtype),
        interpret=interpret,
        name="queries",
    )(_index(layer), cq_BQ, norm_LQ, *rope, q_LNHQ, k_LNPC, *scales)  # fmt: skip


def outputs(
    z_NBC: jax.Array,
    v_b_LNHC: jax.Array | Scaled,
    o_LNHD: jax.Array | Scaled,
    layer: jax.Array | int,
    interpret: bool = False,
) -> jax.Array:
    """Expand attention over the latents to values, and project them: the sum over heads, [B, D]."""
    v_LNHC, o_value_LNHD = value_of(v_b_LNHC), value_of(o_LNHD)
    (N, B, C), (_, _, H, D) = z_NBC.shape, o_value_LNHD.shape
    scales = []
    if found := scales_of(v_b_LNHC, o_LNHD):
        scales = [found[0], found[1][:, 0]]  # [L, N, H, 1] and [L, 1, D]

    def kernel(layer_ref, z_ref, v_ref, o_ref, *refs):
        *scale_refs, y_ref, sum_ref = refs
        n, dtype = pl.program_id(0), z_ref.dtype

        @pl.when(n == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        v_HC = v_ref[...].astype(jnp.float32) * scale_refs[0][...] if scale_refs else v_ref[...]
        h_BH = _dot(z_ref[...], v_HC, _NT).astype(dtype)
        sum_ref[...] += _dot(h_BH, o_ref[...], _NN)

        @pl.when(n == pl.num_programs(0) - 1)
        def _():
            y_BD = sum_ref[...] * scale_refs[1][...] if scale_refs else sum_ref[...]
            y_ref[...] = y_BD.astype(dtype)

    def head(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda n, layer: (layer[0], n, 0, 0))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((B, D), z_NBC.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(N,),
            in_specs=[
                pl.BlockSpec((None, B, C), lambda n, layer: (n, 0, 0)), head(H, C), head(H, D),
                *([head(H, 1), _of_layer(1, D, rank=2)] if scales else []),
            ],
            out_specs=_whole(B, D),
            scratch_shapes=[pltpu.VMEM((B, D), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM),
        cost_estimate=_cost(B, N * H * (C + D), v_LNHC.dtype),
        interpret=interpret,
        name="outputs",
    )(_index(layer), z_NBC, v_LNHC, o_value_LNHD, *scales)  # fmt: skip


def router(
    x_BD: jax.Array,
    y_BD: jax.Array,
    norm_LD: jax.Array,
    router_LDE: jax.Array,
    bias_LE: jax.Array | None,
    slots_LXS: jax.Array | None,
    valid_B: jax.Array,
    layer: jax.Array | int,
    eps: float,
    cfg: ModelConfig,
    first: jax.Array | int,
    experts: int,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Add y to x, norm the sum, and route it by one layer's router.

    Returns x + y [B, D], the same normed, the router's logits [B, E], the gates [B, E], the ids of the chosen
    experts [B, K], and the local experts with a token: their sorted local ids [X] and their count [1]. Local
    are the X = `experts` ids from `first` on. Gates are 0 for experts that were not chosen, and for rows that
    are not valid. With expert replicas (model/replicas.py), gates [B, S] and local ids are those of slots.
    The same contract as `choose_experts` in model/moe.py, ties included.
    """
    (B, D), (_, _, E), K = x_BD.shape, router_LDE.shape, cfg.num_experts_per_tok
    tile = _divisor(D, _TILE // (4 * E))
    bias, slots = [[] if a is None else [a] for a in (bias_LE, slots_LXS)]
    S = E if slots_LXS is None else slots_LXS.shape[2]

    def kernel(layer_ref, first_ref, x_ref, y_ref, norm_ref, valid_ref, w_ref, *refs):
        bias_refs, slots_refs, refs = refs[: len(bias)], refs[len(bias) : -7], refs[-7:]
        sum_ref, xn_ref, logits_ref, gates_ref, ids_ref, listed_ref, count_ref = refs
        d = pl.program_id(0)

        @pl.when(d == 0)
        def _():
            logits_ref[...] = jnp.zeros_like(logits_ref)
            sum_ref[...] = x_ref[...] + y_ref[...]

        at = pl.ds(d * tile, tile)
        xn_BI = _scaled(sum_ref[:, at], _inverse_rms(sum_ref[...], eps), _row(norm_ref, layer_ref[0], at))
        xn_ref[:, at] = xn_BI
        # in bfloat16 as exact as in float32, if the weights are so: sums are float32 either way
        exact_BI = xn_BI if w_ref.dtype == xn_BI.dtype else xn_BI.astype(jnp.float32)
        logits_ref[...] += _dot(exact_BI, w_ref[...], _NN)

        @pl.when(d == pl.num_programs(0) - 1)
        def _():
            scores_BE = affinities(cfg, logits_ref[...])
            choice_BE = scores_BE + _row(bias_refs[0], layer_ref[0]) if bias_refs else scores_BE
            chosen_BE, ids = choose(cfg, choice_BE)
            for k, id_B1 in enumerate(ids):
                ids_ref[:, k : k + 1] = id_B1
            chosen_BE &= valid_ref[...] > 0
            gates_BE = jnp.where(chosen_BE, scores_BE, 0.0)
            if cfg.norm_topk_prob:
                gates_BE = gates_BE / (gates_BE.sum(axis=1, keepdims=True) + 1e-20)
            gates_BE = gates_BE * cfg.routed_scaling_factor
            if slots_refs:
                gates_BE, chosen_BE = to_slots(gates_BE, chosen_BE, slots_refs[0][...])
            gates_ref[...] = gates_BE
            listed_ref[...], count_ref[...] = listed(chosen_BE, first_ref[0], experts)

    rows = [(D, x_BD.dtype), (D, x_BD.dtype), (E, jnp.float32), (S, jnp.float32), (K, jnp.int32)]
    shapes = [((B, n), dtype) for n, dtype in rows] + [((1, n), jnp.int32) for n in (experts, 1)]
    valid_B1 = valid_B[:, None].astype(jnp.int32)
    *of_rows, listed_1X, count_11 = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(*s) for s in shapes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(D // tile,),
            in_specs=[
                _whole(B, D), _whole(B, D), _near_layer(norm_LD), _whole(B, 1),
                pl.BlockSpec((None, tile, E), lambda d, layer, first: (layer[0], d, 0)),
                *map(_near_layer, bias),
                *(pl.BlockSpec((None, 3, S), lambda d, layer, first: (layer[0], 0, 0)) for _ in slots),
            ],
            out_specs=[_whole(*shape) for shape, _ in shapes],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM),
        cost_estimate=_cost(B if router_LDE.dtype == x_BD.dtype else 6 * B, D * E, router_LDE.dtype),
        interpret=interpret,
        name="router",
    )(_index(layer), _index(first), x_BD, y_BD, norm_LD, valid_B1, router_LDE, *bias, *slots)  # fmt: skip
    return *of_rows, listed_1X[0], count_11[0]


# -------------------------------------------------------------------- inside kernels


def _dot(a: jax.Array, w: jax.Array, dims: Any) -> jax.Array:
    precision = _EXACT if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, w.astype(a.dtype), dims, precision=precision, preferred_element_type=jnp.float32
    )


def _inverse_rms(x: jax.Array, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)


def _row(ref: Any, layer: jax.Array, at: Any = slice(None)) -> jax.Array:
    """The layer's row [1, D] in the tile that `_near_layer` fetches."""
    return _pick(ref[:, at], layer % ref.shape[0])


def _pick(rows: jax.Array, i: jax.Array) -> jax.Array:
    """Row i as [1, D], in float32: packed rows cannot be indexed at run time."""
    here = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) == i
    return jnp.where(here, rows.astype(jnp.float32), 0).sum(axis=0, keepdims=True)


def _scaled(x: jax.Array, inverse: jax.Array, scale: jax.Array) -> jax.Array:
    return scale.astype(x.dtype) * (x.astype(jnp.float32) * inverse).astype(x.dtype)


def _normed(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`RMSNorm` (model/norm.py) of rows."""
    return _scaled(x, _inverse_rms(x, eps), scale)


def _rotated(x_BR: jax.Array, cos_Br: jax.Array, sin_Br: jax.Array, interleaved: bool) -> jax.Array:
    """`rotate` (model/rope.py) of [B, R]. Exact products with matrices of 0 and 1 move the lanes."""
    R = x_BR.shape[1]
    half = R // 2
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (R, half), axis) for axis in (0, 1))
    first = row == (2 * column if interleaved else column)
    second = row == (2 * column + 1 if interleaved else column + half)
    a_Br, b_Br = (_dot(x_BR, m.astype(x_BR.dtype), _NN) for m in (first, second))
    rotated = jnp.concatenate([a_Br * cos_Br - b_Br * sin_Br, b_Br * cos_Br + a_Br * sin_Br], axis=1)
    return rotated.astype(x_BR.dtype)


# -------------------------------------------------------------------- around them


def _transposed(w_LIO: jax.Array | Scaled) -> jax.Array:
    """Inputs last: they are the longer axis, and need no padding to whole tiles."""
    return value_of(w_LIO).swapaxes(1, 2)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is a multiple of 128 and not above `most`; n where there is none."""
    fits = [d for d in range(128, min(n, most) + 1, 128) if n % d == 0]
    return max(fits, default=n)


def _index(layer: jax.Array | int) -> jax.Array:
    return jnp.asarray(layer, jnp.int32).reshape(1)


def _whole(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _of_layer(*shape: int, rank: int) -> pl.BlockSpec:
    """The layer's part of a stack [L, ...]; the first scalar is the layer's index."""
    return pl.BlockSpec((None, *shape), lambda *at: (at[1][0], *(0,) * rank))


def _near_layer(stack_LD: jax.Array) -> pl.BlockSpec:
    """The tile of a stack [L, D] that has the layer's row; fetching that row alone would need a copy of the
    stack in another layout."""
    L, D = stack_LD.shape
    rows = min(L, 8)
    return pl.BlockSpec((rows, D), lambda *at: (at[1][0] // rows, 0))


def _cost(rows: int, numbers: int, dtype: Any) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * max(rows, 8) * numbers,
        bytes_accessed=numbers * jnp.dtype(dtype).itemsize,
        transcendentals=0,
    )
