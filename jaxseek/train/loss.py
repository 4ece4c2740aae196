"""Losses as pure functions: next-token cross-entropy in chunks, multi-token, balance, distillation.

Papers: DeepSeekMoE (arXiv:2401.06066), DeepSeek-V2 (2405.04434),
DeepSeek-V3 (2412.19437).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxseek.config.model import ModelConfig
from jaxseek.model.context import Context
from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.moe import Routing
from jaxseek.ops.platform import platform
from jaxseek.sharding.rules import Rules
from jaxseek.sharding.strategy import Strategy
from jaxseek.train.batch import Batch

# Of float32 logits on a device at a time: 128 MiB, and on TPU 512 MiB, since the sum of the head's gradients,
# which is larger, is read and written for every chunk.
CHUNK_ELEMENTS, CHUNK_ELEMENTS_TPU = 2**25, 2**27


def token_logprobs(
    model: DeepSeek, hidden_BTD: jax.Array, targets_BT: jax.Array, rules: Rules, temperature: float = 1.0
) -> jax.Array:
    """log p(target) at every position, float32 [B, T]; the logits of all positions never stand at once."""
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
    """KL(teacher || student) at every position, float32 [B, T], of both models' hidden states.

    Times temperature squared, which keeps the gradient's size (Hinton et al., arXiv:1503.02531, section 2).
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
    """f over arrays [B, T, ...] to [B, T] (one or several), in chunks that the backward pass computes again.

    `f` makes `width` floats per position; a chunk has at most `limit` of them on a device (by default
    CHUNK_ELEMENTS), as far as T divides. A chunk takes every n-th position, so that a split length stays
    split in each.
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
    """Of each multi-token module: log p of the token after the next, [B, T], and its routing.

    Module k reads the hidden states of the one before it and the embedding of token t + 1 + k
    (DeepSeek-V3 paper, eq. 21 to 24).
    """
    logprobs, routing = [], []
    for k, module in enumerate(model.mtp):
        hidden_BTD, _, routed = module(hidden_BTD, model.embed(batch.ahead_BJT[:, k], ctx), None, ctx)
        logprobs.append(token_logprobs(model, hidden_BTD, batch.ahead_BJT[:, k + 1], ctx.rules))
        routing += [routed] if routed is not None else []
    return logprobs, routing


def balance(cfg: ModelConfig, routing: Routing, valid_BT: jax.Array, loss: Any, rules: Rules) -> jax.Array:
    """The balance losses of a stack's layers, summed over layers, as the mean over the sequences.

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
