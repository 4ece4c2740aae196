"""Several answers to each prompt: a prompt is read once, its answers decode side by side, and a sequence that
ends gives its slot to the next one in line.

On a mesh every part of the batch has its own prompts, and their answers decode there: caches never move.
"""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxseek.engine.engine import Engine, State, draw, fetch, read_prompts, split
from jaxseek.engine.sampling import Mode, Sampling, SamplingArrays, batch_mode
from jaxseek.model.deepseek import DeepSeek
from jaxseek.sharding.strategy import Strategy

LENGTH_STEP = 16  # cache slots and prompt lengths are rounded up to it
WIDTH = 64  # tokens of a dispatch at most


@dataclass
class Sampled:
    """An answer: new tokens (the stop token included) with float32 log-probabilities of each, as in Drawn.

    `experts`, where recorded, [sparse layers, prompt + answer - 1, K]: of every token but the last, which no
    prediction follows.
    """

    tokens: list[int] = field(default_factory=list)
    tempered: list[float] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" or "length"
    experts: np.ndarray | None = None


@dataclass(frozen=True)
class GroupTiming:
    """Seconds of reading prompts and of decoding, tokens of both, and the share of slots that were in use."""

    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    new_tokens: int
    occupancy: float


@dataclass(frozen=True)
class Room:
    """Shapes of the arrays of one call of `sample_groups`.

    `prompts` rows of `length` tokens are read into caches of `prompt_capacity`; `slots` sequences decode at a
    time, with caches of `capacity`.
    """

    prompts: int
    length: int
    prompt_capacity: int
    slots: int
    capacity: int

    @classmethod
    def of(cls, strategy: Strategy, prompts: int, group: int, longest: int, need: int, slots: int) -> Room:
        """For groups of answers to prompts of up to `longest` tokens, which with their answers have up to
        `need`; rounded to what the mesh divides. `slots` 0: all sequences at a time."""
        prefill, decode = strategy.prefill, strategy.decode
        whole = int(np.lcm(strategy.parts(decode, "cache_batch"), strategy.parts(decode, "batch")))
        rows, columns = (strategy.parts(prefill, axis) for axis in ("batch", "length"))
        step = int(np.lcm(whole, rows))
        prompts += -prompts % step
        total = prompts * group
        length = max(LENGTH_STEP, 1 << (longest - 1).bit_length())
        length += -length % columns
        splits = [strategy.parts(rules, "cache_length") for rules in (prefill, decode)]
        step = int(np.lcm.reduce([LENGTH_STEP, columns, *splits]))
        capacity = max(need, length)
        capacity += -capacity % step
        return cls(
            prompts=prompts,
            length=length,
            prompt_capacity=capacity if max(splits) > 1 else length,  # split alike, or cut short
            slots=min(total, slots + -slots % whole) if slots else total,
            capacity=capacity,
        )


# Given an answer so far, how many of its tokens to keep where it is to end there; else None.
Ended = Callable[[list[int]], int | None]


def sample_groups(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    requests: Sequence[Sequence[Sampling]],
    slots: int = 0,
    capacity: int = 0,
    record_experts: bool = False,
    ended: Ended | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
    mode: Mode | None = None,
) -> tuple[list[list[Sampled]], GroupTiming]:
    """Answers to every prompt, one per request of its group (of equal size for all).

    `slots` sequences decode at a time (0: all); `capacity` tokens fit in each (0: the longest that can come).
    `mode` names the program that draws, which several calls may so share (None: the cheapest that serves).
    An answer is a function of the prompt, the request and the weights alone. Raises ValueError for an empty
    prompt, or one that leaves no room in the context.
    """
    return _Groups(engine, prompts, requests, slots, capacity, record_experts, mode).run(ended, progress)


class _Groups:
    """One call of `sample_groups`."""

    def __init__(self, engine, prompts, requests, slots, capacity, record_experts, mode):
        self.engine, self.model = engine, engine.model
        self.prompts, self.requests = prompts, requests
        self.record = ("logprobs", "experts") if record_experts else ("logprobs",)
        context, self.G = self.model.cfg.max_position_embeddings, len(requests[0])
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < context:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens, expected 1 to {context - 1} (below the context)"
                )
            self.model.check_tokens([prompt])
        self.answers = [[Sampled() for _ in group] for group in requests]
        self.budgets = [
            [min(r.max_new_tokens, context - len(p)) for r in g] for p, g in zip(prompts, requests)
        ]
        strategy = self.model.strategy
        self.parts = strategy.parts(strategy.decode, "cache_batch")
        need = max(len(p) + max(b) for p, b in zip(prompts, self.budgets))
        longest = max(map(len, prompts))
        room = Room.of(strategy, len(prompts), self.G, longest, max(need, capacity), slots)
        self.P, self.T, self.B = room.prompts, room.length, room.slots
        self.capacity, self.prompt_capacity = room.capacity, room.prompt_capacity
        self.mode = mode or batch_mode([r for g in requests for r in g])
        width = max(1, *(len(r.stop_ids) for g in requests for r in g))
        self.blank_stops = np.full(width, -1, np.int32)
        self.experts: dict[tuple[int, int], list[np.ndarray]] = {}

    def run(self, ended: Ended | None, progress: Callable[[int], None]):
        start = time.perf_counter()
        with self.model.on_mesh():
            caches, logits_PV, self.read_LPTK = self._read()
        prompts_read = time.perf_counter()
        # Every part of the mesh has its own share of the prompts and of the slots.
        own = self.P // self.parts
        lines = [
            collections.deque(
                (p, g)
                for p in range(part * own, min((part + 1) * own, len(self.prompts)))
                for g in range(self.G)
            )
            for part in range(self.parts)
        ]
        seats: list[tuple[int, int] | None] = [None] * self.B
        state, params, stops = self._empty_state()
        used = offered = 0
        while True:
            state = self._seat(state, params, stops, caches, logits_PV, seats, lines, ended)
            left = [0 if seat is None else self._left(seat) for seat in seats]
            live = np.array(left) > 0
            if live.any():
                # With some in line, come back when an eighth of the slots is free; else when all have ended.
                enough = min(self.B, int((~live).sum()) + max(1, self.B // 8)) if any(lines) else self.B
                steps = min(WIDTH, max(left))
                state, trace, taken = self.engine.decode(
                    state, ~live, params, stops, steps, enough, WIDTH, self.mode, self.record
                )
                taken = int(taken)
                made = [
                    fetch(a) for a in (trace.tokens_BN, trace.tempered_BN, trace.drawn_BN) if a is not None
                ]
                chosen = None if trace.experts_LBNK is None else fetch(trace.experts_LBNK).astype(np.int16)
                offered += taken * self.B
                for b, seat in enumerate(seats):
                    if seat is not None and live[b]:
                        took = self._take(seat, [a[b, :taken] for a in made], stops[b], ended)
                        if chosen is not None:
                            self.experts[seat].append(chosen[:, b, :took])
                        used += took
                progress(used)
            for b, seat in enumerate(seats):
                if seat is not None and self._answer(seat).finish_reason is not None:
                    seats[b] = None
            if not any(lines) and not any(seats):
                break
        for (p, g), parts in self.experts.items():
            answer = self.answers[p][g]
            fed = len(self.prompts[p]) + len(answer.tokens) - 1  # the last token is not
            answer.experts = np.concatenate(parts, axis=1)[:, :fed]
        seconds = time.perf_counter() - prompts_read
        total = sum(len(a.tokens) for g in self.answers for a in g)
        timing = GroupTiming(
            prompts_read - start, seconds, sum(map(len, self.prompts)), total, used / max(offered, 1)
        )
        return self.answers, timing

    def _read(self):
        """Caches and last logits of all prompts; their experts as [sparse layers, P, T, K]."""
        tokens_PT, lengths_P = np.zeros((self.P, self.T), np.int32), np.ones(self.P, np.int32)
        for i, prompt in enumerate(self.prompts):
            tokens_PT[i, : len(prompt)], lengths_P[i] = prompt, len(prompt)
        self.lengths_P = lengths_P
        dtype = jnp.dtype(self.engine.cache_dtype).name
        record = "experts" in self.record
        caches, logits_PV, ids = _read(self.model, tokens_PT, lengths_P, self.prompt_capacity, dtype, record)
        if self.engine.decoder is not self.model:
            caches = split(caches)
        return caches, logits_PV, None if ids is None else fetch(ids).astype(np.int16)

    def _empty_state(self):
        dtype, B = jnp.dtype(self.engine.cache_dtype).name, self.B
        with self.model.on_mesh():
            state = _empty(self.engine.decoder, B, self.capacity, dtype)
        params = SamplingArrays.of([self.requests[0][0]] * B)
        return state, params, np.tile(self.blank_stops, (B, 1))

    def _seat(self, state, params, stops, caches, logits_PV, seats, lines, ended):
        """Give free slots to those in line: their prompt's cache, and their first token."""
        prompt_B = np.full(self.B, -1, np.int32)  # within the part's own prompts
        own_slots, own_prompts = self.B // self.parts, self.P // self.parts
        for b in range(self.B):
            line = lines[b // own_slots]
            if seats[b] is None and line:
                seats[b] = (p, g) = line.popleft()
                prompt_B[b] = p % own_prompts
                request = self.requests[p][g]
                for all, one in zip(jax.tree.leaves(params), jax.tree.leaves(SamplingArrays.of([request]))):
                    all[b] = one[0]
                if self.read_LPTK is not None:
                    self.experts[p, g] = [self.read_LPTK[:, p, : self.lengths_P[p]]]
                stops[b] = self.blank_stops
                stops[b, : len(request.stop_ids)] = request.stop_ids
        if not (prompt_B >= 0).any():
            return state
        with self.model.on_mesh():
            state, drawn = _fill(
                self.engine.decoder, state, caches, logits_PV, self.lengths_P, prompt_B, params, self.mode
            )
        made = [fetch(a) for a in (drawn.token_B, drawn.tempered_B, drawn.drawn_B)]
        for b in np.flatnonzero(prompt_B >= 0):
            self._take(seats[b], [a[b : b + 1] for a in made], stops[b], ended)
        return state

    def _answer(self, seat: tuple[int, int]) -> Sampled:
        return self.answers[seat[0]][seat[1]]

    def _left(self, seat: tuple[int, int]) -> int:
        answer = self._answer(seat)
        budget = self.budgets[seat[0]][seat[1]]
        return 0 if answer.finish_reason else budget - len(answer.tokens)

    def _take(self, seat, made, stops, ended: Ended | None) -> int:
        """Add a row's new tokens until it ends; returns how many steps were its own."""
        answer, left = self._answer(seat), self._left(seat)
        tokens, tempered, drawn = (a[:left].tolist() for a in made)
        took = next((i + 1 for i, t in enumerate(tokens) if t in stops), len(tokens))
        stopped = took and tokens[took - 1] in stops
        answer.tokens += tokens[:took]
        answer.tempered += tempered[:took]
        answer.drawn += drawn[:took]
        keep = ended(answer.tokens) if ended else None
        if keep is not None:
            del answer.tokens[keep:], answer.tempered[keep:], answer.drawn[keep:]
        if stopped or keep is not None:
            answer.finish_reason = "stop"
        elif self._left(seat) == 0:
            answer.finish_reason = "length"
        return took


@functools.partial(jax.jit, static_argnames=("capacity", "cache_dtype", "record_experts"))
def _read(model: DeepSeek, tokens_PT, lengths_P, capacity: int, cache_dtype: str, record_experts: bool):
    caches, logits_PV, routing = read_prompts(model, tokens_PT, lengths_P, capacity, cache_dtype)
    ids = [r.ids_BTK for r in routing] if record_experts else []
    return caches, logits_PV, jnp.concatenate(ids) if ids else None


@functools.partial(jax.jit, static_argnames=("batch", "capacity", "cache_dtype"))
def _empty(model: DeepSeek, batch: int, capacity: int, cache_dtype: str) -> State:
    """No sequences yet."""
    rules = model.strategy.decode
    zeros_B = jnp.zeros(batch, jnp.int32, out_sharding=rules.spec("batch"))
    caches = model.init_caches(batch, capacity, cache_dtype, rules)
    return State(caches, zeros_B, zeros_B, zeros_B == 0)


@functools.partial(jax.jit, static_argnames="mode", donate_argnames="state")
def _fill(model: DeepSeek, state: State, caches, logits_PV, lengths_P, prompt_B, params, mode: Mode):
    """Rows with a prompt (an index among those of their part of the mesh) start on it: (state, Drawn)."""
    rules = model.strategy.decode
    prompt_B = rules.shard(prompt_B, "cache_batch")

    def rows(of_prompts: jax.Array, of_slots: jax.Array | None, axis: int) -> jax.Array:
        """Each filled slot gets its prompt's part; others keep what they have."""
        lead = (None,) * axis

        def local(index_B, of_prompts, *kept):
            fresh = jnp.take(of_prompts, jnp.maximum(index_B, 0), axis=axis)
            if not kept:
                return fresh
            (kept,) = kept
            widths = [(0, k - f) for k, f in zip(kept.shape, fresh.shape)]
            filled = (index_B >= 0).reshape(*(1,) * axis, -1, *(1,) * (kept.ndim - axis - 1))
            return jnp.where(filled, jnp.pad(fresh, widths), kept)

        def spec(a: jax.Array) -> jax.P:
            inner = ("kv_heads",) if a.ndim == 5 else ()
            length = (*inner, "cache_length", None) if a.ndim > 3 else (None,) * (a.ndim - 1)
            return rules.spec(*lead, "cache_batch", *length)

        arrays = (of_prompts,) if of_slots is None else (of_prompts, of_slots)
        return jax.shard_map(
            local,
            in_specs=(rules.spec("cache_batch"), *map(spec, arrays)),
            out_specs=spec(arrays[-1]),
        )(prompt_B, *arrays)

    lengths_P = rules.shard(jnp.asarray(lengths_P), "cache_batch")
    logits_PV = rules.shard(logits_PV, "cache_batch", None)
    length_B, logits_BV = rows(lengths_P, None, 0), rows(logits_PV, None, 0)
    length_B, filled_B = (rules.shard(a, "batch") for a in (length_B, prompt_B >= 0))
    drawn = draw(logits_BV, length_B, params, mode, rules)
    token_B = jnp.where(filled_B, drawn.token_B, state.token_B)
    position_B = jnp.where(filled_B, length_B, state.position_B)
    kept = jax.tree.map(lambda new, old: rows(new, old, 1), caches, state.caches)
    return State(kept, token_B, position_B, state.done_B & ~filled_B), drawn
