"""Every mesh computes what one device computes: logits, gradients and greedy tokens, in float32.

The default run covers every axis at 2 and 4 and every pair of axes; the marker `slow` holds all meshes of up
to eight devices, with scanned stacks throughout.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracles import assert_close, forward, predict_ahead, random_model, random_tokens, tiny_config, weights

from jaxseek.config.model import ConfigError, configs_dir
from jaxseek.engine.engine import Engine
from jaxseek.engine.sampling import Sampling
from jaxseek.sharding.parameters import parameters
from jaxseek.sharding.rules import MESH_AXES, PHASES
from jaxseek.sharding.strategy import Strategy

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIGS = {
    "llama": tiny_config("llama", num_attention_heads=8),  # two layers: a scanned stack
    "v2": tiny_config("v2", num_hidden_layers=1, first_k_dense_replace=0),
    "v3": tiny_config("v3", num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0),
    "v3.2": tiny_config("v3.2", num_hidden_layers=1, first_k_dense_replace=0),
}
COVERING = [
    ("v3", "data=2,fsdp=2,context=2"),
    ("v3", "expert=2,tensor=2,context=2"),
    ("v3", "data=4,expert=2"),
    ("v3", "tensor=2,context=4"),
    ("llama", "fsdp=4,tensor=2"),
]
FILED = {"fsdp": 2, "expert": 4}  # with a shipped file's rules: batch over experts in decode, too
GROUPED = {"data": 2, "tensor": 4}  # more than key-value heads: query groups are split
TOKENS_BT = random_tokens(8, 8)
PROMPTS = [TOKENS_BT[i, : 3 + i].tolist() for i in range(5)]
NEW_TOKENS = 9


@jax.jit
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
    engine = Engine(model, form="plain")
    completions = engine.generate(PROMPTS, Sampling(max_new_tokens=NEW_TOKENS, temperature=0))
    gradients = {k: np.asarray(v[...]) for k, v in parameters(grads).items()}
    return np.asarray(logits_BTV), gradients, [c.tokens for c in completions]


@functools.cache
def on_one_device(cfg):
    return compute(cfg, None)


def check(cfg, mesh):
    logits_BTV, gradients, tokens = on_one_device(cfg)
    got_logits_BTV, got_gradients, got_tokens = compute(cfg, mesh)
    assert_close(got_logits_BTV, logits_BTV, 1e-5)
    assert got_tokens == tokens
    assert got_gradients.keys() == gradients.keys()
    for path, gradient in gradients.items():
        if np.abs(gradient).max():
            assert_close(got_gradients[path], gradient, 1e-5)
        else:
            assert not got_gradients[path].any()


@pytest.mark.parametrize(("name", "mesh"), COVERING)
def test_meshes_that_cover_all_pairs_of_axes_equal_one_device(name, mesh):
    check(CONFIGS[name], mesh)


def test_the_covering_meshes_hold_every_axis_at_two_and_four_and_every_pair():
    meshes = [dict(Strategy.parse(mesh).sizes) for mesh in (FILED, GROUPED, *(m for _, m in COVERING))]
    assert all(any(m[axis] == n for m in meshes) for axis in MESH_AXES for n in (2, 4))
    assert all(any(m[a] > 1 < m[b] for m in meshes) for a, b in itertools.combinations(MESH_AXES, 2))


def test_query_groups_split_where_key_value_heads_are_too_few(tmp_path):
    file = tmp_path / "groups.toml"
    file.write_text("".join(f"[{t}]\nkv_heads = []\nq_groups = 'tensor'\n" for t in ("weights", *PHASES)))
    check(CONFIGS["llama"], Strategy.from_toml(file, **GROUPED))


def test_a_shipped_strategy_equals_one_device():
    file = configs_dir() / "meshes" / "attention-data-parallel.toml"
    check(CONFIGS["v3"], Strategy.from_toml(file, **FILED))


def test_rows_and_columns_that_a_mesh_does_not_divide_are_padded_and_cut():
    cfg = CONFIGS["v3"].replace(num_nextn_predict_layers=1)
    model, tokens_BT = random_model(cfg, "expert=2,context=2"), TOKENS_BT[:3, :7]
    w = weights(model)
    assert_close(model(tokens_BT), np.stack([forward(model.cfg, w, row)[0] for row in tokens_BT]), 1e-5)
    ids_LBTK = np.stack([forward(model.cfg, w, row)[2] for row in tokens_BT], axis=1)
    np.testing.assert_array_equal(model.expert_ids(tokens_BT), ids_LBTK)
    ahead_BTV = np.stack([predict_ahead(model.cfg, w, row) for row in tokens_BT])
    assert_close(model.predict_ahead(tokens_BT), ahead_BTV, 1e-5)


# -------------------------------------------------------------------- all of them


def fits(name, mesh):
    try:
        Strategy.parse(mesh).check_fits(CONFIGS[name])
    except ConfigError:
        return False
    return True


def every_mesh():
    """(name, mesh) of every mesh of two to eight devices that fits the model."""
    for name, sizes in itertools.product(CONFIGS, itertools.product((1, 2, 4), repeat=len(MESH_AXES))):
        mesh = ",".join(f"{a}={n}" for a, n in zip(MESH_AXES, sizes) if n > 1)
        if 1 < math.prod(sizes) <= 8 and fits(name, mesh):
            yield name, mesh


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh"), list(every_mesh()))
def test_every_mesh_of_up_to_eight_devices_equals_one_device(name, mesh):
    check(CONFIGS[name].replace(num_hidden_layers=2), mesh)
    jax.clear_caches()  # or the programs of all meshes exhaust the memory maps of the process
