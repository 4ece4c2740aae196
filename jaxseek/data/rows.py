"""Pack examples into rows of `length` tokens, with a state that resumes at exactly the next row.

grain provides the order: reshuffled each epoch from the seed, repeated, tokenised ahead in threads. It is the
same on every host, and each puts its part of a batch on its devices. Rows are made in groups: one row, or
several for the `fit` layout. A state is the position in the order at which the current group begins, and the
number of its rows already returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from jaxseek.config.model import ConfigError
from jaxseek.data.encode import Encoded

WINDOW = 64  # rows packed together: more leave less padding but take longer to resume
Row = dict[str, Any]  # numpy arrays


class Item(NamedTuple):
    """An example: its index in the data set and its parts (two for a pair, none if it is unusable)."""

    number: int
    parts: tuple[Encoded, ...]
    too_long: bool


class Items(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Item: ...


class Rows:
    """Iterator of rows; create it with `open_rows`.

    layout: `concatenate` (documents end to end, split at row ends), `fit` (several whole examples per row),
    `single` (one example per row) or `pair` (two sequences per row).
    """

    def __init__(
        self,
        items: Items,
        layout: str,
        length: int,
        pad: int,
        seed: int,
        shuffle: bool,
        repeat: bool,
    ):
        self._layout, self._length, self._pad = layout, length, pad
        self._seed, self._shuffle = seed % 2**32, shuffle
        self._examples = len(items)
        order = grain.MapDataset.source(items).seed(self._seed)  # pyright: ignore[reportArgumentType]
        order = order.shuffle() if shuffle else order
        order = order.repeat() if repeat else order
        options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=32)
        self._items = iter(order.to_iter_dataset(options))
        self._taken = 0  # items consumed
        self._too_long = 0
        self._pending: Item | None = None  # consumed, but belongs to the next group
        self._offset = 0  # tokens of it already in rows
        self._group: list[Row] = []
        self._returned = 0
        self._begin = self._here()

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        """Return tokens, segments (int32, 0 is padding) and weights (float32), all [T].

        A pair has [2, T] and the example's index.
        """
        if self._returned == len(self._group):
            self._next_group()
        if not self._group:
            raise StopIteration
        self._returned += 1
        return self._group[self._returned - 1]

    @property
    def counts(self) -> dict[str, float]:
        """`examples` in the set, `epoch` (passes so far, a fraction), `too_long` (dropped or cut so far)."""
        epoch = self._here()["taken"] / self._examples
        return {"examples": self._examples, "epoch": epoch, "too_long": self._too_long}

    def get_state(self) -> dict[str, Any]:
        """Return the position of the next row, as plain numbers; valid only for this data."""
        done = self._returned == len(self._group)
        place = self._here() if done else self._begin
        return {**place, "given": 0 if done else self._returned, **self._belongs_to()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume at a state from `get_state`. Raises ConfigError for the state of other data."""
        for key, ours in self._belongs_to().items():
            if state[key] != ours:
                raise ConfigError(
                    f"the saved place in the data has {key} {state[key]}, and now {key} is {ours}; go on "
                    "with the data that the run was started with, or start a new run"
                )
        self._items.set_state({"next_index": state["taken"]})
        self._taken, self._too_long = state["taken"], state["too_long"]
        self._pending, self._offset = None, state["offset"]
        self._group, self._returned = [], 0
        if state["given"]:
            self._next_group()
            self._returned = state["given"]

    def close(self) -> None:
        """Stop the threads."""
        self._items.close()

    def _belongs_to(self) -> dict[str, Any]:
        return {"examples": self._examples, "length": self._length}

    def _here(self) -> dict[str, int]:
        """Return the position before the pending item, if any."""
        pending, too_long = self._pending is not None, self._pending is not None and self._pending.too_long
        return {"taken": self._taken - pending, "too_long": self._too_long - too_long, "offset": self._offset}

    def _next_group(self) -> None:
        self._begin = self._here()
        self._returned = 0
        match self._layout:
            case "concatenate":
                self._group = [self._row(pieces) for pieces in [self._concatenated()] if pieces]
            case "fit":
                self._group = [self._row(pieces) for pieces in self._fitted()]
            case "single":
                self._group = [self._row(item.parts) for item in [self._take()] if item]
            case "pair":
                self._group = [self._pair(item) for item in [self._take()] if item]

    def _take(self) -> Item | None:
        """Return the next usable item, or None at the end. Raises ConfigError if none is usable."""
        if self._pending is not None:
            item, self._pending = self._pending, None
            return item
        unused = 0
        for item in self._items:
            self._taken += 1
            self._too_long += item.too_long
            if item.parts:
                return item
            unused += 1
            if unused > self._examples:
                break
        if unused > self._examples or (unused and unused == self._taken):
            raise ConfigError(
                f"none of the {self._examples} examples can be used: {self._too_long} are longer than "
                f'data.length {self._length}; raise it, or set data.too_long = "cut"'
            )
        return None

    def _concatenated(self) -> list[Encoded]:
        """Return pieces that fill a row; the last document continues in the next row."""
        pieces, room = [], self._length
        while room and (item := self._take()):
            whole = item.parts[0]
            end = min(self._offset + room, len(whole.tokens))
            pieces.append(Encoded(whole.tokens[self._offset : end], whole.weights[self._offset : end]))
            room -= end - self._offset
            self._pending, self._offset = (item, end) if end < len(whole.tokens) else (None, 0)
        return pieces

    def _fitted(self) -> list[list[Encoded]]:
        """Pack examples for WINDOW rows, or up to the end of the epoch, best fit decreasing.

        The longest example comes first, each in the row where it leaves the least room.
        """
        examples, room, epoch = [], WINDOW * self._length, None
        while room > 0 and (item := self._take()):
            at = (self._taken - 1) // self._examples
            if at != (epoch := at if epoch is None else epoch):
                self._pending = item
                break
            examples.append(item.parts[0])
            room -= len(item.parts[0].tokens)
        rows, rooms = [], []
        for i in sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens)):
            need = len(examples[i].tokens)
            fits = [(left, row) for row, left in enumerate(rooms) if left >= need]
            left, row = min(fits, default=(self._length, len(rows)))
            if row == len(rows):
                rows.append([])
                rooms.append(left)
            rows[row].append(i)
            rooms[row] -= need
        order = np.random.default_rng((self._seed, self._begin["taken"])).permutation(len(rows))
        rows = [rows[i] for i in order] if self._shuffle else sorted(map(sorted, rows))
        return [[examples[i] for i in sorted(row)] for row in rows]

    def _row(self, pieces: Sequence[Encoded]) -> Row:
        """Join pieces into one padded row; the first token of a piece has no context and weight 0."""
        row = {
            "tokens": np.full(self._length, self._pad, np.int32),
            "segments": np.zeros(self._length, np.int32),
            "weights": np.zeros(self._length, np.float32),
        }
        end = 0
        for segment, piece in enumerate(pieces, 1):
            begin, end = end, end + len(piece.tokens)
            row["tokens"][begin:end] = piece.tokens
            row["segments"][begin:end] = segment
            row["weights"][begin + 1 : end] = piece.weights[1:]
        return row

    def _pair(self, item: Item) -> Row:
        rows = [self._row([part]) for part in item.parts]
        pair = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        return pair | {"index": np.int32(item.number)}
