"""Attention against a cache: absorbed decode equals expanded prefill, and what caches hold and drop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close, forward, random_tokens, tiny_model, tiny_weights

from jaxseek.config.model import ModelConfig
from jaxseek.model.cache import KVCache, LatentCache, split_layers
from jaxseek.model.deepseek import DeepSeek
from jaxseek.ops.cache_write import write_slots
from jaxseek.sharding.strategy import Strategy

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, CAPACITY = 2, 12, 16
TOKENS_BT = random_tokens(B, T)


@functools.partial(jax.jit, static_argnames="fresh")
def step(model, tokens_BT, positions_BT, caches, fresh):
    rules = model.strategy.prefill if fresh else model.strategy.decode
    ctx = model.context(rules, tokens_BT, positions_BT, None, caches, fresh=fresh)
    out = model.forward(tokens_BT, ctx, caches)
    return out.hidden_BTD, out.caches


def run(model, tokens_BT, caches, fresh, first=0):
    positions_BT = np.broadcast_to(first + np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    with model.on_mesh():
        return step(model, jnp.asarray(tokens_BT), jnp.asarray(positions_BT), caches, fresh)


def empty(model):
    with model.on_mesh():
        return model.init_caches(B, CAPACITY, jnp.float32, model.strategy.decode)


@pytest.mark.parametrize("name", ["llama with biases", "v3", "v3.2"])
def test_decode_against_the_cache_equals_prefill_and_the_formula(name):
    model = tiny_model(name)
    prefilled, prefill_caches = run(model, TOKENS_BT, empty(model), fresh=True)
    expected = np.stack([forward(model.cfg, tiny_weights(name), row)[1] for row in TOKENS_BT])
    assert_close(prefilled, expected, 1e-5)

    caches, columns = empty(model), []
    for first in range(0, T, 3):  # three tokens at a time, each of which sees itself and what came before
        hidden, caches = run(model, TOKENS_BT[:, first : first + 3], caches, fresh=False, first=first)
        columns.append(hidden)
    assert_close(np.concatenate(columns, axis=1), expected, 1e-5)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), caches, prefill_caches)


def test_the_cache_holds_the_normed_latent_and_the_rotated_shared_key():
    model = tiny_model("v3")
    _, caches = run(model, TOKENS_BT, empty(model), fresh=True)
    cfg = model.cfg
    assert [c.latent_LBSA.shape for c in caches] == [
        (n, B, CAPACITY, cfg.kv_lora_rank + cfg.qk_rope_head_dim) for n in (1, 2)
    ]
    assert caches[0].capacity == CAPACITY
    assert not np.asarray(caches[0].latent_LBSA)[:, :, T:].any()
    one_layer_each = split_layers(caches[1])
    assert len(one_layer_each) == 2
    np.testing.assert_array_equal(one_layer_each[1].latent_LBSA[0], caches[1].latent_LBSA[1])


@pytest.mark.parametrize(
    ("preset", "elements"),
    [
        ("deepseek-r1", 61 * 576),
        ("deepseek-v2-lite", 27 * 576),
        ("deepseek-v3.2", 61 * (576 + 128)),
        ("deepseek-llm-67b-base", 95 * 2 * 8 * 128),
        ("deepseek-r1-distill-qwen-1.5b", 28 * 2 * 2 * 128),
    ],
)
def test_a_token_of_cache_takes_the_published_bytes(preset, elements):
    cfg, strategy = ModelConfig.from_preset(preset), Strategy.default()
    model = DeepSeek.abstract(cfg, strategy)
    with jax.sharding.use_abstract_mesh(strategy.abstract_mesh()):
        caches = jax.eval_shape(lambda: model.init_caches(3, 40, jnp.bfloat16, strategy.decode))
    taken = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(caches))
    assert taken == 3 * 40 * 2 * elements == 3 * 40 * cfg.cache_bytes_per_token("bfloat16")
    assert isinstance(caches[0], LatentCache if cfg.is_mla else KVCache)


@pytest.mark.parametrize("mesh", [None, "context=4", "data=2,context=2", "context=2,tensor=2"])
@pytest.mark.parametrize("kv_heads", [0, 2], ids=["latent", "keys"])
def test_tokens_are_written_to_their_slots_and_others_dropped(mesh, kv_heads):
    strategy = Strategy.parse(mesh)
    rules, inner = strategy.decode, (kv_heads,) if kv_heads else ()
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((3, B, *inner, 8, 4)).astype(np.float32)
    new = rng.standard_normal((B, 5, *inner, 4)).astype(np.float32)
    slots = np.array([[-1, 0, 7, 8, 100], [6, 3, -5, -1, 4]], np.int32)  # the cache has slots 0 to 7

    expected = cache.copy()
    for b, t in np.ndindex(slots.shape):
        if 0 <= slots[b, t] < 8:
            expected[1, b, ..., slots[b, t], :] = new[b, t]

    names = (None, "batch", *("kv_heads",) * bool(inner), "cache_length", None)
    with jax.set_mesh(strategy.make_mesh()):
        written = jax.jit(lambda c, l, s, n: write_slots(rules.shard(c, *names), l, s, n, rules))(
            cache, jnp.int32(1), slots, new
        )
        assert written.sharding.spec == rules.spec(*names)
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("slot", [-1, 5, 8])
@pytest.mark.parametrize("inner", [(), (2,)], ids=["latent", "keys"])
def test_one_token_of_one_row_is_written_or_dropped(inner, slot):
    strategy = Strategy.parse(None)
    cache, new = np.zeros((2, 1, *inner, 8, 4), np.float32), np.ones((1, 1, *inner, 4), np.float32)
    with jax.set_mesh(strategy.make_mesh()):
        written = jax.jit(lambda c, s, n: write_slots(c, 1, s, n, strategy.decode))(
            cache, jnp.array([[slot]]), new
        )
    expected = cache.copy()
    if slot == 5:
        expected[1, 0, ..., 5, :] = 1
    np.testing.assert_array_equal(written, expected)
