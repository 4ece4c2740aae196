"""DeepSeek: one decoder for the whole family. `forward` is the model; the rest prepares its arguments.

Consecutive layers of one kind form a stack with a leading layer axis, which is scanned (a dense and a sparse
stack in the released models).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding

from jaxseek.config.model import ModelConfig
from jaxseek.model.cache import Cache
from jaxseek.model.context import Context, make_context
from jaxseek.model.layer import Layer, run_stack
from jaxseek.model.moe import MoE, Routing
from jaxseek.model.mtp import MTP
from jaxseek.model.norm import RMSNorm
from jaxseek.model.weight import Weight, quantization
from jaxseek.sharding.parameters import Init, fill, parameters, random_values
from jaxseek.sharding.rules import Rules
from jaxseek.sharding.strategy import Strategy

Caches = tuple[Cache, ...]  # one per stack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """Result of a forward pass: final-norm hidden states, the caches, the routing of each sparse stack."""

    hidden_BTD: jax.Array
    caches: Caches | None
    routing: tuple[Routing, ...]


def layer_runs(cfg: ModelConfig) -> list[tuple[bool, int]]:
    """The stacks in order, as (mixture of experts, number of layers)."""
    kinds = (cfg.is_moe_layer(l) for l in range(cfg.num_hidden_layers))
    return [(sparse, len(list(run))) for sparse, run in itertools.groupby(kinds)]


class DeepSeek(nnx.Module):
    """Embedding, stacks of layers, final norm, output head, and the multi-token module where configured."""

    def __init__(self, cfg: ModelConfig, strategy: Strategy, dtype: Any):
        self.cfg, self.strategy = cfg, strategy
        D, V, init = cfg.hidden_size, cfg.vocab_size, Init(strategy, dtype, Weight)

        def stack(sparse: bool, count: int) -> Layer:
            return jax.vmap(lambda _: Layer(cfg, sparse, init))(jnp.arange(count))

        self.embed_VD = init((V, D), ("vocab", "embed"))
        self.stacks = nnx.List([stack(sparse, count) for sparse, count in layer_runs(cfg)])
        self.norm = RMSNorm(D, cfg.rms_norm_eps, init)
        self.head_DV = None if cfg.tie_word_embeddings else init((D, V), ("embed", "vocab"))
        self.mtp = nnx.List([MTP(cfg, depth, init) for depth in range(cfg.num_nextn_predict_layers)])

    # ---------------------------------------------------------------- the model

    def forward(
        self,
        tokens_BT: jax.Array,
        ctx: Context,
        caches: Caches | None = None,
        replay_LBTK: jax.Array | None = None,
    ) -> Output:
        """Hidden states after the final norm; `logits` turns them into logits.

        `replay` are experts to use in the sparse layers in place of the routers' choice (-1: theirs).
        """
        with jax.named_scope("embed"):
            x_BTD = self.embed(tokens_BT, ctx)
        new_caches, routing, replayed = [], [], 0
        for i, stack in enumerate(self.stacks):
            chosen = None
            if replay_LBTK is not None and isinstance(stack.mlp, MoE):
                chosen = replay_LBTK[replayed : (replayed := replayed + stack.depth)]
            x_BTD, cache, routed = run_stack(stack, x_BTD, caches[i] if caches else None, ctx, chosen)
            new_caches.append(cache)
            routing += [routed] if routed is not None else []
        return Output(self.norm(x_BTD), tuple(new_caches) if caches else None, tuple(routing))

    def embed(self, tokens_BT: jax.Array, ctx: Context) -> jax.Array:
        """Embeddings of tokens: [B, T, D]."""
        table_VD = ctx.rules.use(self.embed_VD, ctx.dtype)
        return table_VD.at[tokens_BT].get(out_sharding=ctx.rules.spec("batch", "length", None))

    def head(self, rules: Rules, dtype: Any) -> jax.Array:
        """The head as a phase uses it: [D, V], or [V, D] where it is the embedding."""
        return rules.use(self.embed_VD if self.head_DV is None else self.head_DV, dtype)

    def logits(self, hidden_BTD: jax.Array, rules: Rules, head: jax.Array | None = None) -> jax.Array:
        """float32 logits [B, T, V] of final-norm hidden states, main or multi-token.

        `head` is what `head` returns, where several calls share it.
        """
        with jax.named_scope("head"):
            return jnp.einsum(
                "BTD,VD->BTV" if self.head_DV is None else "BTD,DV->BTV",
                hidden_BTD,
                self.head(rules, hidden_BTD.dtype) if head is None else head,
                preferred_element_type=jnp.float32,
                out_sharding=rules.spec("batch", "length", "vocab"),
            )

    def context(
        self,
        rules: Rules,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        caches: Caches | None = None,
        fresh: bool = True,
        dtype: Any = None,
        remat: str = "none",
        fp8: bool = False,
        prefix_ids_BT: jax.Array | None = None,
    ) -> Context:
        """The context that the layers share. Segment 0 is padding; positions count from 0 in each segment.

        `prefix_ids` name, for every token, a segment of its row that it sees besides its own: a prefix that
        several segments continue, each from the position after it (its own segment's id where there is none).
        Without `fresh`, queries attend to the caches, whose slots are positions, and need `positions_BT`.
        `dtype` is that of the activations and of the weights as they are used; by default, the weights'.
        `remat` and `fp8` are for training, see Context. Raises ValueError for `fp8` on quantised weights.
        """
        if fp8 and quantization(self):
            raise ValueError("fp8 rounds weights for training, but these are quantised")
        slots = None if fresh else jax.tree.leaves(caches)[0].shape[-2]
        dtype = self.embed_VD[...].dtype if dtype is None else dtype
        given = (tokens_BT, positions_BT, segment_ids_BT, prefix_ids_BT)
        return make_context(self.cfg, rules, *given, slots, dtype, remat, fp8)

    def __call__(
        self,
        tokens_BT: Any,
        positions_BT: Any = None,
        segment_ids_BT: Any = None,
    ) -> jax.Array:
        """float32 logits [B, T, V] of int32 tokens [B, T], numpy or JAX.

        `segment_ids` separate packed sequences; 0 marks padding. Rows and columns are padded to what the mesh
        divides, and cut off again. Raises ValueError for tokens outside the vocabulary, and for sequences
        longer than `max_position_embeddings`.
        """
        return self._run(_logits, tokens_BT, positions_BT, segment_ids_BT)

    def expert_ids(self, tokens_BT: Any, positions_BT: Any = None, segment_ids_BT: Any = None) -> jax.Array:
        """Chosen experts of every sparse layer, int32 [sparse layers, B, T, K]; arguments as of a call."""
        if not any(sparse for sparse, _ in layer_runs(self.cfg)):
            raise ValueError(f"this {self.cfg.model_type} model has no mixture-of-experts layer")
        return self._run(_expert_ids, tokens_BT, positions_BT, segment_ids_BT)

    def predict_ahead(self, tokens_BT: Any, depth: int = 0) -> jax.Array:
        """float32 logits [B, T - 1 - depth, V] for t_{i+2+depth}, of the multi-token module `depth`.

        A module reads the hidden states of the one before it, the first those of the main model.
        """
        if not 0 <= depth < len(self.mtp):
            raise ValueError(f"depth is {depth}, but the model has {len(self.mtp)} multi-token module(s)")
        ahead_BTV = self._run(functools.partial(_ahead, depth=depth), tokens_BT, None, None)
        return ahead_BTV[:, : -1 - depth]

    def _run(self, phase: Callable[..., jax.Array], tokens_BT: Any, positions_BT: Any, segment_ids_BT: Any):
        """One compiled pass over checked tokens, padded to what the mesh divides and cut to `shape` again."""
        self.check_tokens(tokens_BT)
        rows, columns = (self.strategy.parts(self.strategy.train, a) for a in ("batch", "length"))
        (B, T), inputs = np.shape(tokens_BT), [tokens_BT, positions_BT, segment_ids_BT]
        pad = ((0, -B % rows), (0, -T % columns))
        if pad != ((0, 0), (0, 0)) and segment_ids_BT is None:
            inputs[2] = np.ones((B, T), np.int32)
        inputs = [None if a is None else jnp.pad(jnp.asarray(a, jnp.int32), pad) for a in inputs]
        with self.on_mesh():
            return phase(self, *inputs, shape=(B, T))

    # ---------------------------------------------------------------- around it

    @classmethod
    def abstract(cls, cfg: ModelConfig, mesh: Any = None, dtype: Any = jnp.float32) -> DeepSeek:
        """Shapes and shardings only: costs nothing at any size, and needs no devices."""
        strategy = Strategy.parse(mesh)
        strategy.check_fits(cfg)
        return jax.tree.map(lambda a: a, _abstract(cfg, strategy, jnp.dtype(dtype)))  # the caller's own

    @classmethod
    def init(cls, cfg: ModelConfig, mesh: Any = None, seed: int = 0, dtype: Any = jnp.float32) -> DeepSeek:
        """Random weights, the same on every mesh."""
        model = cls.abstract(cfg, mesh, dtype)
        return fill(model, model.strategy.make_mesh(), random_values(seed, cfg.initializer_range))

    @property
    def mesh(self) -> Mesh:
        """The mesh on which the weights live."""
        return self.embed_VD[...].sharding.mesh

    @property
    def sparse_layers(self) -> int:
        """Number of layers that route to experts, multi-token modules not counted."""
        return sum(stack.depth for stack in self.stacks if isinstance(stack.mlp, MoE))

    def on_mesh(self) -> Any:
        """A context in which the model may be traced and run, also within the caller's own jit.

        Raises RuntimeError within a gradient or vmap outside jit, where a mesh can no longer be set.
        """
        inside = not jax.sharding.get_abstract_mesh().empty
        if isinstance(jnp.zeros(()), Tracer):  # within jit
            mesh = jax.typeof(self.embed_VD[...]).sharding.mesh
            return nullcontext() if inside else jax.sharding.use_abstract_mesh(mesh)
        with suppress(ValueError):  # of set_mesh within another transformation
            if not isinstance(self.embed_VD[...], Tracer):
                return jax.set_mesh(self.mesh)
        if not inside:
            raise RuntimeError(
                "the model is called in a gradient or vmap where no mesh is set; put that within jax.jit, or "
                "write `with model.on_mesh():` around it"
            )
        return nullcontext()

    def __getstate__(self) -> dict[str, Any]:
        layout = {path: (p.get_value().sharding.spec) for path, p in parameters(self).items()}
        return {"model": vars(self), "layout": layout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put the arrays, which pickle brings to one device, back on a mesh of the model's strategy."""
        vars(self).update(state["model"])
        mesh = self.strategy.make_mesh()
        for path, param in parameters(self).items():
            param.set_value(jax.device_put(param.get_value(), NamedSharding(mesh, state["layout"][path])))

    def init_caches(self, batch: int, capacity: int, dtype: Any, rules: Rules) -> Caches:
        """Empty caches, one per stack."""
        return tuple(s.attn.empty_cache(s.depth, batch, capacity, dtype, rules) for s in self.stacks)

    def check_tokens(self, tokens_BT: Any) -> None:
        """Raise ValueError for a wrong shape, a token outside the vocabulary, or too long a sequence."""
        if np.ndim(tokens_BT) != 2:
            raise ValueError(f"tokens have shape {np.shape(tokens_BT)}, expected [batch, length]")
        longest = self.cfg.max_position_embeddings
        if np.shape(tokens_BT)[1] > longest:
            raise ValueError(f"{np.shape(tokens_BT)[1]} tokens are more than the context of {longest}")
        if isinstance(tokens_BT, Tracer) or not np.size(tokens_BT):
            return
        tokens_BT = np.asarray(tokens_BT)  # or JAX would trace what follows within the caller's jit
        low, high = int(np.min(tokens_BT)), int(np.max(tokens_BT))
        if low < 0 or high >= self.cfg.vocab_size:
            raise ValueError(
                f"token ids span {low}..{high}, outside the vocabulary 0..{self.cfg.vocab_size - 1}"
            )


@functools.lru_cache(maxsize=64)
def _abstract(cfg: ModelConfig, strategy: Strategy, dtype: np.dtype) -> DeepSeek:
    """Traced once: opening one checkpoint asks for it several times."""
    with jax.sharding.use_abstract_mesh(strategy.abstract_mesh()):
        return jax.eval_shape(lambda: DeepSeek(cfg, strategy, dtype))


@functools.partial(jax.jit, static_argnames="shape")
def _logits(model: DeepSeek, tokens_BT, positions_BT, segment_ids_BT, shape):
    rules = model.strategy.train
    ctx = model.context(rules, tokens_BT, positions_BT, segment_ids_BT)
    logits_BTV = model.logits(model.forward(tokens_BT, ctx).hidden_BTD, rules)
    return _cut(logits_BTV, shape, rules, "vocab")


@functools.partial(jax.jit, static_argnames="shape")
def _expert_ids(model: DeepSeek, tokens_BT, positions_BT, segment_ids_BT, shape):
    rules = model.strategy.train
    ctx = model.context(rules, tokens_BT, positions_BT, segment_ids_BT)
    routing = model.forward(tokens_BT, ctx).routing
    return jnp.stack([_cut(ids_BTK, shape, rules, None) for r in routing for ids_BTK in r.ids_BTK])


@functools.partial(jax.jit, static_argnames=("shape", "depth"))
def _ahead(model: DeepSeek, tokens_BT, positions_BT, segment_ids_BT, shape, depth):
    rules = model.strategy.train
    ctx = model.context(rules, tokens_BT, positions_BT, segment_ids_BT)
    hidden_BTD = model.forward(tokens_BT, ctx).hidden_BTD
    for k, module in enumerate(model.mtp[: depth + 1]):
        next_BT = jnp.pad(tokens_BT[:, k + 1 :], ((0, 0), (0, k + 1)))
        hidden_BTD, _, _ = module(hidden_BTD, model.embed(next_BT, ctx), None, ctx)
    return _cut(model.logits(hidden_BTD, rules), shape, rules, "vocab")


def _cut(x_BTX: jax.Array, shape: tuple[int, int], rules: Rules, last: str | None) -> jax.Array:
    """Cut off the padding that made x divisible by the mesh."""
    if x_BTX.shape[:2] == shape:
        return x_BTX
    return rules.shard(x_BTX, None, None, last)[: shape[0], : shape[1]]
