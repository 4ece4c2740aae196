"""The reference policy's log-probabilities of preference pairs, computed once and kept with the run."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxseek.config.run import RunConfig
from jaxseek.data.dataset import open_rows
from jaxseek.engine.engine import fetch
from jaxseek.machine.hosts import meet, most
from jaxseek.model.deepseek import DeepSeek
from jaxseek.storage.place import place, write_bytes
from jaxseek.tokenizer.tokenizer import Tokenizer
from jaxseek.train.batch import Batch, blank_row, make_batch, to_devices

SPLITS = ("train", "eval")


class Reference:
    """Of every pair of the data, by its index: log p of (chosen, rejected) under the starting model."""

    def __init__(
        self,
        run: RunConfig,
        open_model: Callable[[], DeepSeek],
        tokenizer: Tokenizer,
        logprobs: Callable[[DeepSeek, Batch], jax.Array],
    ):
        self.path = place(run.out) / "reference.npz"
        if most(not self.path.is_file()):
            model = open_model()
            parts = {split: _computed(run, model, tokenizer, logprobs, split) for split in SPLITS}
            if jax.process_index() == 0:
                arrays: Any = {f"{s}_{k}": a for s, part in parts.items() for k, a in part.items()}
                held = io.BytesIO()
                np.savez(held, **arrays)
                write_bytes(self.path, held.getvalue())
            meet("reference is kept")
        with np.load(io.BytesIO(self.path.read_bytes())) as kept:
            self.table = {s: dict(zip(kept[f"{s}_index"].tolist(), kept[f"{s}_pair"])) for s in SPLITS}
        for table in self.table.values():
            table[-1] = np.zeros(2, np.float32)  # of a blank row

    def of(self, indices: list[int], split: str) -> np.ndarray:
        """log p of rows 2i (chosen) and 2i + 1 (rejected), float32 [2 * pairs]."""
        return np.concatenate([self.table[split][i] for i in indices])


def _computed(
    run: RunConfig,
    model: DeepSeek,
    tokenizer: Tokenizer,
    logprobs: Callable[[DeepSeek, Batch], jax.Array],
    split: str,
) -> dict[str, np.ndarray]:
    """The pairs of a split, with their indices."""
    modules, size = model.cfg.num_nextn_predict_layers, run.batch.size
    rows = open_rows(run, tokenizer, split, repeat=False)
    pending = [] if rows is None else list(rows)
    if rows is not None:
        rows.close()
    index, pairs = [], [np.zeros((0, 2), np.float32)]
    for i in range(0, len(pending), size):
        some = pending[i : i + size]
        some += [blank_row(run)] * (size - len(some))
        arrays = (np.concatenate([r[k] for r in some]) for k in ("tokens", "segments", "weights"))
        batch = to_devices(make_batch(*arrays, modules=modules), model)
        with model.on_mesh():
            pairs.append(fetch(logprobs(model, batch)).reshape(-1, 2))
        index += [int(r["index"]) for r in some]
    return {"index": np.array(index, np.int64), "pair": np.concatenate(pairs)}
