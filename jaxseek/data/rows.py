"""Examples in order, laid into rows of `length` tokens, with a state that takes up exactly where it was.

The order is grain's: shuffled anew each epoch from the seed, repeated, tokenised ahead in threads. It is the
same on every host, which puts its part of each batch on its devices. Rows come in groups: one row, or several
where examples are fitted into rows. A state is the place in the order where the group begins, and how many of
its rows were given out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from jaxseek.config.model import ConfigError
from jaxseek.data.encode import Encoded

WINDOW = 64  # rows that are fitted together; more leave less padding and take longer to resume
Row = dict[str, Any]  # of numpy arrays


class Item(NamedTuple):
    """An example: its place in the data set and its parts (a pair has two, one that cannot be used none)."""

    number: int
    parts: tuple[Encoded, ...]
    too_long: bool


class Items(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Item: ...


class Rows:
    """An iterator of rows; `open_rows` makes one.

    layout: `concatenate` (documents one after the other, cut at row ends), `fit` (whole examples, several to
    a row), `single` (one to a row) or `pair` (one to a row of two).
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
        self._held: Item | None = None  # taken, but for the next group
        self._offset = 0  # tokens of it that are in rows already
        self._group: list[Row] = []
        self._given = 0
        self._begin = self._here()

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        """tokens and segments (0: padding) int32, weights float32, all [T]; of a pair [2, T], and index."""
        if self._given == len(self._group):
            self._next_group()
        if not self._group:
            raise StopIteration
        self._given += 1
        return self._group[self._given - 1]

    @property
    def counts(self) -> dict[str, float]:
        """examples: in the set; epoch: how often it was gone through; too_long: so far dropped or cut."""
        epoch = self._here()["taken"] / self._examples
        return {"examples": self._examples, "epoch": epoch, "too_long": self._too_long}

    def get_state(self) -> dict[str, Any]:
        """Where the next row is; of plain numbers. It belongs to this data."""
        done = self._given == len(self._group)
        place = self._here() if done else self._begin
        return {**place, "given": 0 if done else self._given, **self._belongs_to()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where `get_state` was called. Raises ConfigError for the state of other data."""
        for key, ours in self._belongs_to().items():
            if state[key] != ours:
                raise ConfigError(
                    f"the saved place in the data has {key} {state[key]}, and now {key} is {ours}; go on "
                    "with the data that the run was started with, or start a new run"
                )
        self._items.set_state({"next_index": state["taken"]})
        self._taken, self._too_long = state["taken"], state["too_long"]
        self._held, self._offset = None, state["offset"]
        self._group, self._given = [], 0
        if state["given"]:
            self._next_group()
            self._given = state["given"]

    def close(self) -> None:
        """Stops the threads."""
        self._items.close()

    def _belongs_to(self) -> dict[str, Any]:
        return {"examples": self._examples, "length": self._length}

    def _here(self) -> dict[str, int]:
        """The place before the item that is held, if any."""
        held, too_long = self._held is not None, self._held is not None and self._held.too_long
        return {"taken": self._taken - held, "too_long": self._too_long - too_long, "offset": self._offset}

    def _next_group(self) -> None:
        self._begin = self._here()
        self._given = 0
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
        """The next item that can be used, or None at the end."""
        if self._held is not None:
            item, self._held = self._held, None
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
        """Pieces that fill a row; the last document goes on in the next."""
        pieces, room = [], self._length
        while room and (item := self._take()):
            whole = item.parts[0]
            end = min(self._offset + room, len(whole.tokens))
            pieces.append(Encoded(whole.tokens[self._offset : end], whole.weights[self._offset : end]))
            room -= end - self._offset
            self._held, self._offset = (item, end) if end < len(whole.tokens) else (None, 0)
        return pieces

    def _fitted(self) -> list[list[Encoded]]:
        """Rows of whole examples, enough for WINDOW rows or to the end of the epoch: longest first, each in
        the row where it leaves the least room.
        """
        examples, room, epoch = [], WINDOW * self._length, None
        while room > 0 and (item := self._take()):
            at = (self._taken - 1) // self._examples
            if at != (epoch := at if epoch is None else epoch):
                self._held = item
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
        """The pieces side by side. The first token of a piece follows nothing, so it is no target."""
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
