"""One optimizer step: accumulation, rematerialization, clipping, router biases, precision, and every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import assert_close, random_model, random_tokens, slow, tiny_config

from jaxseek.config.model import ModelConfig
from jaxseek.config.run import RunConfig
from jaxseek.model.deepseek import DeepSeek
from jaxseek.sharding.parameters import parameters
from jaxseek.train.batch import make_batch, to_devices
from jaxseek.train.loss import StepInputs
from jaxseek.train.optimizer import decays, make_optimizer
from jaxseek.train.pretrain import LanguageLoss
from jaxseek.train.step import evaluate_batch, init_state, make_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T = 8, 16
DENSE = tiny_config("llama")  # two layers, scanned
SPARSE = tiny_config("v3", num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=1)
CURVE = 20


def run(**sections):
    needed = {"objective": "pretrain", "model": "m", "out": "o", "steps": CURVE, "data": {"train": "d"}}
    optimizer = {"optimizer": {"learning_rate": 3e-3}, "loss": {"sequence_balance": 0.01}}
    return RunConfig.from_dict(needed | optimizer | sections)


@functools.cache
def stepper(dtype="float32", remat="none", adam=True, cfg=SPARSE):
    """The optimizer and the compiled step, which tests share."""
    config = run(remat=remat)
    optimizer = make_optimizer(config.program, decays(random_model(cfg))) if adam else optax.sgd(1.0)
    return optimizer, make_step(LanguageLoss(config.program, jnp.dtype(dtype)), optimizer)


@jax.jit
def copied(model):
    return jax.tree.map(lambda a: a + 0, model)


def rows(seed=0):
    """Tokens, segments (some rows packed, some padded) and weights of a batch."""
    segments = np.ones((B, T), np.int32)
    segments[0, 7:] = 2
    segments[1, 11:] = 0
    segments[5, 3:] = 0
    weights = np.random.default_rng(seed).integers(0, 2, (B, T)).astype(np.float32)
    return random_tokens(B, T, seed=seed), segments, weights


def stepped(
    model, arrays=None, accumulation=1, steps=1, bias_speed=0.01, change=lambda batch: batch, **options
):
    """(losses, metrics of the last step, state) after some steps from the model, on the same rows."""
    optimizer, step = stepper(cfg=model.cfg, **options)
    model = copied(model)  # the state is donated
    state = init_state(model, optimizer)
    arrays = rows() if arrays is None else arrays
    batch = make_batch(*arrays, modules=model.cfg.num_nextn_predict_layers, accumulation=accumulation)
    losses, metrics = [], {}
    with model.on_mesh():
        batch = to_devices(change(batch), model)
        for _ in range(steps):
            state, aux = step(state, batch, StepInputs(np.float32(0.3), np.float32(bias_speed)))
            metrics = aux.metrics | ({} if aux.load_LE is None else {"load": aux.load_LE})
            losses.append(float(metrics["loss"] + 0.3 * metrics.get("mtp_loss", 0)))
    return losses, {k: np.asarray(v) for k, v in metrics.items()}, state


def values(tree):
    return {p: np.asarray(v[...]) for p, v in parameters(tree).items()}


def changes(before, state):
    """What a step changed, by path."""
    before, after = values(before), values(state.model)
    return {p: after[p] - before[p] for p in before}


def gradients(state):
    """Of the first step, by path, times a constant: AdamW's first moments."""
    return {p: np.asarray(a) for p, a in state.moments[0].mu.items()}


def test_four_microbatches_are_one_batch():
    model = random_model(SPARSE)
    (one, one_metrics, one_state), (four, four_metrics, four_state) = (
        stepped(model, accumulation=n) for n in (1, 4)
    )
    assert_close(four, one, 1e-5)
    for name in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
        assert_close(four_metrics[name], one_metrics[name], 1e-5)
    np.testing.assert_array_equal(four_metrics["load"], one_metrics["load"])
    expected = gradients(one_state)
    for path, gradient in gradients(four_state).items():
        assert_close(gradient, expected[path], 1e-4)


@pytest.mark.parametrize("remat", ["dots", "costly", "full"])
def test_what_the_backward_pass_computes_again_changes_no_gradient(remat):
    model = random_model(DENSE)
    _, _, state = stepped(model, adam=False)
    expected = changes(model, state)
    for path, change in changes(model, stepped(model, remat=remat, adam=False)[2]).items():
        assert_close(change, expected[path], 1e-5)


def test_gradients_are_clipped_to_the_norm_that_is_reported():
    model = random_model(DENSE)
    _, metrics, state = stepped(model, adam=False)
    moved = sum(float((c.astype(np.float64) ** 2).sum()) for c in changes(model, state).values()) ** 0.5
    assert metrics["grad_norm"] > 1  # which is the limit
    assert_close(moved, 1.0, 1e-4)


def test_biases_move_by_the_sign_of_the_load_of_the_whole_batch_and_by_nothing_else():
    model = random_model(SPARSE)
    for accumulation in (1, 4):
        _, metrics, state = stepped(model, accumulation=accumulation)
        _, segments, _ = rows()
        assert (metrics["load"].sum(axis=1) == (segments > 0).sum() * SPARSE.num_experts_per_tok).all()
        found, load = changes(model, state), metrics["load"].astype(np.float64)
        for row, path in enumerate(("stacks.0", "mtp.0.stack")):
            expected = 0.01 * np.sign(load[row].mean() - load[row])
            assert expected.any()
            np.testing.assert_allclose(found[f"{path}.mlp.router_bias_E"][0], expected, atol=1e-7)
    _, _, state = stepped(model, bias_speed=0.0)
    still = changes(model, state)
    assert not any(c.any() for p, c in still.items() if "router_bias" in p)
    assert all(c.any() for p, c in still.items() if "router_bias" not in p)
    assert not any("router_bias" in str(path) for path, _ in jax.tree.flatten_with_path(state.moments)[0])


@pytest.mark.parametrize("cfg", [DENSE, slow(SPARSE)], ids=["dense", "sparse"])
def test_master_weights_stay_float32_where_activations_are_bfloat16(cfg):
    model = random_model(cfg)
    (exact,), _, _ = stepped(model)
    (loss,), _, state = stepped(model, dtype="bfloat16")
    assert loss != exact
    assert_close(loss, exact, 0.02)
    assert {v.dtype for v in values(state.model).values()} == {np.dtype(np.float32)}
    assert {a.dtype.name for a in jax.tree.leaves(state.moments)} == {"float32", "int32"}
    assert all(c.any() for c in changes(model, state).values())


def test_a_batch_that_is_not_finite_changes_nothing_and_says_so():
    model = random_model(SPARSE)
    tokens, segments, weights = rows()
    weights[3, 4] = np.nan
    _, metrics, state = stepped(model, (tokens, segments, weights))
    assert not np.isfinite(metrics["loss"])
    assert not any(c.any() for c in changes(model, state).values())
    assert int(state.step) == 0
    assert not any(np.asarray(a).any() for a in jax.tree.leaves(state.moments))
    assert np.isfinite(stepped(model)[1]["loss"])


@pytest.mark.parametrize("mesh", [None, slow({"expert": 2, "tensor": 2, "fsdp": 2})])
def test_a_step_in_fp8_has_nearly_the_loss_of_one_without(mesh):
    layers = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    cfg = ModelConfig.from_preset("tiny-v3").replace(vocab_size=256, **layers)
    model = DeepSeek.init(cfg, mesh)
    tokens, ones = np.random.default_rng(0).integers(3, 256, (4, 32)), np.ones((4, 32))
    losses = []
    for fp8 in (False, True):
        loss = LanguageLoss(run(fp8=fp8).program, jnp.float32)
        batch = to_devices(make_batch(tokens, ones, ones, cfg.num_nextn_predict_layers), model)
        with model.on_mesh():
            losses.append(
                float(evaluate_batch(loss, model, batch, StepInputs(np.float32(0.3))).metrics["loss"])
            )
    assert losses[0] != losses[1]
    assert abs(losses[1] / losses[0] - 1) < 2e-3


# -------------------------------------------------------------------- meshes

QUICK = ["expert=2,tensor=2,context=2"]
SLOW = ["data=2,fsdp=2,expert=2", "fsdp=8", "expert=4,tensor=2", "context=2,fsdp=4"]


@functools.cache
def curve(mesh):
    return stepped(random_model(SPARSE, mesh), steps=CURVE)[0]


@pytest.mark.parametrize("mesh", [*QUICK, *(slow(mesh) for mesh in SLOW)])
def test_a_mesh_trains_as_one_device_does(mesh):
    losses = curve(None)
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(curve(mesh), losses, rtol=1e-5)
