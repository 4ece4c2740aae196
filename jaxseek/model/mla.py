"""Multi-head latent attention (DeepSeek-V2 paper, section 2.1; HF DeepseekV2Attention, DeepseekV3Attention).

Keys and values of all heads are linear in one latent vector per token. Expanded (training, prefill), they are
computed per head; absorbed (decode), the expansion moves into queries and outputs, and attention runs on the
latents themselves.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxseek.config.model import ModelConfig
from jaxseek.model.cache import LatentCache
from jaxseek.model.context import Context
from jaxseek.model.indexer import Indexer
from jaxseek.model.norm import RMSNorm
from jaxseek.model.rope import rotate
from jaxseek.ops.attention import attend, attend_cached
from jaxseek.ops.cache_write import write_slots
from jaxseek.ops.mask import Mask
from jaxseek.ops.matmul import expand_heads
from jaxseek.sharding.parameters import Init
from jaxseek.sharding.rules import Rules

INNER_EPS = 1e-6  # the norms of the latents use their class default, not the config's epsilon


class MLA(nnx.Module):
    """Latent attention, with or without a query latent, and V3.2's sparse selection where configured."""

    def __init__(self, cfg: ModelConfig, init: Init):
        self.cfg = cfg
        D, N, Q = cfg.hidden_size, cfg.num_attention_heads, cfg.q_lora_rank
        C, R, P = cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.qk_nope_head_dim
        H, V, bias = cfg.head_dim, cfg.v_head_dim, cfg.attention_bias
        self.q_a_DQ = init((D, Q), ("embed", "q_lora")) if Q else None
        self.q_a_bias_Q = init((Q,), ("q_lora",), fill=0.0) if Q and bias else None
        self.q_norm = RMSNorm(Q, INNER_EPS, init) if Q else None
        self.q_b_QNH = init((Q, N, H), ("latent", "heads", None)) if Q else None
        self.q_DNH = None if Q else init((D, N, H), ("embed", "heads", None))
        self.kv_a_DA = init((D, C + R), ("embed", None))
        self.kv_a_bias_A = init((C + R,), (None,), fill=0.0) if bias else None
        self.kv_norm = RMSNorm(C, INNER_EPS, init)
        self.k_b_NPC = init((N, P, C), ("heads", None, "latent"))
        self.v_b_NHC = init((N, V, C), ("heads", None, "latent"))
        self.o_NHD = init((N, V, D), ("heads", None, "embed"))
        self.o_bias_D = init((D,), ("embed",), fill=0.0) if cfg.attention_out_bias else None
        self.indexer = Indexer(cfg, init) if cfg.index_topk else None

    def empty_cache(self, layers: int, batch: int, capacity: int, dtype: Any, rules: Rules) -> LatentCache:
        """Zeros for `batch` rows of `capacity` tokens each."""
        cfg, spec = self.cfg, rules.spec(None, "cache_batch", "cache_length", None)

        def zeros(width: int) -> jax.Array:
            return jnp.zeros((layers, batch, capacity, width), dtype, out_sharding=spec)

        index_LBSH = zeros(cfg.index_head_dim) if cfg.index_topk else None
        return LatentCache(zeros(cfg.kv_lora_rank + cfg.qk_rope_head_dim), index_LBSH)

    def __call__(
        self, x_BTD: jax.Array, cache: LatentCache | None, layer: jax.Array | int, ctx: Context
    ) -> tuple[jax.Array, LatentCache | None]:
        """Attention of normed x; the cache, where given, gets this block's latents in `layer`."""
        rules, mask = ctx.rules, ctx.mask
        cq_BTQ = self._query_latent(x_BTD, ctx)
        qn_BTNP, qr_BTNR = self._queries(x_BTD, cq_BTQ, ctx)
        latent_BTA = self._latent(x_BTD, ctx)
        if cache is not None:
            latent_LBSA = write_slots(cache.latent_LBSA, layer, ctx.slots_BT, latent_BTA, rules)
            cache = dataclasses.replace(cache, latent_LBSA=latent_LBSA)
        if self.indexer is not None:
            mask, cache = self.indexer(x_BTD, cq_BTQ, cache, layer, ctx)
        if ctx.fresh:
            out_BTNH = self._expanded(qn_BTNP, qr_BTNR, latent_BTA, mask, ctx)
        else:
            assert cache is not None, "queries without fresh keys need a cache"
            if self._expanding_pays(x_BTD.shape[1]):
                latent_BSA = cache.latent_LBSA[layer].astype(x_BTD.dtype)
                out_BTNH = self._expanded(qn_BTNP, qr_BTNR, latent_BSA, mask.with_whole_keys(rules), ctx)
            else:
                out_BTNH = self._absorbed(qn_BTNP, qr_BTNR, cache.latent_LBSA, layer, mask, rules)
        y_BTD = self.o_NHD.matmul(out_BTNH, ctx, "batch", "length", None, contract=2)
        if self.o_bias_D is not None:
            y_BTD += rules.use(self.o_bias_D, x_BTD.dtype)[None, None]
        return y_BTD, cache

    def _query_latent(self, x_BTD: jax.Array, ctx: Context) -> jax.Array | None:
        if self.q_a_DQ is None or self.q_norm is None:
            return None
        whole = (None, None)  # the norm needs the whole latent
        cq_BTQ = self.q_a_DQ.matmul(x_BTD, ctx, "batch", "length", None, weight_axes=whole)
        if self.q_a_bias_Q is not None:
            cq_BTQ += ctx.rules.shard(ctx.rules.use(self.q_a_bias_Q, x_BTD.dtype), None)[None, None]
        return self.q_norm(cq_BTQ)

    def _queries(
        self, x_BTD: jax.Array, cq_BTQ: jax.Array | None, ctx: Context
    ) -> tuple[jax.Array, jax.Array]:
        """Each head's query, the part without rotation [B, T, N, P] and the rotated one [B, T, N, R]."""
        P, axes = self.cfg.qk_nope_head_dim, ("batch", "length", "heads", None)
        if cq_BTQ is None:
            q_BTNH = self.q_DNH.matmul(x_BTD, ctx, *axes)  # type: ignore[union-attr]
        else:
            q_BTNH = self.q_b_QNH.matmul(cq_BTQ, ctx, *axes)  # type: ignore[union-attr]
        return q_BTNH[..., :P], rotate(q_BTNH[..., P:], ctx.rope, self.cfg.rope_interleave)

    def _latent(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        """Normed latent and rotated shared key of each token, [B, T, A]."""
        C = self.cfg.kv_lora_rank
        a_BTA = self.kv_a_DA.matmul(x_BTD, ctx, "batch", "length", None)
        if self.kv_a_bias_A is not None:
            a_BTA += ctx.rules.use(self.kv_a_bias_A, x_BTD.dtype)[None, None]
        k_BTR = rotate(a_BTA[..., C:], ctx.rope, self.cfg.rope_interleave)
        return jnp.concatenate([self.kv_norm(a_BTA[..., :C]), k_BTR], axis=-1)

    def _expanding_pays(self, queries: int) -> bool:
        """True if expanding cached latents and attending per head takes fewer products than absorbing.

        For each key and head: the expansion, C (P + V), and T (P + R + V); against T (2 C + R).
        """
        if self.indexer is not None:
            return False
        C, R = self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim
        P, V = self.cfg.qk_nope_head_dim, self.cfg.v_head_dim
        return C * (P + V) + queries * (P + R + V) < queries * (2 * C + R)

    def _expanded(
        self, qn_BTNP: jax.Array, qr_BTNR: jax.Array, latent_BSA: jax.Array, mask: Mask, ctx: Context
    ) -> jax.Array:
        C, rules, spec = self.cfg.kv_lora_rank, ctx.rules, ctx.rules.spec("batch", "heads", None, None)
        latent_BSA = rules.shard(latent_BSA, "batch", None, None)
        c_BSC, k_BSR = latent_BSA[..., :C], latent_BSA[..., C:]
        k_b_NPC, v_b_NHC = (w.dense(rules, c_BSC.dtype) for w in (self.k_b_NPC, self.v_b_NHC))
        kn_BNSP, v_BNSH = (expand_heads(c_BSC, w, spec, ctx.fp8) for w in (k_b_NPC, v_b_NHC))
        kr_BNSR = jnp.broadcast_to(k_BSR[:, None], (*kn_BNSP.shape[:3], k_BSR.shape[-1]), out_sharding=spec)
        q_BTNH = jnp.concatenate([qn_BTNP, qr_BTNR], axis=-1)
        k_BNSH = jnp.concatenate([kn_BNSP, kr_BNSR], axis=-1)
        scale, heads = self.cfg.softmax_scale, ("heads", None)
        return attend(q_BTNH[..., None, :], k_BNSH, v_BNSH, mask, scale, rules, heads)[..., 0, :]

    def _absorbed(
        self,
        qn_BTNP: jax.Array,
        qr_BTNR: jax.Array,
        latent_LBSA: jax.Array,
        layer: jax.Array | int,
        mask: Mask,
        rules: Rules,
    ) -> jax.Array:
        C, scale, dtype = self.cfg.kv_lora_rank, self.cfg.softmax_scale, qn_BTNP.dtype
        spec = rules.spec("batch", "length", "heads", None)
        k_b_NPC, v_b_NHC = (w.dense(rules, dtype) for w in (self.k_b_NPC, self.v_b_NHC))
        qc_BTNC = jnp.einsum("BTNP,NPC->BTNC", qn_BTNP, k_b_NPC, out_sharding=spec)
        q_BT1NA = jnp.concatenate([qc_BTNC, qr_BTNR], axis=-1)[:, :, None]
        k_LB1SA, heads = latent_LBSA[:, :, None], (None, "heads")
        z_BT1NC = attend_cached(q_BT1NA, k_LB1SA, None, layer, mask, scale, C, rules, heads)
        return jnp.einsum("BTNC,NHC->BTNH", z_BT1NC[:, :, 0], v_b_NHC, out_sharding=spec)
