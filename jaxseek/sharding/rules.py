"""Sharding rules: the shape legend, the mesh axes, and the tables from logical names to mesh axes.

Shape legend (suffix letters are einsum letters, for arrays and parameters of the whole project):

    B batch      T query tokens   S cache slots / key tokens   D model width   V vocabulary
    N heads      K kv heads       G query heads per kv head    H head width    P head width without rope
    Q q-lora     C kv-lora        R rope width                 A = C + R       L layers
    E experts    F feed-forward width                          M rows sorted by expert

    In the router K is the number of experts that a token chooses; in latent attention H is P + R for queries
    and keys and the value width for values.

A *strategy* is a TOML file: sizes of the mesh axes, the layout of stored weights (`[weights]`), and for each
phase (`[train]`, `[prefill]`, `[decode]`) the layout of its activations and of the weights it computes with.
For serving, `[weights]` may set `redundant_experts`, slots beyond one for each expert, and name the
`placement` that says which expert is in which. Layers know logical names only; jaxseek/sharding alone knows
mesh axes. One sharding mode everywhere: Explicit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
DISPATCHES = ("local", "replicated", "all_to_all")
FACTORS = ("capacity_factor", "room_factor")  # limits on the rows of a dispatch, see model/dispatch.py
PHASES = ("train", "prefill", "decode")
LOGICAL_AXES = (
    "batch",
    "length",
    "cache_batch",
    "cache_length",
    "embed",
    "vocab",
    "heads",
    "cache_heads",
    "kv_heads",
    "q_groups",
    "q_lora",
    "latent",
    "mlp",
    "expert",
    "expert_mlp",
)


# Cache axes default to the activation axes.
_ACTIVATION_AXIS = {"cache_batch": "batch", "cache_heads": "heads"}


@dataclass(frozen=True)
class Rules:
    """One table of a strategy: logical axis name to mesh axes, and the expert dispatch of the phase.

    The factors limit the rows of an expert or a shard to a multiple of its even share (model/dispatch.py).
    """

    table: tuple[tuple[str, tuple[str, ...]], ...] = ()
    dispatch: str = "local"
    capacity_factor: float | None = None
    room_factor: float | None = None

    def axes(self, name: str | None) -> tuple[str, ...]:
        """Return the mesh axes (of size above one) that split this logical axis."""
        table = dict(self.table)
        return table.get(name, table.get(_ACTIVATION_AXIS.get(name, ""), ())) if name else ()

    @property
    def exchanges(self) -> bool:
        """True if tokens travel to the shards of their experts, rather than each shard seeing them all."""
        return self.dispatch == "all_to_all" and bool(self.axes("expert"))

    def spec(self, *names: str | None) -> P:
        """Return the PartitionSpec of an array whose dimensions have these logical names."""
        return P(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in map(self.axes, names)))

    def for_cache(self) -> Rules:
        """Return the rules for attention against the cache, where batch and heads follow the cache axes.

        Queries are gathered over the mesh axes that split the cache's slots: each shard has all queries for
        its slots.
        """
        moved = {name: self.axes(cached) for cached, name in _ACTIVATION_AXIS.items()}
        taken = (*self.axes("cache_length"), *moved["batch"], *moved["heads"])
        moved["length"] = tuple(axis for axis in self.axes("length") if axis not in taken)
        return replace(self, table=tuple((dict(self.table) | moved).items()))

    def shard(self, x: jax.Array, *names: str | None) -> jax.Array:
        """Reshard `x` to the layout of these logical names; return it unchanged if it has that layout."""
        spec = self.spec(*names)
        there = NamedSharding(jax.sharding.get_abstract_mesh(), spec)
        return x if jax.typeof(x).sharding == there else jax.sharding.reshard(x, spec)

    def use(self, param: Any, dtype: Any, *axes: str | None) -> jax.Array:
        """Return a parameter cast to `dtype` and resharded for this phase, by its own axes or by `axes`.

        The cast comes first, so that a gather moves fewer bytes.
        """
        value = param[...].astype(dtype)
        return self.shard(value, *(axes or param.get_metadata("axes")))
