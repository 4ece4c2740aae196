"""Multi-token prediction: one more layer predicts the token after the next (DeepSeek-V3 paper, section 2.2).

Released weights concatenate [embedding; hidden], the opposite order of the paper's eq. 21. The embedding and
the output head are the main model's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxseek.config.model import ModelConfig
from jaxseek.model.cache import Cache
from jaxseek.model.context import Context
from jaxseek.model.layer import Layer, run_stack
from jaxseek.model.moe import Routing
from jaxseek.model.norm import RMSNorm
from jaxseek.sharding.parameters import Init


class MTP(nnx.Module):
    """norm(layer(W [enorm(emb t_{i+1}); hnorm(h_i)])), from which the head predicts t_{i+2}."""

    def __init__(self, cfg: ModelConfig, depth: int, init: Init):
        D, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.embed_norm = RMSNorm(D, eps, init)
        self.hidden_norm = RMSNorm(D, eps, init)
        self.proj_2DD = init((2, D, D), (None, "embed", None))  # [embedding, hidden] x in x out
        sparse = cfg.is_moe_layer(cfg.num_hidden_layers + depth)
        self.stack = jax.tree.map(lambda a: a[None], Layer(cfg, sparse, init))
        self.norm = RMSNorm(D, eps, init)

    def __call__(
        self, hidden_BTD: jax.Array, next_BTD: jax.Array, cache: Cache | None, ctx: Context
    ) -> tuple[jax.Array, Cache | None, Routing | None]:
        """Hidden states for t_{i+2}, from the main model's after its final norm and t_{i+1}'s embedding."""
        pair_2BTD = jnp.stack([self.embed_norm(next_BTD), self.hidden_norm(hidden_BTD)])
        weight_2DD = ctx.rules.use(self.proj_2DD, hidden_BTD.dtype)
        out = ctx.rules.spec("batch", "length", None)
        x_BTD = jnp.einsum("iBTD,iDE->BTE", pair_2BTD, weight_2DD, out_sharding=out)
        x_BTD, cache, routing = run_stack(self.stack, x_BTD, cache, ctx)
        return self.norm(x_BTD), cache, routing
