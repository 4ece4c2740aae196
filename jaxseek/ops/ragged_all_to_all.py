"""Exchange of runs of rows between the shards of an axis: the ICI collective on TPU, all_gather elsewhere.

XLA:CPU does not implement ragged_all_to_all; the gathered form has the same results and gradients, so that
expert parallelism is studied and tested without a TPU.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxseek.ops.platform import platform


def ragged_all_to_all(
    operand_MD: jax.Array,
    rows: int,
    input_offsets_R: jax.Array,
    send_sizes_R: jax.Array,
    output_offsets_R: jax.Array,
    recv_sizes_R: jax.Array,
    axes: str | tuple[str, ...],
) -> jax.Array:
    """Send run i of rows, [input_offsets[i], + send_sizes[i]), to shard i // (runs / P), which stores it from
    output_offsets[i] on; recv_sizes are those of the runs that come, by source.

    Returns [rows, D]; what stands in rows that nobody wrote is undefined (NaN in the gathered form), in the
    operand's gradient too. Call inside shard_map over `axes` of P shards in all.
    Source: jax.lax.ragged_all_to_all.
    """
    sizes = input_offsets_R, send_sizes_R, output_offsets_R, recv_sizes_R
    return _exchange(operand_MD, sizes, len(operand_MD), rows, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _exchange(operand_MD, sizes, sent, rows, axes):
    return (_native if platform() == "tpu" else _gathered)(operand_MD, sizes, rows, axes)


def _fwd(operand_MD, sizes, sent, rows, axes):
    return _exchange(operand_MD, sizes, sent, rows, axes), sizes


def _bwd(sent, rows, axes, sizes, dy):
    """The other way: every shard learns where its runs came from."""
    inputs, sends, outputs, recvs = sizes
    there, here = (jax.lax.all_to_all(a, axes, 0, 0, tiled=True) for a in (outputs, inputs))
    return _exchange(dy, (there, recvs, here, sends), rows, sent, axes), None


_exchange.defvjp(_fwd, _bwd)


def _native(operand, sizes, rows, axes):
    out = _room(rows, operand)
    return jax.lax.ragged_all_to_all(operand, out, *sizes, axis_name=axes)


def _room(rows, operand):
    """An array for rows like the operand's that nothing has written. Clearing it takes as long as sending.

    It depends on a number of the operand: jax.lax.empty, which depends on nothing, is taken out of the loop
    over layers and copied in each, and so would be one array for two exchanges.
    """
    D, lanes = operand.shape[1], max(1, 4 // operand.dtype.itemsize)
    tiled = (rows, lanes, D // lanes) if D % lanes == 0 else (rows, D)  # as the exchange lays rows out
    return pl.pallas_call(
        lambda _, out: None,
        out_shape=jax.ShapeDtypeStruct(tiled, operand.dtype),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        cost_estimate=pl.CostEstimate(flops=1, bytes_accessed=0, transcendentals=0),
    )(operand[:1, 0].astype(jnp.float32)).reshape(rows, D)


def _gathered(operand, sizes, rows, axes):
    inputs, sends, outputs, _ = sizes
    me, P = jax.lax.axis_index(axes), jax.lax.axis_size(axes)
    all_PMD = jax.lax.all_gather(operand, axes)
    # of the runs that come here: where they start and how long they are, by source and in its order
    inputs_R, start_R, size_R = (
        jax.lax.all_gather(a.reshape(P, -1), axes)[:, me].reshape(-1) for a in (inputs, outputs, sends)
    )
    row_M = jnp.arange(rows)
    mine_RM = (row_M[None] >= start_R[:, None]) & (row_M[None] < (start_R + size_R)[:, None])
    run_M = jnp.argmax(mine_RM, axis=0)
    index_M = inputs_R[run_M] + row_M - start_R[run_M]
    index_M = jnp.where(mine_RM.any(axis=0), index_M, operand.shape[0])
    return all_PMD.at[run_M // (len(start_R) // P), index_M].get(mode="fill", fill_value=jnp.nan)
