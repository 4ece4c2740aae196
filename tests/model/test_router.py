"""The routers of V1, V2 and V3: worked examples, the traps, and random configurations against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import affinity, route, tiny_config

from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.moe import choose_experts

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOGITS = np.array([0.5, -1, 2, 0.1, 1.5, -0.3, 0, 0.9])
BIAS = np.array([0, 0.3, -0.2, 0, 0.1, 0, -0.5, 0.05])
GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
V3 = tiny_config("v3", **GROUPS, routed_scaling_factor=2.5)
V2 = tiny_config("v2", **GROUPS, routed_scaling_factor=16.0)
V1 = tiny_config("v1")


def choose(cfg, logits, bias=None):
    bias = None if bias is None else jnp.asarray(bias, jnp.float32)
    ids, gates = jax.jit(choose_experts, static_argnums=0)(cfg, jnp.asarray(logits, jnp.float32), bias)
    assert gates.dtype == jnp.float32
    return np.asarray(ids), np.asarray(gates, np.float64)


def logits_of(scores):
    """Logits whose sigmoid these are."""
    scores = np.asarray(scores)
    return np.log(scores / (1 - scores))


def test_v3_router_equals_the_worked_example():
    ids, gates = choose(V3, LOGITS, BIAS)
    assert ids.tolist() == [4, 2, 3]
    np.testing.assert_allclose(gates, [0.919304, 0.990394, 0.590302], atol=1e-6)


def test_v2_router_equals_the_worked_example():
    ids, gates = choose(V2, LOGITS)
    assert ids.tolist() == [2, 4, 3]
    np.testing.assert_allclose(gates, [6.159812, 3.736115, 0.921315], rtol=1e-6)


def test_v1_router_weighs_by_the_plain_softmax():
    ids, gates = choose(V1, LOGITS)
    assert ids.tolist() == [2, 4, 7]
    np.testing.assert_allclose(gates, [0.384988, 0.233507, 0.128151], atol=1e-6)


def test_kept_experts_with_negative_biased_scores_beat_those_of_dropped_groups():
    bias = np.full(8, -2.0)
    bias[:4] = -0.5  # groups 0 and 1 are kept; a mask of zeros would prefer any expert of groups 2 and 3
    cfg = V3.replace(num_experts_per_tok=4)
    ids, gates = choose(cfg, np.full(8, -3.0), bias)
    assert sorted(ids.tolist()) == [0, 1, 2, 3]
    np.testing.assert_allclose(gates, 2.5 / 4, rtol=1e-6)


def test_ties_go_to_the_lower_expert_id():
    assert choose(V1, np.zeros(8))[0].tolist() == [0, 1, 2]
    assert choose(V2, np.zeros(8))[0].tolist() == [0, 1, 2]
    assert choose(V3, np.zeros(8), np.zeros(8))[0].tolist() == [0, 1, 2]


def test_the_bias_selects_but_does_not_weigh():
    cfg = V3.replace(n_group=1, topk_group=1, num_experts_per_tok=2)
    scores = [0.9, 0.2, 0.1, 0.5, 0.3, 0.4, 0.6, 0.7]
    ids, gates = choose(cfg, logits_of(scores), [-1, 5, 0, 0, 0, 0, 0, 0])
    assert ids.tolist() == [1, 7]
    np.testing.assert_allclose(gates, 2.5 * np.array([0.2, 0.7]) / 0.9, rtol=1e-5)


def test_a_group_scores_its_best_expert_in_v2_and_its_two_best_in_v3():
    logits = logits_of([0.9, 0.1, 0.6, 0.6, 0.7, 0.2, 0.3, 0.3])
    changes = {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 1}
    assert choose(V2.replace(**changes), logits)[0].tolist() == [0]
    assert choose(V3.replace(**changes), logits, np.zeros(8))[0].tolist() == [2]


def test_v3_gates_sum_to_the_scaling_factor():
    _, gates = choose(V3, np.random.default_rng(0).standard_normal((5, 7, 8)), BIAS)
    np.testing.assert_allclose(gates.sum(-1), 2.5, rtol=1e-6)


@st.composite
def routers(draw):
    """A configuration of one family with random logits of 16 tokens, and a bias where it has one."""
    family = draw(st.sampled_from(["v1", "v2", "v3"]))
    G = draw(st.sampled_from([1, 4, 8]))
    kept = draw(st.sampled_from([1, 2, G] if G > 1 else [1]))
    K = draw(st.sampled_from([1, 3]))
    changes = {"n_routed_experts": 24, "num_experts_per_tok": K}
    if family != "v1":
        changes |= {"n_group": G, "topk_group": kept}
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = draw(st.sampled_from([0.1, 1.0, 2.0])) * rng.standard_normal((16, 24))
    bias = draw(st.sampled_from([0.0, 0.5, 5.0])) * rng.standard_normal(24)
    return tiny_config(family, **changes), logits, bias if family == "v3" else None


@given(routers())
@settings(max_examples=25, deadline=None)
def test_random_routers_choose_and_weigh_as_the_formula_does(case):
    cfg, logits, bias = case
    logits = logits.astype(np.float32).astype(np.float64)
    bias = None if bias is None else bias.astype(np.float32).astype(np.float64)
    with jax.disable_jit():
        ids, gates = choose(cfg, logits, bias)
    for row, (row_ids, row_gates) in zip(logits, zip(ids, gates)):
        expected_ids, expected_gates = route(cfg, row, bias)
        scores = affinity(cfg, row) + (0 if bias is None else bias)  # float32 cannot tell all of them apart
        np.testing.assert_allclose(scores[row_ids], scores[expected_ids], rtol=0, atol=1e-6)
        np.testing.assert_allclose(row_gates, expected_gates, rtol=1e-4)


def test_a_bfloat16_layer_routes_in_float32():
    cfg = tiny_config("v3", num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    model = DeepSeek.init(cfg, dtype=jnp.bfloat16)
    moe = jax.tree.map(lambda a: a[0], model.stacks[0]).mlp
    bias = 5 + np.arange(8) / 1000  # bfloat16 steps by 1/32 there
    moe.router_bias_E[...] = jnp.asarray(bias, jnp.float32)
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((1, 32, 32)) / 10, jnp.bfloat16)
    with model.on_mesh():
        ids, gates, *_ = jax.jit(lambda moe, x: moe.route(x, model.strategy.train))(moe, x_BTD)
    assert gates.dtype == jnp.float32
    logits = np.asarray(x_BTD, np.float64)[0] @ np.asarray(moe.router_DE[...], np.float64)
    for row_ids, row_gates, row in zip(np.asarray(ids)[0], np.asarray(gates)[0], logits):
        expected_ids, expected_gates = route(cfg, row, bias)
        assert row_ids.tolist() == expected_ids.tolist()
        np.testing.assert_allclose(row_gates, expected_gates, rtol=1e-5)


@pytest.mark.parametrize("family", ["v1", "v2", "v3"])
def test_gates_carry_gradients_to_the_chosen_scores(family):
    cfg, bias = {"v1": (V1, None), "v2": (V2, None), "v3": (V3, jnp.asarray(BIAS, jnp.float32))}[family]
    weigh = jnp.arange(1.0, 4.0)
    got = jax.grad(lambda logits: choose_experts(cfg, logits, bias)[1] @ weigh)(
        jnp.asarray(LOGITS, jnp.float32)
    )
    step, expected = 1e-6, []
    for e in range(8):
        moved = LOGITS + step * (np.arange(8) == e), LOGITS - step * (np.arange(8) == e)
        up, down = (route(cfg, m, None if bias is None else BIAS)[1] @ np.arange(1.0, 4.0) for m in moved)
        expected.append((up - down) / (2 * step))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
