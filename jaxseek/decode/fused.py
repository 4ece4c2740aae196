"""Attention and experts of a decode step in Pallas kernels, on TPU; decode/kernels.py says what each does.

They apply if every chip has one token of each of few rows. Heads, experts and widths may be split over any
axes, and the cache by rows and slots. Otherwise MLA and MoE compute the same in plain JAX.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxseek.decode import kernels
from jaxseek.model.cache import LatentCache
from jaxseek.model.context import Context
from jaxseek.model.mla import INNER_EPS, MLA
from jaxseek.model.moe import EXPERTS, MoE, Routing, mean_affinity
from jaxseek.model.norm import RMSNorm
from jaxseek.model.weight import stored
from jaxseek.ops.chosen_experts import ROWS, chosen_experts_mlp, touched_share
from jaxseek.ops.decode_attention import combined, decode_attention
from jaxseek.ops.scaled import scales_of
from jaxseek.sharding.rules import Rules

_MATRICES = ("q_a_DQ", "kv_a_DA", "q_b_QNH", "k_b_NPC", "v_b_NHC", "o_NHD")
_SHARED = ("gate_DF", "up_DF", "down_FD")


def _everywhere(x_BTD: jax.Array, ctx: Context) -> bool:
    rules, rows = ctx.rules, x_BTD.shape[0]
    split = rules.axes("batch") or rules.axes("length")
    return x_BTD.shape[1] == 1 and rows <= ROWS and not split and not ctx.fp8


def serves_attention(stack: Any, x_BTD: jax.Array, ctx: Context) -> bool:
    """True if `attention` can be this step: latent attention, a query latent, no biases, no sparsity."""
    if not isinstance(stack, MLA) or not _everywhere(x_BTD, ctx):
        return False
    rules, cfg = ctx.rules, stack.cfg
    plain = cfg.q_lora_rank and not (cfg.attention_bias or cfg.attention_out_bias or cfg.index_topk)
    heads = rules.axes("cache_heads") + rules.axes("cache_batch")
    return bool(plain) and rules.axes("heads") == heads and stored(stack, _MATRICES, rules) is not None


def serves_experts(stack: Any, x_BTD: jax.Array, ctx: Context) -> bool:
    """True if `experts` can be this step: no exchange or capacity, shared experts laid out as the routed."""
    if not isinstance(stack, MoE) or not _everywhere(x_BTD, ctx):
        return False
    rules, routed, shared = ctx.rules, stored(stack, EXPERTS, ctx.rules), stack.shared
    if routed is None or rules.capacity_factor or rules.exchanges:
        return False
    if shared is None:
        return True
    same = set(rules.axes("mlp")) == set(_sum_axes(rules)) and not stack.cfg.mlp_bias
    always = stored(shared, _SHARED, rules)
    return same and always is not None and bool(scales_of(*always)) == bool(scales_of(*routed))


def _sum_axes(rules: Rules) -> tuple[str, ...]:
    return rules.axes("expert_mlp") + rules.axes("expert")


def _specs(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.typeof(a).sharding.spec, tree)


def attention(
    norm: RMSNorm,
    stack: MLA,
    layer: jax.Array | int,
    x_BTD: jax.Array,
    cache: Any,
    ctx: Context,
) -> tuple[jax.Array, LatentCache]:
    """Norm and attention of one layer of a stack: the sum over its heads [B, 1, D], and the cache."""
    assert isinstance(cache, LatentCache), "queries without fresh keys need a cache"
    cfg, rules, C = stack.cfg, ctx.rules, stack.cfg.kv_lora_rank
    latent_axes, heads, rows = rules.axes("q_lora"), rules.axes("heads"), rules.axes("cache_batch")
    slots = rules.axes("cache_length")
    assert stack.q_norm is not None

    def local(layer, x_BTD, rope, position_BT, slot_BT, latent_LBSA, norms, matrices):
        norm_LD, q_norm_LQ, kv_norm_LC = norms
        q_a, kv_a, q_b, k_b, v_b, o = matrices
        rope = tuple(t[:, 0] for t in rope)
        how = (rope, layer)
        eps = (norm.eps, INNER_EPS)
        cq_BQ, latent_BA = kernels.latents(
            x_BTD[:, 0], norm_LD, q_a, kv_a, kv_norm_LC, *how, eps, cfg.rope_interleave
        )
        if latent_axes:
            cq_BQ = jax.lax.all_gather(cq_BQ, latent_axes, axis=1, tiled=True)
        q_NBA = kernels.queries(cq_BQ, q_norm_LQ, q_b, k_b, *how, INNER_EPS, cfg.rope_interleave)
        if rows:  # from all rows of some heads to some rows of all heads that the cache's chips share
            q_NBA = jax.lax.all_to_all(q_NBA, rows, split_axis=1, concat_axis=0, tiled=True)
        B, S = q_NBA.shape[1], latent_LBSA.shape[2]
        first_row = B * jax.lax.axis_index(rows) if rows else 0
        position_B, slot_B, new_BA = (
            jax.lax.dynamic_slice_in_dim(a, first_row, B)
            for a in (position_BT[:, 0], slot_BT[:, 0], latent_BA)
        )
        start = S * jax.lax.axis_index(slots) if slots else 0
        at_B = jnp.where((slot_B >= start) & (slot_B < start + S), slot_B - start, S)
        new_BA = new_BA.astype(latent_LBSA.dtype)
        latent_LBSA = latent_LBSA.at[layer, jnp.arange(B), at_B].set(new_BA, mode="drop")
        found = decode_attention(
            q_NBA.swapaxes(0, 1)[:, None], latent_LBSA[:, :, None], None, layer, position_B,
            cfg.softmax_scale, C, start,
        )  # fmt: skip
        z_NBC = combined(*found, slots, x_BTD.dtype)[:, 0].swapaxes(0, 1)
        if rows:
            z_NBC = jax.lax.all_to_all(z_NBC, rows, split_axis=0, concat_axis=1, tiled=True)
        y_BD = kernels.outputs(z_NBC, v_b, o, layer)
        return (jax.lax.psum(y_BD, heads) if heads else y_BD)[:, None], latent_LBSA

    norms = (norm.scale_D[...], stack.q_norm.scale_D[...], stack.kv_norm.scale_D[...])
    given = (
        ctx.rope,
        ctx.mask.q_pos_BT,
        ctx.slots_BT,
        cache.latent_LBSA,
        norms,
        stored(stack, _MATRICES, rules),
    )
    cached = rules.spec(None, "cache_batch", "cache_length", None)
    y_BTD, latent_LBSA = jax.shard_map(
        local,
        in_specs=(P(), P(), *_specs(given)),
        out_specs=(P(), cached),
        check_vma=False,  # a Pallas call does not declare over which axes its results vary
    )(jnp.asarray(layer), x_BTD, *given)
    return y_BTD, dataclasses.replace(cache, latent_LBSA=latent_LBSA)


def experts(
    norm: RMSNorm, stack: Any, layer: jax.Array | int, x_BTD: jax.Array, y_BTD: jax.Array, ctx: Context
) -> tuple[jax.Array, jax.Array, Routing]:
    """Norm, router and experts of a stack's layer on x + y; returns x + y, the experts' sum, the routing."""
    cfg, rules, expert_axes, sum_axes = stack.cfg, ctx.rules, ctx.rules.axes("expert"), _sum_axes(ctx.rules)
    E, K, B = cfg.n_routed_experts, cfg.num_experts_per_tok, x_BTD.shape[0]

    def local(layer, x_BTD, y_BTD, valid_BT, norm_LD, router_LDE, bias_LE, slots_LXS, experts, shared):
        here = experts[2].shape[1]
        first = here * (jax.lax.axis_index(expert_axes) if expert_axes else 0)
        x_BD, xn_BD, logits_BE, gates_BS, ids_BK, *listed = kernels.router(
            x_BTD[:, 0],
            y_BTD[:, 0],
            norm_LD,
            router_LDE,
            bias_LE,
            slots_LXS,
            valid_BT[:, 0],
            layer,
            norm.eps,
            cfg,
            first,
            here,
        )
        touched = here * touched_share(E, gates_BS.shape[1], K, B)
        gate, up, down = experts
        with_token = (listed[0], listed[1], jnp.asarray(first, jnp.int32).reshape(1))
        y_BD = chosen_experts_mlp(xn_BD, gates_BS, gate, up, down, layer, touched, with_token, shared)
        y_BD = jax.lax.psum(y_BD, sum_axes) if sum_axes else y_BD
        return x_BD[:, None], y_BD[:, None], logits_BE, ids_BK

    bias_LE = None if stack.router_bias_E is None else stack.router_bias_E[...]
    shared = None if stack.shared is None else stored(stack.shared, _SHARED, rules)
    slots_LXS = None if stack.slots is None else stack.slots[...]
    given = (
        ctx.valid_BT, norm.scale_D[...], stack.router_DE[...], bias_LE, slots_LXS,
        stored(stack, EXPERTS, rules), shared,
    )  # fmt: skip
    x_BTD, y_BTD, logits_BE, ids_BK = jax.shard_map(
        local, in_specs=(P(), P(), P(), *_specs(given)), out_specs=(P(),) * 4, check_vma=False
    )(jnp.asarray(layer), x_BTD, y_BTD, *given)
    affinity_BE = mean_affinity(cfg, logits_BE[:, None], ctx.valid_BT, rules)
    load_E = jnp.zeros(E, jnp.int32).at[jnp.where(ctx.valid_BT, ids_BK, E)].add(1, mode="drop")
    return x_BTD, y_BTD, Routing(ids_BK[:, None], affinity_BE, load_E, jnp.zeros((), jnp.int32))
