"""DeepSeek LLM's scaling laws (arXiv:2401.02954, section 3).

For a compute budget C in FLOPs the paper fits the learning rate and the batch (eq. 1) from 1e17 to 2e19,
and the split C = M D into model scale M, non-embedding FLOPs per token, and tokens D (eq. 4); it trusts
them up to its own 67B model, C = 1e24.
"""

from __future__ import annotations

import math
from typing import Any

from jaxseek.config.model import ConfigError, ModelConfig, presets

FITTED = (1e17, 2e19)  # budgets of the experiments on learning rate and batch
EXTRAPOLATED = 1e24  # as far as the paper goes
LENGTH = 4096  # of its sequences


def propose(compute: float, length: int = LENGTH) -> dict[str, Any]:
    """Learning rate, batch and tokens, model scale, and the preset nearest to it, for a budget in FLOPs.

    `fitted` says whether the budget is one of those that the paper fitted; otherwise `note` says more.
    Raises ConfigError for a budget that is not above 0.
    """
    if not (compute > 0 and math.isfinite(compute)):
        raise ConfigError(f"compute is {compute}, expected FLOPs above 0, such as 1e20")
    scale = 0.1715 * compute**0.5243
    name, found = nearest_preset(scale, length)
    batch = 0.2920 * compute**0.3271
    return {
        "compute": compute,
        "learning_rate": 0.3118 * compute**-0.1250,
        "batch_tokens": batch,
        "batch_rows": max(1, round(batch / length)),
        "length": length,
        "model_flops_per_token": scale,
        "tokens": 5.8316 * compute**0.4757,
        "nearest_preset": name,
        "nearest_preset_flops_per_token": found,
        "nearest_preset_tokens": compute / found,
        "fitted": FITTED[0] <= compute <= FITTED[1],
        "note": _note(compute),
    }


def _note(compute: float) -> str:
    low, high = FITTED
    fitted = f"learning rate and batch were fitted from {low:.0e} to {high:.0e} FLOPs"
    if compute < low:
        return f"{compute:.3g} is below what the paper tried: {fitted}"
    if compute > EXTRAPOLATED:
        return f"{compute:.3g} is beyond the paper, which goes up to {EXTRAPOLATED:.0e}: {fitted}"
    return f"extrapolated, as the paper does up to {EXTRAPOLATED:.0e}: {fitted}" if compute > high else ""


def nearest_preset(scale: float, length: int = LENGTH) -> tuple[str, float]:
    """The dense or tiny preset whose non-embedding FLOPs per token come nearest by ratio, and these."""
    found = {}
    for name in presets():
        cfg = ModelConfig.from_preset(name)
        if cfg.model_type == "llama" or name.startswith("tiny-"):
            found[name] = flops_per_token(cfg, length)
    return min(found.items(), key=lambda item: abs(math.log(item[1] / scale)))


def flops_per_token(cfg: ModelConfig, length: int) -> float:
    """Non-embedding FLOPs to train on one token, M in the paper's eq. 2.

    Plain dense models: 72 L D^2 + 12 L D T, whatever the width of their feed-forward, as the paper counts its
    own. Grouped queries do not change that; latent attention and mixtures of experts have 6 for every
    parameter that a token uses in place of the first term, and their own attention in place of the second.
    """
    L, D = cfg.num_hidden_layers, cfg.hidden_size
    if cfg.is_mla or cfg.n_routed_experts:
        embeddings = cfg.vocab_size * D * (1 if cfg.tie_word_embeddings else 2)
        return 6 * (cfg.num_active_params() - embeddings) + attention_flops_per_token(cfg, length)
    return 72 * L * D * D + 12 * L * D * length


def attention_flops_per_token(cfg: ModelConfig, keys: float) -> float:
    """FLOPs to train scores and their weighted sums over `keys` keys: 6 L N (H + width of values) keys.

    12 L N H keys where keys and values are as wide (PaLM, arXiv:2204.02311, appendix B). Latent attention
    counts as trained, expanded to heads; the sparse attention of V3.2 counts as dense.
    """
    return 6 * cfg.num_hidden_layers * cfg.num_attention_heads * cfg.score_width(absorbed=False) * keys
