"""AdamW is the formula of its paper, in either precision, and its state lies as the parameters do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import random_model, tiny_config

from jaxseek.config.run import RunConfig
from jaxseek.sharding.parameters import parameters
from jaxseek.train.optimizer import decays, make_optimizer
from jaxseek.train.schedule import learning_rate

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 20
DECAY = frozenset(["matrix"])


def run(**optimizer):
    return RunConfig.from_dict(
        {
            "objective": "pretrain",
            "model": "tiny-v3",
            "out": "out",
            "steps": STEPS,
            "data": {"train": ["corpus.txt"]},
            "optimizer": optimizer,
            "schedule": {"kind": "cosine", "warmup": 5},
        }
    )


def problem(dtype=np.float32):
    """Parameters, and gradients of every step."""
    rng = np.random.default_rng(0)
    shapes = {"matrix": (5, 3), "bias": (3,)}
    params = {k: rng.normal(size=s).astype(dtype) for k, s in shapes.items()}
    return params, [{k: rng.normal(size=s).astype(dtype) for k, s in shapes.items()} for _ in range(STEPS)]


def train(cfg, params, grads, state=None):
    optimizer = make_optimizer(cfg.program, DECAY)
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params) if state is None else state

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: (p.astype(u.dtype) + u).astype(p.dtype), params, updates), state

    for g in grads:
        params, state = step(params, state, g)
    return params, state


def as_in_the_paper(cfg, params, grads):
    """Algorithm 2 of arXiv:1711.05101 with the weight decay scaled by the learning rate, in float64."""
    o, rate = cfg.optimizer, learning_rate(cfg.program)
    out = {}
    for name, p in params.items():
        p, m, v = p.astype(np.float64), 0.0, 0.0
        for t, g in enumerate((g[name].astype(np.float64) for g in grads), 1):
            m, v = o.b1 * m + (1 - o.b1) * g, o.b2 * v + (1 - o.b2) * g * g
            change = (m / (1 - o.b1**t)) / (np.sqrt(v / (1 - o.b2**t)) + o.eps)
            p = p - float(rate(t - 1)) * (change + o.weight_decay * (name in DECAY) * p)
        out[name] = p
    return out


def test_twenty_steps_are_those_of_the_formula():
    cfg, (params, grads) = run(learning_rate=0.01, weight_decay=0.3), problem()
    got, _ = train(cfg, params, grads)
    for name, expected in as_in_the_paper(cfg, params, grads).items():
        np.testing.assert_allclose(got[name], expected, rtol=2e-6, atol=1e-6)


def test_both_moments_in_bfloat16_cost_little_accuracy():
    cfg, (params, grads) = run(learning_rate=0.01, moments="bfloat16"), problem()
    got, state = train(cfg, params, grads)
    moments = [a for a in jax.tree.leaves(state) if a.ndim]
    assert len(moments) == 2 * len(params)
    assert {a.dtype.name for a in moments} == {"bfloat16"}
    for name, expected in as_in_the_paper(cfg, params, grads).items():
        moved = np.abs(expected - params[name]).max()
        assert 0 < np.abs(np.asarray(got[name]) - expected).max() < 0.02 * moved


def test_bfloat16_parameters_are_updated_in_float32():
    params, grads = problem(jnp.bfloat16)
    optimizer = make_optimizer(run().program, DECAY)
    updates, state = optimizer.update(grads[0], optimizer.init(params), params)
    assert {a.dtype.name for a in jax.tree.leaves((updates, state))} == {"float32", "int32"}


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_run_that_goes_on_from_its_state_is_bit_identical(moments):
    cfg, (params, grads) = run(moments=moments), problem()
    whole, _ = train(cfg, params, grads)
    half, state = train(cfg, params, grads[:7])
    resumed, _ = train(cfg, half, grads[7:], jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), state))
    for name in whole:
        assert np.array_equal(whole[name], resumed[name])


def test_matrices_decay_and_norms_and_biases_do_not():
    model = random_model(tiny_config("v3"))
    found = decays(model)
    assert "embed_VD" in found
    for path in parameters(model):
        name = path.rsplit(".", 1)[-1]
        assert (path in found) != ("scale" in name or "bias" in name or "_norm_" in name), path


def test_the_state_and_the_updates_lie_on_the_mesh_as_the_parameters_do():
    cfg = tiny_config("v3", num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    model = random_model(cfg, "fsdp=2,expert=2,tensor=2")
    params = {path: v.get_value() for path, v in parameters(model).items()}
    optimizer = make_optimizer(run(moments="bfloat16").program, decays(model))
    assert any(a.sharding.spec != jax.sharding.PartitionSpec() for a in params.values())
    with model.on_mesh():
        state = jax.jit(optimizer.init)(params)
        updates, new = jax.jit(optimizer.update)(params, state, params)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)  # one program for all steps
    adam, moved = (s[0] for s in (state, new))
    for path, param in params.items():
        for a in (adam.mu[path], adam.nu[path], moved.mu[path], moved.nu[path], updates[path]):
            assert a.sharding.is_equivalent_to(param.sharding, a.ndim), path
    assert int(optax.tree.get(new, "count", filtering=lambda path, _: "Adam" in str(path))) == 1
