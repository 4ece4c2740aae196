"""GRPO's pure functions against each paper's formula, in float64 loops over problems, answers and tokens."""

import dataclasses
import functools
from dataclasses import dataclass
from math import exp, log

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import slow

from jaxseek.config.model import ConfigError
from jaxseek.config.rl import PRESETS, GrpoConfig
from jaxseek.config.run import RunConfig
from jaxseek.rl import grpo

pytestmark = pytest.mark.usefixtures("quick_compilation")

MAX_NEW, PROBLEMS, GROUP = 8, 3, 4
SEEDS = range(3)
EACH_RATIO = ("token", "sequence_mean", "sequence")


@dataclass
class Answers:
    """Log-probabilities of N answers' tokens, a list of arrays each, and the rewards [P, G]."""

    logprob: list
    old: list
    reference: list
    rollout: list
    rewards: np.ndarray

    @property
    def lengths(self):
        return np.array([len(x) for x in self.logprob])


def draw(seed, spread=1.0):
    """Ragged answers, whose ratios lie on both sides of usual bounds and not at them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, MAX_NEW + 1, PROBLEMS * GROUP)
    lengths[:2] = 1, MAX_NEW
    logprob = [-3 * rng.random(n) - 0.1 for n in lengths]

    def away(sizes):
        return [x - spread * (rng.choice(sizes, len(x)) + 0.02 * rng.random(len(x))) for x in logprob]

    old = away([-1.5, -0.4, -0.1, 0.1, 0.21, 0.4, 1.5])
    rollout = [x - rng.normal(0, 0.5, len(x)) for x in old]
    rewards = rng.choice([0.0, 0.1, 1.0, 1.1], (PROBLEMS, GROUP))
    rewards[0, :2] = 0, 1
    return Answers(logprob, old, away([-0.8, -0.1, 0.2, 1.0]), rollout, rewards)


# -------------------------------------------------------------------- ours


ONE_A_ROW = [[i] for i in range(PROBLEMS * GROUP)]
PACKED = [[3, 0, 7], [], [1, 11, 2, 5], [4, 10], [6, 8, 9], *[[]] * 7]
SEGMENTS = 4  # in a row, at most; few shapes compile soon


def lay_out(parts, rows, lead=2, fill=np.nan):
    """Answers, a list of arrays, in rows [B, T] behind `lead` prompt tokens each; else `fill`."""
    T = max(SEGMENTS, *map(len, rows)) * (lead + MAX_NEW) + 1
    out_BT = np.full((len(rows), T), float(fill))
    for b, row in enumerate(rows):
        at = 0
        for i in row:
            out_BT[b, at + lead : at + lead + len(parts[i])] = parts[i]
            at += lead + len(parts[i])
    return out_BT


def take_out(x_BT, lengths, rows, lead=2):
    """`lay_out` back."""
    out = [np.zeros(n) for n in lengths]
    for b, row in enumerate(rows):
        at = 0
        for i in row:
            out[i] = np.asarray(x_BT[b, at + lead : at + lead + lengths[i]])
            at += lead + lengths[i]
    return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def compiled(cfg, segments, logprob_BT, weight_BT, *others, **optional):
    """The weighted sum of the losses, metrics, and the gradient."""

    def f(logprob_BT):
        loss_BT, metrics = grpo.policy_loss(cfg, logprob_BT, *others, segments, **optional)
        return (loss_BT * weight_BT).sum(), metrics

    return jax.value_and_grad(f, has_aux=True)(logprob_BT)


def step(a, cfg, rows=ONE_A_ROW, counted=None, token_advantages=None, old=True, rollout=None, micro=1):
    """Loss, gradient (a list of arrays) and metrics of a minibatch, in float64 but for shares and advantages.

    Whatever is no answer's token holds NaN.
    """
    counted = np.ones(len(a.lengths), bool) if counted is None else counted
    weights = grpo.sequence_weights(a.lengths, counted, cfg, MAX_NEW)
    each = grpo.advantages(a.rewards, cfg, counted.reshape(a.rewards.shape)).reshape(-1)
    tokens = (
        [np.full(n, x) for n, x in zip(a.lengths, each)] if token_advantages is None else token_advantages
    )
    spread = [np.full(n, 1.0) for n in a.lengths]
    place = functools.partial(lay_out, rows=rows)
    segments_BT = np.zeros(place(spread).shape, np.int32)
    for b, row in enumerate(rows):
        ends = np.cumsum([2 + a.lengths[i] for i in row])
        for z, (start, end) in enumerate(zip([0, *ends[:-1]], ends)):
            segments_BT[b, start:end] = z + 1
    arrays = [
        place(a.logprob),
        lay_out([w * x for w, x in zip(weights, spread)], rows, fill=0),
        place(a.old) if old else None,
        place(tokens),
        lay_out([c * x for c, x in zip(counted, spread)], rows, fill=0),
        segments_BT,
    ]
    optional = {"reference_BT": place(a.reference)} if cfg.beta else {}
    optional |= {"rollout_BT": place(a.rollout)} if rollout else {}
    segments = max(SEGMENTS, *map(len, rows))
    total, grads, metrics = 0.0, [], []
    with jax.enable_x64(True):
        for part in np.array_split(np.arange(len(rows)), micro):
            given, named = jax.tree.map(lambda x, p=part: jnp.asarray(x[p]), (arrays, optional))
            (value, sums), grad_BT = compiled(cfg, segments, *given, **named)
            total += float(value)
            grads.append(np.asarray(grad_BT))
            metrics.append(jax.tree.map(float, sums))
    joined = {k: (max if k.endswith("_max") else sum)(m[k] for m in metrics) for k in metrics[0]}
    return total, take_out(np.concatenate(grads), a.lengths, rows), joined


def assert_same(got, formula, a):
    """A step's value is the formula's, and its gradient the formula's differences."""
    np.testing.assert_allclose(got[0], formula(a.logprob), rtol=1e-6, atol=1e-7)
    assert max(np.abs(g).max() for g in got[1]) > 1e-3
    h, base = 1e-6, [x.tolist() for x in a.logprob]
    for i, x in enumerate(base):
        for t in range(len(x)):
            ends = []
            for change in (h, -h):
                moved = [list(y) for y in base]
                moved[i][t] += change
                ends.append(formula(moved))
            np.testing.assert_allclose(
                got[1][i][t], (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-7, err_msg=f"{i} {t}"
            )


# -------------------------------------------------------------------- the papers' formulas


def clip(x, low, high):
    return max(low, min(x, high))


def normalised(rewards):
    """(r - mean) / std of a group; 0 where all are equal."""
    r = list(rewards)
    mean = sum(r) / len(r)
    std = (sum((x - mean) ** 2 for x in r) / len(r)) ** 0.5
    return [(x - mean) / std if std > 1e-9 else 0.0 for x in r]


def k3(logprob, reference):
    return exp(reference - logprob) - (reference - logprob) - 1


def k2(logprob, reference):
    return (reference - logprob) ** 2 / 2


def deepseekmath(a, logprob, eps, beta, kl=k3, dual=None, cap=None):
    """DeepSeekMath, eq. 3 and 4; eq. 5 of dual-clip PPO; truncated importance sampling by token."""
    J = 0.0
    for p in range(PROBLEMS):
        A = normalised(a.rewards[p])
        for g in range(GROUP):
            i, total = p * GROUP + g, 0.0
            for t in range(len(logprob[i])):
                ratio = exp(logprob[i][t] - a.old[i][t])
                term = min(ratio * A[g], clip(ratio, 1 - eps, 1 + eps) * A[g])
                if dual and A[g] < 0:
                    term = max(term, dual * A[g])
                if cap:
                    term *= min(exp(a.old[i][t] - a.rollout[i][t]), cap)
                total += term - beta * kl(logprob[i][t], a.reference[i][t])
            J += total / len(logprob[i]) / GROUP / PROBLEMS
    return -J


def r1(a, logprob, eps, beta):
    """R1, eq. 1 to 3: probabilities of whole answers."""
    J = 0.0
    for p in range(PROBLEMS):
        A = normalised(a.rewards[p])
        for g in range(GROUP):
            pi, old, reference = (sum(x[p * GROUP + g]) for x in (logprob, a.old, a.reference))
            ratio = exp(pi - old)
            term = min(ratio * A[g], clip(ratio, 1 - eps, 1 + eps) * A[g])
            J += (term - beta * k3(pi, reference)) / GROUP / PROBLEMS
    return -J


def dapo(a, logprob, low, high, rewards, counted):
    """DAPO, eq. 8 and 9, with the tokens of the minibatch for those of a group, as in its code."""
    J, tokens = 0.0, 0
    for p in range(PROBLEMS):
        members = [i for i in range(p * GROUP, (p + 1) * GROUP) if counted[i]]
        for i, A in zip(members, normalised([rewards[i] for i in members])):
            for t in range(len(logprob[i])):
                ratio = exp(logprob[i][t] - a.old[i][t])
                J += min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)
                tokens += 1
    return -J / tokens


def dr_grpo(a, logprob, eps):
    """Dr. GRPO: no 1 / length, which a constant takes the place of, and no deviation."""
    J = 0.0
    for p in range(PROBLEMS):
        mean = sum(a.rewards[p]) / GROUP
        for g in range(GROUP):
            for new, old in zip(logprob[p * GROUP + g], a.old[p * GROUP + g]):
                A, ratio = a.rewards[p, g] - mean, exp(new - old)
                J += min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)
    return -J / (PROBLEMS * GROUP * MAX_NEW)


def gspo(a, logprob, low, high):
    """GSPO, eq. 5 to 7."""
    J = 0.0
    for p in range(PROBLEMS):
        A = normalised(a.rewards[p])
        for g in range(GROUP):
            i = p * GROUP + g
            s = exp(sum(n - o for n, o in zip(logprob[i], a.old[i])) / len(logprob[i]))
            J += min(s * A[g], clip(s, 1 - low, 1 + high) * A[g]) / GROUP / PROBLEMS
    return -J


def cispo(a, logprob, low, high):
    """MiniMax-M1, eq. 4 and 5: the bounded ratio is a constant, that of the policy before the step."""
    J = 0.0
    for p in range(PROBLEMS):
        A = normalised(a.rewards[p])
        for g in range(GROUP):
            i = p * GROUP + g
            for t in range(len(logprob[i])):
                weight = clip(exp(a.logprob[i][t] - a.old[i][t]), 1 - low, 1 + high)
                J += weight * A[g] * logprob[i][t]
    return -J / sum(a.lengths)


def rloo(a, logprob):
    """RLOO, section 2.3, whose gradient at the sampling policy is that of A log pi(answer)."""
    J = 0.0
    for p in range(PROBLEMS):
        for g in range(GROUP):
            others = sum(a.rewards[p, j] for j in range(GROUP) if j != g) / (GROUP - 1)
            J += (a.rewards[p, g] - others) * sum(logprob[p * GROUP + g]) / GROUP / PROBLEMS
    return -J


def reinforce_plus_plus_advantages(a, beta, kl, baseline):
    """REINFORCE++: r - beta (KL from here to the end), normalised over the tokens of the batch."""
    out = []
    for i, n in enumerate(a.lengths):
        p, g = divmod(i, GROUP)
        r = a.rewards[p, g] - (sum(a.rewards[p]) / GROUP if baseline else 0)
        costs = [kl(x, y) for x, y in zip(a.old[i], a.reference[i])]
        out.append([r - beta * sum(costs[t:]) for t in range(n)])
    flat = [x for row in out for x in row]
    mean = sum(flat) / len(flat)
    std = (sum((x - mean) ** 2 for x in flat) / len(flat)) ** 0.5
    return [np.array([(x - mean) / std for x in row]) for row in out]


def clipped_tokens(a, A, logprob, eps):
    """PPO's clipped mean over all tokens, with an advantage of each."""
    J = 0.0
    for i in range(len(logprob)):
        for t in range(len(logprob[i])):
            ratio = exp(logprob[i][t] - a.old[i][t])
            J += min(ratio * A[i][t], clip(ratio, 1 - eps, 1 + eps) * A[i][t])
    return -J / sum(a.lengths)


# -------------------------------------------------------------------- ours against them


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("given", "formula"),
    [
        ({"beta": 0.04}, lambda a, x: deepseekmath(a, x, 0.2, 0.04)),
        ({"beta": 0.04, "kl": "k2"}, lambda a, x: deepseekmath(a, x, 0.2, 0.04, kl=k2)),
        ({"beta": 0, "dual_clip": 3.0}, lambda a, x: deepseekmath(a, x, 0.2, 0, dual=3.0)),
        ({"beta": 0.1, "importance_cap": 1.2}, lambda a, x: deepseekmath(a, x, 0.2, 0.1, cap=1.2)),
        ({"ratio": "sequence", "beta": 0.01}, lambda a, x: r1(a, x, 0.2, 0.01)),
        ({"ratio": "sequence", **PRESETS["r1"]}, lambda a, x: r1(a, x, 10, 0.001)),
        (PRESETS["dr_grpo"], lambda a, x: dr_grpo(a, x, 0.2)),
        (PRESETS["gspo"], lambda a, x: gspo(a, x, 3e-4, 4e-4)),
        (PRESETS["cispo"], lambda a, x: cispo(a, x, 1, 4)),
        (PRESETS["cispo"] | {"clip_low": 0.3, "clip_high": 0.4}, lambda a, x: cispo(a, x, 0.3, 0.4)),
    ],
    ids=["grpo", "k2", "dual clip", "tis", "r1 0.2", "r1 10", "dr_grpo", "gspo", "cispo", "cispo both"],
)
def test_the_loss_and_its_gradient_are_the_papers(given, formula, seed):
    cfg = GrpoConfig(**given)
    a = draw(seed, 0.002 if cfg.ratio == "sequence_mean" else 1.0)  # GSPO's bounds are tight
    got = step(a, cfg, PACKED, rollout=bool(cfg.importance_cap))
    assert_same(got, functools.partial(formula, a), a)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("masked", [False, True], ids=["shaped", "masked"])
def test_dapo_shapes_the_reward_of_long_answers_or_masks_them(masked, seed):
    cfg = GrpoConfig(**PRESETS["dapo"] | {"overlong_buffer": 0.0 if masked else 0.5, "overlong_mask": masked})
    a, rewards = draw(seed), []
    for r, n in zip(a.rewards.reshape(-1), a.lengths):  # eq. 13, the buffer being 4 of 8 tokens
        rewards.append(r + (0 if masked or n <= 4 else (4 - n) / 4))
    counted = a.lengths < MAX_NEW if masked else np.ones(len(rewards), bool)
    assert masked == (not counted.all())
    shaped = a.rewards + grpo.overlong_penalty(a.lengths, MAX_NEW, cfg).reshape(a.rewards.shape)
    got = step(dataclasses.replace(a, rewards=shaped), cfg, PACKED, counted=counted)
    assert_same(got, lambda x: dapo(a, x, 0.2, 0.28, rewards, counted), a)


def test_the_overlong_penalty_is_that_of_dapo():
    lengths = np.array([1, 16384, 17408, 18432, 20480, 30000])
    cfg = GrpoConfig(**PRESETS["dapo"])
    np.testing.assert_allclose(grpo.overlong_penalty(lengths, 20480, cfg), [0, 0, -0.25, -0.5, -1, -1])
    cfg = dataclasses.replace(cfg, overlong_penalty=0.3)
    np.testing.assert_allclose(grpo.overlong_penalty(lengths, 20480, cfg), [0, 0, -0.075, -0.15, -0.3, -0.3])
    assert not grpo.overlong_penalty(lengths, 20480, GrpoConfig()).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo_is_the_policy_gradient_with_the_others_as_baseline(seed):
    cfg = GrpoConfig(baseline="leave_one_out", scale="none", ratio="sequence", beta=0)
    a = draw(seed)
    value, grads, _ = step(a, cfg, PACKED, old=False)
    A = grpo.advantages(a.rewards, cfg)
    np.testing.assert_allclose(value, -A.mean(), atol=1e-7)  # on-policy, all ratios are 1
    surrogate = rloo(a, a.logprob)
    assert_same((surrogate, grads), functools.partial(rloo, a), a)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("baseline", ["none", "group"])
def test_reinforce_plus_plus_has_kl_in_the_reward_of_tokens(kind, baseline):
    cfg = GrpoConfig(
        baseline=baseline, scale="batch", kl=kind, kl_in="reward", beta=0.1, normalization="token"
    )
    kl = {"k1": lambda x, y: x - y, "k2": k2, "k3": k3}[kind]
    a = draw(1)
    A = reinforce_plus_plus_advantages(a, 0.1, kl, baseline == "group")
    grid = functools.partial(lay_out, rows=ONE_A_ROW, lead=0)
    mask_NT = lay_out([np.ones(n) for n in a.lengths], ONE_A_ROW, lead=0, fill=0)
    got_NT = grpo.kl_in_reward(a.rewards, grid(a.old), grid(a.reference), mask_NT, cfg)
    assert not got_NT[mask_NT == 0].any()
    for got, expected in zip(take_out(got_NT, a.lengths, ONE_A_ROW, lead=0), A):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
    tokens = take_out(got_NT, a.lengths, ONE_A_ROW, lead=0)
    got = step(a, cfg, PACKED, token_advantages=tokens)
    assert_same(got, lambda x: clipped_tokens(a, A, x, 0.2), a)


def test_kl_in_the_reward_pulls_where_all_rewards_are_equal():
    logprob_NT, reference_NT = np.zeros((2, 3)), np.array([[-1.0, -2.0, 3.0], [np.nan] * 3])
    valid_PG = np.array([[True, False]])
    for scale in ("group", "none"):
        cfg = GrpoConfig(scale=scale, kl="k1", kl_in="reward", beta=0.1)
        got = grpo.kl_in_reward(np.ones((1, 2)), logprob_NT, reference_NT, np.ones((2, 3)), cfg, valid_PG)
        np.testing.assert_allclose(got, [[0, 0.1, 0.3], [0, 0, 0]], atol=1e-7)


# -------------------------------------------------------------------- advantages


def test_advantages_are_those_of_the_specification():
    rewards = np.array([[1.0, 0, 0, 1]])
    assert grpo.advantages(rewards, GrpoConfig()).tolist() == [[1, -1, -1, 1]]
    cases = [
        ("leave_one_out", "none", [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        ("group", "none", [0.5, -0.5, -0.5, 0.5]),
        ("none", "none", [1, 0, 0, 1]),
        ("none", "batch", [1, -1, -1, 1]),
    ]
    for baseline, scale, expected in cases:
        got = grpo.advantages(rewards, GrpoConfig(baseline=baseline, scale=scale))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, [expected], rtol=1e-6)


def test_the_batch_scale_is_over_all_problems():
    rewards = np.array([[1.0, 0, 0, 1], [5, 1, 1, 1]])
    plain, ours = rewards - rewards.mean(), rewards - rewards.mean(axis=1, keepdims=True)
    for baseline, expected in (("none", plain / rewards.std()), ("group", ours / ours.std())):
        got = grpo.advantages(rewards, GrpoConfig(baseline=baseline, scale="batch"))
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "none"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_failed_reward_changes_no_other_advantage(baseline, scale):
    cfg = GrpoConfig(baseline=baseline, scale=scale)
    whole = np.array([[1.0, 0.5, 0.0], [0.0, 0.25, 1.0]])
    with_failed = np.array([[1.0, 0.5, np.nan, 0.0], [0.0, 0.25, 1.0, -np.inf]])
    valid = np.isfinite(with_failed)
    got = grpo.advantages(with_failed, cfg, valid)
    assert not got[~valid].any()
    np.testing.assert_array_equal(got[valid].reshape(2, 3), grpo.advantages(whole, cfg))


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_no_advantage_and_no_gradient(baseline, scale):
    cfg = GrpoConfig(baseline=baseline, scale=scale, beta=0)
    a = draw(0)
    a.rewards = np.array([[0.3, 0.1 + 0.2, 0.3, 0.3], [1.0] * 4, [0.0] * 4])  # 0.1 + 0.2 > 0.3 in float64
    assert grpo.flat_groups(a.rewards).all()
    assert not grpo.advantages(a.rewards, cfg).any()
    value, grads, metrics = step(a, cfg)
    assert value == 0
    assert not any(g.any() for g in grads)
    assert all(np.isfinite(list(metrics.values())))
    mixed = np.concatenate([a.rewards, [[1.0, 0, 0, 0]]])
    assert grpo.flat_groups(mixed).tolist() == [True, True, True, False]
    got = grpo.advantages(mixed, cfg)
    assert not got[:3].any()
    assert got[3].all()


def test_groups_are_flat_by_their_valid_answers():
    rewards = np.array([[1.0, 0, np.nan], [1, 0, 1], [1, 1, 0], [1, 0, 0]])
    valid = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 0], [0, 1, 0]], bool)
    assert grpo.flat_groups(rewards, valid).tolist() == [False, True, True, True]
    assert grpo.advantages(rewards, GrpoConfig(baseline="leave_one_out", scale="none"), valid).tolist() == [
        [1, -1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]
    ]  # fmt: skip


def test_rewards_that_cannot_be_used_are_named():
    with pytest.raises(ValueError, match="problem 1, answer 0 is nan, expected a finite number"):
        grpo.advantages(np.array([[0.0, 1], [np.nan, 1]]), GrpoConfig())
    with pytest.raises(ValueError, match=r"\(2,\) and valid \(2,\), expected \[P, G\]"):
        grpo.advantages(np.zeros(2), GrpoConfig())


@pytest.mark.parametrize(
    ("normalization", "shares"),
    [
        ("token", [1 / 7, 1 / 7, 0, 1 / 7]),
        ("sequence", [1 / 12, 1 / 3, 0, 1 / 6]),
        ("constant", [1 / 32, 1 / 32, 0, 1 / 32]),
    ],
)
def test_answers_that_do_not_count_have_no_share(normalization, shares):
    cfg, counted = GrpoConfig(normalization=normalization), np.array([True, True, False, True])
    got = grpo.sequence_weights(np.array([4, 1, 8, 2]), counted, cfg, 8)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, shares, rtol=1e-6)
    assert not grpo.sequence_weights(np.array([4, 1]), np.zeros(2, bool), cfg, 8).any()


# -------------------------------------------------------------------- faults


def one(cfg, ratio, A, jacobian=False):
    """Metrics and the gradient of a row that is one sequence of tokens with these ratios and advantages."""
    old = jnp.full((1, len(ratio)), -1.0)
    logprob = old + jnp.log(jnp.asarray([ratio], jnp.float32))
    ones = jnp.ones_like(old)

    @jax.jit
    def f(logprob):
        loss, metrics = grpo.policy_loss(
            cfg, logprob, old, jnp.asarray([A], jnp.float32), ones, ones.astype(jnp.int32), 1
        )
        return (loss[0] if jacobian else loss.sum()), metrics

    grad, metrics = (jax.jacobian if jacobian else jax.grad)(f, has_aux=True)(logprob)
    return np.asarray(grad)[..., 0, :], metrics


def test_a_bound_stops_a_token_that_has_moved_far_enough_and_no_other():
    ratio, good = [0.5, 1.0, 2.0, 9.0], [1.0] * 4
    bad = [-1.0] * 4
    cfg = GrpoConfig(clip_low=0.2, clip_high=0.28)
    for A, c, expected, low, high in (
        (good, 0.0, [-0.5, -1, 0, 0], 0, 2),
        (bad, 0.0, [0, 1, 2, 9], 1, 0),
        (bad, 3.0, [0, 1, 2, 0], 1, 0),
        (good, 3.0, [-0.5, -1, 0, 0], 0, 2),
    ):
        grad, metrics = one(dataclasses.replace(cfg, dual_clip=c), ratio, A)
        np.testing.assert_allclose(grad, expected, rtol=1e-5)
        assert (metrics["clip_low"], metrics["clip_high"]) == (low, high)
        assert metrics.get("clip_dual", 0) == int(A is bad and c > 0)


def test_bounds_are_apart_below_and_above():
    cfg = GrpoConfig(clip_low=0.1, clip_high=0.5)
    assert one(cfg, [1.4], [1.0])[0] != 0
    assert one(cfg, [1.6], [1.0])[0] == 0
    assert one(cfg, [0.95], [-1.0])[0] != 0
    assert one(cfg, [0.85], [-1.0])[0] == 0


@pytest.mark.parametrize("ratio", EACH_RATIO)
def test_the_gradient_of_cispo_goes_through_log_pi_alone(ratio):
    cfg = GrpoConfig(surrogate="cispo", ratio=ratio, clip_low=0.5, clip_high=1.0)
    ratios, A = [0.1, 1.0, 8.0], [1.0, -1.0, 2.0]
    grad_TT, metrics = one(cfg, ratios, A, jacobian=True)
    seen = {"token": ratios, "sequence": [0.8] * 3, "sequence_mean": [0.8 ** (1 / 3)] * 3}[ratio]
    np.testing.assert_allclose(grad_TT, -np.diag(np.clip(seen, 0.5, 2.0) * A), rtol=1e-5)
    assert (metrics["clip_low"], metrics["clip_high"]) == ((1, 1) if ratio == "token" else (0, 0))


def test_the_gradient_of_a_sequences_ratio_reaches_all_its_tokens():
    for ratio, each in (("sequence_mean", 0.8 ** (1 / 3) / 3), ("sequence", 0.8)):
        cfg = GrpoConfig(ratio=ratio, clip_low=0.9, clip_high=9)
        grad_TT, _ = one(cfg, [0.1, 1.0, 8.0], [1.0] * 3, jacobian=True)
        np.testing.assert_allclose(grad_TT, np.full((3, 3), -each), rtol=1e-5)


@pytest.mark.parametrize("ratio", EACH_RATIO)
@pytest.mark.parametrize("far", [1e4, -1e4])
def test_far_log_ratios_stay_finite(ratio, far):
    x = jnp.asarray([[far, -1.0, 0.5]])
    cfg = GrpoConfig(ratio=ratio, beta=1.0, importance_cap=2.0, old_logprobs="trainer")
    ones = jnp.ones_like(x)

    def f(logprob):
        loss, metrics = grpo.policy_loss(
            cfg, logprob, 0 * x, -ones, ones, ones.astype(jnp.int32), 1, 0 * x, -x
        )
        return loss.sum(), metrics

    (value, metrics), grad = jax.jit(jax.value_and_grad(f, has_aux=True))(x)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    assert all(np.isfinite(list(metrics.values())))


@pytest.mark.parametrize("fill", [np.nan, -np.inf, np.inf])
def test_what_stands_behind_the_mask_does_not_matter(fill):
    """Not compiled: XLA would turn a product with the mask into a choice, which hides that fault."""
    cfg = GrpoConfig(ratio="sequence_mean", importance_cap=2.0)
    mask = jnp.asarray([[1.0, 0.0, 1.0]])
    x = jnp.asarray([[-1.0, fill, -2.0]])

    def f(logprob):
        segments = jnp.ones((1, 3), jnp.int32)
        return grpo.policy_loss(cfg, logprob, x, x, mask, segments, 1, x, x)[0].sum()

    value, grad = jax.value_and_grad(f)(x)
    assert value == 3  # the advantages, less
    np.testing.assert_allclose(grad, [[1.5, 0, 1.5]], rtol=1e-6)


def categorical(kind, steps=300, tokens=64, rate=0.3):
    """KL(pi || reference) before and after gradient steps on KL alone, of tokens that pi samples."""
    cfg = GrpoConfig(kl=kind, beta=1.0)
    reference = jax.nn.log_softmax(jnp.asarray([2.0, 0.0, -1.0, 1.0, -2.0]))
    start = jnp.asarray([-1.0, 0.5, 1.0, 0.0, 0.5])
    ones = jnp.ones((1, tokens))

    def divergence(logits):
        p = jax.nn.log_softmax(logits)
        return (jnp.exp(p) * (p - reference)).sum()

    def update(logits, key):
        ids = jax.random.categorical(key, logits, shape=(1, tokens))

        def f(logits):
            given = jax.nn.log_softmax(logits)[ids], None, 0 * ones, ones, ones.astype(jnp.int32), 1
            return grpo.policy_loss(cfg, *given, reference[ids])[0].sum() / tokens

        return logits - rate * jax.grad(f)(logits), None

    end, _ = jax.jit(lambda k: jax.lax.scan(update, start, k))(jax.random.split(jax.random.key(0), steps))
    return float(divergence(start)), float(divergence(end))


def test_kl_in_the_loss_shrinks_the_divergence():
    for kind in ("k2", "k3"):
        before, after = categorical(kind)
        assert before > 1
        assert after < 0.02
    before, after = categorical("k1")
    assert after > 0.5 * before  # it only adds noise


def test_expected_gradients_of_the_kl_estimates():
    """By enumeration: k1 has none, k2 that of KL(pi || reference), k3 that of KL(reference || pi)."""
    reference = jax.nn.log_softmax(jnp.asarray([2.0, 0.0, -1.0, 1.0]))
    logits = jnp.asarray([-1.0, 0.5, 1.0, 0.0])
    p = jnp.exp(jax.nn.log_softmax(logits))

    def expected(kind):
        return jax.grad(lambda l: (p * grpo.token_kl(jax.nn.log_softmax(l), reference, kind)).sum())(logits)

    def forward(logits):
        q = jax.nn.log_softmax(logits)
        return (jnp.exp(q) * (q - reference)).sum()

    def backward(logits):
        return (jnp.exp(reference) * (reference - jax.nn.log_softmax(logits))).sum()

    np.testing.assert_allclose(expected("k1"), 0, atol=1e-6)
    np.testing.assert_allclose(expected("k2"), jax.grad(forward)(logits), atol=1e-6)
    np.testing.assert_allclose(expected("k3"), jax.grad(backward)(logits), atol=1e-6)
    for kind in ("k1", "k3"):
        value = (p * grpo.token_kl(jax.nn.log_softmax(logits), reference, kind)).sum()
        np.testing.assert_allclose(value, forward(logits), rtol=1e-5)


RUN = {
    "objective": "grpo", "model": "tiny-v3", "out": "runs/x", "steps": 9, "task": {"kind": "arithmetic"},
    "rewards": [{"kind": "exact"}],
}  # fmt: skip


def test_k1_is_refused_in_the_loss():
    with pytest.raises(ConfigError, match="k1"):
        RunConfig.from_dict(RUN | {"grpo": {"kl": "k1"}})
    assert RunConfig.from_dict(RUN | {"grpo": {"kl": "k1", "kl_in": "reward"}}).grpo.kl == "k1"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_and_what_is_given_overrides_them(preset):
    cfg = RunConfig.from_dict(RUN | {"grpo": {"preset": preset}}).grpo
    assert cfg == GrpoConfig(preset=preset, **PRESETS[preset])
    given = {"beta": 0.5, "clip_high": 0.7, "group_size": 4, "normalization": "constant"}
    changed = RunConfig.from_dict(RUN | {"grpo": {"preset": preset, **given}}).grpo
    assert changed == dataclasses.replace(cfg, **given)
    value, grads, _ = step(draw(0), cfg, PACKED)
    assert np.isfinite(value)
    assert max(np.abs(g).max() for g in grads) > 0


# -------------------------------------------------------------------- layout


@pytest.mark.parametrize(
    ("kind", "normalization"),
    [
        pytest.param(kind, normalization, marks=[] if (i + 2 * j) % 3 == 0 else [pytest.mark.slow])
        for i, kind in enumerate([*EACH_RATIO, "cispo"])
        for j, normalization in enumerate(("token", "sequence", "constant"))
    ],
)
def test_packing_padding_order_and_microbatches_change_nothing(kind, normalization):
    ratio, surrogate = ("token", "cispo") if kind == "cispo" else (kind, "clip")
    cfg = GrpoConfig(
        ratio=ratio, surrogate=surrogate, normalization=normalization, beta=0.1, importance_cap=2.0
    )
    a, counted = draw(0), np.arange(PROBLEMS * GROUP) != 5
    run = functools.partial(step, a, cfg, counted=counted, rollout=True)
    value, grads, metrics = run(ONE_A_ROW)
    assert metrics["tokens"] == a.lengths.sum() - a.lengths[5]
    others = [(PACKED, 1), (PACKED[::-1], 1), (ONE_A_ROW[::-1], 1), (ONE_A_ROW, 4), (PACKED, 4)]
    if normalization == "sequence":
        others += [([[*range(12)], []], 1)]
    for rows, micro in others:
        other_value, other_grads, other_metrics = run(rows, micro=micro)
        np.testing.assert_allclose(other_value, value, rtol=1e-10)
        for got, expected in zip(other_grads, grads):
            np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-15)
        for name, expected in metrics.items():
            np.testing.assert_allclose(other_metrics[name], expected, rtol=1e-10, atol=1e-12, err_msg=name)


def test_per_sequence_sums_what_belongs_together():
    x_BT = jnp.asarray([[1.0, 2, 4, 8, 16, 32], [1, 1, 1, 1, 1, 1]])
    segments_BT = jnp.asarray([[1, 1, 2, 2, 2, 0], [0, 0, 0, 3, 3, 3]], jnp.int32)
    expected = [[3, 3, 28, 28, 28, 0], [0, 0, 0, 3, 3, 3]]
    assert grpo.per_sequence(x_BT, segments_BT, 3).tolist() == expected


@pytest.mark.parametrize("spec", [P(("rows", "length"), None), P("rows", "length")], ids=str)
@pytest.mark.parametrize("kind", ["sequence_mean", *(slow(k) for k in ("sequence", "cispo"))])
def test_a_mesh_gives_what_one_device_gives(kind, spec):
    ratio, surrogate = ("token", "cispo") if kind == "cispo" else (kind, "clip")
    cfg = GrpoConfig(ratio=ratio, surrogate=surrogate, dual_clip=2.0, beta=0.1, importance_cap=2.0)
    rng = np.random.default_rng(0)
    names = ("logprob", "weight", "old", "advantage", "mask", "segments", "reference_BT", "rollout_BT")
    arrays = {n: rng.normal(size=(8, 12)).astype(np.float32) for n in names}
    arrays["mask"] = (arrays["mask"] > -0.5).astype(np.float32)
    arrays["segments"] = np.sort(rng.integers(0, 4, (8, 12)).astype(np.int32), axis=1)

    def run(arrays):
        optional = {n: arrays[n] for n in names[6:]}
        sums_BT = grpo.per_sequence(arrays["old"], arrays["segments"], 3)
        return compiled(cfg, 3, *(arrays[n] for n in names[:6]), **optional), sums_BT

    expected = run(jax.tree.map(jnp.asarray, arrays))
    mesh = jax.make_mesh((4, 2), ("rows", "length"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        got = run({n: jax.device_put(x, NamedSharding(mesh, spec)) for n, x in arrays.items()})
    assert got[0][1].sharding.spec == spec
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------- metrics and types


def test_metrics_say_what_happened():
    a = draw(2)
    cfg = GrpoConfig(beta=0.01, importance_cap=1.1, old_logprobs="trainer", dual_clip=2.0)
    _, _, metrics = step(a, cfg, PACKED, rollout=True)
    new, old, reference, rollout = (np.concatenate(x) for x in (a.logprob, a.old, a.reference, a.rollout))
    A = np.repeat(grpo.advantages(a.rewards, cfg).reshape(-1), a.lengths)
    r, weight = np.exp(new - old), np.exp(old - rollout)
    expected = {
        "tokens": len(r),
        "ratio": r.sum(),
        "ratio_max": r.max(),
        "clip_low": ((A < 0) & (r < 0.8)).sum(),
        "clip_high": ((A > 0) & (r > 1.2)).sum(),
        "clip_dual": ((A < 0) & (r > 2)).sum(),
        "kl": sum(map(k3, new, reference)),
        "kl_old": (r - 1 - np.log(r)).sum(),
        "importance": np.minimum(weight, 1.1).sum(),
        "importance_capped": (weight > 1.1).sum(),
        "importance_max": weight.max(),
        "gap": np.abs(old - rollout).sum(),
        "gap_max": np.abs(old - rollout).max(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert value > 0
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    _, _, metrics = step(a, dataclasses.replace(cfg, old_logprobs="rollout"), PACKED, rollout=True)
    np.testing.assert_allclose(metrics["gap"], np.abs(new - rollout).sum(), rtol=1e-6)


def test_losses_are_float32_and_only_log_pi_has_a_gradient():
    x = jnp.asarray([[-1.0, -2.0]], jnp.bfloat16)
    ones = jnp.ones((1, 2))

    @jax.jit
    def f(logprob, old, advantage, reference, rollout):
        cfg = GrpoConfig(importance_cap=9.0)
        return grpo.policy_loss(
            cfg, logprob, old, advantage, ones, ones.astype(jnp.int32), 1, reference, rollout
        )[0].sum()

    args = (x, x - 0.125, ones, ones, x + 0.125)
    assert f(*args).dtype == jnp.float32
    new, *others = jax.jit(jax.grad(f, argnums=range(5)))(*args)
    assert new.all()
    assert not any(g.any() for g in others)


def test_the_largest_ratio_is_bounded_as_documented():
    assert log(float(one(GrpoConfig(), [exp(30)], [-1.0])[1]["ratio_max"])) == pytest.approx(20)
