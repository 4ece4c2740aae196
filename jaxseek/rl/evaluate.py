"""Rewards of answers, and held-out problems answered by a model with fixed seeds."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxseek.config.model import ConfigError
from jaxseek.config.run import RunConfig
from jaxseek.machine.hosts import from_first
from jaxseek.rl.problem import Answer, Problem
from jaxseek.rl.rewards.terms import Rewards
from jaxseek.rl.rollout import Episode, Sampler, seed_of
from jaxseek.rl.scorer import Judge
from jaxseek.sharding.strategy import Strategy
from jaxseek.storage.place import Place, write_text

EVALUATION = 2**62  # stands where a step's number stands in seeds


class Marking:
    """The rewards of a run, as the first host computes them, so that all learn from the same."""

    def __init__(self, run: RunConfig, strategy: Strategy):
        if jax.process_count() > 1 and any(r.kind == "model" for r in run.rewards):
            raise ConfigError("rewards of kind model run on one host alone; use another kind, or one host")
        self._names = [r.name or r.kind for r in run.rewards]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = run.rollout.reward_workers or cores
        self._rewards = Rewards(run.rewards, workers, model_score=Judge(strategy))
        # Of the last call: the first failure, in words, and the answers (by index) that have no reward, or no
        # value of the first term, since that does not apply to them or their problem is broken.
        self.failure = ""
        self.left_out: set[int] = set()
        self.unjudged: set[int] = set()
        self.broken = 0  # problems so far

    def __call__(self, answers: list[Answer]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Reward of each answer, and the terms by name; float64 [N], NaN for an answer without."""

        def score() -> tuple[np.ndarray, str, set[int], set[int], int]:
            scores = self._rewards.score(answers)
            table = np.stack([scores.total, *(scores.parts[name] for name in self._names)])
            failure = str(scores.failures[0]) if scores.failures else ""
            failed = {f.index for f in scores.failures if f.reward == self._names[0]}
            unjudged = {*map(int, np.flatnonzero(np.isnan(table[1])))} - failed
            return table, failure, scores.left_out, unjudged, len(self._rewards.broken)

        table, self.failure, self.left_out, self.unjudged, self.broken = from_first(score)
        return table[0], dict(zip(self._names, table[1:]))

    def close(self) -> None:
        """End the processes that compute rewards."""
        self._rewards.close()

    def __enter__(self) -> Marking:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@dataclass(frozen=True)
class HeldOut:
    """Problems with their prompts, and how many were left out because their prompt is too long."""

    problems: list[tuple[Problem, list[int]]]
    left_out: int

    @classmethod
    def of(cls, problems: list[Problem], sampler: Sampler, run: RunConfig) -> HeldOut:
        """Raises ConfigError where none is left."""
        longest = run.rollout.max_prompt_tokens
        encoded = [(problem, sampler.encode(problem)) for problem in problems]
        fitting = [e for e in encoded if len(e[1]) <= longest]
        if not fitting:
            raise ConfigError(
                f"all held-out prompts are longer than rollout.max_prompt_tokens {longest}; raise it"
            )
        return cls(fitting, len(encoded) - len(fitting))


@dataclass(frozen=True)
class Evaluation:
    """`values`: accuracy (the first of [[rewards]]), each reward's mean, lengths. `answers`: as written."""

    values: dict[str, float]
    answers: list[dict[str, Any]]

    def write(self, path: Place) -> None:
        """One line of JSON for each answer, whole or not at all."""
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.answers))

    def __str__(self) -> str:
        return (
            f"accuracy {self.values['accuracy']:.1%} on {len(self.answers)} held-out problems, "
            f"{self.values['thinking_tokens']:.1f} thinking tokens of {self.values['tokens']:.1f}"
        )


def evaluate(run: RunConfig, sampler: Sampler, held_out: HeldOut, marking: Marking) -> Evaluation:
    """Answer every held-out problem `task.samples` times, at task.temperature."""
    task, (problems, prompts) = run.task, zip(*held_out.problems)
    seeds = [[seed_of(EVALUATION, n, s) for s in range(task.samples)] for n in range(len(problems))]
    groups, _ = sampler.sample(problems, prompts, seeds, task.temperature)
    episodes = [episode for group in groups for episode in group]
    totals_N, parts = marking([e.answer for e in episodes])
    correct_N = np.nan_to_num(next(iter(parts.values())))
    judged_N = ~np.isin(np.arange(len(episodes)), list(marking.unjudged))
    accuracy = float(correct_N[judged_N].mean()) if judged_N.any() else 0.0
    values = {"accuracy": accuracy} | of_answers(episodes)
    values |= {
        f"reward_{name}": float(np.nanmean(part)) for name, part in parts.items() if np.isfinite(part).any()
    }
    answers = [
        {
            "prompt": e.answer.problem.prompt,
            "answer": e.answer.problem.answer,
            "text": e.answer.text,
            "correct": float(correct) if judged else None,
            "reward": None if np.isnan(total) else float(total),
            "tokens": e.answer.tokens,
            "thinking_tokens": e.thinking_tokens,
            "finish_reason": e.answer.finish_reason,
        }
        for e, total, correct, judged in zip(episodes, totals_N, correct_N, judged_N)
    ]
    return Evaluation(values, answers)


def of_answers(episodes: list[Episode]) -> dict[str, float]:
    """Lengths and endings of answers."""
    tokens_N = np.array([e.answer.tokens for e in episodes])
    return {
        "tokens": float(tokens_N.mean()),
        "tokens_max": float(tokens_N.max()),
        "thinking_tokens": float(np.mean([e.thinking_tokens for e in episodes])),
        "cut_off": float(np.mean([e.answer.finish_reason == "length" for e in episodes])),
    }
