"""Describe a model without loading it: parameters, cache, and bytes per chip on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp

from jaxseek.checkpoint import models
from jaxseek.config.formats import Spec
from jaxseek.config.model import ConfigError, ModelConfig, presets
from jaxseek.experts.replicate import place_experts
from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.weight import quantized
from jaxseek.sharding.parameters import device_bytes
from jaxseek.sharding.strategy import Strategy
from jaxseek.storage.hub import hub_hint, model_place


def read_config(model: str) -> ModelConfig:
    """Read the config of a preset, a checkpoint or Hugging Face directory, or a config.json.

    Raises ConfigError if `model` is none of these.
    """
    path = model_place(model, weights=False)
    if path.exists():
        return ModelConfig.from_hf(path)
    if model in presets() or not ("/" in model or model.endswith(".json")):
        return ModelConfig.from_preset(model)
    raise ConfigError(
        f"{model}: neither a preset (jaxseek info --list) nor a directory with a config.json{hub_hint(model)}"
    )


def read_quantization(model: str) -> dict[str, Spec]:
    """Return how the parameters of a checkpoint directory are quantised; empty if they are not."""
    path = model_place(model, weights=False)
    if models.kind_of(path) != "jaxseek":
        return {}
    return models.stored_quantization(models.read_manifest(path))


def describe(
    cfg: ModelConfig,
    mesh: Any = None,
    dtype: str = "bfloat16",
    context: int = 4096,
    batch: int = 1,
    quantization: Mapping[str, Spec] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return counts and bytes of a model, and the bytes that one chip of a mesh holds.

    `dtype` applies to parameters that `quantization` does not name.
    """
    strategy = Strategy.parse(mesh)
    model = quantized(DeepSeek.abstract(cfg, strategy, jnp.dtype(dtype)), quantization)
    place_experts(model)
    rules = strategy.decode
    rows = -(-batch // strategy.parts(rules, "batch"))
    slots = -(-context // strategy.parts(rules, "cache_length"))
    heads = min(cfg.cache_heads, strategy.parts(rules, "kv_heads"))
    return {
        "model_type": cfg.model_type,
        "attention": cfg.attention,
        "layers": cfg.num_hidden_layers,
        "hidden_size": cfg.hidden_size,
        "heads": cfg.num_attention_heads,
        "experts": cfg.n_routed_experts,
        "experts_per_token": cfg.num_experts_per_tok,
        "vocab_size": cfg.vocab_size,
        "context": cfg.max_position_embeddings,
        "parameters": cfg.num_params(),
        "active_parameters": cfg.num_active_params(),
        "mtp_parameters": cfg.num_params(mtp=True) - cfg.num_params(),
        "cache_bytes_per_token": cfg.cache_bytes_per_token(dtype),
        "dtype": dtype,
        "quantized": sorted({spec.dtype for spec in quantization.values()}),
        "mesh": {a: n for a, n in strategy.sizes if n > 1},
        "chips": strategy.num_devices,
        "weight_bytes_per_chip": device_bytes(model),
        "cache_bytes_per_chip": rows * slots * cfg.cache_bytes_per_token(dtype) // heads,
        "cache_for": {"batch": batch, "context": context},
    }


def budget_rows(proposal: dict[str, Any]) -> dict[str, str]:
    """Format a proposal of `jaxseek.train.scaling.propose` as {label: text}."""
    scale, found = proposal["model_flops_per_token"], proposal["nearest_preset_flops_per_token"]
    rows = {
        "learning rate": f"{proposal['learning_rate']:.2e}",
        "batch": f"{_short(proposal['batch_tokens'])} tokens ({proposal['batch_rows']:,} rows of "
        f"{proposal['length']:,})",
        "model": f"{scale:.2e} non-embedding FLOPs per token (6 x {_short(scale / 6)})",
        "data": f"{_short(proposal['tokens'])} tokens",
        "nearest preset": f"{proposal['nearest_preset']}: {found / scale:.2g} x that model, for "
        f"{_short(proposal['nearest_preset_tokens'])} tokens",
    }
    return rows | ({"note": proposal["note"]} if proposal["note"] else {})


def _short(n: float) -> str:
    """Format a number with three digits and a suffix: 1.02M, 19.0B, 858B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:#.3g}".rstrip(".") + letter
    return f"{n:#.3g}"
