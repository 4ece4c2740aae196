"""Prefill and decode as two compiled programs: one dispatch for a prompt batch, one for many new tokens."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import PartitionSpec as P

from jaxseek.decode import forms
from jaxseek.engine.sampling import Drawn, Mode, Sampling, SamplingArrays, batch_mode, sample
from jaxseek.model.cache import split_layers
from jaxseek.model.deepseek import Caches, DeepSeek
from jaxseek.ops import few_rows
from jaxseek.sharding.parameters import in_formats, parameters

CAPACITY_STEP = 256  # cache slots are allotted in steps, so that few programs serve all lengths


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Between dispatches: caches, each row's last token and its position, and which rows have ended."""

    caches: Any
    token_B: jax.Array
    position_B: jax.Array  # of token_B, which is not in the cache yet
    done_B: jax.Array


@dataclass
class Completion:
    """Of one request: new token ids (the stop token included), their log-probabilities, and why it ended."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" or "length"


@dataclass
class Timing:
    """Seconds and tokens of a batch; compilation counts in the first of each."""

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0

    @property
    def decode_rate(self) -> float:
        """New tokens per second over the batch, the first of each row (made by prefill) not counted."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Engine:
    """Generates for batches of prompts with one model on its mesh.

    `unroll` decodes with one module per layer, at the cost of a second copy of the weights; by default on
    CPU, where a scan over layers copies every layer's weights at every token. `lay_out` has the compiler
    choose how the model's weights lie in memory, by its first program for decoding; by default on TPU. The
    model gets the new arrays; its old ones are deleted one by one where the engine `owns` them.
    `weights` are the arrays that it stands for.
    """

    def __init__(
        self,
        model: DeepSeek,
        cache_dtype: Any = None,
        unroll: bool | None = None,
        lay_out: bool | None = None,
        owns: bool = True,
    ):
        self.model = model
        self.cache_dtype = cache_dtype or model.embed_VD[...].dtype
        self.platform = platform = model.mesh.devices.flat[0].platform
        self.form = forms.choose("auto" if unroll is None else "cpu" if unroll else "plain", model)
        self.decoder = self.form.prepare(model)
        self.owns, self.weights = owns, jax.tree.leaves(model)
        self._programs: dict[tuple, jax.stages.Compiled] = {}
        self.lay_out, self.laid_out = platform == "tpu" if lay_out is None else lay_out, False
        self.timing = Timing()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | list[Sampling]
    ) -> list[Completion]:
        """All completions of a batch of tokenised prompts."""
        completions: list[Completion] = []
        for completions in self.stream(prompts, sampling):  # noqa: B007 - the last state is the result
            pass
        return completions

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | list[Sampling],
        tokens_per_dispatch: int = 32,
    ) -> Iterator[list[Completion]]:
        """Yield the growing completions after prefill and after every dispatch.

        The caller may set a completion's `finish_reason` (a stop string, say) to end its row. Raises
        ValueError for an empty prompt, a prompt as long as the context, or a token outside the vocabulary.
        """
        requests = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        if len(requests) != len(prompts):
            raise ValueError(f"{len(requests)} requests for {len(prompts)} prompts")
        if not prompts:
            return
        context = self.model.cfg.max_position_embeddings
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i} has no tokens")
            if len(prompt) >= context:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens, which leaves no room in the context of {context}"
                )
            self.model.check_tokens([prompt])
        budgets = [min(r.max_new_tokens, context - len(p)) for p, r in zip(prompts, requests)]
        completions = [Completion() for _ in prompts]
        self.timing = Timing(prefill_tokens=sum(map(len, prompts)))

        start = time.perf_counter()
        state, params, stops = self._prefill(prompts, requests, budgets, completions)
        self.timing.prefill_seconds = time.perf_counter() - start
        yield completions

        mode, rows = batch_mode(requests), len(prompts)
        while True:
            left = [b - len(c.tokens) if c.finish_reason is None else 0 for b, c in zip(budgets, completions)]
            if not any(left):
                return
            start = time.perf_counter()
            done_B = np.ones(state.done_B.shape[0], bool)
            done_B[:rows] = [c.finish_reason is not None for c in completions]
            steps = min(tokens_per_dispatch, max(left))
            state, trace, taken = self.decode(
                state, done_B, params, stops, steps, len(done_B), tokens_per_dispatch, mode
            )
            tokens_BN, logprobs_BN = fetch(trace.tokens_BN), fetch(trace.logprobs_BN)
            for i, completion in enumerate(completions):
                if completion.finish_reason is None:
                    n = min(int(taken), left[i])
                    self._take(completion, tokens_BN[i, :n], logprobs_BN[i, :n], stops[i], budgets[i])
            self.timing.decode_seconds += time.perf_counter() - start
            self.timing.decode_tokens = sum(len(c.tokens) - 1 for c in completions)
            yield completions

    def decode(
        self, state: State, done_B, params, stops_BK, steps, enough, width: int, mode: Mode,
        record: tuple[str, ...] = (),
    ):  # fmt: skip
        """`_decode_steps` with the decoder; what `lay_out` says is done here."""
        args, static = (done_B, params, stops_BK, np.int32(steps), np.int32(enough)), (width, mode, record)
        with self.decoder.on_mesh():
            if not self.lay_out:
                return decode_steps(self.form.__name__)(self.decoder, state, *args, *static)
            program = self._program(state, args, static)
            _, cached, *_ = program.input_formats[0]
            return program(self.decoder, in_formats(state, cached), *args)

    def _program(self, state: State, args: tuple, static: tuple) -> jax.stages.Compiled:
        """`_decode_steps` compiled for weights as they lie; the first one says how that is."""
        shapes = (*map(np.shape, jax.tree.leaves((state, args))), static)
        if shapes not in self._programs:
            self._programs[shapes] = self._compiled(state, args, static)
        return self._programs[shapes]

    def _compiled(self, state: State, args: tuple, static: tuple) -> jax.stages.Compiled:
        """From those of all engines, or by the compiler; lays the weights out where they are not yet."""

        def abstract() -> tuple[Any, ...]:
            kept = ((self.decoder, self.laid_out), (state, False), (args, False))
            return tuple(jax.tree.map(functools.partial(_abstract, laid_out=l), tree) for tree, l in kept)

        def key() -> str:
            return str((jax.tree.structure(abstract()), jax.tree.leaves(abstract()), static))

        if key() not in _PROGRAMS:
            width, mode, record = static
            weights, cached, _ = abstract()
            step = laid_out_steps(weights, cached, form=self.form, width=width, mode=mode, record=record)
            _PROGRAMS[key()] = step.lower(weights, cached, *args).compile()
        program = _PROGRAMS[key()]
        if not self.laid_out:
            formats, *_ = program.input_formats[0]
            self.weights = []  # so that an old array goes as soon as its new one is there
            for param, found in zip(parameters(self.decoder).values(), jax.tree.leaves(formats)):
                param.set_value(in_formats(param[...], found, donate=self.owns))
            self.laid_out, self.weights = True, jax.tree.leaves(self.model)
            _PROGRAMS[key()] = program
        return program

    def _prefill(self, prompts, requests, budgets, completions):
        model, rules = self.model, self.model.strategy.prefill
        longest, rows, columns = (
            max(map(len, prompts)),
            *(model.strategy.parts(rules, a) for a in ("batch", "length")),
        )
        decode = (model.strategy.parts(model.strategy.decode, a) for a in ("batch", "cache_batch"))
        B = len(prompts) + -len(prompts) % np.lcm.reduce([rows, *decode])
        T = max(16, 1 << (longest - 1).bit_length())
        T += -T % columns
        need = max(len(p) + b for p, b in zip(prompts, budgets))
        step = np.lcm(CAPACITY_STEP, model.strategy.parts(rules, "cache_length"))
        capacity = int(-(-need // step) * step)

        tokens_BT, lengths_B = np.zeros((B, T), np.int32), np.ones(B, np.int32)
        for i, prompt in enumerate(prompts):
            tokens_BT[i, : len(prompt)], lengths_B[i] = prompt, len(prompt)
        padded = requests + [requests[-1]] * (B - len(requests))
        stops = [tuple(r.stop_ids) for r in padded]
        width = max(1, *map(len, stops))
        stops_BK = np.array([s + (-1,) * (width - len(s)) for s in stops], np.int32)
        params = SamplingArrays.of(padded)
        with model.on_mesh():
            state, logprob_B = _prefill(
                model,
                tokens_BT,
                lengths_B,
                params,
                capacity,
                jnp.dtype(self.cache_dtype).name,
                batch_mode(requests),
            )
            if self.decoder is not model:
                state = State(self.form.split(state.caches), state.token_B, state.position_B, state.done_B)
        first_B, logprob_B = fetch(state.token_B), fetch(logprob_B)
        for i, completion in enumerate(completions):
            self._take(completion, first_B[i : i + 1], logprob_B[i : i + 1], stops_BK[i], budgets[i])
        return state, params, stops_BK

    @staticmethod
    def _take(completion: Completion, tokens, logprobs, stops, budget: int) -> None:
        for token, logprob in zip(tokens.tolist(), logprobs.tolist()):
            completion.tokens.append(token)
            completion.logprobs.append(logprob)
            if token in stops:
                completion.finish_reason = "stop"
                return
        if len(completion.tokens) >= budget:
            completion.finish_reason = "length"


def fetch(x: jax.Array) -> np.ndarray:
    """A small device array on the host, also where other hosts hold parts of it."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


@functools.partial(jax.jit, static_argnames=("capacity", "cache_dtype", "mode"))
def _prefill(model: DeepSeek, tokens_BT, lengths_B, params, capacity: int, cache_dtype: str, mode: Mode):
    """Caches of right-padded prompts, and their first new token with its log-probability."""
    decode = model.strategy.decode
    caches, logits_BV, _ = read_prompts(model, tokens_BT, lengths_B, capacity, cache_dtype)
    drawn = draw(logits_BV, lengths_B, params, mode, decode)
    position_B = decode.shard(lengths_B, "batch")
    done_B = jnp.zeros_like(position_B, dtype=bool)
    return State(caches, drawn.token_B, position_B, done_B), drawn.logprob_B


def read_prompts(model: DeepSeek, tokens_BT, lengths_B, capacity: int, cache_dtype: str):
    """Of right-padded prompts: their caches as decoding lays them out, the logits after their last tokens
    [B, V], and what the routers did."""
    B, T = tokens_BT.shape
    rules, decode = model.strategy.prefill, model.strategy.decode
    segment_ids_BT = (jnp.arange(T)[None] < lengths_B[:, None]).astype(jnp.int32)
    caches = model.init_caches(B, capacity, cache_dtype, rules)
    ctx = model.context(rules, tokens_BT, None, segment_ids_BT, caches)
    out = model.forward(tokens_BT, ctx, caches)
    hidden_BTD = rules.shard(out.hidden_BTD, "batch", None, None)
    last_BT = rules.shard(
        (jnp.arange(T)[None] == lengths_B[:, None] - 1).astype(hidden_BTD.dtype), "batch", None
    )
    last_BD = jnp.einsum("BTD,BT->BD", hidden_BTD, last_BT)
    logits_BV = model.logits(decode.shard(last_BD, "batch", None)[:, None], decode)[:, 0]
    return jax.tree.map(lambda a: _as_in_decode(a, decode), out.caches), logits_BV, out.routing


def _as_in_decode(cache: jax.Array, rules) -> jax.Array:
    inner = ("kv_heads",) if cache.ndim == 5 else ()
    return rules.shard(cache, None, "cache_batch", *inner, "cache_length", None)


@jax.jit
def split(caches: Caches) -> Caches:
    return tuple(part for cache in caches for part in split_layers(cache))


def draw(logits_BV, position_B, params, mode: Mode, rules) -> Drawn:
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
    drawn = sample(spread(logits_BV), spread(position_B), jax.tree.map(spread, params), mode)
    return jax.tree.map(lambda a: rules.shard(a, "batch"), drawn)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trace:
    """Of a dispatch of up to N steps: each row's tokens and their log-probabilities [B, N], as in Drawn.

    Where recorded, also the tempered ones, those drawn from, and the experts that the token *before* each
    used, [sparse layers, B, N, K].
    """

    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    tempered_BN: jax.Array | None = None
    drawn_BN: jax.Array | None = None
    experts_LBNK: jax.Array | None = None


def _decode_steps(
    model: DeepSeek, state: State, done_B, params, stops_BK, steps, enough, width: int, mode: Mode,
    record: tuple[str, ...] = (), form: Any = None,
):  # fmt: skip
    """Up to `steps` (at most `width`) further tokens, fewer when `enough` rows have ended.

    `record` may name "logprobs" and "experts". Returns (state, Trace, steps taken).
    """
    rules = model.strategy.decode
    B = state.token_B.shape[0]
    stops_BK = rules.shard(stops_BK, "batch", None)

    def step(carry):
        state, trace, i = carry
        out = form.step(model, state.caches, state.token_B, state.position_B, ~state.done_B)
        logits_BV = out.logits_BV
        new = draw(logits_BV, state.position_B + 1, params, mode, rules)
        experts = jnp.concatenate([r.ids_BTK for r in out.routing]) if "experts" in record else None
        made = Trace(new.token_B, new.logprob_B, new.tempered_B, new.drawn_B, experts)
        trace = jax.tree.map(
            lambda all, one: (
                jax.lax.dynamic_update_slice_in_dim(all, one, i, 2)
                if all.ndim == 4
                else jax.lax.dynamic_update_index_in_dim(all, one, i, 1)
            ),
            trace,
            made if "logprobs" in record else dataclasses.replace(made, tempered_BN=None, drawn_BN=None),
        )
        done_B = state.done_B | (new.token_B[:, None] == stops_BK).any(axis=1)
        position_B = state.position_B + (~state.done_B).astype(jnp.int32)
        return State(out.caches, new.token_B, position_B, done_B), trace, i + 1

    def going(carry):
        state, _, i = carry
        return (i < steps) & (state.done_B.sum() < enough)

    def blank(dtype, *shape_and_axes):
        shape, axes = zip(*shape_and_axes)
        return jnp.zeros(shape, dtype, out_sharding=rules.spec(*axes))

    def per_token(dtype):
        return blank(dtype, (B, "batch"), (width, None))

    extra = (per_token(jnp.float32), per_token(jnp.float32)) if "logprobs" in record else (None, None)
    experts = None
    if "experts" in record:
        layers, K = model.sparse_layers, model.cfg.num_experts_per_tok
        experts = blank(jnp.int32, (layers, None), (B, "batch"), (width, None), (K, None))
    trace = Trace(per_token(jnp.int32), per_token(jnp.float32), *extra, experts)
    start = State(state.caches, state.token_B, state.position_B, rules.shard(done_B, "batch"))
    return jax.lax.while_loop(going, step, (start, trace, jnp.zeros((), jnp.int32)))


@functools.cache
def decode_steps(form: str) -> Any:
    """`_decode_steps` compiled with a form."""
    return jax.jit(
        functools.partial(_decode_steps, form=importlib.import_module(form)),
        static_argnames=("width", "mode", "record"),
        donate_argnames="state",
        compiler_options=few_rows.OPTIONS if form.endswith(".cpu") else None,
    )


_PROGRAMS: dict[str, jax.stages.Compiled] = {}


def _abstract(a: Any, laid_out: bool) -> jax.ShapeDtypeStruct:
    where = getattr(a, "format" if laid_out else "sharding", None)  # of arrays, not of numpy's
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)


def laid_out_steps(model: DeepSeek, state: State, form: Any, **static: Any) -> Any:
    """`_decode_steps` jitted for abstract weights and a state, in layouts that the compiler chooses.

    In the default layout of their shapes it would copy caches, and now and then weights, at every dispatch.
    """

    def chosen(a: jax.ShapeDtypeStruct) -> Format:
        return Format(Layout.AUTO, a.sharding) if a.format.layout is None else a.format

    return jax.jit(
        functools.partial(_decode_steps, form=form, **static),
        donate_argnums=1,
        in_shardings=(*jax.tree.map(chosen, (model, state)), *(None,) * 5),
        out_shardings=Format(Layout.AUTO),
    )
