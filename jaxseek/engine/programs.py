"""The engine's compiled programs: reading a chunk of prompts, and many decode steps in one dispatch."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import PartitionSpec as P

from jaxseek.decode.forms import Form
from jaxseek.engine.request import EXPERTS, LOGPROBS, TOPS
from jaxseek.engine.sampling import TOP, Drawn, Mode, sample
from jaxseek.model.deepseek import Caches, DeepSeek
from jaxseek.ops import few_rows
from jaxseek.sharding.parameters import in_formats, parameters

SCORED = 128  # tokens of a prompt at a time whose log-probabilities are computed: their logits are in memory


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Between dispatches: caches, each row's last token and its position, and which rows have ended."""

    caches: Any
    token_B: jax.Array
    position_B: jax.Array  # of token_B, which is not in the cache yet
    done_B: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trace:
    """A dispatch of up to N steps: each row's tokens and their log-probabilities [B, N], as in Drawn.

    Where recorded, also the tempered ones, those drawn from, and the experts of the token *before* each,
    [sparse layers, B, N, K]; where asked for, log-probabilities of watched tokens [W, B, N], and the
    likeliest tokens with theirs [TOP, B, N].
    """

    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    tempered_BN: jax.Array | None = None
    drawn_BN: jax.Array | None = None
    watched_WBN: jax.Array | None = None
    top_id_TBN: jax.Array | None = None
    top_TBN: jax.Array | None = None
    experts_LBNK: jax.Array | None = None


def fetch(x: jax.Array) -> np.ndarray:
    """A small device array on the host, also where other hosts hold parts of it."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


# -------------------------------------------------------------------- reading prompts


@functools.partial(jax.jit, static_argnames=("capacity", "cache_dtype", "record"), donate_argnames="caches")
def read_chunk(
    model: DeepSeek, tokens_PT, start, lengths_P, caches: Caches | None, capacity: int, cache_dtype: str,
    record: bool, next_PT=None,
):  # fmt: skip
    """Read the tokens of P prompts from position `start` on, as far as the prompts reach.

    The first chunk comes without caches and makes them, as prefill lays them out; a further one attends to
    all that they hold. Returns the caches; with `record` the chosen experts [sparse layers, P, T, K]; and
    where the tokens that follow are given as `next`, what `score` says of them.
    """
    rules, (rows, T), fresh = model.strategy.prefill, tokens_PT.shape, caches is None
    at_PT = jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32), (rows, T))
    segment_ids_PT = (at_PT < lengths_P[:, None]).astype(jnp.int32)
    caches = model.init_caches(rows, capacity, cache_dtype, rules) if caches is None else caches
    ctx = model.context(rules, tokens_PT, at_PT, segment_ids_PT, caches, fresh=fresh)
    out = model.forward(tokens_PT, ctx, caches)
    experts = jnp.concatenate([r.ids_BTK for r in out.routing]) if record else None
    return out.caches, experts, None if next_PT is None else score(model, out.hidden_BTD, next_PT)


def score(model: DeepSeek, hidden_PTD, next_PT):
    """Log-probabilities of given next tokens, the likeliest tokens, and theirs: three arrays [P, T]."""
    rules, (rows, T) = model.strategy.prefill, next_PT.shape
    size = SCORED if T % SCORED == 0 and not rules.axes("length") else T

    def block(args):
        hidden_PtD, next_Pt = args
        logits_PtV = jax.sharding.reshard(model.logits(hidden_PtD, rules), P())
        log_z_Pt = jax.nn.logsumexp(logits_PtV, axis=-1)
        given_Pt = jnp.where(jax.nn.one_hot(next_Pt, logits_PtV.shape[-1], dtype=bool), logits_PtV, 0).sum(-1)
        best_Pt = jnp.argmax(logits_PtV, axis=-1).astype(jnp.int32)
        return given_Pt - log_z_Pt, best_Pt, logits_PtV.max(-1) - log_z_Pt

    def cut(a):
        return jnp.moveaxis(a.reshape(rows, T // size, size, *a.shape[2:]), 1, 0)

    parts = jax.lax.map(block, (cut(hidden_PTD), cut(next_PT)))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(rows, T), parts)


# -------------------------------------------------------------------- decoding


def _decode_steps(
    weights: Any, state: State, done_B, params, stops_BK, steps, enough, width: int, mode: Mode,
    record: tuple[str, ...], form: Form,
):  # fmt: skip
    """Up to `steps` (at most `width`) further tokens, fewer when `enough` rows have ended.

    `weights` are what the form prepared. Returns (state, Trace, steps taken).
    """
    rules = weights.strategy.decode
    B = state.token_B.shape[0]
    stops_BK = rules.shard(stops_BK, "batch", None)

    def step(carry):
        state, trace, i, shift = carry
        stepped = form.step(weights, state.caches, state.token_B, state.position_B, ~state.done_B)
        now = dataclasses.replace(params, shift=shift)
        new = draw(stepped.logits_BV, state.position_B + 1, now, mode, rules, TOPS in record)
        shift = None if shift is None else shift.after(new.token_B)
        experts = jnp.concatenate([r.ids_BTK for r in stepped.routing]) if EXPERTS in record else None
        top = new.top_id_TB, new.top_TB
        one = Trace(new.token_B, new.logprob_B, new.tempered_B, new.drawn_B, new.watched_WB, *top, experts)
        if LOGPROBS not in record:
            one = dataclasses.replace(one, tempered_BN=None, drawn_BN=None)

        def put(all, one):
            if all.ndim == 4:
                return jax.lax.dynamic_update_slice_in_dim(all, one, i, 2)
            return jax.lax.dynamic_update_index_in_dim(all, one, i, all.ndim - 1)

        done_B = state.done_B | (new.token_B[:, None] == stops_BK).any(axis=1)
        position_B = state.position_B + (~state.done_B).astype(jnp.int32)
        state = State(stepped.caches, new.token_B, position_B, done_B)
        return state, jax.tree.map(put, trace, one), i + 1, shift

    def going(carry):
        state, _, i, _ = carry
        return (i < steps) & (state.done_B.sum() < enough)

    def blank(dtype, *shape_and_axes):
        shape, axes = zip(*shape_and_axes)
        return jnp.zeros(shape, dtype, out_sharding=rules.spec(*axes))

    def per_token(dtype):
        return blank(dtype, (B, "batch"), (width, None))

    extra = (per_token(jnp.float32), per_token(jnp.float32)) if LOGPROBS in record else (None, None)
    watched = top_id = top = experts = None
    if params.watch_WB is not None:
        watched = blank(jnp.float32, (len(params.watch_WB), None), (B, "batch"), (width, None))
    if TOPS in record:
        shape = (min(TOP, weights.cfg.vocab_size), None), (B, "batch"), (width, None)
        top_id, top = blank(jnp.int32, *shape), blank(jnp.float32, *shape)
    if EXPERTS in record:
        layers, K = weights.sparse_layers, weights.cfg.num_experts_per_tok
        experts = blank(jnp.int32, (layers, None), (B, "batch"), (width, None), (K, None))
    trace = Trace(per_token(jnp.int32), per_token(jnp.float32), *extra, watched, top_id, top, experts)
    token_B, position_B, done_B = (rules.shard(a, "batch") for a in (state.token_B, state.position_B, done_B))
    start = State(state.caches, token_B, position_B, done_B)
    shift = jax.tree.map(jnp.asarray, params.shift)
    return jax.lax.while_loop(going, step, (start, trace, jnp.zeros((), jnp.int32), shift))[:3]


def draw(logits_BV, position_B, params, mode: Mode, rules, top: bool = False) -> Drawn:
    """Sampling with the vocabulary whole, but rows over as many of its chips as divide them."""
    mesh, batch, axes = jax.sharding.get_abstract_mesh(), rules.axes("batch"), rules.axes("vocab")
    # from the last axis on: what then is left of the vocabulary on a chip is one piece, and moves as such
    cut = len(axes)
    while cut and logits_BV.shape[0] % math.prod(mesh.shape[a] for a in (*batch, *axes[cut - 1 :])) == 0:
        cut -= 1
    rows, parts = batch + axes[cut:], axes[:cut]

    def spread(a: jax.Array) -> jax.Array:
        return jax.sharding.reshard(a, P(rows or None, *(None,) * (a.ndim - 1)))

    logits_BV = jax.sharding.reshard(logits_BV, P(rows or None, parts or None))
    watch_WB, params = params.watch_WB, dataclasses.replace(params, watch_WB=None)
    params = jax.tree.map(spread, params)
    if watch_WB is not None:
        watch_WB = jax.sharding.reshard(watch_WB, P(None, rows or None))
        params = dataclasses.replace(params, watch_WB=watch_WB)
    drawn = sample(spread(logits_BV), spread(position_B), params, mode, top)
    return jax.tree.map(lambda a: rules.shard(a, *(None,) * (a.ndim - 1), "batch"), drawn)


@functools.cache
def decode_steps(platform: str) -> Any:
    """`_decode_steps` compiled for a platform."""
    return jax.jit(
        _decode_steps,
        static_argnames=("width", "mode", "record", "form"),
        donate_argnames="state",
        compiler_options=few_rows.OPTIONS if platform == "cpu" else None,
    )


def laid_out_steps(weights: Any, state: State, **static: Any) -> Any:
    """`_decode_steps` jitted for abstract weights and a state, in layouts that the compiler chooses.

    In the default layout of their shapes it would copy caches, and now and then weights, at every dispatch.
    """

    def chosen(a: jax.ShapeDtypeStruct) -> Format:
        return Format(Layout.AUTO, a.sharding) if a.format.layout is None else a.format

    return jax.jit(
        functools.partial(_decode_steps, **static),
        donate_argnums=1,
        in_shardings=(*jax.tree.map(chosen, (weights, state)), *(None,) * 5),
        out_shardings=Format(Layout.AUTO),
    )


# -------------------------------------------------------------------- layouts of the compiler's choice

_PROGRAMS: dict[str, jax.stages.Compiled] = {}  # of all engines


class Decoder:
    """`_decode_steps` with the weights that a form prepared.

    With `lay_out` the compiler chooses how they lie in memory, by the first program. The model gets the new
    arrays; its old ones are deleted one by one where the engine `owns` them. `arrays` are the model's.
    """

    def __init__(self, model: DeepSeek, form: Form, lay_out: bool, owns: bool):
        self.model, self.form, self.weights = model, form, form.prepare(model)
        self.arrays = jax.tree.leaves(model)
        self.lay_out, self.laid_out, self.owns = lay_out, False, owns
        self._programs: dict[tuple, jax.stages.Compiled] = {}

    def __call__(self, state: State, args: tuple, static: dict[str, Any]) -> Any:
        static = static | {"form": self.form}
        with self.model.on_mesh():
            if not self.lay_out:
                platform = self.model.mesh.devices.flat[0].platform
                return decode_steps(platform)(self.weights, state, *args, **static)
            shapes = (*map(np.shape, jax.tree.leaves((state, args))), *static.values())
            if shapes not in self._programs:
                self._programs[shapes] = self._compiled(state, args, static)
            program = self._programs[shapes]
            _, cached, *_ = program.input_formats[0]
            return program(self.weights, in_formats(state, cached), *args)

    def _compiled(self, state: State, args: tuple, static: dict[str, Any]) -> jax.stages.Compiled:
        """From those of all engines, or by the compiler; lays the weights out where they are not yet."""

        def abstract() -> tuple[Any, ...]:
            kept = ((self.weights, self.laid_out), (state, False), (args, False))
            return tuple(jax.tree.map(functools.partial(_abstract, laid_out=l), tree) for tree, l in kept)

        def key() -> str:
            return str((jax.tree.structure(abstract()), jax.tree.leaves(abstract()), static))

        if key() not in _PROGRAMS:
            weights, cached, _ = abstract()
            step = laid_out_steps(weights, cached, **static)
            _PROGRAMS[key()] = step.lower(weights, cached, *args).compile()
        program = _PROGRAMS[key()]
        if not self.laid_out:
            formats, *_ = program.input_formats[0]
            self.arrays = []  # so that an old array goes as soon as its new one is there
            for param, found in zip(parameters(self.weights).values(), jax.tree.leaves(formats)):
                param.set_value(in_formats(param[...], found, donate=self.owns))
            self.laid_out, self.arrays = True, jax.tree.leaves(self.model)
            _PROGRAMS[key()] = program
        return program


def _abstract(a: Any, laid_out: bool) -> jax.ShapeDtypeStruct:
    where = getattr(a, "format" if laid_out else "sharding", None)  # of arrays, not of numpy's
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
