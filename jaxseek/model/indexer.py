"""DeepSeek sparse attention: the indexer that chooses keys (V3.2-Exp report, section 2.1)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxseek.config.model import ModelConfig
from jaxseek.model.cache import LatentCache
from jaxseek.model.context import Context
from jaxseek.model.rope import rotate
from jaxseek.ops.cache_write import write_slots
from jaxseek.ops.mask import Mask
from jaxseek.sharding.parameters import Init
from jaxseek.sharding.rules import Rules


class Indexer(nnx.Module):
    """DeepSeek sparse attention: a scorer keeps `index_topk` keys per query (V3.2-Exp report, section 2.1).

    Its rotary embedding is half-split, on the first R of the index head, unlike the attention it serves.
    """

    def __init__(self, cfg: ModelConfig, init: Init):
        self.cfg = cfg
        D, Q, N, H = cfg.hidden_size, cfg.q_lora_rank or 0, cfg.index_n_heads, cfg.index_head_dim
        self.q_b_QNH = init((Q, N, H), ("latent", None, None))
        self.k_DH = init((D, H), ("embed", None))
        self.k_norm_H = init((H,), (None,), 1.0, jnp.float32)
        self.k_norm_bias_H = init((H,), (None,), 0.0, jnp.float32)
        self.weights_DN = init((D, N), ("embed", None))

    def __call__(self, x_BTD, cq_BTQ, cache, layer, ctx: Context) -> tuple[Mask, LatentCache | None]:
        """The mask with the chosen keys, and the cache with this block's index keys."""
        R, rules, dtype = self.cfg.qk_rope_head_dim, ctx.rules, x_BTD.dtype
        narrow, headed = rules.spec("batch", "length", None), rules.spec("batch", "length", None, None)
        q_BTNH = jnp.einsum("BTQ,QNH->BTNH", cq_BTQ, self.q_b_QNH.dense(rules, dtype), out_sharding=headed)
        k_BTH = jnp.einsum("BTD,DH->BTH", x_BTD, self.k_DH.dense(rules, dtype), out_sharding=narrow)
        k_BTH = self._layer_norm(k_BTH)
        q_BTNH, k_BTH = (
            jnp.concatenate([rotate(a[..., :R], ctx.rope, False), a[..., R:]], axis=-1)
            for a in (q_BTNH, k_BTH)
        )
        gain = q_BTNH.shape[2] ** -0.5 * q_BTNH.shape[3] ** -0.5
        w_DN = rules.use(self.weights_DN, jnp.float32)
        w_BTN = gain * jnp.einsum("BTD,DN->BTN", x_BTD.astype(jnp.float32), w_DN, out_sharding=narrow)
        key_axis, mask = None, ctx.mask
        if cache is not None:
            index_LBSH = write_slots(cache.index_LBSH, layer, ctx.slots_BT, k_BTH, rules)
            cache = dataclasses.replace(cache, index_LBSH=index_LBSH)
        if ctx.fresh:
            k_BSH = rules.shard(k_BTH, "batch", None, None)
        else:
            assert cache is not None, "queries without fresh keys need a cache"
            assert cache.index_LBSH is not None
            k_BSH, key_axis, rules = cache.index_LBSH[layer].astype(dtype), "cache_length", rules.for_cache()
            q_BTNH, w_BTN = (rules.shard(a, "batch", *(None,) * (a.ndim - 1)) for a in (q_BTNH, w_BTN))
            mask = mask.laid_out(rules)
        scores_BTNS = jax.nn.relu(
            jnp.einsum(
                "BTNH,BSH->BTNS",
                q_BTNH,
                k_BSH,
                preferred_element_type=jnp.float32,
                out_sharding=rules.spec("batch", "length", None, key_axis),
            )
        )
        scores_BTS = jnp.einsum(
            "BTN,BTNS->BTS", w_BTN, scores_BTNS, out_sharding=rules.spec("batch", "length", key_axis)
        )
        chosen_BTS = self._choose(scores_BTS, mask, key_axis, rules)
        return dataclasses.replace(mask, chosen_BTS=chosen_BTS), cache

    def _layer_norm(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = (x32 - x32.mean(-1, keepdims=True)) * jax.lax.rsqrt(x32.var(-1, keepdims=True) + 1e-6)
        scale_11H, bias_11H = (p[...][None, None] for p in (self.k_norm_H, self.k_norm_bias_H))
        return (x32 * scale_11H + bias_11H).astype(x.dtype)

    def _choose(
        self, scores_BTS: jax.Array, mask: Mask, key_axis: str | None, rules: Rules
    ) -> jax.Array | None:
        """Booleans [B, T, S] for the best `index_topk` visible keys; None if all are kept."""
        S, k = scores_BTS.shape[-1], self.cfg.index_topk
        if k >= S:
            return None
        scores_BTS = rules.shard(jnp.where(mask.dense(), scores_BTS, -jnp.inf), "batch", "length", None)
        ids_BTK = jax.lax.top_k(scores_BTS, k)[1]
        spec = rules.spec("batch", "length", None)
        mark = jax.vmap(jax.vmap(lambda ids: jnp.zeros(S, bool).at[ids].set(True)))
        chosen_BTS = jax.shard_map(mark, in_specs=spec, out_specs=spec)(ids_BTK)
        return rules.shard(chosen_BTS, "batch", "length", key_axis)
