"""Bringing tokens to their experts and back, by name: `local`, `replicated`, `all_to_all`.

All three give the same result, and drop nothing unless told to. `local`: every device has every expert.
`replicated`: experts are split, each shard sees all tokens of its expert group, computes its experts' part,
and the parts are summed (decode). `all_to_all`: each token's row travels to the shards of its experts
(training).

With a capacity factor c, an expert takes at most ceil(c * tokens * K / E) rows of those that one shard
dispatches, those with the largest gates first. `all_to_all` has room on a shard for every row that could
come, all tokens of all shards, or with a room factor r for ceil(r * tokens * K) rows: r times its even share.
Rows beyond either are dropped and counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxseek.model.replicas import replicas_of
from jaxseek.ops.chosen_experts import touched_share
from jaxseek.ops.experts import Experts, experts_mlp
from jaxseek.ops.grouped_mlp import grouped_mlp
from jaxseek.ops.ragged_all_to_all import ragged_all_to_all
from jaxseek.ops.sorted_rows import combine, rows_of, sorted_by_expert
from jaxseek.sharding.rules import Rules


@dataclass(frozen=True)
class Part:
    """One shard's part in a dispatch.

    `expert_axes`: mesh axes that split the experts; `room`: rows that a shard can take; `touched_share`:
    expected share of its experts with a token; `fp8`: rounding of `grouped_mlp`.
    """

    expert_axes: tuple[str, ...]
    room: int
    touched_share: float
    fp8: bool


def local(
    x_ND: jax.Array, ids_NK: jax.Array, gates_NK: jax.Array, experts: Experts, part: Part
) -> tuple[jax.Array, jax.Array]:
    """All experts are here: [N, D], and no row dropped."""
    y_ND = experts_mlp(x_ND, ids_NK, gates_NK, experts, part.touched_share, part.fp8)
    return y_ND, jnp.zeros((), jnp.int32)


def replicated(
    x_ND: jax.Array, ids_NK: jax.Array, gates_NK: jax.Array, experts: Experts, part: Part
) -> tuple[jax.Array, jax.Array]:
    """The local experts' part for all tokens of the expert group; the caller sums over the shards."""
    first = experts.count * jax.lax.axis_index(part.expert_axes)
    return local(x_ND, ids_NK - first, gates_NK, experts, part)


def all_to_all(
    x_ND: jax.Array, ids_NK: jax.Array, gates_NK: jax.Array, experts: Experts, part: Part
) -> tuple[jax.Array, jax.Array]:
    """Each token's row goes to the shards of its experts, and the results come back (training).

    Two ragged exchanges; every pair of a source and an expert has a run of its own, so that rows arrive
    sorted by expert. Rows that a shard is sent beyond its room are dropped, those of the last sources first.
    """
    axes, room = part.expert_axes, part.room
    (N, K), P, E = ids_NK.shape, jax.lax.axis_size(axes), experts.count
    me = jax.lax.axis_index(axes)
    at_NK, order_M, sizes_E = sorted_by_expert(ids_NK, P * E)
    asked_SPE = jax.lax.all_gather(sizes_E.reshape(P, E), axes)  # by source S to shard P for its expert E
    from_SPE = _before(asked_SPE.reshape(P, -1), 1).reshape(P, P, E)  # where a run starts at its source
    # room goes to the sources in turn; the rows of a source are in the order of the experts
    came_SPE = _before(jnp.swapaxes(asked_SPE, 0, 1).reshape(P, -1), 1).reshape(P, P, E).swapaxes(0, 1)
    sizes_SPE = jnp.clip(room - came_SPE, 0, asked_SPE)
    to_SPE = _before(sizes_SPE.transpose(1, 2, 0).reshape(P, -1), 1).reshape(P, E, P).transpose(2, 0, 1)

    # assignments in the part of a run that was cut have no place
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
    y_MD = grouped_mlp(got_MD, *experts.matrices, sizes_SPE[:, me].sum(0), part.fp8, clear=False)
    y_MD = checkpoint_name(ragged_all_to_all(y_MD, N * K, *back, axes=axes), "exchanged")
    return combine(y_MD, gates_NK, at_NK, order_M), dropped


def dispatch(
    x_BTD: jax.Array,
    ids_BTK: jax.Array,
    gates_BTK: jax.Array,
    valid_BT: jax.Array,
    experts: Experts,
    rules: Rules,
    fp8: bool = False,
    replicas: tuple[int, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum of gate times expert output over each token's experts: ([B, T, D], load [E], dropped []).

    Rows with `valid` false reach no expert. Where busy experts have replicas, `replicas` are the number of
    experts and the table of their slots (model/replicas.py).
    """
    S = experts.count
    E, slots_XS = replicas or (S, None)
    expert_axes, width_axes = rules.axes("expert"), rules.axes("expert_mlp")
    form = {"local": local, "replicated": replicated, "all_to_all": all_to_all}[
        rules.dispatch if expert_axes else "local"
    ]
    exchange, batch_axes = form is all_to_all, rules.axes("batch")
    if not exchange:  # every shard of the expert axis sees the same tokens
        batch_axes = tuple(a for a in batch_axes if a not in expert_axes)
    length_axes = tuple(a for a in rules.axes("length") if a not in expert_axes)
    token_spec = PartitionSpec(batch_axes or None, length_axes or None, None)
    token_axes = batch_axes + length_axes
    sum_axes = width_axes + (() if exchange else expert_axes)

    def on_shard(slots_XS, x_BTD, ids_BTK, gates_BTK, valid_BT1, experts):
        D, K = x_BTD.shape[-1], ids_BTK.shape[-1]
        x_ND, gates_NK = x_BTD.reshape(-1, D), gates_BTK.reshape(-1, K)
        ids_NK = jnp.where(valid_BT1.reshape(-1, 1), ids_BTK.reshape(-1, K), E)
        load_E = jnp.bincount(ids_NK.reshape(-1), length=E)
        room = math.prod(jax.lax.axis_size(a) for a in expert_axes) * len(x_ND) * min(K, experts.count)
        if rules.room_factor is not None:
            room = min(room, math.ceil(rules.room_factor * ids_NK.size))
        over = jnp.zeros((), jnp.int32)
        if rules.capacity_factor is not None:
            capacity = math.ceil(rules.capacity_factor * ids_NK.size / E)
            ids_NK, over = _limit(ids_NK, gates_NK, E, capacity)
            room = min(room, E * capacity)
        if slots_XS is not None:  # each shard starts at another replica, so that none is first for all
            first = jax.lax.axis_index(token_axes) if token_axes else 0
            ids_NK = replicas_of(ids_NK, slots_XS, E, first)
        part = Part(expert_axes, room, touched_share(E, S, K, len(x_ND)), fp8)
        y_ND, dropped = form(x_ND, ids_NK, gates_NK, experts, part)
        y_ND, dropped = jax.lax.psum(y_ND, sum_axes) if sum_axes else y_ND, dropped + over
        if token_axes:
            load_E, dropped = jax.lax.psum((load_E, dropped), token_axes)
        return y_ND.reshape(x_BTD.shape), load_E, dropped

    tokens: list[Any] = [
        jax.sharding.reshard(a, token_spec) for a in (x_BTD, ids_BTK, gates_BTK, valid_BT[..., None])
    ]
    sharded: Any = jax.shard_map(
        on_shard,
        in_specs=(PartitionSpec(), *(token_spec,) * 4, experts.specs(rules)),
        out_specs=(token_spec, PartitionSpec(), PartitionSpec()),
        check_vma=False,  # the TPU grouped matmul does not declare over which axes its result varies
    )
    y_BTD, load_E, dropped = sharded(slots_XS, *tokens, experts)
    return rules.shard(y_BTD, "batch", "length", None), load_E, dropped


def _limit(ids_NK, gates_NK, E, capacity):
    """Ids in which assignments beyond an expert's capacity are replaced by E (none), and their number.

    Those with the largest gates stay.
    """
    ids_M = ids_NK.reshape(-1)
    order_M = jnp.lexsort((-gates_NK.reshape(-1), ids_M))
    sorted_M, load_E = ids_M[order_M], jnp.bincount(ids_M, length=E)
    first_E = jnp.cumsum(load_E) - load_E
    rank_M = jnp.arange(ids_M.size) - first_E[jnp.minimum(sorted_M, E - 1)]
    over_M = (sorted_M < E) & (rank_M >= capacity)
    kept_M = jnp.zeros_like(ids_M).at[order_M].set(jnp.where(over_M, E, sorted_M))
    return kept_M.reshape(ids_NK.shape), over_M.sum()


def _before(sizes: jax.Array, axis: int) -> jax.Array:
    """Start of each run along an axis, for runs of these sizes one after the other."""
    return jnp.cumsum(sizes, axis=axis) - sizes
