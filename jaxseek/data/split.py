"""Split records into training and evaluation, and check that they fit the objective."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxseek.config.model import ConfigError
from jaxseek.config.run import DataConfig, RunConfig
from jaxseek.data.examples import Talk, conversation, document, is_chat, preference, prompt
from jaxseek.data.sources import Joined, Record, Records, open_sources

CHECKED = 10_000  # records checked on opening; others are checked when read


class Part:
    """A subset of the records, at `indices`; `kind` is pretrain, sft, dpo or prompts."""

    def __init__(self, records: Records, indices: np.ndarray, kind: str):
        self._records, self.indices, self.kind = records, indices, kind

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Record:
        return self._records[int(self.indices[i])]

    def place(self, i: int) -> str:
        return self._records.place(int(self.indices[i]))


class Prompts(Sequence[Talk]):
    """The messages of each example before the answer, in file order."""

    def __init__(self, part: Part, data: DataConfig):
        self._part, self._data = part, data

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, i: int) -> Talk:  # pyright: ignore[reportIncompatibleMethodOverride]
        i = range(len(self))[i]
        return prompt(self._part[i], self._data, self._part.place(i))


def open_split(cfg: RunConfig, split: str, kind: str = "") -> Part | None:
    """Open the training records, or the evaluation ones: data.eval, or the held-out part of data.train.

    `kind` is the use that the records must serve, by default the objective. Returns None if there are no
    evaluation records. Raises ConfigError if one of the first 10,000 records, or the first of a file, lacks
    what that use needs.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split is {split!r}, expected train or eval")
    data = cfg.data
    separate = split == "eval" and bool(data.eval)
    if split == "eval" and not separate and not data.holdout:
        return None
    records = open_sources(data.eval if separate else data.train, "data.eval" if separate else "data.train")
    kind = kind or _kind(cfg, records)
    _check(records, kind, data)
    held_out = np.zeros(len(records), bool)
    if data.holdout and not data.eval:
        held_out[shuffled(len(records))[: max(1, round(data.holdout * len(records)))]] = True
        if held_out.all():
            raise ConfigError(
                f"data.holdout {data.holdout} of {len(records)} examples leaves none to train on; lower it"
            )
    return Part(records, np.flatnonzero(held_out if split == "eval" and not separate else ~held_out), kind)


def shuffled(n: int) -> np.ndarray:
    """Return a fixed permutation of range(n), sorted by hash (splitmix64)."""
    z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


def _kind(cfg: RunConfig, records: Records) -> str:
    if cfg.objective == "distill":
        return "sft" if is_chat(records[0], cfg.data) else "pretrain"
    return cfg.objective


def _check(records: Joined, kind: str, data: DataConfig) -> None:
    for i in sorted({*range(min(CHECKED, len(records))), *records.starts} - {len(records)}):
        texts(records[i], kind, data, records.place(i))


def texts(record: Record, kind: str, data: DataConfig, place: str) -> list[str]:
    """Return all text of a record that training uses. Raises ConfigError if a column is missing or wrong."""
    match kind:
        case "pretrain":
            return [document(record, data, place)]
        case "sft":
            talk = conversation(record, data, place)
        case "prompts":
            talk = prompt(record, data, place)
        case _:
            chosen, rejected = preference(record, data, place)
            talk = [*chosen, rejected[-1]]
    return [message["content"] or "" for message in talk]
