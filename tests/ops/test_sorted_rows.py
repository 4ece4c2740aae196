"""Rows sorted by expert and back, against a stable sort and plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close

from jaxseek.ops.sorted_rows import combine, rows_of, sorted_by_expert

pytestmark = pytest.mark.usefixtures("quick_compilation")

N, K, E, D = 20, 3, 5, 4


def routing():
    """Ids of experts, some of none, some of the same expert twice; the assignments that have one, sorted."""
    ids_NK = np.random.default_rng(0).integers(0, E + 1, (N, K))
    by_expert = [m for e in range(E) for m in range(N * K) if ids_NK.reshape(-1)[m] == e]
    return ids_NK.astype(np.int32), by_expert


def test_places_are_those_of_a_stable_sort_and_ids_of_no_expert_have_none():
    ids_NK, by_expert = routing()
    at_NK, order_M, sizes_E = sorted_by_expert(ids_NK, E)
    assert order_M[: len(by_expert)].tolist() == by_expert
    assert np.asarray(at_NK).reshape(-1)[by_expert].tolist() == list(range(len(by_expert)))
    assert (np.asarray(at_NK)[ids_NK == E] == N * K).all()
    assert sizes_E.tolist() == [(ids_NK == e).sum() for e in range(E)]


def test_copies_and_sums_and_their_gradients_do_not_read_what_has_no_place():
    rng, (ids_NK, by_expert) = np.random.default_rng(1), routing()
    x_ND, dout_ND = rng.standard_normal((2, N, D)).astype(np.float32)
    gates_NK = rng.random((N, K)).astype(np.float32)
    at_NK, order_M, _ = sorted_by_expert(ids_NK, E)
    live = len(by_expert)

    def got(x_ND, gates_NK):
        y_MD = jnp.tanh(rows_of(x_ND, at_NK, order_M)).at[live:].set(jnp.nan)
        return combine(y_MD, gates_NK, at_NK, order_M)

    def expected(x_ND, gates_NK):
        return jnp.where(ids_NK < E, gates_NK, 0).sum(1, keepdims=True) * jnp.tanh(x_ND)

    for f in (got, expected):
        out, pull = jax.vjp(f, x_ND, gates_NK)
        if f is got:
            first = out, *pull(dout_ND)
    for a, b in zip(first, (out, *pull(dout_ND))):
        assert_close(a, b, 1e-5)
