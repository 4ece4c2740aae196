"""The experts that few tokens chose, on TPU: a Pallas kernel that reads them where they lie, and no others.

A step of decoding is reading weights. XLA reads every expert that a chip holds; a Pallas call on one layer's
slice of the stack has the slice copied first, and quantised experts made bfloat16 in HBM. This kernel is
given the stacks of all layers, the layer, and which experts have a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxseek.ops.scaled import Scaled, scales_of, value_of

Matrices = jax.Array | Scaled
_COLUMNS = 128  # of an expert at a time
_GROUP = 16  # rows that are multiplied at a time where only an expert's own are
ROWS = 128  # the most that it takes: multiplying them takes as long as reading an expert
_VMEM = 48 << 20  # bytes that the kernel may use, of 128 MiB on v5e and v6e and 95 on v5p
_TILES = 6 << 20  # bytes of them for the experts' tiles


def chosen_experts_mlp(
    x_ND: jax.Array,
    gates_NE: jax.Array,
    gate_LEDF: Matrices,
    up_LEDF: Matrices,
    down_LEFD: Matrices,
    layer: jax.Array | int,
    touched: float,
    listed: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    shared: Sequence[Matrices] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Sum of gate times expert output over the experts of one layer, [N, D]; those whose gates are all zero
    are not read.

    At most ROWS rows, in float32 or bfloat16; experts plain, or quantised with a scale for each output.
    `touched` is how many experts have a token on average, for the cost estimate. `listed` are the experts
    with a token, how many of them are meant [1], and which column of the gates expert 0 has [1], where that
    is known. `shared` are stacks of a feed-forward that every row goes through, [L, D, F] twice and [L, F,
    D]. For one device or inside shard_map. Source: DeepSeekMoE paper, eq. 3-5.
    """
    (N, D), (_, _, F, _) = x_ND.shape, down_LEFD.shape
    if listed is None:
        listed = (*_listed((gates_NE != 0).any(axis=0)), jnp.zeros(1, jnp.int32))
    experts_E, count, first = listed

    # every matrix as [F, D]: F is split over chips, and few of it would be padded to 128 as the last axis
    values = [value_of(w).swapaxes(-1, -2) for w in (gate_LEDF, up_LEDF)] + [value_of(down_LEFD)]
    scales = scales_of(gate_LEDF, up_LEDF, down_LEFD)
    itemsize = values[0].dtype.itemsize
    tile = next(t for t in (F, 1024, 512, 256, 128, 64, 32) if F % t == 0 and 6 * t * D * itemsize <= _TILES)

    def whole(i, f, *scalars):
        return 0, 0

    def matrix(i, f, layer, experts, first):
        return layer[0], experts[i], f, 0

    def by_hidden(i, f, layer, experts, first):
        return layer[0], experts[i], 0, f

    def by_output(i, f, layer, experts, first):
        return layer[0], experts[i], 0, 0

    def of_layer(i, f, layer, experts, first):
        return layer[0], 0, 0

    specs = [pl.BlockSpec((N, D), whole), pl.BlockSpec(gates_NE.shape, whole)]
    specs += [pl.BlockSpec((None, None, tile, D), matrix)] * 3
    if scales:
        specs += [pl.BlockSpec((None, None, 1, tile), by_hidden)] * 2
        specs += [pl.BlockSpec((None, None, 1, D), by_output)]
    always: list[jax.Array] = []
    if shared is not None:
        always = [value_of(w).swapaxes(-1, -2) for w in shared[:2]] + [value_of(shared[2])]
        always += scales_of(*shared)
        once = pl.Buffered(1)  # as it stays all along
        specs += [pl.BlockSpec((None, *a.shape[1:]), of_layer, pipeline_mode=once) for a in always]
    # The compiler's bundles for an expert (v5e, D = 7168): 1.2 k for 32 columns and 2.7 k for 128 with few
    # rows, as if 64 rows were multiplied; 4.8 k for 128 columns with rows brought together.
    read = touched * 3 * F * D + sum(a[0].size for a in always)
    return pl.pallas_call(
        functools.partial(_kernel, scaled=bool(scales), shared=len(always)),
        out_shape=jax.ShapeDtypeStruct((N, D), x_ND.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(count[0], F // tile),
            in_specs=specs,
            out_specs=pl.BlockSpec((N, D), whole),
            scratch_shapes=[pltpu.VMEM((N, D), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(2 * (64 * max(F, 64) if N <= _GROUP else 112 * max(F, 128)) / F * read),
            bytes_accessed=int(read * itemsize + 2 * x_ND.size * x_ND.dtype.itemsize),
            transcendentals=int(N * F * touched),
        ),
        interpret=interpret,
        name="chosen_experts",
    )(
        jnp.asarray(layer, jnp.int32).reshape(1), experts_E, first, x_ND, gates_NE.astype(jnp.float32),
        *values, *scales, *always,
    )  # fmt: skip


def touched_share(experts: int, slots: int, chosen: int, rows: float) -> float:
    """The share of the slots that have a token, if rows chose at random and no expert had a third copy."""
    p = chosen / experts
    none, one = (1 - p) ** rows, rows * p * (1 - p) ** (rows - 1)
    return (experts * (1 - none) + (slots - experts) * (1 - none - one)) / slots


def _listed(chosen_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices of the chosen experts first, and how many steps to make: at least one. By comparisons, since
    XLA has no cheap sort of so few."""
    E = chosen_E.shape[0]
    at_E = jnp.arange(E)
    rank_E = jnp.where(chosen_E[None] & (at_E[None] < at_E[:, None]), 1, 0).sum(1)
    listed_EE = chosen_E[None] & (rank_E[None] == at_E[:, None])
    return jnp.where(listed_EE, at_E[None], 0).sum(1), jnp.maximum(chosen_E.sum(), 1)[None]


def _kernel(
    layer_ref,
    experts_ref,
    first_ref,
    x_ref,
    gates_ref,
    gate_ref,
    up_ref,
    down_ref,
    *refs,
    scaled: bool,
    shared: int,
):
    *refs, y_ref, sum_ref = refs
    scales, always = (refs[:3], refs[3:]) if scaled else (refs[:0], refs)
    i, f = pl.program_id(0), pl.program_id(1)

    @pl.when((i == 0) & (f == 0))
    def _():
        sum_ref[...] = _mlp(x_ref[...], always[:3], always[3:]) if shared else jnp.zeros_like(sum_ref)

    expert = experts_ref[i] + first_ref[0]
    here_NE = jax.lax.broadcasted_iota(jnp.int32, gates_ref.shape, 1) == expert
    gate_N1 = jnp.where(here_NE, gates_ref[...], 0).sum(1, keepdims=True)
    weights = (gate_ref, up_ref, down_ref)
    if x_ref.shape[0] <= _GROUP:
        sum_ref[...] += _mlp(x_ref[...], weights, scales) * gate_N1
    else:
        _add_group_by_group(sum_ref, x_ref, gate_N1, lambda x_RD: _mlp(x_RD, weights, scales))

    @pl.when((i == pl.num_programs(0) - 1) & (f == pl.num_programs(1) - 1))
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _add_group_by_group(sum_ref: Any, x_ref: Any, gate_N1: jax.Array, mlp: Callable) -> None:
    """Add gate * mlp(x) of the rows that have a gate, a few of them at a time.

    Products with matrices of 0 and 1 bring them together and take them back.
    """
    N, dtype = x_ref.shape[0], x_ref.dtype
    chosen_N1 = jnp.where(gate_N1 != 0, 1.0, 0.0)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (N, N), axis) for axis in (0, 1))
    before_N1 = _product(jnp.where(column < row, 1.0, 0.0), chosen_N1, 0)  # chosen rows before each

    def group(g: jax.Array, _: None) -> None:
        place_NR = jax.lax.broadcasted_iota(jnp.int32, (N, _GROUP), 1) + g * _GROUP
        here_NR = jnp.where(before_N1 == place_NR.astype(jnp.float32), chosen_N1, 0.0)
        x_RD = _product(here_NR.astype(dtype), x_ref[...], 0, 0).astype(dtype)
        gate_R1 = _product(here_NR, gate_N1, 0, 0)
        sum_ref[...] += _product(here_NR.astype(dtype), (mlp(x_RD) * gate_R1).astype(dtype), 0)

    count = jnp.sum(chosen_N1).astype(jnp.int32)
    jax.lax.fori_loop(0, jax.lax.div(count + _GROUP - 1, _GROUP), group, None)


def _product(a: jax.Array, b: jax.Array, of_b: int, of_a: int = 1) -> jax.Array:
    """float32, over one axis of each; exact but for the sums' rounding."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b.astype(a.dtype), (((of_a,), (of_b,)), ((), ())), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _mlp(x_ND: jax.Array, weights: Any, scales: Any) -> jax.Array:
    """down(silu(gate x) * up x) in float32; matrices are [F, D], their scales [1, F], [1, F] and [1, D].

    Some columns at a time: what is made of int8 numbers has to stay in registers.
    """
    F, parts = weights[0].shape[0], []
    for start in range(0, F, _COLUMNS):
        at = slice(start, min(start + _COLUMNS, F))

        def hidden(i: int, at: slice = at) -> jax.Array:
            h_NF = _product(x_ND, weights[i][at], 1)
            return h_NF * scales[i][:, at] if scales else h_NF

        h_NF = (jax.nn.silu(hidden(0)) * hidden(1)).astype(x_ND.dtype)
        parts.append(_product(h_NF, weights[2][at], 0))
    y_ND = sum(parts[1:], parts[0])
    return y_ND * scales[2][...] if scales else y_ND
