"""One decode step, in three forms by name: `plain`, `tpu`, `cpu`.

A form has `applies(model)`, the reason why it cannot serve a model, or an empty string; `prepare(model)`, its
weights; `split(caches)`, the caches that prefill wrote as this form keeps them; and `step(weights, caches,
token_B, position_B, live_B)`, the logits of a step. All are tested against the same oracle.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from jaxseek.config.model import ConfigError
from jaxseek.model.deepseek import Caches, DeepSeek
from jaxseek.model.moe import Routing

log = logging.getLogger("jaxseek")

NAMES = ("tpu", "cpu", "plain")  # in the order in which `auto` asks them


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stepped:
    """Result of a step: float32 logits [B, V], the caches with its tokens, each sparse stack's routing."""

    logits_BV: jax.Array
    caches: Caches
    routing: tuple[Routing, ...]


class Form(Protocol):
    """A module of this package."""

    __name__: str
    applies: Callable[[DeepSeek], str]
    prepare: Callable[[DeepSeek], DeepSeek]
    split: Callable[[Caches], Caches]
    step: Callable[..., Stepped]


def choose(name: str, model: DeepSeek) -> Form:
    """The form of this name, or for "auto" the first that applies, which is logged with the reasons against
    those before it. Raises ConfigError for an unknown name and for a form that does not apply."""
    if name not in ("auto", *NAMES):
        raise ConfigError(f"decode form is {name!r}, expected auto or one of {', '.join(NAMES)}")
    refused: dict[str, str] = {}
    for one in NAMES if name == "auto" else (name,):
        form: Any = importlib.import_module(f"jaxseek.decode.{one}")
        if not (reason := form.applies(model)):
            log.info("decode form %s (%s)", one, "; ".join(f"not {n}: {r}" for n, r in refused.items()))
            return form
        refused[one] = reason
    raise ConfigError(f"decode form {name} does not apply: {refused[name]}")
