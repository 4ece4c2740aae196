"""Rounding to FP8: tiles and blocks as the paper scales them."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxseek.ops import fp8
from jaxseek.ops.grouped_mlp import grouped_mlp

round_tiles = jax.jit(fp8.round_tiles)
round_blocks = jax.jit(fp8.round_blocks, static_argnames="lead")
round_gradient = jax.jit(fp8.round_gradient)


def e4m3(x, amax):
    """Spec: scale = max(amax, 1e-4) / 448, q = e4m3(x / scale)."""
    scale = np.float32(max(amax, 1e-4)) / np.float32(448)
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def tiles(x):
    """1 x 128 along the last axis, by a plain loop."""
    out = np.empty_like(x)
    for at in np.ndindex(*x.shape[:-1]):
        for k in range(0, x.shape[-1], 128):
            part = x[at][k : k + 128]
            out[at][k : k + 128] = e4m3(part, np.abs(part).max())
    return out


def blocks(w):
    """128 x 128 of a matrix, by a plain loop."""
    out = np.empty_like(w)
    for i in range(0, w.shape[0], 128):
        for j in range(0, w.shape[1], 128):
            part = w[i : i + 128, j : j + 128]
            out[i : i + 128, j : j + 128] = e4m3(part, np.abs(part).max())
    return out


def same(got, expected):
    """But for the last bit of the scale."""
    np.testing.assert_allclose(got, expected, rtol=3e-7)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("width", [64, 128, 300])
def test_activations_are_rounded_in_tiles_of_128_channels(width):
    x = normal(3, 5, width) * np.exp(3 * normal(3, 5, 1, seed=1))
    same(round_tiles(jnp.asarray(x)), tiles(x))


@pytest.mark.parametrize("shape", [(128, 256), (200, 130), (40, 50)])
def test_weights_are_rounded_in_blocks_of_128_x_128(shape):
    w = normal(*shape)
    same(round_blocks(jnp.asarray(w)), blocks(w))


def test_heads_count_as_columns_and_experts_each_by_themselves():
    w = normal(130, 4, 50)
    same(round_blocks(jnp.asarray(w)), blocks(w.reshape(130, 200)).reshape(w.shape))
    e = normal(3, 140, 60)
    same(round_blocks(jnp.asarray(e), lead=1), np.stack([blocks(m) for m in e]))


def test_tiny_values_are_scaled_by_the_floor():
    x = np.full((1, 128), 1e-6, np.float32)
    same(round_tiles(jnp.asarray(x)), e4m3(x, 1e-6))


def test_gradients_pass_the_rounding_of_values_and_are_rounded_where_asked():
    x, dy = normal(2, 256), normal(2, 256, seed=1)
    (dx,) = jax.vjp(round_tiles, jnp.asarray(x))[1](jnp.asarray(dy))
    np.testing.assert_array_equal(dx, dy)
    (dx,) = jax.vjp(round_gradient, jnp.asarray(x))[1](jnp.asarray(dy))
    same(dx, tiles(dy))


def test_experts_multiply_rounded_rows():
    x, gate, up, down = (
        normal(10, 32),
        normal(2, 32, 16, seed=1),
        normal(2, 32, 16, seed=2),
        normal(2, 16, 32),
    )
    sizes, expected = np.array([4, 6]), np.empty_like(x)
    for e, rows in enumerate((slice(0, 4), slice(4, 10))):
        a = tiles(x[rows])
        g = a @ gate[e]
        expected[rows] = tiles(g / (1 + np.exp(-g)) * (a @ up[e])) @ down[e]
    args = map(jnp.asarray, (x, gate, up, down, sizes))
    got = jax.jit(functools.partial(grouped_mlp, fp8=True))(*args)
    # a hidden value beside a rounding boundary may fall on its other side
    assert np.median(np.abs(got - expected) / np.abs(expected).max()) < 1e-6
    np.testing.assert_allclose(got, expected, atol=0.05 * np.abs(expected).max())
