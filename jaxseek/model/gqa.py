"""Grouped-query attention: DeepSeek LLM, MoE-16B, the R1 distills (HF LlamaAttention, Qwen2 and Qwen3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxseek.config.model import ModelConfig
from jaxseek.model.cache import KVCache
from jaxseek.model.context import Context
from jaxseek.model.norm import RMSNorm
from jaxseek.model.rope import rotate
from jaxseek.ops.attention import attend, attend_cached
from jaxseek.ops.cache_write import write_slots
from jaxseek.sharding.parameters import Init
from jaxseek.sharding.rules import Rules

_HEADS = ("kv_heads", "q_groups")


class GQA(nnx.Module):
    """Queries in groups G that share one of K key-value heads; biases and norms as the family has them."""

    def __init__(self, cfg: ModelConfig, init: Init):
        self.cfg = cfg
        D, K, H = cfg.hidden_size, cfg.num_key_value_heads, cfg.head_dim
        G = cfg.num_attention_heads // K
        self.q_DKGH = init((D, K, G, H), ("embed", "kv_heads", "q_groups", None))
        self.k_DKH = init((D, K, H), ("embed", "kv_heads", None))
        self.v_DKH = init((D, K, H), ("embed", "kv_heads", None))
        self.o_KGHD = init((K, G, H, D), ("kv_heads", "q_groups", None, "embed"))
        bias, out_bias = cfg.attention_bias, cfg.attention_out_bias
        self.q_bias_KGH = init((K, G, H), ("kv_heads", "q_groups", None), fill=0.0) if bias else None
        self.k_bias_KH = init((K, H), ("kv_heads", None), fill=0.0) if bias else None
        self.v_bias_KH = init((K, H), ("kv_heads", None), fill=0.0) if bias else None
        self.o_bias_D = init((D,), ("embed",), fill=0.0) if out_bias else None
        self.q_head_norm = RMSNorm(H, cfg.rms_norm_eps, init) if cfg.qk_norm else None
        self.k_head_norm = RMSNorm(H, cfg.rms_norm_eps, init) if cfg.qk_norm else None

    def empty_cache(self, layers: int, batch: int, capacity: int, dtype: Any, rules: Rules) -> KVCache:
        """Zeros for `batch` rows of `capacity` tokens each."""
        shape = (layers, batch, self.cfg.num_key_value_heads, capacity, self.cfg.head_dim)
        spec = rules.spec(None, "cache_batch", "kv_heads", "cache_length", None)
        k_LBKSH, v_LBKSH = (jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(2))
        return KVCache(k_LBKSH, v_LBKSH)

    def __call__(
        self, x_BTD: jax.Array, cache: KVCache | None, layer: jax.Array | int, ctx: Context
    ) -> tuple[jax.Array, KVCache | None]:
        """Attention of normed x; the cache, where given, gets this block's keys and values in `layer`."""
        rules, scale = ctx.rules, self.cfg.softmax_scale
        q_BTKGH, k_BTKH, v_BTKH = self._project(x_BTD, ctx)
        if cache is not None:
            k_LBKSH = write_slots(cache.k_LBKSH, layer, ctx.slots_BT, k_BTKH, rules)
            v_LBKSH = write_slots(cache.v_LBKSH, layer, ctx.slots_BT, v_BTKH, rules)
            cache = dataclasses.replace(cache, k_LBKSH=k_LBKSH, v_LBKSH=v_LBKSH)
        if ctx.fresh:
            k_BKSH, v_BKSH = (
                jnp.swapaxes(rules.shard(a, "batch", None, "kv_heads", None), 1, 2) for a in (k_BTKH, v_BTKH)
            )
            out_BTKGH = attend(q_BTKGH, k_BKSH, v_BKSH, ctx.mask, scale, rules, _HEADS)
        else:
            assert cache is not None, "queries without fresh keys need a cache"
            k_LBKSH, v_LBKSH, width = cache.k_LBKSH, cache.v_LBKSH, self.cfg.head_dim
            out_BTKGH = attend_cached(q_BTKGH, k_LBKSH, v_LBKSH, layer, ctx.mask, scale, width, rules, _HEADS)
        y_BTD = self.o_KGHD.matmul(out_BTKGH, ctx, "batch", "length", None, contract=3)
        if self.o_bias_D is not None:
            y_BTD += rules.use(self.o_bias_D, x_BTD.dtype)[None, None]
        return y_BTD, cache

    def _project(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys, normalised per head where the family does that, then rotated; and values."""
        use, dtype = ctx.rules.use, x_BTD.dtype
        q_BTKGH = self.q_DKGH.matmul(x_BTD, ctx, "batch", "length", *_HEADS, None)
        k_BTKH = self.k_DKH.matmul(x_BTD, ctx, "batch", "length", "kv_heads", None)
        v_BTKH = self.v_DKH.matmul(x_BTD, ctx, "batch", "length", "kv_heads", None)
        if self.cfg.attention_bias:
            q_BTKGH += use(self.q_bias_KGH, dtype)[None, None]
            k_BTKH += use(self.k_bias_KH, dtype)[None, None]
            v_BTKH += use(self.v_bias_KH, dtype)[None, None]
        if self.q_head_norm is not None and self.k_head_norm is not None:
            q_BTKGH, k_BTKH = self.q_head_norm(q_BTKGH), self.k_head_norm(k_BTKH)
        return rotate(q_BTKGH, ctx.rope, False), rotate(k_BTKH, ctx.rope, False), v_BTKH
