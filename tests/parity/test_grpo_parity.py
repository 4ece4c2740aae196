"""The loss of answers, its gradient and its metrics against TRL's GRPOTrainer, on the same tensors."""

import warnings
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseek.config.rl import GrpoConfig
from jaxseek.rl import grpo

pytestmark = pytest.mark.parity

B, T = 6, 9

# Ours, TRL's arguments, and how far ratios are from 1.
CASES = {
    "grpo": ({}, {"loss_type": "grpo"}, 0.4),
    "grpo, KL": ({"beta": 0.04}, {"loss_type": "grpo", "beta": 0.04}, 0.4),
    "higher": ({"clip_high": 0.28}, {"loss_type": "grpo", "epsilon_high": 0.28}, 0.3),
    "delta": ({"dual_clip": 1.5}, {"loss_type": "grpo", "delta": 1.5}, 0.6),
    "bnpo": ({"normalization": "token"}, {"loss_type": "bnpo"}, 0.4),
    "dapo": ({"normalization": "token", "clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}, 0.4),
    "dr_grpo": ({"normalization": "constant", "beta": 0.1}, {"loss_type": "dr_grpo", "beta": 0.1}, 0.4),
    "cispo": (
        {"surrogate": "cispo", "normalization": "token", "clip_low": 1.0, "clip_high": 0.5, "beta": 0.1},
        {"loss_type": "cispo", "epsilon_high": 1.5, "beta": 0.1},
        0.6,
    ),
    "gspo": (
        {"ratio": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4},
        {"loss_type": "grpo", "level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
        0.002,
    ),
    "gspo, KL": (
        {"ratio": "sequence_mean", "clip_low": 0.1, "clip_high": 0.1, "beta": 0.1},
        {"loss_type": "grpo", "level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.1, "beta": 0.1},
        0.5,
    ),
    "tis": ({"importance_cap": 1.2, "beta": 0.1}, {"loss_type": "grpo", "cap": 1.2, "beta": 0.1}, 0.4),
    "cispo, tis": (
        {
            "surrogate": "cispo",
            "normalization": "token",
            "clip_low": 1,
            "clip_high": 0.5,
            "importance_cap": 2.0,
        },
        {"loss_type": "cispo", "epsilon_high": 1.5, "cap": 2.0},
        0.6,
    ),
}


@pytest.fixture(scope="module")
def trl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        pytest.importorskip("trl")
        return pytest.importorskip("trl.trainer.grpo_trainer")


def draw(seed, spread):
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[1, T], rng.integers(2, T, B - 2)])
    x = {"logprob": -3 * rng.random((B, T)) - 0.1}
    x["old"] = x["logprob"] - spread * rng.normal(size=(B, T))
    x["reference"] = x["logprob"] - 0.5 * rng.normal(size=(B, T))
    x["rollout"] = x["old"] - 0.5 * rng.normal(size=(B, T))
    return x, rng.normal(size=B), (np.arange(T) < lengths[:, None]).astype(np.float64)


def theirs(
    trl, x, advantage, mask, loss_type, beta=0.0, epsilon_low=0.2, epsilon_high=0.2, delta=None, cap=None,
    level="token", on_policy=False,
):  # fmt: skip
    """(loss, gradient, metrics) of TRL's `_compute_loss`, on what it reads of a trainer."""
    import torch

    x = {name: torch.tensor(value) for name, value in x.items()}
    logprob = x["logprob"].requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, torch.zeros_like(logprob), None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        current_gradient_accumulation_steps=1,
        importance_sampling_level=level,
        loss_type=loss_type,
        beta=beta,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        max_completion_length=T + 3,
        use_vllm=cap is not None,
        vllm_importance_sampling_correction=cap is not None,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda t: t, reduce=lambda t, reduction: t, sync_gradients=True
        ),
    )
    ids, mask = torch.zeros((B, T), dtype=torch.long), torch.tensor(mask)
    inputs = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": mask[:, :2],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor(advantage),
        "old_per_token_logps": None if on_policy else x["old"],
        "ref_per_token_logps": x["reference"],
        "importance_sampling_ratio": torch.clamp(torch.exp(x["old"] - x["rollout"]), max=cap)
        if cap
        else None,
        "num_items_in_batch": mask.sum(),
    }
    loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), logprob.grad.numpy(), {k: v[0] for k, v in trainer._metrics["train"].items()}


def ours(x, advantage, mask, cfg, on_policy=False):
    lengths = mask.sum(axis=1).astype(int)
    weights = grpo.sequence_weights(lengths, np.ones(B, bool), cfg, T + 3).astype(np.float64)
    with jax.enable_x64(True):
        x = {name: jnp.asarray(np.where(mask, value, np.nan)) for name, value in x.items()}
        whole = jnp.asarray(np.repeat(advantage[:, None], T, axis=1)), jnp.asarray(mask)
        segments = jnp.ones((B, T), jnp.int32)
        optional = {"reference_BT": x["reference"]} if cfg.beta else {}
        optional |= {"rollout_BT": x["rollout"]} if cfg.importance_cap else {}

        def f(logprob):
            old = None if on_policy else x["old"]
            loss, metrics = grpo.policy_loss(cfg, logprob, old, *whole, segments, 1, **optional)
            return (loss * jnp.asarray(weights)[:, None]).sum(), metrics

        (loss, metrics), grad = jax.jit(jax.value_and_grad(f, has_aux=True))(x["logprob"])
        return float(loss), np.asarray(grad), {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_the_loss_its_gradient_and_metrics_are_those_of_trl(trl, name, seed):
    given, arguments, spread = CASES[name]
    cfg = GrpoConfig(**{"beta": 0.0} | given)
    data = draw(seed, spread)
    loss, grad, metrics = ours(*data, cfg)
    expected, expected_grad, expected_metrics = theirs(trl, *data, **arguments)
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-6, atol=1e-8)
    assert np.abs(grad).max() > 1e-3
    names = {"kl": "kl"} if cfg.beta else {}
    if cfg.surrogate == "clip" and cfg.ratio == "token":  # otherwise TRL means something else by them
        names |= {"clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean"}
        assert metrics["clip_low"] + metrics["clip_high"] > 0
    for own, other in names.items():
        np.testing.assert_allclose(metrics[own] / metrics["tokens"], expected_metrics[other], rtol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_the_gradient_is_that_of_trl(trl, level):
    cfg = GrpoConfig(beta=0.0, ratio="token" if level == "token" else "sequence_mean")
    data = draw(0, 1.0)
    loss, grad, _ = ours(*data, cfg, on_policy=True)
    expected, expected_grad, _ = theirs(trl, *data, "grpo", level=level, on_policy=True)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-6, atol=1e-8)
