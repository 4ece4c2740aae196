"""Pack sampled answers into a batch of rows to learn from, with an advantage and a share for every token.

Answers to one prompt share it: the prompt is in the row once, and each answer continues from it. Values of a
token are stored where it is predicted, one position earlier, as in train/batch.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxseek.config.run import RunConfig
from jaxseek.model.deepseek import DeepSeek
from jaxseek.rl.rollout import Episode
from jaxseek.train.batch import Batch, make_batch, to_devices, to_mesh


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyBatch(Batch):
    """Rows of answers. `weights_BJT` are the tokens' shares in the loss; `mask_BT` is 1 where they count.

    `sampled` are sampling log-probs as recorded, `drawn` those under the distribution drawn from, `old` and
    `reference` those that the trainer computed (None: not needed). `experts_BTLK` are the experts that the
    rollout used, -1 where it did not record them.
    """

    mask_BT: Any = None
    advantage_BT: Any = None
    sampled_BT: Any = None
    drawn_BT: Any = None
    old_BT: Any = None
    reference_BT: Any = None
    experts_BTLK: Any = None


MOST_IN_A_ROW = 16  # answers; the cost of sequence ratios grows with it


@dataclass(frozen=True)
class Shapes:
    """Shapes of a run's batches, constant so that one program serves all."""

    microbatches: int
    rows: int
    length: int
    segments: int = MOST_IN_A_ROW  # most answers in a row

    @classmethod
    def of(cls, run: RunConfig, rows_multiple: int, length_multiple: int) -> Shapes:
        """Return shapes with room for answers of full length.

        `rows_multiple` and `length_multiple` are the parts into which the mesh splits rows and length.
        """
        answers = run.rollout.prompts * run.grpo.group_size // run.grpo.minibatches
        answers = -(-answers // run.batch.accumulation)
        prompt, new = run.rollout.max_prompt_tokens, run.rollout.max_new_tokens
        in_a_row = _answers_per_prompt(run, answers // rows_multiple)
        if in_a_row > 1:
            length = prompt - 1 + in_a_row * (1 + new)
        else:
            # Room for two of the longest packs shorter ones better, unless parts of the mesh get no row.
            in_a_row = 2 if answers % 2 == 0 and answers // 2 >= rows_multiple else 1
            length = in_a_row * (prompt + new)
        rows, step = -(-answers // in_a_row), int(np.lcm(16, length_multiple))
        return cls(run.batch.accumulation, rows + -rows % rows_multiple, length + -length % step)


def _answers_per_prompt(run: RunConfig, most: int) -> int:
    """Return how many answers of a group share a prompt in a row; 1 if minibatches split groups.

    Enough that the prompt is a small part of the row, but at most `most`, which leaves every device a row.
    """
    if run.grpo.minibatches > 1:
        return 1
    group, enough = run.grpo.group_size, 4 * run.rollout.max_prompt_tokens / (1 + run.rollout.max_new_tokens)
    possible = [n for n in range(1, min(most, MOST_IN_A_ROW) + 1) if group % n == 0]
    return next((n for n in possible if n >= enough), max(possible, default=1))


@dataclass(frozen=True)
class Place:
    """Position of an answer: its row, its segment and where it begins, and the same for its prefix.

    The last token of the prompt, which predicts the answer's first, belongs to each answer. The prompt before
    it is the prefix, which answers to one prompt share; it is empty if the prompt has one token.
    """

    row: int
    segment: int
    begin: int
    prefix: int
    prefix_begin: int


def pack(
    prompts: list[tuple[int, ...]], news: list[int], length: int, segments: int
) -> list[list[list[int]]]:
    """Group answers that share a prompt into bundles, and bundles into rows: rows of bundles of answers."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    bundles: list[list[int]] = []
    for prompt, own in groups.items():
        room = length - (len(prompt) - 1)
        parts = _best_fit([1 + news[i] for i in own], [1] * len(own), room, segments)
        bundles += [[own[j] for j in part] for part in parts]
    sizes = [len(prompts[own[0]]) - 1 + sum(1 + news[i] for i in own) for own in bundles]
    rows = _best_fit(sizes, [len(own) for own in bundles], length, segments)
    return [[bundles[j] for j in row] for row in rows]


def _best_fit(sizes: list[int], counts: list[int], length: int, most: int) -> list[list[int]]:
    """Fill bins of at most `length` and `most` entries: largest first, each into the fullest with room."""
    bins: list[list[int]] = []
    room: list[int] = []
    left: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = [b for b in range(len(bins)) if room[b] >= sizes[i] and left[b] >= counts[i]]
        if fits:
            best = min(fits, key=lambda b: room[b])
        else:
            best = len(bins)
            bins.append([])
            room.append(length)
            left.append(most)
        bins[best].append(i)
        room[best] -= sizes[i]
        left[best] -= counts[i]
    return bins


def make_policy_batch(
    episodes: list[Episode],
    shares_N: np.ndarray,
    known: dict[str, list[Any]],
    shapes: Shapes,
    model: DeepSeek,
    experts: bool,
) -> PolicyBatch:
    """Build a minibatch on the model's mesh; `shares_N` is each answer's share in the loss, per token.

    `known` may have "advantage", "drawn", "old" and "reference", each with one number, or one per token, for
    every answer. An answer with share 0 does not take part, nor in the metrics. Every host calls this with
    all answers.
    """
    A, R, T = shapes.microbatches, shapes.rows, shapes.length
    tokens, segments = np.zeros((A * R, T), np.int32), np.zeros((A * R, T), np.int32)
    prefixes, skipped = np.zeros_like(segments), np.zeros_like(segments)
    wanted = (name for name in ("drawn", "old", "reference") if name in known)
    names = ("weights", "mask", "sampled", "advantage", *wanted)
    table = {name: np.zeros((A * R, T), np.float32) for name in names}
    chosen = None
    if experts:
        layers, K = model.sparse_layers, model.cfg.num_experts_per_tok
        chosen = np.full((A * R, T, layers, K), -1, np.int32)
    places = _places(episodes, shapes)
    for i, place in enumerate(places):
        episode, r, at = episodes[i], place.row, place.begin
        before, end = len(episode.prompt) - 1, at + 1 + len(episode.sampled.tokens)
        shared = slice(place.prefix_begin, place.prefix_begin + before)
        tokens[r, shared] = episode.prompt[:-1]
        tokens[r, at:end] = [episode.prompt[-1], *episode.sampled.tokens]
        segments[r, shared], segments[r, at:end] = place.prefix, place.segment
        prefixes[r, shared] = prefixes[r, at:end] = place.prefix
        skipped[r, at:end] = before
        if chosen is not None and episode.sampled.experts is not None:
            experts_TLK = episode.sampled.experts.transpose(1, 0, 2)
            chosen[r, shared], chosen[r, at : end - 1] = experts_TLK[:before], experts_TLK[before:]
        own = {name: lists[i] for name, lists in known.items()}
        own |= {
            "weights": shares_N[i],
            "mask": shares_N[i] > 0,
            "sampled": episode.sampled.tempered,
        }
        for name, value in own.items():
            table[name][r, at + 1 : end] = value
    base = make_batch(tokens, segments, table.pop("weights"), model.cfg.num_nextn_predict_layers, A)
    arrays: dict[str, Any] = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    arrays["positions_BT"] = base.positions_BT + skipped.reshape(A, R, T)
    arrays["prefixes_BT"] = prefixes.reshape(A, R, T)
    arrays |= {f"{name}_BT": _ahead(x_BT).reshape(A, R, T) for name, x_BT in table.items()}
    placed: Any = to_devices(PolicyBatch(**arrays), model)
    if chosen is not None:
        spec = P(None, *model.strategy.train.spec("batch", "length", None, None))
        experts_BTLK = to_mesh(chosen.reshape(A, R, *chosen.shape[1:]), model, spec)
        placed = dataclasses.replace(placed, experts_BTLK=experts_BTLK)
    count = np.int32(-(-max((1 + place.row for place in places), default=0) // R))
    return dataclasses.replace(placed, count=to_mesh(np.asarray(count), model, P()))


def answers_of(x_ABT: np.ndarray, episodes: list[Episode], shapes: Shapes) -> list[np.ndarray]:
    """Extract the values of each answer's tokens from an array of the batch's shape, such as log-probs."""
    x_BT, out = x_ABT.reshape(-1, shapes.length), []
    for episode, place in zip(episodes, _places(episodes, shapes)):
        out.append(x_BT[place.row, place.begin : place.begin + len(episode.sampled.tokens)])
    return out


def _places(episodes: list[Episode], shapes: Shapes) -> list[Place]:
    """Place each answer. Answers are numbered from 1 in every row, prefixes from `segments` + 1."""
    places: dict[int, Place] = {}
    prompts = [tuple(e.prompt) for e in episodes]
    news = [len(e.sampled.tokens) for e in episodes]
    for r, row in enumerate(pack(prompts, news, shapes.length, shapes.segments)):
        at, number = 0, 0
        for b, bundle in enumerate(row, 1):
            before = len(prompts[bundle[0]]) - 1
            prefix_begin, at = at, at + before
            for i in bundle:
                number += 1
                places[i] = Place(r, number, at, shapes.segments + b, prefix_begin)
                at += 1 + news[i]
    return [places[i] for i in range(len(episodes))]


def _ahead(x_BT: np.ndarray) -> np.ndarray:
    """Move values from a token's own position to the one that predicts it."""
    return np.pad(x_BT[:, 1:], ((0, 0), (0, 1)))
