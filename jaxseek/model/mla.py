"""Multi-head latent attention (DeepSeek-V2 paper, section 2.1; HF DeepseekV2Attention, DeepseekV3Attention).

Keys and values of all heads are linear in one latent vector per token. With fresh keys (training, prefill)
they are expanded per head; against a cache (decode) the expansion is absorbed into queries and outputs, and
attention runs on the latent itself.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from jaxseek.config.model import ModelConfig
from jaxseek.model.cache import LatentCache, write_slots
from jaxseek.model.linear import Joined, expand, linear
from jaxseek.model.norm import RMSNorm
from jaxseek.model.rope import rotate
from jaxseek.model.weight import Quantized, matrix
from jaxseek.ops.attention import Mask, attend
from jaxseek.ops.decode_attention import attend_cached, serves
from jaxseek.sharding.parameters import Init

if TYPE_CHECKING:
    from jaxseek.model.layer import Context

INNER_EPS = 1e-6  # the norms of the latents use their class default, not the config's epsilon


class MLA(nnx.Module):
    """Latent attention, with or without a query latent, and V3.2's sparse selection where configured."""

    def __init__(self, cfg: ModelConfig, init: Init):
        self.cfg = cfg
        D, N, Q, C, R = (
            cfg.hidden_size,
            cfg.num_attention_heads,
            cfg.q_lora_rank,
            cfg.kv_lora_rank,
            cfg.qk_rope_head_dim,
        )
        P, H, V = cfg.qk_nope_head_dim, cfg.head_dim, cfg.v_head_dim
        bias = cfg.attention_bias
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

    def join(self) -> None:
        """For Layer.join: the heads' expansions as numbers, where they are quantised."""
        for name in ("k_b_NPC", "v_b_NHC"):
            if isinstance(param := getattr(self, name), Quantized):
                setattr(self, name, param.numbers())
        for name, contract in (("q_a_DQ", 1), ("q_b_QNH", 1), ("q_DNH", 1), ("kv_a_DA", 1), ("o_NHD", 2)):
            if (param := getattr(self, name)) is not None and not isinstance(param, Quantized):
                setattr(self, name, Joined(param, contract=contract))

    def __call__(
        self, x_BTD: jax.Array, cache: LatentCache | None, layer: jax.Array | int, ctx: Context
    ) -> tuple[jax.Array, LatentCache | None]:
        """Attention of normed x; the cache, where given, gets this block's latents in `layer`."""
        P, rules, dtype = self.cfg.qk_nope_head_dim, ctx.rules, x_BTD.dtype
        cq_BTQ = self._query_latent(x_BTD, ctx)
        q_BTNH = self._queries(x_BTD, cq_BTQ, ctx)
        qn_BTNP, qr_BTNR = q_BTNH[..., :P], rotate(q_BTNH[..., P:], ctx.rope, self.cfg.rope_interleave)
        latent_BTA, mask = self._latent(x_BTD, ctx), ctx.mask
        if cache is not None:
            latent_LBSA = write_slots(cache.latent_LBSA, layer, ctx.slots_BT, latent_BTA, rules)
            cache = dataclasses.replace(cache, latent_LBSA=latent_LBSA)
        if self.indexer is not None:
            mask, cache = self.indexer(x_BTD, cq_BTQ, cache, layer, ctx)
        if ctx.fresh:
            latent_BSA = rules.shard(latent_BTA, "batch", None, None)
            out_BTNH = self._expanded(qn_BTNP, qr_BTNR, latent_BSA, mask, ctx)
        else:
            assert cache is not None, "queries without fresh keys need a cache"
            out_BTNH = self._absorbed(qn_BTNP, qr_BTNR, cache.latent_LBSA, layer, mask, rules)
        y_BTD = linear(out_BTNH, self.o_NHD, ctx, "batch", "length", None, contract=2)
        return (
            y_BTD if self.o_bias_D is None else y_BTD + rules.use(self.o_bias_D, dtype)[None, None]
        ), cache

    def _query_latent(self, x_BTD, ctx):
        if self.q_a_DQ is None:
            return None
        rules, dtype = ctx.rules, x_BTD.dtype
        whole = (None, None)  # the norm needs the whole latent
        cq_BTQ = linear(x_BTD, self.q_a_DQ, ctx, "batch", "length", None, weight_axes=whole)
        if self.q_a_bias_Q is not None:
            cq_BTQ += rules.shard(rules.use(self.q_a_bias_Q, dtype), None)[None, None]
        return cq_BTQ if self.q_norm is None else self.q_norm(cq_BTQ)

    def _queries(self, x_BTD, cq_BTQ, ctx):
        x, weight = (x_BTD, self.q_DNH) if cq_BTQ is None else (cq_BTQ, self.q_b_QNH)
        return linear(x, weight, ctx, "batch", "length", "heads", None)

    def _latent(self, x_BTD, ctx):
        C, rules, dtype = self.cfg.kv_lora_rank, ctx.rules, x_BTD.dtype
        a_BTA = linear(x_BTD, self.kv_a_DA, ctx, "batch", "length", None)
        if self.kv_a_bias_A is not None:
            a_BTA += rules.use(self.kv_a_bias_A, dtype)[None, None]
        k_BTR = rotate(a_BTA[..., C:], ctx.rope, self.cfg.rope_interleave)
        return jnp.concatenate([self.kv_norm(a_BTA[..., :C]), k_BTR], axis=-1)

    def _expanded(self, qn_BTNP, qr_BTNR, latent_BSA, mask, ctx):
        C, rules, spec = self.cfg.kv_lora_rank, ctx.rules, ctx.rules.spec("batch", "heads", None, None)
        c_BSC, k_BSR = latent_BSA[..., :C], latent_BSA[..., C:]
        kn_BNSP, v_BNSH = (expand(c_BSC, w, ctx) for w in (self.k_b_NPC, self.v_b_NHC))
        kr_BNSR = jnp.broadcast_to(k_BSR[:, None], (*kn_BNSP.shape[:3], k_BSR.shape[-1]), out_sharding=spec)
        q_BTNH = jnp.concatenate([qn_BTNP, qr_BTNR], axis=-1)
        k_BNSH = jnp.concatenate([kn_BNSP, kr_BNSR], axis=-1)
        out = attend(
            q_BTNH[..., None, :], k_BNSH, v_BNSH, mask, self.cfg.softmax_scale, rules, ("heads", None)
        )
        return out[..., 0, :]

    def _absorbed(self, qn_BTNP, qr_BTNR, latent_LBSA, layer, mask, rules):
        C, dtype, heads = self.cfg.kv_lora_rank, qn_BTNP.dtype, ("batch", "length", "heads", None)
        k_b_NPC, v_b_NHC = (matrix(w, rules, dtype) for w in (self.k_b_NPC, self.v_b_NHC))
        qc_BTNC = jnp.einsum("BTNP,NPC->BTNC", qn_BTNP, k_b_NPC, out_sharding=rules.spec(*heads))
        near = rules.for_cache()
        q_BTNA, mask = near.shard(jnp.concatenate([qc_BTNC, qr_BTNR], axis=-1), *heads), mask.laid_out(near)
        q_BT1NA, scale, axes = q_BTNA[:, :, None], self.cfg.softmax_scale, (None, "heads")
        if serves(q_BT1NA, mask):
            k_LB1SA = latent_LBSA[:, :, None]
            z_BT1NC = attend_cached(q_BT1NA, k_LB1SA, None, layer, mask, scale, C, near, axes)
        else:
            k_B1SA = latent_LBSA[layer].astype(dtype)[:, None]
            z_BT1NC = attend(q_BT1NA, k_B1SA, k_B1SA, mask, scale, near, axes, "cache_length")[..., :C]
        z_BTNC = rules.shard(z_BT1NC[:, :, 0], *heads)
        return jnp.einsum("BTNC,NHC->BTNH", z_BTNC, v_b_NHC, out_sharding=rules.spec(*heads))


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
        q_BTNH = jnp.einsum("BTQ,QNH->BTNH", cq_BTQ, matrix(self.q_b_QNH, rules, dtype), out_sharding=headed)
        k_BTH = jnp.einsum("BTD,DH->BTH", x_BTD, matrix(self.k_DH, rules, dtype), out_sharding=narrow)
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

    def _layer_norm(self, x):
        x32 = x.astype(jnp.float32)
        x32 = (x32 - x32.mean(-1, keepdims=True)) * jax.lax.rsqrt(x32.var(-1, keepdims=True) + 1e-6)
        scale_H, bias_H = (p[...][None, None] for p in (self.k_norm_H, self.k_norm_bias_H))
        return (x32 * scale_H + bias_H).astype(x.dtype)

    def _choose(self, scores_BTS, mask, key_axis, rules):
        S, k = scores_BTS.shape[-1], self.cfg.index_topk
        if k >= S:
            return None
        scores_BTS = rules.shard(jnp.where(mask.dense(), scores_BTS, -jnp.inf), "batch", "length", None)
        ids_BTK = jax.lax.top_k(scores_BTS, k)[1]
        spec = rules.spec("batch", "length", None)
        mark = jax.vmap(jax.vmap(lambda ids: jnp.zeros(S, bool).at[ids].set(True)))
        chosen_BTS = jax.shard_map(mark, in_specs=spec, out_specs=spec)(ids_BTK)
        return rules.shard(chosen_BTS, "batch", "length", key_axis)
