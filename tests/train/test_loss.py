"""Losses against their formulas in numpy float64: whole, in chunks, on a mesh, packed, padded and masked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import (
    affinity,
    assert_close,
    forward,
    log_softmax,
    predict_ahead,
    random_model,
    random_tokens,
    tiny_config,
    weights,
)

from jaxseek.config.run import LossConfig, RunConfig
from jaxseek.model.moe import Routing, mean_affinity
from jaxseek.sharding.parameters import parameters
from jaxseek.sharding.strategy import Strategy
from jaxseek.train import loss
from jaxseek.train.batch import make_batch, to_devices
from jaxseek.train.distill import DistillationLoss
from jaxseek.train.dpo import PreferenceLoss
from jaxseek.train.loss import StepInputs, Totals
from jaxseek.train.pretrain import LanguageLoss

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, D, V = 4, 8, 32, 64
DENSE = tiny_config("llama", num_hidden_layers=1)
TIED = tiny_config("qwen2", num_hidden_layers=1)
SPARSE = tiny_config("v3", num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=2)


def run(objective="pretrain", **sections):
    distill = {"distill": {"teacher": "t"}} if objective == "distill" else {}
    needed = {"model": "m", "out": "o", "steps": 1, "data": {"train": "d"}, "remat": "none"}
    return RunConfig.from_dict({"objective": objective} | needed | distill | sections)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# -------------------------------------------------------------------- of hidden states


@pytest.mark.parametrize("limit", [None, 3 * V, 1], ids=["whole", "in chunks", "by positions"])
@pytest.mark.parametrize(
    ("cfg", "mesh"),
    [(DENSE, None), (TIED, None), (DENSE, "tensor=2,context=2"), (TIED, "data=2,tensor=2,context=2")],
    ids=["dense", "tied", "dense, split", "tied, split"],
)
def test_logprobs_and_their_gradient_are_the_formula_in_chunks_and_on_a_mesh(cfg, mesh, limit, monkeypatch):
    if limit:
        monkeypatch.setattr(loss, "by_chunks", functools.partial(loss.by_chunks, limit=limit))
    model, targets_BT, weights_BT = random_model(cfg, mesh), random_tokens(B, T), draw(B, T, seed=1)
    rules, hidden_BTD = model.strategy.train, draw(B, T, D)

    @jax.jit
    def value_and_grads(model, hidden_BTD, targets_BT, weights_BT):
        hidden_BTD, targets_BT, weights_BT = (
            rules.shard(a, "batch", "length", *(None,) * (a.ndim - 2))
            for a in (hidden_BTD, targets_BT, weights_BT)
        )

        def total(model, hidden_BTD):
            logprob_BT = loss.token_logprobs(model, hidden_BTD, targets_BT, rules, temperature=0.7)
            return (weights_BT * logprob_BT).sum(), logprob_BT

        (_, logprob_BT), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(model, hidden_BTD)
        return logprob_BT, grads

    with model.on_mesh():
        arrays = (jnp.asarray(a) for a in (hidden_BTD, targets_BT, weights_BT))
        logprob_BT, (grads, hidden_grad) = value_and_grads(model, *arrays)
    w = weights(model)
    head_DV = w["head_DV"] if "head_DV" in w else w["embed_VD"].T
    p_BTV = log_softmax(hidden_BTD.astype(np.float64) @ head_DV / 0.7)
    hot_BTV = np.eye(V)[targets_BT]
    assert_close(logprob_BT, (hot_BTV * p_BTV).sum(-1), 1e-5)
    change_BTV = weights_BT[..., None] * (hot_BTV - np.exp(p_BTV)) / 0.7
    assert_close(hidden_grad, change_BTV @ head_DV.T, 1e-5)
    head_grad = np.einsum("btd,btv->dv", hidden_BTD, change_BTV)
    grads = parameters(grads)
    got = grads["head_DV"][...] if "head_DV" in grads else grads["embed_VD"][...].T
    assert_close(got, head_grad, 1e-5)


def test_chunks_are_as_large_as_fits():
    seen = []

    def f(x_BT):
        seen.append(x_BT.shape)
        return 2 * x_BT

    strategy, x_BT = Strategy.default(), jnp.asarray(draw(2, 12))
    with jax.set_mesh(strategy.make_mesh()):
        for limit, length in ((240, 12), (239, 6), (81, 4), (79, 3), (20, 1), (1, 1)):
            out = loss.by_chunks(f, (x_BT,), strategy, strategy.train, width=10, limit=limit)
            np.testing.assert_array_equal(out, 2 * np.asarray(x_BT))
            assert seen[-1] == (2, length)


@pytest.mark.parametrize("mesh", [None, "tensor=2,context=2"])
def test_the_divergence_is_that_of_the_distributions_and_nothing_from_itself(mesh, monkeypatch):
    monkeypatch.setattr(loss, "by_chunks", functools.partial(loss.by_chunks, limit=256))
    teacher, student = random_model(DENSE, mesh), random_model(TIED, mesh)
    rules, ours, theirs = student.strategy.train, draw(B, T, D), draw(B, T, D, seed=1)

    @functools.partial(jax.jit, static_argnums=4)
    def divergence(teacher, student, theirs, ours, temperature):
        theirs, ours = (rules.shard(a, "batch", "length", None) for a in (theirs, ours))
        return loss.divergence(teacher, student, theirs, ours, rules, temperature)

    with student.on_mesh():
        got = divergence(teacher, student, jnp.asarray(theirs), jnp.asarray(ours), 2.0)
        none = divergence(student, student, jnp.asarray(ours), jnp.asarray(ours), 1.0)
    p = log_softmax(theirs.astype(np.float64) @ weights(teacher)["head_DV"] / 2)
    q = log_softmax(ours.astype(np.float64) @ weights(student)["embed_VD"].T / 2)
    assert_close(got, 4 * (np.exp(p) * (p - q)).sum(-1), 1e-5)
    assert np.abs(none).max() < 1e-6


# -------------------------------------------------------------------- balance


def balance_as_in_the_spec(cfg, scores_BTE, ids_BTK, valid_BT, given):
    """Token by token, as section 5 of the specification writes it; the mean over sequences."""
    E, K, G = cfg.n_routed_experts, cfg.num_experts_per_tok, given.device_groups
    M = G if cfg.topk_method == "greedy" else cfg.topk_group
    total = 0.0
    for scores_TE, ids_TK, valid_T in zip(scores_BTE, ids_BTK, valid_BT):
        tokens = [t for t in range(len(valid_T)) if valid_T[t]]
        f = [E / (K * len(tokens)) * sum(i in ids_TK[t] for t in tokens) for i in range(E)]
        P = [sum(scores_TE[t, i] / scores_TE[t].sum() for t in tokens) / len(tokens) for i in range(E)]
        groups = [range(g * E // G, (g + 1) * E // G) for g in range(G)]
        total += (given.sequence_balance + given.expert_balance) * sum(a * b for a, b in zip(f, P))
        for group in groups:
            share = sum(P[j] for j in group)
            sent = sum(any(i in group for i in ids_TK[t]) for t in tokens)
            total += given.device_balance * sum(f[j] for j in group) / len(group) * share
            total += given.communication_balance * G / (M * len(tokens)) * sent * share
    return total / len(ids_BTK)


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
@pytest.mark.parametrize(
    "given",
    [
        {"sequence_balance": 1e-4},
        {"expert_balance": 0.003},
        {"device_balance": 0.05, "device_groups": 4},
        {"communication_balance": 0.02, "device_groups": 2},
        {"expert_balance": 0.003, "device_balance": 0.05, "communication_balance": 0.02, "device_groups": 4},
    ],
    ids=["sequence", "expert", "device", "communication", "all of V2"],
)
def test_balance_losses_are_those_of_the_papers_with_padding_left_out(name, given):
    cfg, given, L = tiny_config(name), LossConfig(**given), 2
    E, K = cfg.n_routed_experts, cfg.num_experts_per_tok
    logits_LBTE = draw(L, B, T, E)
    ids_LBTK = np.argsort(draw(L, B, T, E, seed=1))[..., :K].astype(np.int32)
    valid_BT = np.arange(T) < np.array([[8], [5], [1], [7]])
    expected = sum(
        balance_as_in_the_spec(cfg, affinity(cfg, logits.astype(np.float64)), ids, valid_BT, given)
        for logits, ids in zip(logits_LBTE, ids_LBTK)
    )
    strategy = Strategy.default()
    with jax.set_mesh(strategy.make_mesh()):
        valid_BT = jnp.asarray(valid_BT)
        P_LBE = jnp.stack([mean_affinity(cfg, jnp.asarray(l), valid_BT, strategy.train) for l in logits_LBTE])
        routing = Routing(jnp.asarray(ids_LBTK), P_LBE, jnp.zeros((L, E)), jnp.zeros(L))
        got = loss.balance(cfg, routing, valid_BT, given, strategy.train)
    assert_close(got, expected, 1e-5)


def test_balanced_experts_cost_the_weight_of_the_loss():
    cfg, strategy = tiny_config("v3", n_routed_experts=8, num_experts_per_tok=2), Strategy.default()
    ids_LBTK = (np.arange(16).reshape(1, 1, 8, 2) % 8).astype(np.int32)
    with jax.set_mesh(strategy.make_mesh()):
        routing = Routing(jnp.asarray(ids_LBTK), jnp.full((1, 1, 8), 1 / 8), jnp.zeros((1, 8)), jnp.zeros(1))
        got = loss.balance(
            cfg, routing, jnp.ones((1, 8), bool), LossConfig(sequence_balance=0.25), strategy.train
        )
    assert_close(got, 0.25, 1e-6)


# -------------------------------------------------------------------- objectives


@functools.partial(jax.jit, static_argnums=0)
def compiled(loss, model, batch, inputs):
    """(loss, aux, gradients) of one microbatch."""
    totals, part = Totals.of(batch), jax.tree.map(lambda a: a[0], batch)

    def f(model):
        return loss(model, part, totals, inputs)

    (total, aux), grads = jax.value_and_grad(f, has_aux=True, allow_int=True)(model)
    return total, aux, grads


def computed(config, model, tokens, segments, targets, reference=None, teacher=None, mtp=0.0):
    modules = model.cfg.num_nextn_predict_layers
    batch = make_batch(tokens, segments, targets, modules, reference=reference)
    with model.on_mesh():
        batch = to_devices(batch, model)
        kind = {"dpo": PreferenceLoss, "distill": DistillationLoss}.get(config.objective, LanguageLoss)
        inputs = StepInputs(np.float32(mtp), teacher=teacher)
        total, aux, grads = compiled(kind(config.program, jnp.float32), model, batch, inputs)
    metrics = aux.metrics | ({} if aux.load_LE is None else {"load": aux.load_LE})
    floats = {p: np.asarray(v[...]) for p, v in parameters(grads).items() if "bias_E" not in p}
    return float(total), {k: np.asarray(v) for k, v in metrics.items()}, floats


def test_language_and_multi_token_losses_are_the_formulas_over_the_tokens_that_count():
    model, tokens, segments = random_model(SPARSE), random_tokens(2, 2 * T), np.ones((2, 2 * T), np.int32)
    targets = np.random.default_rng(0).integers(0, 2, (2, 2 * T)).astype(np.float32)
    total, metrics, _ = computed(run(), model, tokens, segments, targets, mtp=0.3)
    w = weights(model)

    def nll(logits, row, ahead):
        """Of the logits at positions 0, 1, ... for the tokens that many further on."""
        p = log_softmax(logits)
        return -sum(targets[row, t + ahead] * p[t, tokens[row, t + ahead]] for t in range(2 * T - ahead))

    count = targets[:, 1:].sum()
    language = sum(nll(forward(SPARSE, w, tokens[r])[0], r, 1) for r in range(2)) / count
    modules = [sum(nll(predict_ahead(SPARSE, w, tokens[r], k), r, 2 + k) for r in range(2)) for k in range(2)]
    assert_close(metrics["loss"], language, 1e-5)
    assert_close(metrics["mtp_loss"], sum(modules) / 2 / count, 1e-5)
    assert_close(total, language + 0.3 * sum(modules) / 2 / count, 1e-5)
    assert metrics["load"].shape == (3, SPARSE.n_routed_experts)
    assert (metrics["load"].sum(axis=1) == 4 * T * SPARSE.num_experts_per_tok).all()


def test_a_packed_row_has_the_loss_and_the_gradient_of_its_examples_alone():
    model, tokens = random_model(SPARSE), random_tokens(2, 2 * T)
    packed, alone, alone_tokens = (np.zeros((2, 2 * T), np.int32) for _ in range(3))
    begin = 0
    for i, n in enumerate((7, 6)):
        packed[0, begin : begin + n] = i + 1
        alone[i, :n], alone_tokens[i, :n] = 1, tokens[0, begin : begin + n]
        begin += n
    results = [
        computed(run(), model, t, s, (s > 0).astype(np.float32), mtp=0.3)
        for t, s in ((tokens, packed), (alone_tokens, alone))
    ]
    assert results[0][1]["loss"] > 0
    for name in ("loss", "mtp_loss"):
        assert_close(results[0][1][name], results[1][1][name], 1e-5)
    for path, grad in results[1][2].items():
        assert_close(results[0][2][path], grad, 1e-4)


def test_positions_start_anew_in_each_segment_and_nothing_is_predicted_across_them():
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    batch = make_batch(np.arange(6)[None] + 10, segments, np.ones((1, 6), np.float32), modules=1)
    np.testing.assert_array_equal(batch.positions_BT[0, 0], [0, 1, 2, 0, 1, 0])
    np.testing.assert_array_equal(batch.ahead_BJT[0, 0], [[11, 12, 13, 14, 15, 0], [12, 13, 14, 15, 0, 0]])
    np.testing.assert_array_equal(batch.weights_BJT[0, 0], [[1, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_preference_loss_is_the_formula(smoothing):
    model, tokens = random_model(DENSE), random_tokens(4, T)
    used = np.array([[8], [6], [5], [7]])
    segments = (np.arange(T) < used).astype(np.int32)
    targets = ((np.arange(T) >= 3) & (segments > 0)).astype(np.float32)  # three tokens of prompt
    reference = draw(4) - 8
    config = run("dpo", dpo={"beta": 0.3, "label_smoothing": smoothing})
    total, metrics, grads = computed(config, model, tokens, segments, targets, reference)
    w, logprobs = weights(model), []
    for row, length in zip(tokens, used[:, 0]):
        p = log_softmax(forward(DENSE, w, row[:length])[0])
        logprobs.append(sum(p[t - 1, row[t]] for t in range(3, length)))
    ratio = np.array(logprobs) - reference
    chosen, rejected = ratio[0::2], ratio[1::2]
    margin = 0.3 * (chosen - rejected)
    losses = [-(1 - smoothing) * np.log(1 / (1 + np.exp(-m))) - smoothing * np.log(1 / (1 + np.exp(m)))
              for m in margin]  # fmt: skip
    assert_close(total, np.mean(losses), 1e-5)
    assert_close(metrics["margin"], margin.mean(), 1e-5)
    assert_close(metrics["accuracy"], (margin > 0).mean(), 1e-6)
    assert_close(metrics["reward_chosen"], 0.3 * chosen.mean(), 1e-5)
    assert_close(metrics["reward_rejected"], 0.3 * rejected.mean(), 1e-5)
    assert np.abs(grads["head_DV"]).max() > 0


def test_distillation_mixes_divergence_and_loss_and_leaves_the_teacher_alone():
    model, tokens, segments = random_model(DENSE), random_tokens(2, T), np.ones((2, T), np.int32)
    teacher = jax.tree.map(lambda a: 1.5 * a, model)
    targets = np.ones((2, T), np.float32)
    config = run("distill", distill={"teacher": "t", "weight": 0.75, "temperature": 2.0})
    total, metrics, _ = computed(config, model, tokens, segments, targets, teacher=teacher)
    kl, nll = [], []
    for row in tokens:
        ours, theirs = (forward(DENSE, weights(m), row)[0] for m in (model, teacher))
        p, q = log_softmax(theirs / 2), log_softmax(ours / 2)
        kl += list(4 * (np.exp(p) * (p - q)).sum(-1))[:-1]
        nll += [-log_softmax(ours)[t, row[t + 1]] for t in range(T - 1)]
    assert_close(metrics["kl"], np.mean(kl), 1e-5)
    assert_close(metrics["loss"], np.mean(nll), 1e-5)
    assert_close(total, 0.75 * np.mean(kl) + 0.25 * np.mean(nll), 1e-5)
