"""Attention against the formula: masks of positions and segments, query blocks, keys split over devices."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close, softmax

from jaxseek.ops import attention, causal_attention
from jaxseek.ops.attention import attend
from jaxseek.ops.mask import Mask
from jaxseek.sharding.strategy import Strategy

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, S, K, G, H, V = 2, 16, 16, 2, 2, 8, 6
HEADS = ("kv_heads", "q_groups")
# two sequences packed into a row, then padding; left padding, then one sequence
SEGMENTS = np.array([[1] * 7 + [2] * 6 + [0] * 3, [0] * 5 + [1] * 11], np.int32)
POSITIONS = np.array([[*range(7), *range(6), *range(3)], [*range(5), *range(11)]], np.int32)


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = ((B, T, K, G, H), (B, K, S, H), (B, K, S, V))
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def packed(chosen=None):
    a = jnp.asarray
    return Mask(a(POSITIONS), a(SEGMENTS), a(POSITIONS), a(SEGMENTS), None if chosen is None else a(chosen))


def some_keys():
    """A choice of keys that holds every query's own."""
    return (np.random.default_rng(1).random((B, T, S)) < 0.4) | np.eye(T, dtype=bool)


def written(q, k, v, scale, keep_BTS):
    """Query by query and head by head."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros((B, T, K, G, V))
    for b, t, n, g in np.ndindex(B, T, K, G):
        keys = np.nonzero(keep_BTS[b, t])[0]
        out[b, t, n, g] = softmax(scale * k[b, n, keys] @ q[b, t, n, g]) @ v[b, n, keys]
    return out


def may_see():
    """Query t sees key s: the same sequence, not later in it."""
    keep = np.zeros((B, T, S), bool)
    for b, t, s in np.ndindex(B, T, S):
        keep[b, t, s] = SEGMENTS[b, t] == SEGMENTS[b, s] and s <= t
    return keep


def run(mesh, *args, phase="train", key_axis=None):
    strategy = Strategy.parse(mesh)
    rules = getattr(strategy, phase)

    def f(q, k, v, mask):
        q = rules.shard(q, "batch", "length", *HEADS, None)
        k, v = (rules.shard(a, "batch", "kv_heads", key_axis, None) for a in (k, v))
        names = dict.fromkeys(("q_pos_BT", "q_seg_BT", "q_prefix_BT"), ("batch", "length"))
        names |= {"kv_pos_BS": ("batch", key_axis), "kv_seg_BS": ("batch", key_axis)}
        names |= {"chosen_BTS": ("batch", "length", key_axis)}
        given = {n: getattr(mask, n) for n in names if getattr(mask, n) is not None}
        mask = dataclasses.replace(mask, **{n: rules.shard(a, *names[n]) for n, a in given.items()})
        out = attend(q, k, v, mask, 0.3, rules, HEADS, key_axis)
        return jax.sharding.reshard(out, jax.P())

    def both(q, k, v, mask):
        out, pull = jax.vjp(lambda *a: f(*a, mask), q, k, v)
        return out, pull(jnp.cos(out))

    with jax.set_mesh(strategy.make_mesh()):
        return jax.tree.map(np.asarray, jax.jit(both)(*args))


def test_the_mask_keeps_each_sequence_to_itself_and_to_its_past():
    np.testing.assert_array_equal(packed().dense(), may_see())
    np.testing.assert_array_equal(packed(some_keys()).dense(), may_see() & some_keys())


def test_slots_of_a_cache_are_positions():
    mask = Mask(jnp.array([[3], [0]]), jnp.ones((2, 1), jnp.int32), jnp.arange(5)[None], None)
    assert mask.dense().astype(int).tolist() == [[[1, 1, 1, 1, 0]], [[1, 0, 0, 0, 0]]]


def test_packed_attention_equals_the_formula():
    q, k, v = arrays()
    out, _ = run(None, q, k, v, packed())
    assert_close(out, written(q, k, v, 0.3, may_see()), 1e-6)


@pytest.mark.parametrize("block", [attention.QUERY_BLOCK, 4], ids=["whole", "in blocks"])
@pytest.mark.parametrize("mesh", [None, "data=2,tensor=2"])
def test_segments_that_go_on_from_a_prefix_see_it_and_not_each_other(monkeypatch, mesh, block):
    """A prefix of 5 tokens with two answers; and one of 2 with an answer, behind a segment of its own."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    monkeypatch.setattr(causal_attention, "LEAST", 4)
    segments = np.array([[8] * 5 + [1] * 4 + [2] * 6 + [0], [1] * 3 + [9] * 2 + [2] * 11], np.int32)
    prefixes = np.array([[8] * 15 + [0], [1] * 3 + [9] * 13], np.int32)
    positions = np.array([[*range(5), *range(5, 9), *range(5, 11), 0], [*range(3), *range(13)]], np.int32)
    seen = {(0, 1): [8, 1], (0, 2): [8, 2], (1, 2): [9, 2]}
    keep = np.zeros((B, T, S), bool)
    for b, t, s in np.ndindex(B, T, S):
        own = segments[b, t]
        keep[b, t, s] = s <= t and segments[b, s] in seen.get((b, own), [own])
    a = jnp.asarray
    mask = Mask(a(positions), a(segments), a(positions), a(segments), None, a(prefixes))
    np.testing.assert_array_equal(mask.dense(), keep)
    q, k, v = arrays()
    assert_close(run(mesh, q, k, v, mask)[0], written(q, k, v, 0.3, keep), 1e-6)


@pytest.mark.parametrize("mesh", [None, "data=2,tensor=2"])
@pytest.mark.parametrize("chosen", [False, True], ids=["all keys", "chosen keys"])
def test_blocks_of_queries_change_neither_outputs_nor_gradients(monkeypatch, mesh, chosen):
    args = (*arrays(), packed(some_keys() if chosen else None))
    whole, whole_grads = run(None, *args)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    blocks, blocks_grads = run(mesh, *args)
    assert_close(blocks, whole, 1e-6)
    assert_close(blocks, written(*args[:3], 0.3, may_see() & (some_keys() if chosen else True)), 1e-6)
    for a, b in zip(blocks_grads, whole_grads):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("mesh", [None, "data=2,tensor=2", "context=2"])
@pytest.mark.parametrize("least", [16, 5, 4], ids=["whole", "three blocks", "four blocks"])
def test_outputs_and_gradients_on_cpu_are_those_of_the_plain_softmax(monkeypatch, mesh, least):
    monkeypatch.setattr(causal_attention, "LEAST", least)
    q, k, v = arrays()

    def plain(q, k, v):
        scores = 0.3 * jnp.einsum("BTKGH,BKSH->BKGTS", q, k)
        weights = jax.nn.softmax(scores, where=may_see()[:, None, None])
        return jnp.einsum("BKGTS,BKSV->BTKGV", weights, v)

    out, grads = run(mesh, q, k, v, packed())
    assert_close(out, written(q, k, v, 0.3, may_see()), 1e-6)
    expected, pull = jax.vjp(plain, q, k, v)
    for got, wanted in zip(grads, pull(jnp.cos(expected))):
        assert_close(got, wanted, 2e-6)


def test_no_block_of_queries_reads_keys_after_it(monkeypatch):
    monkeypatch.setattr(causal_attention, "LEAST", 4)
    q, k, v = (jnp.moveaxis(a, 1, 3) if a.ndim == 5 else a for a in arrays())
    late = jnp.arange(S)[:, None] >= 12
    spoilt = (jnp.where(late, jnp.nan, a) for a in (k, v))
    out = causal_attention.causal_attention(q, *spoilt, jnp.asarray(may_see()))
    assert np.isfinite(out[:, :, :, :12]).all()
    assert np.isnan(out[:, :, :, 12:]).any()


def test_many_queries_are_computed_in_blocks(monkeypatch):
    for name in ("QUERY_BLOCK", "QUERY_BLOCK_CPU"):
        monkeypatch.setattr(attention, name, 4)
    strategy = Strategy.default()
    with jax.set_mesh(strategy.make_mesh()):
        jaxpr = jax.make_jaxpr(lambda *a: attend(*a, packed(), 0.3, strategy.train, HEADS))(*arrays())
    largest = max(math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars)
    assert largest < B * K * G * T * S


def test_queries_against_a_cache_in_blocks_give_the_same_softmax(monkeypatch):
    q, k, v = arrays()
    seen = np.arange(S)[None, None] <= np.asarray(packed().q_pos_BT)[:, :, None]
    mask = dataclasses.replace(packed(), kv_pos_BS=jnp.arange(S)[None], kv_seg_BS=None)
    monkeypatch.setattr(attention, "QUERY_BLOCK_CPU", 4)
    out, _ = run(None, q, k, v, mask, phase="decode", key_axis="cache_length")
    assert_close(out, written(q, k, v, 0.3, seen), 1e-6)


@pytest.mark.parametrize("mesh", ["context=4", "context=2,tensor=2,data=2"])
def test_keys_split_over_devices_give_the_same_softmax(mesh):
    q, k, v = arrays()
    out, grads = run(mesh, q, k, v, packed(), phase="decode", key_axis="cache_length")
    assert_close(out, written(q, k, v, 0.3, may_see()), 1e-6)
    for a, b in zip(grads, run(None, q, k, v, packed())[1]):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("mesh", [None, "tensor=2,context=2"])
def test_a_single_query_equals_itself_among_others(mesh):
    (q, k, v), mask = arrays(), packed()
    one = Mask(mask.q_pos_BT[:, 9:10], mask.q_seg_BT[:, 9:10], mask.kv_pos_BS, mask.kv_seg_BS)
    out, _ = run(mesh, q[:, 9:10], k, v, one, phase="decode", key_axis="cache_length")
    assert_close(out, written(q, k, v, 0.3, may_see())[:, 9:10], 1e-5)


def test_large_scores_and_queries_without_any_key_stay_finite():
    q, k, v = arrays()
    nobody = dataclasses.replace(packed(), q_seg_BT=jnp.full((B, T), 9))
    out, _ = run(None, 1e4 * q, k, v, nobody)
    assert np.isfinite(out).all()
    out, _ = run(None, 1e4 * q, k, v, packed())
    assert_close(out, written(1e4 * q, k, v, 0.3, may_see()), 1e-4)


def test_bfloat16_in_gives_bfloat16_out_near_the_formula():
    q, k, v = arrays(jnp.bfloat16)
    out, _ = run(None, q, k, v, packed())
    assert out.dtype == jnp.bfloat16
    assert_close(out, written(q, k, v, 0.3, may_see()), 0.02)
