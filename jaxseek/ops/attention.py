"""Softmax attention, with fresh keys or against a cache: the chooser of its forms.

On TPU fresh keys are read by a kernel that writes no scores to memory (flash_attention.py), and a cache by a
flash-decode kernel (decode_attention.py); on CPU fresh keys by products that leave out what lies above the
diagonal (causal_attention.py). Everything else, and chosen keys, goes through XLA, a block of queries at a
time when there are many.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxseek.ops.causal_attention import causal_attention
from jaxseek.ops.decode_attention import attend_in_cache
from jaxseek.ops.few_rows import FEW, product_of_few
from jaxseek.ops.flash_attention import flash_attention
from jaxseek.ops.mask import Mask
from jaxseek.ops.platform import platform
from jaxseek.sharding.rules import Rules

QUERY_BLOCK = 1024  # queries at a time: scores take B * N * QUERY_BLOCK * S floats
QUERY_BLOCK_CPU = 128  # scores of one head stay in a core's cache, which makes long prompts twice as fast


def attend(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    mask: Mask,
    scale: float,
    rules: Rules,
    head_axes: tuple[str | None, str | None],
    key_axis: str | None = None,
) -> jax.Array:
    """softmax(scale * q k^T + mask) v with float32 softmax: [B, T, K, G, value width].

    `head_axes` are the logical names of K and G, `key_axis` that of S: over a split S, maximum and sums are
    reduced across the shards (a log-sum-exp combine).
    """
    T, on_cpu, split = q_BTKGH.shape[1], platform() == "cpu", bool(rules.axes("length"))
    if key_axis is None and mask.kv_seg_BS is not None and mask.chosen_BTS is None:
        if platform() == "tpu":
            return _flash(q_BTKGH, k_BKSH, v_BKSH, mask, scale, rules, head_axes)
        if on_cpu and (T < 2 * QUERY_BLOCK or T % QUERY_BLOCK or split):
            return _causal(q_BTKGH, k_BKSH, v_BKSH, mask, scale, rules, head_axes)
    size = QUERY_BLOCK_CPU if on_cpu else QUERY_BLOCK
    blocks = T // size
    if blocks < 2 or T % size or split:
        return _attend(q_BTKGH, k_BKSH, v_BKSH, mask, scale, rules, head_axes, key_axis)

    def cut(x):
        return None if x is None else jnp.moveaxis(x.reshape(x.shape[0], blocks, -1, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def block(args):
        q, q_pos, q_seg, chosen, prefix = args
        part = replace(mask, q_pos_BT=q_pos, q_seg_BT=q_seg, chosen_BTS=chosen, q_prefix_BT=prefix)
        if on_cpu and not rules.axes(key_axis):
            return _causal(q, k_BKSH, v_BKSH, part, scale, rules, head_axes)
        return _attend(q, k_BKSH, v_BKSH, part, scale, rules, head_axes, key_axis)

    of_queries = q_BTKGH, mask.q_pos_BT, mask.q_seg_BT, mask.chosen_BTS, mask.q_prefix_BT
    parts = jax.lax.map(block, jax.tree.map(cut, of_queries))
    out = jnp.moveaxis(parts, 0, 1)
    return out.reshape(out.shape[0], T, *out.shape[3:])


def attend_cached(
    q_BTKGH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array | None,
    layer: jax.Array | int,
    mask: Mask,
    scale: float,
    width: int,
    rules: Rules,
    head_axes: tuple[str | None, str | None],
) -> jax.Array:
    """Attention to one layer of a cache, [B, T, K, G, width]; laid out by `rules` outside.

    Inside, they are where the cache is (`Rules.for_cache`); over a split cache length, a log-sum-exp combine.
    Without `v`, the first `width` numbers of the keys are the values.
    """
    near, axes = rules.for_cache(), ("batch", "length", *head_axes, None)
    q_BTKGH, mask = near.shard(q_BTKGH, *axes), mask.laid_out(near)
    if platform() == "tpu" and q_BTKGH.shape[1] == 1 and mask.chosen_BTS is None:
        out = attend_in_cache(q_BTKGH, k_LBKSH, v_LBKSH, layer, mask, scale, width, near, head_axes)
    else:
        k_BKSH = k_LBKSH[layer].astype(q_BTKGH.dtype)
        v_BKSH = k_BKSH if v_LBKSH is None else v_LBKSH[layer].astype(q_BTKGH.dtype)
        out = attend(q_BTKGH, k_BKSH, v_BKSH, mask, scale, near, head_axes, "cache_length")[..., :width]
    return rules.shard(out, *axes)


def _flash(q_BTKGH, k_BKSH, v_BKSH, mask, scale, rules, head_axes, interpret=False):
    """The kernel on every device's own rows, queries and heads; a split length has its keys gathered."""
    query, keys = (
        rules.spec("batch", *head_axes, "length", None),
        rules.spec("batch", head_axes[0], None, None),
    )
    rows_BT, rows_BS = rules.spec("batch", "length"), rules.spec("batch", None)
    out_BKGTH = jax.shard_map(
        functools.partial(flash_attention, scale=scale, interpret=interpret),
        in_specs=(query, keys, keys, rows_BT, rows_BT, rows_BS, rows_BS, rows_BT),
        out_specs=query,
        check_vma=False,  # a Pallas call does not declare over which axes its results vary
    )(
        jnp.moveaxis(q_BTKGH, 1, 3),
        k_BKSH,
        v_BKSH,
        mask.q_pos_BT,
        mask.q_seg_BT,
        mask.kv_pos_BS,
        mask.kv_seg_BS,
        mask.q_prefix_BT,
    )
    return jnp.moveaxis(out_BKGTH, 3, 1)


def _causal(q_BTKGH, k_BKSH, v_BKSH, mask, scale, rules, head_axes):
    query = rules.spec("batch", *head_axes, "length", None)
    keys, keep = rules.spec("batch", head_axes[0], None, None), rules.spec("batch", "length", None)
    out_BKGTH = jax.shard_map(
        causal_attention,
        in_specs=(query, keys, keys, keep),
        out_specs=query,
        check_vma=False,  # nor does a function with a derivative of its own
    )(jnp.moveaxis(scale * q_BTKGH, 1, 3), k_BKSH, v_BKSH, mask.dense())
    return jnp.moveaxis(out_BKGTH, 3, 1)


def _attend(q_BTKGH, k_BKSH, v_BKSH, mask, scale, rules, head_axes, key_axis):
    # dot_general, not einsum: with heads before tokens on both sides no operand is transposed for it
    q_BKGTH = jnp.moveaxis(q_BTKGH, 1, 3)
    _, T, _, G, _ = q_BTKGH.shape
    on_cpu, one_device = platform() == "cpu", jax.sharding.get_abstract_mesh().size == 1
    if on_cpu and T == 1 and G <= FEW and one_device and key_axis is not None:  # which has no gradient
        scores_BKGTS = product_of_few(q_BKGTH[..., 0, :], k_BKSH)[..., None, :]
    elif on_cpu and T == 1:  # with keys first, XLA:CPU does not transpose them
        scores_BKSGT = jax.lax.dot_general(
            k_BKSH,
            q_BKGTH,
            (((3,), (4,)), ((0, 1), (0, 1))),
            preferred_element_type=jnp.float32,
            out_sharding=rules.spec("batch", head_axes[0], key_axis, head_axes[1], "length"),
        )
        scores_BKGTS = jnp.moveaxis(scores_BKSGT, 2, 4)
    else:
        scores_BKGTS = jax.lax.dot_general(
            q_BKGTH,
            k_BKSH,
            (((4,), (3,)), ((0, 1), (0, 1))),
            preferred_element_type=jnp.float32,
            out_sharding=rules.spec("batch", *head_axes, "length", key_axis),
        )
    keep = mask.dense()[:, None, None]
    scores_BKGTS = jnp.where(keep, scale * scores_BKGTS, jnp.finfo(jnp.float32).min)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    out_BKGTH = jax.lax.dot_general(
        probs_BKGTS,
        v_BKSH,
        (((4,), (2,)), ((0, 1), (0, 1))),
        out_sharding=rules.spec("batch", *head_axes, "length", None),
    )
    return jnp.moveaxis(out_BKGTH, 3, 1)
