"""Inputs of a layer of routed experts, and its sum as a loop over assignments in float64."""

import functools
import json

import numpy as np
from oracles import expert

from jaxseek.sharding.strategy import Strategy

B, T, D, F, E, K = 8, 4, 8, 8, 8, 3


def strategy_of(mesh, folder=None, **train):
    """The default strategy with these sizes; entries of its train table may be replaced, by way of a file."""
    sizes = {a: int(n) for a, n in (kv.split("=") for kv in mesh.split(",") if kv)}
    if not train:
        return Strategy.default(**sizes)
    file = folder / "strategy.toml"
    file.write_text("\n".join(["[train]", *(f"{k} = {json.dumps(v)}" for k, v in train.items())]))
    return Strategy.from_toml(file, **sizes)


@functools.cache
def inputs(routing):
    """x, gates, experts, ids, valid, dy of one routing."""
    rng = np.random.default_rng(7)
    x, dy = rng.standard_normal((2, B, T, D)).astype(np.float32)
    gates = rng.random((B, T, K)).astype(np.float32) + 0.1
    ids = np.argsort(rng.random((B, T, E)), axis=-1)[..., :K].astype(np.int32)
    valid = np.ones((B, T), bool)
    if routing == "skewed":
        ids[:] = [6, 7, 1]
    if routing == "padded":
        valid = rng.random((B, T)) < 0.6
        valid[3] = False
    experts = tuple(rng.standard_normal(s).astype(np.float32) / 3 for s in ((E, D, F), (E, D, F), (E, F, D)))
    return x, gates, experts, ids, valid, dy


def dense_loop(x, gates, experts, ids, kept):
    y = np.zeros((B, T, D))
    gate, up, down = (np.asarray(w, np.float64) for w in experts)
    for b, t, k in zip(*np.nonzero(kept)):
        e = ids[b, t, k]
        y[b, t] += gates[b, t, k] * expert(gate[e], up[e], down[e], x[b, t].astype(np.float64))
    return y
