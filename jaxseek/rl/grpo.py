"""GRPO and its relatives as pure functions: advantages on the host, per-token loss on the devices.

`GrpoConfig` names every choice. A step's loss is the sum over tokens of `policy_loss` times the token's share
from `sequence_weights`. Shares are computed over the whole minibatch, so that neither the loss nor its
gradient depends on how answers are packed into rows, padded, or split into microbatches.

Suffixes: P problems, G answers per problem, N = P * G answers, Z sequences in a row.

Papers: DeepSeekMath (arXiv:2402.03300), R1 (2501.12948), DAPO (2503.14476), Dr. GRPO (2503.20783), GSPO
(2507.18071), CISPO (MiniMax-M1, 2506.13585), dual clip (1912.09729), RLOO (2402.14740), REINFORCE++
(2501.03262).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxseek.config.rl import GrpoConfig

# Log-ratios are clamped here before exponentiation; the gradient beyond is zero.
MAX_LOG_RATIO = 20.0
SAME = 1e-6  # tolerance for equal rewards: weighted sums of equal terms differ by rounding


# -------------------------------------------------------------------- host: rewards to advantages


def overlong_penalty(lengths_N: np.ndarray, max_new_tokens: int, cfg: GrpoConfig) -> np.ndarray:
    """Return the soft overlong punishment of each answer (DAPO, eq. 13), float64 [N], to add to its reward.

    It is 0 up to max_new_tokens minus the buffer, and falls linearly from there to -cfg.overlong_penalty at
    max_new_tokens. Lengths are in tokens.
    """
    lengths_N = np.asarray(lengths_N, np.float64)
    buffer = cfg.overlong_buffer * max_new_tokens
    if not buffer:
        return np.zeros_like(lengths_N)
    over_N = (lengths_N - (max_new_tokens - buffer)) / buffer
    return -cfg.overlong_penalty * np.clip(over_N, 0, 1)


def flat_groups(rewards_PG: np.ndarray, valid_PG: np.ndarray | None = None) -> np.ndarray:
    """Mark groups without a learning signal, bool [P]: all rewards equal, or fewer than two valid ones."""
    rewards_PG, valid_PG = _checked(rewards_PG, valid_PG)
    high_P = np.where(valid_PG, rewards_PG, -np.inf).max(axis=1)
    low_P = np.where(valid_PG, rewards_PG, np.inf).min(axis=1)
    return high_P - low_P <= SAME * np.maximum(1, np.abs(rewards_PG).max(axis=1))


def advantages(rewards_PG: np.ndarray, cfg: GrpoConfig, valid_PG: np.ndarray | None = None) -> np.ndarray:
    """Compute the advantage of each answer, float32 [P, G], by cfg.baseline and cfg.scale.

    An answer whose reward failed is not valid: its advantage is 0, and it enters no mean and no deviation. An
    answer with no other to compare with gets 0 too. Deviations are the population's, without an epsilon: [1,
    0, 0, 1] becomes exactly [1, -1, -1, 1]. A group (or batch) without deviation gets 0.

    Raises ValueError if a valid reward is not finite.
    """
    rewards_PG, valid_PG = _checked(rewards_PG, valid_PG)
    out_PG = _centred(rewards_PG, valid_PG, cfg)
    flat_P1 = flat_groups(rewards_PG, valid_PG)[:, None]
    if cfg.scale == "group":
        mean_P1 = _mean(rewards_PG, valid_PG, axis=1)
        std_P1 = np.sqrt(_mean((rewards_PG - mean_P1) ** 2, valid_PG, axis=1))
        out_PG = np.where(flat_P1, 0, out_PG / np.where(flat_P1, 1, std_P1))
    elif cfg.scale == "batch":
        out_PG = _whiten(out_PG, valid_PG)
        out_PG = np.where(flat_P1 & (cfg.baseline != "none"), 0, out_PG)  # remove the rounding of the mean
    return np.where(valid_PG, out_PG, 0).astype(np.float32)


def kl_in_reward(
    rewards_PG: np.ndarray,
    logprob_NT: np.ndarray,
    reference_NT: np.ndarray,
    mask_NT: np.ndarray,
    cfg: GrpoConfig,
    valid_PG: np.ndarray | None = None,
) -> np.ndarray:
    """Compute per-token advantages with KL as part of the reward (kl_in = "reward"), float32 [N, T].

    As in REINFORCE++, every token earns -beta KL and the last one also the answer's reward r, so the return
    of token t is r - beta * (sum of KL from t on). KL is cfg.kl of `logprob`, the policy that sampled,
    against `reference`; both are constants. Answers are in the order of rewards_PG, and their tokens are
    those with mask above 0; all others get 0.

    The baseline is one of r, as in `advantages`: it does not depend on the answer's own tokens, with or
    without KL in it. (RLOO's own form takes an answer's whole KL into both; the expected gradient is the
    same.) Scale "group" divides r alone, so that KL also pulls in flat groups; scale "batch" subtracts the
    mean and divides by the deviation over all tokens of valid answers, as the paper does.
    """
    rewards_PG, valid_PG = _checked(rewards_PG, valid_PG)
    keep_NT = (np.asarray(mask_NT) > 0) & valid_PG.reshape(-1, 1)
    logprob_NT, reference_NT = (
        np.where(keep_NT, np.asarray(a, np.float64), 0) for a in (logprob_NT, reference_NT)
    )
    kl_NT = np.where(keep_NT, token_kl(logprob_NT, reference_NT, cfg.kl), 0)
    to_go_NT = np.cumsum(kl_NT[:, ::-1], axis=1)[:, ::-1]
    batch = cfg.scale == "batch"
    outcome_PG = _centred(rewards_PG, valid_PG, cfg) if batch else advantages(rewards_PG, cfg, valid_PG)
    out_NT = outcome_PG.reshape(-1, 1) - cfg.beta * to_go_NT
    if batch:
        out_NT = _whiten(out_NT, keep_NT)
    return np.where(keep_NT, out_NT, 0).astype(np.float32)


def sequence_weights(
    lengths_N: np.ndarray, counted_N: np.ndarray, cfg: GrpoConfig, max_new_tokens: int
) -> np.ndarray:
    """Return the share in the loss of each token of each answer of a minibatch, float32 [N].

    The loss is the sum over tokens of share times `policy_loss`. Answers that do not count (cut off, with
    overlong_mask; or without a reward) have share 0. `token` and `sequence` are means over the answers that
    count: `token` divides by their tokens (as TRL; DAPO's eq. 8 takes those of a group), `sequence` by their
    number (TRL divides by all answers, which differs by a factor only). `constant` divides by all answers
    times max_new_tokens (Dr. GRPO).
    """
    lengths_N = np.asarray(lengths_N, np.float64)
    counted_N = np.asarray(counted_N, bool)
    if cfg.normalization == "token":
        parts_N = np.full_like(lengths_N, np.where(counted_N, lengths_N, 0).sum())
    elif cfg.normalization == "sequence":
        parts_N = counted_N.sum() * lengths_N
    else:
        parts_N = np.full_like(lengths_N, len(lengths_N) * max_new_tokens)
    return np.where(counted_N, 1 / np.maximum(parts_N, 1), 0).astype(np.float32)


def _checked(rewards_PG: np.ndarray, valid_PG: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return rewards in float64, 0 where not valid, and the validity mask. Raises ValueError."""
    rewards_PG = np.asarray(rewards_PG, np.float64)
    valid_PG = np.ones(rewards_PG.shape, bool) if valid_PG is None else np.asarray(valid_PG, bool)
    if rewards_PG.ndim != 2 or valid_PG.shape != rewards_PG.shape:
        raise ValueError(
            f"rewards have the shape {rewards_PG.shape} and valid {valid_PG.shape}, expected [P, G] twice"
        )
    rewards_PG = np.where(valid_PG, rewards_PG, 0)
    if not np.isfinite(rewards_PG).all():
        p, g = np.argwhere(~np.isfinite(rewards_PG))[0]
        raise ValueError(
            f"the reward of problem {p}, answer {g} is {rewards_PG[p, g]}, expected a finite number; "
            "mark a reward that failed as not valid"
        )
    return rewards_PG, valid_PG


def _mean(x: np.ndarray, valid: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean over valid entries, with the axis kept; 0 if there are none."""
    total = np.where(valid, x, 0).sum(axis=axis, keepdims=True)
    return total / np.maximum(valid.sum(axis=axis, keepdims=True), 1)


def _centred(rewards_PG: np.ndarray, valid_PG: np.ndarray, cfg: GrpoConfig) -> np.ndarray:
    """Subtract the baseline from the rewards; 0 where not valid."""
    if cfg.baseline == "none":
        return np.where(valid_PG, rewards_PG, 0)
    count_P1 = valid_PG.sum(axis=1, keepdims=True)
    out_PG = rewards_PG - _mean(rewards_PG, valid_PG, axis=1)
    if cfg.baseline == "leave_one_out":  # r - (n mean - r) / (n - 1)
        out_PG = out_PG * count_P1 / np.maximum(count_P1 - 1, 1)
    flat_P1 = flat_groups(rewards_PG, valid_PG)[:, None]  # what remains is rounding
    return np.where(valid_PG & ~flat_P1, out_PG, 0)


def _whiten(x: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Scale valid entries to mean 0 and deviation 1, or to 0 if their deviation is only rounding."""
    size = np.abs(np.where(valid, x, 0)).max()
    x = x - _mean(x, valid)
    std = np.sqrt(_mean(x**2, valid))
    return x / std if std.max() > SAME * size else np.zeros_like(x)


# -------------------------------------------------------------------- devices: loss


def token_kl(logprob: Any, reference: Any, kind: Literal["k1", "k2", "k3"]) -> Any:
    """Estimate KL(policy || reference) at each token that the policy sampled; numpy in gives numpy out.

    From Schulman, Approximating KL Divergence: with x = log(reference / policy), k1 is -x, k2 is x^2 / 2 and
    k3 is e^x - 1 - x. In expectation, the values of k1 and k3 are the divergence, the gradients of k2 and k3
    pull towards the reference, and the gradient of k1 is zero. In k3, x is at most MAX_LOG_RATIO.
    """
    x = reference - logprob
    if kind == "k1":
        return -x
    if kind == "k2":
        return x**2 / 2
    xp = np if isinstance(x, np.ndarray) else jnp
    x = xp.minimum(x, MAX_LOG_RATIO)
    return xp.expm1(x) - x


def per_sequence(x_BT: jax.Array, segments_BT: jax.Array, segments: int) -> jax.Array:
    """Sum x over each token's sequence, broadcast to all tokens of the sequence, [B, T].

    The sequences of a row are numbered 1 to `segments`; 0 is padding, which gets 0.
    """
    hit_BTZ = segments_BT[..., None] == jnp.arange(1, segments + 1, dtype=segments_BT.dtype)[None, None]
    sum_BZ = jnp.where(hit_BTZ, x_BT[..., None], 0).sum(axis=1)
    return jnp.where(hit_BTZ, sum_BZ[:, None], 0).sum(axis=2)


def policy_loss(
    cfg: GrpoConfig,
    logprob_BT: jax.Array,
    old_BT: jax.Array | None,
    advantage_BT: jax.Array,
    mask_BT: jax.Array,
    segments_BT: jax.Array,
    segments: int,
    reference_BT: jax.Array | None = None,
    rollout_BT: jax.Array | None = None,
    drawn_BT: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the loss of each token before weighting, float32 [B, T], and metrics; 0 where mask is 0.

    `logprob` is the policy log-prob, and the only input with a gradient. `old` is the log-prob under pi_old
    (None: the policy itself, before this update), `rollout` the sampling log-prob as recorded, and `drawn`
    the log-prob under the distribution actually drawn from, where filters (such as top_p) changed it:
    importance weights are against `drawn`, the gap is not. Values where mask is 0 do not matter, not even
    infinite ones.

    A sequence ratio is repeated at each of its tokens, and its gradient reaches all of them, so that with
    normalization = "sequence" the sum of shares is R1's and GSPO's mean over sequences. With ratio =
    "sequence" the KL is that of whole sequences too, as R1 prints it; otherwise of tokens. The importance
    weight min(old / drawn, cap) multiplies the surrogate alone, not the KL (as in TRL). It is 1 where `old`
    is the recorded log-prob, since the ratio itself corrects then.

    Metrics are sums over the tokens that count, to be divided by `tokens`, except for maxima, `*_max`:

        ratio          pi / pi_old, as cfg.ratio defines it
        clip_low       tokens with A < 0 that lose their gradient to clipping at 1 - clip_low (CISPO: tokens
                       that it bounds, for any A); `clip_high` likewise, with A > 0
        clip_dual      tokens that lose their gradient to dual_clip
        kl             cfg.kl of tokens against the reference
        kl_old         KL(pi_old || pi), by k3
        importance     the weight min(old / drawn, cap), and `importance_capped`, tokens that are capped
        gap            |log pi - log rollout|, where pi is `old` if the trainer recomputed it
    """
    keep_BT = mask_BT > 0
    dtype = np.promote_types(logprob_BT.dtype, np.float32)  # ratios need more than bfloat16's 8 bits

    def clean(x_BT: jax.Array) -> jax.Array:  # before any exp: a gradient of 0 times infinity is NaN
        return jnp.where(keep_BT, x_BT.astype(dtype), 0)

    def constant(x_BT: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(clean(x_BT))

    def sequence_sum(x_BT: jax.Array) -> jax.Array:
        return per_sequence(x_BT, segments_BT, segments)

    logprob_BT, advantage_BT = clean(logprob_BT), constant(advantage_BT)
    recomputed = old_BT is not None and cfg.old_logprobs == "trainer"
    old_BT = constant(logprob_BT if old_BT is None else old_BT)
    log_ratio_BT = logprob_BT - old_BT
    if cfg.ratio != "token":
        log_ratio_BT = sequence_sum(log_ratio_BT)
    if cfg.ratio == "sequence_mean":
        log_ratio_BT = log_ratio_BT / jnp.maximum(sequence_sum(keep_BT.astype(dtype)), 1)
    ratio_BT = jnp.exp(jnp.minimum(log_ratio_BT, MAX_LOG_RATIO))

    objective_BT, clipped = _surrogate(cfg, ratio_BT, advantage_BT, logprob_BT)
    sums = {"tokens": jnp.ones_like(ratio_BT), "ratio": ratio_BT, **clipped}
    sums["kl_old"] = token_kl(old_BT, logprob_BT, "k3")
    peaks = {"ratio": ratio_BT}
    if rollout_BT is not None:
        rollout_BT = constant(rollout_BT)
        sums["gap"] = peaks["gap"] = jnp.abs((old_BT if recomputed else logprob_BT) - rollout_BT)
    if rollout_BT is not None and cfg.importance_cap:
        drawn_BT = rollout_BT if drawn_BT is None else constant(drawn_BT)
        weight_BT = jnp.exp(jnp.minimum(old_BT - drawn_BT, MAX_LOG_RATIO))
        peaks["importance"] = weight_BT
        sums["importance_capped"] = weight_BT > cfg.importance_cap
        sums["importance"] = weight_BT = jnp.minimum(weight_BT, cfg.importance_cap)
        objective_BT = objective_BT * weight_BT
    loss_BT = -objective_BT
    if reference_BT is not None:
        reference_BT = constant(reference_BT)
        sums["kl"] = kl_BT = token_kl(logprob_BT, reference_BT, cfg.kl)
        if cfg.beta and cfg.kl_in == "loss":
            if cfg.ratio == "sequence":
                kl_BT = token_kl(sequence_sum(logprob_BT), sequence_sum(reference_BT), cfg.kl)
            loss_BT = loss_BT + cfg.beta * kl_BT

    metrics = {name: constant(x_BT).sum() for name, x_BT in sums.items()}
    metrics |= {f"{name}_max": constant(x_BT).max() for name, x_BT in peaks.items()}
    return clean(loss_BT), metrics


def _surrogate(
    cfg: GrpoConfig, ratio_BT: jax.Array, advantage_BT: jax.Array, logprob_BT: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the objective to maximise at each token, [B, T], and masks of the tokens where a bound acts."""
    low, high = 1 - cfg.clip_low, 1 + cfg.clip_high
    bounded_BT = jnp.clip(ratio_BT, low, high)
    if cfg.surrogate == "cispo":
        objective_BT = jax.lax.stop_gradient(bounded_BT) * advantage_BT * logprob_BT
        return objective_BT, {"clip_low": ratio_BT < low, "clip_high": ratio_BT > high}
    objective_BT = jnp.minimum(ratio_BT * advantage_BT, bounded_BT * advantage_BT)
    bad_BT, good_BT = advantage_BT < 0, advantage_BT > 0
    clipped = {"clip_low": bad_BT & (ratio_BT < low), "clip_high": good_BT & (ratio_BT > high)}
    if cfg.dual_clip:
        floor_BT = cfg.dual_clip * advantage_BT
        objective_BT = jnp.where(bad_BT, jnp.maximum(objective_BT, floor_BT), objective_BT)
        clipped["clip_dual"] = bad_BT & (ratio_BT > cfg.dual_clip)
    return objective_BT, clipped
