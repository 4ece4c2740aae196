"""Absorbed latent attention of one query token per row against a cache, on TPU: a Pallas flash-decode kernel.

The latent of a token is its key and, but for the rotary part, its value, so it is read once. The kernel is
given the cache of all layers, and reads the slots of one layer up to each row's position.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from jaxseek.kernels.attention import Mask
from jaxseek.sharding import Rules, platform

_SLOTS = 1024  # of a block at the most
_LOWEST = float(jnp.finfo(jnp.float32).min)


def serves(q_BTNA: jax.Array, mask: Mask) -> bool:
    """Whether the kernel is to be used: on TPU, with a query token per row that sees all keys up to it."""
    return platform() == "tpu" and q_BTNA.shape[1] == 1 and mask.chosen_BTS is None


def attend_latent(
    q_BTNA: jax.Array,
    latent_LBSA: jax.Array,
    layer: jax.Array | int,
    mask: Mask,
    scale: float,
    width: int,
    rules: Rules,
    interpret: bool = False,
) -> jax.Array:
    """Attention of one token per row to the first `width` numbers of the latents [B, 1, N, width], on a mesh;
    rows and heads as `rules` have them. Over split slots, a log-sum-exp combine."""
    axes = rules.axes("cache_length")

    def local(q_B1NA, latent_LBSA, layer, position_B1):
        start = latent_LBSA.shape[2] * jax.lax.axis_index(axes) if axes else 0
        args = (q_B1NA[:, 0], latent_LBSA, layer, position_B1[:, 0], scale, width, start, interpret)
        return combined(*decode_attention(*args), axes, q_B1NA.dtype)[:, None]

    queries = rules.spec("batch", None, "heads", None)
    cached = rules.spec(None, "batch", "cache_length", None)
    return jax.shard_map(
        local,
        in_specs=(queries, cached, P(), rules.spec("batch", None)),
        out_specs=queries,
        check_vma=False,  # a Pallas call does not declare over which axes its results vary
    )(q_BTNA, latent_LBSA, jnp.asarray(layer), mask.q_pos_BT)


def decode_attention(
    q_BNA: jax.Array,
    latent_LBSA: jax.Array,
    layer: jax.Array | int,
    position_B: jax.Array,
    scale: float,
    width: int,
    start: jax.Array | int = 0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of every row and head: sum over slots of exp(score - most) * latent[:width], float32 [B, N, width]; the
    sum of the exponentials and the most, float32 [B, N]. The first over the second is attention.

    Slot s stands for position start + s; a row sees positions up to its own. Where it sees none, sums are
    zero. For one device or inside shard_map. Source: DeepSeek-V2 paper, section 2.1.2 and appendix C.
    """
    (B, N, A), (_, _, S, _) = q_BNA.shape, latent_LBSA.shape
    block = next(b for b in range(min(_SLOTS, S), 0, -1) if S % b == 0 and (b % 128 == 0 or b == S))
    rows = -(-N // 16) * 16  # heads
    q_BNA = jnp.pad(q_BNA, ((0, 0), (0, rows - N), (0, 0)))
    seen_B = jnp.clip(position_B - start + 1, 0, S).astype(jnp.int32)

    def cached(b, j, layer, seen):  # past the last slot that is seen nothing new is fetched
        return layer[0], b, jnp.minimum(j, jnp.maximum(seen[b] - 1, 0) // block), 0

    def row(b, j, layer, seen):
        return b, 0, 0

    lanes = -(-A // 128) * 128
    z_BNC, sum_BN1, most_BN1 = pl.pallas_call(
        functools.partial(_kernel, scale=scale, block=block, width=width),
        out_shape=[jax.ShapeDtypeStruct((B, rows, n), jnp.float32) for n in (width, 1, 1)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, S // block),
            in_specs=[pl.BlockSpec((None, rows, A), row), pl.BlockSpec((None, None, block, A), cached)],
            out_specs=[pl.BlockSpec((None, rows, n), row) for n in (width, 1, 1)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * rows * S * (A + width),
            bytes_accessed=B * S * lanes * latent_LBSA.dtype.itemsize + 4 * B * rows * (A + width),
            transcendentals=B * rows * S,
        ),
        interpret=interpret,
        name="latent_attention",
    )(jnp.asarray(layer, jnp.int32).reshape(1), seen_B, q_BNA, latent_LBSA)
    return z_BNC[:, :N], sum_BN1[:, :N, 0], most_BN1[:, :N, 0]


def _kernel(layer_ref, seen_ref, q_ref, latent_ref, z_ref, sum_ref, most_ref, *, scale, block, width):
    b, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def _():
        z_ref[...], sum_ref[...] = jnp.zeros_like(z_ref), jnp.zeros_like(sum_ref)
        most_ref[...] = jnp.full_like(most_ref, _LOWEST)

    @pl.when(j * block < seen_ref[b])
    def _():
        q_NA, latent_SA = q_ref[...], latent_ref[...].astype(q_ref.dtype)
        score_NS = jax.lax.dot_general(
            q_NA, latent_SA, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        slot_NS = j * block + jax.lax.broadcasted_iota(jnp.int32, score_NS.shape, 1)
        score_NS = jnp.where(slot_NS < seen_ref[b], scale * score_NS, _LOWEST)
        most_N1 = jnp.maximum(most_ref[...], score_NS.max(axis=1, keepdims=True))
        kept_N1, part_NS = jnp.exp(most_ref[...] - most_N1), jnp.exp(score_NS - most_N1)
        value_SC = latent_SA[:, :width]
        z_NC = jax.lax.dot_general(
            part_NS.astype(value_SC.dtype), value_SC, (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        z_ref[...] = z_ref[...] * kept_N1 + z_NC
        sum_ref[...] = sum_ref[...] * kept_N1 + part_NS.sum(axis=1, keepdims=True)
        most_ref[...] = most_N1


def combined(
    z_BNC: jax.Array,
    sum_BN: jax.Array,
    most_BN: jax.Array,
    axes: tuple[str, ...],
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Attention [B, N, width] from what `decode_attention` found, over the shards of the slots on `axes`."""
    if axes:
        shift_BN = jnp.exp(most_BN - jax.lax.pmax(most_BN, axes))
        z_BNC, sum_BN = jax.lax.psum((z_BNC * shift_BN[..., None], sum_BN * shift_BN), axes)
    return (z_BNC / sum_BN[..., None]).astype(dtype)
