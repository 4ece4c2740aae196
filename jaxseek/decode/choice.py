"""The router's choice of experts inside a TPU kernel, by comparisons, sums over a row and matrix products.

The same contract as `choose_experts` in model/moe.py, ties included: the lower id wins.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxseek.config.model import ModelConfig

_LOWEST = float(jnp.finfo(jnp.float32).min)


def affinities(cfg: ModelConfig, logits_BE: jax.Array) -> jax.Array:
    """The router's scores, as `affinities` in model/moe.py."""
    if cfg.scoring_func == "sigmoid":
        return jax.nn.sigmoid(logits_BE)
    part_BE = jnp.exp(logits_BE - logits_BE.max(axis=1, keepdims=True))
    return part_BE / part_BE.sum(axis=1, keepdims=True)


def _best(choice_BE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maximum of each row [B, 1], the lowest index that has it [B, 1], and a mask of that index [B, E]."""
    E = choice_BE.shape[1]
    at_BE = jax.lax.broadcasted_iota(jnp.int32, choice_BE.shape, 1)
    most_B1 = choice_BE.max(axis=1, keepdims=True)
    id_B1 = jnp.where(choice_BE == most_B1, at_BE, E).min(axis=1, keepdims=True)
    return most_B1, id_B1, at_BE == id_B1


def choose(cfg: ModelConfig, choice_BE: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Choose K experts per row: a mask [B, E], and their ids, K arrays [B, 1], the best first."""
    if cfg.topk_method != "greedy" and cfg.n_group > 1:
        choice_BE = _in_best_groups(cfg, choice_BE)
    chosen_BE, ids = jnp.zeros(choice_BE.shape, jnp.bool), []
    for _ in range(cfg.num_experts_per_tok):
        # chosen experts rank below masked groups, which are needed if the kept groups have fewer than K
        _, id_B1, here_BE = _best(jnp.where(chosen_BE, -jnp.inf, jnp.maximum(choice_BE, _LOWEST)))
        chosen_BE |= here_BE
        ids.append(id_B1)
    return chosen_BE, ids


def _in_best_groups(cfg: ModelConfig, choice_BE: jax.Array) -> jax.Array:
    G = cfg.n_group
    group_BE = jax.lax.broadcasted_iota(jnp.int32, choice_BE.shape, 1) // (choice_BE.shape[1] // G)
    best = []
    for g in range(G):
        members_BE = jnp.where(group_BE == g, choice_BE, -jnp.inf)
        most_B1, _, here_BE = _best(members_BE)
        if cfg.topk_method == "noaux_tc":
            most_B1 += jnp.where(here_BE, -jnp.inf, members_BE).max(axis=1, keepdims=True)
        best.append(most_B1)
    keep_BE = jnp.zeros(choice_BE.shape, jnp.bool)
    for g, score_B1 in enumerate(best):
        ahead = [(b >= score_B1 if other < g else b > score_B1) for other, b in enumerate(best) if other != g]
        rank_B1 = sum(a.astype(jnp.int32) for a in ahead)
        keep_BE |= (group_BE == g) & (rank_B1 < cfg.topk_group)
    return jnp.where(keep_BE, choice_BE, -jnp.inf)


def to_slots(gates_BE: jax.Array, chosen_BE: jax.Array, slots_XS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gates and choice per slot, [B, S], with the replicas that `replicas_of` in model/replicas.py takes."""
    B, E = gates_BE.shape
    expert_1S, copy_1S, copies_1S = (slots_XS[i : i + 1] for i in range(3))
    hot_ES = jax.lax.broadcasted_iota(jnp.int32, (E, expert_1S.shape[1]), 0) == expert_1S
    hot_ES = hot_ES.astype(jnp.float32)
    chosen_BS = _exact(chosen_BE.astype(jnp.float32), hot_ES, 1)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (B, B), axis) for axis in (0, 1))
    before_BS = _exact((column < row).astype(jnp.float32), chosen_BS, 1)
    copies_1S = copies_1S.astype(jnp.float32)
    # the vector unit has no integer remainder; + 0.5 keeps the floor clear of rounding errors
    turn_BS = before_BS - copies_1S * jnp.floor((before_BS + 0.5) / copies_1S)
    taken_BS = (chosen_BS > 0) & (turn_BS == copy_1S.astype(jnp.float32))
    return jnp.where(taken_BS, _exact(gates_BE, hot_ES, 1), 0.0), taken_BS


def listed(chosen_BE: jax.Array, first: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """Sorted local ids of the experts with at least one token, [1, X], and their count, [1, 1], at least 1.

    Local are the X = `experts` ids from `first` on. Products with matrices of 0 and 1 are exact, and the
    vector unit has no sort.
    """
    B, E = chosen_BE.shape
    chosen_BE = chosen_BE.astype(jnp.float32)
    ones_B1 = jnp.ones((B, 1), jnp.float32)
    any_E1 = jnp.minimum(_exact(chosen_BE, ones_B1, 0), 1.0)
    at_E1 = jax.lax.broadcasted_iota(jnp.int32, (E, 1), 0) - first
    any_E1 = jnp.where((at_E1 >= 0) & (at_E1 < experts), any_E1, 0.0)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (E, E), axis) for axis in (0, 1))
    rank_E1 = _exact((column < row).astype(jnp.float32), any_E1, 1).astype(jnp.int32)
    slot = jax.lax.broadcasted_iota(jnp.int32, (E, experts), 1)
    place_EX = jnp.where(rank_E1 == slot, any_E1, 0.0)
    listed_1X = (place_EX * at_E1.astype(jnp.float32)).sum(axis=0, keepdims=True)
    count_11 = jnp.maximum(any_E1.sum(axis=0, keepdims=True), 1.0)
    return listed_1X.astype(jnp.int32), count_11.astype(jnp.int32)


def _exact(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """float32 product over an axis of a and the first of b."""
    highest = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(a, b, (((axis,), (0,)), ((), ())), precision=highest)
