"""Continuous batching: requests come and go, prompts are read in chunks beside the answers that decode.

A step reads at most one chunk, gives free slots to those in line, and decodes up to `dispatch` tokens for
every slot in one compiled loop. What an answer says depends on its request and the weights alone.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseek.decode import forms
from jaxseek.engine.programs import Decoder, State, fetch, read_chunk
from jaxseek.engine.request import EXPERTS, LOGPROBS, PROMPT, TOPS, Answer, Handle, Request
from jaxseek.engine.sampling import Mode, Sampling, SamplingArrays, Shift, batch_mode
from jaxseek.engine.scheduler import Reading, Scheduler
from jaxseek.engine.slots import LENGTH_STEP, PROMPTS, SLOTS, bucket, capacity_of, moved, resized, seated
from jaxseek.model.deepseek import Caches, DeepSeek
from jaxseek.sharding.strategy import Strategy

WIDTH = 64  # tokens of a dispatch at most
BETWEEN_CHUNKS = 8  # tokens of a dispatch while prompts wait to be read for free slots
STOPS = 4  # stop ids of a row come in multiples of it


@dataclass
class Timing:
    """Seconds and tokens since the engine was made or `timing` replaced; compilation counts.

    Reading prompts includes the dispatch that makes a first token where nothing else decodes; these tokens
    are in `new_tokens`, not in `decode_tokens`. `row_steps` are steps times slots, used or not.
    """

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    new_tokens: int = 0
    used: int = 0
    row_steps: int = 0

    @property
    def decode_rate(self) -> float:
        """New tokens per second of decoding."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def occupancy(self) -> float:
        """Share of the slots that were in use."""
        return self.used / self.row_steps if self.row_steps else 0.0


@dataclass(frozen=True)
class Room:
    """Shapes that the mesh divides: rows that are read side by side are a multiple of `rows`, a chunk of
    tokens of `columns`, slots of `slots`, and a cache's capacity of `length`."""

    rows: int
    columns: int
    slots: int
    length: int
    parts: int  # of the rows of a cache

    @classmethod
    def of(cls, strategy: Strategy) -> Room:
        prefill, decode = strategy.prefill, strategy.decode
        slots = int(np.lcm(strategy.parts(decode, "cache_batch"), strategy.parts(decode, "batch")))
        rows, cached = (strategy.parts(prefill, axis) for axis in ("batch", "cache_batch"))
        lengths = [strategy.parts(rules, "cache_length") for rules in (prefill, decode)]
        columns = strategy.parts(prefill, "length")
        return cls(
            rows=int(np.lcm.reduce([rows, cached, slots])),
            columns=columns,
            slots=slots,
            length=int(np.lcm.reduce([LENGTH_STEP, columns, *lengths])),
            parts=strategy.parts(decode, "cache_batch"),
        )


class Engine:
    """Generates with one model on its mesh, for up to `slots` requests at a time.

    A slot holds `capacity` tokens (0: what those in line need, rounded up so that few programs serve all).
    `form` names the decode step (decode/forms.py). `lay_out` has the compiler choose how the model's weights
    lie in memory, by default on TPU; the model gets the new arrays, and its old ones are deleted where the
    engine `owns` them. `mode` names a program that draws, which calls with other settings then share.
    """

    def __init__(
        self,
        model: DeepSeek,
        slots: int = 16,
        capacity: int = 0,
        cache_dtype: Any = None,
        form: str = "auto",
        lay_out: bool | None = None,
        owns: bool = True,
        mode: Mode = "greedy",
        dispatch: int = 32,
    ):
        self.model, self.dispatch = model, dispatch
        self.mode: Mode = mode
        self.cache_dtype = jnp.dtype(cache_dtype or model.embed_VD[...].dtype).name
        on_tpu = model.mesh.devices.flat[0].platform == "tpu"
        self.decoder = Decoder(model, forms.choose(form, model), on_tpu if lay_out is None else lay_out, owns)
        self.room, self.timing = Room.of(model.strategy), Timing()
        self.scheduler = Scheduler(self.room.parts, 0)
        self.resize(slots, capacity)

    def resize(self, slots: int, capacity: int = 0) -> None:
        """Change the number of slots and their capacity. Raises ValueError while requests are there."""
        if slots < 1:
            raise ValueError(f"slots is {slots}, expected 1 or more")
        if self.busy:
            raise ValueError("the engine's slots cannot be changed while it has requests")
        slots, self.capacity = slots + -slots % self.room.slots, capacity
        if slots == len(self.scheduler.seats):
            return
        self.scheduler, self.state = Scheduler(self.room.parts, slots, self.room.columns), None
        self._params = SamplingArrays.of([Sampling()] * slots)
        self._stops = np.full((slots, STOPS), -1, np.int32)
        self._tokens, self._positions = np.zeros(slots, np.int32), np.zeros(slots, np.int32)

    @property
    def busy(self) -> bool:
        """True while requests wait or decode."""
        return bool(self.scheduler.live or self.scheduler.waiting)

    # ---------------------------------------------------------------- requests

    def check(self, prompt: Sequence[int]) -> None:
        """Raise ValueError for a prompt that cannot be answered."""
        context, n = self.model.cfg.max_position_embeddings, len(prompt)
        if not n:
            raise ValueError("the prompt has no tokens")
        if n >= context:
            raise ValueError(f"the prompt has {n} tokens, which leaves no room in the context of {context}")
        self.model.check_tokens([prompt])

    def submit(self, request: Request) -> Handle:
        """Put a request in line. Raises ValueError for a prompt that cannot be answered."""
        self.check(request.prompt)
        if request.sampling.stop and request.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; use stop_ids")
        room = self.model.cfg.max_position_embeddings - len(request.prompt)
        handle = Handle(request, min(request.sampling.max_new_tokens, room))
        self.scheduler.add(handle)
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a request now; its answer keeps the tokens that it has."""
        if not handle.ended:
            self.scheduler.remove(handle)
            handle.end("cancelled")

    def run(self, requests: Iterable[Request | ValueError]) -> Iterator[tuple[int, Answer | ValueError]]:
        """Answer requests as they come from an iterator: (index, answer) of each as soon as it has ended.

        No more are taken from the iterator than have slots or come next. A bad request, or a ValueError in
        place of one, is given back as its error, and costs the others nothing.
        """
        numbered, flying, more = enumerate(requests), dict[Handle, int](), True
        try:
            while True:
                while more and self.scheduler.waiting < len(self.scheduler.seats):
                    index, request = next(numbered, (-1, None))
                    if request is None:
                        more = False
                        break
                    try:
                        if isinstance(request, ValueError):
                            raise request
                        flying[self.submit(request)] = index
                    except ValueError as error:
                        yield index, error
                if not flying:
                    return
                for handle in self.step():
                    if handle.ended and handle in flying:
                        yield flying.pop(handle), handle.answer
        finally:
            for handle in flying:
                self.cancel(handle)

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """All answers, in order. Raises ValueError, which names the first prompt that cannot be answered."""
        found: dict[int, Answer] = {}
        for index, answer in self.run(requests):
            if isinstance(answer, ValueError):
                raise ValueError(f"prompt {index}: {answer}") from answer
            found[index] = answer
        return [found[i] for i in range(len(requests))]

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]
    ) -> list[Answer]:
        """Answers to tokenised prompts, in order."""
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} requests for {len(prompts)} prompts")
        return self.answers([Request(p, s) for p, s in zip(prompts, each)])

    # ---------------------------------------------------------------- a step

    def step(self) -> list[Handle]:
        """Read a chunk of prompts, fill free slots, and decode; returns the requests that have new tokens.

        Where it is interrupted, all requests end: the programs had the caches to themselves.
        """
        try:
            return self._step()
        except BaseException:
            for handle in self.scheduler.clear():
                handle.end("cancelled")
            self.state = None
            raise

    def _step(self) -> list[Handle]:
        start, line = time.perf_counter(), self.scheduler
        with self.model.on_mesh():
            self._seat()
            line.reading = line.reading or line.next_reading(self.room.rows // self.room.parts)
            if line.reading is not None:
                self._read(line.reading)
                self._seat()
        fresh = all(not seat.answer.tokens for seat in line.seats if seat is not None)
        read = time.perf_counter()
        self.timing.prefill_seconds += read - start
        if not line.live:
            return []
        found, new_tokens = self._decode()
        seconds = time.perf_counter() - read
        self.timing.new_tokens += new_tokens
        if fresh:
            self.timing.prefill_seconds += seconds
        else:
            self.timing.decode_seconds += seconds
            self.timing.decode_tokens += new_tokens
        return found

    def _read(self, reading: Reading) -> None:
        """Read the next chunk; after the last the caches are as decoding has them."""
        strategy, rows = self.model.strategy, self.room.parts * reading.width
        if reading.plan:
            T, begin = reading.plan.pop(0), reading.start
            reading.start = end = begin + T
            context = self.model.cfg.max_position_embeddings
            capacity = bucket(end, max(end, context), self.room.length, PROMPTS)
            if reading.caches is not None and capacity > capacity_of(reading.caches):
                reading.caches = resized(reading.caches, capacity, strategy.prefill)
            tokens_PT, lengths_P = np.zeros((rows, T), np.int32), np.zeros(rows, np.int32)
            for row, prompt in reading.rows:
                lengths_P[row], part = prompt.to_read, prompt.tokens[begin : min(end, prompt.to_read)]
                tokens_PT[row, : len(part)] = part
            next_PT = np.zeros_like(tokens_PT) if reading.records_scores else None
            for row, prompt in reading.rows if next_PT is not None else ():
                part = prompt.tokens[begin + 1 : end + 1]
                next_PT[row, : len(part)] = part  # type: ignore[index]
            reading.caches, ids_LPTK, scores = read_chunk(
                self.model, tokens_PT, np.int32(begin), lengths_P, reading.caches, capacity,
                self.cache_dtype, reading.records_experts, next_PT,
            )  # fmt: skip
            if scores is not None:
                given_PT, best_PT, most_PT = map(fetch, scores)
                for row, prompt in reading.rows:
                    n = max(0, min(T, prompt.to_read - begin))
                    columns = (a[row, :n].tolist() for a in (given_PT, best_PT, most_PT))
                    prompt.scores += zip(*columns)
            if ids_LPTK is not None:
                ids = fetch(ids_LPTK).astype(np.int16)
                for row, prompt in reading.rows:
                    prompt.routed.append(ids[:, row, : max(0, prompt.to_read - begin)])
            jax.block_until_ready(reading.caches)
        if not reading.plan:
            if reading.caches is not None:
                reading.caches = self.decoder.form.split(moved(reading.caches, strategy.decode))
            self.scheduler.read.append(reading)
            self.scheduler.reading = None
            self.timing.prefill_tokens += sum(len(prompt.tokens) for _, prompt in reading.rows)

    def _seat(self) -> None:
        """Give free slots to requests whose prompts are read: caches, settings, the token to begin with."""
        for reading in list(self.scheduler.read):
            seats = self.scheduler.seat(reading)
            if not seats:
                continue
            alone = self.scheduler.live == len(seats)
            need = max(len(prompt.tokens) + handle.budget for _, _, prompt, handle in seats)
            caches = self._caches(max(need, self.scheduler.need) if alone else need, alone)
            row_B = np.full(len(self._tokens), -1, np.int32)
            for slot, row, prompt, handle in seats:
                row_B[slot] = row % reading.width
                self._tokens[slot], self._positions[slot] = prompt.tokens[-1], prompt.to_read
                self._set(slot, handle)
                if EXPERTS in handle.request.record:
                    handle.routed = list(prompt.routed)
                if PROMPT in handle.request.record:
                    handle.answer.prompt = list(prompt.scores)
            if reading.caches is not None:
                decode = self.model.strategy.decode
                if self.model.strategy.parts(decode, "cache_length") > 1:  # slots are where others' are
                    reading.caches = resized(reading.caches, capacity_of(caches), decode)
                caches = seated(caches, reading.caches, row_B, decode)
            self.state = self._state(caches)

    def _caches(self, need: int, alone: bool) -> Caches:
        """The slots' caches, with room for `need` tokens in each; unless `alone`, what is in them stays."""
        model, context = self.model, self.model.cfg.max_position_embeddings
        if self.capacity:
            capacity = max(need, self.capacity)
            capacity += -capacity % self.room.length
        else:
            capacity = bucket(need, context, self.room.length, SLOTS)
        if self.state is not None:
            found = capacity_of(self.state.caches)
            if not alone:
                if capacity <= found:
                    return self.state.caches
                return resized(self.state.caches, capacity, model.strategy.decode)
            if capacity <= found < 2 * capacity:
                return self.state.caches
        self.state = None  # free it before the next is made
        return _empty(model, len(self._tokens), capacity, self.cache_dtype, self.decoder.form)

    def _state(self, caches: Caches) -> State:
        done_B = np.array([seat is None for seat in self.scheduler.seats])
        # copies: jit may return an argument's buffer, and the engine changes its arrays
        rows = self._tokens.copy(), self._positions.copy(), done_B
        return State(caches, *_placed(rows, self.model.strategy.decode))

    def _set(self, slot: int, handle: Handle) -> None:
        """The slot's settings in the arrays that the programs take."""
        request, params = handle.request, self._params
        for name, one in vars(SamplingArrays.of([request.sampling])).items():
            if one is not None:
                getattr(params, name)[slot] = one[0]
        stops = request.sampling.stop_ids
        more = -(-len(stops) // STOPS) * STOPS - self._stops.shape[1]
        if more > 0:
            self._stops = np.pad(self._stops, ((0, 0), (0, more)), constant_values=-1)
        self._stops[slot] = -1
        self._stops[slot, : len(stops)] = stops

    def _decode(self) -> tuple[list[Handle], int]:
        """A dispatch: the requests that have new tokens, and how many these are."""
        line, B = self.scheduler, len(self.scheduler.seats)
        live = [(slot, handle) for slot, handle in enumerate(line.seats) if handle is not None]
        done_B = np.array([seat is None for seat in line.seats])
        record = tuple(r for r in (LOGPROBS, EXPERTS, TOPS) if any(r in h.request.record for _, h in live))
        mode = batch_mode([h.request.sampling for _, h in live], self.mode)
        steps, enough = min(self.dispatch, WIDTH, max(h.left for _, h in live)), B
        if line.queue or line.reading or line.read:  # come back when an eighth of the slots is free
            enough = min(B, B - len(live) + max(1, B // 8))
        if any(not handle.answer.tokens for _, handle in live):
            steps = 1
        elif line.reading or (line.queue and max(line.wanted()) > 0):
            steps = min(steps, BETWEEN_CHUNKS)
        self.state, trace, taken = self.decode(
            self.state, done_B, self._settings(live), self._stops, steps, enough, WIDTH, mode, record
        )
        n, found = int(taken), {}
        for name in ("tokens", "logprobs", "tempered", "drawn"):
            if (a := getattr(trace, f"{name}_BN")) is not None:
                found[name] = fetch(a)[:, :n]
        if trace.watched_WBN is not None:
            found["watched"] = np.moveaxis(fetch(trace.watched_WBN), 0, 2)[:, :n]
        if trace.top_TBN is not None:
            found["top_id"], found["top"] = (
                np.moveaxis(fetch(a), 0, 2)[:, :n] for a in (trace.top_id_TBN, trace.top_TBN)
            )
        experts = None if trace.experts_LBNK is None else fetch(trace.experts_LBNK).astype(np.int16)
        used = 0
        for slot, handle in live:
            more = ("tempered", "drawn") if LOGPROBS in handle.request.record else ()
            columns = {name: found[name][slot].tolist() for name in ("tokens", "logprobs", *more)}
            if handle.request.watch:
                columns["watched"] = found["watched"][slot, :, : len(handle.request.watch)].tolist()
            if TOPS in handle.request.record:
                pairs = zip(found["top_id"][slot].tolist(), found["top"][slot].tolist())
                columns["top"] = [list(zip(*pair)) for pair in pairs]
            routed = None
            if experts is not None and EXPERTS in handle.request.record:
                routed = experts[:, slot, :n]
            used += handle.take(columns, routed)
            self._tokens[slot], self._positions[slot] = found["tokens"][slot, -1], self._positions[slot] + n
            if handle.ended:
                line.seats[slot] = None
        self.timing.used += used
        self.timing.row_steps += n * B
        return [handle for _, handle in live], used

    def _settings(self, live: Sequence[tuple[int, Handle]]) -> SamplingArrays:
        """The settings, with the tokens to watch and the change of logits where a request has any."""
        more: dict[str, Any] = {}
        B, V = len(self._tokens), self.model.cfg.vocab_size
        if most := max(len(handle.request.watch) for _, handle in live):
            more["watch_WB"] = watch_WB = np.zeros((most, B), np.int32)
            for slot, handle in live:
                watch_WB[: len(handle.request.watch), slot] = handle.request.watch
        if any(handle.request.sampling.shifts for _, handle in live):
            rows = {b: (h.request.sampling, h.request.prompt, h.answer.tokens) for b, h in live}
            more["shift"] = Shift.of(rows, B, V)
        return dataclasses.replace(self._params, **more)

    def decode(self, state, done_B, params, stops_BK, steps, enough, width, mode, record):
        """A dispatch of the compiled decode loop, see programs.py."""
        args = (done_B, params, stops_BK, np.int32(steps), np.int32(enough))
        return self.decoder(state, args, {"width": width, "mode": mode, "record": record})


@functools.partial(jax.jit, static_argnames=("batch", "capacity", "cache_dtype", "form"))
def _empty(model: DeepSeek, batch: int, capacity: int, cache_dtype: str, form: forms.Form) -> Caches:
    """Caches of no sequences yet, as the decode step takes them."""
    return form.split(model.init_caches(batch, capacity, cache_dtype, model.strategy.decode))


@functools.partial(jax.jit, static_argnames="rules")
def _placed(arrays: Any, rules: Any) -> Any:
    return jax.tree.map(lambda a: rules.shard(a, "batch"), arrays)
