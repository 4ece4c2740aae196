"""Bringing tokens to their experts and back, by name: `local`, `replicated`, `all_to_all`.

All three are dropless unless told otherwise and give the same result. `local` keeps every expert on every
device. `replicated` splits the experts and gives each shard all tokens of its expert group: it computes the
local experts' part and sums over the shards (decode). `all_to_all` sends each token's row to its experts'
shards (training). With a capacity factor c, an expert takes at most ceil(c * tokens * K / E) rows of those
that one shard dispatches, those of the largest gates first. `all_to_all` has room on a shard for every row
that could come, all tokens of all shards, or with a room factor r for ceil(r * tokens * K) rows: r times its
even share. What is over is dropped and counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxseek.model.replicas import slots_of
from jaxseek.ops.chosen_experts import ROWS, chosen_experts_mlp, touched_share
from jaxseek.ops.few_rows import FEW, ByOutput
from jaxseek.ops.grouped_mlp import Experts, every_expert_mlp, every_expert_mlp_by_output, grouped_mlp
from jaxseek.ops.platform import platform
from jaxseek.ops.ragged_all_to_all import ragged_all_to_all
from jaxseek.ops.sorted_rows import combine, rows_of, sorted_by_expert
from jaxseek.sharding.rules import Rules

_FEW = 32  # rows; a TPU would read the experts longer than it multiplies up to some 100 (docs/lab.md, 2)


def dispatch(
    x_BTD: jax.Array,
    ids_BTK: jax.Array,
    gates_BTK: jax.Array,
    valid_BT: jax.Array,
    experts: Sequence[Experts],
    rules: Rules,
    fp8: bool = False,
    layer: jax.Array | int | None = None,
    slots: tuple[int, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum of gate times expert output over each token's experts: ([B, T, D], load [E], dropped []).

    `experts` are gate [E, D, F], up [E, D, F] and down [E, F, D]; rows with `valid` false reach none. `fp8`
    is `grouped_mlp`'s. With a `layer` the experts have a leading axis of layers, and are read in it: see
    `reads_in_place`. Where they lie in slots, `slots` are how many experts there are, and the table of the
    slots (model/replicas.py).
    """
    S = experts[0].shape[-3]
    E, slots_XS = slots or (S, None)
    expert_axes, width_axes = rules.axes("expert"), rules.axes("expert_mlp")
    exchange = rules.dispatch == "all_to_all" and expert_axes
    batch_axes = rules.axes("batch")
    if not exchange:  # every shard of the expert axis sees the same tokens
        batch_axes = tuple(a for a in batch_axes if a not in expert_axes)
    length_axes = tuple(a for a in rules.axes("length") if a not in expert_axes)
    token_spec = PartitionSpec(batch_axes or None, length_axes or None, None)
    token_axes = batch_axes + length_axes

    def local(layer, slots_XS, x_BTD, ids_BTK, gates_BTK, valid_BT1, *experts):
        D, K = x_BTD.shape[-1], ids_BTK.shape[-1]
        x_ND, gates_NK = x_BTD.reshape(-1, D), gates_BTK.reshape(-1, K)
        ids_NK = jnp.where(valid_BT1.reshape(-1, 1), ids_BTK.reshape(-1, K), E)
        load_E, dropped = jnp.bincount(ids_NK.reshape(-1), length=E), jnp.zeros((), jnp.int32)
        room = math.prod(jax.lax.axis_size(a) for a in expert_axes) * len(x_ND) * min(K, len(experts[0]))
        if rules.room_factor is not None:
            room = min(room, math.ceil(rules.room_factor * ids_NK.size))
        if rules.capacity_factor is not None:
            capacity = math.ceil(rules.capacity_factor * ids_NK.size / E)
            ids_NK, dropped = _limit(ids_NK, gates_NK, E, capacity)
            room = min(room, E * capacity)
        if slots_XS is not None:  # each shard begins elsewhere, so that no copy is the first for all
            first = jax.lax.axis_index(token_axes) if token_axes else 0
            ids_NK = slots_of(ids_NK, slots_XS, E, first)
        if exchange:
            y_ND, cut = _all_to_all(x_ND, ids_NK, gates_NK, experts, expert_axes, room, fp8)
            dropped += cut
        else:
            share = touched_share(E, S, K, len(x_ND))
            y_ND = _local(x_ND, ids_NK, gates_NK, experts, expert_axes, fp8, layer, share)
        sum_axes = width_axes + (() if exchange else expert_axes)
        y_ND = jax.lax.psum(y_ND, sum_axes) if sum_axes else y_ND
        if token_axes:
            load_E, dropped = jax.lax.psum((load_E, dropped), token_axes)
        return y_ND.reshape(x_BTD.shape), load_E, dropped

    token_args = [
        jax.sharding.reshard(a, token_spec) for a in (x_BTD, ids_BTK, gates_BTK, valid_BT[..., None])
    ]

    def spec(w: Any, *names: str | None) -> Any:
        return jax.tree.map(lambda a: rules.spec(*(x if n > 1 else None for x, n in zip(names, a.shape))), w)

    lead = () if layer is None else (None,)
    wide = (*lead, "expert", None, "expert_mlp")
    layouts = (wide, wide, (*lead, "expert", "expert_mlp", None))
    y_BTD, load_E, dropped = jax.shard_map(
        local,
        in_specs=(
            *(PartitionSpec(),) * 2,
            *(token_spec,) * 4,
            *(spec(w, *names) for w, names in zip(experts, layouts)),
        ),
        out_specs=(token_spec, PartitionSpec(), PartitionSpec()),
        check_vma=False,  # the TPU grouped matmul does not declare over which axes its result varies
    )(layer, slots_XS, *token_args, *experts)
    return rules.shard(y_BTD, "batch", "length", None), load_E, dropped


def reads_in_place(x_BTD: jax.Array, rules: Rules) -> bool:
    """Whether `chosen_experts_mlp` is to have a stack's experts whole: on TPU, for so few tokens."""
    expert_axes, mesh = rules.axes("expert"), jax.sharding.get_abstract_mesh()
    split = math.prod(mesh.shape[a] for a in rules.axes("batch") if a not in expert_axes)
    rows = x_BTD.shape[0] * x_BTD.shape[1] // split
    exchange = rules.dispatch == "all_to_all" and expert_axes
    return platform() == "tpu" and not exchange and rows <= ROWS


def _limit(ids_NK, gates_NK, E, capacity):
    """Ids with the assignments beyond an expert's capacity replaced by E (none), and how many there were."""
    ids_M = ids_NK.reshape(-1)
    order_M = jnp.lexsort((-gates_NK.reshape(-1), ids_M))
    sorted_M, load_E = ids_M[order_M], jnp.bincount(ids_M, length=E)
    first_E = jnp.cumsum(load_E) - load_E
    rank_M = jnp.arange(ids_M.size) - first_E[jnp.minimum(sorted_M, E - 1)]
    over_M = (sorted_M < E) & (rank_M >= capacity)
    kept_M = jnp.zeros_like(ids_M).at[order_M].set(jnp.where(over_M, E, sorted_M))
    return kept_M.reshape(ids_NK.shape), over_M.sum()


def _local(x_ND, ids_NK, gates_NK, experts: Any, expert_axes, fp8, layer, share):
    """The part of the experts that this shard holds, for all the tokens it sees."""
    gate_EDF, up_EDF, down_EFD = experts
    E = gate_EDF.shape[-3]
    first = E * jax.lax.axis_index(expert_axes) if expert_axes else 0
    N, K = ids_NK.shape
    few = platform() == "tpu" and N <= _FEW and not fp8
    by_output = isinstance(experts[0], ByOutput) and N <= FEW and N * K >= E
    if few or by_output or layer is not None:
        mine_NKE = (ids_NK - first)[:, :, None] == jnp.arange(E)[None, None]
        gates_NE = jnp.where(mine_NKE, gates_NK[:, :, None], 0).sum(1)
        if by_output:
            return every_expert_mlp_by_output(x_ND, gates_NE, *experts)
        if layer is None:
            return every_expert_mlp(x_ND, gates_NE, *experts)
        return chosen_experts_mlp(x_ND, gates_NE, gate_EDF, up_EDF, down_EFD, layer, E * share)
    here_NK = (ids_NK >= first) & (ids_NK < first + E)
    at_NK, order_M, sizes_E = sorted_by_expert(jnp.where(here_NK, ids_NK - first, E), E)
    x_MD = rows_of(x_ND, at_NK, order_M)
    y_MD = grouped_mlp(x_MD, gate_EDF, up_EDF, down_EFD, sizes_E, fp8, clear=False)
    return combine(y_MD, gates_NK, at_NK, order_M)


def _all_to_all(x_ND, ids_NK, gates_NK, experts, axes, room, fp8):
    """Rows to the shards of their experts and the results back, by two ragged exchanges.

    Every pair of a source and an expert has a run of its own, so that rows arrive sorted by expert. What a
    shard is sent beyond its `room` is dropped, of the last sources first; returns how many of one's own.
    """
    gate_EDF, up_EDF, down_EFD = experts
    (N, K), P, E = ids_NK.shape, jax.lax.axis_size(axes), gate_EDF.shape[0]
    me = jax.lax.axis_index(axes)
    at_NK, order_M, sizes_E = sorted_by_expert(ids_NK, P * E)
    asked_SPE = jax.lax.all_gather(sizes_E.reshape(P, E), axes)  # by source S to shard P for its expert E
    from_SPE = _before(asked_SPE.reshape(P, -1), 1).reshape(P, P, E)  # where a run starts at its source
    # room goes to the sources in turn, and what a source sends lies by expert
    came_SPE = _before(jnp.swapaxes(asked_SPE, 0, 1).reshape(P, -1), 1).reshape(P, P, E).swapaxes(0, 1)
    sizes_SPE = jnp.clip(room - came_SPE, 0, asked_SPE)
    to_SPE = _before(sizes_SPE.transpose(1, 2, 0).reshape(P, -1), 1).reshape(P, E, P).transpose(2, 0, 1)

    # assignments of which the run was cut have no place
    end_E = (from_SPE + sizes_SPE)[me].reshape(-1)
    hot_NKE = ids_NK[:, :, None] == jnp.arange(P * E)[None, None]
    kept_NK = at_NK < jnp.where(hot_NKE, end_E[None, None], 0).sum(-1)
    dropped = (ids_NK < P * E).sum() - kept_NK.sum()
    at_NK = jnp.where(kept_NK, at_NK, N * K)

    def flat(*tables_PE: jax.Array) -> Any:
        return [a.reshape(-1) for a in tables_PE]

    there = flat(from_SPE[me], sizes_SPE[me], to_SPE[me], sizes_SPE[:, me])
    back = flat(to_SPE[:, me], sizes_SPE[:, me], from_SPE[:, me], sizes_SPE[me])
    got_MD = ragged_all_to_all(rows_of(x_ND, at_NK, order_M), room, *there, axes=axes)
    y_MD = grouped_mlp(got_MD, gate_EDF, up_EDF, down_EFD, sizes_SPE[:, me].sum(0), fp8, clear=False)
    y_MD = checkpoint_name(ragged_all_to_all(y_MD, N * K, *back, axes=axes), "exchanged")
    return combine(y_MD, gates_NK, at_NK, order_M), dropped


def _before(sizes: jax.Array, axis: int) -> jax.Array:
    """Where runs of these sizes start along an axis, one after the other."""
    return jnp.cumsum(sizes, axis=axis) - sizes
