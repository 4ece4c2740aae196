"""`train` with objective grpo: sample groups of answers, reward them, learn from them, evaluate; again.

Everything random is a function of (run seed, step, problem, answer), so a run that is started again in its
directory goes on with the same numbers as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxseek.checkpoint import models
from jaxseek.config.model import ConfigError
from jaxseek.config.run import RunConfig
from jaxseek.engine.engine import fetch
from jaxseek.machine.host_memory import release_freed_memory
from jaxseek.machine.hosts import most
from jaxseek.model.deepseek import DeepSeek
from jaxseek.rl import grpo
from jaxseek.rl.evaluate import HeldOut, Marking, evaluate, of_answers
from jaxseek.rl.figure import plot_rewards
from jaxseek.rl.objective import PolicyObjective, make_logprobs
from jaxseek.rl.packing import PolicyBatch, Shapes, answers_of, make_policy_batch
from jaxseek.rl.problem import Problem
from jaxseek.rl.reference import ReferencePolicy
from jaxseek.rl.rollout import Episode, Sampler, seed_of
from jaxseek.rl.tasks import open_task
from jaxseek.rl.watch import Alarms, Clock, of_updates
from jaxseek.storage.place import place
from jaxseek.train import lora, start
from jaxseek.train.checkpoints import Checkpoints
from jaxseek.train.diagnose import not_finite
from jaxseek.train.metrics import MetricsLog, Progress, summarize
from jaxseek.train.step import make_step
from jaxseek.train.trainer import Profile, Result, TrainingError, signals

ROUNDS = 8  # of dynamic sampling, before a step makes do with the groups it has
TOO_LONG = 1000  # prompts beyond the limit in a row, before the run gives up


def train_grpo(run: RunConfig, deadline: float = math.inf) -> Result:
    """Train by GRPO as the run says, going on from what is in `run.out`. On several hosts, all call it.

    Past `deadline` (of time.monotonic) it ends after the step, as if that were the last. Raises ConfigError
    for settings that do not fit, TrainingError for a loss that is not finite and for rewards that fail.
    """
    cfg = start.model_config(run)
    strategy = start.open_strategy(run, cfg)
    start.claim(run)
    if (steps := start.finished(run)) is not None:
        origin = models.read_manifest(place(run.out) / "model")["origin"]
        return Result(run.out, steps, None, None, False, origin["accuracy"])
    tokenizer = start.open_tokenizer(run, cfg)
    with contextlib.ExitStack() as closing:
        return _Grpo(run, cfg, strategy, tokenizer, closing).run_to_end(deadline)


class _Grpo:
    """One run while it is going on."""

    def __init__(self, run: RunConfig, cfg: Any, strategy: Any, tokenizer: Any, closing: Any):
        self.run, self.cfg, self.strategy, self.tokenizer = run, cfg, strategy, tokenizer
        self.out = place(run.out)
        self.dtype = start.compute_dtype(run)
        self.task = open_task(run)
        self.marking = closing.enter_context(Marking(run, strategy))
        self.checkpoints = Checkpoints(self.out, run.checkpoint)
        closing.callback(self.checkpoints.close)
        self.sampler = Sampler(run, tokenizer, run.rollout.dtype or self.dtype)
        multiples = (strategy.parts(strategy.train, axis) for axis in ("batch", "length"))
        self.shapes = Shapes.of(run, *multiples)
        updates = run.replace(steps=run.steps * run.grpo.minibatches * run.grpo.epochs)
        self.objective = PolicyObjective(updates.recipe, self.dtype, self.shapes.segments)
        self.held_out = HeldOut.of(self.task.held_out, self.sampler, run)
        self.record = run.grpo.routing_replay or run.rollout.record_experts
        if self.record and not cfg.n_routed_experts:
            raise ConfigError(f"a {cfg.model_type} model without experts has no routing to record or replay")
        self.with_reference = run.grpo.beta > 0
        self.state, self.optimizer, self.done, position = start.first_state(
            updates, cfg, strategy, self.checkpoints
        )
        self.position: dict[str, Any] = position or {
            "next": 0,
            "reference": 0,
            "too_long": 0,
            "accuracy": None,
        }
        self.reference = ReferencePolicy(run, strategy, self.dtype)
        if self.with_reference:
            self.reference.open(self.position["reference"], self._start_model)
        self.logprobs = make_logprobs(self.objective)
        self.update = make_step(self.objective, self.optimizer)
        self.alarms, self.too_long = Alarms(), self.position["too_long"]
        self.next = self.position["next"]  # training problem
        self.accuracy: float | None = self.position["accuracy"]
        self.best: float = self.checkpoints.best_loss

    def _start_model(self) -> DeepSeek:
        if self.done == 0:
            return lora.base(self.state.model)
        return start.open_model(self.run, self.cfg, self.strategy)

    # ---------------------------------------------------------------- the steps

    def run_to_end(self, deadline: float) -> Result:
        run, out = self.run, self.out
        stopped, last = False, self.done >= run.steps
        with (
            MetricsLog(out, run.log, self.done) as self.log,
            Progress(run.steps, self.done) as self.progress,
            signals() as asked_to_stop,
            contextlib.closing(Profile(run.log.profile, out)) as profile,
        ):
            if self.done:
                self.progress.note(f"going on from step {self.done} of {run.steps}")
            self.loaded = self.sampler.load(self.state.model)
            if self.done == 0:
                self._evaluate()
            while not last and not stopped:
                profile.before(self.done)
                values = self._step(self.done)
                profile.after(self.done)
                self.done += 1
                last = self.done == run.steps or most(time.monotonic() > deadline) > 0
                self.loaded = self.sampler.load(self.state.model)
                due = last or (run.eval.every and self.done % run.eval.every == 0)
                loss = self._evaluate() if due else None
                self._record(values, last)
                if last:
                    self._export()  # first: a run with a model is over
                stopped = asked_to_stop() and not last
                best = loss is not None and loss < self.best
                self.best = self.best if loss is None else min(loss, self.best)
                if best or stopped or last or self.checkpoints.due(self.done):
                    position = self.position | {"accuracy": self.accuracy}
                    self.log.flush()
                    self.checkpoints.save(self.done, self.state, position, loss)
            self.checkpoints.wait()
            if last and models.kind_of(out / "model") is None:
                self._export()
        plot_rewards(out)
        return Result(str(out), self.done, None, None, stopped, self.accuracy)

    def _step(self, step: int) -> dict[str, float]:
        """One rollout and its updates; the metrics."""
        run, cfg, clock = self.run, self.run.grpo, Clock()
        values: dict[str, float] = {"layout_seconds": self.loaded}
        groups, rewards_PG, valid_PG = self._rollout(step, values, clock)
        self.sampler.free()
        release_freed_memory()
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
            if not self.with_reference:  # an answer of advantage 0 teaches nothing, and is not computed
                some = [bool(np.any(known["advantage"][i])) for i in which]
                which, shares_N = which[some], shares_N[some]
            own = {name: [lists[i] for i in which] for name, lists in known.items()}
            batch = self._batch([episodes[i] for i in which], shares_N, own, self.record)
            with self.state.model.on_mesh():
                self.state, metrics = self.update(self.state, None, batch, np.float32(0), np.float32(0))
            totals.append(summarize(metrics))
            if not totals[-1].pop("finite"):
                model = self.state.model
                raise TrainingError(not_finite(step, self.objective, model, batch, self.checkpoints))
        clock.note("update_seconds", values)

        values |= of_updates(totals)
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

    def _rollout(self, step: int, values: dict[str, float], clock: Clock):
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
        for name in dict.fromkeys(name for parts in scored for name in parts):
            found = [parts[name] for parts in scored if name in parts]
            values[name] = float(np.concatenate(found).mean())
        values |= of_answers([e for group, *_ in kept + flat for e in group])
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

    def _score(self, groups: list[list[Episode]], step: int):
        """Rewards [P, G], which are valid, and each term's values for the metrics."""
        run = self.run
        answers = [e.answer for group in groups for e in group]
        totals_N, parts = self.marking(answers)
        failed_N = ~np.isfinite(totals_N)
        if failed_N.mean() > 0.5:
            raise TrainingError(
                f"step {step + 1}: {failed_N.sum()} of {len(answers)} answers could not be rewarded; "
                f"the first: {self.marking.failure}. Mend that and run again, it goes on from its checkpoint"
            )
        lengths_N = np.array([answer.tokens for answer in answers])
        totals_N = totals_N + grpo.overlong_penalty(lengths_N, run.rollout.max_new_tokens, run.grpo)
        shape = (len(groups), -1)
        about = {f"reward_{name}": values[np.isfinite(values)] for name, values in parts.items()}
        about = {name: values for name, values in about.items() if len(values)}
        about["reward_failures"] = failed_N.astype(np.float64)
        return np.where(failed_N, 0, totals_N).reshape(shape), ~failed_N.reshape(shape), about

    # ---------------------------------------------------------------- what an update needs

    def _batch(
        self, episodes: list[Episode], shares_N: np.ndarray, known: dict[str, list], experts: bool
    ) -> PolicyBatch:
        return make_policy_batch(episodes, shares_N, known, self.shapes, self.state.model, experts)

    def _known(self, episodes: list[Episode], rewards_PG, valid_PG) -> dict[str, list[Any]]:
        """Of each answer's tokens: advantage, and log-probabilities of what they were drawn from and under
        reference and old policy, as far as wanted, by the weights from before the first update."""
        cfg, known = self.run.grpo, {}
        if cfg.old_logprobs == "trainer":
            known["old"] = self._logprobs(self.state.model, episodes, self.record)
        if cfg.importance_cap:
            known["drawn"] = [np.array(e.sampled.drawn) for e in episodes]
        if self.with_reference:
            # by its own routers: the experts that the rollout used are the policy's
            known["reference"] = self._logprobs(self.reference.of(self.state.model), episodes, False)
        if self.with_reference and cfg.kl_in == "reward":
            old = known.get("old") or [np.array(e.sampled.tempered) for e in episodes]
            old_NT, reference_NT = _padded(old), _padded(known["reference"])
            mask_NT = _padded([np.ones(len(a)) for a in old])
            table_NT = grpo.kl_in_reward(rewards_PG, old_NT, reference_NT, mask_NT, cfg, valid_PG)
            known["advantage"] = [row[: len(a)] for row, a in zip(table_NT, old)]
        else:
            known["advantage"] = list(grpo.advantages(rewards_PG, cfg, valid_PG).reshape(-1))
        return known

    def _logprobs(self, model: DeepSeek, episodes: list[Episode], experts: bool) -> list[np.ndarray]:
        """log p of each answer's tokens, in as many batches as a step has updates."""
        out = []
        for part in np.split(np.arange(len(episodes)), self.run.grpo.minibatches):
            some = [episodes[i] for i in part]
            batch = self._batch(some, np.ones(len(some), np.float32), {}, experts)
            with self.state.model.on_mesh():
                table = fetch(self.logprobs(model, batch))
            out += answers_of(table, some, self.shapes)
        return out

    def _replace_reference(self, step: int) -> None:
        every = self.run.reference.replace_every
        since = self.position["reference"]
        if self.with_reference and every and step % every == 0:
            kept = {step - step % every for step in self.checkpoints.steps()}
            self.reference.replace(self.state.model, step, kept)
            since = step
        self.position |= {"next": self.next, "reference": since, "too_long": self.too_long}

    # ---------------------------------------------------------------- evaluation, records, the end

    def _evaluate(self) -> float:
        """Held-out accuracy to the log, the answers to OUT/answers; returns what checkpoints compare."""
        result = evaluate(self.run, self.sampler, self.held_out, self.marking)
        self.accuracy = result.values["accuracy"]
        values = {f"eval_{name}": value for name, value in result.values.items()}
        self.log.write(max(self.done - 1, 0), values)
        if jax.process_index() == 0:
            result.write(self.out / "answers" / f"{self.done:06}.jsonl")
        left = self.held_out.left_out
        note = f" ({left} with too long a prompt left out)" if left else ""
        self.progress.note(f"step {self.done}: {result}{note}")
        return -self.accuracy

    def _record(self, values: dict[str, float], last: bool) -> None:
        if self.too_long:
            values["prompts_too_long"] = self.too_long
        step = self.done - 1
        if last or step % self.run.log.every == 0:
            self.log.write(step, values)
        for text in self.alarms.of(step, values):
            self.progress.note(text)
        known = {} if self.accuracy is None else {"accuracy": self.accuracy}
        self.progress.update(step, values | known)

    def _tell_rollout(self, step: int) -> Callable[[int], None]:
        return lambda tokens: self.progress.during(step, f"sampling, {tokens:,} tokens")

    def _export(self) -> None:
        """The trained model as a checkpoint that every other command reads."""
        origin = {"run": self.run.to_dict(), "steps": self.done, "accuracy": self.accuracy}
        model = lora.merge(self.state.model)
        models.save(model, self.out / "model", self.tokenizer, origin, overwrite=True)


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as one table, with zeros behind."""
    table = np.zeros((len(rows), max(map(len, rows))))
    for own, row in zip(table, rows):
        own[: len(row)] = row
    return table
