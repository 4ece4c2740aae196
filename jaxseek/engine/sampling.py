"""Choosing the next token: greedy, temperature, top-k, top-p and min-p, per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Mode = Literal["greedy", "plain", "filtered"]
_MOST = 2**31 - 1  # int32 on the devices


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one request. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 filter nothing.

    Filters apply in the order temperature, top_k, top_p, min_p (transformers' order). `stop` are strings and
    `stop_ids` tokens that end the text besides the tokenizer's end of sequence.
    """

    max_new_tokens: int = 256
    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        def within(name: str, least: float, most: float, whole: bool = False) -> None:
            value, number = getattr(self, name), "a whole number" if whole else "a number"
            real = isinstance(value, int | float | np.number) and not isinstance(
                value, bool | np.complexfloating
            )
            if not real or not least <= value <= most or (whole and float(value) % 1):
                shown = value if real else repr(value)
                raise ValueError(f"{name} is {shown}, expected {number} within {least:g}..{most:.10g}")

        within("max_new_tokens", 1, _MOST, whole=True)
        within("temperature", 0, 1e30)
        within("top_k", 0, _MOST, whole=True)
        within("top_p", 0, 1)
        within("min_p", 0, 1)
        within("seed", 0, 2**63 - 1, whole=True)
        if not self.top_p:
            raise ValueError(f"top_p is {self.top_p}, expected above 0, up to 1")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}, expected texts, of which none is empty")

    @property
    def mode(self) -> Mode:
        """The cheapest program that serves this request."""
        if self.temperature == 0:
            return "greedy"
        return "filtered" if self.top_k or self.top_p < 1 or self.min_p > 0 else "plain"


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
    `watched` [W, B] are those of the tokens to watch, under the model."""

    token_B: jax.Array
    logprob_B: jax.Array
    tempered_B: jax.Array
    drawn_B: jax.Array
    watched_WB: jax.Array | None = None


def sample(logits_BV: jax.Array, position_B: jax.Array, params: SamplingArrays, mode: Mode) -> Drawn:
    """Draw each row's next token.

    Randomness is a function of the request's seed and the position alone: the same request gives the same
    text in any batch.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    watched_WB = None
    if params.watch_WB is not None:
        watched_WB = jnp.stack([_logprob(logits_BV, watch_B) for watch_B in params.watch_WB])
    if mode == "greedy":
        logprob_B = _logprob(logits_BV, greedy_B)
        return Drawn(greedy_B, logprob_B, logprob_B, jnp.zeros_like(logprob_B), watched_WB)
    warm_B = params.temperature_B > 0
    tempered_BV = logits_BV / jnp.where(warm_B, params.temperature_B, 1.0)[:, None]
    kept_BV = tempered_BV
    if mode == "filtered":
        kept_BV = jnp.where(tempered_BV >= _threshold(tempered_BV, params)[:, None], tempered_BV, -jnp.inf)

    def noise(key, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), position)
        return jax.random.gumbel(key, logits_BV.shape[1:], logits_BV.dtype)

    # as `jax.random.categorical`, but for the barrier: XLA:CPU would make the noise within the comparisons of
    # the maximum, one number at a time
    noisy_BV = jax.lax.optimization_barrier(kept_BV + jax.vmap(noise)(params.key_B, position_B))
    token_B = jnp.argmax(noisy_BV, axis=-1).astype(jnp.int32)
    token_B = jnp.where(warm_B, token_B, greedy_B)
    drawn_B = jnp.where(warm_B, _logprob(kept_BV, token_B), 0.0)
    logprob_B, tempered_B = _logprob(logits_BV, token_B), _logprob(tempered_BV, token_B)
    return Drawn(token_B, logprob_B, tempered_B, drawn_B, watched_WB)


def _logprob(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """log softmax(logits) of one token per row: [B]."""
    chosen_BV = jax.nn.one_hot(token_B, logits_BV.shape[-1], dtype=bool)
    return jnp.where(chosen_BV, logits_BV, 0).sum(-1) - jax.nn.logsumexp(logits_BV, axis=-1)


def _threshold(scaled_BV: jax.Array, params: SamplingArrays) -> jax.Array:
    """The smallest logit that survives all filters, [B]."""
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
    return jnp.min(jnp.where(keep_BV, sorted_BV, jnp.inf), axis=-1)
