"""The cache behind the engine: contiguous slots, one row of every layer's cache for each sequence.

Rows and lengths move here alone, so that pages, or caches of another form, can stand in their place.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxseek.model.deepseek import Caches
from jaxseek.sharding.rules import Rules

LENGTH_STEP = 16  # a cache's capacity is a multiple of it
# Few capacities serve all lengths: those of slots cost every decode step, those of prompts that are read only
# the chunks after the first.
SLOTS = tuple(n << k for k in range(12) for n in (256, 384))
PROMPTS = (256, 1024, 2048, *(n << k for k in range(9) for n in (4096, 6144)))


def bucket(need: int, context: int, step: int, sizes: Sequence[int]) -> int:
    """The least of these sizes that holds `need` tokens, no more than the context takes, and a multiple of
    `step`."""
    size = next((size for size in sizes if size >= need), need)
    size = max(need, min(size, context))
    return size + -size % step


def _axes(cache: jax.Array, length: str | None) -> tuple[str | None, ...]:
    heads = ("kv_heads",) if cache.ndim == 5 else ()
    return (None, "cache_batch", *heads, length, None)


@functools.partial(jax.jit, static_argnames="rules")
def moved(caches: Caches, rules: Rules) -> Caches:
    """Caches as another phase lays them out."""
    return jax.tree.map(lambda a: rules.shard(a, *_axes(a, "cache_length")), caches)


@functools.partial(jax.jit, static_argnames=("capacity", "rules"))
def resized(caches: Caches, capacity: int, rules: Rules) -> Caches:
    """Caches of another capacity; what stands in the slots that both have stays."""

    def one(a: jax.Array) -> jax.Array:
        a, more = rules.shard(a, *_axes(a, None)), capacity - a.shape[-2]
        a = a[..., :capacity, :] if more < 0 else jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, more), (0, 0)])
        return rules.shard(a, *_axes(a, "cache_length"))

    return jax.tree.map(one, caches)


@functools.partial(jax.jit, static_argnames="rules", donate_argnames="caches")
def seated(caches: Caches, read: Caches, row_B: Any, rules: Rules) -> Caches:
    """Each slot b with a row (0 or more, within its part of the mesh) gets that row of `read`."""

    def local(row_B: jax.Array, read: Caches, caches: Caches) -> Caches:
        slot_B = jnp.argsort(row_B < 0)  # those to fill come first

        def fill(i: jax.Array, caches: Caches) -> Caches:
            def put(cache: jax.Array, fresh: jax.Array) -> jax.Array:
                fresh = fresh[..., : cache.shape[-2], :]
                one = jax.lax.dynamic_slice_in_dim(fresh, row_B[slot_B[i]], 1, axis=1)
                at = [jnp.zeros((), slot_B.dtype)] * cache.ndim
                return jax.lax.dynamic_update_slice(cache, one, [at[0], slot_B[i], *at[2:]])

            return jax.tree.map(put, caches, read)

        return jax.lax.fori_loop(0, (row_B >= 0).sum(), fill, caches)

    def specs(caches: Caches) -> Any:
        return jax.tree.map(lambda a: rules.spec(*_axes(a, "cache_length")), caches)

    row_B = rules.shard(jnp.asarray(row_B), "cache_batch")
    return jax.shard_map(
        local,
        in_specs=(rules.spec("cache_batch"), specs(read), specs(caches)),
        out_specs=specs(caches),
    )(row_B, read, caches)


def capacity_of(caches: Caches) -> int:
    """Tokens that a row holds."""
    return jax.tree.leaves(caches)[0].shape[-2]
