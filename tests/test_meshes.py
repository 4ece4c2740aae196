"""Every mesh computes what one device computes: logits, gradients and greedy tokens, in float32.

The default run covers every axis at 2 and 4, every pair of axes and some triples; the marker `slow` holds all
meshes of up to eight devices.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracles import (
    assert_close,
    quick_compilation,  # noqa: F401
    random_model,
    random_tokens,
    tiny_config,
)

from jaxseek.config import ConfigError
from jaxseek.generate.engine import Engine
from jaxseek.generate.sampling import Sampling
from jaxseek.sharding import MESH_AXES, Strategy, parameters

CONFIGS = {
    "llama": tiny_config("llama", num_attention_heads=8, num_key_value_heads=4),
    "v2": tiny_config("v2"),
    "v3": tiny_config("v3, no dense layer"),
    "v3.2": tiny_config("v3.2", first_k_dense_replace=0),
}
TOKENS_BT = random_tokens(8, 8)
PROMPTS = [TOKENS_BT[i, : 3 + i].tolist() for i in range(5)]
NEW_TOKENS = 9


@functools.partial(jax.jit, static_argnames=())
def value_and_grad(model, tokens_BT):
    def loss(model):
        rules = model.strategy.train
        ctx = model.context(rules, tokens_BT)
        logits_BTV = model.logits(model.forward(tokens_BT, ctx).hidden_BTD, rules)
        logits_BTV = jax.sharding.reshard(logits_BTV, P())
        targets_BTV = jax.nn.one_hot(tokens_BT[:, 1:], logits_BTV.shape[-1])
        return -(targets_BTV * jax.nn.log_softmax(logits_BTV[:, :-1])).sum(-1).mean(), logits_BTV

    return jax.value_and_grad(loss, has_aux=True)(model)


def compute(cfg, mesh):
    """(logits, gradients by path, greedy completions)."""
    model = random_model(cfg, mesh)
    with model.on_mesh():
        (_, logits_BTV), grads = value_and_grad(model, jnp.asarray(TOKENS_BT))
    engine = Engine(model, unroll=False)
    completions = engine.generate(PROMPTS, Sampling(max_new_tokens=NEW_TOKENS, temperature=0))
    gradients = {k: np.asarray(v[...]) for k, v in parameters(grads).items()}
    return np.asarray(logits_BTV), gradients, [c.tokens for c in completions]


@functools.cache
def on_one_device(name):
    return compute(CONFIGS[name], None)


def check(name, mesh):
    logits_BTV, gradients, tokens = on_one_device(name)
    got_logits_BTV, got_gradients, got_tokens = compute(CONFIGS[name], mesh)
    assert_close(got_logits_BTV, logits_BTV, 1e-5)
    assert got_tokens == tokens
    assert got_gradients.keys() == gradients.keys()
    for path, gradient in gradients.items():
        if np.abs(gradient).max():
            assert_close(got_gradients[path], gradient, 1e-5)
        else:
            assert not got_gradients[path].any()


def fits(name, mesh):
    try:
        Strategy.parse(mesh).check_fits(CONFIGS[name])
    except ConfigError:
        return False
    return True


def all_meshes(most=8):
    for sizes in itertools.product((1, 2, 4), repeat=len(MESH_AXES)):
        if 1 < math.prod(sizes) <= most:
            yield {a: n for a, n in zip(MESH_AXES, sizes) if n > 1}


def label(value):
    return ",".join(f"{a}={n}" for a, n in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"), [(n, m) for n in CONFIGS for m in all_meshes() if fits(n, m)], ids=label
)
def test_every_mesh_of_up_to_eight_devices_equals_one_device(name, mesh):
    check(name, mesh)
