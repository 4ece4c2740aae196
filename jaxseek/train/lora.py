"""LoRA (arXiv:2106.09685): low-rank changes of the layers' matrices, trained instead of them.

An `Adapted` weight (model/weight.py) stands where the matrix stood. `merge` makes ordinary parameters of them
again, for export and for sampling.
"""

from __future__ import annotations

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
from jaxseek.model.moe import EXPERTS, MoE
from jaxseek.model.weight import MATRICES, Adapted, LoraParam, adapted, is_adapted
from jaxseek.sharding.parameters import jit_sharing


def adapt(model: DeepSeek, cfg: LoraConfig, seed: int) -> DeepSeek:
    """The model with an adapter on every matrix of `cfg.targets`; it computes the same until trained.

    Left factors are normal with variance one over their inputs, right factors zero. Raises ConfigError for
    a model that has none of the targets.
    """
    twin = nnx.clone(model, variables=False)
    for i, layer in enumerate([*twin.stacks, *(m.stack for m in twin.mtp)]):
        mlp: Any = layer.mlp
        sparse = isinstance(mlp, MoE)
        modules = {
            "attention": (layer.attn, [n for n in MATRICES if n not in EXPERTS]),
            "experts": (mlp if sparse else None, EXPERTS),
            "mlp": (mlp.shared if sparse else mlp, [n for n in MATRICES if n not in EXPERTS]),
        }
        for target, (module, names) in modules.items():
            for name in names if target in cfg.targets else ():
                if (base := getattr(module, name, None)) is None:
                    continue
                draw = np.random.default_rng([seed % 2**32, i, zlib.crc32(f"{target}.{name}".encode())])
                setattr(module, name, _adapter(name, base, cfg, draw))
    if not is_adapted(twin):
        raise ConfigError(
            f"lora.targets is {cfg.targets}, of which a {model.cfg.model_type} model has none; expected some "
            "of attention, mlp, experts"
        )
    return twin


def _cut(name: str) -> tuple[int, int]:
    """Axes of a matrix before its factors' own (experts), and the number of axes of the left factor.

    The left factor has the inputs, or, where the outputs stand first, these.
    """
    letters, inputs = name.rsplit("_", 1)[1], MATRICES[name]
    lead = int(letters.startswith("E"))
    letters = letters[lead:]
    return lead, len(inputs) if letters.startswith(inputs) else letters.index(inputs[0])


def _adapter(name: str, base: Any, cfg: LoraConfig, rng: np.random.Generator) -> Adapted:
    (lead, left), axes, value = _cut(name), base.get_metadata("axes"), base.get_value()
    mesh: Any = value.sharding.mesh
    cut = value.ndim - len(axes) + lead
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


def merge(model: DeepSeek) -> DeepSeek:
    """An ordinary model that computes the same: base and adapter summed, in the base's dtype."""
    if not is_adapted(model):
        return model
    with model.on_mesh():
        return _merge(model)


def merged(model: DeepSeek) -> DeepSeek:
    """`merge`, within a compiled function."""
    return _without_adapters(model, lambda weight: weight[...].astype(weight.base[...].dtype))


_merge = jit_sharing(merged)


def base(model: DeepSeek) -> DeepSeek:
    """The model without its adapters; its arrays are the same ones."""
    return _without_adapters(model, lambda weight: weight.base.get_value())


def _without_adapters(model: DeepSeek, value: Callable[[Adapted], jax.Array]) -> DeepSeek:
    plain = nnx.clone(model, variables=False)
    for module, name, weight in list(adapted(plain)):
        setattr(module, name, type(weight.base)(value(weight), axes=weight.get_metadata("axes"), fill=None))
    return plain
