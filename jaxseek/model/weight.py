"""Weights of the layers, by one protocol: plain, quantised, adapted (LoRA).

Every kind has `dense`, its numbers as a phase uses them; `operand`, what the experts' operations read; and
`matmul`, its product. A kind stands where the parameter stood, and no layer asks which it is. A quantised
number is value * scale, without a zero point; parameters that are not in MATRICES (embedding, head, router,
norms, biases) stay as they are.
"""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxseek.config.formats import FORMATS, Spec
from jaxseek.ops.matmul import matmul, scaled_matmul
from jaxseek.ops.scaled import Scaled, dequantize
from jaxseek.sharding.parameters import parameters
from jaxseek.sharding.rules import Rules

if TYPE_CHECKING:
    from jaxseek.model.context import Context

Axes = tuple[str | None, ...]

# Matrices that may be quantised or adapted, and the letters of their inputs, which a product sums over.
MATRICES = {
    "q_DKGH": "D", "k_DKH": "D", "v_DKH": "D", "o_KGHD": "KGH", "q_DNH": "D", "q_a_DQ": "D", "q_b_QNH": "Q",
    "kv_a_DA": "D", "k_b_NPC": "C", "v_b_NHC": "C", "o_NHD": "NH", "k_DH": "D", "gate_DF": "D", "up_DF": "D",
    "down_FD": "F", "gate_EDF": "D", "up_EDF": "D", "down_EFD": "F",
}  # fmt: skip


class Weight(nnx.Param):
    """A parameter in plain numbers."""

    def dense(self, rules: Rules, dtype: Any, *axes: str | None) -> jax.Array:
        """The numbers in `dtype`, laid out by the parameter's own logical axes or by `axes`."""
        return rules.use(self, dtype, *axes)

    def operand(self, rules: Rules, dtype: Any) -> jax.Array:
        """The numbers in `dtype`, laid out as the phase says."""
        return rules.use(self, dtype)

    def matmul(
        self, x: jax.Array, ctx: Context, *axes: str | None, contract: int = 1, weight_axes: Axes = ()
    ) -> jax.Array:
        """x times the matrix over the last `contract` axes of x; the result is laid out by `axes`."""
        w = self.dense(ctx.rules, x.dtype, *weight_axes)
        return matmul(x, w, contract, ctx.rules.spec(*axes), ctx.fp8)


def group_size(name: str, shape: tuple[int, ...], group: int) -> int:
    """Number of neighbours along the last input axis that share a scale.

    Equal to `group`, or, with several input axes, its largest divisor that divides the last of them too.
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
    """A matrix as values of few bits and their scale; `spec` is its format."""

    def __init__(self, name: str, param: nnx.Variable, spec: Spec):
        value, axes = param.get_value(), param.get_metadata("axes")
        shape, mesh = value.shape, value.sharding.mesh
        split = (*value.sharding.spec, *(None,) * (len(shape) - len(value.sharding.spec)))
        scale = scale_shape(name, shape, spec.group)
        divided = (s if n % _parts(mesh, s) == 0 else None for n, s in zip(scale, split))

        def abstract(shape: tuple[int, ...], dtype: str, spec: P) -> nnx.Param:
            value = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))
            return nnx.Param(value, axes=axes, fill=None)

        self.spec = spec
        self.group = 0 if spec.group is None else group_size(name, shape, spec.group)
        self.value = abstract(shape, spec.dtype, value.sharding.spec)
        self.scale = abstract(scale, "float32", P(*divided))

    def operand(self, rules: Rules, dtype: Any, *axes: str | None) -> Scaled:
        """Value and scale, laid out by the matrix's own logical axes or by `axes`; only the few bits move."""
        del dtype
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

    def dense(self, rules: Rules, dtype: Any, *axes: str | None) -> jax.Array:
        """value * scale in `dtype`, laid out as `Weight.dense`."""
        return dequantize(self.operand(rules, dtype, *axes), dtype)

    def matmul(
        self, x: jax.Array, ctx: Context, *axes: str | None, contract: int = 1, weight_axes: Axes = ()
    ) -> jax.Array:
        """The same contract as `Weight.matmul`."""
        return scaled_matmul(x, self.operand(ctx.rules, x.dtype, *weight_axes), ctx.rules, axes, contract)


def _parts(mesh: Any, axes: Any) -> int:
    """Number of parts into which mesh axes (one, several or None) split an array's axis."""
    return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))


def _repeat(a: jax.Array, times: int, axis: int, size: int) -> jax.Array:
    """Each entry of an unsplit axis `times` times, cut to `size`."""
    spec = [*jax.typeof(a).sharding.spec, *(None,) * a.ndim][: a.ndim]
    spec = P(*spec[: axis + 1], None, *spec[axis + 1 :])
    wide = (*a.shape[: axis + 1], times, *a.shape[axis + 1 :])
    many = jnp.broadcast_to(jnp.expand_dims(a, axis + 1), wide, out_sharding=spec)
    many = many.reshape(*a.shape[:axis], -1, *a.shape[axis + 1 :])
    return jax.lax.slice_in_dim(many, 0, size, axis=axis)


class LoraParam(nnx.Variable):
    """A factor of an adapter: trained while its base is not."""


class Adapted(nnx.Module):
    """A weight with a low-rank adapter (LoRA, arXiv:2106.09685): base + scale * left @ right."""

    def __init__(self, base: Weight, left: LoraParam, right: LoraParam, lead: int, scale: float):
        self.base, self.left, self.right = base, left, right
        self.lead, self.scale = lead, scale  # lead: axes before the factors' own, the layer axis not counted

    def __getitem__(self, index: Any) -> jax.Array:
        base, left, right = (v[...] for v in (self.base, self.left, self.right))
        stacked = base.ndim - len(self.base.get_metadata("axes"))
        lead = string.ascii_lowercase[: self.lead + stacked]
        rows = string.ascii_uppercase[: left.ndim - len(lead) - 1]
        columns = string.ascii_uppercase[len(rows) : base.ndim - len(lead)]
        change = jnp.einsum(
            f"{lead}{rows}z,{lead}z{columns}->{lead}{rows}{columns}",
            left,
            right,
            out_sharding=jax.typeof(base).sharding.spec,
        )
        return (base.astype(change.dtype) + self.scale * change)[index]

    def get_metadata(self, name: str) -> Any:
        """Metadata of the base parameter."""
        return self.base.get_metadata(name)

    dense, operand, matmul = Weight.dense, Weight.operand, Weight.matmul


def stored(module: nnx.Module, names: Sequence[str], rules: Rules) -> list[Any] | None:
    """Parameters of a stack of layers [L, ...] as they rest, for kernels that read them in place: all plain,
    or all Scaled with one scale per output.

    None if a parameter rests in another layout than the phase uses, has scales per group, or is adapted.
    """
    found: list[jax.Array | Scaled] = []
    for param in (getattr(module, name) for name in names):
        values = param.value if isinstance(param, Quantized) else param
        if isinstance(param, Adapted) or (isinstance(param, Quantized) and param.spec.group is not None):
            return None
        axes = (None, *values.get_metadata("axes"))
        if jax.typeof(values[...]).sharding.spec != rules.spec(*axes):
            return None
        found.append(param.operand(rules, None, *axes) if isinstance(param, Quantized) else param[...])
    return found if len({type(w) is Scaled for w in found}) == 1 else None


def arrays_of(weight: Any) -> tuple[nnx.Variable, ...]:
    """The arrays that make a weight: its values, and the scale of a quantised one."""
    return (weight.value, weight.scale) if isinstance(weight, Quantized) else (weight,)


def is_plain(weight: Any) -> bool:
    """True for a parameter in plain numbers."""
    return isinstance(weight, Weight)


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
    """An abstract model's twin with all MATRICES quantised, as int8, int4 or fp8 (a key of FORMATS)."""
    paths = [p for p in parameters(model) if p.rsplit(".", 1)[-1] in MATRICES]
    return quantized(model, dict.fromkeys(paths, FORMATS[kind]))


def quantization(model: nnx.Module) -> dict[str, Spec]:
    """The format of each quantised parameter of a model, by its path."""
    found = nnx.iter_modules(model)
    return {".".join(map(str, path)): m.spec for path, m in found if isinstance(m, Quantized)}


def widen(model: nnx.Module) -> None:
    """Give quantised values, in place, a dtype that XLA:CPU converts quickly and that holds them exactly."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Quantized):
            wide = {"int4": jnp.int8, "float8_e4m3fn": jnp.float16}.get(module.value[...].dtype.name)
            if wide is not None:
                module.value.set_value(module.value[...].astype(wide))


def is_adapted(model: nnx.Module) -> bool:
    """True if any weight of the model has an adapter."""
    return any(isinstance(m, Adapted) for _, m in nnx.iter_modules(model))


def adapted(model: nnx.Module) -> Iterator[tuple[nnx.Module, str, Adapted]]:
    """Every adapted weight, as (module that holds it, its name there, the weight)."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Adapted):
            parent = functools.reduce(_child, map(str, path[:-1]), model)
            yield parent, str(path[-1]), module
