"""One optimizer step as one compiled program: gradients of all microbatches, clipping, update, router biases.

The state goes in, is donated, and comes out. A step whose loss or gradient is not finite changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.moe import RouterBias
from jaxseek.model.weight import LoraParam, is_adapted
from jaxseek.sharding.parameters import parameters
from jaxseek.train.batch import Batch
from jaxseek.train.loss import Aux, Loss, StepInputs, Totals
from jaxseek.train.schedule import learning_rate


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The model, the optimizer's state for its trained parameters, and the number of updates."""

    model: DeepSeek
    moments: Any
    step: jax.Array


def trained(model: DeepSeek) -> dict[str, jax.Array]:
    """Parameters that gradients change, by path: the adapters of a model that has any, else all."""
    values = parameters(model)
    kind = LoraParam if is_adapted(model) else nnx.Param
    return {p: v.get_value() for p, v in values.items() if isinstance(v, kind)}


def changed(model: DeepSeek) -> dict[str, jax.Array]:
    """Parameters that a step changes, by path: the trained ones and, without adapters, router biases."""
    biases = {p: v.get_value() for p, v in parameters(model).items() if isinstance(v, RouterBias)}
    return trained(model) | ({} if is_adapted(model) else biases)


def with_values(model: DeepSeek, values: dict[str, jax.Array]) -> DeepSeek:
    """Replace the values of some parameters; the others are shared."""
    flat = [values.get(p, v.get_value()) for p, v in parameters(model).items()]
    return jax.tree.unflatten(jax.tree.structure(model), flat)


def init_state(model: DeepSeek, optimizer: optax.GradientTransformation) -> State:
    """Make the state before the first step. The model's arrays become the state's."""
    with model.on_mesh():
        return State(model, jax.jit(optimizer.init)(trained(model)), jnp.zeros((), jnp.int32))


# Without it XLA:CPU copies the moments, because it does not see that a parameter can move before they change.
_ON_CPU = {"xla_cpu_copy_insertion_use_region_analysis": True}


@functools.lru_cache(maxsize=8)
def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, platform: str = ""
) -> Callable[..., tuple[State, Aux]]:
    """Compile `step(state, batch, inputs)`, which gives the next state and the batch's Aux.

    `platform` is that of the devices it is compiled for, by default this process's.
    """

    rate = learning_rate(loss.program)
    options = _ON_CPU if (platform or jax.default_backend()) == "cpu" else None

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
    def step(state: State, batch: Batch, inputs: StepInputs):
        params = trained(state.model)

        def of_microbatch(params, part, totals):
            return loss(with_values(state.model, params), part, totals, inputs)

        grads, aux = accumulate(jax.grad(of_microbatch, has_aux=True), params, batch)
        norm = optax.tree.norm(grads)
        clip = loss.program.optimizer.clip
        scale = jnp.minimum(1, clip / (norm + 1e-6)) if clip else 1.0
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates: Any
        updates, moments = optimizer.update(grads, state.moments, params)
        moved = {p: (a + updates[p]).astype(a.dtype) for p, a in params.items()}
        moved |= loss.after_update(state.model, aux, inputs)
        finite = jnp.isfinite(aux.metrics["loss"]) & jnp.isfinite(norm)
        after = State(with_values(state.model, moved), moments, state.step + 1)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        return after, aux.with_metrics(grad_norm=norm, learning_rate=rate(state.step))

    return step


@functools.partial(jax.jit, static_argnums=0)
def evaluate_batch(loss: Loss, model: DeepSeek, batch: Batch, inputs: StepInputs) -> Aux:
    """Compute a batch's Aux without gradients."""
    return accumulate(lambda model, part, totals: ((), loss(model, part, totals, inputs)[1]), model, batch)[1]


def accumulate(f: Callable[..., tuple[Any, Aux]], params: Any, batch: Batch) -> tuple[Any, Aux]:
    """Sum f(params, microbatch, totals) over the microbatches, of which one at a time is in memory."""
    totals, count, batch = Totals.of(batch), batch.count, dataclasses.replace(batch, count=None)

    @functools.partial(jax.jit, inline=True)  # so that it is traced once, for shapes and for the loop
    def part(i: Any, params: Any, batch: Batch, totals: Totals) -> Any:
        return f(params, jax.tree.map(lambda a: a[i], batch), totals)

    given = params, batch, totals
    if batch.tokens_BT.shape[0] == 1:
        return part(0, *given)

    def add(i: Any, sums: Any) -> Any:
        (total, aux), (more, new) = sums, part(jax.lax.convert_element_type(i, jnp.int32), *given)
        return jax.tree.map(jnp.add, total, more), aux + new

    shapes = jax.eval_shape(part, jnp.int32(0), *given)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding.spec), shapes)
    return jax.lax.fori_loop(0, batch.tokens_BT.shape[0] if count is None else count, add, zeros)
