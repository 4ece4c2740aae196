"""A batch: rows of tokens with what is predicted at each position, made on the host.

Shifting by one token is done here, because on the devices the length may be split over a mesh axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxseek.config.run import RunConfig
from jaxseek.model.deepseek import DeepSeek


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows [..., B, T] in one or more microbatches.

    `ahead` has the token after each position, then the one after that for every multi-token module, and
    `weights` the weight of its prediction: 0 for padding, for tokens that are not learnt, and for the first
    token of another example. `reference_B` is each row's log-prob under the reference policy of preference
    training, where rows 2i and 2i + 1 are the chosen and the rejected answer. `count` is the number of
    microbatches in use, if the last ones may be blank. `prefixes` are segments that others continue, see
    DeepSeek.context.
    """

    tokens_BT: jax.Array
    positions_BT: jax.Array
    segments_BT: jax.Array
    ahead_BJT: jax.Array
    weights_BJT: jax.Array
    reference_B: jax.Array | None = None
    count: jax.Array | None = None
    prefixes_BT: jax.Array | None = None


def make_batch(
    tokens: np.ndarray,
    segments: np.ndarray,
    weights: np.ndarray,
    modules: int,
    accumulation: int = 1,
    reference: np.ndarray | None = None,
) -> Batch:
    """Make a batch from rows [B, T]: tokens, segment ids (0 is padding), and each token's weight as a target.

    Every array gets a leading axis of `accumulation` microbatches. `modules` is the number of multi-token
    modules.
    """
    tokens, segments = tokens.astype(np.int32), segments.astype(np.int32)
    B, T = tokens.shape
    index = np.arange(T, dtype=np.int32)
    starts = np.ones((B, T), bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    ahead = np.zeros((B, 1 + modules, T), np.int32)
    counts = np.zeros((B, 1 + modules, T), np.float32)
    for j in range(min(1 + modules, T - 1)):
        n = T - 1 - j  # positions that have such a token in the row
        ahead[:, j, :n] = tokens[:, j + 1 :]
        same = (segments[:, :n] == segments[:, j + 1 :]) & (segments[:, :n] > 0)
        counts[:, j, :n] = np.where(same, weights[:, j + 1 :], 0)
    parts: Any = (tokens, positions.astype(np.int32), segments, ahead, counts, reference)
    batch: Any = Batch(*parts)
    return jax.tree.map(lambda a: a.reshape(accumulation, B // accumulation, *a.shape[1:]), batch)


def blank_row(run: RunConfig) -> dict[str, np.ndarray]:
    """Make a row (for DPO a pair) of weight 0, which fills up a batch."""
    shape = (2, run.data.length) if run.objective == "dpo" else (run.data.length,)
    ints = {name: np.zeros(shape, np.int32) for name in ("tokens", "segments")}
    return ints | {"weights": np.zeros(shape, np.float32), "index": np.int32(-1)}


def to_devices(batch: Batch, model: DeepSeek) -> Batch:
    """Put a batch, which every host has whole, on the model's mesh."""
    rules = model.strategy.train

    def put(a: np.ndarray) -> jax.Array:
        names = ("batch", *(None,) * (a.ndim - 3), "length")[: a.ndim - 1]
        return to_mesh(a, model, P(None, *rules.spec(*names)))

    return jax.tree.map(put, batch)


def to_mesh(a: np.ndarray, model: DeepSeek, spec: P) -> jax.Array:
    """Put an array, which every host has whole, on the model's mesh: each device takes its part."""
    return jax.make_array_from_callback(a.shape, NamedSharding(model.mesh, spec), a.__getitem__)
