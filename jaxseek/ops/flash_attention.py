"""Attention that never writes scores to memory: Pallas kernels for TPU, forward and backward.

Who attends to whom is decided by positions and segments, element by element, so packed rows, left padding and
a shard of a longer sequence are all the same case; blocks of which no query sees a key are neither read nor
multiplied. Scores stand with keys first, [S, T]: maxima and sums over keys are then sums of registers, and
what belongs to a query is a row. Backward, one kernel makes all three gradients from scores computed once.
Paper: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

QUERIES, KEYS = 1024, 512  # of a block
QUERIES_BACKWARD = 8192  # at a time: a head's gradient for them stays in the core's memory
_VMEM = 64 * 2**20
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that exp(masked - masked) is not NaN
_NN, _NT, _TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def flash_attention(
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    q_pos_BT: jax.Array,
    q_seg_BT: jax.Array,
    kv_pos_BS: jax.Array,
    kv_seg_BS: jax.Array,
    q_prefix_BT: jax.Array | None,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale * q k^T) v over keys of the same segment that are not later: [B, K, G, T, value width].

    With `q_prefix_BT` also over keys of the segment named there. Segments are not negative. A query without
    any key gets some finite result, and gives no gradient. For one device or inside shard_map.
    """
    args = (q_BKGTH, k_BKSH, v_BKSH, q_pos_BT, q_seg_BT, kv_pos_BS, kv_seg_BS, q_prefix_BT)
    return _fwd(*args, scale, interpret)[0]


# -------------------------------------------------------------------- blocks


def _block(length: int, most: int) -> int:
    """Queries or keys of a block: a power of two times 128, no more than the length needs."""
    return min(most, 128 * pl.next_power_of_2(pl.cdiv(length, 128)))


def _padded(a: jax.Array, axis: int, block: int, value: int = 0) -> jax.Array:
    pad = [(0, 0)] * a.ndim
    pad[axis] = (0, -a.shape[axis] % block)
    return jnp.pad(a, pad, constant_values=value)


def _run(a_BX: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The least and the largest of every block, each [B, blocks]."""
    cut = a_BX.reshape(a_BX.shape[0], -1, block)
    return cut.min(axis=2), cut.max(axis=2)


def _seen(q_pos_BT, q_segs_BT, kv_pos_BS, kv_seg_BS, bq: int, bk: int) -> jax.Array:
    """Mask of the pairs of blocks [B, i, j] in which a query may see a key; no pair that counts is left out.

    `q_segs_BT` are the segments that a query sees: one or two for each.
    """
    _, q_last = _run(q_pos_BT, bq)
    kv_first, _ = _run(kv_pos_BS, bk)
    kv_low, kv_high = (a[:, None, :] for a in _run(kv_seg_BS, bk))
    of_segments = ([a[:, :, None] for a in _run(seg_BT, bq)] for seg_BT in q_segs_BT)
    meet = [(kv_low <= q_high) & (q_low <= kv_high) for q_low, q_high in of_segments]
    return (kv_first[:, None, :] <= q_last[:, :, None]) & functools.reduce(jnp.logical_or, meet)


def _cost(args: tuple, pairs: float, widths: int, vector: int, moved: float) -> pl.CostEstimate:
    """Cost of the scores of `pairs`, whose products have `widths` in total.

    Flops are what the matrix unit does, whose sides are 128 wide. The `vector` operations on each score are
    counted as if nothing overlapped, as the flops that a v5e or v5p could have done in that time: 32.
    """
    flops = int(pairs * (2 * widths + 32 * vector))
    bytes_accessed = int(sum(a.size * a.dtype.itemsize for a in args) + moved)
    return pl.CostEstimate(flops=flops, bytes_accessed=bytes_accessed, transcendentals=int(pairs))


def _pairs(T: int, S: int, bq: int, bk: int) -> int:
    """Scores of all blocks that a causal mask leaves, of one segment; all there are where T is not S."""
    count = sum(min(S, -(-(i + bq) // bk) * bk) if T == S else S for i in range(0, T, bq))
    return bq * count


def _mxu(*widths: int) -> int:
    return sum(128 * pl.cdiv(w, 128) for w in widths)


def _dot(a: Any, b: Any, dims: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _scores(q_ref: Any, k_ref: Any, masks: Any, scale: float) -> tuple[jax.Array, jax.Array]:
    """Scaled scores of a block, [S, T], and which of them count."""
    kv_pos_ref, kv_seg_ref, q_pos_ref, *q_seg_refs = masks
    same_ST = functools.reduce(jnp.logical_or, [kv_seg_ref[...] == ref[...] for ref in q_seg_refs])
    return scale * _dot(k_ref[...], q_ref[...], _NT), (kv_pos_ref[...] <= q_pos_ref[...]) & same_ST


class _Call:
    """Shared by both kernels: operands padded to blocks, the blocks of the grid, and the pairs that count."""

    def __init__(self, q_BKGTH, k_BKSH, v_BKSH, q_pos_BT, q_seg_BT, kv_pos_BS, kv_seg_BS, q_prefix_BT):
        self.B, self.K, self.G, self.T, self.H = q_BKGTH.shape
        self.S, self.V = v_BKSH.shape[2:]
        self.bq, self.bk = _block(self.T, QUERIES), _block(self.S, KEYS)
        self.N = self.B * self.K * self.G
        q_pos_BT = _padded(q_pos_BT, 1, self.bq)
        q_segs_BT = [_padded(a, 1, self.bq, -1) for a in (q_seg_BT, q_prefix_BT) if a is not None]
        kv_pos_BS, kv_seg_BS = (_padded(a, 1, self.bk, v) for a, v in ((kv_pos_BS, 2**30), (kv_seg_BS, -2)))
        self.nq, self.nk = q_pos_BT.shape[1] // self.bq, kv_pos_BS.shape[1] // self.bk
        self.seen_Bij = _seen(q_pos_BT, q_segs_BT, kv_pos_BS, kv_seg_BS, self.bq, self.bk)
        self.queries = [a[:, None] for a in (q_pos_BT, *q_segs_BT)]  # rows
        self.keys = [a[..., None] for a in (kv_pos_BS, kv_seg_BS)]  # columns
        self.operands = self.heads(q_BKGTH), self.rows(k_BKSH), self.rows(v_BKSH), *self.keys, *self.queries
        self.pairs = self.N * _pairs(self.nq * self.bq, self.nk * self.bk, self.bq, self.bk)

    def heads(self, a_BKGTX: jax.Array) -> jax.Array:
        return _padded(a_BKGTX.reshape(self.N, self.T, -1), 1, self.bq)

    def rows(self, a_BKSX: jax.Array) -> jax.Array:
        return _padded(a_BKSX.reshape(self.B * self.K, self.S, -1), 1, self.bk)

    def specs(self, i: Any, j: Any) -> list[pl.BlockSpec]:
        """BlockSpecs of the operands; i and j map grid indices to the block of queries and of keys."""
        group, row, spec = self.G, self.K * self.G, pl.BlockSpec
        q_row = spec((None, 1, self.bq), lambda n, a, b, *t: (n // row, 0, i(n, a, b, *t)))
        kv_column = spec((None, self.bk, 1), lambda n, a, b, *t: (n // row, j(n, a, b, *t), 0))
        return [
            spec((None, self.bq, self.H), lambda n, a, b, *t: (n, i(n, a, b, *t), 0)),
            spec((None, self.bk, self.H), lambda n, a, b, *t: (n // group, j(n, a, b, *t), 0)),
            spec((None, self.bk, self.V), lambda n, a, b, *t: (n // group, j(n, a, b, *t), 0)),
            kv_column, kv_column, *(q_row for _ in self.queries),
        ]  # fmt: skip

    def at(self, n: Any, i: Any, j: Any) -> Any:
        """Index of a pair of blocks in `table`."""
        return ((n // (self.K * self.G)) * self.nq + i) * self.nk + j

    def table(self, axis: int) -> tuple[jax.Array, jax.Array]:
        """Two flat tables over the pairs of blocks: 1 if the pair counts; and the block to have at hand along
        `axis` (1: queries, 2: keys), which changes only at pairs that count."""
        number_Bij = jax.lax.broadcasted_iota(jnp.int32, self.seen_Bij.shape, axis)
        at_hand_Bij = jax.lax.cummax(jnp.where(self.seen_Bij, number_Bij, 0), axis)
        return self.seen_Bij.astype(jnp.int32).reshape(-1), at_hand_Bij.reshape(-1)

    def run(self, kernel, grid, specs, out_specs, out_shape, scratch, cost, interpret, tables, args):
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(tables),
                in_specs=specs,
                out_specs=out_specs,
                grid=grid,
                scratch_shapes=scratch,
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
            ),
            cost_estimate=cost,
            interpret=interpret,
        )(*tables, *args)


# -------------------------------------------------------------------- forward


def _fwd(q, k, v, q_pos, q_seg, kv_pos, kv_seg, q_prefix, scale, interpret):
    call = _Call(q, k, v, q_pos, q_seg, kv_pos, kv_seg, q_prefix)
    bq, nk, V = call.bq, call.nk, call.V

    def kernel(seen_ref, _, q_ref, k_ref, v_ref, *refs):
        *masks, out_ref, lse_ref, max_1T, sum_1T, out_VT = refs
        n, i, j = (pl.program_id(x) for x in range(3))

        @pl.when(j == 0)
        def start():
            max_1T[...] = jnp.full_like(max_1T, _MASKED)
            sum_1T[...] = jnp.zeros_like(sum_1T)
            out_VT[...] = jnp.zeros_like(out_VT)

        @pl.when(seen_ref[call.at(n, i, j)] > 0)
        def block():
            s_ST, keep_ST = _scores(q_ref, k_ref, masks, scale)
            s_ST = jnp.where(keep_ST, s_ST, _MASKED)
            most_1T = jnp.maximum(max_1T[...], s_ST.max(axis=0, keepdims=True))
            p_ST, shrink_1T = jnp.exp(s_ST - most_1T), jnp.exp(max_1T[...] - most_1T)
            max_1T[...] = most_1T
            sum_1T[...] = shrink_1T * sum_1T[...] + p_ST.sum(axis=0, keepdims=True)
            out_VT[...] = shrink_1T * out_VT[...] + _dot(v_ref[...], p_ST.astype(v_ref.dtype), _TN)

        @pl.when(j == nk - 1)
        def end():
            total_1T = jnp.where(sum_1T[...] == 0, 1, sum_1T[...])
            out_ref[...] = (out_VT[...] / total_1T).T.astype(out_ref.dtype)
            lse_ref[...] = max_1T[...] + jnp.log(total_1T)

    seen, at_hand = call.table(2)
    rows = call.nq * bq
    out, lse = call.run(
        kernel,
        (call.N, call.nq, nk),
        call.specs(lambda n, i, j, *_: i, lambda n, i, j, _, at_hand: at_hand[call.at(n, i, j)]),
        [
            pl.BlockSpec((None, bq, V), lambda n, i, j, *_: (n, i, 0)),
            pl.BlockSpec((None, 1, bq), lambda n, i, j, *_: (n, 0, i)),
        ],
        [
            jax.ShapeDtypeStruct((call.N, rows, V), q.dtype),
            jax.ShapeDtypeStruct((call.N, 1, rows), jnp.float32),
        ],
        [pltpu.VMEM(s, jnp.float32) for s in ((1, bq), (1, bq), (V, bq))],
        _cost(
            (q,), call.pairs, _mxu(call.H, V), 10,
            call.N * rows * V * q.dtype.itemsize + call.pairs / bq * (call.H + V) * k.dtype.itemsize,
        ),
        interpret,
        (seen, at_hand),
        call.operands,
    )  # fmt: skip
    out = out[:, : call.T].reshape(*q.shape[:4], V)
    out, lse = (checkpoint_name(a, "attended") for a in (out, lse[:, :, : call.T]))
    return out, (q, k, v, q_pos, q_seg, kv_pos, kv_seg, q_prefix, out, lse)


# -------------------------------------------------------------------- backward


def _bwd(scale, interpret, residuals, dout_BKGTV):
    q, k, v, q_pos, q_seg, kv_pos, kv_seg, q_prefix, out, lse_N1T = residuals
    own_BKGT = (out.astype(jnp.float32) * dout_BKGTV.astype(jnp.float32)).sum(-1)
    own_N1T, T = own_BKGT.reshape(lse_N1T.shape), q.shape[3]
    parts, whole = [], T <= QUERIES_BACKWARD
    for t in range(0, T, QUERIES_BACKWARD):
        cut = slice(t, t + QUERIES_BACKWARD)
        prefix = None if q_prefix is None else q_prefix[:, cut]
        call = _Call(q[..., cut, :], k, v, q_pos[:, cut], q_seg[:, cut], kv_pos, kv_seg, prefix)
        rows = dout_BKGTV[..., cut, :], lse_N1T[..., cut], own_N1T[..., cut]
        parts.append(_gradients(call, *rows, scale, q.dtype, whole, interpret))
    dqs, dks, dvs = zip(*parts)
    dk, dv = (functools.reduce(jnp.add, grads).astype(k.dtype) for grads in (dks, dvs))
    return jnp.concatenate(dqs, axis=3), dk, dv, None, None, None, None, None


def _gradients(call: _Call, dout_BKGTV, lse_N1T, own_N1T, scale, dtype, whole, interpret):
    """Gradients of some queries, and of all keys and values: these in float32 where more are added."""
    bq, bk, nq, nk, G, H, V = call.bq, call.bk, call.nq, call.nk, call.G, call.H, call.V
    of_keys = dtype if whole and G == 1 else jnp.float32

    def kernel(seen_ref, _, q_ref, k_ref, v_ref, *refs):
        *masks, dout_ref, lse_ref, own_ref, dq_ref, dk_ref, dv_ref, dq_iHT, dk_SH, dv_SV = refs
        n, j, i = (pl.program_id(x) for x in range(3))

        @pl.when(i == 0)
        def start():
            dk_SH[...] = jnp.zeros_like(dk_SH)
            dv_SV[...] = jnp.zeros_like(dv_SV)

        @pl.when(j == 0)
        def start_queries():
            dq_iHT[i] = jnp.zeros_like(dq_iHT[i])

        @pl.when(seen_ref[call.at(n, i, j)] > 0)
        def block():
            s_ST, keep_ST = _scores(q_ref, k_ref, masks, scale)
            p_ST = jnp.where(keep_ST, jnp.exp(s_ST - lse_ref[...]), 0)
            dout_TV = dout_ref[...]
            dv_SV[...] += _dot(p_ST.astype(dout_TV.dtype), dout_TV, _NN)
            dp_ST = _dot(v_ref[...], dout_TV, _NT)
            ds_ST = (scale * p_ST * (dp_ST - own_ref[...])).astype(q_ref.dtype)
            dk_SH[...] += _dot(ds_ST, q_ref[...], _NN)
            dq_iHT[i] += _dot(k_ref[...], ds_ST, _TN)

        @pl.when(i == nq - 1)
        def end():
            dk_ref[...] = dk_SH[...].astype(dk_ref.dtype)
            dv_ref[...] = dv_SV[...].astype(dv_ref.dtype)

        @pl.when(j == nk - 1)
        def end_queries():
            dq_ref[...] = dq_iHT[i].T.astype(dq_ref.dtype)

    seen, at_hand = call.table(1)

    def queries(n, j, i, _, at_hand):
        return at_hand[call.at(n, i, j)]

    def keys(n, j, i, *_):
        return j

    of_query = pl.BlockSpec((None, 1, bq), lambda n, j, i, *t: (n, 0, queries(n, j, i, *t)))
    specs = [
        *call.specs(queries, keys),
        pl.BlockSpec((None, bq, V), lambda n, j, i, *t: (n, queries(n, j, i, *t), 0)),
        of_query,
        of_query,
    ]
    rows, columns = nq * bq, nk * bk
    dq, dk, dv = call.run(
        kernel,
        (call.N, nk, nq),
        specs,
        [
            # written in the last turn over the queries; until then block 0 waits
            pl.BlockSpec((None, bq, H), lambda n, j, i, *_: (n, jnp.where(j == nk - 1, i, 0), 0)),
            pl.BlockSpec((None, bk, H), lambda n, j, i, *_: (n, j, 0)),
            pl.BlockSpec((None, bk, V), lambda n, j, i, *_: (n, j, 0)),
        ],
        [
            jax.ShapeDtypeStruct((call.N, rows, H), dtype),
            jax.ShapeDtypeStruct((call.N, columns, H), of_keys),
            jax.ShapeDtypeStruct((call.N, columns, V), of_keys),
        ],
        [pltpu.VMEM(s, jnp.float32) for s in ((nq, H, bq), (bk, H), (bk, V))],
        _cost(
            call.operands[1:3], call.pairs, _mxu(H, H, H, V, V), 14,
            call.N * (rows + columns) * (H + V) * 2 + call.pairs / bk * (H + V) * 2,
        ),
        interpret,
        (seen, at_hand),
        (*call.operands, call.heads(dout_BKGTV), *(_padded(a, 2, bq) for a in (lse_N1T, own_N1T))),
    )  # fmt: skip
    dq = dq[:, : call.T].reshape(call.B, call.K, G, call.T, H)
    dk, dv = (
        a[:, : call.S].reshape(call.B, call.K, G, call.S, -1).sum(2) if G > 1
        else a[:, : call.S].reshape(call.B, call.K, call.S, -1)
        for a in (dk, dv)
    )  # fmt: skip
    return dq, dk, dv


flash_attention.defvjp(_fwd, _bwd)
