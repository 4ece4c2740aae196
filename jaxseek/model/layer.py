"""The decoder layer, and a stack of layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxseek.config.model import ModelConfig
from jaxseek.model.cache import Cache
from jaxseek.model.context import Context
from jaxseek.model.gqa import GQA
from jaxseek.model.mla import MLA
from jaxseek.model.mlp import MLP
from jaxseek.model.moe import MoE, Routing
from jaxseek.model.norm import RMSNorm
from jaxseek.ops.scan import scan_layers
from jaxseek.sharding.parameters import Init

# What the backward pass finds in memory: everything; the results of matmuls without batch dimensions; what
# takes longest to compute or to exchange for its size (attention's results, the residual after it, what
# experts sent back); or each layer's input alone.
REMAT: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "none": lambda f: f,
    "dots": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "costly": functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.save_only_these_names("attended", "residual", "exchanged"),
    ),
    "full": jax.checkpoint,
}


class Layer(nnx.Module):
    """A pre-norm block: attention, then a dense or a mixture-of-experts feed-forward."""

    def __init__(self, cfg: ModelConfig, sparse: bool, init: Init):
        D, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.attn_norm = RMSNorm(D, eps, init)
        self.attn: Any = MLA(cfg, init) if cfg.is_mla else GQA(cfg, init)
        self.mlp_norm = RMSNorm(D, eps, init)
        self.mlp = MoE(cfg, init) if sparse else MLP(D, cfg.intermediate_size, cfg.mlp_bias, init)

    @property
    def depth(self) -> int:
        """Number of layers in this stack."""
        return self.attn_norm.scale_D.get_value().shape[0]

    def __call__(
        self,
        x_BTD: jax.Array,
        cache: Cache | None,
        layer: jax.Array | int,
        ctx: Context,
        replay_BTK: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None, Routing | None]:
        """x after the block, the cache with this block's tokens in `layer`, and the routing."""
        with jax.named_scope("attention"):
            y_BTD, cache = self.attn(self.attn_norm(x_BTD), cache, layer, ctx)
        with jax.named_scope("mlp"):
            x_BTD = checkpoint_name(x_BTD + y_BTD, "residual")
            y_BTD, routing = self._feed_forward(self.mlp_norm(x_BTD), ctx, replay_BTK)
        return x_BTD + y_BTD, cache, routing

    def _feed_forward(self, x_BTD: jax.Array, ctx: Context, replay_BTK: jax.Array | None) -> Any:
        if isinstance(self.mlp, MoE):
            return self.mlp(x_BTD, ctx, replay_BTK)
        return self.mlp(x_BTD, ctx), None


def run_stack(
    stack: Layer,
    x_BTD: jax.Array,
    cache: Cache | None,
    ctx: Context,
    replay_LBTK: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None, Routing | None]:
    """Run all layers of a stack (parameters have a leading layer axis); several by a scan.

    The cache of the stack is carried and updated in place; routings come back stacked over layers. `replay`
    are experts to use, see MoE.
    """

    @REMAT[ctx.remat]
    def body(carry, xs):
        (x_BTD, cache), (layer, l, replay_BTK) = carry, xs
        x_BTD, cache, routing = layer(x_BTD, cache, l, ctx, replay_BTK)
        return (x_BTD, cache), routing

    if stack.depth == 1:
        first = jax.tree.map(lambda a: a[0], (stack, replay_LBTK))
        (x_BTD, cache), routing = body((x_BTD, cache), (first[0], 0, first[1]))
        return x_BTD, cache, jax.tree.map(lambda a: a[None], routing)
    layers = (stack, jnp.arange(stack.depth), replay_LBTK)
    (x_BTD, cache), routing = scan_layers(body, (x_BTD, cache), layers, stack.depth)
    return x_BTD, cache, routing
