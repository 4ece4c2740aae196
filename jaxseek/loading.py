"""`load`: a model and its tokenizer from a checkpoint, a Hugging Face directory, or a preset's name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxseek import checkpoint
from jaxseek.config import ModelConfig, presets
from jaxseek.model import DeepSeek
from jaxseek.redundancy import place_experts
from jaxseek.sharding import Strategy

if TYPE_CHECKING:
    from jaxseek.tokenizer import Tokenizer


def load(
    path_or_preset: str | Path, mesh: Any = None, dtype: Any = None
) -> tuple[DeepSeek, Tokenizer | None]:
    """A model ready to run, and its tokenizer or None where there is none.

    A directory is a converted checkpoint or a Hugging Face one; `tiny-*` presets get random weights. `mesh`
    defaults to one device on CPU and else to as many on the tensor axis as divide the model; `dtype` to
    float32 on CPU and else bfloat16. Redundant experts of the mesh's
    strategy are in place. Raises CheckpointError, ConfigError or TokenizerError.
    """
    path = Path(path_or_preset)
    on_cpu = jax.default_backend() == "cpu"
    dtype = checkpoint.parse_dtype(("float32" if on_cpu else "bfloat16") if dtype is None else dtype)
    kind = checkpoint.kind_of(path)
    name = str(path_or_preset)
    if kind is None and not (name.startswith("tiny-") and name in presets()):
        raise checkpoint.not_a_checkpoint(path_or_preset)
    cfg = ModelConfig.from_hf(path) if kind else ModelConfig.from_preset(name)
    if mesh is None:
        mesh = widest(cfg, 1 if on_cpu else jax.device_count())
    tokenizer = None
    if kind is not None:
        from jaxseek.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_dir(path)
        if tokenizer is not None:
            tokenizer.check_fits(cfg.vocab_size)
    if kind is None:
        model = DeepSeek.init(cfg, mesh, dtype=dtype)
    elif kind == "jaxseek":
        model = checkpoint.restore(path, mesh, dtype)
    else:
        from jaxseek_convert.from_hf import load_hf

        model = load_hf(path, mesh, dtype)
    place_experts(model)
    return model, tokenizer


def widest(cfg: ModelConfig, devices: int) -> Strategy:
    """The default strategy with the longest tensor axis, up to `devices`, that divides the model."""
    for n in range(devices, 1, -1):
        strategy = Strategy.default(tensor=n)
        if not strategy.misfits(cfg):
            return strategy
    return Strategy.default()
