"""The decoder layer, what all layers of a pass share, and running a stack of layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxseek.config.model import ModelConfig
from jaxseek.model.cache import Cache
from jaxseek.model.gqa import GQA
from jaxseek.model.mla import MLA
from jaxseek.model.mlp import MLP
from jaxseek.model.moe import MoE, Routing
from jaxseek.model.norm import RMSNorm
from jaxseek.model.rope import Rope
from jaxseek.model.weight import Quantized, quantization
from jaxseek.ops.attention import Mask
from jaxseek.ops.platform import platform
from jaxseek.sharding.parameters import Init
from jaxseek.sharding.rules import Rules


@dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares.

    `fresh`: keys are those of this pass, not of the cache. `slots_BT`: where tokens go in the cache, -1 for
    padding. `valid_BT`: false for padding, which the experts skip. `dtype`: of the activations. `remat`: what
    the backward pass computes again, a key of `REMAT`. `fp8`: matmuls on operands rounded to FP8.
    """

    rules: Rules
    rope: Rope
    mask: Mask
    valid_BT: jax.Array
    slots_BT: jax.Array
    fresh: bool
    dtype: Any
    remat: str = "none"
    fp8: bool = False


UNROLL_UP_TO = 8  # layers of a stack, on CPU

# What the backward pass finds in memory: everything; the results of matmuls without batch dimensions; what
# takes longest to make or to move for its size (attention's results, x after it, what experts sent back); or
# only each layer's input.
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
        """Of a stack of layers: how many."""
        return self.attn_norm.scale_D.get_value().shape[0]

    def join(self) -> Layer:
        """Itself, with its weights laid out as one CPU device decodes with them fastest: see Joined."""
        for _, module in list(nnx.iter_modules(self)):
            if isinstance(module, Quantized):
                module.widen()
            elif isinstance(module, MLA | MoE) or (
                isinstance(module, GQA | MLP) and not quantization(module)
            ):
                module.join()
        return self

    def __call__(
        self,
        x_BTD: jax.Array,
        cache: Cache | None,
        layer: jax.Array | int,
        ctx: Context,
        replay_BTK: jax.Array | None = None,
        stack: Layer | None = None,
    ) -> tuple[jax.Array, Cache | None, Routing | None]:
        """x after the block, the cache with this block's tokens in `layer`, and what the router did.

        `stack` is the one that this is a layer of, where kernels may read parameters in it.
        """
        with jax.named_scope("attention"):
            if stack is not None and fused.serves_attention(stack.attn, x_BTD, ctx):
                y_BTD, cache = fused.attention(stack.attn_norm, stack.attn, layer, x_BTD, cache, ctx)
            else:
                y_BTD, cache = self.attn(self.attn_norm(x_BTD), cache, layer, ctx)
        with jax.named_scope("mlp"):
            if stack is not None and replay_BTK is None and fused.serves_experts(stack.mlp, x_BTD, ctx):
                x_BTD, y_BTD, routing = fused.experts(stack.mlp_norm, stack.mlp, layer, x_BTD, y_BTD, ctx)
                return x_BTD + y_BTD, cache, routing
            x_BTD = checkpoint_name(x_BTD + y_BTD, "residual")
            if isinstance(self.mlp, MoE):
                whole = None if stack is None else (stack.mlp, layer)
                y_BTD, routing = self.mlp(self.mlp_norm(x_BTD), ctx, replay_BTK, whole)
            else:
                y_BTD, routing = self.mlp(self.mlp_norm(x_BTD), ctx), None
        return x_BTD + y_BTD, cache, routing


def run_stack(
    stack: Layer,
    x_BTD: jax.Array,
    cache: Cache | None,
    ctx: Context,
    replay_LBTK: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None, Routing | None]:
    """All layers of a stack (parameters have a leading layer axis), by a scan where there are several.

    The cache of the stack is carried and updated in place; routings come back stacked over layers. `replay`
    are experts to use, see MoE.
    """
    L = stack.depth
    # A scan slices, and copies, the parameters of a layer; kernels of a decode step read them in the stack.
    whole = platform() == "tpu" and not ctx.fresh

    @REMAT[ctx.remat]
    def body(carry, xs):
        (x_BTD, cache), (layer, l, replay_BTK) = carry, xs
        layer = jax.tree.map(lambda a: a[l], stack) if whole else layer
        x_BTD, cache, routing = layer(x_BTD, cache, l, ctx, replay_BTK, stack if whole else None)
        return (x_BTD, cache), routing

    if L == 1:
        layer = jax.tree.map(lambda a: a[0], stack)
        replay_BTK = None if replay_LBTK is None else replay_LBTK[0]
        (x_BTD, cache), routing = body((x_BTD, cache), (layer, 0, replay_BTK))
        return x_BTD, cache, jax.tree.map(lambda a: a[None], routing)

    # XLA:CPU copies what a scan slices and stacks; many layers would take long to compile
    unroll = L if platform() == "cpu" and L <= UNROLL_UP_TO else 1
    layers = (None if whole else stack, jax.numpy.arange(L), replay_LBTK)
    (x_BTD, cache), routing = jax.lax.scan(body, (x_BTD, cache), layers, unroll=unroll)
    return x_BTD, cache, routing
