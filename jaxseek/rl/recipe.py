"""GRPO (DeepSeekMath, arXiv:2402.03300): sample groups of answers, reward them, and learn from them.

Everything random is a function of (run seed, step, problem, answer), so that a run that is started again in
its directory continues with the same numbers as if it had never stopped.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import numpy as np

from jaxseek.config.model import ConfigError
from jaxseek.engine.engine import fetch
from jaxseek.machine.host_memory import release_freed_memory
from jaxseek.model.deepseek import DeepSeek
from jaxseek.rl import grpo
from jaxseek.rl.evaluate import HeldOut, Marking, evaluate, of_answers
from jaxseek.rl.figure import plot_rewards
from jaxseek.rl.objective import PolicyLoss, make_logprobs
from jaxseek.rl.packing import Shapes, answers_of, make_policy_batch
from jaxseek.rl.problem import Problem
from jaxseek.rl.reference import ReferencePolicy
from jaxseek.rl.rollout import Episode, Sampler, seed_of
from jaxseek.rl.tasks import open_task
from jaxseek.rl.watch import Alarms, Clock, of_updates
from jaxseek.storage.place import Place
from jaxseek.train import lora, start
from jaxseek.train.loss import StepInputs
from jaxseek.train.metrics import Evaluated
from jaxseek.train.start import Setup
from jaxseek.train.trainer import Recipe, Trainer, TrainingError

ROUNDS = 8  # of dynamic sampling, before a step makes do with the groups it has
WITHOUT_REWARD = 100  # rollouts in a row, before the run gives up
TOO_LONG = 1000  # prompts beyond the limit in a row, before the run gives up
Group = tuple[list[Episode], np.ndarray, np.ndarray]  # answers to a problem, their rewards, which are valid


class Grpo(Recipe):
    """Steps of a rollout and the updates on its answers, measured by accuracy on held-out problems."""

    evaluates_first = True

    def __init__(self, setup: Setup, closing: contextlib.ExitStack):
        super().__init__(setup)
        run, cfg, strategy, dtype = setup.run, setup.cfg, setup.strategy, start.compute_dtype(setup.run)
        self.task = open_task(run)
        self.marking = closing.enter_context(Marking(run, strategy))
        self.sampler = Sampler(run, setup.tokenizer, run.rollout.dtype or dtype)
        multiples = (strategy.parts(strategy.train, axis) for axis in ("batch", "length"))
        self.shapes = Shapes.of(run, *multiples)
        updates = run.replace(steps=run.steps * run.grpo.minibatches * run.grpo.epochs)
        self.loss = PolicyLoss(updates.program, dtype, self.shapes.segments)
        self.held_out = HeldOut.of(self.task.held_out, self.sampler, run)
        self.record = run.grpo.routing_replay or run.rollout.record_experts
        if self.record and not cfg.n_routed_experts:
            raise ConfigError(f"a {cfg.model_type} model without experts has no routing to record or replay")
        self.with_reference = run.grpo.beta > 0
        self.reference = ReferencePolicy(run, strategy, dtype)
        self.logprobs = make_logprobs(self.loss)
        self.alarms = Alarms()
        self.next = self.too_long = 0  # the next training problem, and prompts skipped so far
        self.without = 0  # rollouts in a row without any reward
        self.reached = {"accuracy": None}

    def position(self) -> dict[str, Any]:
        """The next problem, the step that the reference is from, prompts skipped, and the accuracy."""
        since = self.reference.since
        return {"next": self.next, "reference": since, "too_long": self.too_long, **self.reached}

    def begin(self, trainer: Trainer, position: dict[str, Any] | None) -> None:
        """Go to `position` in the task, open the reference, and lay out the weights for sampling."""
        super().begin(trainer, position)
        if position is not None:
            self.next, self.too_long = position["next"], position["too_long"]
            self.reached = {"accuracy": position["accuracy"]}
        if self.with_reference:
            self.reference.open(position["reference"] if position else 0, self._start_model)
        self.layout_seconds = self.sampler.load(self.model)

    def _start_model(self) -> DeepSeek:
        if self.trainer.done == 0:
            return lora.base(self.model)
        return start.open_model(self.run, self.setup.cfg, self.setup.strategy)

    @property
    def model(self) -> DeepSeek:
        """The policy."""
        return self.trainer.state.model

    # ---------------------------------------------------------------- the steps

    def step(self, step: int) -> dict[str, float]:
        """Sample and reward answers, learn from them, and take the new weights over for sampling."""
        clock = Clock()
        values: dict[str, float] = {"layout_seconds": self.layout_seconds}
        groups = self._rollout(step, values, clock)
        self.sampler.free()
        release_freed_memory()
        values |= of_updates(self._updates(step, groups, values, clock))
        self._replace_reference(step + 1)
        values["seconds"] = clock.total
        if self.too_long:
            values["prompts_too_long"] = self.too_long
        for text in self.alarms.of(step, values):
            self.trainer.progress.note(text)
        self.layout_seconds = self.sampler.load(self.model)
        return values

    def _updates(
        self, step: int, groups: list[Group], values: dict[str, float], clock: Clock
    ) -> list[dict[str, float]]:
        """Update the policy by every minibatch of the answers; returns the metrics of each."""
        run, cfg, inputs, totals = self.run, self.run.grpo, StepInputs(), []
        episodes = [e for group, *_ in groups for e in group]
        rewards_PG, valid_PG = np.stack([g[1] for g in groups]), np.stack([g[2] for g in groups])
        cut_N = np.array([e.sampled.finish_reason == "length" for e in episodes])
        counted_N = valid_PG.reshape(-1) & ~(cfg.overlong_mask & cut_N)
        known = self._known(episodes, rewards_PG, valid_PG)
        clock.note("logprobs_seconds", values)
        lengths_N = np.array([len(e.sampled.tokens) for e in episodes])
        for which in self._minibatches(step, len(episodes)):
            longest = run.rollout.max_new_tokens
            shares_N = grpo.sequence_weights(lengths_N[which], counted_N[which], cfg, longest)
            if not self.with_reference:  # an answer of advantage 0 teaches nothing, and is not computed
                some = [bool(np.any(known["advantage"][i])) for i in which]
                which, shares_N = which[some], shares_N[some]
            selected = {name: [lists[i] for i in which] for name, lists in known.items()}
            chosen = [episodes[i] for i in which]
            batch = make_policy_batch(chosen, shares_N, selected, self.shapes, self.model, self.record)
            totals.append(self.trainer.values(self.trainer.update(batch, inputs), batch, inputs))
        clock.note("update_seconds", values)
        return totals

    def _minibatches(self, step: int, count: int) -> list[np.ndarray]:
        """Choose the answers of each update; with several minibatches, in an order drawn for each epoch."""
        cfg, out = self.run.grpo, []
        for epoch in range(cfg.epochs):
            draw = np.random.default_rng([self.run.seed % 2**32, step, epoch])
            order = draw.permutation(count) if cfg.minibatches > 1 else np.arange(count)
            out += np.split(order, cfg.minibatches)
        return out

    # ---------------------------------------------------------------- rollout and rewards

    def _rollout(self, step: int, values: dict[str, float], clock: Clock) -> list[Group]:
        """Sample a group of answers to each of the next problems, and reward them.

        With dynamic sampling, groups in which all rewards are equal make way for groups of further problems,
        for up to ROUNDS rounds.
        """
        run, P = self.run, self.run.rollout.prompts
        kept: list[Group] = []
        flat: list[Group] = []
        scored: list[dict[str, np.ndarray]] = []
        tokens = seconds = rounds = 0

        def tell(tokens: int) -> None:
            self.trainer.progress.during(step, f"sampling, {tokens:,} tokens")

        while rounds < (ROUNDS if run.grpo.dynamic_sampling else 1) and len(kept) < P:
            problems, prompts, numbers = self._next_problems(P)
            seeds = [[seed_of(run.seed, step, n, g) for g in range(run.grpo.group_size)] for n in numbers]
            sampling = (seeds, run.rollout.temperature, self.record, tell)
            groups, timing = self.sampler.sample(problems, prompts, *sampling)
            clock.note("rollout_seconds", values)
            tokens, seconds = tokens + timing.new_tokens, seconds + timing.decode_seconds
            values |= {"occupancy": timing.occupancy, "prefill_seconds": timing.prefill_seconds}
            rewards_PG, valid_PG, terms = self._score(groups, step)
            scored.append(terms)
            clock.note("reward_seconds", values)
            found = zip(groups, rewards_PG, valid_PG)
            for group, is_flat in zip(found, grpo.flat_groups(rewards_PG, valid_PG)):
                (flat if is_flat else kept).append(group)
            rounds += 1
        values["flat_groups"] = len(flat) / (len(flat) + len(kept))
        if rounds > 1:
            values["sampling_rounds"] = rounds
        for name in dict.fromkeys(name for terms in scored for name in terms):
            values[name] = float(np.concatenate([terms[name] for terms in scored if name in terms]).mean())
        if self.marking.broken:
            values["broken_problems"] = self.marking.broken
        values |= of_answers([e for group, *_ in kept + flat for e in group])
        values["rollout_tokens_per_second"] = tokens / max(seconds, 1e-9)
        chosen = (kept + flat)[:P]
        rewarded = [rewards_G[valid_G] for _, rewards_G, valid_G in chosen if valid_G.any()]
        values["reward"] = float(np.concatenate(rewarded).mean()) if rewarded else 0.0
        values["reward_std"] = float(np.mean([r.std() for r in rewarded] or [0]))
        return chosen

    def _next_problems(self, count: int) -> tuple[list[Problem], list[list[int]], list[int]]:
        """Find the next training problems with short enough prompts; also the prompts, and their numbers."""
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
        return [f[0] for f in found], [f[1] for f in found], [f[2] for f in found]

    def _score(self, groups: list[list[Episode]], step: int):
        """Reward all answers: rewards and their validity, [P, G], and each term's values for the metrics."""
        run = self.run
        answers = [e.answer for group in groups for e in group]
        totals_N, parts = self.marking(answers)
        missing_N = ~np.isfinite(totals_N)
        left_out = self.marking.left_out
        failed_N = missing_N & ~np.isin(np.arange(len(answers)), list(left_out))
        if failed_N.mean() > 0.5:
            raise TrainingError(
                f"step {step + 1}: {failed_N.sum()} of {len(answers)} answers could not be rewarded; "
                f"the first: {self.marking.failure}. Mend that and run again, it goes on from its checkpoint"
            )
        self.without = self.without + 1 if missing_N.all() else 0
        if self.without == WITHOUT_REWARD:
            raise TrainingError(
                f"no answer of {WITHOUT_REWARD} rollouts in a row has a reward: no term of [[rewards]] "
                f"applies to them, or their problems are broken ({self.marking.broken} so far, see the log)"
            )
        lengths_N = np.array([answer.tokens for answer in answers])
        totals_N = totals_N + grpo.overlong_penalty(lengths_N, run.rollout.max_new_tokens, run.grpo)
        shape = (len(groups), -1)
        about = {f"reward_{name}": values[np.isfinite(values)] for name, values in parts.items()}
        about = {name: values for name, values in about.items() if len(values)}
        about["reward_failures"] = failed_N.astype(np.float64)
        if left_out:
            about["answers_left_out"] = (missing_N & ~failed_N).astype(np.float64)
        return np.where(missing_N, 0, totals_N).reshape(shape), ~missing_N.reshape(shape), about

    # ---------------------------------------------------------------- what an update needs

    def _known(self, episodes: list[Episode], rewards_PG, valid_PG) -> dict[str, list[Any]]:
        """Compute each answer's advantage and, if the settings need them, the log-probs of its tokens.

        Those are as drawn, under the reference, and under the policy from before the first update.
        """
        cfg, known = self.run.grpo, {}
        if cfg.old_logprobs == "trainer":
            known["old"] = self._logprobs(self.model, episodes, self.record)
        if cfg.importance_cap:
            known["drawn"] = [np.array(e.sampled.drawn) for e in episodes]
        if self.with_reference:
            # by its own routers: the recorded experts are the policy's choice
            known["reference"] = self._logprobs(self.reference.of(self.model), episodes, False)
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
        """log p of each answer's tokens under a model, in as many batches as there are minibatches."""
        out = []
        for part in np.split(np.arange(len(episodes)), self.run.grpo.minibatches):
            some = [episodes[i] for i in part]
            ones = np.ones(len(some), np.float32)
            batch = make_policy_batch(some, ones, {}, self.shapes, self.model, experts)
            with self.model.on_mesh():
                table = fetch(self.logprobs(model, batch))
            out += answers_of(table, some, self.shapes)
        return out

    def _replace_reference(self, step: int) -> None:
        every = self.run.reference.replace_every
        if self.with_reference and every and step % every == 0:
            kept = {step - step % every for step in self.trainer.checkpoints.steps()}
            self.reference.replace(self.model, step, kept)

    # ---------------------------------------------------------------- evaluation

    def evaluate(self) -> Evaluated:
        """Answer the held-out problems, and write the answers to OUT/answers."""
        result = evaluate(self.run, self.sampler, self.held_out, self.marking)
        if jax.process_index() == 0:
            result.write(self.trainer.out / "answers" / f"{self.trainer.done:06}.jsonl")
        accuracy, left = result.values["accuracy"], self.held_out.left_out
        self.reached = {"accuracy": accuracy}
        note = f" ({left} with too long a prompt left out)" if left else ""
        return Evaluated(result.values, f"{result}{note}", -accuracy)

    def plot(self, out: Place) -> None:
        plot_rewards(out)


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """Lay rows of different lengths into one table, padded with zeros."""
    table = np.zeros((len(rows), max(map(len, rows))))
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table
