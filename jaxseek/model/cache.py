"""Caches as frozen pytrees: they go into a forward pass and come out of it; nothing is mutated.

`LatentCache` holds one vector per token and layer for latent attention (DeepSeek-V2 paper, section 2.1),
`KVCache` the keys and values of grouped-query attention. Slot s of a row holds the row's position s, so a
left- or right-padded prompt leaves the same cache as the prompt alone.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import jax


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


def split_layers(cache: Cache) -> tuple[Cache, ...]:
    """Split a stack's cache into one per layer, for a model in which every layer is a stack of its own."""
    L = jax.tree.leaves(cache)[0].shape[0]
    return tuple(jax.tree.map(operator.itemgetter(slice(l, l + 1)), cache) for l in range(L))
