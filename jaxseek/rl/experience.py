"""Sampled answers as a batch to learn from: packed into rows, every token with its advantage and its share.

What is known of a token stands where it is predicted, one position before it, as in train/batch.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxseek.model import DeepSeek
from jaxseek.rl.rollout import Episode
from jaxseek.run_config import RunConfig
from jaxseek.train.batch import Batch, make_batch, to_devices


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyBatch(Batch):
    """Rows of answers. `weights_BJT` are tokens' shares in the loss, `mask_BT` is 1 where they count.

    `sampled` are log-probabilities as recorded while sampling, `drawn` of what was drawn from, `old` and
    `reference` as computed by the trainer (None: not wanted). `experts_BTLK` are those that the rollout used,
    -1 where it did not say.
    """

    mask_BT: Any = None
    advantage_BT: Any = None
    sampled_BT: Any = None
    drawn_BT: Any = None
    old_BT: Any = None
    reference_BT: Any = None
    experts_BTLK: Any = None


@dataclass(frozen=True)
class Shapes:
    """Of a run's batches, so that one program serves all: microbatches, rows of each, and their length."""

    microbatches: int
    rows: int
    length: int
    segments: int  # answers in a row at most

    @classmethod
    def of(cls, run: RunConfig, rows_multiple: int, length_multiple: int) -> Shapes:
        """`multiple`s: what the mesh divides."""
        answers = run.rollout.prompts * run.grpo.group_size // run.grpo.minibatches
        answers = -(-answers // run.batch.accumulation)
        longest = run.rollout.max_prompt_tokens + run.rollout.max_new_tokens
        side_by_side = 2 if answers % 2 == 0 else 1  # of the longest; packs shorter ones better
        rows, length = answers // side_by_side, side_by_side * longest
        step = int(np.lcm(16, length_multiple))
        return cls(
            run.batch.accumulation, rows + -rows % rows_multiple, length + -length % step, MOST_IN_A_ROW
        )


MOST_IN_A_ROW = 8  # the cost of ratios of sequences grows with it


def pack(lengths: list[int], length: int, segments: int) -> list[list[int]]:
    """Which answers share a row: longest first, each into the fullest row that has room (best fit)."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [r for r in range(len(rows)) if room[r] >= lengths[i] and len(rows[r]) < segments]
        if fits:
            best = min(fits, key=lambda r: room[r])
        else:
            best = len(rows)
            rows.append([])
            room.append(length)
        rows[best].append(i)
        room[best] -= lengths[i]
    return rows


def make_policy_batch(
    episodes: list[Episode],
    shares_N: np.ndarray,
    known: dict[str, list[Any]],
    shapes: Shapes,
    model: DeepSeek,
    experts: bool,
) -> PolicyBatch:
    """A minibatch on the model's mesh, of each answer's share in the loss (for each of its tokens).

    `known` may have "advantage", "drawn", "old" and "reference", each with a number or one per token of every
    answer. An answer whose share is 0 takes no part, nor in the metrics. Every host calls it with all.
    """
    A, R, T = shapes.microbatches, shapes.rows, shapes.length
    tokens, segments = np.zeros((A * R, T), np.int32), np.zeros((A * R, T), np.int32)
    wanted = (name for name in ("drawn", "old", "reference") if name in known)
    names = ("weights", "mask", "sampled", "advantage", *wanted)
    table = {name: np.zeros((A * R, T), np.float32) for name in names}
    chosen = None
    if experts:
        layers, K = model.sparse_layers, model.cfg.num_experts_per_tok
        chosen = np.full((A * R, T, layers, K), -1, np.int32)
    for i, (r, number, at) in enumerate(places := _places(episodes, shapes)):
        episode = episodes[i]
        begin, end = at + len(episode.prompt), at + _length(episode)
        tokens[r, at:end] = [*episode.prompt, *episode.sampled.tokens]
        segments[r, at:end] = number
        own = {name: lists[i] for name, lists in known.items()}
        own |= {
            "weights": shares_N[i],
            "mask": shares_N[i] > 0,
            "sampled": episode.sampled.tempered,
        }
        for name, value in own.items():
            table[name][r, begin:end] = value
        if chosen is not None and episode.sampled.experts is not None:
            chosen[r, at : end - 1] = episode.sampled.experts.transpose(1, 0, 2)
    base = make_batch(tokens, segments, table.pop("weights"), model.cfg.num_nextn_predict_layers, A)
    arrays: dict[str, Any] = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    arrays |= {f"{name}_BT": _ahead(x_BT).reshape(A, R, T) for name, x_BT in table.items()}
    placed: Any = to_devices(_own_rows(PolicyBatch(**arrays)), model)
    if chosen is not None:
        spec = P(None, *model.strategy.train.spec("batch", "length", None, None))
        own = _own_rows(chosen.reshape(A, R, *chosen.shape[1:]))
        experts_BTLK = jax.make_array_from_process_local_data(NamedSharding(model.mesh, spec), own)
        placed = dataclasses.replace(placed, experts_BTLK=experts_BTLK)
    count = np.int32(-(-max((1 + r for r, *_ in places), default=0) // R))
    return dataclasses.replace(placed, count=jax.device_put(count, NamedSharding(model.mesh, P())))


def answers_of(x_ABT: np.ndarray, episodes: list[Episode], shapes: Shapes) -> list[np.ndarray]:
    """What a batch of these answers made of each of their tokens, such as log-probabilities."""
    x_BT, out = x_ABT.reshape(-1, shapes.length), []
    for episode, (r, _, at) in zip(episodes, _places(episodes, shapes)):
        out.append(x_BT[r, at + len(episode.prompt) - 1 : at + _length(episode) - 1])
    return out


def _places(episodes: list[Episode], shapes: Shapes) -> list[tuple[int, int, int]]:
    """Of each answer: its row, its number in it (from 1), and where it begins."""
    places: dict[int, tuple[int, int, int]] = {}
    for r, row in enumerate(pack([_length(e) for e in episodes], shapes.length, shapes.segments)):
        at = 0
        for number, i in enumerate(row, 1):
            places[i] = (r, number, at)
            at += _length(episodes[i])
    return [places[i] for i in range(len(episodes))]


def _length(episode: Episode) -> int:
    return len(episode.prompt) + len(episode.sampled.tokens)


def _ahead(x_BT: np.ndarray) -> np.ndarray:
    """From a token's own position to that where it is predicted."""
    return np.pad(x_BT[:, 1:], ((0, 0), (0, 1)))


def _own_rows(batch: Any) -> Any:
    """This host's part of every microbatch, of one array or more."""
    host, hosts = jax.process_index(), jax.process_count()
    return jax.tree.map(lambda a: np.split(a, hosts, axis=1)[host], batch)
