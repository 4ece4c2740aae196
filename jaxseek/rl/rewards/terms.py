"""The reward of an answer: the weighted sum of the terms that apply to it, none of which can stop the run.

Cheap terms are computed here, `math` and `python` in worker processes (sandbox/pool.py), `code` in a sandbox
(sandbox/execute.py). A term that raises, times out or is not a finite number fails for that answer alone.
Nothing here imports JAX, since the workers import this module.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jaxseek.config.model import ConfigError
from jaxseek.config.rl import RewardConfig
from jaxseek.rl.problem import Answer
from jaxseek.rl.rewards.answers import exact
from jaxseek.rl.rewards.code import code
from jaxseek.rl.rewards.countdown import countdown
from jaxseek.rl.rewards.format import format, length
from jaxseek.rl.rewards.language import language
from jaxseek.rl.sandbox.execute import BrokenProblem, check_platform
from jaxseek.rl.sandbox.pool import Pool, WorkerError

log = logging.getLogger(__name__)


class Broken(str):
    """The reason why an answer has no score, if that is the problem's fault."""


Value = float | str | None  # a score, the reason why there is none, or None where a term does not apply


@dataclass(frozen=True)
class Failure:
    """A missing score: the index of the answer in the batch, the name of the reward, and the reason."""

    index: int
    reward: str
    reason: str

    def __str__(self) -> str:
        return f"answer {self.index}, reward {self.reward}: {self.reason}"


@dataclass(frozen=True)
class Scores:
    """Rewards of N answers, float64 [N]: `total`, and its unweighted terms by name; NaN where there is none.

    That is so for `failures`, and for the answers that are `left_out`: no term applies to them, or their
    problem is broken.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    failures: list[Failure]
    left_out: set[int]


class Rewards:
    """The rewards of a run. Close it, or use it as a context manager, to end its processes.

    `model_score(model, answers)` computes rewards of kind `model`. `cpu_workers` is the number of processes
    that compute rewards of kind math, python and code in parallel; a function of kind `python` gets at most
    16 answers per call. Raises ConfigError for rewards that cannot work here.
    """

    def __init__(
        self,
        configs: list[RewardConfig],
        cpu_workers: int = 2,
        model_score: Callable[[str, list[Answer]], list[float]] | None = None,
    ):
        self.configs = {config.name or config.kind: config for config in configs}
        if not configs or len(self.configs) < len(configs):
            names = [config.name or config.kind for config in configs]
            raise ConfigError(f"the rewards are named {names}: give at least one, and each its own `name`")
        self.model_score = model_score
        self.weighted = any(config.weight for config in configs)
        self.broken: dict[str, str] = {}  # broken problems by their prompts, and why
        for name, config in self.configs.items():
            self._check(name, config)
        self.pool = Pool(cpu_workers)
        for name, config in self.configs.items():
            if config.kind == "python":
                try:
                    self.pool.load(config)
                except WorkerError as error:
                    self.close()
                    raise ConfigError(f"rewards {name}: importing {config.function}: {error}") from error

    def _check(self, name: str, config: RewardConfig) -> None:
        if not math.isfinite(config.weight) or config.seconds <= 0 or config.target <= 0:
            raise ConfigError(
                f"rewards {name}: weight {config.weight} must be finite, seconds {config.seconds} and target "
                f"{config.target} above 0"
            )
        if config.kind == "math" and importlib.util.find_spec("math_verify") is None:
            raise ConfigError(f"rewards {name}: kind math needs a package: pip install math-verify")
        if config.kind == "code":
            if config.megabytes < 64:
                raise ConfigError(
                    f"rewards {name}: megabytes {config.megabytes} must be at least 64 for Python"
                )
            check_platform(config.sandbox)
        if config.kind == "python" and not all(config.function.partition(":")):
            raise ConfigError(f"rewards {name}: function {config.function!r} must be `module:function`")
        if config.kind == "model" and self.model_score is None:
            raise ConfigError(f"rewards {name}: kind model needs a reward model")

    def score(self, answers: list[Answer]) -> Scores:
        total, applies = np.zeros(len(answers)), np.zeros(len(answers), bool)
        parts, failures, left_out = {}, [], set()
        for name, config in self.configs.items():
            values = self._term(config, answers)
            for i, value in enumerate(values):
                if isinstance(value, Broken):
                    left_out.add(i)
                    self._note_broken(answers[i], value)
                elif isinstance(value, str):
                    failures.append(Failure(i, name, value))
            given = np.array([value is not None for value in values], bool)
            parts[name] = np.array([v if isinstance(v, float) else math.nan for v in values], np.float64)
            if config.weight:
                total += config.weight * np.where(given, parts[name], 0.0)
            if config.weight or not self.weighted:
                applies |= given
        total[~applies] = math.nan
        return Scores(total, parts, failures, left_out | set(map(int, np.flatnonzero(~applies))))

    def _note_broken(self, answer: Answer, reason: str) -> None:
        """Name a broken problem in the log, once."""
        prompt = str(answer.problem.prompt)
        if prompt not in self.broken:
            self.broken[prompt] = reason
            log.warning("broken problem, its answers are left out: %s (prompt: %.80r)", reason, prompt)

    def _term(self, config: RewardConfig, answers: list[Answer]) -> list[Value]:
        if config.kind in ("math", "python"):
            return self.pool.score(config, answers)
        if config.kind == "code":
            return self.pool.map(partial(_attempt, _function(config)), answers)
        if config.kind == "model":
            assert self.model_score is not None
            return numbers(self.model_score(config.model, answers), len(answers))
        return [_attempt(_function(config), answer) for answer in answers]

    def close(self) -> None:
        self.pool.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _function(config: RewardConfig) -> Callable[[Answer], float | None]:
    """Return the function of a reward that this process computes, one answer at a time."""
    return {
        "exact": exact,
        "countdown": countdown,
        "format": partial(format, tags=config.tags),
        "language": partial(language, target=config.language),
        "length": partial(length, target=config.target),
        "code": partial(code, seconds=config.seconds, megabytes=config.megabytes, sandbox=config.sandbox),
    }[config.kind]


def _attempt(function: Callable[[Answer], float | None], answer: Answer) -> Value:
    try:
        return function(answer)
    except BrokenProblem as error:
        return Broken(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def numbers(values: Any, count: int) -> list[Value]:
    """Convert `values` to floats, None where it is None, or to a reason if one is not a finite number.

    Raises ValueError if there are not `count` values.
    """
    values = list(values)
    if len(values) != count:
        raise ValueError(f"{len(values)} rewards for {count} answers")

    def number(value: Any) -> Value:
        if value is None:
            return None
        try:
            converted = math.nan if isinstance(value, (str, bytes)) else float(value)
        except (TypeError, ValueError, OverflowError):
            return f"a value of type {type(value).__name__} is not a finite number"
        return converted if math.isfinite(converted) else f"{value!r:.50} is not a finite number"

    return [number(value) for value in values]
