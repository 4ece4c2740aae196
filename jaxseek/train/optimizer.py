"""Optimizers by name, for trees {dotted path: array}.

Their state is a tree of arrays that says all: the steps taken, from which the learning rate follows, and the
moments, which are sharded like their parameters. Clipping belongs to the step, which reports the norm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxseek.config.run import Program
from jaxseek.sharding.parameters import parameters
from jaxseek.train.schedule import learning_rate


def decays(model: nnx.Module) -> frozenset[str]:
    """Dotted paths of the parameters that decay: those drawn at random, not those that start constant."""
    return frozenset(p for p, param in parameters(model).items() if param.get_metadata("fill") is None)


def adamw(cfg: Program, decay: frozenset[str]) -> optax.GradientTransformation:
    """AdamW as the DeepSeek models are trained with (DeepSeek-V3 paper, section 4.2; Loshchilov and Hutter,
    arXiv:1711.05101): matrices decay, norms and biases do not."""
    given = cfg.optimizer

    def matrices(params: Any) -> dict[str, bool]:
        return {path: path in decay for path in params}

    return optax.chain(
        optax.scale_by_adam(given.b1, given.b2, given.eps),
        optax.add_decayed_weights(given.weight_decay, matrices),
        optax.scale_by_learning_rate(learning_rate(cfg)),
    )


OPTIMIZERS: dict[str, Callable[[Program, frozenset[str]], optax.GradientTransformation]] = {"adamw": adamw}


@functools.lru_cache(maxsize=8)
def make_optimizer(cfg: Program, decay: frozenset[str], name: str = "adamw") -> optax.GradientTransformation:
    """Make an optimizer of which the parameters in `decay` decay; `update` gives float32 changes.

    The moments are stored in `optimizer.moments` (both in bfloat16: DeepSeek-V3 paper, section 3.3.2); all is
    computed in float32.
    """
    optimizer, moments = OPTIMIZERS[name](cfg, decay), jnp.dtype(cfg.optimizer.moments)

    def init(params: optax.Params) -> optax.OptState:
        return _cast(optimizer.init(_cast(params, jnp.float32)), moments)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state, params = (_cast(tree, jnp.float32) for tree in (updates, state, params))
        with jax.numpy_dtype_promotion("standard"):  # optax raises b1 and b2 to an integer power
            updates, state = optimizer.update(updates, state, params)
        return updates, _cast(state, moments)

    return optax.GradientTransformation(init, update)


def _cast(tree: Any, dtype: Any) -> Any:
    """Cast floating-point leaves; counters stay."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)
