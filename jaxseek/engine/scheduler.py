"""Scheduling in pure Python: the prompts to read next, their chunks, and the slots of answers.

On a mesh every part of the batch has its own slots and reads its own prompts, so that no cache moves.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxseek.engine.request import EXPERTS, PROMPT, Handle

# Tokens that are read at a time: few sizes, so that few programs serve all prompts. Those of later chunks are
# compiled for every capacity of the cache that they attend to.
FIRST, REST = (16, 64, 128, 256, 1024), (64, 256, 1024)
LANES = (1, 4, 8, 16)  # prompts that each part reads side by side, where they are short


def rounded(n: int, sizes: Sequence[int]) -> int:
    """The least size that holds `n`, if `n` fills three quarters of it; else the greatest below `n`."""
    above = next((size for size in sizes if size >= n), None)
    if above is not None and (4 * n > 3 * above or above == sizes[0]):
        return above
    return max(size for size in sizes if size < n)


def chunks(n: int, columns: int = 1) -> list[int]:
    """Sizes of the chunks that `n` tokens are read in, multiples of `columns`; only the last is padded."""
    first, rest = (sorted({size + -size % columns for size in sizes}) for sizes in (FIRST, REST))
    if n <= rest[0]:
        return [size for size in first if size >= n][:1] if n else []
    plan = [rounded(n, first)]
    while (left := n - sum(plan)) > 0:
        fits = [size for size in rest if left >= 2 * size]
        plan.append(rest[-1] if 4 * left > 3 * rest[-1] else max(fits, default=rest[0]))
    return plan


def lanes(prompts: int, plan: Sequence[int]) -> int:
    """Number of these prompts to read side by side in such chunks."""
    most = FIRST[-1] // plan[0] if plan else LANES[-1]
    return rounded(prompts, [n for n in LANES if n <= max(1, most)])


class Prompt:
    """A tokenised prompt, and the requests for it that have no slot yet.

    Its last token is not read but fed to the first decode step, which makes the first new token.
    """

    def __init__(self, tokens: list[int]):
        self.tokens, self.waiting = tokens, collections.deque[Handle]()
        self.routed: list[np.ndarray] = []  # experts of its tokens, where recorded
        self.scores: list[tuple[float, int, float]] = []  # as in Answer.prompt, where recorded

    @property
    def to_read(self) -> int:
        return len(self.tokens) - 1

    @property
    def need(self) -> int:
        """Cache slots that its longest answer takes."""
        return max((len(self.tokens) + handle.budget for handle in self.waiting), default=0)


class Reading:
    """Prompts that are read side by side: `lanes` rows for each part, read in the chunks of the longest."""

    def __init__(self, lanes: list[list[Prompt]], width: int, plan: list[int]):
        self.lanes, self.width, self.plan, self.start = lanes, width, plan, 0
        self.caches: Any = None
        prompts = [p for lane in lanes for p in lane]
        recorded = {name for p in prompts for h in p.waiting for name in h.request.record}
        self.records_experts, self.records_scores = EXPERTS in recorded, PROMPT in recorded

    @property
    def rows(self) -> Iterator[tuple[int, Prompt]]:
        """Row and prompt of each."""
        for part, lane in enumerate(self.lanes):
            yield from ((part * self.width + i, prompt) for i, prompt in enumerate(lane))

    @property
    def waited_for(self) -> bool:
        """True while a request for one of these prompts has no slot yet."""
        return any(prompt.waiting for _, prompt in self.rows)


class Scheduler:
    """The queue, the prompts that are read, and the slots; a slot b belongs to part b // (slots / parts)."""

    def __init__(self, parts: int, slots: int, columns: int = 1):
        self.parts, self.columns = parts, columns
        self.seats: list[Handle | None] = [None] * slots
        self.queue: collections.deque[Prompt] = collections.deque()
        self.reading: Reading | None = None  # the one that is being read
        self.read: list[Reading] = []  # with requests left that have no slot yet
        self._shared: dict[bytes, Prompt] = {}

    @property
    def live(self) -> int:
        """Slots in use."""
        return sum(seat is not None for seat in self.seats)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return sum(len(prompt.waiting) for prompt in self._prompts())

    @property
    def need(self) -> int:
        """Cache slots that the longest of those waiting takes."""
        return max((prompt.need for prompt in self._prompts()), default=0)

    def _prompts(self) -> list[Prompt]:
        return [*self.queue, *(prompt for reading in self._taken() for _, prompt in reading.rows)]

    def _taken(self) -> list[Reading]:
        return [*self.read, *([self.reading] if self.reading else [])]

    def add(self, handle: Handle) -> None:
        """Queue a request; one for a prompt that still has others waiting joins them."""
        tokens = list(handle.request.prompt)
        key = np.array(tokens, np.int64).tobytes() + repr(handle.request.record).encode()
        prompt = self._shared.get(key)
        if prompt is None or not prompt.waiting:
            prompt = self._shared[key] = Prompt(tokens)
            self.queue.append(prompt)
        prompt.waiting.append(handle)

    def remove(self, handle: Handle) -> None:
        """Forget a request, wherever it is."""
        self.seats = [None if seat is handle else seat for seat in self.seats]
        for prompt in self._shared.values():
            if handle in prompt.waiting:
                prompt.waiting.remove(handle)
        self._tidy()

    def clear(self) -> list[Handle]:
        """Forget all requests; returns them."""
        found = [seat for seat in self.seats if seat is not None]
        found += [handle for prompt in self._prompts() for handle in prompt.waiting]
        self.seats, self.reading, self.read = [None] * len(self.seats), None, []
        self.queue.clear()
        self._shared.clear()
        return found

    def free(self, part: int) -> list[int]:
        """Free slots of a part."""
        each = len(self.seats) // self.parts
        return [b for b in range(part * each, (part + 1) * each) if self.seats[b] is None]

    def wanted(self) -> list[int]:
        """Free slots of each part that no prompt is read for."""
        return [
            len(self.free(part)) - sum(len(p.waiting) for r in self._taken() for p in r.lanes[part])
            for part in range(self.parts)
        ]

    def next_reading(self, unit: int) -> Reading | None:
        """Take prompts from the queue for free slots: the first, and others that are no longer than its
        chunks and not much shorter. Each part reads a multiple of `unit` rows."""
        wanted = self.wanted()
        if not self.queue or max(wanted) <= 0:
            return None
        plan = chunks(self.queue[0].to_read, self.columns)
        room = sum(plan)
        fitting = [
            p
            for p in self.queue
            if p.to_read <= room <= 2 * sum(chunks(p.to_read, self.columns)) or p is self.queue[0]
        ]
        some, left = [], list(wanted)
        for prompt in fitting:
            part = max(range(self.parts), key=lambda part: left[part])
            if left[part] <= 0:
                break
            left[part] -= len(prompt.waiting)
            some.append(prompt)
        share = -(-len(some) // (self.parts * unit))
        width = unit * lanes(share, plan)
        taken: list[list[Prompt]] = [[] for _ in range(self.parts)]
        for prompt in some:
            open_ = [part for part in range(self.parts) if len(taken[part]) < width and wanted[part] > 0]
            if not open_:
                break
            part = max(open_, key=lambda part: wanted[part])
            wanted[part] -= len(prompt.waiting)
            taken[part].append(prompt)
            self.queue.remove(prompt)
        return Reading(taken, width, plan)

    def seat(self, reading: Reading) -> list[tuple[int, int, Prompt, Handle]]:
        """Give free slots to requests for these prompts: (slot, row, prompt, handle) of each."""
        found = []
        free = [collections.deque(self.free(part)) for part in range(self.parts)]
        for row, prompt in reading.rows:
            slots = free[row // reading.width]
            while slots and prompt.waiting:
                slot, handle = slots.popleft(), prompt.waiting.popleft()
                self.seats[slot] = handle
                found.append((slot, row, prompt, handle))
        self._tidy()
        return found

    def _tidy(self) -> None:
        """Let go of what nobody waits for."""
        self.queue = collections.deque(p for p in self.queue if p.waiting)
        self.read = [reading for reading in self.read if reading.waited_for]
        if self.reading is not None and not self.reading.waited_for:
            self.reading = None
        self._shared = {key: p for key, p in self._shared.items() if p.waiting}
