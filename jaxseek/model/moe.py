"""DeepSeekMoE: router and experts (DeepSeekMoE paper, section 3; V2 section 2.2; V3 section 2.1.2)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxseek.config.model import ModelConfig
from jaxseek.model.context import Context
from jaxseek.model.dispatch import dispatch
from jaxseek.model.mlp import MLP
from jaxseek.model.replicas import Slots
from jaxseek.ops.experts import Experts
from jaxseek.sharding.parameters import Init
from jaxseek.sharding.rules import Rules

EXPERTS = ("gate_EDF", "up_EDF", "down_EFD")


class RouterBias(nnx.Variable):
    """V3's `e_score_correction_bias`: moved by the load of the experts, not by a gradient."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Decisions of the router.

    Chosen experts per token; mean affinity of each expert over the tokens of a sequence (they sum to one);
    assignments per expert; assignments dropped; and, where experts were replayed, the router's own choice.
    """

    ids_BTK: jax.Array
    affinity_BE: jax.Array
    load_E: jax.Array
    dropped: jax.Array
    own_BTK: jax.Array | None = None


class MoE(nnx.Module):
    """Routed experts of which each token uses K, plus shared experts that every token uses."""

    def __init__(self, cfg: ModelConfig, init: Init):
        self.cfg = cfg
        D, E, F = cfg.hidden_size, cfg.n_routed_experts, cfg.moe_intermediate_size
        self.router_DE = init((D, E), ("embed", None))
        biased = cfg.has_router_bias
        self.router_bias_E = init((E,), (None,), 0.0, jnp.float32, RouterBias) if biased else None
        self.gate_EDF = init((E, D, F), ("expert", "embed", "expert_mlp"))
        self.up_EDF = init((E, D, F), ("expert", "embed", "expert_mlp"))
        self.down_EFD = init((E, F, D), ("expert", "expert_mlp", "embed"))
        self.slots: Slots | None = nnx.data(None)  # see model/replicas.py
        self.shared = MLP(D, F * cfg.n_shared_experts, cfg.mlp_bias, init) if cfg.n_shared_experts else None

    def __call__(
        self,
        x_BTD: jax.Array,
        ctx: Context,
        replay_BTK: jax.Array | None = None,
        experts: Experts | None = None,
    ) -> tuple[jax.Array, Routing]:
        """Returns ([B, T, D], Routing). Padding (not valid) reaches no expert.

        `replay` are experts to use in place of the router's choice, weighed by its gates; -1 leaves the
        choice to the router. `experts` are the matrices to use, where they lie elsewhere: a decode step reads
        them in the stack of layers.
        """
        rules, valid_BT = ctx.rules, ctx.valid_BT
        with jax.named_scope("router"):
            ids_BTK, gates_BTK, logits_BTE, own_BTK = self.route(x_BTD, rules, replay_BTK)
            affinity_BE = mean_affinity(self.cfg, logits_BTE, valid_BT, rules)
        with jax.named_scope("experts"):
            if experts is None:
                experts = Experts(*(getattr(self, name).operand(rules, x_BTD.dtype) for name in EXPERTS))
            experts = experts.rounded() if ctx.fp8 else experts
            replicas = None if self.slots is None else (self.cfg.n_routed_experts, self.slots[...])
            y_BTD, load_E, dropped = dispatch(
                x_BTD, ids_BTK, gates_BTK, valid_BT, experts, rules, ctx.fp8, replicas
            )
        if self.shared is not None:
            with jax.named_scope("shared_experts"):
                y_BTD += self.shared(x_BTD, ctx)
        return y_BTD, Routing(ids_BTK, affinity_BE, load_E, dropped, own_BTK)

    def route(
        self, x_BTD: jax.Array, rules: Rules, replay_BTK: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Experts and their gates, [B, T, K] int32 and float32, the router's logits [B, T, E], and its own
        choice [B, T, K] where others are replayed.

        float32 throughout: the bias is around 5 in released checkpoints, where bfloat16 steps by 1/32.
        """
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE",
            x_BTD.astype(jnp.float32),
            rules.use(self.router_DE, jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=rules.spec("batch", "length", None),
        )
        bias_E = None if self.router_bias_E is None else self.router_bias_E[...]
        ids_BTK, gates_BTK = choose_experts(self.cfg, logits_BTE, bias_E)
        if replay_BTK is None:
            return ids_BTK, gates_BTK, logits_BTE, None
        used_BTK = jnp.where(replay_BTK >= 0, replay_BTK, ids_BTK)
        return used_BTK, gates_of(self.cfg, affinities(self.cfg, logits_BTE), used_BTK), logits_BTE, ids_BTK


def affinities(cfg: ModelConfig, logits: jax.Array) -> jax.Array:
    """The router's scores of logits [..., E]: sigmoid (V3) or softmax (V1, V2)."""
    return jax.nn.sigmoid(logits) if cfg.scoring_func == "sigmoid" else jax.nn.softmax(logits, axis=-1)


def mean_affinity(cfg: ModelConfig, logits_BTE: jax.Array, valid_BT: jax.Array, rules: Rules) -> jax.Array:
    """Normalised affinities as the mean over each sequence's tokens, [B, E] (V3 paper, eq. 18 and 19)."""
    scores_BTE = affinities(cfg, logits_BTE)
    scores_BTE /= scores_BTE.sum(axis=-1, keepdims=True)
    valid_BT = valid_BT.astype(jnp.float32)
    sum_BE = jnp.einsum("BTE,BT->BE", scores_BTE, valid_BT, out_sharding=rules.spec("batch", None))
    return sum_BE / jnp.maximum(rules.shard(valid_BT.sum(axis=1), "batch"), 1)[:, None]


def choose_experts(
    cfg: ModelConfig, logits: jax.Array, bias_E: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The family's router on logits [..., E]: expert ids and gates, each [..., K].

    V1 greedy, V2 group_limited_greedy (a group scores its best expert), V3 noaux_tc (a group scores its two
    best biased experts; the bias selects but does not weigh). Unkept groups are masked with -inf: a kept
    score made negative by its bias must still beat them. Ties go to the lower id.
    """
    scores = affinities(cfg, logits)
    choice = scores if bias_E is None else scores + jnp.broadcast_to(bias_E, scores.shape)
    if cfg.topk_method != "greedy" and cfg.n_group > 1:
        choice = _keep_best_groups(cfg, choice)
    ids = jax.lax.top_k(choice, cfg.num_experts_per_tok)[1]
    return ids, gates_of(cfg, scores, ids)


def gates_of(cfg: ModelConfig, scores: jax.Array, ids: jax.Array) -> jax.Array:
    """Gates [..., K] of the experts `ids`, from the router's scores [..., E]."""
    # take_along_axis by comparison: a gather would need the layout of its result spelled out
    chosen = jax.nn.one_hot(ids, scores.shape[-1], dtype=bool)
    gates = jnp.where(chosen, scores[..., None, :], 0).sum(axis=-1)
    if cfg.norm_topk_prob:
        gates = gates / (gates.sum(axis=-1, keepdims=True) + 1e-20)
    return gates * cfg.routed_scaling_factor


def _keep_best_groups(cfg: ModelConfig, choice: jax.Array) -> jax.Array:
    groups = choice.reshape(*choice.shape[:-1], cfg.n_group, -1)
    best = jax.lax.top_k(groups, 2)[0].sum(-1) if cfg.topk_method == "noaux_tc" else groups.max(-1)
    kept = jax.lax.top_k(best, cfg.topk_group)[1]
    keep = jax.nn.one_hot(kept, cfg.n_group, dtype=bool).any(axis=-2)
    return jnp.where(keep[..., None], groups, -jnp.inf).reshape(choice.shape)
