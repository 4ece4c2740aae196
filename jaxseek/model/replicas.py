"""Expert replicas: busy experts stand in several slots, and their tokens take the replicas in turn.

experts/balance.py decides which expert stands in which slot.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Slots(nnx.Variable):
    """int32 [3, S]: the expert in each slot, the index of this replica, and the number of its replicas."""


def table(expert_LS: np.ndarray) -> np.ndarray:
    """Values of `Slots` for a stack, [L, 3, S], from the expert in each slot [L, S]."""
    same_LSS = expert_LS[:, :, None] == expert_LS[:, None]
    earlier_LSS = same_LSS & np.tri(expert_LS.shape[1], k=-1, dtype=bool)
    return np.stack([expert_LS, earlier_LSS.sum(-1), same_LSS.sum(-1)], axis=1).astype(np.int32)


def replicas_of(
    ids_NK: jax.Array, slots_XS: jax.Array, experts: int, first: jax.Array | int = 0
) -> jax.Array:
    """Slots [N, K] for tokens' chosen experts; ids of E (none) become S.

    The n-th token of an expert takes its replica n + `first`, modulo their number. A token chooses an expert
    at most once.
    """
    S, (expert_11S, copy_11S, copies_11S) = slots_XS.shape[1], slots_XS[:, None, None]
    hot_NKE = ids_NK[:, :, None] == jnp.arange(experts)[None, None]
    chosen_NE = hot_NKE.any(axis=1).astype(jnp.int32)
    before_NE = jnp.cumsum(chosen_NE, axis=0) - chosen_NE
    turn_NK1 = jnp.where(hot_NKE, before_NE[:, None], 0).sum(axis=-1, keepdims=True) + first
    here_NKS = (expert_11S == ids_NK[:, :, None]) & (copy_11S == turn_NK1 % copies_11S)
    return jnp.where(here_NKS, jnp.arange(S)[None, None] - S, 0).sum(axis=-1) + S
