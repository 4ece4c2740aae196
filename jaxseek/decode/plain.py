"""The decode step by the model's own forward pass: correct everywhere, and what the other forms are tested
against."""

from __future__ import annotations

import jax

from jaxseek.decode.forms import Stepped
from jaxseek.model.deepseek import Caches, DeepSeek


def applies(model: DeepSeek) -> str:
    """Empty: this form serves every model on every platform."""
    return ""


def prepare(model: DeepSeek) -> DeepSeek:
    """The model itself."""
    return model


def split(caches: Caches) -> Caches:
    """Caches that prefill wrote, as `step` takes them: unchanged."""
    return caches


def step(
    weights: DeepSeek, caches: Caches, token_B: jax.Array, position_B: jax.Array, live_B: jax.Array
) -> Stepped:
    """Logits of the token after each row's `token_B`, which goes into the caches at `position_B`.

    Rows that are not `live` leave the caches and the experts alone; their logits mean nothing.
    """
    rules = weights.strategy.decode
    token_B1, position_B1 = token_B[:, None], position_B[:, None]
    live_B1 = live_B[:, None].astype("int32")
    ctx = weights.context(rules, token_B1, position_B1, live_B1, caches, fresh=False)
    out = weights.forward(token_B1, ctx, caches)
    assert out.caches is not None
    return Stepped(weights.logits(out.hidden_BTD, rules)[:, 0], out.caches, out.routing)
