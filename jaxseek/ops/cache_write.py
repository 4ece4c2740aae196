"""Writing new tokens into the slots of a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxseek.ops.platform import platform
from jaxseek.sharding.rules import Rules


def write_slots(
    cache: jax.Array, layer: jax.Array | int, slots_BT: jax.Array, new: jax.Array, rules: Rules
) -> jax.Array:
    """Write each row's tokens into its own slots of one layer; slots below 0 are dropped (padding).

    `cache` is [L, B, S, H] and `new` [B, T, H], or with kv heads [L, B, K, S, H] and [B, T, K, H].
    """
    inner = ("kv_heads",) if cache.ndim == 5 else ()
    cache_spec = rules.spec(None, "cache_batch", *inner, "cache_length", None)
    new = rules.shard(new, "cache_batch", None, *inner, None)
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
    )(cache, jnp.asarray(layer), slots_BT, new)
