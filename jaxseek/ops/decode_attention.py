"""Attention of one query token per row against a cache, on TPU: a Pallas flash-decode kernel.

It takes the cache of all layers, and reads the slots of one layer up to each row's position; XLA would copy
the layer's slice first. A latent without its rotary part is both key and value, and is read once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from jaxseek.ops.mask import Mask
from jaxseek.sharding.rules import Rules

_SLOTS = 1024  # of a block at the most
_LOWEST = float(jnp.finfo(jnp.float32).min)


def attend_in_cache(
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
    """Attention of one token per row in one layer of a cache, [B, 1, K, G, width], on a mesh.

    Rows are as `rules` have them, K and G by `head_axes`; over split slots, a log-sum-exp combine. Without
    `v`, the first `width` numbers of the keys are the values.
    """
    axes = rules.axes("cache_length")

    def local(q_B1KGH, k_LBKSH, v_LBKSH, layer, position_B1):
        start = k_LBKSH.shape[3] * jax.lax.axis_index(axes) if axes else 0
        found = decode_attention(
            q_B1KGH[:, 0], k_LBKSH, v_LBKSH, layer, position_B1[:, 0], scale, width, start
        )
        return combined(*found, axes, q_B1KGH.dtype)[:, None]

    queries = rules.spec("batch", None, *head_axes, None)
    cached = rules.spec(None, "batch", head_axes[0], "cache_length", None)
    return jax.shard_map(
        local,
        in_specs=(queries, cached, None if v_LBKSH is None else cached, P(), rules.spec("batch", None)),
        out_specs=queries,
        check_vma=False,  # a Pallas call does not declare over which axes its results vary
    )(q_BTKGH, k_LBKSH, v_LBKSH, jnp.asarray(layer), mask.q_pos_BT)


def decode_attention(
    q_BKGH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array | None,
    layer: jax.Array | int,
    position_B: jax.Array,
    scale: float,
    width: int,
    start: jax.Array | int = 0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of each row and head over the slots here, before the division: the sum of exp(score - most) *
    value, float32 [B, K, G, width]; the sum of the exponentials, and `most`, the highest score, [B, K, G].

    Slot s stands for position start + s; a row sees positions up to its own. Where it sees none, sums are
    zero. For one device or inside shard_map. Source: DeepSeek-V2 paper, section 2.1.2 and appendix C.
    """
    (B, K, G, H), S = q_BKGH.shape, k_LBKSH.shape[3]
    block = next((b for b in range(_SLOTS, 0, -128) if S % b == 0), S)
    rows = -(-G // 16) * 16
    q_BKGH = jnp.pad(q_BKGH, ((0, 0), (0, 0), (0, rows - G), (0, 0)))
    seen_B = jnp.clip(position_B - start + 1, 0, S).astype(jnp.int32)
    keys = [k_LBKSH] if v_LBKSH is None else [k_LBKSH, v_LBKSH]

    def cached(b, k, j, layer, seen):  # past the last slot that is seen nothing new is fetched
        return layer[0], b, k, jnp.minimum(j, jax.lax.div(jnp.maximum(seen[b] - 1, 0), block)), 0

    def row(b, k, j, layer, seen):
        return b, k, 0, 0

    found = [width, 1, 1]
    numbers = sum(-(-a.shape[-1] // 128) * 128 for a in keys)  # of a slot, in whole tiles
    z_BKGC, sum_BKG1, most_BKG1 = pl.pallas_call(
        functools.partial(_kernel, scale=scale, block=block, width=width),
        out_shape=[jax.ShapeDtypeStruct((B, K, rows, n), jnp.float32) for n in found],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, S // block),
            in_specs=[
                pl.BlockSpec((None, None, rows, H), row),
                *(pl.BlockSpec((None, None, None, block, a.shape[-1]), cached) for a in keys),
            ],
            out_specs=[pl.BlockSpec((None, None, rows, n), row) for n in found],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * K * rows * S * (H + width),
            bytes_accessed=B * K * (S * numbers * k_LBKSH.dtype.itemsize + 4 * rows * (H + width)),
            transcendentals=B * K * rows * S,
        ),
        interpret=interpret,
        name="decode_attention",
    )(jnp.asarray(layer, jnp.int32).reshape(1), seen_B, q_BKGH, *keys)
    return z_BKGC[:, :, :G], sum_BKG1[:, :, :G, 0], most_BKG1[:, :, :G, 0]


def _kernel(layer_ref, seen_ref, q_ref, k_ref, *refs, scale, block, width):
    *v_refs, z_ref, sum_ref, most_ref = refs
    b, j = pl.program_id(0), pl.program_id(2)

    @pl.when(j == 0)
    def _():
        z_ref[...], sum_ref[...] = jnp.zeros_like(z_ref), jnp.zeros_like(sum_ref)
        most_ref[...] = jnp.full_like(most_ref, _LOWEST)

    @pl.when(j * block < seen_ref[b])
    def _():
        q_GH, k_SH = q_ref[...], k_ref[...].astype(q_ref.dtype)
        v_SC = v_refs[0][...].astype(q_GH.dtype) if v_refs else k_SH[:, :width]
        score_GS = jax.lax.dot_general(
            q_GH, k_SH, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        slot_GS = j * block + jax.lax.broadcasted_iota(jnp.int32, score_GS.shape, 1)
        score_GS = jnp.where(slot_GS < seen_ref[b], scale * score_GS, _LOWEST)
        most_G1 = jnp.maximum(most_ref[...], score_GS.max(axis=1, keepdims=True))
        kept_G1, part_GS = jnp.exp(most_ref[...] - most_G1), jnp.exp(score_GS - most_G1)
        z_GC = jax.lax.dot_general(
            part_GS.astype(v_SC.dtype), v_SC, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        z_ref[...] = z_ref[...] * kept_G1 + z_GC
        sum_ref[...] = sum_ref[...] * kept_G1 + part_GS.sum(axis=1, keepdims=True)
        most_ref[...] = most_G1


def combined(
    z: jax.Array, total: jax.Array, most: jax.Array, axes: tuple[str, ...], dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Attention [..., width] from what `decode_attention` found, over the shards of the slots on `axes`."""
    if axes:
        shift = jnp.exp(most - jax.lax.pmax(most, axes))
        z, total = jax.lax.psum((z * shift[..., None], total * shift), axes)
    return (z / total[..., None]).astype(dtype)
