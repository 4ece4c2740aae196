"""Declare parameters with their logical axes, fill them on a mesh, and walk them by path."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding

from jaxseek.sharding.strategy import Strategy


class Init:
    """Declares parameters, with shape, logical axes and initial values on one line in the layers.

    Layers are built under `jax.eval_shape` only; `fill` then gives every parameter its values, whether
    random, converted or restored.
    """

    def __init__(self, strategy: Strategy, dtype: Any, kind: type[nnx.Variable] = nnx.Param):
        self.rules, self.dtype, self.kind = strategy.weights, dtype, kind

    def __call__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        fill: float | None = None,
        dtype: Any = None,
        kind: type[nnx.Variable] | None = None,
    ) -> Any:
        """Declare a parameter that starts as the constant `fill`, or else normal with `initializer_range`."""
        if len(shape) != len(axes):
            raise ValueError(f"shape {shape} and axes {axes} differ in length")
        value = jnp.zeros(shape, dtype or self.dtype, out_sharding=self.rules.spec(*axes))
        return (kind or self.kind)(value, axes=axes, fill=fill)


def parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Return every parameter by its dotted path, in a fixed order."""
    flat, _ = jax.tree.flatten_with_path(model, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return {
        ".".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path): v
        for path, v in flat
    }


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Form:
    """Structure of a result tree, and the index of the input array that each leaf is (None: a new one)."""

    structure: Any
    given: tuple[int | None, ...]


def jit_sharing(f: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `jax.jit` so that outputs that are unchanged inputs are returned as the same arrays.

    jit would copy them, for example weights that need no resharding. `f` takes one tree of arrays; its other
    arguments are static. `call.new` is the compiled part: it returns the new arrays, and where they belong.
    """

    @functools.partial(jax.jit, static_argnums=1)
    def new(tree: Any, static: tuple) -> tuple[list[jax.Array], _Form]:
        index = {id(a): i for i, a in enumerate(jax.tree.leaves(tree))}
        leaves, structure = jax.tree.flatten(f(tree, *static))
        given = tuple(index.get(id(a)) for a in leaves)
        return [a for a, i in zip(leaves, given) if i is None], _Form(structure, given)

    @functools.wraps(f)
    def call(tree: Any, *static: Any) -> Any:
        made, form = new(tree, static)
        old, made = jax.tree.leaves(tree), iter(made)
        return jax.tree.unflatten(form.structure, [next(made) if i is None else old[i] for i in form.given])

    call.new = new  # type: ignore[attr-defined]
    return call


def fill(model: Any, mesh: Mesh, make: Callable[[str, nnx.Variable, NamedSharding], jax.Array]) -> Any:
    """Fill an abstract model, each parameter by `make(path, abstract parameter, sharding)`."""
    made = []
    for path, param in parameters(model).items():
        made.append(make(path, param, NamedSharding(mesh, param.get_value().sharding.spec)))
    return jax.tree.unflatten(jax.tree.structure(model), made)


def random_values(seed: int, std: float) -> Callable[[str, nnx.Variable, NamedSharding], jax.Array]:
    """Return a `make` for `fill` that draws initial values on the host.

    Each layer and expert has a random stream of its own. The values are the same on every mesh, and a shard
    draws only the matrices that it holds.
    """

    def make(path: str, param: nnx.Variable, sharding: NamedSharding) -> jax.Array:
        abstract, axes = param.get_value(), param.get_metadata("axes")
        shape, dtype = abstract.shape, abstract.dtype
        constant = param.get_metadata("fill")
        lead = len(shape) - len(axes) + (axes[0] == "expert")
        name = zlib.crc32(path.encode())

        def shard(index: Any) -> np.ndarray:
            sizes = [len(range(n)[i]) for n, i in zip(shape, index)]
            if constant is not None:
                return np.full(sizes, constant, dtype)
            out = np.empty(sizes, dtype)
            for at in np.ndindex(*sizes[:lead]):
                which = [range(n)[i][j] for n, i, j in zip(shape, index, at)]
                rng = np.random.default_rng([seed, name, *which])
                out[at] = (std * rng.standard_normal(shape[lead:], np.float32))[index[lead:]]
            return out

        return jax.make_array_from_callback(shape, sharding, shard)

    return make


def in_formats(tree: Any, formats: Any, donate: bool = False) -> Any:
    """Move arrays to these layouts; arrays that have theirs already are returned as they are.

    Arrays that span hosts go through jit, since `jax.device_put` does not take a layout for them.
    """

    def moved(a: Any, wanted: Format) -> jax.Array:
        if a.format == wanted:
            return a
        if a.is_fully_addressable:
            return jax.device_put(a, wanted, donate=donate)
        new = _copy_to(wanted)(a)
        if donate:
            jax.block_until_ready(new)
            a.delete()
        return new

    return jax.tree.map(moved, tree, formats)


@functools.cache
def _copy_to(wanted: Format) -> Any:
    return jax.jit(lambda a: a, out_shardings=wanted)


def device_bytes(tree: Any) -> int:
    """Bytes per device of a tree's arrays, abstract or not; int4 is two to a byte, without tile padding."""
    total = 0
    for a in jax.tree.leaves(tree):
        bits = 4 if a.dtype.name in ("int4", "uint4") else 8 * a.dtype.itemsize
        total += math.prod(a.sharding.shard_shape(a.shape)) * bits // 8
    return total
