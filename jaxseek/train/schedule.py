"""Learning rate and batch size over a run, as the DeepSeek papers schedule them."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxseek.config.model import ConfigError
from jaxseek.config.run import Program, RunConfig

RAMP_SIZES = 8  # each size of the batch is compiled


def learning_rate(cfg: Program) -> Callable[[ArrayLike], jax.Array]:
    """Make the function from step s = 0, 1, ..., which may be traced, to the float32 learning rate.

    `optimizer.learning_rate` times (s + 1) / warmup during the warm-up, times the factor of `schedule.kind`;
    `linear` and `cosine` start after the warm-up and reach `final` where the run ends, at s = steps.
    """
    schedule, steps = cfg.schedule, cfg.steps
    marks = [round(m * steps) for m in schedule.milestones]

    def fall(s: jax.Array, start: float, end: float, shape: Callable[[jax.Array], jax.Array]) -> jax.Array:
        part = jnp.clip((s - start) / max(end - start, 1), 0, 1)
        return schedule.final + (1 - schedule.final) * shape(part)

    def cosine(part: jax.Array) -> jax.Array:
        return (1 + jnp.cos(math.pi * part)) / 2

    def factor(s: jax.Array) -> jax.Array:
        if schedule.kind == "cosine":
            return fall(s, schedule.warmup, steps, cosine)
        if schedule.kind == "linear":
            return fall(s, schedule.warmup, steps, lambda part: 1 - part)
        out = jnp.ones_like(s)
        if schedule.kind == "multi_step":
            for mark, value in zip(marks, schedule.factors):
                out = jnp.where(s >= mark, value, out)
        elif schedule.kind == "v3":
            out = jnp.where(s >= marks[2], schedule.last, fall(s, marks[0], marks[1], cosine))
        return out

    def rate(step: ArrayLike) -> jax.Array:
        s = jnp.asarray(step).astype(jnp.float32)
        warm = jnp.minimum((s + 1) / max(schedule.warmup, 1), 1)
        return cfg.optimizer.learning_rate * warm * factor(s)

    return rate


def batch_rows(cfg: RunConfig, step: int, multiple: int) -> int:
    """Number of rows of the batch at `step`, a multiple of `multiple` (parts of the mesh x accumulation).

    It rises from `batch.ramp_from` to `batch.size` in at most RAMP_SIZES equal stages (DeepSeek-V3 paper,
    section 4.2). Raises ConfigError if `batch.size` is no such multiple.
    """
    batch = cfg.batch
    if batch.size % multiple:
        raise ConfigError(
            f"batch.size is {batch.size}, expected a multiple of {multiple} (the mesh's parts of the batch x "
            f"batch.accumulation), such as {-(-batch.size // multiple) * multiple}"
        )
    until = round(batch.ramp_until * cfg.steps)
    if not batch.ramp_from or step >= until:
        return batch.size
    stages = RAMP_SIZES - 1
    rows = batch.ramp_from + (batch.size - batch.ramp_from) * (stages * step // until) / stages
    return max(1, round(rows / multiple)) * multiple
