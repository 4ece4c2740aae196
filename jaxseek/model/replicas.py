"""Slots: places for experts on the devices, of which busy experts have several.

Tokens of an expert take its copies in turn. Which expert lies where is jaxseek/experts/balance.py's business.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxseek.model.weight import Quantized


class Slots(nnx.Variable):
    """int32 [3, S]: of every slot its expert, which of that expert's copies it is, and how many there are."""


def table(expert_LS: np.ndarray) -> np.ndarray:
    """The values of `Slots` for a stack, [L, 3, S], from the expert in every slot."""
    same_LSS = expert_LS[:, :, None] == expert_LS[:, None]
    earlier_LSS = same_LSS & np.tri(expert_LS.shape[1], k=-1, dtype=bool)
    return np.stack([expert_LS, earlier_LSS.sum(-1), same_LSS.sum(-1)], axis=1).astype(np.int32)


def slots_of(ids_NK: jax.Array, slots_XS: jax.Array, experts: int, first: jax.Array | int = 0) -> jax.Array:
    """The slots [N, K] that tokens take for the experts that they chose; ids of E get S: none.

    The n-th token of an expert takes its copy n + `first`, counted round. A token chooses an expert once.
    """
    S, (expert_11S, copy_11S, copies_11S) = slots_XS.shape[1], slots_XS[:, None, None]
    hot_NKE = ids_NK[:, :, None] == jnp.arange(experts)[None, None]
    chosen_NE = hot_NKE.any(axis=1).astype(jnp.int32)
    before_NE = jnp.cumsum(chosen_NE, axis=0) - chosen_NE
    turn_NK1 = jnp.where(hot_NKE, before_NE[:, None], 0).sum(axis=-1, keepdims=True) + first
    here_NKS = (expert_11S == ids_NK[:, :, None]) & (copy_11S == turn_NK1 % copies_11S)
    return jnp.where(here_NKS, jnp.arange(S)[None, None] - S, 0).sum(axis=-1) + S


def bring(param: nnx.Variable | Quantized, expert_LS: np.ndarray) -> None:
    """Make a stack's matrices of all experts [L, E, ...] those of the slots [L, S, ...], in place.

    Both are split alike over the mesh, and a device's own go round: it has three layers' worth of them
    besides. Arrays that are only shapes change their shapes.
    """
    for values in (param.value, param.scale) if isinstance(param, Quantized) else (param,):
        given = values.get_value()
        if isinstance(given, jax.ShapeDtypeStruct):
            shape = (given.shape[0], expert_LS.shape[1], *given.shape[2:])
            values.set_value(jax.ShapeDtypeStruct(shape, given.dtype, sharding=given.sharding))
        else:
            values.set_value(_brought(given, expert_LS.astype(np.int32)))


@jax.jit
def _brought(w_LEXX: jax.Array, expert_LS: jax.Array) -> jax.Array:
    spec = jax.typeof(w_LEXX).sharding.spec
    axes = (spec[1],) if isinstance(spec[1], str) else spec[1] or ()

    def local(w_LEXX, expert_LS):
        E, P = w_LEXX.shape[1], jax.lax.axis_size(axes) if axes else 1
        S, me = expert_LS.shape[1] // P, jax.lax.axis_index(axes) if axes else 0

        def layer(given):
            w_EXX, expert_S = given
            own_S = jax.lax.dynamic_slice_in_dim(expert_S, me * S, S)

            def turn(p, carry):
                mine_SXX, theirs_EXX = carry
                at_S = own_S - (me - p) % P * E
                here_SXX = ((at_S >= 0) & (at_S < E)).reshape(-1, *(1,) * (w_EXX.ndim - 1))
                mine_SXX = jnp.where(here_SXX, theirs_EXX[jnp.clip(at_S, 0, E - 1)], mine_SXX)
                if axes:
                    round_ = [(i, (i + 1) % P) for i in range(P)]
                    theirs_EXX = jax.lax.ppermute(theirs_EXX, axes, round_)
                return mine_SXX, theirs_EXX

            blank_SXX = jnp.zeros((S, *w_EXX.shape[1:]), w_EXX.dtype)
            return jax.lax.fori_loop(0, P, turn, (blank_SXX, w_EXX))[0]

        return jax.lax.map(layer, (w_LEXX, expert_LS))

    return jax.shard_map(
        local, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=spec, check_vma=False
    )(w_LEXX, expert_LS)
