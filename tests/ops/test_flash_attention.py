"""The TPU's attention kernels, interpreted, against softmax attention as it is written without blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close, slow

from jaxseek.ops import attention, flash_attention
from jaxseek.ops.mask import Mask
from jaxseek.sharding.strategy import Strategy

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEADS = ("kv_heads", "q_groups")
SCALE = 0.3
SHAPES = {  # B, K, G, T, width of queries and keys, of values
    "latent attention": (2, 3, 1, 300, 24, 16),
    "groups of heads": (1, 2, 3, 260, 16, 16),
    "short": (2, 1, 2, 20, 8, 8),
}


def rows(B, T, kind):
    """Positions and segments [B, T]: packed rows with padding at the end, padding first, or none of it; and
    the segments of prefixes, where segments share one."""
    if kind == "shared prefix":
        return shared_prefix(B, T)
    rng, segments = np.random.default_rng(1), np.ones((B, T), np.int32)
    if kind == "packed":
        segments = np.sort(rng.integers(1, 5, (B, T)), axis=1).astype(np.int32)
        segments[:, T - T // 5 :] = 0
    if kind == "padded first":
        segments[:, : T // 3] = 0
    positions = np.zeros_like(segments)
    for b, t in np.ndindex(B, T):
        new = t == 0 or segments[b, t] != segments[b, t - 1]
        positions[b, t] = 0 if new else positions[b, t - 1] + 1
    return positions, segments, None


def shared_prefix(B, T):
    """Segments 1 to 3 go on from 8, segment 4 from 9; padding at the end. Of other lengths in every row."""
    positions, segments, prefixes = np.zeros((3, B, T), np.int32)
    for b in range(B):
        groups = {8: [T // 5 + b, T // 6, T // 8, T // 7], 9: [T // 9, T // 6 - b]}
        at, number = 0, 0
        for prefix, (before, *answers) in groups.items():
            for n, length in enumerate((before, *answers)):
                here, number = slice(at, at + length), number + (n > 0)
                positions[b, here] = (before if n else 0) + np.arange(length)
                segments[b, here], prefixes[b, here] = number if n else prefix, prefix
                at += length
    return positions, segments, prefixes


def arrays(B, K, G, T, H, V):
    rng = np.random.default_rng(0)
    shapes = ((B, T, K, G, H), (B, K, T, H), (B, K, T, V), (B, T, K, G, V))
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def run(attend, mesh, q, k, v, dy, positions, segments, prefixes=None):
    """Output and gradients of an implementation, on a mesh."""
    strategy = Strategy.parse(mesh)
    rules = strategy.train

    def both(q, k, v, dy, positions, segments, prefixes):
        q, dy = (rules.shard(a, "batch", "length", *HEADS, None) for a in (q, dy))
        k, v = (rules.shard(a, "batch", "kv_heads", None, None) for a in (k, v))
        of_queries = [rules.shard(a, "batch", "length") for a in (positions, segments)]
        of_keys = [rules.shard(a, "batch", None) for a in (positions, segments)]
        prefixes = None if prefixes is None else rules.shard(prefixes, "batch", "length")
        mask = Mask(*of_queries, *of_keys, q_prefix_BT=prefixes)
        out, pull = jax.vjp(lambda *a: attend(*a, mask, SCALE, rules, HEADS), q, k, v)
        return jax.tree.map(lambda a: jax.sharding.reshard(a, jax.P()), (out, pull(dy)))

    with jax.set_mesh(strategy.make_mesh()):
        return jax.tree.map(np.asarray, jax.jit(both)(q, k, v, dy, positions, segments, prefixes))


kernel = functools.partial(attention._flash, interpret=True)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(flash_attention, "QUERIES", 128)
    monkeypatch.setattr(flash_attention, "KEYS", 128)


def compare(shape, kind, mesh=None):
    args = arrays(*shape)
    where = rows(shape[0], shape[3], kind)
    out, grads = run(kernel, mesh, *args, *where)
    expected, expected_grads = run(attention.attend, None, *args, *where)
    assert_close(out, expected, 1e-5)
    for a, b in zip(grads, expected_grads):
        assert_close(a, b, 1e-5)


KINDS = "packed", "padded first", "one sequence", "shared prefix"
QUICK = {"latent attention": KINDS[3:], "groups of heads": KINDS[1:2], "short": KINDS[:3:2]}


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        pytest.param(shape, kind, marks=[] if kind in QUICK[shape] else [pytest.mark.slow])
        for shape in SHAPES
        for kind in KINDS
    ],
)
def test_outputs_and_gradients_equal_plain_attention(small_blocks, shape, kind):
    compare(SHAPES[shape], kind)


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [
        ("tensor=2,data=2", "packed"),
        ("context=2", "shared prefix"),
        slow("context=2", "packed"),
    ],
)
def test_heads_rows_and_queries_may_be_split_over_devices(small_blocks, mesh, kind):
    compare((2, 2, 1, 256, 16, 8), kind, mesh)


def test_many_queries_have_their_gradients_made_in_parts(small_blocks, monkeypatch):
    monkeypatch.setattr(flash_attention, "QUERIES_BACKWARD", 128)
    compare(SHAPES["groups of heads"], "shared prefix")


def test_blocks_nobody_sees_are_not_read(small_blocks):
    """Keys and values that are not numbers, in blocks before the segment of all later queries."""
    q, k, v, dy = arrays(1, 1, 1, 512, 8, 8)
    segments = np.repeat(np.array([[1, 2]], np.int32), 256, axis=1)
    positions = np.tile(np.arange(256, dtype=np.int32), (1, 2))
    spoiled = (a.at[:, :, :256].set(jnp.nan) for a in (k, v))
    out, (dq, dk, dv) = run(kernel, None, q, *spoiled, dy, positions, segments)
    assert np.isfinite(out[:, 256:]).all()
    assert np.isfinite(dq[:, 256:]).all()
    assert np.isfinite(dk[:, :, 256:]).all()
    assert np.isfinite(dv[:, :, 256:]).all()


def test_blocks_of_other_answers_are_not_read(small_blocks):
    """Two answers go on from one prefix: neither reads the other's keys, nor does the prefix any of them."""
    q, k, v, dy = arrays(1, 1, 1, 384, 8, 8)
    segments = np.repeat(np.array([[3, 1, 2]], np.int32), 128, axis=1)
    positions = np.concatenate([np.arange(128), *[np.arange(128, 256)] * 2], dtype=np.int32)[None]
    for spoil, whole in (
        (slice(128, 256), (slice(0, 128), slice(256, 384))),
        (slice(256, 384), (slice(0, 256),)),
    ):
        spoiled = (a.at[:, :, spoil].set(jnp.nan) for a in (k, v))
        out, (dq, _, _) = run(kernel, None, q, *spoiled, dy, positions, segments, np.full_like(segments, 3))
        for part in whole:
            assert np.isfinite(out[:, part]).all()
            assert np.isfinite(dq[:, part]).all()


def test_a_query_without_any_key_is_finite_and_gives_no_gradient(small_blocks):
    q, k, v, dy = arrays(1, 1, 1, 256, 8, 8)
    positions, ones = np.zeros((1, 256), np.int32), np.ones((1, 256), np.int32)

    def alone(q, k, v):
        args = (jnp.moveaxis(q, 1, 3), k, v, positions, 3 * ones, positions, ones, None)
        return flash_attention.flash_attention(*args, SCALE, True)

    out, pull = jax.vjp(alone, q, k, v)
    assert np.isfinite(out).all()
    for grad in pull(jnp.moveaxis(dy, 1, 3)):
        assert not np.asarray(grad).any()


def test_bfloat16_is_near_the_same_attention_in_float32(small_blocks):
    args = arrays(*SHAPES["latent attention"])
    low = [a.astype(jnp.bfloat16) for a in args]
    where = rows(2, 300, "packed")
    out, grads = run(kernel, None, *low, *where)
    expected, expected_grads = run(attention.attend, None, *(a.astype(jnp.float32) for a in low), *where)
    assert out.dtype == jnp.bfloat16
    for a, b in zip((out, *grads), (expected, *expected_grads)):
        assert_close(a.astype(np.float32), b, 0.03)


def test_only_fresh_keys_that_nobody_chose_among_go_to_the_kernel(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "_flash", lambda *a, **_: asked.append(a) or a[0])
    q, k, v, _ = arrays(1, 1, 1, 8, 4, 4)
    positions, segments = map(jnp.asarray, rows(1, 8, "one sequence")[:2])
    fresh, cached = Mask(positions, segments, positions, segments), Mask(positions, segments, positions, None)
    chosen = Mask(positions, segments, positions, segments, jnp.ones((1, 8, 8), bool))
    strategy = Strategy.default()
    with jax.set_mesh(strategy.make_mesh()):
        for mask, key_axis in ((cached, "cache_length"), (chosen, None), (fresh, None)):
            assert not asked
            attention.attend(q, k, v, mask, SCALE, strategy.train, HEADS, key_axis)
    assert len(asked) == 1
