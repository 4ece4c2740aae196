"""Read a model's config from the metadata of a GGUF file.

Sources: gguf-py's constants.py; llama.cpp's convert_hf_to_gguf.py (LlamaModel, Qwen2Model, Qwen3Model,
DeepseekModel, DeepseekV2Model) and the graphs that it builds of them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxseek.checkpoint.directory import CheckpointError
from jaxseek.config.model import ModelConfig, presets
from jaxseek_convert.names import some

log = logging.getLogger("jaxseek")

ARCHITECTURES = ("llama", "qwen2", "qwen3", "deepseek", "deepseek2")
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_DENSE = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
_EXPERTS = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_LATENT = {"attention.kv_lora_rank": "kv_lora_rank", "rope.dimension_count": "qk_rope_head_dim"}
_OPTIONAL = {
    "attention.q_lora_rank": "q_lora_rank",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
    "leading_dense_block_count": "first_k_dense_replace",
    "attention.sliding_window": "sliding_window",
}
_READ = {*_DENSE, *_EXPERTS, *_LATENT, *_OPTIONAL, "attention.head_count_kv", "attention.key_length"}
_READ |= {"attention.key_length_mla", "attention.value_length", "attention.value_length_mla", "vocab_size"}
_READ |= {"expert_gating_func", "nextn_predict_layers", "rope.freq_base", "rope.scale_linear"}
_SCORES = {0: "softmax", 1: "softmax", 2: "sigmoid"}  # 0, or no entry, is that of old files
# Without a part in these models; another value than 0 or 1 would change what they compute.
_SCALES = ("logit_scale", "residual_scale", "embedding_scale", "attention.scale", "attention.clamp_kqv")


def read_config(meta: Mapping[str, Any], tensors: dict[str, Any]) -> ModelConfig:
    """Build the ModelConfig from the metadata; pop the rotary factors, not a weight, from `tensors`."""
    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise CheckpointError(f"the architecture is {arch!r}; supported are {', '.join(ARCHITECTURES)}")
    fields = {k.removeprefix(f"{arch}."): _short(v) for k, v in meta.items() if k.startswith(f"{arch}.")}
    latent, sparse = arch == "deepseek2", "deepseek" in arch and bool(fields.get("expert_count"))
    needed = _DENSE | (_EXPERTS if sparse else {}) | (_LATENT if latent else {})
    missing = [f"{arch}.{key}" for key in needed if key not in fields]
    if missing or "token_embd.weight" not in tensors:
        raise CheckpointError(
            f"no {', '.join(missing) or 'token_embd.weight'}; the file holds no {arch} model"
        )
    if odd := [k for k in _SCALES if fields.get(k) not in (None, 0.0, 1.0)]:
        raise CheckpointError(f"{arch}.{odd[0]} is {fields[odd[0]]}; no DeepSeek model has it")
    unknown = [k for k in fields if k not in _READ and not k.startswith("rope.") and k not in _SCALES]
    if unknown:
        log.warning("GGUF keys that jaxseek does not know, and passes over: %s", some(sorted(unknown)))
    optional = {k: name for k, name in _OPTIONAL.items() if sparse or not k.startswith(("expert", "leading"))}
    raw = {name: fields[key] for key, name in (needed | optional).items() if key in fields}
    raw |= {f"{key}_id": meta.get(f"tokenizer.ggml.{name}_token_id") for key, name in NAMED.items()}
    raw["model_type"] = arch
    raw["num_key_value_heads"] = fields.get("attention.head_count_kv")
    raw["vocab_size"] = shape_of(tensors["token_embd.weight"])[0]
    raw["tie_word_embeddings"] = "output.weight" not in tensors
    raw["attention_bias"] = "blk.0.attn_q.bias" in tensors
    raw["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    raw["dtype"] = exact_dtype(t for name, t in tensors.items() if "exp_probs_b" not in name)
    if nextn := fields.get("nextn_predict_layers"):
        raw["num_hidden_layers"] -= nextn
        _leave_out(tensors, raw["num_hidden_layers"])
    if "sliding_window" in raw:
        raw |= {"use_sliding_window": True, "max_window_layers": 0}
    raw |= _latent(fields) if latent else {"head_dim": fields.get("attention.key_length")}
    raw |= _router(fields, raw, tensors, latent) if sparse else {}
    raw["rope_theta"] = float(fields.get("rope.freq_base", 10000.0))
    factors = tensors.pop("rope_freqs.weight", None)
    raw["rope_scaling"] = _rope_scaling(fields, factors, raw["rope_theta"], latent)
    cfg = ModelConfig.from_hf(raw)
    rotated = fields.get("rope.dimension_count", cfg.rope_dim)
    if rotated != cfg.rope_dim:
        raise CheckpointError(f"rope.dimension_count is {rotated}, expected the whole head, {cfg.rope_dim}")
    return cfg


def _short(value: Any) -> Any:
    """Return a float32 as the shortest number that it stands for: 1e-05, not its decimal expansion."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _leave_out(tensors: dict[str, Any], layers: int) -> None:
    """Remove the tensors of multi-token modules, which are the layers from `layers` on."""
    gone = [n for n in tensors if (found := re.match(r"blk\.(\d+)\.", n)) and int(found[1]) >= layers]
    for name in gone:
        del tensors[name]
    log.warning("the multi-token module of a GGUF file is not read: %d tensors are left out", len(gone))


def _latent(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the widths of a latent head; newer files have those of the cache in `key_length`."""
    key, value = (
        fields.get(f"attention.{which}_length_mla", fields.get(f"attention.{which}_length"))
        for which in ("key", "value")
    )
    if type(key) is not int or type(value) is not int:
        raise CheckpointError(f"attention.key_length is {key!r}, value_length {value!r}; expected integers")
    return {"qk_nope_head_dim": key - fields["rope.dimension_count"], "v_head_dim": value}


def _router(
    fields: Mapping[str, Any], raw: Mapping[str, Any], tensors: Iterable[str], latent: bool
) -> dict[str, Any]:
    """Return the router's fields, and the family that has this router."""
    gating = fields.get("expert_gating_func", 0)
    if gating not in _SCORES:
        raise CheckpointError(f"expert_gating_func is {gating}; supported are 1, softmax, and 2, sigmoid")
    biased = any("exp_probs_b" in name for name in tensors)
    out: dict[str, Any] = {
        "scoring_func": _SCORES[gating],
        "norm_topk_prob": raw.get("norm_topk_prob", False),
    }
    if latent and "n_group" not in raw:
        out |= _groups(raw)
    grouped = (out | dict(raw)).get("n_group", 1) > 1
    out["topk_method"] = "noaux_tc" if biased else "group_limited_greedy" if grouped else "greedy"
    if latent:
        v3 = biased or gating == 2 or out["norm_topk_prob"]
        out["model_type"] = "deepseek_v3" if v3 else "deepseek_v2"
    return out


def _groups(raw: Mapping[str, Any]) -> dict[str, int]:
    """Return the groups of experts of the release with these sizes: older files do not tell them."""
    sizes = ("hidden_size", "num_hidden_layers", "n_routed_experts", "kv_lora_rank")
    for name in presets():
        cfg = ModelConfig.from_preset(name)
        if cfg.n_group > 1 and all(getattr(cfg, size) == raw[size] for size in sizes):
            log.warning(
                "the file does not tell the groups of experts; they are those of %s: the best %d of %d",
                name,
                cfg.topk_group,
                cfg.n_group,
            )
            return {"n_group": cfg.n_group, "topk_group": cfg.topk_group}
    return {}


def _rope_scaling(
    fields: Mapping[str, Any], factors: Any, theta: float, latent: bool
) -> dict[str, Any] | None:
    """Return config.json's `rope_scaling`. Llama 3's has no GGUF field and is inferred from `factors`."""
    given = {k.removeprefix("rope.scaling."): v for k, v in fields.items() if k.startswith("rope.scaling.")}
    linear = fields.get("rope.scale_linear", 1.0)  # of old files
    kind = given.pop("type", "none" if linear == 1.0 else "linear")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": given.pop("factor", linear)}
    length = given.pop("original_context_length", 0)
    given.pop("finetuned", None)
    if kind == "yarn":
        for name in ("attn_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"):
            if name in given:
                scaling[name.removeprefix("yarn_")] = given.pop(name)
        if latent:  # llama.cpp writes a tenth of mscale_all_dim, which every release has as mscale too
            mscale = given.pop("yarn_log_multiplier", None)
            same = (
                {} if mscale is None else dict.fromkeys(("mscale", "mscale_all_dim"), round(10 * mscale, 6))
            )
            scaling |= same or {"attention_factor": 1.0}
    if given or kind not in ("none", "linear", "yarn"):
        also = f" with {', '.join(given)}" if given else ""
        raise CheckpointError(f"rope.scaling.type is {kind!r}{also}; supported are none, linear and yarn")
    if factors is not None:
        factor, low, high, length = float(factors.data.max()), 1.0, 4.0, 8192  # as in Llama 3.1, 3.2, 3.3
        turns = length / (2 * math.pi * theta ** (np.arange(len(factors.data)) / len(factors.data)))
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        if not np.allclose(factors.data, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
            raise CheckpointError("rope_freqs.weight is not Llama 3's; no other rotary factors are supported")
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    if scaling["rope_type"] in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = length
    return None if scaling["rope_type"] == "none" else scaling


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Return the shape of a gguf.ReaderTensor, rows first."""
    return tuple(int(n) for n in reversed(tensor.shape))


def exact_dtype(tensors: Iterable[Any]) -> str:
    """Return the narrowest dtype that holds every value: bfloat16, float16 or float32.

    16 bits suffice only for a file that was never quantised. Norms are stored as float32 in every GGUF file,
    but those of a bfloat16 model are exact in bfloat16.
    """

    def fits(tensor: Any, kind: str, dtype: Any) -> bool:
        if tensor.tensor_type.name != "F32":
            return tensor.tensor_type.name == kind
        with np.errstate(over="ignore"):
            return np.array_equal(tensor.data.astype(dtype).astype(np.float32), tensor.data)

    tensors = list(tensors)
    for kind, dtype in (("BF16", ml_dtypes.bfloat16), ("F16", np.float16)):
        if all(fits(tensor, kind, dtype) for tensor in tensors):
            return np.dtype(dtype).name
    return "float32"
