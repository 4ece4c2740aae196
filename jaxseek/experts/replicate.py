"""Place a model's experts into the slots of its strategy, replicating busy ones."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxseek.config.model import ConfigError, ModelConfig
from jaxseek.experts.balance import neighbours, read
from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.moe import EXPERTS, MoE
from jaxseek.model.replicas import Slots, table
from jaxseek.model.weight import arrays_of
from jaxseek.sharding.strategy import Strategy


def place_experts(model: DeepSeek) -> None:
    """Gather the experts of all stacks into the strategy's slots, in place; do nothing if it has none.

    The strategy's `placement` assigns experts to slots; the default is `balance.neighbours`. The model's
    results do not change, but it is for serving only: training and saving refuse it. Raises ConfigError for a
    placement that does not fit the model.
    """
    if not model.strategy.has_slots:
        return
    expert_LS, done = experts_of_slots(model.cfg, model.strategy), 0
    embed_VD = model.embed_VD.get_value()
    abstract, everywhere = (
        isinstance(embed_VD, jax.ShapeDtypeStruct),
        NamedSharding(embed_VD.sharding.mesh, P()),
    )
    for stack in model.stacks:
        if not isinstance(stack.mlp, MoE):
            continue
        stack_LS = expert_LS[done : (done := done + stack.depth)]
        with nullcontext() if abstract else model.on_mesh():
            for name in EXPERTS:
                spread(getattr(stack.mlp, name), stack_LS)
        values = table(stack_LS)
        if abstract:
            slots = jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=everywhere)
        else:
            slots = jax.make_array_from_callback(values.shape, everywhere, lambda at, v=values: v[at])
        stack.mlp.slots = Slots(slots, axes=(None, None), fill=None)


def experts_of_slots(cfg: ModelConfig, strategy: Strategy) -> np.ndarray:
    """Return the expert of every slot, [sparse layers, S]. Raises ConfigError as `place_experts` does."""
    layers = sum(cfg.is_moe_layer(l) for l in range(cfg.num_hidden_layers))
    slots = cfg.n_routed_experts + strategy.redundant_experts
    if strategy.placement is not None:
        return read(strategy.placement, layers, cfg.n_routed_experts, slots)
    devices = strategy.parts(strategy.decode, "expert")
    return neighbours(layers, cfg.n_routed_experts, slots, devices).expert_LS


def raise_slots(model: DeepSeek) -> None:
    """Raise ValueError if `place_experts` has changed the model: checkpoints cannot store slots."""
    if any(isinstance(stack.mlp, MoE) and stack.mlp.slots is not None for stack in model.stacks):
        raise ValueError(
            "the experts of this model are in slots, for serving: to save it, load it with a strategy "
            "without redundant_experts and placement"
        )


def refuse_slots(strategy: Strategy, doing: str) -> None:
    """Raise ConfigError if a strategy has slots, which `doing` does not support."""
    if strategy.has_slots:
        raise ConfigError(
            f"redundant_experts and placement in [weights] are for serving; {doing} has each expert once: "
            "use a strategy without them"
        )


def spread(weight: Any, expert_LS: np.ndarray) -> None:
    """Replace, in place, a stack's matrices of the experts [L, E, ...] by those of the slots [L, S, ...].

    Both are split alike over the mesh. The devices' matrices travel round a ring, layer by layer, which takes
    memory for three layers. Abstract arrays change their shapes.
    """
    for values in arrays_of(weight):
        given = values.get_value()
        if isinstance(given, jax.ShapeDtypeStruct):
            shape = (given.shape[0], expert_LS.shape[1], *given.shape[2:])
            values.set_value(jax.ShapeDtypeStruct(shape, given.dtype, sharding=given.sharding))
        else:
            values.set_value(_gathered(given, expert_LS.astype(np.int32)))


@jax.jit
def _gathered(w_LEXX: jax.Array, expert_LS: jax.Array) -> jax.Array:
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
