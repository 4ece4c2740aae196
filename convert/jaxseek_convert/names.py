"""Match the names in a Hugging Face checkpoint with those of the model's tensors.

`match` is the one rule for loading, conversion and its rehearsal. It passes over buffers, finds the language
model under any prefix (none, as `AutoModel` saves it; `language.model.` in DeepSeek-VL2), and decides whether
there is a multi-token module. Sources: the tensor maps of deepseek-ai's releases; transformers' wrappers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from jaxseek.checkpoint.models import raise_mismatch
from jaxseek.config.model import ModelConfig

log = logging.getLogger("jaxseek")

_EMBEDDING = "embed_tokens.weight"
_PARTS = ("embed_tokens.", "layers.", "norm.")
# Buffers that old transformers and others saved, and what a quantised model has for activations and caches.
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(masked_)?bias)")
_ACTIVATIONS = re.compile(r".*\.((input|output|q|k|v|kv)_scale|input_scale_ub|(input|output)_zero_point)")
_FUSED = re.compile(r"(.*\.experts\.)(gate_up|down)_proj(_scale_inv)?")  # as fused by transformers 5


def match(
    where: Any, cfg: ModelConfig, on_disk: Collection[str], mtp: bool = True, inside: bool = False
) -> tuple[ModelConfig, dict[str, str]]:
    """Return the config of what is there, and the name on disk of each tensor by its name in the model.

    A scale has the name of its tensor and `_scale_inv`. Names of another model stay as they are. Without
    `mtp` the multi-token module is left out. A model `inside` one of images leaves the other parts out.
    """
    prefix = _prefix(on_disk)
    heads = tuple(dict.fromkeys(f"{p}lm_head." for p in (prefix.removesuffix("model."), prefix, "")))
    found: dict[str, str] = {}
    others, activations = [], []
    for name in on_disk:
        if _BUFFERS.fullmatch(name):
            continue
        rest = name.removeprefix(prefix) if name.startswith(prefix) else ""
        ours = f"model.{rest}" if rest.startswith(_PARTS) else _head(name, heads)
        if _ACTIVATIONS.fullmatch(name):
            activations.append(name)
        elif ours is None and inside:
            others.append(name)
        else:
            ours = name if ours is None or ours in found else ours
            found[f"{ours}_inv" if ours.endswith(".weight_scale") else ours] = name
    if prefix != "model." and found:
        log.warning("%s: its tensors are named %slayers..., and read as model.layers...", where, prefix)
    if others:
        parts = sorted({".".join(name.split(".")[:2]) for name in others})
        log.warning(
            "%s: %d tensors beside the language model are not read (%s)", where, len(others), some(parts)
        )
    if activations:
        kinds = sorted({name.rpartition(".")[2] for name in activations})
        log.warning(
            "%s: %d scales of activations are not read (%s): they are not quantised here",
            where,
            len(activations),
            some(kinds),
        )
    biased = any(name.endswith("self_attn.q_proj.bias") for name in found)
    if cfg.model_type == "qwen2" and biased and not cfg.attention_bias:  # transformers has them always
        log.warning("%s: has biases, against attention_bias false in config.json: they are used", where)
        cfg = cfg.replace(attention_bias=True)
    return _choose_mtp(where, cfg, found, mtp)


def _prefix(names: Iterable[str]) -> str:
    """Return what stands before `layers.` in the names of the language model."""
    names = list(names)
    found = [n.removesuffix(_EMBEDDING) for n in names if n.endswith(_EMBEDDING) and "layers." not in n]
    layers = {p: sum(n.startswith(f"{p}layers.") for n in names) for p in dict.fromkeys(found)}
    return max(layers, key=lambda p: layers[p], default="model.")


def _head(name: str, heads: Sequence[str]) -> str | None:
    prefix = next((p for p in heads if name.startswith(p)), None)
    return None if prefix is None else f"lm_head.{name.removeprefix(prefix)}"


def _choose_mtp(
    where: Any, cfg: ModelConfig, found: dict[str, str], mtp: bool
) -> tuple[ModelConfig, dict[str, str]]:
    """Set the number of multi-token modules from `mtp` and the tensors present; drop unused tensors."""
    first, depths = cfg.num_hidden_layers, cfg.num_nextn_predict_layers
    if not depths:
        while f"model.layers.{first + depths}.eh_proj.weight" in found:
            depths += 1
        if depths and mtp:
            log.warning("%s: has a multi-token module that config.json does not name: it is read", where)
    prefixes = tuple(f"model.layers.{first + k}." for k in range(depths))
    module = {name for name in found if depths and name.startswith(prefixes)}
    if depths and mtp and not module:
        log.warning(
            "%s has no tensors of the multi-token module that its config names: none is loaded", where
        )
    if not mtp or not module:
        return cfg.replace(num_nextn_predict_layers=0), {n: d for n, d in found.items() if n not in module}
    return cfg.replace(num_nextn_predict_layers=depths), found


def each_expert(name: str, experts: int) -> list[tuple[str, int, str]]:
    """Return the (name, expert, part) that a fused tensor stands for: gate_up [E, 2F, D] is gate, then up.

    Empty for any other tensor.
    """
    if not (fused := _FUSED.fullmatch(name)):
        return []
    prefix, which, scale = fused.groups()
    parts = ("down",) if which == "down" else ("gate", "up")
    return [(f"{prefix}{e}.{p}_proj.weight{scale or ''}", e, p) for e in range(experts) for p in parts]


# -------------------------------------------------------------------- what does not match


def check(
    what: str,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    notes: Sequence[str] = (),
) -> None:
    """Raise CheckpointError for missing, unknown and misshapen tensors, with the likely cause.

    `notes` tell what was odd about the files.
    """
    causes = [*notes, *_causes(expected.keys() - found.keys(), found.keys() - expected.keys())]
    advice = "Do config.json and the weights belong together, and is the download complete?"
    raise_mismatch(what, found, expected, "\n  ".join(causes) or advice)


def _causes(missing: Collection[str], unknown: Collection[str]) -> list[str]:
    """Guess why the names do not match."""

    def any_like(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in unknown)

    if any_like(r"lora_|\.base_layer\."):
        return ["They are those of a LoRA adapter: merge it into its base model first (merge_and_unload)."]
    if any_like(r"\.(qweight|qzeros|g_idx|weight_packed|SCB|absmax|quant_map)\b"):
        return ["They are quantised in a way that is not read: fetch the original weights."]
    if any_like(r"attention\.wq|attn\.wq|tok_embeddings|^head\.weight|attn\.wkv_"):
        return ["They have the authors' own names: fetch the files in Hugging Face's format."]
    causes = []
    if set(missing) == {"lm_head.weight"}:
        causes.append(
            "There is no output head, as in a model saved without one (AutoModel): fetch the whole model, or "
            "set tie_word_embeddings to true in config.json if its embedding is the head."
        )
    for pattern, key in (
        (r"_proj\.bias$", "attention_bias (or mlp_bias)"),
        (r"self_attn\.[qk]_norm\.", "model_type (qwen3 has norms of queries and keys)"),
        (r"e_score_correction_bias$", "topk_method (noaux_tc has a bias of the router)"),
        (r"\.indexer\.", "model_type (deepseek_v32 has an indexer)"),
        (
            r"\.mlp\.experts\.\d+\.(gate|up|down)_proj\.",
            "n_routed_experts, first_k_dense_replace or moe_layer_freq",
        ),
        (r"^model\.layers\.\d+\.input_layernorm", "num_hidden_layers"),
    ):
        if any_like(pattern):
            causes.append(f"Does config.json's {key} belong to these weights?")
    return causes[:2]


def some(names: Sequence[str], most: int = 5) -> str:
    """Join names for a message, the first few of many."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
