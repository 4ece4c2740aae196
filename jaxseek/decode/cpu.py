"""The decode step for few rows on one CPU device: a module per layer, and matrices with outputs first.

XLA:CPU copies the weights of every layer that a scan slices, and its own products of a few rows take two to
three times as long as reading the matrix (ops/few_rows.py).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from jaxseek.decode.forms import Stepped
from jaxseek.decode.plain import hidden_states
from jaxseek.model.cache import split_layers
from jaxseek.model.deepseek import Caches, DeepSeek
from jaxseek.model.layer import Layer
from jaxseek.model.moe import EXPERTS
from jaxseek.model.weight import MATRICES, is_plain, widen
from jaxseek.ops import few_rows
from jaxseek.ops.few_rows import product_by_output
from jaxseek.sharding.parameters import jit_sharing
from jaxseek.sharding.rules import Rules

if TYPE_CHECKING:
    from jaxseek.model.context import Context

# Matrices of one product each; the others are used per head or per expert.
_PRODUCTS = (
    "q_DKGH", "k_DKH", "v_DKH", "o_KGHD", "q_DNH", "q_a_DQ", "q_b_QNH", "kv_a_DA", "o_NHD",
    "gate_DF", "up_DF", "down_FD",
)  # fmt: skip


def applies(model: DeepSeek) -> str:
    """The reason why this form cannot serve a model; empty if it can."""
    if (found := model.mesh.devices.flat[0].platform) != "cpu":
        return f"it is for the CPU, and the model is on {found}"
    return "" if model.mesh.size == 1 else f"it is for one device, and the mesh has {model.mesh.size}"


def prepare(model: DeepSeek) -> DeepSeek:
    """The model with every layer a stack of its own and outputs first; the layers' weights are copied."""
    with model.on_mesh():
        return unroll(model, True)


@jax.jit
def split(caches: Caches) -> Caches:
    """The caches that prefill wrote, one per layer."""
    return tuple(part for cache in caches for part in split_layers(cache))


def step(
    weights: DeepSeek, caches: Caches, token_B: jax.Array, position_B: jax.Array, live_B: jax.Array
) -> Stepped:
    """The same contract as `plain.step`."""
    out = hidden_states(weights, caches, token_B, position_B, live_B)
    head_VD = weights.embed_VD if weights.head_DV is None else weights.head_DV.by_output
    logits_BV = product_by_output(out.hidden_BTD[:, 0], head_VD[...])
    assert out.caches is not None
    return Stepped(logits_BV, out.caches, out.routing)


class ByOutput(nnx.Module):
    """A weight whose outputs come first, each with its inputs side by side; for one CPU device."""

    def __init__(self, param: Any, contract: int):
        w = param[...]
        self.outputs = w.shape[contract:]
        self.by_output = nnx.Param(w.reshape(math.prod(w.shape[:contract]), -1).T)

    def matmul(self, x: jax.Array, ctx: Context, *axes: str | None, contract: int = 1, weight_axes: Any = ()):
        """The same contract as `Weight.matmul`."""
        tokens = x.shape[: x.ndim - contract]
        y_MO = product_by_output(x.reshape(math.prod(tokens), -1), self.by_output[...])
        return y_MO.astype(x.dtype).reshape(*tokens, *self.outputs)


class ExpertsByOutput(nnx.Module):
    """One of the experts' matrices [E, I, O] with outputs first; for one CPU device."""

    def __init__(self, param: Any):
        self.w_OEI = nnx.Param(param[...].transpose(2, 0, 1))

    def operand(self, rules: Rules, dtype: Any) -> few_rows.ByOutput:
        """The same contract as `Weight.operand`; the numbers are in the dtype in which they are stored."""
        del rules, dtype
        return few_rows.ByOutput(self.w_OEI[...])


@jit_sharing
def unroll(model: DeepSeek, by_output: bool) -> DeepSeek:
    """The model with every layer a stack of its own, and matrices `by_output` on request; arrays outside the
    stacks are the same ones."""
    graph = nnx.clone(model, variables=False)

    def layer_of(stack: Layer, l: int) -> Layer:
        layer = jax.tree.map(lambda a: a[l], stack)
        if by_output:
            turn(layer)
        return jax.tree.map(lambda a: a[None], layer)

    def turn(layer: Layer) -> None:
        for module in (layer.attn, layer.mlp, getattr(layer.mlp, "shared", None)):
            for name in _PRODUCTS:
                if is_plain(param := getattr(module, name, None)):
                    setattr(module, name, ByOutput(param, len(MATRICES[name])))
        for name in EXPERTS:
            if is_plain(param := getattr(layer.mlp, name, None)):
                setattr(layer.mlp, name, ExpertsByOutput(param))
        widen(layer)

    if by_output and model.head_DV is not None:
        graph.head_DV = ByOutput(model.head_DV, 1)
    graph.stacks = nnx.List([layer_of(s, l) for s in model.stacks for l in range(s.depth)])
    return graph
