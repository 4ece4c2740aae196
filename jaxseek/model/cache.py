"""Caches as frozen pytrees: they go into a forward pass and come out of it; nothing is mutated.

`LatentCache` holds one vector per token and layer for latent attention (DeepSeek-V2 paper, section 2.1),
`KVCache` the keys and values of grouped-query attention. Slot s of a row holds the row's position s, so a
left- or right-padded prompt leaves the same cache as the prompt alone.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxseek.config.model import ModelConfig
from jaxseek.ops.platform import platform
from jaxseek.sharding.rules import Rules


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LatentCache:
    """Normed latent and rotated shared key of every token (and the indexer's key for sparse attention)."""

    latent_LBSA: jax.Array
    index_LBSH: jax.Array | None = None

    @property
    def capacity(self) -> int:
        return self.latent_LBSA.shape[2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Rotated keys and values of every token."""

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array

    @property
    def capacity(self) -> int:
        return self.k_LBKSH.shape[3]


Cache = LatentCache | KVCache


def init_cache(
    cfg: ModelConfig, batch: int, capacity: int, dtype: Any, rules: Rules, layers: int | None = None
) -> Cache:
    """Zeros for `batch` rows of `capacity` tokens each, laid out by the rules of a phase."""
    L = cfg.num_hidden_layers if layers is None else layers

    def zeros(shape, *axes):
        return jnp.zeros(shape, dtype, out_sharding=rules.spec(*axes))

    if cfg.is_mla:
        A = cfg.kv_lora_rank + cfg.qk_rope_head_dim
        axes = (None, "cache_batch", "cache_length", None)
        index = zeros((L, batch, capacity, cfg.index_head_dim), *axes) if cfg.index_topk else None
        return LatentCache(zeros((L, batch, capacity, A), *axes), index)
    shape = (L, batch, cfg.num_key_value_heads, capacity, cfg.head_dim)
    axes = (None, "cache_batch", "kv_heads", "cache_length", None)
    return KVCache(zeros(shape, *axes), zeros(shape, *axes))


def write_slots(
    cache_LBSH: jax.Array, layer: jax.Array | int, slots_BT: jax.Array, new_BTH: jax.Array, rules: Rules
) -> jax.Array:
    """Write each row's tokens into its own slots of one layer; slots below 0 are dropped (padding).

    `cache_LBSH` may have further axes between B and S (kv heads), which `new` has after T.
    """
    inner = ("kv_heads",) if cache_LBSH.ndim == 5 else ()
    cache_spec = rules.spec(None, "cache_batch", *inner, "cache_length", None)
    new_BTH = rules.shard(new_BTH, "cache_batch", None, *inner, None)
    slots_BT = rules.shard(slots_BT, "cache_batch", None)
    length_axes = rules.axes("cache_length")

    def local(cache, layer, slots_BT, new):
        S = cache.shape[-2]
        start = S * jax.lax.axis_index(length_axes) if length_axes else 0
        at_BT = slots_BT - start
        at_BT = jnp.where((slots_BT >= 0) & (at_BT >= 0) & (at_BT < S), at_BT, S)
        if at_BT.size == 1 and platform() == "cpu":
            # XLA:CPU makes a read, a select and copies of the cache of a scatter of one token; not of two
            at_BT, new = jnp.pad(at_BT, ((0, 0), (0, 1)), constant_values=S), jnp.repeat(new, 2, axis=1)
        rows_B1 = jnp.arange(at_BT.shape[0])[:, None]
        if at_BT.shape[1] > 1 and platform() == "tpu":  # would transpose the whole cache for a prompt's rows
            one = jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
            where = (rows_B1, slice(None), at_BT) if inner else (rows_B1, at_BT)
            one = one.at[where].set(new.astype(cache.dtype), mode="drop")
            return jax.lax.dynamic_update_index_in_dim(cache, one, layer, 0)
        where = (layer, rows_B1, slice(None), at_BT) if inner else (layer, rows_B1, at_BT)
        if inner and platform() == "tpu":  # which would transpose the cache for a slice among indices
            where = (layer, rows_B1[..., None], jnp.arange(cache.shape[2]), at_BT[..., None])
        return cache.at[where].set(new.astype(cache.dtype), mode="drop")

    return jax.shard_map(
        local,
        in_specs=(
            cache_spec,
            P(),
            rules.spec("cache_batch", None),
            rules.spec("cache_batch", None, *inner, None),
        ),
        out_specs=cache_spec,
    )(cache_LBSH, jnp.asarray(layer), slots_BT, new_BTH)


def split_layers(cache: Cache) -> tuple[Cache, ...]:
    """One cache of a single layer each, for a forward pass whose layers are unrolled."""
    L = jax.tree.leaves(cache)[0].shape[0]
    return tuple(jax.tree.map(operator.itemgetter(slice(l, l + 1)), cache) for l in range(L))
