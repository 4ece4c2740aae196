"""Where numbers stop being finite: the first parameter, layer or gradient, by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxseek.model import DeepSeek
from jaxseek.sharding import parameters
from jaxseek.train.batch import Batch
from jaxseek.train.objectives import Objective, Whole
from jaxseek.train.step import trained, with_values


def where_not_finite(objective: Objective, model: DeepSeek, batch: Batch) -> str:
    """Words for the first thing that is not finite: a weight, a layer's output, the loss, or gradients."""
    with model.on_mesh():
        bad = _bad_layers({p: v.get_value() for p, v in parameters(model).items()})
        if bad:
            return f"because these weights are not: {_few(bad)}"
        whole, batch = Whole.of(batch), jax.tree.map(lambda a: a[0], batch)
        if (where := _first_bad_layer(objective, model, batch)) is not None:
            return f"first after {where}"

        def loss(params):
            return objective(with_values(model, params), None, batch, whole, jnp.float32(0))[0]

        if objective.run.objective == "distill":
            return "in the loss or its gradient, all layers' outputs are finite"
        value, grads = jax.jit(jax.value_and_grad(loss))(trained(model))
        if not np.isfinite(value):
            return "in the loss itself, all layers' outputs are finite"
        bad = _bad_layers(grads)
        return f"in the gradients of {_few(bad)}" if bad else "though it is when computed again"


def _bad_layers(values: dict[str, jax.Array]) -> list[str]:
    """Parameters with a value that is not finite; of a stack, with its first such layer."""
    out = []
    for path, value in values.items():
        stacked = path.startswith("stacks.")
        axes = tuple(range(1 if stacked else 0, value.ndim))
        fine = np.atleast_1d(np.asarray(jnp.isfinite(value).all(axis=axes)))
        if not fine.all():
            out.append(f"{path}[{int(np.argmin(fine))}]" if stacked else path)
    return out


def _first_bad_layer(objective: Objective, model: DeepSeek, batch: Batch) -> str | None:
    ctx = objective.context(model, batch)
    x_BTD = model.embed(batch.tokens_BT, ctx)
    if not _finite(x_BTD):
        return "the embedding"
    number = 0
    for stack in model.stacks:
        for l in range(jax.tree.leaves(stack)[0].shape[0]):
            layer = jax.tree.map(lambda a, l=l: a[l], stack)
            x_BTD, _, _ = layer(x_BTD, None, 0, ctx)
            if not _finite(x_BTD):
                return f"layer {number}"
            number += 1
    return None if _finite(model.norm(x_BTD)) else "the final norm"


def _finite(x: jax.Array) -> bool:
    return bool(jnp.isfinite(x).all())


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
