"""DeepSeek: one decoder for the whole family. `forward` is the model; the rest prepares its arguments.

Consecutive layers of one kind form a stack with a leading layer axis, which is scanned (a dense and a sparse
stack in the released models). `unrolled` is the same model with stacks of one layer: it decodes faster on
CPU, where a scan copies the weights of every layer at every step.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import Mesh

from jaxseek.config.model import ModelConfig
from jaxseek.model.cache import Cache, init_cache
from jaxseek.model.layer import Context, Layer, run_stack
from jaxseek.model.moe import MoE, Routing
from jaxseek.model.mtp import MTP
from jaxseek.model.norm import RMSNorm
from jaxseek.model.rope import rope_table
from jaxseek.model.weight import quantization
from jaxseek.ops.attention import Mask
from jaxseek.ops.few_rows import product_by_output
from jaxseek.sharding.parameters import Init, fill, jit_sharing, random_values
from jaxseek.sharding.rules import Rules
from jaxseek.sharding.strategy import Strategy

Caches = tuple[Cache, ...]  # one per stack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """Of a forward pass: final-norm hidden states, the caches, and per sparse stack what its routers did."""

    hidden_BTD: jax.Array
    caches: Caches | None
    routing: tuple[Routing, ...]


def layer_runs(cfg: ModelConfig) -> list[tuple[bool, int]]:
    """The stacks: (is a mixture of experts, number of layers), in order."""
    kinds = (cfg.is_moe_layer(l) for l in range(cfg.num_hidden_layers))
    return [(sparse, len(list(run))) for sparse, run in itertools.groupby(kinds)]


class DeepSeek(nnx.Module):
    """Embedding, stacks of layers, final norm, output head, and the multi-token module where configured."""

    def __init__(self, cfg: ModelConfig, strategy: Strategy, dtype: Any):
        self.cfg, self.strategy = cfg, strategy
        D, V, init = cfg.hidden_size, cfg.vocab_size, Init(strategy, dtype)

        def stack(sparse: bool, count: int) -> Layer:
            return jax.vmap(lambda _: Layer(cfg, sparse, init))(jnp.arange(count))

        self.embed_VD = init((V, D), ("vocab", "embed"))
        self.stacks = nnx.List([stack(sparse, count) for sparse, count in layer_runs(cfg)])
        self.norm = RMSNorm(D, cfg.rms_norm_eps, init)
        self.head_DV = None if cfg.tie_word_embeddings else init((D, V), ("embed", "vocab"))
        self.head_VD: nnx.Param | None = nnx.data(None)  # in place of head_DV, see `unroll`
        self.by_output = False  # whether the head is for `product_by_output`
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
        """The head as a phase uses it: [V, D] where tied to the embedding, or by output, else [D, V]."""
        own = self.head_VD if self.head_DV is None else self.head_DV
        return rules.use(self.embed_VD if own is None else own, dtype)

    def logits(self, hidden_BTD: jax.Array, rules: Rules, head: jax.Array | None = None) -> jax.Array:
        """float32 logits [B, T, V] of final-norm hidden states, main or multi-token.

        `head` is what `head` returns, where several calls share it.
        """
        with jax.named_scope("head"):
            head = self.head(rules, hidden_BTD.dtype) if head is None else head
            if self.by_output:
                B, T, D = hidden_BTD.shape
                return product_by_output(hidden_BTD.reshape(B * T, D), head).reshape(B, T, -1)
            return jnp.einsum(
                "BTD,VD->BTV" if self.head_DV is None else "BTD,DV->BTV",
                hidden_BTD,
                head,
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
        """What the layers share. Segment 0 is padding; positions count from 0 in every segment unless given.

        `prefix_ids` name, for every token, a segment of its row that it sees besides its own: a prefix that
        several segments go on from, each at the position after it (its own segment's id where there is none).
        Without `fresh`, queries attend to the caches, whose slots are positions, and need `positions_BT`.
        `dtype` is that of the activations, and of the weights as they are used; the default is the weights'.
        `remat` and `fp8` are for training, see Context. Raises ValueError for `fp8` on quantised weights.
        """
        if fp8 and quantization(self):
            raise ValueError("fp8 rounds weights for training, but these are quantised")
        ones_BT = jnp.ones(tokens_BT.shape, jnp.int32)
        segment_ids_BT = ones_BT if segment_ids_BT is None else segment_ids_BT
        if positions_BT is None:
            positions_BT = positions_in_segments(segment_ids_BT)
        valid_BT = segment_ids_BT > 0
        if fresh:
            kv_pos, kv_seg = (rules.shard(a, "batch", None) for a in (positions_BT, segment_ids_BT))
        else:
            slots_1S = jnp.arange(jax.tree.leaves(caches)[0].shape[-2])[None]
            kv_pos, kv_seg = rules.shard(slots_1S, None, "cache_length"), None
        slots_BT = jnp.where(valid_BT, positions_BT, -1)
        pos_BT, seg_BT, valid_BT = (
            rules.shard(a, "batch", "length") for a in (positions_BT, segment_ids_BT, valid_BT)
        )
        prefix_BT = None if prefix_ids_BT is None else rules.shard(prefix_ids_BT, "batch", "length")
        mask = Mask(pos_BT, seg_BT, kv_pos, kv_seg, q_prefix_BT=prefix_BT)
        dtype = self.embed_VD[...].dtype if dtype is None else dtype
        return Context(
            rules, rope_table(self.cfg, pos_BT), mask, valid_BT, slots_BT, fresh, dtype, remat, fp8
        )

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
        """The mesh that the weights live on."""
        return self.embed_VD[...].sharding.mesh

    @property
    def sparse_layers(self) -> int:
        """How many layers route to experts, multi-token modules not counted."""
        return sum(stack.depth for stack in self.stacks if isinstance(stack.mlp, MoE))

    def on_mesh(self):
        """A context in which the model may be traced and run; inside a trace the mesh is already set."""
        traced = isinstance(self.embed_VD[...], Tracer)
        return nullcontext() if traced else jax.set_mesh(self.mesh)

    def unrolled(self) -> DeepSeek:
        """The same model with every layer a stack of its own; the layers' weights are copied.

        On a single CPU device they are also joined, see Layer.join.
        """
        join = self.mesh.size == 1 and self.mesh.devices.flat[0].platform == "cpu"
        with self.on_mesh():
            return unroll(self, join)

    def init_caches(self, batch: int, capacity: int, dtype: Any, rules: Rules) -> Caches:
        """Empty caches, one per stack."""
        stacks = self.stacks
        return tuple(init_cache(self.cfg, batch, capacity, dtype, rules, s.depth) for s in stacks)

    def check_tokens(self, tokens_BT: Any) -> None:
        """Raise ValueError for a wrong shape, a token outside the vocabulary, or too long a sequence."""
        if np.ndim(tokens_BT) != 2:
            raise ValueError(f"tokens have shape {np.shape(tokens_BT)}, expected [batch, length]")
        longest = self.cfg.max_position_embeddings
        if np.shape(tokens_BT)[1] > longest:
            raise ValueError(f"{np.shape(tokens_BT)[1]} tokens are more than the context of {longest}")
        if isinstance(tokens_BT, Tracer) or not np.size(tokens_BT):
            return
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


@jit_sharing
def unroll(model: DeepSeek, join: bool) -> DeepSeek:
    """See `DeepSeek.unrolled`; with `join`, see `Layer.join`. Else what is not in a stack is not copied."""
    graph = nnx.clone(model, variables=False)

    def cut(stack: Layer, l: int) -> Layer:
        layer = jax.tree.map(lambda a: a[l], stack)
        return jax.tree.map(lambda a: a[None], layer.join() if join else layer)

    graph.by_output = join
    if join and model.head_DV is not None:
        graph.head_DV, graph.head_VD = None, nnx.Param(model.head_DV[...].T, axes=("vocab", "embed"))
    graph.stacks = nnx.List([cut(s, l) for s in model.stacks for l in range(s.depth)])
    return graph


def positions_in_segments(segment_ids_BT: jax.Array) -> jax.Array:
    """Each token's index within its run of equal segment ids, [B, T] int32."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    starts_BT = segment_ids_BT != jnp.pad(segment_ids_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return index_T[None] - jax.lax.cummax(jnp.where(starts_BT, index_T[None], 0), axis=1)


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
    """Without the padding that made it divisible by the mesh."""
    if x_BTX.shape[:2] == shape:
        return x_BTX
    return rules.shard(x_BTX, None, None, last)[: shape[0], : shape[1]]
