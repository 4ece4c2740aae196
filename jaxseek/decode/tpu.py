"""The decode step by Pallas kernels, on TPU: each reads its weights in place, in the stack of layers.

A scan over layers would slice, and copy, the parameters of each layer. The fused kernels (decode/fused.py)
compute latent attention and experts in the layouts that they take; the layer's own modules compute the rest,
with experts read in the stack.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxseek.decode import fused
from jaxseek.decode.forms import Stepped
from jaxseek.decode.plain import context, prepare, split
from jaxseek.model.cache import Cache
from jaxseek.model.context import Context
from jaxseek.model.deepseek import Caches, DeepSeek
from jaxseek.model.layer import Layer
from jaxseek.model.mlp import MLP
from jaxseek.model.moe import EXPERTS, MoE, Routing
from jaxseek.model.weight import stored
from jaxseek.ops.chosen_experts import ROWS
from jaxseek.ops.experts import Experts
from jaxseek.sharding.rules import Rules

__all__ = ["applies", "prepare", "split", "step"]


def applies(model: DeepSeek) -> str:
    """The reason why this form cannot serve a model; empty if it can."""
    found = model.mesh.devices.flat[0].platform
    return "" if found == "tpu" else f"it is for TPUs, and the model is on {found}"


def step(
    weights: DeepSeek, caches: Caches, token_B: jax.Array, position_B: jax.Array, live_B: jax.Array
) -> Stepped:
    """The same contract as `plain.step`."""
    token_B1, rules = token_B[:, None], weights.strategy.decode
    ctx = context(weights, caches, token_B1, position_B, live_B)
    with jax.named_scope("embed"):
        x_BTD = weights.embed(token_B1, ctx)
    new_caches, routing = [], []
    for stack, cache in zip(weights.stacks, caches):
        x_BTD, new, routed = _run_stack(stack, x_BTD, cache, ctx)
        new_caches.append(new)
        routing += [routed] if routed is not None else []
    logits_BV = weights.logits(weights.norm(x_BTD), rules)[:, 0]
    return Stepped(logits_BV, tuple(new_caches), tuple(routing))


def _run_stack(stack: Layer, x_BTD: jax.Array, cache: Cache, ctx: Context) -> Any:
    def body(carry: tuple[jax.Array, Cache], l: jax.Array | int) -> Any:
        x_BTD, cache, routing = _layer(stack, l, *carry, ctx)
        return (x_BTD, cache), routing

    if stack.depth == 1:
        (x_BTD, cache), routing = body((x_BTD, cache), 0)
        return x_BTD, cache, jax.tree.map(lambda a: a[None], routing)
    (x_BTD, cache), routing = jax.lax.scan(body, (x_BTD, cache), jnp.arange(stack.depth))
    return x_BTD, cache, routing


def _layer(
    stack: Layer, l: jax.Array | int, x_BTD: jax.Array, cache: Cache, ctx: Context
) -> tuple[jax.Array, Cache, Routing | None]:
    """Layer l of a stack; parameters that no kernel reads in place are sliced out of the stack."""
    layer: Layer = jax.tree.map(lambda a: a[l], stack)
    with jax.named_scope("attention"):
        if fused.serves_attention(stack.attn, x_BTD, ctx):
            y_BTD, cache = fused.attention(stack.attn_norm, stack.attn, l, x_BTD, cache, ctx)
        else:
            y_BTD, cache = layer.attn(layer.attn_norm(x_BTD), cache, l, ctx)
    with jax.named_scope("mlp"):
        if fused.serves_experts(stack.mlp, x_BTD, ctx):
            x_BTD, y_BTD, routing = fused.experts(stack.mlp_norm, stack.mlp, l, x_BTD, y_BTD, ctx)
            return x_BTD + y_BTD, cache, routing
        x_BTD += y_BTD
        normed_BTD = layer.mlp_norm(x_BTD)
        if isinstance(stack.mlp, MoE) and isinstance(layer.mlp, MoE):
            experts = _in_stack(stack.mlp, l, normed_BTD, ctx.rules)
            y_BTD, routing = layer.mlp(normed_BTD, ctx, None, experts)
        else:
            assert isinstance(layer.mlp, MLP)
            y_BTD, routing = layer.mlp(normed_BTD, ctx), None
    return x_BTD + y_BTD, cache, routing


def _in_stack(stack: MoE, l: jax.Array | int, x_BTD: jax.Array, rules: Rules) -> Experts | None:
    """The stack's experts for `chosen_experts_mlp`; None for an exchange, for too many rows on a shard, or
    if the experts rest in another layout."""
    expert_axes, mesh = rules.axes("expert"), jax.sharding.get_abstract_mesh()
    split = math.prod(mesh.shape[a] for a in rules.axes("batch") if a not in expert_axes)
    if rules.exchanges or len(x_BTD) // split > ROWS:
        return None
    found = stored(stack, EXPERTS, rules)
    return None if found is None else Experts(*found, layer=jnp.asarray(l))
