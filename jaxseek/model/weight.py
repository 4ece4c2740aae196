"""Quantised weights: int8 with a scale per output, int4 and FP8 with a scale per group of inputs too.

A number is value * scale. There is no zero point, and what is not in MATRICES (embedding, head, router,
norms, biases) stays as it is. A quantised matrix stands where its parameter stood.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxseek.ops.scaled import Scaled, dequantize
from jaxseek.sharding.parameters import parameters
from jaxseek.sharding.rules import Rules

# Every matrix that may be quantised: its name, and which of its letters are the inputs that are summed over.
MATRICES = {
    "q_DKGH": "D", "k_DKH": "D", "v_DKH": "D", "o_KGHD": "KGH", "q_DNH": "D", "q_a_DQ": "D", "q_b_QNH": "Q",
    "kv_a_DA": "D", "k_b_NPC": "C", "v_b_NHC": "C", "o_NHD": "NH", "k_DH": "D", "gate_DF": "D", "up_DF": "D",
    "down_FD": "F", "gate_EDF": "D", "up_EDF": "D", "down_EFD": "F",
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """How a matrix is quantised: its values' dtype, and how many inputs share a scale (None: all)."""

    dtype: str
    group: int | None


KINDS = {"int8": Spec("int8", None), "int4": Spec("int4", 128), "float8": Spec("float8_e4m3fn", 128)}


def group_size(name: str, shape: tuple[int, ...], group: int) -> int:
    """How many neighbours along the last input axis share a scale.

    That is `group`, or where there are several input axes the most that divides the last of them too.
    """
    letters, inputs = name.rsplit("_", 1)[1], MATRICES[name]
    return math.gcd(group, shape[letters.index(inputs[-1]) - len(letters)]) if len(inputs) > 1 else group


def scale_shape(name: str, shape: tuple[int, ...], group: int | None) -> tuple[int, ...]:
    """The shape of the scale of the matrix `name` (the last component of its path) of this shape.

    Outputs, experts and a leading layer axis are as in the matrix. Without a group the input axes are one;
    with a group the last input axis has an entry for each group, of which the last may be short, and other
    input axes are whole.
    """
    letters, inputs = name.rsplit("_", 1)[1], MATRICES[name]
    scale = list(shape)
    if group is None:
        for letter in inputs:
            scale[letters.index(letter) - len(letters)] = 1
    else:
        axis = letters.index(inputs[-1]) - len(letters)
        scale[axis] = -(-shape[axis] // group_size(name, shape, group))
    return tuple(scale)


class Quantized(nnx.Module):
    """A matrix as values of few bits and their scale; `spec` says how it was made."""

    def __init__(self, name: str, param: nnx.Variable, spec: Spec):
        value, axes = param.get_value(), param.get_metadata("axes")
        shape, mesh = value.shape, value.sharding.mesh
        split = (*value.sharding.spec, *(None,) * (len(shape) - len(value.sharding.spec)))
        scale = scale_shape(name, shape, spec.group)
        divided = (s if n % _parts(mesh, s) == 0 else None for n, s in zip(scale, split))

        def abstract(shape: tuple[int, ...], dtype: str, spec: P) -> nnx.Param:
            made = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))
            return nnx.Param(made, axes=axes, fill=None)

        self.spec = spec
        self.group = 0 if spec.group is None else group_size(name, shape, spec.group)
        self.value = abstract(shape, spec.dtype, value.sharding.spec)
        self.scale = abstract(scale, "float32", P(*divided))

    def laid_out(self, rules: Rules, *axes: str | None) -> Scaled:
        """As a phase computes with it, or with other `axes` than its own: few bits are moved."""
        axes = axes or self.value.get_metadata("axes")
        value, scale = rules.shard(self.value[...], *axes), self.scale[...]
        mesh, names = jax.sharding.get_abstract_mesh(), list(axes)
        for axis, (n, k, name) in enumerate(zip(value.shape, scale.shape, axes)):
            parts = _parts(mesh, rules.axes(name))
            if k == 1:
                names[axis] = None
            elif k < n and (n % self.group or k % parts):  # a shard would cut a group: smaller ones
                smaller = math.gcd(self.group, n // parts)
                whole = rules.shard(scale, *(None if a == axis else x for a, x in enumerate(axes)))
                scale = _repeat(whole, self.group // smaller, axis, n // smaller)
        return Scaled(value, rules.shard(scale, *names))

    def numbers(self) -> nnx.Param:
        """The float32 parameter that this stands for; on one device."""
        numbers = dequantize(self.laid_out(Rules()), jnp.float32)
        return nnx.Param(numbers, axes=self.value.get_metadata("axes"), fill=None)

    def widen(self) -> None:
        """For Layer.join: values of a dtype that XLA:CPU is quick to convert, and that holds them all."""
        wide = {"int4": jnp.int8, "float8_e4m3fn": jnp.float16}.get(self.value[...].dtype.name)
        if wide is not None:
            self.value.set_value(self.value[...].astype(wide))


def _parts(mesh: Any, axes: Any) -> int:
    """Into how many parts mesh axes, one or several or None, split an array's axis."""
    return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))


def _repeat(a: jax.Array, times: int, axis: int, size: int) -> jax.Array:
    """Each entry of an unsplit axis `times` times, cut to `size`."""
    spec = [*jax.typeof(a).sharding.spec, *(None,) * a.ndim][: a.ndim]
    spec = P(*spec[: axis + 1], None, *spec[axis + 1 :])
    wide = (*a.shape[: axis + 1], times, *a.shape[axis + 1 :])
    many = jnp.broadcast_to(jnp.expand_dims(a, axis + 1), wide, out_sharding=spec)
    many = many.reshape(*a.shape[:axis], -1, *a.shape[axis + 1 :])
    return jax.lax.slice_in_dim(many, 0, size, axis=axis)


def read(module: Any, names: Sequence[str], rules: Rules) -> list[Any] | None:
    """A stack's parameters [L, ...] as they rest, for kernels to read: all plain, or all quantised.

    None where a phase has one laid out otherwise, or one has other scales than one for each output.
    """
    found: list[jax.Array | Scaled] = []
    for param in (getattr(module, name) for name in names):
        values = param.value if isinstance(param, Quantized) else param
        axes = (None, *values.get_metadata("axes"))
        if jax.typeof(values[...]).sharding.spec != rules.spec(*axes):
            return None
        if isinstance(param, Quantized) and param.spec.group is not None:
            return None
        found.append(param.laid_out(rules, *axes) if isinstance(param, Quantized) else param[...])
    return found if len({isinstance(w, Scaled) for w in found}) == 1 else None


def matrix(param: Any, rules: Rules, dtype: Any) -> jax.Array:
    """`rules.use` of a parameter that may be quantised."""
    return (
        dequantize(param.laid_out(rules), dtype) if isinstance(param, Quantized) else rules.use(param, dtype)
    )


# -------------------------------------------------------------------- whole models

Model = TypeVar("Model", bound=nnx.Module)


def _child(module: Any, key: str) -> Any:
    return module[int(key)] if key.isdigit() else getattr(module, key)


def quantized(model: Model, specs: Mapping[str, Spec]) -> Model:
    """An abstract model's twin in which the parameters at these paths are quantised."""
    twin = nnx.clone(model, variables=False)
    for path, spec in specs.items():
        *where, name = path.split(".")
        module = functools.reduce(_child, where, twin)
        setattr(module, name, Quantized(name, getattr(module, name), spec))
    return twin


def quantize_abstract(model: Model, kind: str) -> Model:
    """An abstract model's twin with all MATRICES quantised, as int8, int4 or float8 (a key of KINDS)."""
    paths = [p for p in parameters(model) if p.rsplit(".", 1)[-1] in MATRICES]
    return quantized(model, dict.fromkeys(paths, KINDS[kind]))


def quantization(model: nnx.Module) -> dict[str, Spec]:
    """How each quantised parameter of a model is so, by its path."""
    found = nnx.iter_modules(model)
    return {".".join(map(str, path)): m.spec for path, m in found if isinstance(m, Quantized)}
