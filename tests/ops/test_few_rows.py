"""Products of few rows, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close

from jaxseek.ops.few_rows import FEW, OPTIONS, product_by_output, product_of_few

pytestmark = pytest.mark.usefixtures("quick_compilation")

compiled = jax.jit(product_of_few, compiler_options=OPTIONS)


def operands(*shapes, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


@pytest.mark.parametrize("rows", range(1, FEW + 1))
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 40), (6, 24), (7, 33), (1, 1)])
def test_each_row_is_multiplied_with_each_output(rows, outputs, inputs):
    x_MI, w_OI = operands((rows, inputs), (outputs, inputs))
    assert_close(compiled(x_MI, w_OI), np.float64(x_MI) @ np.float64(w_OI).T, 1e-6)


@pytest.mark.parametrize("rows", [1, 3, 5, 8])
def test_leading_axes_are_products_of_their_own(rows):
    x_ABMI, w_ABOI = operands((2, 3, rows, 16), (2, 3, 12, 16))
    expected = np.einsum("abmi,aboi->abmo", np.float64(x_ABMI), np.float64(w_ABOI))
    assert_close(compiled(x_ABMI, w_ABOI), expected, 1e-6)


def test_bfloat16_is_multiplied_exactly_and_summed_in_float32():
    x_MI, w_OI = operands((3, 256), (8, 256), dtype=jnp.bfloat16)
    expected = np.float64(x_MI) @ np.float64(w_OI).T
    assert_close(compiled(x_MI, w_OI), expected, 1e-6)


@pytest.mark.parametrize("rows", [3, 6, 8])
def test_a_large_matrix_is_multiplied_in_blocks(rows, monkeypatch):
    monkeypatch.setattr("jaxseek.ops.few_rows._BLOCK", 576)
    x_MI, w_OI = operands((rows, 8), (576, 8))
    program = jax.jit(lambda x, w: product_of_few(x, w), compiler_options=OPTIONS)
    assert ("while" in program.lower(x_MI, w_OI).as_text()) == (rows > 4)
    assert_close(program(x_MI, w_OI), np.float64(x_MI) @ np.float64(w_OI).T, 1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_no_number_leaves_the_others_alone(bad):
    x_MI, w_OI = operands((6, 32), (16, 32))
    expected = np.array(compiled(x_MI, w_OI))
    got = np.array(compiled(x_MI.at[2, 5].set(bad), w_OI))
    assert not np.isfinite(got[2]).any()
    np.testing.assert_array_equal(np.delete(got, 2, 0), np.delete(expected, 2, 0))


@pytest.mark.parametrize("rows", [FEW, FEW + 1, 40])
def test_more_rows_have_the_same_product(rows):
    x_MI, w_OI = operands((rows, 24), (10, 24))
    assert_close(product_by_output(x_MI, w_OI), np.float64(x_MI) @ np.float64(w_OI).T, 1e-6)
