"""Diagnosis of a step that is not finite: the first parameter, layer or gradient with NaN or Inf, by name."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.layer import Layer
from jaxseek.sharding.parameters import parameters
from jaxseek.train.batch import Batch
from jaxseek.train.checkpoints import Checkpoints
from jaxseek.train.loss import Loss, StepInputs, Totals
from jaxseek.train.step import trained, with_values


def not_finite(
    step: int, loss: Loss, model: DeepSeek, batch: Any, inputs: StepInputs, checkpoints: Checkpoints
) -> str:
    """Message about a step (from 0) whose loss or gradient is not finite, and which changed nothing."""
    where = where_not_finite(loss, model, batch, inputs)
    checkpoints.wait()
    last = checkpoints.latest
    kept = f"step {last} is kept in {checkpoints.directory}" if last else "nothing was saved before it"
    return (
        f"step {step + 1}: loss or gradient is not finite, {where}. The weights are as before; {kept}. "
        "Lower optimizer.learning_rate, raise schedule.warmup, or look at the data of this step"
    )


def where_not_finite(loss: Loss, model: DeepSeek, batch: Batch, inputs: StepInputs) -> str:
    """Find the first thing that is not finite: a weight, a layer's output, the loss, or a gradient."""
    batch = dataclasses.replace(batch, count=None)
    with model.on_mesh():
        bad = _bad(model, {p: v.get_value() for p, v in parameters(model).items()})
        if bad:
            return f"because these weights are not: {_few(bad)}"
        totals = Totals.of(batch)
        parts = [jax.tree.map(lambda a, i=i: a[i], batch) for i in range(batch.tokens_BT.shape[0])]
        for part in parts:
            if (where := _first_bad_layer(loss, model, part)) is not None:
                return f"first after {where}"

        @jax.jit
        @jax.value_and_grad
        def computed(params, part, inputs):
            return loss(with_values(model, params), part, totals, inputs)[0]

        for part in parts:
            value, grads = computed(trained(model), part, inputs)
            if not np.isfinite(value):
                return "in the loss itself, all layers' outputs are finite"
            if bad := _bad(model, grads):
                return f"in the gradients of {_few(bad)}"
        return "though it is when computed again"


def _bad(model: DeepSeek, values: dict[str, jax.Array]) -> list[str]:
    """Name the values that are not finite, those of a stack with the number of the first such layer."""
    before = [0, *itertools.accumulate(s.depth for s in model.stacks)]

    @jax.jit
    def finite(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        axes = {path: tuple(range(path.startswith("stacks."), a.ndim)) for path, a in values.items()}
        return {path: jnp.isfinite(a).all(axis=axes[path]) for path, a in values.items()}

    found, out = jax.device_get(finite(values)), []
    for path in values:
        fine = np.atleast_1d(found[path])
        if fine.all():
            continue
        if path.startswith("stacks."):
            _, stack, path = path.split(".", 2)
            path = f"layer {before[int(stack)] + int(np.argmin(fine))}'s {path}"
        out.append(path)
    return out


def _first_bad_layer(loss: Loss, model: DeepSeek, batch: Batch) -> str | None:
    """Run the layers one by one, and name the first whose output is not finite."""

    @jax.jit
    def embed(model: DeepSeek, batch: Batch) -> jax.Array:
        return model.embed(batch.tokens_BT, loss.context(model, batch))

    @jax.jit
    def run(model: DeepSeek, batch: Batch, stack: Layer, l: jax.Array, x_BTD: jax.Array) -> jax.Array:
        layer = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, l, keepdims=False), stack)
        return layer(x_BTD, None, 0, loss.context(model, batch))[0]

    x_BTD = embed(model, batch)
    if not jnp.isfinite(x_BTD).all():
        return "the embedding"
    layers = [(stack, l) for stack in model.stacks for l in range(stack.depth)]
    for number, (stack, l) in enumerate(layers):
        x_BTD = run(model, batch, stack, jnp.int32(l), x_BTD)
        if not jnp.isfinite(x_BTD).all():
            return f"layer {number}"
    return None if jnp.isfinite(model.norm(x_BTD)).all() else "the final norm"


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
