"""The reference policy's log-probabilities of preference pairs, computed once and kept with the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxseek.data import open_rows
from jaxseek.model import DeepSeek
from jaxseek.run_config import RunConfig
from jaxseek.tokenizer import Tokenizer
from jaxseek.train.batch import Batch, make_batch, most, to_devices

SPLITS = ("train", "eval")


class Reference:
    """Of every pair of the data, by its index: log p of (chosen, rejected) under the starting model."""

    def __init__(
        self,
        run: RunConfig,
        model: DeepSeek,
        tokenizer: Tokenizer,
        logprobs: Callable[[DeepSeek, Batch], jax.Array],
    ):
        host, hosts = jax.process_index(), jax.process_count()
        self.path = Path(run.out) / f"reference-{host}-of-{hosts}.npz"
        if most(not self.path.is_file()) == 0:
            with np.load(self.path) as kept:
                self.table = {
                    split: dict(zip(kept[f"{split}_index"].tolist(), kept[split])) for split in SPLITS
                }
            return
        self.table = {split: {} for split in SPLITS}
        modules, own = model.cfg.num_nextn_predict_layers, run.batch.size // hosts
        for split in SPLITS:
            rows = open_rows(run, tokenizer, split, (host, hosts), repeat=False)
            mine = [] if rows is None else list(rows)
            for i in range(most(-(-len(mine) // own))):
                some = mine[i * own : (i + 1) * own]
                filled = (some or mine[:1]) * own
                arrays = (
                    np.concatenate([r[k] for r in filled[:own]]) for k in ("tokens", "segments", "weights")
                )
                batch = to_devices(make_batch(*arrays, modules=modules), model)
                with model.on_mesh():
                    out = local_rows(logprobs(model, batch)).reshape(-1, 2)
                self.table[split] |= {int(r["index"]): pair for r, pair in zip(some, out)}
        self._keep()

    def of(self, indices: list[int], split: str) -> np.ndarray:
        """log p of rows 2i (chosen) and 2i + 1 (rejected), float32 [2 * pairs]."""
        return np.concatenate([self.table[split].get(i, np.zeros(2, np.float32)) for i in indices])

    def _keep(self) -> None:
        arrays = {}
        for split, table in self.table.items():
            arrays[f"{split}_index"] = np.array(list(table), np.int64)
            arrays[split] = np.array(list(table.values()), np.float32).reshape(-1, 2)
        partial = self.path.with_suffix(".partial.npz")
        np.savez(partial, **arrays)
        partial.replace(self.path)


def local_rows(x_B: jax.Array) -> np.ndarray:
    """The rows of a batch that this host gave, in its order."""
    parts = {str(s.index): s for s in x_B.addressable_shards}.values()
    return np.concatenate([np.asarray(s.data) for s in sorted(parts, key=lambda s: s.index[0].start or 0)])
