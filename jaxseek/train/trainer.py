"""`train`: a run from its file to its end: data, steps, evaluation, checkpoints, logs, export.

Started again in the same directory it goes on from the newest checkpoint, with the same numbers as if it had
never stopped.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxseek.checkpoint import models
from jaxseek.config.model import ConfigError
from jaxseek.config.run import RunConfig, at_fraction
from jaxseek.data.dataset import Rows, open_rows
from jaxseek.machine.hosts import most
from jaxseek.model.deepseek import DeepSeek
from jaxseek.storage.place import Mirror, Place, place
from jaxseek.tokenizer.tokenizer import Tokenizer
from jaxseek.train import lora, start
from jaxseek.train.batch import Batch, blank_row, make_batch, to_devices
from jaxseek.train.checkpoints import Checkpoints
from jaxseek.train.diagnose import not_finite
from jaxseek.train.distill import sampled_run
from jaxseek.train.metrics import MetricsLog, Progress, peak_flops, plot_loss, summarize, train_flops
from jaxseek.train.objectives import Objective, Whole, logprobs_of_rows
from jaxseek.train.reference import Reference
from jaxseek.train.schedule import batch_rows
from jaxseek.train.step import make_evaluation, make_step


class TrainingError(ValueError):
    """A run that cannot go on; the message says at which step, why, and what is kept."""


@dataclass(frozen=True)
class Result:
    """Of a run: steps done, the last training and evaluation loss, whether a signal stopped it."""

    out: str
    steps: int
    loss: float | None
    eval_loss: float | None
    stopped: bool
    accuracy: float | None = None  # of a run by GRPO, on held-out problems
    samples: str | None = None  # of rejection sampling: the file

    def __str__(self) -> str:
        """What a user wants to know when it is over."""
        if self.stopped:
            return f"stopped after step {self.steps}; the same command goes on"
        if self.samples is not None:
            return f"{self.samples}: for data.train of an SFT run"
        losses = {"loss": self.loss, "held-out loss": self.eval_loss}
        shown = "".join(f", {name} {value:.4f}" for name, value in losses.items() if value is not None)
        plot = "loss.png"
        if self.accuracy is not None:
            shown, plot = f", held-out accuracy {self.accuracy:.1%}", "rewards.png, answers/"
        return f"{self.steps} steps{shown}\n{self.out}: model/ (to generate, convert), {plot}, metrics.jsonl"


def train(run: RunConfig, deadline: float = math.inf) -> Result:
    """Train as the run says, going on from what is in `run.out`. On several hosts, all call it.

    Past `deadline` (of time.monotonic) the run ends after the step, as if that were its last.

    Raises ConfigError for settings that do not fit, CheckpointError where a checkpoint cannot be written or
    read, TrainingError for a loss that is not finite.
    """
    cfg = start.model_config(run)
    strategy = start.open_strategy(run, cfg)
    start.claim(run)
    if (steps := start.finished(run)) is not None:
        return Result(run.out, steps, None, None, False)
    tokenizer = start.open_tokenizer(run, cfg)
    if run.objective == "distill" and run.distill.by == "samples":
        run = sampled_run(run, strategy, tokenizer)
    with contextlib.ExitStack() as closing:
        return _Training(run, cfg, strategy, tokenizer, closing).run_to_end(deadline)


class _Training:
    """One run while it is going on."""

    def __init__(
        self, run: RunConfig, cfg: Any, strategy: Any, tokenizer: Tokenizer, closing: contextlib.ExitStack
    ):
        self.run, self.cfg, self.strategy, self.tokenizer = run, cfg, strategy, tokenizer
        self.closing = closing
        self.out = place(run.out)
        self.rows = _opened(run, tokenizer)
        closing.callback(self.rows.close)
        self.objective = Objective(run.recipe, start.compute_dtype(run))
        self.checkpoints = Checkpoints(self.out, run.checkpoint)
        closing.callback(self.checkpoints.close)
        self.modules = cfg.num_nextn_predict_layers
        self.teacher = start.open_teacher(run, cfg, strategy) if run.objective == "distill" else None
        self.state, self.optimizer, self.done, position = start.first_state(
            run, cfg, strategy, self.checkpoints
        )
        if position is not None:
            self.rows.set_state(position)
        self.reference = self._reference() if run.objective == "dpo" else None
        self.optimizer_step = make_step(self.objective, self.optimizer)
        self.evaluate = make_evaluation(self.objective)
        self.eval_batches = self._eval_batches()
        self.loss = self.eval_loss = None
        self.best = self.checkpoints.best_loss

    # ---------------------------------------------------------------- before the first step

    def _reference(self) -> Reference:
        """Log-probabilities of every pair under the model that the run started from."""

        def base() -> DeepSeek:
            first = self.done == 0
            return self.state.model if first else start.open_model(self.run, self.cfg, self.strategy)

        return Reference(self.run, base, self.tokenizer, logprobs_of_rows(self.objective))

    def _eval_batches(self) -> list[Batch]:
        """The same rows at every evaluation, in batches of the run's size."""
        size = self.run.batch.size
        rows = open_rows(self.run, self.tokenizer, "eval", repeat=False)
        if rows is None:
            return []
        some = [row for row, _ in zip(rows, range(self.run.eval.rows))]
        rows.close()
        if not some:
            raise ConfigError("there is nothing to evaluate on; raise data.holdout, or give data.eval more")
        some += [blank_row(self.run)] * (-len(some) % size)
        return [self._batch(some[i : i + size], "eval") for i in range(0, len(some), size)]

    def _batch(self, rows: list[dict[str, Any]], split: str = "train") -> Batch:
        """Rows on the devices."""
        stacked = {k: np.stack([row[k] for row in rows]) for k in ("tokens", "segments", "weights")}
        reference = None
        if self.run.objective == "dpo":
            assert self.reference is not None
            stacked = {k: v.reshape(-1, v.shape[-1]) for k, v in stacked.items()}
            reference = self.reference.of([int(row["index"]) for row in rows], split)
        accumulation = self.run.batch.accumulation
        host = make_batch(**stacked, modules=self.modules, accumulation=accumulation, reference=reference)
        return to_devices(host, self.state.model)

    # ---------------------------------------------------------------- the steps

    def run_to_end(self, deadline: float) -> Result:
        run, out = self.run, self.out
        stopped, self.last = False, self.done >= run.steps
        with (
            MetricsLog(out, run.log, self.done) as log,
            Progress(run.steps, self.done) as progress,
            signals() as asked_to_stop,
        ):
            self.progress, self.log = progress, log
            if self.done:
                progress.note(f"going on from step {self.done} of {run.steps}")
            profile = self.closing.enter_context(contextlib.closing(Profile(run.log.profile, out)))
            batch, position = self._next_batch(self.done)
            if self.done == 0:
                self._evaluate_when_due()  # what the run begins with
            before = time.perf_counter()
            while not self.last and not stopped:
                step = self.done
                profile.before(step)
                with self.state.model.on_mesh():
                    self.state, metrics = self.optimizer_step(
                        self.state,
                        self.teacher,
                        batch,
                        np.float32(at_fraction(run.loss.mtp, step / run.steps)),
                        np.float32(at_fraction(run.loss.bias_speed, step / run.steps)),
                    )
                used, reached = batch, position
                if step + 1 < run.steps:
                    batch, position = self._next_batch(step + 1)  # while the devices work
                values = summarize(metrics)
                profile.after(step)
                now = time.perf_counter()
                self._record(step, used, values, now - before)
                before = now
                self.done = step + 1
                self.last = self.done == run.steps or most(time.monotonic() > deadline) > 0
                evaluated = self._evaluate_when_due()
                enough = evaluated and self.eval_loss is not None and self.eval_loss < run.eval.enough
                self.last = self.last or enough
                stopped = asked_to_stop() and not self.last
                if self.last:
                    self._export()  # first: a run with a model is over
                self._save_when_due(reached, stopped, evaluated)
                before = time.perf_counter() if evaluated else before
            self.checkpoints.wait()
            if self.last and models.kind_of(out / "model") is None:
                self._export()
        if self.done:
            plot_loss(out)
        return Result(str(out), self.done, self.loss, self.eval_loss, stopped)

    def _next_batch(self, step: int) -> tuple[Batch, Any]:
        """The batch of a step, and where the data stands after it."""
        multiple = self.strategy.parts(self.strategy.train, "batch") * self.run.batch.accumulation
        rows = [next(self.rows) for _ in range(batch_rows(self.run, step, multiple))]
        return self._batch(rows), self.rows.get_state()

    def _save_when_due(self, position: Any, stopped: bool, evaluated: bool) -> None:
        """At the end, when asked to stop, every so often, and where an evaluation is the best so far."""
        loss = self.eval_loss if evaluated else None
        best = loss is not None and loss < self.best
        self.best = loss if best else self.best
        if best or stopped or self.last or self.checkpoints.due(self.done):
            self.log.flush()
            self.checkpoints.save(self.done, self.state, position, loss)

    def _record(self, step: int, batch: Batch, values: dict[str, float], seconds: float) -> None:
        if not values.pop("finite"):
            model = self.state.model
            raise TrainingError(not_finite(step, self.objective, model, batch, self.checkpoints))
        tokens = int(np.prod(batch.tokens_BT.shape))
        self.loss = values["loss"]
        values |= self.rows.counts | {"tokens_per_second": tokens / seconds}
        peak = peak_flops(self.state.model.mesh)
        if peak:
            values["mfu"] = train_flops(self.cfg, tokens, self.run.data.length) / seconds / peak
        if step % self.run.log.every == 0 or step + 1 == self.run.steps:
            self.log.write(step, values)
        self.progress.update(step, values)

    def _evaluate_when_due(self) -> bool:
        run = self.run
        due = self.last or (run.eval.every and self.done % run.eval.every == 0)
        if not due or not self.eval_batches:
            return False
        total, weight = {}, 0.0
        for batch in self.eval_batches:
            with self.state.model.on_mesh():
                metrics = self.evaluate(self.state.model, self.teacher, batch, None)
            own = self._weight(batch)
            for name, value in summarize(metrics).items():
                if name in EVALUATED:
                    total[name] = total.get(name, 0.0) + own * value
            weight += own
        values = {f"eval_{name}": value / weight for name, value in total.items()}
        self.eval_loss = values["eval_loss"]
        self.log.write(max(self.done - 1, 0), values)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.progress.note(f"step {self.done}: {shown}")
        return True

    def _weight(self, batch: Batch) -> float:
        """How many tokens, or pairs, a batch's means are over."""
        with self.state.model.on_mesh():
            whole = Whole.of(batch)
        return float(whole.rows if self.run.objective == "dpo" else whole.weight)

    def _export(self) -> None:
        """The trained model as a checkpoint that every other command reads."""
        origin = {"run": self.run.to_dict(), "steps": self.done, "eval_loss": self.eval_loss}
        models.save(lora.merge(self.state.model), self.out / "model", self.tokenizer, origin, overwrite=True)


EVALUATED = ("loss", "kl", "margin", "accuracy", "reward_chosen", "reward_rejected")


def _opened(run: RunConfig, tokenizer: Tokenizer) -> Rows:
    rows = open_rows(run, tokenizer)
    assert rows is not None
    return rows


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or the first ctrl-C has come, which end the run after its step; a second one at once.

    On several hosts, whether it has come to any.
    """
    come: list[int] = []

    def note(number: int, frame: Any) -> None:
        if come and number == signal.SIGINT:
            raise KeyboardInterrupt
        come.append(number)

    def asked() -> bool:
        return most(len(come)) > 0

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals go elsewhere
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Profile:
    """Traces the steps first..last (from 1) of `log.profile` into the run's directory, for xprof."""

    steps: list[int]
    out: Place
    on: Mirror | None = None

    def before(self, step: int) -> None:
        if self.steps and step + 1 == self.steps[0]:
            self.on = Mirror(self.out / "profile")
            jax.profiler.start_trace(str(self.on.local))

    def after(self, step: int) -> None:
        if self.on and step + 1 == self.steps[1]:
            self.close()

    def close(self) -> None:
        """Also where the run ends within these steps."""
        if self.on:
            jax.profiler.stop_trace()
            self.on.close()
        self.on = None
