"""Attention of a row's tokens to those before them for CPU: no work above the diagonal, and few passes.

Queries are taken in a few blocks, each with the keys up to its end. Outputs are divided by the sum of
exponentials, not the exponentials themselves: XLA:CPU then makes one fusion of product, mask, exponentials
and sum, and backward they serve again. What it gains is in docs/decisions.md.
Paper: FlashAttention-2 (arXiv:2307.08691), section 3.1, for what is divided when.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCKS, LEAST = 4, 112  # at most so many blocks, of at least so many queries: each is code to compile
_MASKED = float(jnp.finfo(jnp.float32).min)


@jax.custom_vjp
def causal_attention(
    q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, keep_BTS: jax.Array
) -> jax.Array:
    """softmax(q k^T) v over the keys to keep, with float32 softmax: [B, K, G, T, value width].

    `q` is scaled already, `keep` is booleans. Where there are as many keys as queries, those after a query's
    block are not seen even if they are to be kept, as padding's are. For one device or inside shard_map.
    """
    return _fwd(q_BKGTH, k_BKSH, v_BKSH, keep_BTS)[0]


def _blocks(T: int, S: int) -> list[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that one of them may see."""
    if T != S:
        return [(slice(0, T), slice(0, S))]
    size = -(-T // max(1, min(BLOCKS, T // LEAST)))
    return [(slice(t, t + size), slice(0, min(t + size, T))) for t in range(0, T, size)]


def _dot(a: jax.Array, b: jax.Array, over_a: tuple[int, ...], over_b: tuple[int, ...]) -> jax.Array:
    """Their product, with B and K leading in both, in float32."""
    dims = (over_a, over_b), ((0, 1), (0, 1))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _fwd(q_BKGTH, k_BKSH, v_BKSH, keep_BTS):
    outs, weights, sums = [], [], []
    for t, s in _blocks(q_BKGTH.shape[3], k_BKSH.shape[2]):
        bias_BTS = jnp.where(keep_BTS[:, t, s], 0.0, _MASKED)
        scores_BKGTS = _dot(q_BKGTH[:, :, :, t], k_BKSH[:, :, s], (4,), (3,)) + bias_BTS[:, None, None]
        w_BKGTS = jnp.exp(scores_BKGTS - scores_BKGTS.max(-1, keepdims=True))
        sums.append(w_BKGTS.sum(-1, keepdims=True))
        weights.append(w_BKGTS.astype(v_BKSH.dtype))
        outs.append(_dot(weights[-1], v_BKSH[:, :, s], (4,), (2,)) / sums[-1])
    out_BKGTH = jnp.concatenate(outs, axis=3)
    return out_BKGTH.astype(v_BKSH.dtype), (q_BKGTH, k_BKSH, v_BKSH, out_BKGTH, weights, sums)


def _bwd(residuals, dout_BKGTH):
    q_BKGTH, k_BKSH, v_BKSH, out_BKGTH, weights, sums = residuals
    dout_BKGTH, dtype = dout_BKGTH.astype(jnp.float32), q_BKGTH.dtype
    along_BKGT1 = (dout_BKGTH * out_BKGTH).sum(-1, keepdims=True)
    dqs, dk_BKSH, dv_BKSH = [], jnp.zeros(k_BKSH.shape, jnp.float32), jnp.zeros(v_BKSH.shape, jnp.float32)
    for (t, s), w_BKGTS, sum_BKGT1 in zip(_blocks(q_BKGTH.shape[3], k_BKSH.shape[2]), weights, sums):
        d_BKGTH = (dout_BKGTH[:, :, :, t] / sum_BKGT1).astype(dtype)
        dw_BKGTS = _dot(d_BKGTH, v_BKSH[:, :, s], (4,), (3,)) - along_BKGT1[:, :, :, t] / sum_BKGT1
        dscores_BKGTS = (w_BKGTS.astype(jnp.float32) * dw_BKGTS).astype(dtype)
        dqs.append(_dot(dscores_BKGTS, k_BKSH[:, :, s], (4,), (2,)))
        dk_BKSH = dk_BKSH.at[:, :, s].add(_dot(dscores_BKGTS, q_BKGTH[:, :, :, t], (2, 3), (2, 3)))
        dv_BKSH = dv_BKSH.at[:, :, s].add(_dot(w_BKGTS, d_BKGTH, (2, 3), (2, 3)))
    grads = jnp.concatenate(dqs, axis=3), dk_BKSH, dv_BKSH
    return *(d.astype(a.dtype) for d, a in zip(grads, residuals)), None


causal_attention.defvjp(_fwd, _bwd)
