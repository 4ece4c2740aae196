"""The policy's loss on a microbatch of sampled answers, and their log-probs under any policy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxseek.model.deepseek import DeepSeek
from jaxseek.rl.grpo import policy_loss
from jaxseek.rl.packing import PolicyBatch
from jaxseek.sharding.rules import Rules
from jaxseek.train.loss import Loss, by_chunks, log_softmax_at, routing_aux


@dataclass(frozen=True)
class PolicyLoss(Loss):
    """The GRPO loss as `program.grpo` has it, of the policy at `rollout.temperature`.

    Multi-token modules are not trained, and the routers' biases stay. Metrics are sums, and maxima where they
    end in `_max`; the metrics `tokens` and `routed` are what to divide by.
    """

    segments: int = 1

    def __call__(self, model, batch, totals, inputs):
        out, logprob_BT, entropy_BT = self.logprobs(model, batch)
        old_BT = batch.sampled_BT if batch.old_BT is None else batch.old_BT
        loss_BT, sums = policy_loss(
            self.program.grpo,
            logprob_BT,
            old_BT,
            batch.advantage_BT,
            batch.mask_BT,
            batch.segments_BT,
            self.segments,
            batch.reference_BT,
            batch.sampled_BT,
            batch.drawn_BT,
        )
        loss = (batch.weights_BJT[:, 0] * loss_BT).sum()
        sums["entropy"] = (batch.mask_BT * jax.lax.stop_gradient(entropy_BT)).sum()
        if batch.experts_BTLK is not None:
            sums |= _routed_elsewhere(out.routing, batch.experts_BTLK)
        return loss, routing_aux(out.routing).with_metrics(**sums, loss=loss)

    def after_update(self, model, aux, inputs):
        return {}

    def logprobs(self, model: DeepSeek, batch: Any) -> tuple[Any, jax.Array, jax.Array]:
        """Run the forward pass; also log p of every next token and the policy's entropy there, [B, T]."""
        ctx = self.context(model, batch)
        experts_BTLK = batch.experts_BTLK if self.program.grpo.routing_replay else None
        replay_LBTK = None if experts_BTLK is None else jnp.moveaxis(experts_BTLK, 2, 0)
        out = model.forward(batch.tokens_BT, ctx, replay_LBTK=replay_LBTK)
        targets_BT, temperature = batch.ahead_BJT[:, 0], self.program.temperature
        return out, *logprobs_and_entropy(model, out.hidden_BTD, targets_BT, ctx.rules, temperature)


def logprobs_and_entropy(
    model: DeepSeek, hidden_BTD: jax.Array, targets_BT: jax.Array, rules: Rules, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """log p(target) and the entropy of p at every position, float32 [B, T], in chunks of positions.

    No gradient flows through the entropy.
    """
    head = model.head(rules, hidden_BTD.dtype)

    def chunk(hidden_BTD, targets_BT):
        logits_BTV = model.logits(hidden_BTD, rules, head) / temperature
        logprob_BT = log_softmax_at(logits_BTV, targets_BT, rules)
        fixed_BTV = jax.lax.stop_gradient(logits_BTV)
        log_BTV = fixed_BTV - jax.nn.logsumexp(fixed_BTV, axis=-1, keepdims=True)
        return logprob_BT, -(jnp.exp(log_BTV) * log_BTV).sum(axis=-1)

    return by_chunks(chunk, (hidden_BTD, targets_BT), model.strategy, rules, model.cfg.vocab_size)


def _routed_elsewhere(routing: tuple[Any, ...], experts_BTLK: jax.Array) -> dict[str, jax.Array]:
    """Count the tokens for which trainer and rollout chose different experts in any layer."""
    own_LBTK = jnp.concatenate([r.ids_BTK if r.own_BTK is None else r.own_BTK for r in routing])
    own_LBTK = jnp.sort(jax.lax.stop_gradient(own_LBTK), axis=-1)
    theirs_LBTK = jnp.sort(jnp.moveaxis(experts_BTLK, 2, 0), axis=-1)
    known_BT = theirs_LBTK[0, :, :, 0] >= 0
    differ_BT = (own_LBTK != theirs_LBTK).any(axis=(0, 3)) & known_BT
    return {"routed": known_BT.sum().astype(jnp.float32), "rerouted": differ_BT.sum().astype(jnp.float32)}


@functools.lru_cache(maxsize=8)
def make_logprobs(loss: PolicyLoss) -> Callable[[DeepSeek, PolicyBatch], jax.Array]:
    """Compile a pass that gives log p of every next token of a batch under any policy, [A, B, T].

    Microbatches that are not in use have 0.
    """

    @jax.jit
    def logprobs(model: DeepSeek, batch: PolicyBatch) -> jax.Array:
        count, batch = batch.count, dataclasses.replace(batch, count=None)

        def part(i: jax.Array, out_ABT: jax.Array) -> jax.Array:
            one = jax.tree.map(lambda a: a[i], batch)
            return jax.lax.dynamic_update_index_in_dim(out_ABT, loss.logprobs(model, one)[1], i, 0)

        return jax.lax.fori_loop(0, count, part, jnp.zeros_like(batch.mask_BT))

    return logprobs
