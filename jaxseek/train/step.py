"""One optimizer step as one compiled program: gradients of all microbatches, clipping, AdamW, router biases.

The state goes in, is donated, and comes out. A step whose loss or gradient is not finite changes nothing and
says so in its metrics.
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
from jaxseek.model.moe import MoE, RouterBias
from jaxseek.model.weight import LoraParam, is_adapted
from jaxseek.sharding.parameters import parameters
from jaxseek.train.batch import Batch
from jaxseek.train.objectives import Metrics, Objective, Whole
from jaxseek.train.schedule import learning_rate


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What training changes: the model, the optimizer's state for its trained parameters, steps done."""

    model: DeepSeek
    moments: Any
    step: jax.Array


def trained(model: DeepSeek) -> dict[str, jax.Array]:
    """The parameters that gradients change, by path: the adapters where there are any, else all."""
    values = parameters(model)
    kind = LoraParam if is_adapted(model) else nnx.Param
    return {p: v.get_value() for p, v in values.items() if isinstance(v, kind)}


def changed(model: DeepSeek) -> dict[str, jax.Array]:
    """What a step changes, by path: what is trained and, without adapters, the routers' biases."""
    biases = {p: v.get_value() for p, v in parameters(model).items() if isinstance(v, RouterBias)}
    return trained(model) | ({} if is_adapted(model) else biases)


def with_values(model: DeepSeek, values: dict[str, jax.Array]) -> DeepSeek:
    """The model with some parameters' values replaced."""
    flat = [values.get(p, v.get_value()) for p, v in parameters(model).items()]
    return jax.tree.unflatten(jax.tree.structure(model), flat)


def init_state(model: DeepSeek, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step. The model's arrays become the state's."""
    with model.on_mesh():
        return State(model, jax.jit(optimizer.init)(trained(model)), jnp.zeros((), jnp.int32))


# Else XLA:CPU copies the moments first: it does not see that a parameter can move before its moments change.
_ON_CPU = {"xla_cpu_copy_insertion_use_region_analysis": True}


@functools.lru_cache(maxsize=8)
def make_step(
    objective: Objective, optimizer: optax.GradientTransformation, platform: str = ""
) -> Callable[..., tuple[State, Metrics]]:
    """`step(state, teacher, batch, mtp weight, bias speed)`: the next state and the metrics of the batch.

    `platform` is that of the devices it is compiled for, by default this process's.
    """

    rate = learning_rate(objective.recipe)
    options = _ON_CPU if (platform or jax.default_backend()) == "cpu" else None

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
    def step(state: State, teacher: DeepSeek | None, batch: Batch, mtp: Any, bias_speed: Any):
        params = trained(state.model)

        def loss(params, part, whole):
            return objective(with_values(state.model, params), teacher, part, whole, mtp)

        grads, metrics = accumulate(jax.grad(loss, has_aux=True), params, batch)
        norm = optax.tree.norm(grads)
        clip = objective.recipe.optimizer.clip
        scale = jnp.minimum(1, clip / (norm + 1e-6)) if clip else 1.0
        grads = jax.tree.map(lambda g: g * scale, grads)
        updates: Any
        updates, moments = optimizer.update(grads, state.moments, params)
        moved = {p: (a + updates[p]).astype(a.dtype) for p, a in params.items()}
        if not is_adapted(state.model):
            moved |= moved_biases(state.model, metrics, bias_speed)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        after = State(with_values(state.model, moved), moments, state.step + 1)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        return after, metrics | {"grad_norm": norm, "finite": finite, "learning_rate": rate(state.step)}

    return step


@functools.lru_cache(maxsize=8)
def make_evaluation(objective: Objective) -> Callable[..., Metrics]:
    """`evaluate(model, teacher, batch, mtp weight)`: a batch's metrics; weight None leaves that loss out."""

    @jax.jit
    def evaluate(model: DeepSeek, teacher: DeepSeek | None, batch: Batch, mtp: Any) -> Metrics:
        def loss(model, part, whole):
            return (), objective(model, teacher, part, whole, mtp)[1]

        return accumulate(loss, model, batch)[1]

    return evaluate


def accumulate(f: Callable[..., tuple[Any, Metrics]], params: Any, batch: Batch) -> tuple[Any, Metrics]:
    """Sums of f(params, microbatch, whole) over the microbatches; one microbatch at a time is in memory.

    Of metrics that end in `_max` the largest.
    """
    whole, count, batch = Whole.of(batch), batch.count, dataclasses.replace(batch, count=None)

    @functools.partial(jax.jit, inline=True)  # so that it is traced once, for shapes and for the loop
    def part(i: Any, params: Any, batch: Batch, whole: Whole) -> Any:
        return f(params, jax.tree.map(lambda a: a[i], batch), whole)

    given = params, batch, whole
    if batch.tokens_BT.shape[0] == 1:
        return part(0, *given)

    def add(i: Any, total: Any) -> Any:
        (sums, metrics), (more, news) = total, part(jax.lax.convert_element_type(i, jnp.int32), *given)
        metrics = {
            name: (jnp.maximum if name.endswith("_max") else jnp.add)(value, news[name])
            for name, value in metrics.items()
        }
        return jax.tree.map(jnp.add, sums, more), metrics

    shapes = jax.eval_shape(part, jnp.int32(0), *given)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding.spec), shapes)
    return jax.lax.fori_loop(0, batch.tokens_BT.shape[0] if count is None else count, add, zeros)


def moved_biases(model: DeepSeek, metrics: Metrics, speed: jax.Array) -> dict[str, jax.Array]:
    """V3's load balancing without a loss: biases of overloaded experts fall by `speed`, others rise.

    By the load of the whole batch, after the step (DeepSeek-V3 paper, section 2.1.2).
    """
    moved, row, values = {}, 0, parameters(model)
    for path, layers in sparse_stacks(model):
        name = f"{path}.mlp.router_bias_E"
        load_LE = metrics["load"][row : row + layers].astype(jnp.float32)
        if load_LE.shape[0] and isinstance(values.get(name), RouterBias):
            error_LE = load_LE.mean(axis=1, keepdims=True) - load_LE
            moved[name] = values[name].get_value() + speed * jnp.sign(error_LE)
        row += layers
    return moved


def sparse_stacks(model: DeepSeek) -> list[tuple[str, int]]:
    """Paths and numbers of layers of the stacks with experts, in the order of their routings."""
    stacks = [(f"stacks.{i}", s) for i, s in enumerate(model.stacks)]
    stacks += [(f"mtp.{i}.stack", m.stack) for i, m in enumerate(model.mtp)]
    return [(path, s.depth) for path, s in stacks if isinstance(s.mlp, MoE)]
