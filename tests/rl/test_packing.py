"""Batches of sampled answers: every token stands where it is predicted, and the loss is that of the formula
on unpacked answers, however they are packed."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_close, log_softmax, random_tokens
from policies import policy

from jaxseek.config.run import RunConfig
from jaxseek.engine.request import Answer as Sampled
from jaxseek.rl.grpo import advantages, sequence_weights
from jaxseek.rl.objective import PolicyLoss, make_logprobs
from jaxseek.rl.packing import Shapes, answers_of, make_policy_batch, pack
from jaxseek.rl.problem import Answer, Problem
from jaxseek.rl.rollout import Episode
from jaxseek.train.loss import StepInputs
from jaxseek.train.step import accumulate, trained, with_values

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Of prompts and answers; prompts of one length are the same prompt.
LENGTHS = [(3, 5), (3, 1), (6, 8), (6, 2), (1, 7), (1, 1), (6, 4), (4, 8)]
SPREAD = Shapes(microbatches=1, rows=8, length=16, segments=1)
LAYOUTS = {
    "one answer in a row": SPREAD,
    "packed": Shapes(microbatches=1, rows=4, length=32, segments=8),
    "packed, in microbatches, one of which is blank": Shapes(3, 2, 32, 2),
    "a row at a time, some blank": Shapes(8, 1, 48, 8),
}
REWARDS = np.array([[1.0, 0.0, 0.3, 0.0], [0.2, 0.2, 0.9, 0.5]])
VALID = np.array([[1, 1, 1, 1], [1, 0, 1, 1]], bool)
TEMPERATURE = 0.7


def run(**grpo):
    raw = {"objective": "grpo", "model": "m", "out": "o", "steps": 1, "remat": "none"}
    raw |= {"task": {"kind": "arithmetic"}, "rewards": [{"kind": "exact"}]}
    raw |= {"rollout": {"prompts": 2, "max_new_tokens": 8, "temperature": TEMPERATURE}}
    return RunConfig.from_dict(raw | {"grpo": {"group_size": 4} | grpo})


def episodes(experts=False):
    """Of random tokens, and log-probabilities near those of the policy."""
    out = []
    for i, (prompt, new) in enumerate(LENGTHS):
        asked = random_tokens(prompt, seed=100 + prompt, vocab=48).tolist()
        tokens = asked + random_tokens(new, seed=i, vocab=48).tolist()
        logprob = exact(tokens)[prompt - 1 :]
        noise = 0.3 * np.random.default_rng(i).standard_normal(new)
        sampled = Sampled(tokens[prompt:], tempered=(logprob + noise).tolist(), finish_reason="stop")
        if experts:
            sampled.experts = np.concatenate([drawn(100 + prompt, prompt - 1), drawn(i, new)], axis=1)
        answer = Answer(Problem("", ""), "", None, "", new, "stop")
        out.append(Episode(tokens[:prompt], sampled, answer, 0))
    return out


def drawn(seed, tokens):
    """Three of eight experts for each token of one layer."""
    every = np.tile(np.arange(8), (1, tokens, 1))
    return np.random.default_rng(seed).permuted(every, axis=-1)[..., :3].astype(np.int16)


@functools.cache
def logits(tokens):
    return np.asarray(policy()(np.array([tokens + (0,) * (16 - len(tokens))], np.int32))[0], np.float64)


def exact(tokens):
    """log p of each token but the first, at the temperature, in float64."""
    x = log_softmax(logits(tuple(tokens))[: len(tokens) - 1] / TEMPERATURE)
    return x[np.arange(len(tokens) - 1), tokens[1:]]


def known(reference=True):
    """Advantages, and a reference at random around the policy."""
    table = {"advantage": list(advantages(REWARDS, run().grpo, VALID).reshape(-1))}
    if reference:
        table["reference"] = [
            exact([*e.prompt, *e.sampled.tokens])[len(e.prompt) - 1 :]
            + 0.2 * np.random.default_rng(9).standard_normal(len(e.sampled.tokens))
            for e in episodes()
        ]
    return table


def batch_of(config, shapes, counted=None, order=None, experts=False, reference=True):
    some, table = episodes(experts), known(reference)
    order = range(len(some)) if order is None else order
    lengths_N = np.array([new for _, new in LENGTHS])
    counted = VALID.reshape(-1) if counted is None else counted
    shares_N = sequence_weights(lengths_N, counted, config.grpo, 8)
    table = {name: [lists[i] for i in order] for name, lists in table.items()}
    some = [some[i] for i in order]
    return make_policy_batch(some, shares_N[np.array(order)], table, shapes, policy(), experts)


@functools.cache
def compiled(shapes, **grpo):
    """The compiled gradients of a layout, which tests share."""
    loss = PolicyLoss(run(**grpo).program, np.dtype("float32"), shapes.segments)

    def f(params, part, totals):
        return loss(with_values(policy(), params), part, totals, StepInputs())

    return jax.jit(lambda params, batch: accumulate(jax.grad(f, has_aux=True), params, batch))


def updated(preset, shapes, change=lambda batch: batch, routing_replay=False, **how):
    """Gradients by path, and metrics."""
    grpo = {"preset": preset, "beta": 0.04, "routing_replay": routing_replay}
    with policy().on_mesh():
        batch = change(batch_of(run(**grpo), shapes, **how))
        grads, aux = compiled(shapes, **grpo)(trained(policy()), batch)
    return {p: np.asarray(g) for p, g in grads.items()}, {k: np.asarray(v) for k, v in aux.metrics.items()}


# -------------------------------------------------------------------- packing


def size(prompts, news, row):
    return sum(len(prompts[own[0]]) - 1 + sum(1 + news[i] for i in own) for own in row)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 20)), min_size=1, max_size=40),
    st.integers(1, 8),
)
def test_every_answer_is_packed_once_and_no_row_is_overfull(lengths, segments):
    prompts, news = [(0,) * prompt for prompt, _ in lengths], [new for _, new in lengths]
    rows = pack(prompts, news, 32, segments)
    assert sorted(i for row in rows for own in row for i in own) == list(range(len(lengths)))
    assert all(size(prompts, news, row) <= 32 and 0 < sum(map(len, row)) <= segments for row in rows)
    assert all(len({prompts[i] for i in own}) == 1 for row in rows for own in row)
    assert all(
        size(prompts, news, a + b) > 32 or sum(map(len, a + b)) > segments
        for n, a in enumerate(rows) for b in rows[:n] if len(a) == 1
    )  # fmt: skip


def test_short_answers_of_a_group_share_one_prompt():
    prompts, news = [(1, 2, 3, 4)] * 4 + [(5, 6)] * 3, [2, 1, 2, 1, 3, 3, 3]
    (first,), (second,) = sorted(pack(prompts, news, 16, 8))
    assert (sorted(first), sorted(second)) == ([0, 1, 2, 3], [4, 5, 6])
    assert [[sorted(own) for own in row] for row in pack(prompts, news, 32, 8)] == [[[0, 1, 2, 3], [4, 5, 6]]]


@pytest.mark.parametrize("group", [2, 3, 4, 6, 7, 16, 64])
@pytest.mark.parametrize(("prompt", "new"), [(8, 8), (64, 64), (100, 10), (8, 200)])
@pytest.mark.parametrize("minibatches", [1, 4])
def test_a_run_has_room_for_all_its_answers(group, prompt, new, minibatches):
    base = run()
    config = base.replace(
        grpo=dataclasses.replace(base.grpo, group_size=group, minibatches=minibatches),
        rollout=dataclasses.replace(base.rollout, prompts=8, max_prompt_tokens=prompt, max_new_tokens=new),
        batch=dataclasses.replace(base.batch, accumulation=2),
    )
    shapes = Shapes.of(config, rows_multiple=3, length_multiple=5)
    assert (shapes.microbatches, shapes.rows % 3, shapes.length % 80) == (2, 0, 0)
    for seed in range(12):
        draw = np.random.default_rng(seed)
        answers = np.repeat(np.arange(8), group)  # the problem of each
        if minibatches > 1:
            answers = draw.permutation(answers)[: 8 * group // minibatches]
        lengths = [prompt] * 8 if seed == 0 else draw.integers(1, prompt + 1, 8)
        prompts = [(int(p),) * int(lengths[p]) for p in answers]
        news = [new] * len(prompts) if seed < 2 else draw.integers(1, new + 1, len(prompts)).tolist()
        rows = pack(prompts, news, shapes.length, shapes.segments)
        assert len(rows) <= shapes.microbatches * shapes.rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_stands_where_it_is_predicted_with_what_is_known_of_it(layout):
    shapes, some, table = LAYOUTS[layout], episodes(experts=True), known()
    got = batch_of(run(), shapes, experts=True)
    flat = {
        f.name: np.asarray(v).reshape(-1, *np.shape(v)[2:])
        for f in dataclasses.fields(got)
        if f.name != "count" and (v := getattr(got, f.name)) is not None
    }
    segments, tokens = flat["segments_BT"], flat["tokens_BT"]
    found, learnt = [], 0
    positions, prefixes = flat["positions_BT"], flat["prefixes_BT"]
    for r, number in {(r, z) for r, row in enumerate(segments) for z in row if 0 < z <= shapes.segments}:
        (at,) = np.nonzero(segments[r] == number)
        n, (prefix,) = len(at), set(prefixes[r, at])
        (before,) = np.nonzero(segments[r] == prefix)
        assert (np.diff(at) == 1).all()
        assert (np.diff(before) == 1).all()
        together = np.concatenate([before, at])
        np.testing.assert_array_equal(positions[r, together], np.arange(len(together)))
        assert (prefixes[r, before] == prefix).all()
        whole = tokens[r, together].tolist()
        own = [i for i, e in enumerate(some) if [*e.prompt, *e.sampled.tokens] == whole]
        assert len(own) == 1
        i, e = own[0], some[own[0]]
        assert len(before) == len(e.prompt) - 1
        found.append(i)
        where = at[: n - 1]  # one before each answer token
        np.testing.assert_array_equal(flat["ahead_BJT"][r, 0, at[:-1]], tokens[r, at[1:]])
        counted = bool(VALID.reshape(-1)[i])
        np.testing.assert_array_equal(np.nonzero(flat["mask_BT"][r, at])[0], where - at[0] if counted else [])
        np.testing.assert_array_equal(
            np.nonzero(flat["weights_BJT"][r, 0, at])[0], where - at[0] if counted else []
        )
        learnt += counted * len(where)
        np.testing.assert_allclose(flat["sampled_BT"][r, where], e.sampled.tempered, rtol=1e-6)
        np.testing.assert_allclose(flat["reference_BT"][r, where], table["reference"][i], rtol=1e-6)
        np.testing.assert_allclose(flat["advantage_BT"][r, where], table["advantage"][i], rtol=1e-6)
        np.testing.assert_array_equal(
            flat["experts_BTLK"][r, together[:-1]], e.sampled.experts.transpose(1, 0, 2)
        )
        assert (flat["experts_BTLK"][r, at[-1]] == -1).all()
    assert sorted(found) == list(range(len(some)))
    assert learnt == flat["mask_BT"].sum()
    for name in ("mask_BT", "sampled_BT", "reference_BT", "advantage_BT"):
        assert not flat[name][segments == 0].any()
    used = -(-(1 + np.nonzero(segments.any(axis=1))[0].max()) // shapes.rows)
    assert int(got.count) == used


# -------------------------------------------------------------------- the loss


def grpo_as_written(counted):
    """DeepSeekMath eq. 3: min of the clipped ratios times the advantage, less beta KL (k3), in float64."""
    cfg, table, terms = run(beta=0.04).grpo, known(), []
    for e, A, reference, keep in zip(episodes(), table["advantage"], table["reference"], counted):
        logp = exact([*e.prompt, *e.sampled.tokens])[len(e.prompt) - 1 :]
        ratio, x = np.exp(logp - e.sampled.tempered), reference - logp
        gain = np.minimum(ratio * A, np.clip(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high) * A)
        if keep:
            terms.append((gain - cfg.beta * (np.exp(x) - 1 - x)).mean())
    return -np.mean(terms)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_and_its_gradient_are_those_of_answers_on_their_own(layout):
    grads, metrics = updated("r1_zero", LAYOUTS[layout])
    assert_close(metrics["loss"], grpo_as_written(VALID.reshape(-1)), 2e-5)
    assert metrics["tokens"] == sum(n for (_, n), v in zip(LENGTHS, VALID.reshape(-1)) if v)
    expected, _ = updated("r1_zero", SPREAD)
    assert max(np.abs(g).max() for g in expected.values()) > 1e-3
    for path, g in grads.items():
        assert_close(g, expected[path], 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gspo", "dapo", "dr_grpo", "cispo", "r1"])
def test_no_preset_depends_on_packing_or_on_the_order_of_answers(preset):
    layout = LAYOUTS["packed, in microbatches, one of which is blank"]
    grads, metrics = updated(preset, layout, order=[5, 2, 7, 0, 1, 6, 3, 4])
    expected, one = updated(preset, SPREAD)
    for name in ("loss", "tokens", "kl", "ratio", "ratio_max", "entropy", "gap", "gap_max"):
        assert_close(metrics[name], one[name], 1e-4)
    for path, g in grads.items():
        assert_close(g, expected[path], 2e-4)


def test_blank_microbatches_are_not_computed():
    shapes = LAYOUTS["packed, in microbatches, one of which is blank"]

    def poison(batch):
        last = np.arange(shapes.microbatches) >= int(batch.count)
        assert last.sum() == 1
        weights_BJT = np.where(last[:, None, None, None], np.nan, batch.weights_BJT).astype(np.float32)
        return dataclasses.replace(batch, weights_BJT=jax.device_put(weights_BJT, batch.weights_BJT.sharding))

    _, metrics = updated("r1_zero", shapes, poison)
    assert_close(metrics["loss"], grpo_as_written(VALID.reshape(-1)), 2e-5)


def test_no_answer_that_counts_is_no_loss_and_no_gradient():
    grads, metrics = updated("r1_zero", LAYOUTS["packed"], counted=np.zeros(8, bool))
    assert metrics["tokens"] == metrics["loss"] == 0
    assert not any(g.any() for g in grads.values())


def test_log_probabilities_come_back_to_their_answers():
    shapes = LAYOUTS["packed, in microbatches, one of which is blank"]
    loss = PolicyLoss(run().program, np.dtype("float32"), shapes.segments)
    with policy().on_mesh():
        table = np.asarray(make_logprobs(loss)(policy(), batch_of(run(), shapes)))
    for e, got in zip(episodes(), answers_of(table, episodes(), shapes)):
        expected = exact([*e.prompt, *e.sampled.tokens])[len(e.prompt) - 1 :]
        np.testing.assert_allclose(got, expected, atol=2e-5)


# -------------------------------------------------------------------- routing


def test_replayed_experts_are_used_and_the_gates_still_learn():
    """Random experts in place of the router's: other log-probabilities, and a gradient for the router."""
    shapes, config = LAYOUTS["packed"], run(routing_replay=True)
    loss = PolicyLoss(config.program, np.dtype("float32"), shapes.segments)
    with policy().on_mesh():
        batch = dataclasses.replace(batch_of(config, shapes, experts=True), count=None)
        one = jax.tree.map(lambda a: a[0], batch)
        out, logprob_BT, _ = jax.jit(loss.logprobs)(policy(), one)
    grads, metrics = updated("r1_zero", shapes, routing_replay=True, experts=True, counted=np.ones(8, bool))
    used_BTK, own_BTK = np.asarray(out.routing[0].ids_BTK)[0], np.asarray(out.routing[0].own_BTK)[0]
    said_BTK = np.asarray(one.experts_BTLK)[:, :, 0]
    known_BT = said_BTK[..., 0] >= 0
    np.testing.assert_array_equal(used_BTK[known_BT], said_BTK[known_BT])
    np.testing.assert_array_equal(used_BTK[~known_BT], own_BTK[~known_BT])
    differ = (np.sort(said_BTK[known_BT]) != np.sort(own_BTK[known_BT])).any(axis=-1)
    once = sum(prompt - 1 for prompt in {p for p, _ in LENGTHS}) + sum(n for _, n in LENGTHS)
    assert int(metrics["routed"]) == known_BT.sum() == once
    assert int(metrics["rerouted"]) == differ.sum() > 20
    (router,) = (p for p in grads if p.endswith("router_DE"))
    assert np.abs(grads[router]).max() > 1e-4
    replayed = answers_of(np.asarray(logprob_BT), episodes(), shapes)[2]
    assert np.abs(replayed - exact([*episodes()[2].prompt, *episodes()[2].sampled.tokens])[5:]).max() > 0.01
