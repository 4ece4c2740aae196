"""Shared by the layers of one forward pass: rules, positions, mask, precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxseek.config.model import ModelConfig
from jaxseek.model.rope import Rope, rope_table
from jaxseek.ops.mask import Mask
from jaxseek.sharding.rules import Rules


@dataclass(frozen=True)
class Context:
    """Shared by every layer of a pass.

    `fresh`: keys are those of this pass, not the cache's. `slots_BT`: cache slots of the tokens, -1 for
    padding. `valid_BT`: false for padding, which the experts skip. `dtype`: of the activations. `remat`: what
    the backward pass recomputes, a key of `layer.REMAT`. `fp8`: matrix products on operands rounded to FP8.
    """

    rules: Rules
    rope: Rope
    mask: Mask
    valid_BT: jax.Array
    slots_BT: jax.Array
    fresh: bool
    dtype: Any
    remat: str = "none"
    fp8: bool = False


def make_context(
    cfg: ModelConfig,
    rules: Rules,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None,
    segment_ids_BT: jax.Array | None,
    prefix_ids_BT: jax.Array | None,
    cache_slots: int | None,
    dtype: Any,
    remat: str,
    fp8: bool,
) -> Context:
    """The context of a pass over tokens; see `DeepSeek.context` for the arguments.

    With `cache_slots`, queries attend to a cache of so many slots per row.
    """
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones(tokens_BT.shape, jnp.int32)
    if positions_BT is None:
        positions_BT = positions_in_segments(segment_ids_BT)
    valid_BT = segment_ids_BT > 0
    slots_BT = jnp.where(valid_BT, positions_BT, -1)
    if cache_slots is None:
        kv_pos, kv_seg = (rules.shard(a, "batch", None) for a in (positions_BT, segment_ids_BT))
    else:
        kv_pos, kv_seg = rules.shard(jnp.arange(cache_slots)[None], None, "cache_length"), None
    pos_BT, seg_BT, valid_BT = (
        rules.shard(a, "batch", "length") for a in (positions_BT, segment_ids_BT, valid_BT)
    )
    prefix_BT = None if prefix_ids_BT is None else rules.shard(prefix_ids_BT, "batch", "length")
    mask = Mask(pos_BT, seg_BT, kv_pos, kv_seg, q_prefix_BT=prefix_BT)
    rope, fresh = rope_table(cfg, pos_BT), cache_slots is None
    return Context(rules, rope, mask, valid_BT, slots_BT, fresh, dtype, remat, fp8)


def positions_in_segments(segment_ids_BT: jax.Array) -> jax.Array:
    """Each token's index within its run of equal segment ids, int32 [B, T]."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    starts_BT = segment_ids_BT != jnp.pad(segment_ids_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return index_T[None] - jax.lax.cummax(jnp.where(starts_BT, index_T[None], 0), axis=1)
