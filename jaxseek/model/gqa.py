"""Grouped-query attention: DeepSeek LLM, MoE-16B, the R1 distills (HF LlamaAttention, Qwen2Attention)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from jaxseek.config.model import ModelConfig
from jaxseek.model.cache import KVCache, write_slots
from jaxseek.model.linear import Joined, linear
from jaxseek.model.rope import rotate
from jaxseek.ops.attention import attend
from jaxseek.ops.decode_attention import attend_cached, serves
from jaxseek.sharding.parameters import Init

if TYPE_CHECKING:
    from jaxseek.model.layer import Context


class GQA(nnx.Module):
    """Queries in groups G that share one of K key-value heads; biases as the family has them."""

    def __init__(self, cfg: ModelConfig, init: Init):
        self.cfg = cfg
        D, K, H = cfg.hidden_size, cfg.num_key_value_heads, cfg.head_dim
        G = cfg.num_attention_heads // K
        self.q_DKGH = init((D, K, G, H), ("embed", "kv_heads", "q_groups", None))
        self.k_DKH = init((D, K, H), ("embed", "kv_heads", None))
        self.v_DKH = init((D, K, H), ("embed", "kv_heads", None))
        self.o_KGHD = init((K, G, H, D), ("kv_heads", "q_groups", None, "embed"))
        self.qkv: Joined | None = nnx.data(None)
        bias, out_bias = cfg.attention_bias, cfg.attention_out_bias
        self.q_bias_KGH = init((K, G, H), ("kv_heads", "q_groups", None), fill=0.0) if bias else None
        self.k_bias_KH = init((K, H), ("kv_heads", None), fill=0.0) if bias else None
        self.v_bias_KH = init((K, H), ("kv_heads", None), fill=0.0) if bias else None
        self.o_bias_D = init((D,), ("embed",), fill=0.0) if out_bias else None

    def join(self) -> None:
        """For Layer.join."""
        self.qkv, self.o_KGHD = Joined(self.q_DKGH, self.k_DKH, self.v_DKH), Joined(self.o_KGHD, contract=3)
        self.q_DKGH = self.k_DKH = self.v_DKH = None

    def __call__(
        self, x_BTD: jax.Array, cache: KVCache | None, layer: jax.Array | int, ctx: Context
    ) -> tuple[jax.Array, KVCache | None]:
        """Attention of normed x; the cache, where given, gets this block's keys and values in `layer`."""
        cfg, rules, dtype, heads = self.cfg, ctx.rules, x_BTD.dtype, ("kv_heads", "q_groups")
        if self.qkv is None:
            q_BTKGH = linear(x_BTD, self.q_DKGH, ctx, "batch", "length", *heads, None)
            k_BTKH, v_BTKH = (
                linear(x_BTD, w, ctx, "batch", "length", "kv_heads", None) for w in (self.k_DKH, self.v_DKH)
            )
        else:
            q_BTKGH, k_BTKH, v_BTKH = self.qkv(x_BTD)
        if cfg.attention_bias:
            q_BTKGH += rules.use(self.q_bias_KGH, dtype)[None, None]
            k_BTKH += rules.use(self.k_bias_KH, dtype)[None, None]
            v_BTKH += rules.use(self.v_bias_KH, dtype)[None, None]
        q_BTKGH, k_BTKH = rotate(q_BTKGH, ctx.rope, False), rotate(k_BTKH, ctx.rope, False)
        if cache is not None:
            k_LBKSH = write_slots(cache.k_LBKSH, layer, ctx.slots_BT, k_BTKH, rules)
            v_LBKSH = write_slots(cache.v_LBKSH, layer, ctx.slots_BT, v_BTKH, rules)
            cache = dataclasses.replace(cache, k_LBKSH=k_LBKSH, v_LBKSH=v_LBKSH)
        if ctx.fresh:
            k_BKSH, v_BKSH = (
                jnp.swapaxes(rules.shard(a, "batch", None, "kv_heads", None), 1, 2) for a in (k_BTKH, v_BTKH)
            )
            out_BTKGH = attend(q_BTKGH, k_BKSH, v_BKSH, ctx.mask, cfg.softmax_scale, rules, heads)
        else:
            assert cache is not None, "queries without fresh keys need a cache"
            out_BTKGH = self._cached(q_BTKGH, cache, layer, ctx.mask, rules)
        y_BTD = linear(out_BTKGH, self.o_KGHD, ctx, "batch", "length", None, contract=3)
        return (
            y_BTD if self.o_bias_D is None else y_BTD + rules.use(self.o_bias_D, dtype)[None, None]
        ), cache

    def _cached(self, q_BTKGH, cache, layer, mask, rules):
        near, heads, scale = rules.for_cache(), ("kv_heads", "q_groups"), self.cfg.softmax_scale
        axes = ("batch", "length", *heads, None)
        q_BTKGH, mask = near.shard(q_BTKGH, *axes), mask.laid_out(near)
        if serves(q_BTKGH, mask):
            k, v, width = cache.k_LBKSH, cache.v_LBKSH, cache.v_LBKSH.shape[-1]
            out_BTKGH = attend_cached(q_BTKGH, k, v, layer, mask, scale, width, near, heads)
        else:
            k_BKSH, v_BKSH = (a[layer].astype(q_BTKGH.dtype) for a in (cache.k_LBKSH, cache.v_LBKSH))
            out_BTKGH = attend(q_BTKGH, k_BKSH, v_BKSH, mask, scale, near, heads, "cache_length")
        return rules.shard(out_BTKGH, *axes)
