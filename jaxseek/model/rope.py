"""Rotary embedding: plain, linear, YaRN and Llama-3 frequencies; half-split and interleaved pairs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxseek.config.model import ModelConfig, RopeConfig, yarn_mscale

Rope = tuple[jax.Array, jax.Array]  # cos and sin, [B, T, R/2], float32


def frequencies(rope: RopeConfig, dim: int) -> np.ndarray:
    """Inverse frequencies of the dim/2 pairs, float64 (transformers modeling_rope_utils; YaRN paper, 3.2)."""
    freq = rope.rope_theta ** (-np.arange(0, dim, 2) / dim)
    match rope.rope_type:
        case "linear":
            return freq / rope.factor
        case "yarn":
            return _yarn(rope, freq, dim)
        case "llama3":
            return _llama3(rope, freq)
    return freq


def _yarn(rope: RopeConfig, freq: np.ndarray, dim: int) -> np.ndarray:
    def pair_that_turns(times: float) -> float:
        length = rope.original_max_position_embeddings
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return freq / rope.factor * ramp + freq * (1 - ramp)


def _llama3(rope: RopeConfig, freq: np.ndarray) -> np.ndarray:
    wavelength = 2 * math.pi / freq
    length, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    t = np.clip((length / wavelength - low) / (high - low), 0, 1)
    return (1 - t) * freq / rope.factor + t * freq


def attention_factor(rope: RopeConfig) -> float:
    """Factor of cos and sin: 1 for every released DeepSeek model (both mscales equal)."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


def rope_table(cfg: ModelConfig, positions_BT: jax.Array) -> Rope:
    """cos and sin of every position and pair, float32: angles of long contexts need all its digits."""
    freq = jnp.asarray(frequencies(cfg.rope, cfg.rope_dim), jnp.float32)
    angles_BTR = positions_BT.astype(jnp.float32)[..., None] * freq[None, None]
    factor = attention_factor(cfg.rope)
    return jnp.cos(angles_BTR) * factor, jnp.sin(angles_BTR) * factor


def rotate(x: jax.Array, rope: Rope, interleaved: bool) -> jax.Array:
    """Rotate the pairs of the last axis of x, [B, T, ..., R]; heads may stand between T and R.

    Pairs are (x[2p], x[2p+1]) when interleaved, else (x[p], x[p + R/2]). The result is in half-split order
    either way: queries and keys are permuted alike, and scores do not see it
    (HF apply_rotary_pos_emb_interleave).
    """
    cos, sin = (t.reshape(*t.shape[:2], *(1,) * (x.ndim - 3), t.shape[2]) for t in rope)
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
