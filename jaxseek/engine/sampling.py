"""Choosing the next token: greedy, temperature, top-k, top-p and min-p, per request."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Mode = Literal["greedy", "plain", "filtered"]
TOP = 20  # likeliest tokens that are noted where a request asks for any
_MOST = 2**31 - 1  # int32 on the devices


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one request. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 filter nothing.

    Filters apply in the order temperature, top_k, top_p, min_p (transformers' order), and keep the lower id
    of equally likely tokens. `stop` are strings and `stop_ids` tokens that end the text besides the
    tokenizer's end of sequence. `logit_bias` are (token, number added to its logit). `repetition_penalty`
    divides a positive logit, and multiplies a negative one, of every token that was there, in the prompt too
    (transformers); `frequency_penalty` is taken off for each time that the answer has the token,
    `presence_penalty` once (OpenAI's reference).
    """

    max_new_tokens: int = 256
    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        def within(name: str, least: float, most: float, whole: bool = False) -> None:
            value: Any = getattr(self, name)
            number = "a whole number" if whole else "a number"
            real = isinstance(value, int | float | np.number)
            real &= not isinstance(value, bool | np.complexfloating)
            if not real or not least <= value <= most or (whole and float(value) % 1):
                shown = value if real else repr(value)
                raise ValueError(f"{name} is {shown}, expected {number} within {least:g}..{most:.10g}")

        within("max_new_tokens", 1, _MOST, whole=True)
        within("temperature", 0, 1e30)
        within("top_k", 0, _MOST, whole=True)
        within("top_p", 0, 1)
        within("min_p", 0, 1)
        within("seed", 0, 2**63 - 1, whole=True)
        within("presence_penalty", -100, 100)
        within("frequency_penalty", -100, 100)
        within("repetition_penalty", 0, 100)
        for name in ("top_p", "repetition_penalty"):
            if not getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, expected above 0")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}, expected texts, of which none is empty")
        if not all(token >= 0 and abs(value) <= 1e6 for token, value in self.logit_bias):
            raise ValueError("logit_bias has a token below 0 or a number beyond 1e6")

    @property
    def mode(self) -> Mode:
        """The cheapest program that serves this request."""
        if self.temperature == 0:
            return "greedy"
        return "filtered" if self.top_k or self.top_p < 1 or self.min_p > 0 else "plain"

    @property
    def shifts(self) -> bool:
        """True if logits are changed before a token is drawn."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        return penalties != (0, 0, 1) or bool(self.logit_bias)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shift:
    """Changes of rows' logits before a token is drawn: M biases, penalties, and what penalties look at, which
    tokens the prompt has and how often the answer has each."""

    bias_id_BM: Any
    bias_BM: Any
    presence_B: Any
    frequency_B: Any
    repetition_B: Any
    prompted_BV: Any
    count_BV: Any

    @classmethod
    def of(cls, rows: Mapping[int, tuple[Sampling, Sequence[int], Sequence[int]]], B: int, V: int) -> Shift:
        """From the (settings, prompt, answer so far) of those rows that are in use."""
        most = max((len(s.logit_bias) for s, _, _ in rows.values()), default=0)
        M = -(-most // 16) * 16
        bias = np.full((B, M), V, np.int32), np.zeros((B, M), np.float32)
        penalties = np.zeros(B, np.float32), np.zeros(B, np.float32), np.ones(B, np.float32)
        found = cls(*bias, *penalties, np.zeros((B, V), bool), np.zeros((B, V), np.int32))
        for row, (sampling, prompt, answer) in rows.items():
            for i, (token, value) in enumerate(sampling.logit_bias):
                found.bias_id_BM[row, i], found.bias_BM[row, i] = token, value
            for name in ("presence", "frequency", "repetition"):
                getattr(found, f"{name}_B")[row] = getattr(sampling, f"{name}_penalty")
            found.prompted_BV[row, list(prompt)] = True
            np.add.at(found.count_BV[row], list(answer), 1)
        return found

    def __call__(self, logits_BV: jax.Array) -> jax.Array:
        """The changed logits: biases first, then penalties."""
        row_B1 = jnp.arange(len(logits_BV))[:, None]
        logits_BV = logits_BV.at[row_B1, self.bias_id_BM].add(self.bias_BM, mode="drop")
        times_B1 = self.repetition_B[:, None]
        again_BV = jnp.where(logits_BV > 0, logits_BV / times_B1, logits_BV * times_B1)
        logits_BV = jnp.where(self.prompted_BV | (self.count_BV > 0), again_BV, logits_BV)
        logits_BV -= self.frequency_B[:, None] * self.count_BV.astype(logits_BV.dtype)
        return logits_BV - self.presence_B[:, None] * (self.count_BV > 0).astype(logits_BV.dtype)

    def after(self, token_B: jax.Array) -> Shift:
        """With one more token of every answer."""
        count_BV = self.count_BV.at[jnp.arange(len(token_B)), token_B].add(1)
        return dataclasses.replace(self, count_BV=count_BV)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """Settings of a batch of requests, one value per row; tokens to watch, W per row."""

    key_B: Any
    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    min_p_B: Any
    watch_WB: Any = None
    shift: Shift | None = None

    @classmethod
    def of(cls, requests: Sequence[Sampling]) -> SamplingArrays:
        def column(name: str, dtype: Any) -> np.ndarray:
            return np.array([getattr(r, name) for r in requests], dtype)

        seeds = [np.random.SeedSequence(r.seed).generate_state(2, np.uint32) for r in requests]
        return cls(
            np.stack(seeds),
            column("temperature", np.float32),
            column("top_k", np.int32),
            column("top_p", np.float32),
            column("min_p", np.float32),
        )


def batch_mode(requests: Sequence[Sampling], least: Mode = "greedy") -> Mode:
    """The cheapest program that serves all of these requests, no cheaper than `least`."""
    modes = {least, *(r.mode for r in requests)}
    return next(m for m in ("filtered", "plain", "greedy") if m in modes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """Next tokens [B], and float32 log-probabilities of each: under the model (temperature 1), under the
    model at the request's temperature (1 where greedy), and under what was drawn from, filters included.
    `watched` [W, B] are those of the tokens to watch, `top` [TOP, B] the likeliest tokens', both under the
    model."""

    token_B: jax.Array
    logprob_B: jax.Array
    tempered_B: jax.Array
    drawn_B: jax.Array
    watched_WB: jax.Array | None = None
    top_id_TB: jax.Array | None = None
    top_TB: jax.Array | None = None


def sample(
    logits_BV: jax.Array, position_B: jax.Array, params: SamplingArrays, mode: Mode, top: bool = False
) -> Drawn:
    """Draw each row's next token, and with `top` note the likeliest.

    Randomness is a function of the request's seed and the position alone: the same request gives the same
    text in any batch.
    """
    model_BV, more = logits_BV, dict[str, jax.Array]()
    if params.shift is not None:
        logits_BV = params.shift(logits_BV)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if top:
        top_BT, id_BT = jax.lax.top_k(model_BV, min(TOP, model_BV.shape[-1]))
        top_BT -= jax.nn.logsumexp(model_BV, axis=-1, keepdims=True)
        more |= {"top_id_TB": id_BT.T, "top_TB": top_BT.T}
    if params.watch_WB is not None:
        more["watched_WB"] = jnp.stack([_logprob(model_BV, watch_B) for watch_B in params.watch_WB])
    if mode == "greedy":
        logprob_B = _logprob(model_BV, greedy_B)
        return Drawn(greedy_B, logprob_B, logprob_B, jnp.zeros_like(logprob_B), **more)
    warm_B = params.temperature_B > 0
    tempered_BV = logits_BV / jnp.where(warm_B, params.temperature_B, 1.0)[:, None]
    kept_BV = tempered_BV
    if mode == "filtered":
        kept_BV = jnp.where(_kept(tempered_BV, params), tempered_BV, -jnp.inf)

    def noise(key, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), position)
        return jax.random.gumbel(key, logits_BV.shape[1:], logits_BV.dtype)

    # as `jax.random.categorical`, but for the barrier: XLA:CPU would make the noise within the comparisons of
    # the maximum, one number at a time
    noisy_BV = jax.lax.optimization_barrier(kept_BV + jax.vmap(noise)(params.key_B, position_B))
    token_B = jnp.argmax(noisy_BV, axis=-1).astype(jnp.int32)
    token_B = jnp.where(warm_B, token_B, greedy_B)
    drawn_B = jnp.where(warm_B, _logprob(kept_BV, token_B), 0.0)
    logprob_B, tempered_B = _logprob(model_BV, token_B), _logprob(tempered_BV, token_B)
    return Drawn(token_B, logprob_B, tempered_B, drawn_B, **more)


def _logprob(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """log softmax(logits) of one token per row: [B]."""
    chosen_BV = jax.nn.one_hot(token_B, logits_BV.shape[-1], dtype=bool)
    return jnp.where(chosen_BV, logits_BV, 0).sum(-1) - jax.nn.logsumexp(logits_BV, axis=-1)


def _kept(scaled_BV: jax.Array, params: SamplingArrays) -> jax.Array:
    """Mark the tokens that survive all filters, [B, V].

    They are the first of those ordered by probability, then by id: of equal ones the lower id stays, so that
    top-k keeps k tokens, and top-p the smallest set whose mass reaches p.
    """
    V = scaled_BV.shape[-1]
    sorted_BV = -jnp.sort(-scaled_BV, axis=-1)
    rank_1V = jnp.arange(V)[None]
    top_k_B1 = jnp.where(params.top_k_B > 0, params.top_k_B, V)[:, None]
    sorted_BV = jnp.where(rank_1V < top_k_B1, sorted_BV, -jnp.inf)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # mass of the more likely ones
    all_B1 = params.top_p_B[:, None] >= 1  # or the tail is lost to a sum rounded up to 1
    keep_BV = ((before_BV < params.top_p_B[:, None]) | all_B1) & (rank_1V < top_k_B1)
    # min-p is relative to the most likely token, after renormalisation: the ratio does not see it
    keep_BV &= probs_BV >= params.min_p_B[:, None] * probs_BV[:, :1]
    keep_BV |= rank_1V == 0
    least_B1 = jnp.min(jnp.where(keep_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    above_BV, equal_BV = scaled_BV > least_B1, scaled_BV == least_B1
    room_B1 = keep_BV.sum(-1, keepdims=True) - above_BV.sum(-1, keepdims=True)
    return above_BV | (equal_BV & (jnp.cumsum(equal_BV, axis=-1) <= room_B1))
