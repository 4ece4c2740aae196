"""`train` with objective grpo: sample groups of answers, reward them, learn from them, evaluate; again.

Everything random is a function of (run seed, step, problem, answer), so a run that is started again in its
directory goes on with the same numbers as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxseek import checkpoint
from jaxseek.config import ConfigError
from jaxseek.generate.engine import fetch
from jaxseek.model import DeepSeek
from jaxseek.rl import grpo
from jaxseek.rl.experience import PolicyBatch, Shapes, answers_of, make_policy_batch
from jaxseek.rl.figure import plot_rewards
from jaxseek.rl.objective import PolicyObjective, make_logprobs
from jaxseek.rl.problem import Answer, Problem
from jaxseek.rl.reference import ReferencePolicy
from jaxseek.rl.rewards import Rewards
from jaxseek.rl.rollout import Episode, Sampler, seed_of
from jaxseek.rl.scorer import Judge
from jaxseek.rl.tasks import open_task
from jaxseek.run_config import RunConfig
from jaxseek.train import lora, start
from jaxseek.train.checkpoints import Checkpoints
from jaxseek.train.loop import Result, TrainingError, signals
from jaxseek.train.metrics import MetricsLog, Progress, summarize
from jaxseek.train.optimizer import decays, make_optimizer
from jaxseek.train.step import State, init_state, make_step

ROUNDS = 8  # of dynamic sampling, before a step makes do with the groups it has
TOO_LONG = 1000  # prompts beyond the limit in a row, before the run gives up
EVALUATION = 2**62  # stands where a step's number stands in seeds


def train_grpo(run: RunConfig, deadline: float | None = None) -> Result:
    """Train by GRPO as the run says, going on from what is in `run.out`. On several hosts, all call it.

    Past `deadline` (of time.monotonic) it ends after the step, as if that were the last. Raises ConfigError
    for settings that do not fit, TrainingError for a loss that is not finite and for rewards that fail.
    """
    cfg = start.model_config(run)
    strategy = start.open_strategy(run, cfg)
    start.claim(run)
    tokenizer = start.open_tokenizer(run, cfg)
    with contextlib.ExitStack() as closing:
        return _Grpo(run, cfg, strategy, tokenizer, closing).run_to_end(deadline)


class _Grpo:
    """One run while it is going on."""

    def __init__(self, run: RunConfig, cfg: Any, strategy: Any, tokenizer: Any, closing: Any):
        self.run, self.cfg, self.strategy, self.tokenizer = run, cfg, strategy, tokenizer
        self.out = Path(run.out)
        need = run.rollout.max_prompt_tokens + run.rollout.max_new_tokens
        if need > cfg.max_position_embeddings:
            raise ConfigError(
                f"rollout.max_prompt_tokens {run.rollout.max_prompt_tokens} + max_new_tokens "
                f"{run.rollout.max_new_tokens} are more than the model's context of "
                f"{cfg.max_position_embeddings}; lower one"
            )
        self.dtype = start.compute_dtype(run)
        self.task = open_task(run)
        self.rewards = Rewards(run.rewards, model_score=Judge(strategy))
        closing.callback(self.rewards.close)
        self.checkpoints = Checkpoints(self.out, run.checkpoint)
        closing.callback(self.checkpoints.close)
        self.sampler = Sampler(run, tokenizer, run.rollout.dtype or self.dtype)
        multiples = (strategy.parts(strategy.train, axis) for axis in ("batch", "length"))
        self.shapes = Shapes.of(run, *multiples)
        updates = run.steps * run.grpo.minibatches * run.grpo.epochs
        schedule = dataclasses.replace(run, steps=updates) if updates > run.steps else run
        self.objective = PolicyObjective(schedule, self.dtype, self.shapes.segments)
        self.held_out = self._fitting(self.task.held_out)
        self.record = run.grpo.routing_replay or run.rollout.record_experts
        if self.record and not cfg.n_routed_experts:
            raise ConfigError(f"a {cfg.model_type} model without experts has no routing to record or replay")
        self.with_reference = run.grpo.beta > 0
        self.state, self.done, self.position = self._first_state()
        self.reference = ReferencePolicy(run, strategy, self.dtype)
        if self.with_reference:
            self.reference.open(self.position["reference"], self._start_model)
        self.logprobs = make_logprobs(self.objective)
        self.update = make_step(self.objective, self.optimizer)
        self.alarms, self.failure, self.too_long = Alarms(), "", 0
        self.next = self.position["next"]  # training problem
        self.accuracy = 0.0
        self.best: float = self.checkpoints.best_loss

    def _start_model(self) -> DeepSeek:
        if self.done == 0:
            return lora.base(self.state.model)
        return start.open_model(self.run, self.cfg, self.strategy)

    def _first_state(self) -> tuple[State, int, dict[str, int]]:
        run, step = self.run, self.checkpoints.latest
        model = start.open_model(run, self.cfg, self.strategy)
        model = lora.adapt(model, run.lora, run.seed) if run.lora.rank else model
        self.optimizer = make_optimizer(self.objective.run, decays(model))
        state = init_state(model, self.optimizer)
        if step is None:
            return state, 0, {"next": 0, "reference": 0}
        state, position = self.checkpoints.restore(step, state)
        return state, step, position

    # ---------------------------------------------------------------- the steps

    def run_to_end(self, deadline: float | None) -> Result:
        run, out = self.run, self.out
        if self.done >= run.steps and (out / "model").exists():
            return Result(str(out), self.done, None, None, False)
        stopped = late = False
        with (
            MetricsLog(out, run.log, self.done) as self.log,
            Progress(run.steps, self.done) as self.progress,
            signals() as asked_to_stop,
        ):
            if self.done:
                self.progress.note(f"going on from step {self.done} of {run.steps}")
            self.loaded = self.sampler.load(self.state.model)
            if self.done == 0:
                self._evaluate()
            while self.done < run.steps and not stopped and not late:
                values = self._step(self.done)
                self.done += 1
                late = deadline is not None and time.monotonic() > deadline
                last = late or self.done == run.steps
                self.loaded = self.sampler.load(self.state.model)
                due = last or (run.eval.every and self.done % run.eval.every == 0)
                loss = self._evaluate() if due else None
                self._record(values)
                stopped = asked_to_stop() and not last
                best = loss is not None and loss < self.best
                self.best = self.best if loss is None else min(loss, self.best)
                if best or stopped or last or self.checkpoints.due(self.done):
                    self.checkpoints.save(self.done, self.state, self.position, loss)
            self.checkpoints.wait()
            if not stopped:
                self._export()
        plot_rewards(out)
        return Result(str(out), self.done, None, None, stopped, self.accuracy)

    def _step(self, step: int) -> dict[str, float]:
        """One rollout and its updates; the metrics."""
        run, cfg, clock = self.run, self.run.grpo, _Clock()
        values: dict[str, float] = {"layout_seconds": self.loaded}
        groups, rewards_PG, valid_PG = self._rollout(step, values, clock)
        episodes = [e for group in groups for e in group]
        cut_N = np.array([e.sampled.finish_reason == "length" for e in episodes])
        counted_N = valid_PG.reshape(-1) & ~(cfg.overlong_mask & cut_N)
        known = self._known(episodes, rewards_PG, valid_PG)
        clock.note("logprobs_seconds", values)

        lengths_N = np.array([len(e.sampled.tokens) for e in episodes])
        totals: list[dict[str, float]] = []
        for which in self._minibatches(step, len(episodes)):
            longest = run.rollout.max_new_tokens
            shares_N = grpo.sequence_weights(lengths_N[which], counted_N[which], cfg, longest)
            own = {name: [lists[i] for i in which] for name, lists in known.items()}
            batch = self._batch([episodes[i] for i in which], shares_N, own)
            with self.state.model.on_mesh():
                self.state, metrics = self.update(self.state, None, batch, np.float32(0), np.float32(0))
            totals.append(summarize(metrics))
            if not totals[-1].pop("finite"):
                raise TrainingError(self._not_finite(step, batch))
        clock.note("update_seconds", values)

        values |= _of_updates(totals)
        self._replace_reference(step + 1)
        return values | {"seconds": clock.total}

    def _minibatches(self, step: int, count: int) -> list[np.ndarray]:
        """Which answers each update learns from; with several, in an order that is drawn for each epoch."""
        cfg, out = self.run.grpo, []
        for epoch in range(cfg.epochs):
            order = np.arange(count)
            if cfg.minibatches > 1:
                order = np.random.default_rng([self.run.seed % 2**32, step, epoch]).permutation(count)
            out += np.split(order, cfg.minibatches)
        return out

    # ---------------------------------------------------------------- rollout and rewards

    def _rollout(self, step: int, values: dict[str, float], clock: _Clock):
        """Groups of answers [P][G], their rewards and which of these are valid, both [P, G].

        With dynamic sampling, groups in which all rewards are equal make way for groups of further problems,
        as long as ROUNDS lasts.
        """
        run, P = self.run, self.run.rollout.prompts
        kept: list[tuple[list[Episode], np.ndarray, np.ndarray]] = []
        flat: list[tuple[list[Episode], np.ndarray, np.ndarray]] = []
        scored: list[dict[str, np.ndarray]] = []
        tokens = seconds = rounds = 0
        while rounds < (ROUNDS if run.grpo.dynamic_sampling else 1) and len(kept) < P:
            problems, prompts, numbers = self._next_problems(P)
            seeds = [[seed_of(run.seed, step, n, g) for g in range(run.grpo.group_size)] for n in numbers]
            groups, timing = self.sampler.sample(
                problems, prompts, seeds, run.rollout.temperature, self.record, self._tell_rollout(step)
            )
            clock.note("rollout_seconds", values)
            tokens, seconds = tokens + timing.new_tokens, seconds + timing.decode_seconds
            values |= {"occupancy": timing.occupancy, "prefill_seconds": timing.prefill_seconds}
            rewards_PG, valid_PG, parts = self._score(groups, step)
            scored.append(parts)
            clock.note("reward_seconds", values)
            for group, flat_group in zip(
                zip(groups, rewards_PG, valid_PG), grpo.flat_groups(rewards_PG, valid_PG)
            ):
                (flat if flat_group else kept).append(group)
            rounds += 1
        values["flat_groups"] = len(flat) / (len(flat) + len(kept))
        if rounds > 1:
            values["sampling_rounds"] = rounds
        for name in scored[0]:
            values[name] = float(np.concatenate([parts[name] for parts in scored]).mean())
        values |= _of_answers([e for group, *_ in kept + flat for e in group])
        values["rollout_tokens_per_second"] = tokens / max(seconds, 1e-9)
        chosen = (kept + flat)[:P]
        rewards_PG, valid_PG = np.stack([g[1] for g in chosen]), np.stack([g[2] for g in chosen])
        values["reward"] = float(rewards_PG[valid_PG].mean()) if valid_PG.any() else 0.0
        values["reward_std"] = float(
            np.mean([r[v].std() for r, v in zip(rewards_PG, valid_PG) if v.any()] or [0])
        )
        return [group for group, *_ in chosen], rewards_PG, valid_PG

    def _next_problems(self, count: int) -> tuple[list[Problem], list[list[int]], list[int]]:
        """The next training problems whose prompts are short enough, these prompts, and their numbers."""
        found: list[tuple[Problem, list[int], int]] = []
        skipped = 0
        while len(found) < count:
            number, self.next = self.next, self.next + 1
            problem = self.task.problem(number)
            prompt = self.sampler.encode(problem)
            if len(prompt) <= self.run.rollout.max_prompt_tokens:
                found.append((problem, prompt, number))
                skipped = 0
                continue
            skipped, self.too_long = skipped + 1, self.too_long + 1
            if skipped == TOO_LONG:
                raise ConfigError(
                    f"{TOO_LONG} prompts in a row are longer than rollout.max_prompt_tokens "
                    f"{self.run.rollout.max_prompt_tokens} (the last has {len(prompt)} tokens); raise it"
                )
        problems, prompts, numbers = zip(*found)
        return list(problems), list(prompts), list(numbers)

    def _fitting(self, problems: list[Problem]) -> list[tuple[Problem, list[int]]]:
        """Held-out problems with their prompts, as far as these are short enough."""
        encoded = [(problem, self.sampler.encode(problem)) for problem in problems]
        fitting = [e for e in encoded if len(e[1]) <= self.run.rollout.max_prompt_tokens]
        self.left_out = len(encoded) - len(fitting)
        if not fitting:
            raise ConfigError(
                f"all held-out prompts are longer than rollout.max_prompt_tokens "
                f"{self.run.rollout.max_prompt_tokens}; raise it"
            )
        return fitting

    def _score(self, groups: list[list[Episode]], step: int):
        """Rewards [P, G], which are valid, and each term's values for the metrics."""
        run = self.run
        answers = [e.answer for group in groups for e in group]
        totals_N, parts = self._totals(answers)
        failed_N = ~np.isfinite(totals_N)
        if failed_N.mean() > 0.5:
            raise TrainingError(
                f"step {step + 1}: {failed_N.sum()} of {len(answers)} answers could not be rewarded; "
                f"the first: {self.failure}. Mend that and run again: it goes on from the last checkpoint"
            )
        lengths_N = np.array([answer.tokens for answer in answers])
        totals_N = totals_N + grpo.overlong_penalty(lengths_N, run.rollout.max_new_tokens, run.grpo)
        shape = (len(groups), -1)
        about = {f"reward_{name}": values[np.isfinite(values)] for name, values in parts.items()}
        about = {name: values for name, values in about.items() if len(values)}
        about["reward_failures"] = failed_N.astype(np.float64)
        return np.where(failed_N, 0, totals_N).reshape(shape), ~failed_N.reshape(shape), about

    def _totals(self, answers: list[Answer]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As the first host computes them, so that all learn from the same."""
        names = [r.name or r.kind for r in self.run.rewards]
        table = np.full((1 + len(names), len(answers)), np.nan)
        if jax.process_index() == 0:
            scores = self.rewards.score(answers)
            table = np.stack([scores.total, *(scores.parts[name] for name in names)])
            self.failure = str(scores.failures[0]) if scores.failures else ""
        if jax.process_count() > 1:
            table = np.asarray(multihost_utils.broadcast_one_to_all(table))
        return table[0], dict(zip(names, table[1:]))

    # ---------------------------------------------------------------- what an update needs

    def _batch(self, episodes: list[Episode], shares_N: np.ndarray, known: dict[str, list]) -> PolicyBatch:
        return make_policy_batch(episodes, shares_N, known, self.shapes, self.state.model, self.record)

    def _known(self, episodes: list[Episode], rewards_PG, valid_PG) -> dict[str, list[Any]]:
        """Of each answer's tokens: advantage, and log-probabilities under reference and old policy, as far as
        wanted, by the weights from before the first update."""
        cfg, known = self.run.grpo, {}
        if cfg.old_logprobs == "trainer":
            known["old"] = self._logprobs(self.state.model, episodes)
        if self.with_reference:
            known["reference"] = self._logprobs(self.reference.of(self.state.model), episodes)
        if self.with_reference and cfg.kl_in == "reward":
            old = known.get("old") or [np.array(e.sampled.tempered) for e in episodes]
            old_NT, reference_NT = _padded(old), _padded(known["reference"])
            mask_NT = _padded([np.ones(len(a)) for a in old])
            table_NT = grpo.kl_in_reward(rewards_PG, old_NT, reference_NT, mask_NT, cfg, valid_PG)
            known["advantage"] = [row[: len(a)] for row, a in zip(table_NT, old)]
        else:
            known["advantage"] = list(grpo.advantages(rewards_PG, cfg, valid_PG).reshape(-1))
        return known

    def _logprobs(self, model: DeepSeek, episodes: list[Episode]) -> list[np.ndarray]:
        """log p of each answer's tokens, in as many batches as a step has updates."""
        out = []
        for part in np.split(np.arange(len(episodes)), self.run.grpo.minibatches):
            some = [episodes[i] for i in part]
            batch = self._batch(some, np.ones(len(some), np.float32), {})
            with self.state.model.on_mesh():
                table = fetch(self.logprobs(model, batch))
            out += answers_of(table, some, self.shapes)
        return out

    def _replace_reference(self, step: int) -> None:
        every = self.run.reference.replace_every
        since = self.position["reference"]
        if self.with_reference and every and step % every == 0:
            self.reference.replace(self.state.model, step)
            since = step
        self.position = {"next": self.next, "reference": since}

    def _not_finite(self, step: int, batch: PolicyBatch) -> str:
        self.checkpoints.wait()
        last = self.checkpoints.latest
        kept = f"step {last} is kept in {self.checkpoints.directory}" if last else "nothing was saved before"
        return (
            f"step {step + 1}: loss or gradient is not finite. The weights are as before; {kept}. "
            "Lower optimizer.learning_rate, or look at the rewards and answers of this step"
        )

    # ---------------------------------------------------------------- evaluation, records, the end

    def _evaluate(self) -> float:
        """Answers to all held-out problems with fixed seeds; returns what checkpoints compare, -accuracy."""
        task, size = self.run.task, self.run.rollout.prompts * self.run.grpo.group_size
        work = [(p, prompt, s) for p, prompt in self.held_out for s in range(task.samples)]
        episodes: list[Episode] = []
        for begin in range(0, len(work), size):
            some = work[begin : begin + size]
            filled = some + [some[-1]] * (size - len(some))  # one program for all parts
            problems, prompts, numbers = zip(*filled)
            seeds = [[seed_of(EVALUATION, s)] for s in numbers]
            groups, _ = self.sampler.sample(problems, prompts, seeds, task.temperature)
            episodes += [group[0] for group in groups[: len(some)]]
        totals_N, parts = self._totals([e.answer for e in episodes])
        names = list(parts)
        correct_N = np.nan_to_num(parts[names[0]])
        values = {"accuracy": float(correct_N.mean())} | _of_answers(episodes)
        values |= {
            f"reward_{name}": float(np.nanmean(part))
            for name, part in parts.items()
            if not np.isnan(part).all()
        }
        values = {f"eval_{name}": value for name, value in values.items()}
        self.accuracy = values["eval_accuracy"]
        self.log.write(max(self.done - 1, 0), values)
        self._write_answers(episodes, totals_N, correct_N)
        self.progress.note(
            f"step {self.done}: accuracy {self.accuracy:.1%} on {len(self.held_out)} held-out problems, "
            f"{values['eval_thinking_tokens']:.1f} thinking tokens of {values['eval_tokens']:.1f}"
            + (f" ({self.left_out} with too long a prompt left out)" if self.left_out else "")
        )
        return -self.accuracy

    def _write_answers(self, episodes: list[Episode], totals_N: np.ndarray, correct_N: np.ndarray) -> None:
        """OUT/answers/STEP.jsonl: every held-out problem as it was answered."""
        if jax.process_index() != 0:
            return
        path = self.out / "answers" / f"{self.done:06}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [
            {
                "prompt": e.answer.problem.prompt,
                "answer": e.answer.problem.answer,
                "text": e.answer.text,
                "correct": float(correct),
                "reward": None if np.isnan(total) else float(total),
                "tokens": e.answer.tokens,
                "thinking_tokens": e.thinking_tokens,
                "finish_reason": e.answer.finish_reason,
            }
            for e, total, correct in zip(episodes, totals_N, correct_N)
        ]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
        partial.replace(path)

    def _record(self, values: dict[str, float]) -> None:
        if self.too_long:
            values["prompts_too_long"] = self.too_long
        step = self.done - 1
        if step % self.run.log.every == 0 or self.done == self.run.steps:
            self.log.write(step, values)
        for text in self.alarms.of(step, values):
            self.progress.note(text)
        self.progress.update(step, values | {"accuracy": self.accuracy})

    def _tell_rollout(self, step: int) -> Callable[[int], None]:
        return lambda tokens: self.progress.during(step, f"sampling, {tokens:,} tokens")

    def _export(self) -> None:
        """The trained model as a checkpoint that every other command reads."""
        origin = {"run": self.run.to_dict(), "steps": self.done, "accuracy": self.accuracy}
        model = lora.merge(self.state.model)
        checkpoint.save(model, self.out / "model", self.tokenizer, origin, overwrite=True)


def _of_answers(episodes: list[Episode]) -> dict[str, float]:
    """Lengths and endings of answers."""
    tokens_N = np.array([e.answer.tokens for e in episodes])
    return {
        "tokens": float(tokens_N.mean()),
        "tokens_max": float(tokens_N.max()),
        "thinking_tokens": float(np.mean([e.thinking_tokens for e in episodes])),
        "cut_off": float(np.mean([e.answer.finish_reason == "length" for e in episodes])),
    }


def _of_updates(totals: list[dict[str, float]]) -> dict[str, float]:
    """Means over the tokens of all updates; what compares sampler and trainer is of the first alone, whose
    weights are those that sampled."""
    first, out = totals[0], {}
    tokens = sum(t["tokens"] for t in totals)
    for name in totals[0]:
        if name.endswith("_max"):
            out[name] = max(t[name] for t in totals)
        elif name in ("loss", "grad_norm", "load_max_over_mean", "balance_loss"):
            out[name] = float(np.mean([t[name] for t in totals]))
        elif name == "learning_rate":
            out[name] = totals[-1][name]
        elif name not in ("tokens", "routed", "rerouted", "dropped"):
            out[name] = sum(t[name] for t in totals) / max(tokens, 1)
    out |= {"gap": first["gap"] / max(first["tokens"], 1), "gap_max": first["gap_max"]}
    if "routed" in first:
        out["rerouted"] = first["rerouted"] / max(first["routed"], 1)
    if "dropped" in first:
        out["dropped"] = sum(t["dropped"] for t in totals)
    return out


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as one table, with zeros behind."""
    table = np.zeros((len(rows), max(map(len, rows))))
    for own, row in zip(table, rows):
        own[: len(row)] = row
    return table


class _Clock:
    """Seconds between notes."""

    def __init__(self):
        self.begin = self.last = time.perf_counter()

    def note(self, name: str, values: dict[str, float]) -> None:
        now = time.perf_counter()
        values[name] = values.get(name, 0.0) + now - self.last
        self.last = now

    @property
    def total(self) -> float:
        return time.perf_counter() - self.begin


class Alarms:
    """Says, once each, what usually means that a run is going wrong."""

    PATIENCE = 20  # steps

    def __init__(self):
        self.silent: dict[str, int] = {}
        self.raised: set[str] = set()

    def of(self, step: int, values: dict[str, float]) -> list[str]:
        """What to tell the user after this step."""
        signs = {
            name: (
                value == 0,
                f"{name} has been 0 for {self.PATIENCE} steps: nothing can be learnt from it; look at the "
                "answers in OUT/answers, and whether the prompt asks for what it rewards",
            )
            for name, value in values.items()
            if name.startswith("reward_") and name not in ("reward_std", "reward_failures")
        }
        signs["flat"] = (
            values["flat_groups"] == 1,
            f"in every group all rewards have been equal for {self.PATIENCE} steps: there is no gradient; "
            "raise grpo.group_size, or use easier or harder problems",
        )
        signs["cut"] = (
            values["cut_off"] > 0.5,
            f"more than half of the answers have been cut off for {self.PATIENCE} steps; raise "
            "rollout.max_new_tokens",
        )
        told = []
        for name, (bad, text) in signs.items():
            self.silent[name] = self.silent.get(name, 0) + 1 if bad else 0
            if self.silent[name] == self.PATIENCE:
                told.append(text)
        at_once = {
            "kl": (
                values.get("kl", 0) > 1,
                "KL against the reference is above 1 per token: the policy has left it; lower "
                "optimizer.learning_rate or raise grpo.beta",
            ),
            "gap": (
                values["gap_max"] > 1,
                "sampler and trainer disagree by a factor of e or more on some token; see rollout.dtype, "
                "grpo.importance_cap and grpo.routing_replay",
            ),
        }
        for name, (bad, text) in at_once.items():
            if bad and name not in self.raised:
                self.raised.add(name)
                told.append(text)
        return [f"step {step + 1}: {text}" for text in told]
