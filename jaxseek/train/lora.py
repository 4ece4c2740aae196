"""LoRA (arXiv:2106.09685): low-rank changes of the layers' matrices, trained instead of them.

An adapted parameter stands where the parameter stood and reads as base + alpha / rank * left @ right, so
the layers do not know. `merge` makes ordinary parameters of them again, for export and for sampling.
"""

from __future__ import annotations

import string
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxseek.config.model import ConfigError
from jaxseek.config.run import LoraConfig
from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.mlp import MLP
from jaxseek.model.moe import MoE
from jaxseek.sharding.parameters import jit_sharing, parameters

# By target: matrix, how many of its axes stand before the two factors' (experts), and how many are left's.
_ATTENTION = {
    "q_DKGH": (0, 1), "k_DKH": (0, 1), "v_DKH": (0, 1), "o_KGHD": (0, 3), "q_DNH": (0, 1), "q_a_DQ": (0, 1),
    "q_b_QNH": (0, 1), "kv_a_DA": (0, 1), "k_b_NPC": (0, 2), "v_b_NHC": (0, 2), "o_NHD": (0, 2),
}  # fmt: skip
_MLP = {"gate_DF": (0, 1), "up_DF": (0, 1), "down_FD": (0, 1)}
_EXPERTS = {"gate_EDF": (1, 1), "up_EDF": (1, 1), "down_EFD": (1, 1)}


class LoraParam(nnx.Variable):
    """A factor of an adapter: trained while its base is not."""


class Adapted(nnx.Module):
    """A parameter with its adapter; reads like the parameter."""

    def __init__(self, base: nnx.Variable, left: LoraParam, right: LoraParam, lead: int, scale: float):
        self.base, self.left, self.right = base, left, right
        self.lead, self.scale = lead, scale  # lead: axes before the factors', the layer axis not counted

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
        return self.base.get_metadata(name)


def adapt(model: DeepSeek, cfg: LoraConfig, seed: int) -> DeepSeek:
    """The model with an adapter on every matrix of `cfg.targets`; it computes the same until trained.

    Left factors are normal with variance one over their inputs, right factors zero. Raises ConfigError for
    a model that has none of the targets.
    """
    adapted = nnx.clone(model, variables=False)
    for i, layer in enumerate([*adapted.stacks, *(m.stack for m in adapted.mtp)]):
        parts = [("attention", layer.attn, _ATTENTION)]
        mlp = layer.mlp
        parts += [("experts", mlp, _EXPERTS)] if isinstance(mlp, MoE) else []
        dense = mlp.shared if isinstance(mlp, MoE) else mlp
        parts += [("mlp", dense, _MLP)] if isinstance(dense, MLP) else []
        for target, module, names in parts:
            for name, (lead, left) in names.items() if target in cfg.targets else ():
                if (base := getattr(module, name, None)) is not None:
                    draw = np.random.default_rng([seed % 2**32, i, zlib.crc32(f"{target}.{name}".encode())])
                    setattr(module, name, _adapter(base, lead, left, cfg, draw))
    if not is_adapted(adapted):
        raise ConfigError(
            f"lora.targets is {cfg.targets}, of which a {model.cfg.model_type} model has none; expected some "
            "of attention, mlp, experts"
        )
    return adapted


def _adapter(base: nnx.Variable, lead: int, left: int, cfg: LoraConfig, rng: np.random.Generator) -> Adapted:
    axes, value = base.get_metadata("axes"), base.get_value()
    mesh: Any = value.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
    stacked = value.ndim - len(axes)
    cut = stacked + lead
    shape, spec = value.shape, (*value.sharding.spec, *(None,) * (value.ndim - len(value.sharding.spec)))

    def factor(shape: tuple[int, ...], spec: tuple[Any, ...], axes: tuple[Any, ...], std: float) -> LoraParam:
        if isinstance(value, jax.Array):
            draw = (std * rng.standard_normal(shape, np.float32)) if std else np.zeros(shape, np.float32)
            sharding = NamedSharding(mesh, P(*spec))
            made = jax.make_array_from_callback(shape, sharding, lambda index: draw[index])
        else:
            made = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
        return LoraParam(made, axes=axes, fill=None)

    r, split = cfg.rank, cut + left
    inputs = int(np.prod(shape[cut:split]))
    return Adapted(
        base,
        factor((*shape[:split], r), (*spec[:split], None), (*axes[: lead + left], None), inputs**-0.5),
        factor(
            (*shape[:cut], r, *shape[split:]),
            (*spec[:cut], None, *spec[split:]),
            (*axes[:lead], None, *axes[lead + left :]),
            0.0,
        ),
        lead,
        cfg.alpha / r,
    )


def is_adapted(model: DeepSeek) -> bool:
    """Whether the model has adapters."""
    return any(isinstance(v, LoraParam) for v in parameters(model).values())


def merge(model: DeepSeek) -> DeepSeek:
    """An ordinary model that computes the same: base and adapter summed, in the base's dtype."""
    if not is_adapted(model):
        return model
    with model.on_mesh():
        return _merge(model)


def merged(model: DeepSeek) -> DeepSeek:
    """`merge`, within a compiled function."""
    return _without_adapters(model, lambda adapted: adapted[...].astype(adapted.base[...].dtype))


_merge = jit_sharing(merged)


def base(model: DeepSeek) -> DeepSeek:
    """The model without its adapters; its arrays are the same ones."""
    return _without_adapters(model, lambda adapted: adapted.base.get_value())


def _without_adapters(model: DeepSeek, value: Callable[[Adapted], jax.Array]) -> DeepSeek:
    plain = nnx.clone(model, variables=False)
    for layer in [*plain.stacks, *(m.stack for m in plain.mtp)]:
        dense = layer.mlp.shared if isinstance(layer.mlp, MoE) else None
        for module in filter(None, (layer.attn, layer.mlp, dense)):
            for name in (*_ATTENTION, *_MLP, *_EXPERTS):
                if isinstance(adapted := getattr(module, name, None), Adapted):
                    axes = adapted.get_metadata("axes")
                    setattr(module, name, nnx.Param(value(adapted), axes=axes, fill=None))
    return plain
