"""Direct preference optimisation (Rafailov et al., arXiv:2305.18290) on pairs of answers.

The reference policy is the model that the run starts from. Its log-probs of every pair are computed once and
kept in OUT/reference.npz.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseek.checkpoint.directory import CheckpointError
from jaxseek.engine.engine import fetch
from jaxseek.machine.hosts import meet, most
from jaxseek.model.deepseek import DeepSeek
from jaxseek.sharding.rules import Rules
from jaxseek.storage.place import write_bytes
from jaxseek.train.batch import Batch, make_batch, to_devices
from jaxseek.train.loss import Loss, Totals, token_logprobs
from jaxseek.train.pretrain import Pretrain, Row
from jaxseek.train.start import compute_dtype, open_model
from jaxseek.train.trainer import Trainer

SPLITS = ("train", "eval")


@dataclass(frozen=True)
class PreferenceLoss(Loss):
    """-log sigmoid(beta (log ratio of chosen - log ratio of rejected)), the paper's eq. 7."""

    def __call__(self, model, batch, totals, inputs):
        ctx, given = self.context(model, batch), self.program.dpo
        out = model.forward(batch.tokens_BT, ctx)
        logprob_BT = token_logprobs(model, out.hidden_BTD, batch.ahead_BJT[:, 0], ctx.rules)
        ratio_B = row_logprobs(logprob_BT, batch, ctx.rules) - batch.reference_B
        counts_B = ctx.rules.shard((batch.weights_BJT[:, 0].sum(axis=1) > 0).astype(jnp.float32), "batch")
        ratio_P2, counts_P2 = (
            jax.lax.reshape(a, (a.shape[0] // 2, 2), out_sharding=ctx.rules.spec("batch", None))
            for a in (ratio_B, counts_B)
        )
        margin_P = given.beta * (ratio_P2[:, 0] - ratio_P2[:, 1])
        loss_P = -(1 - given.label_smoothing) * jax.nn.log_sigmoid(margin_P)
        loss_P -= given.label_smoothing * jax.nn.log_sigmoid(-margin_P)
        extra, aux = self.auxiliary(model, out, batch, totals, None, ctx)
        means = {
            "loss": loss_P,
            "margin": margin_P,
            "accuracy": (margin_P > 0).astype(jnp.float32),
            "reward_chosen": given.beta * ratio_P2[:, 0],
            "reward_rejected": given.beta * ratio_P2[:, 1],
        }
        pairs = totals.rows / 2
        means = {name: (counts_P2[:, 0] * value).sum() / pairs for name, value in means.items()}
        return means["loss"] + extra, aux.with_metrics(**means)


def row_logprobs(logprob_BT: jax.Array, batch: Batch, rules: Rules) -> jax.Array:
    """Sum the log-probs of the tokens that count in each row, [B]."""
    return rules.shard((batch.weights_BJT[:, 0] * logprob_BT).sum(axis=1), "batch")


@functools.partial(jax.jit, static_argnums=0)
def logprobs_of_rows(loss: Loss, model: DeepSeek, batch: Batch) -> jax.Array:
    """log p of each row of a batch in one microbatch, [B]."""
    batch = jax.tree.map(lambda a: a[0], batch)
    ctx = loss.context(model, batch)
    hidden_BTD = model.forward(batch.tokens_BT, ctx).hidden_BTD
    logprob_BT = token_logprobs(model, hidden_BTD, batch.ahead_BJT[:, 0], ctx.rules)
    return row_logprobs(logprob_BT, batch, ctx.rules)


class Dpo(Pretrain):
    """Steps on pairs, rows 2i (chosen) and 2i + 1 (rejected) of a batch."""

    averaged = ("loss", "margin", "accuracy", "reward_chosen", "reward_rejected")

    def make_loss(self) -> Loss:
        return PreferenceLoss(self.run.program, compute_dtype(self.run))

    def begin(self, trainer: Trainer, position: Any) -> None:
        self.reference = self._reference(trainer)
        super().begin(trainer, position)

    def reference_logprobs(self, rows: list[Row], split: str) -> np.ndarray:
        return np.concatenate([self.reference[split][int(row["index"])] for row in rows])

    def weight(self, totals: Totals) -> float:
        """Number of rows, to which that of pairs is proportional."""
        return float(totals.rows)

    def _reference(self, trainer: Trainer) -> dict[str, dict[int, np.ndarray]]:
        """Read the reference's log-probs by split and index of a pair; the first time compute them."""
        setup, path = self.setup, trainer.out / "reference.npz"
        if most(not path.is_file()):
            first = trainer.done == 0
            model = trainer.state.model if first else open_model(setup.run, setup.cfg, setup.strategy)
            arrays: Any = {}
            for split in SPLITS:
                arrays |= {f"{split}_{name}": a for name, a in self._computed(model, split).items()}
            if jax.process_index() == 0:
                file = io.BytesIO()
                np.savez(file, **arrays)
                write_bytes(path, file.getvalue())
            meet("reference is kept")
        blank = {-1: np.zeros(2, np.float32)}  # of a row that fills up a batch
        try:
            with np.load(io.BytesIO(path.read_bytes())) as kept:  # checks the CRC of every array
                return {s: dict(zip(kept[f"{s}_index"].tolist(), kept[f"{s}_pair"])) | blank for s in SPLITS}
        except Exception as e:  # numpy and zipfile raise many kinds
            raise CheckpointError(
                f"{path}: is damaged ({type(e).__name__}: {str(e)[:200]}); remove it, it is computed again"
            ) from e

    def _computed(self, model: DeepSeek, split: str) -> dict[str, np.ndarray]:
        """Compute the log-probs (chosen, rejected) of the pairs of a split, with the pairs' indices."""
        index, pairs = [], [np.zeros((0, 2), np.float32)]
        for rows in self.one_pass(split):
            arrays = (np.concatenate([row[k] for row in rows]) for k in ("tokens", "segments", "weights"))
            batch = to_devices(make_batch(*arrays, modules=0), model)
            with model.on_mesh():
                pairs.append(fetch(logprobs_of_rows(self.loss, model, batch)).reshape(-1, 2))
            index += [int(row["index"]) for row in rows]
        return {"index": np.array(index, np.int64), "pair": np.concatenate(pairs)}
