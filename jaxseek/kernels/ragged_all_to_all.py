"""Exchange of runs of rows between the shards of an axis: the ICI collective on TPU, all_gather elsewhere.

XLA:CPU does not implement ragged_all_to_all; the gathered form has the same results and gradients, so that
expert parallelism is studied and tested without a TPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxseek.sharding import platform


def ragged_all_to_all(
    operand_MD: jax.Array,
    rows: int,
    input_offsets_P: jax.Array,
    send_sizes_P: jax.Array,
    output_offsets_P: jax.Array,
    recv_sizes_P: jax.Array,
    axes: str | tuple[str, ...],
) -> jax.Array:
    """Send rows [input_offsets[p], + send_sizes[p]) to shard p, which stores them from output_offsets[p] on.

    Returns [rows, D]; rows that nobody wrote are zero. Call inside shard_map over `axes` of P shards in all.
    Source: jax.lax.ragged_all_to_all.
    """
    args = (operand_MD, input_offsets_P, send_sizes_P, output_offsets_P, recv_sizes_P)

    def native(operand, *sizes):
        out = jnp.zeros_like(operand, shape=(rows, *operand.shape[1:]))
        return jax.lax.ragged_all_to_all(operand, out, *sizes, axis_name=axes)

    def gathered(operand, inputs, sends, outputs, _):
        me = jax.lax.axis_index(axes)
        all_MD, inputs, sends, outputs = (
            jax.lax.all_gather(a, axes) for a in (operand, inputs, sends, outputs)
        )
        start_P, size_P = outputs[:, me, None], sends[:, me, None]  # per source, for this receiver
        row_M = jnp.arange(rows)
        mine_PM = (row_M[None] >= start_P) & (row_M[None] < start_P + size_P)
        source_M = jnp.argmax(mine_PM, axis=0)
        index_M = inputs[source_M, me] + row_M - outputs[source_M, me]
        index_M = jnp.where(mine_PM.any(axis=0), index_M, operand.shape[0])
        return all_MD.at[source_M, index_M].get(mode="fill", fill_value=0)

    return (native if platform() == "tpu" else gathered)(*args)
