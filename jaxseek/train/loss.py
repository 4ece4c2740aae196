"""Shared parts of the losses: log-probs in chunks, multi-token prediction, balance, and the routers' biases.

Papers: DeepSeekMoE (arXiv:2401.06066), DeepSeek-V2 (2405.04434), DeepSeek-V3 (2412.19437).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxseek.config.model import ModelConfig
from jaxseek.config.run import Program
from jaxseek.model.context import Context
from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.moe import MoE, RouterBias, Routing
from jaxseek.model.weight import is_adapted
from jaxseek.ops.platform import platform
from jaxseek.sharding.parameters import parameters
from jaxseek.sharding.rules import Rules
from jaxseek.sharding.strategy import Strategy
from jaxseek.train.batch import Batch

# Elements of float32 logits on a device at a time: 128 MiB, and 512 MiB on TPU, where every chunk reads and
# writes the sum of the head's gradients, which is larger.
CHUNK_ELEMENTS, CHUNK_ELEMENTS_TPU = 2**25, 2**27


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Totals:
    """Sums over the whole batch that the loss of a microbatch is divided by."""

    weight: jax.Array  # of the next tokens
    rows: jax.Array  # that have any weight
    microbatches: jax.Array

    @classmethod
    def of(cls, batch: Batch) -> Totals:
        """Count a batch with its leading axis of microbatches."""
        weights_ABT = batch.weights_BJT[:, :, 0]
        rows = (weights_ABT.sum(axis=-1) > 0).sum().astype(jnp.float32)
        count = jnp.float32(weights_ABT.shape[0])
        return cls(jnp.maximum(weights_ABT.sum(), 1), jnp.maximum(rows, 1), count)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """Values that a step reads beside its batch. `mtp` None leaves multi-token prediction out."""

    mtp: Any = None  # weight of the multi-token loss
    bias_speed: Any = 0.0  # of the routers' biases
    teacher: Any = None  # the model that is distilled


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Aux:
    """Results of a loss beside its value: metrics to report, and the load that moves the routers' biases.

    Every metric is a share of the whole batch's, so that microbatches add up to it; of those that end in
    `_max` the batch has the largest.
    """

    metrics: dict[str, jax.Array]
    load_LE: jax.Array | None = None  # assignments per expert of every sparse layer

    def with_metrics(self, **more: jax.Array) -> Aux:
        return dataclasses.replace(self, metrics=self.metrics | more)

    def __add__(self, other: Aux) -> Aux:
        metrics = {
            name: (jnp.maximum if name.endswith("_max") else jnp.add)(value, other.metrics[name])
            for name, value in self.metrics.items()
        }
        return Aux(metrics, jax.tree.map(jnp.add, self.load_LE, other.load_LE))


def routing_aux(routing: tuple[Routing, ...]) -> Aux:
    """Collect the experts' loads and the dropped assignments of all sparse layers."""
    if not routing:
        return Aux({})
    dropped: Any = sum(r.dropped.sum() for r in routing)
    return Aux({"dropped": dropped}, jnp.concatenate([r.load_E for r in routing]))


@dataclass(frozen=True)
class Loss:
    """Base of the losses: `loss(model, microbatch, totals, inputs)` gives the loss and its Aux.

    A loss is a value that can be hashed: runs with equal settings share compiled programs.
    """

    program: Program
    dtype: Any

    def __call__(
        self, model: DeepSeek, batch: Any, totals: Totals, inputs: StepInputs
    ) -> tuple[jax.Array, Aux]:
        raise NotImplementedError

    def after_update(self, model: DeepSeek, aux: Aux, inputs: StepInputs) -> dict[str, jax.Array]:
        """Parameters that change after the optimizer's update, by path: the routers' biases.

        Those of overloaded experts fall by `inputs.bias_speed`, others rise: so V3 balances the load of the
        whole batch without a loss (DeepSeek-V3 paper, section 2.1.2).
        """
        moved, row, values = {}, 0, parameters(model)
        stacks = [(f"stacks.{i}", s) for i, s in enumerate(model.stacks)]
        stacks += [(f"mtp.{i}.stack", m.stack) for i, m in enumerate(model.mtp)]
        for path, stack in stacks:  # in the order of their routings
            if aux.load_LE is None or is_adapted(model) or not isinstance(stack.mlp, MoE):
                continue
            name = f"{path}.mlp.router_bias_E"
            load_LE = aux.load_LE[row : row + stack.depth].astype(jnp.float32)
            if load_LE.shape[0] and isinstance(values.get(name), RouterBias):
                error_LE = load_LE.mean(axis=1, keepdims=True) - load_LE
                moved[name] = values[name].get_value() + inputs.bias_speed * jnp.sign(error_LE)
            row += stack.depth
        return moved

    def context(self, model: DeepSeek, batch: Batch) -> Context:
        """Make the context that all layers share in a microbatch."""
        return model.context(
            model.strategy.train,
            batch.tokens_BT,
            batch.positions_BT,
            batch.segments_BT,
            dtype=self.dtype,
            remat=self.program.remat,
            fp8=self.program.fp8,
            prefix_ids_BT=batch.prefixes_BT,
        )

    def auxiliary(
        self, model: DeepSeek, out: Any, batch: Batch, totals: Totals, mtp: Any, ctx: Context
    ) -> tuple[jax.Array, Aux]:
        """Sum the weighted multi-token loss (unless `mtp` is None) and balance losses of a forward pass."""
        extra, metrics, routing, given = jnp.zeros(()), {}, out.routing, self.program.loss
        if model.mtp and mtp is not None and given.mtp != 0:
            logprobs, more = multi_token_logprobs(model, out.hidden_BTD, batch, ctx)
            routing = (*routing, *more)
            nll = sum(-(batch.weights_BJT[:, k + 1] * lp).sum() for k, lp in enumerate(logprobs))
            metrics["mtp_loss"] = nll / (len(logprobs) * totals.weight)
            extra += mtp * metrics["mtp_loss"]
        kinds = (given.sequence_balance, given.expert_balance)
        if routing and any((*kinds, given.device_balance, given.communication_balance)):
            valid_BT = batch.segments_BT > 0
            terms = [balance(model.cfg, r, valid_BT, given, ctx.rules) for r in routing]
            metrics["balance_loss"] = sum(terms) / totals.microbatches
            extra += metrics["balance_loss"]
        return extra, routing_aux(routing).with_metrics(**metrics)


def token_logprobs(
    model: DeepSeek, hidden_BTD: jax.Array, targets_BT: jax.Array, rules: Rules, temperature: float = 1.0
) -> jax.Array:
    """log p(target) at every position, float32 [B, T], without the logits of all positions in memory."""
    head = model.head(rules, hidden_BTD.dtype)

    def chunk(hidden_BTD, targets_BT):
        logits_BTV = model.logits(hidden_BTD, rules, head) / temperature
        return log_softmax_at(logits_BTV, targets_BT, rules)

    return by_chunks(chunk, (hidden_BTD, targets_BT), model.strategy, rules, model.cfg.vocab_size)


def log_softmax_at(logits_BTV: jax.Array, targets_BT: jax.Array, rules: Rules) -> jax.Array:
    """log softmax(logits) of one token per position, [B, T]; the vocabulary may be split."""
    V = logits_BTV.shape[-1]
    # by comparison: a gather along a split vocabulary would bring it together
    hit_BTV = targets_BT[..., None] == rules.shard(jnp.arange(V), "vocab")[None, None]
    chosen_BT = jnp.where(hit_BTV, logits_BTV, 0).sum(axis=-1)
    peak_BT1 = jax.lax.stop_gradient(logits_BTV.max(axis=-1, keepdims=True))
    exp_BTV = jnp.exp(logits_BTV - peak_BT1)
    if platform() == "cpu":  # fused into the sum, exponentials take ten times as long
        exp_BTV = jax.lax.optimization_barrier(exp_BTV)
    return chosen_BT - peak_BT1[..., 0] - jnp.log(exp_BTV.sum(axis=-1))


def divergence(
    teacher: DeepSeek,
    student: DeepSeek,
    teacher_BTD: jax.Array,
    student_BTD: jax.Array,
    rules: Rules,
    temperature: float,
) -> jax.Array:
    """KL(teacher || student) from both models' hidden states, float32 [B, T], times temperature squared.

    The factor keeps the gradient's size (Hinton et al., arXiv:1503.02531, section 2).
    """
    heads = teacher.head(rules, teacher_BTD.dtype), student.head(rules, student_BTD.dtype)

    def chunk(teacher_BTD, student_BTD):
        p, q = (
            jax.nn.log_softmax(m.logits(h, rules, w) / temperature, axis=-1)
            for m, h, w in ((teacher, teacher_BTD, heads[0]), (student, student_BTD, heads[1]))
        )
        return (jnp.exp(p) * (p - q)).sum(axis=-1)

    arrays = (teacher_BTD, student_BTD)
    return temperature**2 * by_chunks(chunk, arrays, student.strategy, rules, 2 * student.cfg.vocab_size)


def by_chunks(
    f: Callable[..., Any],
    arrays: tuple[jax.Array, ...],
    strategy: Strategy,
    rules: Rules,
    width: int,
    limit: int | None = None,
) -> Any:
    """Map f over arrays [B, T, ...] to one or more [B, T], in chunks that the backward pass recomputes.

    `f` makes `width` floats per position; a chunk has at most `limit` of them on a device (by default
    CHUNK_ELEMENTS), if T has such a divisor. A chunk takes every n-th position, so that a sharded length
    stays sharded in each.
    """
    if limit is None:
        limit = CHUNK_ELEMENTS_TPU if platform() == "tpu" else CHUNK_ELEMENTS
    B, T = arrays[0].shape[:2]
    length = T // strategy.parts(rules, "length")
    rows = -(-B // strategy.parts(rules, "batch"))
    columns = width // strategy.parts(rules, "vocab")
    fits = (n for n in range(1, length + 1) if length % n == 0 and rows * length // n * columns <= limit)
    n = next(fits, length)
    if n == 1:
        return f(*arrays)

    def split(a: jax.Array) -> jax.Array:
        inner = (None,) * (a.ndim - 2)
        spec = rules.spec("batch", "length", None, *inner)
        parts = jax.lax.reshape(a, (B, T // n, n, *a.shape[2:]), out_sharding=spec)
        return jnp.moveaxis(parts, 2, 0)

    def join(out_nBT: jax.Array) -> jax.Array:
        return jax.lax.reshape(
            jnp.moveaxis(out_nBT, 0, 2), (B, T), out_sharding=rules.spec("batch", "length")
        )

    return jax.tree.map(join, jax.lax.map(lambda args: jax.checkpoint(f)(*args), tuple(map(split, arrays))))


def multi_token_logprobs(
    model: DeepSeek, hidden_BTD: jax.Array, batch: Batch, ctx: Context
) -> tuple[list[jax.Array], list[Routing]]:
    """log p of each multi-token module's target, [B, T], and the modules' routing.

    Module k reads the hidden states of the one before it and the embedding of token t + 1 + k, and predicts
    token t + 2 + k (DeepSeek-V3 paper, eq. 21 to 24).
    """
    logprobs, routing = [], []
    for k, module in enumerate(model.mtp):
        hidden_BTD, _, more = module(hidden_BTD, model.embed(batch.ahead_BJT[:, k], ctx), None, ctx)
        logprobs.append(token_logprobs(model, hidden_BTD, batch.ahead_BJT[:, k + 1], ctx.rules))
        routing += [more] if more is not None else []
    return logprobs, routing


def balance(cfg: ModelConfig, routing: Routing, valid_BT: jax.Array, loss: Any, rules: Rules) -> jax.Array:
    """Sum the balance losses of a stack's layers, as means over the sequences.

    sequence (V3, eq. 17) and expert (V1 and V2) are both alpha sum_i f_i P_i over a sequence, where P is the
    mean normalised affinity; device (V2, eq. 26) groups consecutive experts; communication (V2, eq. 29)
    counts the tokens sent to each group. `loss` is a LossConfig.
    """
    E, K, G = cfg.n_routed_experts, cfg.num_experts_per_tok, loss.device_groups
    M = cfg.topk_group if cfg.topk_method != "greedy" else G
    valid_BT = valid_BT.astype(jnp.float32)
    tokens_B = jnp.maximum(rules.shard(valid_BT.sum(axis=1), "batch"), 1)

    def layer(ids_BTK, P_BE):
        chosen_BTE = jax.nn.one_hot(ids_BTK, E, dtype=jnp.float32).sum(axis=2)
        spec = rules.spec("batch", None)
        f_BE = jnp.einsum("BTE,BT->BE", chosen_BTE, valid_BT, out_sharding=spec) / tokens_B[:, None]
        total_B = (loss.sequence_balance + loss.expert_balance) * (E / K * f_BE * P_BE).sum(axis=1)
        if loss.device_balance or loss.communication_balance:
            P_BG = P_BE.reshape(-1, G, E // G).sum(axis=2)
            f_BG = E / K * f_BE.reshape(-1, G, E // G).mean(axis=2)
            sent_BTG = (chosen_BTE.reshape(*chosen_BTE.shape[:2], G, -1) > 0).any(axis=3)
            sent_BG = jnp.einsum("BTG,BT->BG", sent_BTG.astype(jnp.float32), valid_BT, out_sharding=spec)
            s_BG = G / M * sent_BG / tokens_B[:, None]
            total_B += loss.device_balance * (f_BG * P_BG).sum(axis=1)
            total_B += loss.communication_balance * (s_BG * P_BG).sum(axis=1)
        return total_B.mean()

    return jax.vmap(layer)(routing.ids_BTK, routing.affinity_BE).sum()
