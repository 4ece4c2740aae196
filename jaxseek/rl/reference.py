"""The reference policy that KL is measured against, and where it is stored between uses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseek.checkpoint import models
from jaxseek.config.run import RunConfig
from jaxseek.model.deepseek import DeepSeek
from jaxseek.rl.rollout import cast
from jaxseek.sharding.strategy import Strategy
from jaxseek.storage.place import place, remove
from jaxseek.train import lora


class ReferencePolicy:
    """Provides the reference model; `replace` makes the current policy the new reference.

    A new reference is also written to OUT/reference/STEP, from where a resumed run reads it. Older ones stay
    as long as a checkpoint needs them.
    """

    def __init__(self, run: RunConfig, strategy: Strategy, dtype: Any):
        self.kind, self.strategy, self.dtype = run.reference.kind, strategy, jnp.dtype(dtype)
        self.directory = place(run.out) / "reference"
        self.since = 0  # the step at which it became the reference
        self._model: DeepSeek | None = None  # kind "host": shapes and shardings only
        self._parts: list[dict[str, np.ndarray]] = []

    def open(self, since: int, first: Callable[[], DeepSeek]) -> None:
        """Load the reference: `first()` for a new run (since 0), otherwise the one saved at step `since`."""
        self.since = since
        if self.kind != "base":
            path = self.directory / str(since)
            self._keep(models.restore(path, self.strategy, self.dtype) if since else first())

    def replace(self, policy: DeepSeek, step: int, needed: Collection[int] = ()) -> None:
        """Make the policy after `step` steps the reference; delete older ones that are not in `needed`."""
        models.save(lora.merge(policy), self.directory / str(step), None, {"step": step}, overwrite=True)
        self._keep(policy)
        self.since = step
        if jax.process_index() == 0:
            for path in self.directory.iterdir():
                if path.name.isdecimal() and int(path.name) not in {step, *needed}:
                    remove(path)

    def of(self, policy: DeepSeek) -> DeepSeek:
        """Return the reference on the policy's mesh; kind "host" copies it to the devices for this use."""
        if self.kind == "base":
            return lora.base(policy)
        assert self._model is not None, "open comes first"
        if self.kind == "device":
            return self._model
        leaves, structure = jax.tree.flatten(self._model)
        placed = [
            jax.make_array_from_callback(a.shape, a.sharding, lambda index, own=own: own[str(index)])
            for a, own in zip(leaves, self._parts)
        ]
        return jax.tree.unflatten(structure, placed)

    def _keep(self, model: DeepSeek) -> None:
        """Store a copy of the model, since the next update donates the policy's own arrays."""
        with model.on_mesh():
            model = _copy(lora.merge(model), self.dtype.name)
        if self.kind == "device":
            self._model = model
            return
        leaves, structure = jax.tree.flatten(model)
        self._parts = [{str(s.index): np.asarray(s.data) for s in a.addressable_shards} for a in leaves]
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in leaves]
        self._model = jax.tree.unflatten(structure, shapes)


@functools.partial(jax.jit, static_argnames="dtype")
def _copy(model: DeepSeek, dtype: str) -> DeepSeek:
    return jax.tree.map(jnp.copy, cast(model, dtype))
