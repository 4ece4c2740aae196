"""Small numbers with scales against float64 formulas, written down here anew."""

import ml_dtypes
import numpy as np
import pytest

from jaxseek.checkpoint.models import CheckpointError
from jaxseek_convert.numbers import (
    BF16,
    F16,
    F32,
    FLOAT8,
    FP8,
    Form,
    Rows,
    change,
    decode,
    encode,
    float8,
    from_blocks,
    to_blocks,
)

INT8, INT4 = Form("int8"), Form("int4", 128)
TINY = float(np.finfo(np.float32).tiny)


def e4m3(byte):
    """The number of a byte as the format defines it: sign, 4 bits of exponent with bias 7, 3 of fraction."""
    sign, exponent, fraction = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and fraction == 7:
        return np.nan
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


GRID = np.array([e4m3(b) for b in range(0x7F)])  # from 0 to 448


def nearest_e4m3(x):
    """The bytes of the nearest of the numbers, those with an even last bit where two are as near."""
    above = np.clip(np.searchsorted(GRID, np.abs(x)), 1, len(GRID) - 1)
    low, high = np.abs(x) - GRID[above - 1], GRID[above] - np.abs(x)
    up = (high < low) | ((high == low) & (above % 2 == 0))
    return (np.where(up, above, above - 1) | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def grouped(w, form):
    """[blocks of rows, rows, groups, columns] in float64, the last ones filled up with zeros."""
    R, C = w.shape
    g, b = form.group or C, form.block
    padded = np.zeros((-(-R // b) * b, -(-C // g) * g))
    padded[:R, :C] = w
    return padded.reshape(-1, b, padded.shape[1] // g, g)


def spread(scale, form, shape):
    """A scale for each number."""
    columns = np.repeat(scale, form.group or shape[1], 1)[: shape[0], : shape[1]]
    assert columns.shape == shape
    return columns


def weights(shape, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 3, (shape[0], 1))
    return w.astype(np.float32)


@pytest.fixture(params=[(1, 1), (3, 128), (128, 130), (129, 513)], ids=str)
def w(request):
    return weights(request.param)


# ---------------------------------------------------------------- reading


def test_all_bytes_of_e4m3_are_the_numbers_of_the_format():
    byte = np.arange(256, dtype=np.uint8).reshape(2, 128)
    got = decode(Rows(byte.view(FP8), np.ones((2, 1), np.float32)), FLOAT8, F32)
    expected = np.array([e4m3(b) for b in range(256)]).reshape(2, 128)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got[:, :127]), np.signbit(expected[:, :127]))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_fp8_is_the_product_rounded_to_float32_and_then_once(dtype):
    rng = np.random.default_rng(1)
    byte = rng.integers(0, 256, (200, 300), np.uint8)
    scale = rng.uniform(1e-5, 1e-1, (200, 3)).astype(np.float32)
    got = decode(Rows(byte.view(FP8), scale), FLOAT8, dtype)
    number = np.array([e4m3(b) for b in range(256)])[byte]
    product = (number * spread(scale, FLOAT8, byte.shape).astype(np.float64)).astype(np.float32)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(np.float32), product.astype(dtype).astype(np.float32))


def test_pairs_of_four_bits_are_the_even_column_and_then_the_odd_one():
    byte = np.arange(256, dtype=np.uint8).reshape(2, 128)
    got = decode(Rows(byte, np.array([[1, 2], [3, 0.5]], np.float32)), INT4, F32)
    for i in range(256):
        row, column = divmod(i, 128)
        pair = [n - 16 if n >= 8 else n for n in (i & 15, i >> 4)]
        scale = [[1, 2], [3, 0.5]][row][column // 64]
        assert got[row, 2 * column : 2 * column + 2].tolist() == [n * scale for n in pair]


def test_int8_is_the_product_of_its_rows_scale():
    q = np.arange(-128, 128).astype(np.int8).reshape(2, 128)
    got = decode(Rows(q, np.array([[0.5], [3]], np.float32)), INT8, F32)
    np.testing.assert_array_equal(got, q * np.array([[0.5], [3]]))


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("form", [INT8, FLOAT8, float8({"weight_block_size": [5, 3]})], ids=str)
def test_the_largest_of_a_group_becomes_the_largest_and_all_are_rounded_to_nearest(form, w):
    got = encode(w, form)
    most = 127 if form.kind == "int8" else 448
    amax = np.abs(grouped(w, form)).max((1, 3)).astype(np.float32)
    scale = np.where(amax > 0, (amax / np.float32(most)).astype(np.float32), np.float32(1))
    # on some targets XLA divides by way of the reciprocal
    np.testing.assert_allclose(got.scale, np.repeat(scale, form.block, 0)[: len(w)], rtol=1.2e-7)
    ratio = (w / spread(got.scale, form, w.shape)).astype(np.float32).astype(np.float64)
    if form.kind == "int8":
        np.testing.assert_array_equal(got.values, np.rint(ratio))  # rint rounds halves to even
    else:
        np.testing.assert_array_equal(got.values.view(np.uint8), nearest_e4m3(np.clip(ratio, -448, 448)))
    assert got.values.dtype == form.dtype


def test_scales_of_ue8m0_are_the_next_power_of_two(w):
    form = float8({"scale_fmt": "ue8m0"})
    got = encode(w, form)
    exact = np.abs(grouped(w, form)).max((1, 3)) / 448
    plain = encode(w, FLOAT8).scale[::128]
    expected = 2.0 ** np.ceil(np.log2(np.where(exact > 0, plain, 1).astype(np.float64)))
    np.testing.assert_array_equal(got.scale[::128], expected)
    assert (got.scale[::128] >= plain).all()


def test_a_power_of_two_stays_what_it_is():
    w = np.full((1, 128), 448.0, np.float32) * 2.0 ** np.arange(-20, 4, dtype=np.float32)[:, None]
    got = encode(w, Form(FP8.name, 128, 1, True))
    np.testing.assert_array_equal(got.scale[:, 0], 2.0 ** np.arange(-20.0, 4))


def test_rounding_is_to_even_at_every_tie_of_e4m3():
    ties = (GRID[1:] + GRID[:-1]) / 2
    w = np.concatenate([ties, -ties, [448.0, -448.0]]).astype(np.float32)[None]
    got = encode(w, Form(FP8.name))
    assert got.scale == 1
    np.testing.assert_array_equal(got.values.view(np.uint8)[0], nearest_e4m3(w[0].astype(np.float64)))


def test_four_bits_are_no_worse_than_the_plain_scale_and_never_out_of_range():
    w = weights((64, 300), 2)
    got = encode(w, INT4)
    back = decode(got, INT4, F32).astype(np.float64)
    groups, plain = grouped(w, INT4), np.abs(grouped(w, INT4)).max((1, 3), keepdims=True) / 7
    naive = np.clip(np.rint(groups / plain), -8, 7) * plain
    error = (grouped(back, INT4) - groups) ** 2
    assert (error.sum(-1) <= ((naive - groups) ** 2).sum(-1) * (1 + 1e-5)).all()
    scale = np.abs(spread(got.scale, INT4, w.shape))
    assert (np.abs(back - w) <= 1.9 * scale).all()  # the largest may be cut off a little
    assert np.isfinite(got.scale).all()


@pytest.mark.parametrize("form", [INT8, INT4, FLOAT8, float8({"scale_fmt": "ue8m0"})], ids=str)
def test_zeros_stay_zeros(form):
    got = encode(np.zeros((130, 256), np.float32), form)
    assert (got.scale == 1).all()
    assert not decode(got, form, F32).any()


@pytest.mark.parametrize("form", [INT8, INT4, FLOAT8, float8({"scale_fmt": "ue8m0"})], ids=str)
@pytest.mark.parametrize("size", [TINY / 8, TINY, 3 * TINY, 100 * TINY, 1000 * TINY])
def test_numbers_too_small_for_a_scale_are_off_by_no_more_than_the_smallest(form, size):
    """The quotient of the smallest numbers would be a scale of zero, and those divided by it NaN."""
    w = (weights((130, 256)) > 0).astype(np.float32) * np.float32(size)
    got = encode(w, form)
    assert (np.abs(got.scale) >= TINY).all()
    back = decode(got, form, F32)
    assert np.abs(back.astype(np.float64) - w).max() <= max(TINY, 0.1 * size)


@pytest.mark.parametrize("form", [INT8, INT4, FLOAT8, float8({"scale_fmt": "ue8m0"})], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_shows_in_the_scale_of_its_group_alone(form, bad):
    w = weights((130, 256))
    w[7, 200] = bad
    scale = encode(w, form).scale
    wrong = np.zeros(scale.shape, bool)
    wrong[: form.block if form.block > 1 else None] = form.block > 1
    wrong[:, 0] = False
    if form.block == 1:
        wrong[7, -1] = True
    np.testing.assert_array_equal(np.isfinite(scale), ~wrong)


def test_the_largest_numbers_do_not_overflow():
    w = np.full((2, 128), np.finfo(np.float32).max, np.float32)
    for form in (INT8, INT4, FLOAT8):
        np.testing.assert_allclose(decode(encode(w, form), form, F32), w, rtol=1e-6)


def test_a_form_of_its_own_is_not_touched_and_others_are_rounded_once():
    w = weights((5, 128))
    for form in (INT8, INT4, FLOAT8):
        rows = encode(w, form)
        assert change(rows, form, form) is rows
        half = change(rows, form, Form(BF16.name)).values
        assert half.dtype == BF16
        np.testing.assert_array_equal(
            half.astype(np.float32), decode(rows, form, F32).astype(BF16).astype(np.float32)
        )
    tiny = np.array([TINY / 2, 1 + 2**-9, -0.0, np.nan, np.inf], np.float32)[None]
    for kind in (BF16, F16):
        got = change(Rows(tiny), Form(F32.name), Form(kind.name)).values
        np.testing.assert_array_equal(got.view(np.uint16), tiny.astype(kind).view(np.uint16))


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize(("rows", "block"), [(576, 128), (100, 128), (17, 5), (12, 1), (128, 128)])
def test_scales_of_blocks_are_those_of_their_rows_and_back(rows, block):
    form = float8({"weight_block_size": [block, 4]})
    blocks = np.random.default_rng(0).standard_normal((-(-rows // block), 3)).astype(np.float32)
    blocks[0, 0], blocks[0, 1], blocks[0, 2] = np.nan, -0.0, np.inf
    each = from_blocks(blocks, 0, rows, form.block)
    for i in range(rows):
        assert each[i].tobytes() == blocks[i // block].tobytes()
    assert to_blocks(each, form).tobytes() == blocks.tobytes()
    for first in range(0, rows, 7):
        part = from_blocks(blocks[first // block :], first % block, min(9, rows - first), form.block)
        assert part.tobytes() == each[first : first + 9].tobytes()


def test_rows_of_a_block_with_scales_of_their_own_are_refused():
    scale = np.ones((128, 2), np.float32)
    scale[3, 1] = 2
    with pytest.raises(
        CheckpointError, match=r"other scales for the rows of a block of 128: .* \(--dtype bf16\)"
    ):
        to_blocks(scale, FLOAT8)


def test_scales_of_other_dtypes_are_their_numbers():
    for dtype in (BF16, F16, np.dtype(ml_dtypes.float8_e8m0fnu)):
        blocks = np.array([[0.5, 2, 2.0**-9]]).astype(dtype)
        np.testing.assert_array_equal(from_blocks(blocks, 0, 3, FLOAT8.block), [[0.5, 2, 2.0**-9]] * 3)
