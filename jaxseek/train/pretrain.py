"""Pretraining: next-token cross-entropy on rows of documents, with multi-token prediction and balance losses.

`Pretrain` is also the base of the other recipes on rows of data (sft, dpo, distill).
"""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxseek.config.model import ConfigError
from jaxseek.config.run import at_fraction
from jaxseek.data.dataset import open_rows
from jaxseek.model.context import Context
from jaxseek.model.deepseek import DeepSeek
from jaxseek.storage.place import Place
from jaxseek.train.batch import Batch, blank_row, make_batch, to_devices
from jaxseek.train.loss import Loss, StepInputs, Totals, token_logprobs
from jaxseek.train.metrics import Evaluated, peak_flops, plot_loss, summarize, train_flops
from jaxseek.train.schedule import batch_rows
from jaxseek.train.start import Setup, compute_dtype
from jaxseek.train.step import evaluate_batch
from jaxseek.train.trainer import Recipe, Trainer

Row = dict[str, Any]


@dataclass(frozen=True)
class LanguageLoss(Loss):
    """Mean next-token cross-entropy over the tokens that count, multi-token prediction, and balance."""

    def __call__(self, model, batch, totals, inputs):
        ctx = self.context(model, batch)
        out = model.forward(batch.tokens_BT, ctx)
        nll = cross_entropy(model, out.hidden_BTD, batch, totals, ctx)
        extra, aux = self.auxiliary(model, out, batch, totals, inputs.mtp, ctx)
        return nll + extra, aux.with_metrics(loss=nll)


def cross_entropy(
    model: DeepSeek, hidden_BTD: jax.Array, batch: Batch, totals: Totals, ctx: Context
) -> jax.Array:
    """Share of a microbatch in the batch's mean negative log-likelihood of the next tokens."""
    logprob_BT = token_logprobs(model, hidden_BTD, batch.ahead_BJT[:, 0], ctx.rules)
    return -(batch.weights_BJT[:, 0] * logprob_BT).sum() / totals.weight


class Pretrain(Recipe):
    """Steps on rows of `[data]`, measured by the mean loss over held-out rows."""

    averaged = ("loss",)  # metrics of an evaluation
    teacher: DeepSeek | None = None

    def __init__(self, setup: Setup, closing: contextlib.ExitStack):
        super().__init__(setup)
        rows = open_rows(setup.run, setup.tokenizer)
        assert rows is not None
        self.rows = rows
        closing.callback(rows.close)
        self.loss = self.make_loss()
        self.reached = {"eval_loss": None}
        self._before: float | None = None  # when the last step ended, unless an evaluation followed

    def make_loss(self) -> Loss:
        return LanguageLoss(self.run.program, compute_dtype(self.run))

    def begin(self, trainer: Trainer, position: Any) -> None:
        """Go to `position` in the data, and make the first batch and those to evaluate on."""
        super().begin(trainer, position)
        if position is not None:
            self.rows.set_state(position)
        self.held_out = [self.to_batch(rows, "eval") for rows in self.one_pass("eval", self.run.eval.rows)]
        self.pending = self.next_batch(trainer.done)

    # ---------------------------------------------------------------- batches

    def next_batch(self, step: int) -> tuple[Batch, Any]:
        """Read the batch of a step; also return the position in the data after it."""
        strategy = self.setup.strategy
        multiple = strategy.parts(strategy.train, "batch") * self.run.batch.accumulation
        rows = [next(self.rows) for _ in range(batch_rows(self.run, step, multiple))]
        return self.to_batch(rows, "train"), self.rows.get_state()

    def to_batch(self, rows: list[Row], split: str) -> Batch:
        """Put rows on the devices as one batch in microbatches."""
        stacked = {k: np.stack([row[k] for row in rows]) for k in ("tokens", "segments", "weights")}
        stacked = {k: v.reshape(-1, v.shape[-1]) for k, v in stacked.items()}  # a pair is two rows
        modules, accumulation = self.setup.cfg.num_nextn_predict_layers, self.run.batch.accumulation
        reference = self.reference_logprobs(rows, split)
        host = make_batch(**stacked, modules=modules, accumulation=accumulation, reference=reference)
        return to_devices(host, self.trainer.state.model)

    def reference_logprobs(self, rows: list[Row], split: str) -> np.ndarray | None:
        """Log-probs of the rows under a reference policy, for an algorithm that has one."""
        return None

    def one_pass(self, split: str, limit: int | None = None) -> list[list[Row]]:
        """Read up to `limit` rows of a split once, by the run's batch size; blank rows fill up the last."""
        size, rows = self.run.batch.size, open_rows(self.run, self.setup.tokenizer, split, repeat=False)
        if rows is None:
            return []
        some = list(itertools.islice(rows, limit))
        rows.close()
        if not some and split == "eval":
            raise ConfigError("there is nothing to evaluate on; raise data.holdout, or give data.eval more")
        some += [blank_row(self.run)] * (-len(some) % size)
        return [some[i : i + size] for i in range(0, len(some), size)]

    # ---------------------------------------------------------------- steps and evaluations

    def step(self, step: int) -> dict[str, float]:
        """Update by the pending batch, and read the next one while the devices work."""
        run, trainer = self.run, self.trainer
        before = time.perf_counter() if self._before is None else self._before
        inputs = StepInputs(
            np.float32(at_fraction(run.loss.mtp, step / run.steps)),
            np.float32(at_fraction(run.loss.bias_speed, step / run.steps)),
            self.teacher,
        )
        batch, position = self.pending
        aux = trainer.update(batch, inputs)
        if step + 1 < run.steps:
            self.pending = self.next_batch(step + 1)
        values = trainer.values(aux, batch, inputs)
        self._before = time.perf_counter()
        seconds, tokens = self._before - before, int(np.prod(batch.tokens_BT.shape))
        values |= self.rows.counts | {"tokens_per_second": tokens / seconds}
        if peak := peak_flops(trainer.state.model.mesh):
            values["mfu"] = train_flops(self.setup.cfg, tokens, run.data.length) / seconds / peak
        self._position, self.train_loss = position, values["loss"]
        return values

    def position(self) -> Any:
        return self._position

    def evaluate(self) -> Evaluated | None:
        """Average the metrics of the held-out batches; None without any."""
        if not self.held_out:
            return None
        model, total, weight = self.trainer.state.model, {}, 0.0
        for batch in self.held_out:
            with model.on_mesh():
                aux = evaluate_batch(self.loss, model, batch, StepInputs(teacher=self.teacher))
                part = self.weight(Totals.of(batch))
            for name, value in summarize(aux.metrics).items():
                if name in self.averaged:
                    total[name] = total.get(name, 0.0) + part * value
            weight += part
        values = {name: value / weight for name, value in total.items()}
        self.reached, self._before = {"eval_loss": values["loss"]}, None
        text = "  ".join(f"eval_{name} {value:.4f}" for name, value in values.items())
        return Evaluated(values, text, values["loss"], enough=values["loss"] < self.run.eval.enough)

    def weight(self, totals: Totals) -> float:
        """Number of tokens that a batch's means are over."""
        return float(totals.weight)

    def plot(self, out: Place) -> None:
        plot_loss(out)
