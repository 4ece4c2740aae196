"""The decode step by the model's forward pass: it serves every model on every platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxseek.decode.forms import Stepped
from jaxseek.model.context import Context
from jaxseek.model.deepseek import Caches, DeepSeek, Output


def applies(model: DeepSeek) -> str:
    """Empty: this form serves every model on every platform."""
    return ""


def prepare(model: DeepSeek) -> DeepSeek:
    """The model itself."""
    return model


def split(caches: Caches) -> Caches:
    """The caches that prefill wrote, unchanged."""
    return caches


def step(
    weights: DeepSeek, caches: Caches, token_B: jax.Array, position_B: jax.Array, live_B: jax.Array
) -> Stepped:
    """Logits of the token after each row's `token_B`, which goes into the caches at `position_B`.

    Rows that are not `live` change no cache and reach no expert; their logits are meaningless.
    """
    out = hidden_states(weights, caches, token_B, position_B, live_B)
    assert out.caches is not None
    logits_BTV = weights.logits(out.hidden_BTD, weights.strategy.decode)
    return Stepped(logits_BTV[:, 0], out.caches, out.routing)


def context(
    weights: DeepSeek, caches: Caches, token_B1: jax.Array, position_B: jax.Array, live_B: jax.Array
) -> Context:
    """The context of one token per row against the caches."""
    live_B1 = live_B[:, None].astype(jnp.int32)
    rules = weights.strategy.decode
    return weights.context(rules, token_B1, position_B[:, None], live_B1, caches, fresh=False)


def hidden_states(
    weights: DeepSeek, caches: Caches, token_B: jax.Array, position_B: jax.Array, live_B: jax.Array
) -> Output:
    """The forward pass of one token per row against the caches."""
    token_B1 = token_B[:, None]
    return weights.forward(token_B1, context(weights, caches, token_B1, position_B, live_B), caches)
