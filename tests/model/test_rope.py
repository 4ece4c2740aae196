"""Rotary embedding: published numbers, and every frequency rule against its formula."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import inverse_frequencies, mscale, tiny_config
from oracles import rotate as rotate_as_written

from jaxseek.config.model import ModelConfig, RopeConfig
from jaxseek.model.rope import attention_factor, frequencies, rope_table, rotate

# DeepSeek-V3: d 64, theta 1e4, factor 40, original length 4096, beta 32 and 1.
YARN_V3 = RopeConfig("yarn", 10000.0, 40.0, 4096, 32.0, 1.0, 1.0, 1.0)
YARN_V3_TABLE = {
    0: 1.0,
    1: 7.498942093e-01,
    10: 5.623413252e-02,
    11: 3.900692657e-02,
    12: 2.687936011e-02,
    13: 1.837814622e-02,
    14: 1.244795587e-02,
    15: 8.334508951e-03,
    16: 5.5e-03,
    17: 3.561997494e-03,
    18: 2.249365301e-03,
    19: 1.370513636e-03,
    20: 7.905694150e-04,
    21: 4.149903985e-04,
    22: 1.778279410e-04,
    23: 3.333803580e-05,
    24: 2.5e-05,
    31: 3.333803580e-06,
}


def rotated(x, position, interleaved, rope=None, cfg=None):
    """One vector at one position through the package, float64."""
    cfg = cfg or tiny_config("llama", hidden_size=len(x) * 4, rope=rope or RopeConfig())
    table = rope_table(cfg, jnp.full((1, 1), position, jnp.int32))
    return np.asarray(rotate(jnp.asarray(x, jnp.float32)[None, None], table, interleaved), np.float64)[0, 0]


def test_yarn_frequencies_of_v3_are_the_published_table():
    freq = frequencies(YARN_V3, 64)
    assert freq.shape == (32,)
    for i, expected in YARN_V3_TABLE.items():
        assert freq[i] == pytest.approx(expected, rel=1e-9)


def test_half_split_pairs_equal_the_worked_example():
    expected = [-1.413353, 1.879118, -2.828857, 4.058191]
    np.testing.assert_allclose(rotated([1, 2, 3, 4], 3, False), expected, atol=2e-6)


def test_interleaved_pairs_equal_the_worked_example_in_half_split_order():
    expected = [-1.272233, -1.838865, 2.878668, 4.088187]
    np.testing.assert_allclose(rotated([1, 2, 3, 4], 3, True), np.array(expected)[[0, 2, 1, 3]], atol=2e-6)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_scores_depend_on_the_distance_alone_and_equal_the_formula(interleaved):
    rng, rope = np.random.default_rng(0), RopeConfig(rope_theta=100.0)
    q, k = rng.standard_normal((2, 8))

    def score(a, b):
        return rotated(q, a, interleaved, rope) @ rotated(k, b, interleaved, rope)

    assert score(19, 12) == pytest.approx(score(7, 0), abs=1e-5)
    written = rotate_as_written(rope, q, 19, interleaved) @ rotate_as_written(rope, k, 12, interleaved)
    assert score(19, 12) == pytest.approx(written, abs=1e-5)


def test_llama3_frequencies_fall_into_three_bands():
    rope = RopeConfig("llama3", 500000.0, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    freq, base = frequencies(rope, 128), 500000.0 ** (-np.arange(64) / 64)
    wavelength = 2 * math.pi / base
    short, long = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_allclose(freq[short], base[short], rtol=1e-12)
    np.testing.assert_allclose(freq[long], base[long] / 8, rtol=1e-12)
    middle = ~short & ~long
    assert middle.any()
    assert (freq[middle] < base[middle]).all()
    assert (freq[middle] > base[middle] / 8).all()
    np.testing.assert_allclose(freq, inverse_frequencies(rope, 128), rtol=1e-12)


@given(
    kind=st.sampled_from(["default", "linear", "yarn", "llama3"]),
    dim=st.sampled_from([2, 8, 64, 128]),
    theta=st.floats(100, 1e6),
    factor=st.floats(1, 64),
    length=st.integers(16, 100_000),
)
@settings(max_examples=60, deadline=None)
def test_frequencies_of_every_rule_equal_the_formula(kind, dim, theta, factor, length):
    rope = RopeConfig(kind, theta, factor, length)
    np.testing.assert_allclose(frequencies(rope, dim), inverse_frequencies(rope, dim), rtol=1e-9)


@pytest.mark.parametrize(
    ("preset", "scale"),
    [
        ("deepseek-r1", 0.1352337789),
        ("deepseek-v2", 0.1147213868),
        ("deepseek-v2-lite", 0.1147213868),
        ("deepseek-moe-16b-base", 128**-0.5),
    ],
)
def test_softmax_scale_of_released_models(preset, scale):
    cfg = ModelConfig.from_preset(preset)
    assert cfg.softmax_scale == pytest.approx(scale, rel=1e-9)
    assert attention_factor(cfg.rope) == 1.0


def test_cos_and_sin_carry_the_ratio_of_two_different_mscales():
    rope = RopeConfig("yarn", 10000.0, 40.0, 4096, mscale=1.0, mscale_all_dim=0.707)
    assert attention_factor(rope) == pytest.approx(mscale(40.0, 1.0) / mscale(40.0, 0.707))
    cos, _ = rope_table(tiny_config("llama", rope=rope), jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(cos, attention_factor(rope), rtol=1e-6)


def test_angles_at_the_end_of_a_long_context_are_exact_to_float32():
    position, cfg = 163_839, ModelConfig.from_preset("deepseek-r1")
    cos, sin = rope_table(cfg, jnp.full((1, 1), position, jnp.int32))
    angle = position * frequencies(cfg.rope, 64)
    np.testing.assert_allclose(cos[0, 0], np.cos(angle), atol=0.02)  # 24 bits of an angle of 164,000
    np.testing.assert_allclose(sin[0, 0, 12:], np.sin(angle[12:]), atol=2e-3)
