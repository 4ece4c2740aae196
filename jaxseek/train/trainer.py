"""The trainer: a run from its file to its end, with checkpoints, evaluations, metrics and export.

A recipe (pretrain.py, sft.py, dpo.py, distill.py; rl/recipe.py for GRPO) says what a step does. A run that is
started again in its directory continues from the newest checkpoint, with the same numbers as if it had never
stopped.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from jaxseek.checkpoint import models
from jaxseek.checkpoint.directory import LOCK, alone
from jaxseek.config.run import RunConfig
from jaxseek.machine.hosts import from_first, most
from jaxseek.storage.place import Mirror, Place, place, writable
from jaxseek.train import lora, start
from jaxseek.train.checkpoints import Checkpoints
from jaxseek.train.diagnose import not_finite
from jaxseek.train.loss import Aux, Loss, StepInputs
from jaxseek.train.metrics import Evaluated, MetricsLog, Progress, summarize
from jaxseek.train.start import Setup
from jaxseek.train.step import make_step

log = logging.getLogger("jaxseek")


class TrainingError(ValueError):
    """A run that cannot go on; the message names the step, the reason, and what is kept."""


@dataclass(frozen=True)
class Result:
    """Outcome of a run: steps done, the last losses, and whether a signal stopped it."""

    out: str
    steps: int
    loss: float | None
    eval_loss: float | None
    stopped: bool
    accuracy: float | None = None  # on held-out problems, of a run by GRPO
    samples: str | None = None  # the file that rejection sampling wrote

    def __str__(self) -> str:
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


class Recipe:
    """Base of the algorithms: a loss, what a step does, how the model is measured, and the state to save."""

    loss: Loss  # compiled into the optimizer step
    evaluates_first = False  # before the first step also where eval.every is 0
    train_loss: float | None = None  # of the last step, for the Result

    def __init__(self, setup: Setup):
        self.setup, self.run = setup, setup.run
        self.reached: dict[str, float | None] = {}  # by the last evaluation; the export's origin has it

    def begin(self, trainer: Trainer, position: Any) -> None:
        """Get ready for the next step: at a position that was saved, or (None) at the start."""
        self.trainer = trainer

    def step(self, step: int) -> dict[str, float]:
        """Do a step by one or more calls of `trainer.update`; returns its metrics."""
        raise NotImplementedError

    def evaluate(self) -> Evaluated | None:
        """Measure the model; None without anything to measure it on."""
        raise NotImplementedError

    def position(self) -> Any:
        """JSON by which `begin` continues after the last step."""
        raise NotImplementedError

    def plot(self, out: Place) -> None:
        """Draw the run's picture."""
        raise NotImplementedError


def train(
    open_recipe: Callable[[Setup, contextlib.ExitStack], Recipe], run: RunConfig, deadline: float = math.inf
) -> Result:
    """Train by a recipe, continuing from what is in `run.out`. On several hosts, all call it.

    Past `deadline` (of time.monotonic) the run ends after the step, as if that were its last. Raises
    ConfigError for settings that do not fit, CheckpointError where a checkpoint cannot be written or read,
    TrainingError for a loss that is not finite and for rewards that fail.
    """
    cfg = start.model_config(run)
    strategy = start.open_strategy(run, cfg)
    with contextlib.ExitStack() as closing:
        still_alone = closing.enter_context(alone(writable(run.out) / LOCK))
        start.claim(run)
        if (steps := start.finished(run)) is not None:
            origin = models.read_manifest(place(run.out) / "model")["origin"]
            return Result(run.out, steps, None, None, False, origin.get("accuracy"))
        setup = Setup(run, cfg, strategy, start.open_tokenizer(run, cfg))
        return Trainer(open_recipe(setup, closing), closing, still_alone).run_to_end(deadline)


class Trainer:
    """One run while it goes on: holds the state, and saves, evaluates, stops and reports."""

    def __init__(self, recipe: Recipe, closing: contextlib.ExitStack, still_alone: Callable[[], None]):
        self.still_alone = still_alone
        self.recipe, self.run = recipe, recipe.setup.run
        self.out = place(self.run.out)
        self.checkpoints = Checkpoints(self.out, self.run.checkpoint)
        closing.callback(self.checkpoints.close)
        first = start.first_state(recipe.setup, recipe.loss.program, self.checkpoints)
        self.state, optimizer, self.done, position = first
        self._step = make_step(recipe.loss, optimizer)
        self.best = self.checkpoints.best_loss
        recipe.begin(self, position)

    # ---------------------------------------------------------------- for the recipe

    def update(self, batch: Any, inputs: StepInputs) -> Aux:
        """Start an update of the state by a batch; returns while the devices work."""
        with self.state.model.on_mesh():
            self.state, aux = self._step(self.state, batch, inputs)
        return aux

    def values(self, aux: Aux, batch: Any, inputs: StepInputs) -> dict[str, float]:
        """Wait for an update, and return its metrics as numbers.

        Raises TrainingError where loss or gradient is not finite, and that update changed nothing.
        """
        values = summarize(aux.metrics, aux.load_LE)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            model, loss = self.state.model, self.recipe.loss
            raise TrainingError(not_finite(self.done, loss, model, batch, inputs, self.checkpoints))
        return values

    # ---------------------------------------------------------------- the run

    def run_to_end(self, deadline: float) -> Result:
        run, out, recipe = self.run, self.out, self.recipe
        stopped, last = False, self.done >= run.steps
        with (
            MetricsLog(out, run.log, self.done) as self.log,
            Progress(run.steps, self.done) as self.progress,
            signals() as asked_to_stop,
            contextlib.closing(Profile(run.log.profile, out)) as profile,
        ):
            if self.done:
                self.progress.note(f"going on from step {self.done} of {run.steps}")
            elif run.eval.every or recipe.evaluates_first:
                self._evaluate()
            while not last and not stopped:
                profile.before(self.done)
                values = recipe.step(self.done)
                profile.after(self.done)
                self.done += 1
                last = self.done == run.steps or most(time.monotonic() > deadline) > 0
                due = last or (run.eval.every and self.done % run.eval.every == 0)
                evaluated = self._evaluate() if due else None
                last = last or (evaluated is not None and evaluated.enough)
                self._report(values, last)
                stopped = asked_to_stop(self.log.failed) and not last
                if last:
                    self._export()  # before the checkpoint: a run that has a model is over
                self._save_when_due(evaluated, stopped or last)
            self.checkpoints.wait()
            if last and models.kind_of(out / "model") is None:  # killed between checkpoint and export
                self._export()
        if self.log.failed:
            raise TrainingError(
                f"{out}: {self.log.failed}, so the run ends after step {self.done}, which is saved; mend "
                "that, and the same command goes on"
            )
        try:
            recipe.plot(out)
        except (OSError, ValueError) as e:
            log.warning("the run's picture cannot be drawn (%s)", e)
        reached = recipe.reached
        losses = recipe.train_loss, reached.get("eval_loss")
        return Result(str(out), self.done, *losses, stopped, reached.get("accuracy"))

    def _evaluate(self) -> Evaluated | None:
        found = self.recipe.evaluate()
        if found is not None:
            values = {f"eval_{name}": value for name, value in found.values.items()}
            self.log.write(max(self.done - 1, 0), values)
            self.progress.note(f"step {self.done}: {found.text}")
        return found

    def _report(self, values: dict[str, float], last: bool) -> None:
        step = self.done - 1
        if last or step % self.run.log.every == 0:
            self.log.write(step, values)
        known = {name: value for name, value in self.recipe.reached.items() if value is not None}
        self.progress.update(step, values | known)

    def _save_when_due(self, evaluated: Evaluated | None, ends: bool) -> None:
        """Save at the end, every so often, and where an evaluation is the best so far."""
        loss = math.inf if evaluated is None else evaluated.loss
        best = loss < self.best
        self.best = min(self.best, loss)
        if best or ends or self.checkpoints.due(self.done):
            from_first(self.still_alone)
            self.log.flush()
            self.checkpoints.save(self.done, self.state, self.recipe.position(), evaluated and evaluated.loss)

    def _export(self) -> None:
        """Write the trained model as a checkpoint that every other command reads."""
        origin = {"run": self.run.to_dict(), "steps": self.done, **self.recipe.reached}
        model = lora.merge(self.state.model)
        models.save(model, self.out / "model", self.recipe.setup.tokenizer, origin, overwrite=True)


@contextlib.contextmanager
def signals() -> Iterator[Callable[..., bool]]:
    """Catch SIGTERM, SIGHUP and the first ctrl-C, which end the run after its step.

    A second ctrl-C ends it at once. Under nohup SIGHUP stays ignored.

    Yields a function that tells whether one has come, or another reason that it is given, on any host.
    """
    come: list[int] = []

    def note(number: int, frame: Any) -> None:
        if come and number == signal.SIGINT:
            raise KeyboardInterrupt
        come.append(number)

    caught = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    try:
        before = {s: signal.signal(s, note) for s in caught}
    except ValueError:  # not the main thread: signals go elsewhere
        before = {}
    try:
        yield lambda other="": most(len(come) + bool(other)) > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Profile:
    """Traces the steps first to last (from 1) of `log.profile` into the run's directory, for xprof."""

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
        """Write the trace, also of a run that ends within these steps."""
        if self.on:
            jax.profiler.stop_trace()
            self.on.close()
        self.on = None
