"""The experts' grouped SwiGLU: every split of rows over experts equals a dense loop, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_close, expert

from jaxseek.ops import grouped_mlp as module
from jaxseek.ops.every_expert import every_expert_mlp
from jaxseek.ops.grouped_mlp import _gmm_mlp, _tiled_mlp, grouped_mlp
from jaxseek.ops.scaled import Scaled

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True, scope="module")
def small_shares_too():
    """Three experts share 48 rows at once and in tiles, four in tiles alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LEAST", 16)
        yield


def arrays(M, D, F, E, dtype=np.float32, seed=0):
    """x [M, D], gate and up [E, D, F], down [E, F, D], and the gradient of the output [M, D]."""
    rng = np.random.default_rng(seed)
    shapes = ((M, D), (E, D, F), (E, D, F), (E, F, D), (M, D))
    return [jnp.asarray(rng.standard_normal(s) / s[-1] ** 0.5, dtype) for s in shapes]


def written(sizes, x, gate, up, down):
    """Row by row in float64: rows past the sizes are zero."""
    x, gate, up, down = (np.asarray(a, np.float64) for a in (x, gate, up, down))
    y, row = np.zeros_like(x), 0
    for e, n in enumerate(sizes):
        y[row : row + n] = expert(gate[e], up[e], down[e], x[row : row + n])
        row += n
    return y


@jax.jit
def dense_loop(args, ids_M):
    """Every expert over every row, of which one is kept."""
    x_MD, gate_EDF, up_EDF, down_EFD = args
    y_MD = jnp.zeros_like(x_MD)
    for e in range(gate_EDF.shape[0]):
        own_MD = (jax.nn.silu(x_MD @ gate_EDF[e]) * (x_MD @ up_EDF[e])) @ down_EFD[e]
        y_MD += jnp.where(ids_M[:, None] == e, own_MD, 0)
    return y_MD


@jax.jit
def value_and_grads(args, dy_MD, sizes_E):
    y_MD, pull = jax.vjp(lambda *a: grouped_mlp(*a, sizes_E), *args)
    return y_MD, pull(dy_MD)


@jax.jit
def expected_grads(args, dy_MD, ids_M):
    return jax.vjp(dense_loop, args, ids_M)[1](dy_MD)[0]


def check(sizes, *shape):
    *args, dy = arrays(*shape)
    M, E = shape[0], shape[-1]
    y, grads = value_and_grads(tuple(args), dy, jnp.asarray(sizes, jnp.int32))
    assert_close(y, written(sizes, *args), 1e-5)
    ids_M = np.full(M, E)
    ids_M[: sum(sizes)] = np.repeat(np.arange(E), sizes)
    for got, expected in zip(grads, expected_grads(tuple(args), dy, jnp.asarray(ids_M))):
        assert_close(got, expected, 1e-5)


@pytest.mark.parametrize(
    "sizes",
    [
        (8, 16, 8, 16),
        (12, 0, 35, 1),
        (0, 48, 0, 0),
        (0, 0, 0, 48),
        (7, 0, 9, 3),
        (0, 0, 0, 0),
    ],
    ids=["whole tiles", "uneven", "all to one", "all to the last", "rows of no expert", "no rows"],
)
def test_rows_reach_their_expert_and_gradients_return(sizes):
    check(sizes, 48, 8, 12, 4)


@pytest.mark.parametrize("experts", [4, 3], ids=["in tiles", "at once and in tiles"])
@given(cuts=st.lists(st.integers(0, 48), min_size=4, max_size=4))
@settings(max_examples=30, deadline=None)
def test_any_sizes_equal_the_dense_loop(experts, cuts):
    check(np.diff([0, *sorted(cuts)])[:experts].tolist(), 48, 8, 12, experts)


def test_all_experts_compute_their_first_rows_at_once(monkeypatch):
    """Where loads are near even, no tile is left: the products of tiles, spoilt, change nothing."""
    monkeypatch.setattr(module, "_times_expert", lambda matmul, e, a, w: jnp.nan * matmul(a, w[e]))
    *args, _ = arrays(64, 8, 12, 4)
    for sizes, left in (((20, 12, 16, 16), False), ((21, 11, 16, 16), True)):
        y = _tiled_mlp(*args, jnp.array(sizes, jnp.int32))
        assert bool(jnp.isnan(y).any()) is left


@pytest.mark.parametrize(("M", "sizes"), [(1, (0, 1, 0)), (300, (70, 1, 150)), (4200, (4000, 3, 150))])
def test_fewer_rows_than_a_tile_and_wider_tiles_give_the_same(M, sizes):
    check(sizes, M, 4, 4, 3)


def test_bfloat16_gradients_of_weights_do_not_lose_rows_as_tiles_add_up():
    *args, _ = arrays(4096, 4, 4, 16)
    low = tuple(a.astype(jnp.bfloat16) for a in args)
    dy, sizes = jnp.ones((4096, 4)), jnp.array([4096] + [0] * 15, jnp.int32)
    _, got = value_and_grads(low, dy.astype(jnp.bfloat16), sizes)
    _, expected = value_and_grads(tuple(a.astype(jnp.float32) for a in low), dy, sizes)
    assert got[1].dtype == jnp.bfloat16
    for a, b in zip(got[1:], expected[1:]):
        assert_close(a.astype(jnp.float32), b, 0.006)


@pytest.mark.parametrize("groups", [1, 2])
def test_every_expert_of_few_bits_is_its_numbers(groups):
    rng = np.random.default_rng(0)
    E, D, F = 3, 4, 6

    def few_bits(inputs, outputs):
        value = rng.integers(-127, 128, (E, inputs, outputs)).astype(np.int8)
        scale = rng.uniform(0.5, 1.5, (E, groups, outputs)).astype(np.float32)
        return Scaled(jnp.asarray(value), jnp.asarray(scale)), value * scale.repeat(inputs // groups, 1)

    experts, numbers = zip(few_bits(D, F), few_bits(D, F), few_bits(F, D))
    x_ND = rng.standard_normal((5, D)).astype(np.float32) / 100
    gates_NE = rng.uniform(0, 1, (5, E)).astype(np.float32)
    gate, up, down = (w.astype(np.float64) for w in numbers)
    a, b = np.einsum("ND,EDF->ENF", x_ND, gate), np.einsum("ND,EDF->ENF", x_ND, up)
    expected = np.einsum("ENF,EFD,NE->ND", a / (1 + np.exp(-a)) * b, down, gates_NE)
    assert_close(every_expert_mlp(x_ND, gates_NE, *experts), expected, 1e-5)


@jax.numpy_dtype_promotion("standard")  # the kernel that ships with Pallas promotes freely
@pytest.mark.parametrize("clear", [True, False])
def test_the_tpu_kernel_interpreted_gives_the_same_values_and_gradients(clear):
    rng = np.random.default_rng(5)
    args = [
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((40, 16), (3, 16, 24), (3, 16, 24), (3, 24, 16))
    ]
    sizes_E, dy_MD = jnp.array([10, 0, 17], jnp.int32), jnp.asarray(rng.normal(size=(40, 16)), jnp.float32)
    results = []
    for implementation in (
        lambda *a: _gmm_mlp(*a, sizes_E, clear=clear, interpret=True),
        lambda *a: _tiled_mlp(*a, sizes_E),
    ):
        y_MD, pull = jax.vjp(implementation, *args)
        dx_MD, *dweights = pull(dy_MD)
        rows = slice(None if clear else int(sizes_E.sum()))  # the others may be anything
        results.append((y_MD[rows], dx_MD[rows], *dweights))
    for tpu, cpu in zip(*results):
        np.testing.assert_allclose(tpu, cpu, rtol=1e-5, atol=1e-5 * float(jnp.abs(cpu).max()))
