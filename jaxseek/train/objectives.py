"""What a microbatch is trained for: the loss and its metrics, by the run's objective.

Every metric is a share of the whole batch's, so that microbatches add up to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxseek.config.run import Recipe
from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.moe import Routing
from jaxseek.train.batch import Batch
from jaxseek.train.loss import balance, divergence, multi_token_logprobs, token_logprobs

Metrics = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Whole:
    """Of the whole batch: the weights of its next tokens summed, rows that have any, and its microbatches."""

    weight: jax.Array
    rows: jax.Array
    microbatches: jax.Array

    @classmethod
    def of(cls, batch: Batch) -> Whole:
        """Of a batch with its leading axis of microbatches."""
        weights_ABT = batch.weights_BJT[:, :, 0]
        rows = (weights_ABT.sum(axis=-1) > 0).sum().astype(jnp.float32)
        count = jnp.float32(weights_ABT.shape[0])
        return cls(jnp.maximum(weights_ABT.sum(), 1), jnp.maximum(rows, 1), count)


@dataclass(frozen=True)
class Objective:
    """`loss(model, teacher, batch, whole, mtp weight)` of one microbatch: (loss, metrics)."""

    recipe: Recipe
    dtype: Any

    def __call__(
        self, model: DeepSeek, teacher: DeepSeek | None, batch: Batch, whole: Whole, mtp: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        loss = {"dpo": self._dpo, "distill": self._distill}.get(self.recipe.objective, self._language)
        return loss(model, teacher, batch, whole, mtp)

    def context(self, model: DeepSeek, batch: Batch):
        """What the layers share in this microbatch."""
        return model.context(
            model.strategy.train,
            batch.tokens_BT,
            batch.positions_BT,
            batch.segments_BT,
            dtype=self.dtype,
            remat=self.recipe.remat,
            fp8=self.recipe.fp8,
            prefix_ids_BT=batch.prefixes_BT,
        )

    def _language(self, model, teacher, batch, whole, mtp):
        """Next-token cross-entropy per token, multi-token prediction, and balance."""
        ctx = self.context(model, batch)
        out = model.forward(batch.tokens_BT, ctx)
        logprob_BT = token_logprobs(model, out.hidden_BTD, batch.ahead_BJT[:, 0], ctx.rules)
        nll = -(batch.weights_BJT[:, 0] * logprob_BT).sum() / whole.weight
        extra, metrics = self._routers(model, out, batch, whole, mtp, ctx)
        return nll + extra, metrics | {"loss": nll}

    def _distill(self, model, teacher, batch, whole, mtp):
        """KL from the teacher's distribution at every position that counts, mixed with the usual loss."""
        ctx, weight = self.context(model, batch), self.recipe.distill.weight
        out = model.forward(batch.tokens_BT, ctx)
        taught = jax.lax.stop_gradient(teacher.forward(batch.tokens_BT, self.context(teacher, batch)))
        kl_BT = divergence(
            jax.lax.stop_gradient(teacher),
            model,
            taught.hidden_BTD,
            out.hidden_BTD,
            ctx.rules,
            self.recipe.distill.temperature,
        )
        kl = (batch.weights_BJT[:, 0] * kl_BT).sum() / whole.weight
        logprob_BT = token_logprobs(model, out.hidden_BTD, batch.ahead_BJT[:, 0], ctx.rules)
        nll = -(batch.weights_BJT[:, 0] * logprob_BT).sum() / whole.weight
        extra, metrics = self._routers(model, out, batch, whole, mtp, ctx)
        loss = weight * kl + extra
        if weight < 1:  # else the head's backward pass would be for a gradient of zeros
            loss += (1 - weight) * nll
        return loss, metrics | {"loss": nll, "kl": kl}

    def _dpo(self, model, teacher, batch, whole, mtp):
        """-log sigmoid(beta (log ratio of chosen - log ratio of rejected)) (DPO paper, eq. 7)."""
        ctx, run = self.context(model, batch), self.recipe.dpo
        out = model.forward(batch.tokens_BT, ctx)
        logprob_BT = token_logprobs(model, out.hidden_BTD, batch.ahead_BJT[:, 0], ctx.rules)
        ratio_B = row_logprobs(logprob_BT, batch, ctx.rules) - batch.reference_B
        counts_B = ctx.rules.shard((batch.weights_BJT[:, 0].sum(axis=1) > 0).astype(jnp.float32), "batch")
        ratio_P2, counts_P2 = (
            jax.lax.reshape(a, (a.shape[0] // 2, 2), out_sharding=ctx.rules.spec("batch", None))
            for a in (ratio_B, counts_B)
        )
        margin_P = run.beta * (ratio_P2[:, 0] - ratio_P2[:, 1])
        loss_P = -(1 - run.label_smoothing) * jax.nn.log_sigmoid(margin_P)
        loss_P -= run.label_smoothing * jax.nn.log_sigmoid(-margin_P)
        extra, metrics = self._routers(model, out, batch, whole, None, ctx)
        means = {
            "loss": loss_P,
            "margin": margin_P,
            "accuracy": (margin_P > 0).astype(jnp.float32),
            "reward_chosen": run.beta * ratio_P2[:, 0],
            "reward_rejected": run.beta * ratio_P2[:, 1],
        }
        pairs = whole.rows / 2
        means = {name: (counts_P2[:, 0] * value).sum() / pairs for name, value in means.items()}
        return means["loss"] + extra, metrics | means

    def _routers(self, model, out, batch, whole, mtp, ctx):
        """Multi-token loss (where a weight is given) and balance losses, and what the routers did."""
        extra, metrics, routing = jnp.zeros(()), {}, out.routing
        if model.mtp and mtp is not None and self.recipe.loss.mtp != 0:
            logprobs, routed = multi_token_logprobs(model, out.hidden_BTD, batch, ctx)
            routing = (*routing, *routed)
            nll = sum(-(batch.weights_BJT[:, k + 1] * lp).sum() for k, lp in enumerate(logprobs))
            metrics["mtp_loss"] = nll / (len(logprobs) * whole.weight)
            extra += mtp * metrics["mtp_loss"]
        loss = self.recipe.loss
        if routing and (
            loss.sequence_balance or loss.expert_balance or loss.device_balance or loss.communication_balance
        ):
            valid_BT = batch.segments_BT > 0
            terms = [balance(model.cfg, r, valid_BT, loss, ctx.rules) for r in routing]
            metrics["balance_loss"] = sum(terms) / whole.microbatches
            extra += metrics["balance_loss"]
        return extra, metrics | routing_metrics(routing)


def routing_metrics(routing: tuple[Routing, ...]) -> Metrics:
    """Assignments per expert of every sparse layer [L, E], and how many were dropped."""
    if not routing:
        return {}
    return {
        "load": jnp.concatenate([r.load_E for r in routing]),
        "dropped": sum(r.dropped.sum() for r in routing),
    }


def row_logprobs(logprob_BT: jax.Array, batch: Batch, rules: Any) -> jax.Array:
    """log p of what counts in each row: [B]."""
    return rules.shard((batch.weights_BJT[:, 0] * logprob_BT).sum(axis=1), "batch")


@functools.lru_cache(maxsize=8)
def logprobs_of_rows(objective: Objective) -> Callable[[DeepSeek, Batch], jax.Array]:
    """A compiled pass that gives log p of each row, for the reference policy."""

    @jax.jit
    def run(model: DeepSeek, batch: Batch) -> jax.Array:
        batch = jax.tree.map(lambda a: a[0], batch)
        ctx = objective.context(model, batch)
        hidden_BTD = model.forward(batch.tokens_BT, ctx).hidden_BTD
        logprob_BT = token_logprobs(model, hidden_BTD, batch.ahead_BJT[:, 0], ctx.rules)
        return row_logprobs(logprob_BT, batch, ctx.rules)

    return run
