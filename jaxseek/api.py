"""`load`: a model and its tokenizer from a checkpoint, a Hugging Face directory or hub name, or a preset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxseek.checkpoint import models
from jaxseek.checkpoint.digests import Digests
from jaxseek.config.model import ModelConfig, presets
from jaxseek.experts.replicate import place_experts
from jaxseek.model.deepseek import DeepSeek
from jaxseek.sharding.strategy import Strategy
from jaxseek.storage.hub import model_place
from jaxseek.storage.place import Place

if TYPE_CHECKING:
    from jaxseek.tokenizer.tokenizer import Tokenizer


def load(
    path_or_preset: str | Place, mesh: Any = None, dtype: Any = None, template: str | Path | None = None
) -> tuple[DeepSeek, Tokenizer | None]:
    """Load a model, ready to run, and its tokenizer (None if it has none that can be used).

    `path_or_preset` is a jaxseek or Hugging Face directory, on a disk or in an object store (gs://, s3://), a
    hub name (hf://OWNER/NAME), or a `tiny-*` preset, which gets random weights. By default, `mesh` is one
    device on CPU, and otherwise the longest tensor axis that divides the model, with the remaining devices of
    several hosts on the data axis; `dtype` is float32 on CPU and otherwise bfloat16. Each host reads only the
    shards of its devices. Redundant experts of the mesh's strategy are placed in their slots. `template` is
    the chat template to use instead of the model's own, as in `Tokenizer.render_chat`. Raises
    CheckpointError, ConfigError, TokenizerError or PlaceError.
    """
    path = model_place(path_or_preset)
    on_cpu = jax.default_backend() == "cpu"
    dtype = models.parse_dtype(("float32" if on_cpu else "bfloat16") if dtype is None else dtype)
    kind = models.kind_of(path)
    name = str(path_or_preset)
    if kind is None and not (name.startswith("tiny-") and name in presets()):
        raise models.not_a_checkpoint(path_or_preset)
    if kind == "jaxseek":
        Digests.noted(path).check_small()  # before a config or tokenizer is read
    cfg = ModelConfig.from_hf(path / "config.json") if kind else ModelConfig.from_preset(name)
    if mesh is None:
        hosts = jax.process_count()
        mesh = widest(cfg, 1 if on_cpu and hosts == 1 else jax.device_count(), whole=hosts > 1)
    tokenizer = None
    if kind is not None:
        from jaxseek.tokenizer.tokenizer import Tokenizer

        tokenizer = Tokenizer.beside(path, cfg.vocab_size, template)
    if kind is None:
        model = DeepSeek.init(cfg, mesh, dtype=dtype)
    elif kind == "jaxseek":
        model = models.restore(path, mesh, dtype)
    else:
        from jaxseek_convert.from_hf import load_hf

        model = load_hf(path, mesh, dtype)
    place_experts(model)
    return model, tokenizer


def widest(cfg: ModelConfig, devices: int, whole: bool = False) -> Strategy:
    """Return the default strategy with the longest tensor axis, up to `devices`, that divides the model.

    With `whole`, the axis also divides `devices`, and the remaining devices form the data axis.
    """
    for n in range(devices, 1, -1):
        strategy = Strategy.default(tensor=n, data=devices // n if whole else 1)
        if not strategy.misfits(cfg) and (not whole or devices % n == 0):
            return strategy
    return Strategy.default(data=devices if whole else 1)
