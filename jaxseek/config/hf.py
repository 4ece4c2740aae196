"""Hugging Face's `config.json`, both ways.

`read` takes both dialects (`rope_scaling` + `rope_theta`, or transformers 5's `rope_parameters`). A key that
changes the computation is obeyed, or refused if no model here computes so; a key that is known to change
nothing is passed over; an unknown one is warned of by name. `write` gives the dialect that transformers 4 and
5 both read. Sources: transformers' configuration classes; the configs of deepseek-ai's releases.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

from jaxseek.config.model import (
    DTYPES,
    FAMILIES,
    INDEX_SHAPE,
    MLA,
    MLA_SHAPE,
    MOE_FIELDS,
    MOE_SHAPE,
    SHAPE,
    ConfigError,
    ModelConfig,
    RopeConfig,
    absent_fields,
    yarn_mscale,
)
from jaxseek.storage.untrusted import brief

log = logging.getLogger("jaxseek")

_TOWERS = ("language_config", "text_config", "llm_config")  # a language model inside a model of images too
_SHARED = ("dtype", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
_ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
    "torch_dtype": "dtype",
}
_ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}
_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}

# Keys that change what a model computes, with the values that mean what is computed here. None, too, does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "activation_function": ("silu", "swish"),
    "norm_type": ("rmsnorm", "rms_norm", "rms"),
    "normalization_type": ("rmsnorm", "rms_norm", "rms"),
    "position_embedding_type": ("rope", "rotary", "absolute"),  # transformers once wrote the last everywhere
    "partial_rotary_factor": (1.0,),
    "rotary_pct": (1.0,),
    "rope_ratio": (1.0,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "attention_chunk_size": (),
    "layer_norm_eps": (),
    "norm_eps": (),
    "clip_qkv": (),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "scale_emb": (1.0,),
    "scale_embeddings": (False,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "alibi": (False,),
    "use_alibi": (False,),
    "bias": (False,),
    "use_bias": (False,),
    "o_bias": (False,),
    "lm_head_bias": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "expert_bias": (False,),
    "use_mla": (True,),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "rm_head": (False,),
    "lm_head": (True,),
}
# Where a family has another meaning, or does what others do not.
_NEUTRAL_IN: dict[str, dict[str, tuple[Any, ...]]] = {
    "qwen3": dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm"), (True,)),
    "llama": {"use_mla": (False,)},
    "deepseek": {"use_mla": (False,)},
}

# Keys without a part in the forward pass: bookkeeping, training, generation, and what the checks below read.
_HARMLESS = frozenset(
    re.findall(
        r"\w+",
        """
        _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
        _name_or_path architectures attention_dropout attn_dropout attn_implementation attn_pdrop auto_map
        aux_loss_alpha bad_words_ids begin_suppress_tokens chunk_size_feed_forward classifier_dropout
        compression_config cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
        dropout early_stopping embd_pdrop encoder_no_repeat_ngram_size ep_size
        exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
        gradient_checkpointing hidden_dropout hidden_dropout_prob id2label is_decoder
        keys_to_ignore_at_inference label2id layer_types length_penalty max_length max_window_layers
        min_length mlp_layer_types model_max_length model_type no_repeat_ngram_size num_beam_groups
        num_beams num_labels num_return_sequences output_attentions output_hidden_states
        output_router_logits output_scores prefix pretraining_tp problem_type pruned_heads qk_head_dim
        quantization_config remove_invalid_values repetition_penalty resid_pdrop return_dict
        return_dict_in_generate router_aux_loss_coef sep_token_id seq_aux sliding_window suppress_tokens
        task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
        torchscript transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
        use_return_dict use_sliding_window
        """,
    )
)
# rope_type -> (required fields, optional fields), beside rope_theta.
_ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
    ),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
}
_ROPE_KNOWN = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "attn_factor", "mrope_section"}
_ROPE_KNOWN |= {k for needs, may_have in _ROPE_FIELDS.values() for k in (*needs, *may_have)}
_MAX_WINDOW_LAYERS = 28  # Qwen2Config's and Qwen3Config's default


# -------------------------------------------------------------------- reading


def read(source: Mapping[str, Any], where: str = "config") -> ModelConfig:
    """Return the config of the (language) model that a config.json describes; `where` is named in warnings.

    Raises ConfigError as `ModelConfig.from_hf` does.
    """
    raw = dict(tower(source))
    kind = _family(raw)
    for alias, name in _ALIASES.items():
        if raw.get(name) is None and raw.get(alias) is not None:
            raw[name] = raw[alias]
    moe = "deepseek" in kind and bool(raw.get("n_routed_experts"))
    required = (*SHAPE, "max_position_embeddings")
    required += MLA_SHAPE * (kind in MLA) + INDEX_SHAPE * (kind == "deepseek_v32") + MOE_SHAPE * moe
    if missing := [k for k in required if raw.get(k) is None]:
        raise ConfigError(f"missing field(s) {', '.join(missing)} for model_type {kind!r}")
    if kind == "deepseek_v32" and isinstance(layer_types := raw.get("mlp_layer_types"), list):
        raw["first_k_dense_replace"] = _leading_dense(layer_types)
    _refuse_other_computations(raw, kind)
    if unknown := sorted(raw.keys() - _names() - _ALIASES.keys() - _ROPE_KEYS - _HARMLESS - _NEUTRAL.keys()):
        _warn(f"{where}: keys that jaxseek does not know, and passes over: {', '.join(map(repr, unknown))}")

    _, defaults, fixed = FAMILIES[kind]
    unread = {"rope"} | (set() if moe else MOE_FIELDS - {"n_routed_experts"})
    unread |= {"head_dim"} if kind in MLA else set()
    unread |= {"mlp_bias"} & fixed.keys()  # transformers' classes do not read it either
    unread |= {*MLA_SHAPE, "q_lora_rank"} if raw.get("use_mla") is False else set()
    given = {k: raw[k] for k in _names() - unread if raw.get(k) is not None}
    given |= {k: 1 for k in ("n_group", "topk_group") if moe and raw.get(k, 1) is None}  # null: no groups
    if given.get("q_lora_rank") == 0:  # the official demo writes 0 for null
        del given["q_lora_rank"]
    if kind in MLA:  # MLA has no KV heads; transformers defaults to V3's 128
        given["num_key_value_heads"] = raw["num_attention_heads"]
    out: dict[str, Any] = {k: v for k, v in (defaults | fixed).items() if k not in unread} | given
    out["model_type"] = kind
    out.setdefault("num_key_value_heads", raw["num_attention_heads"])
    out["rope"] = _rope(raw, where)
    out["dtype"] = _dtype(raw.get("dtype"), where)
    if isinstance(out.get("eos_token_id"), list):
        out["eos_token_id"] = tuple(out["eos_token_id"])
    return ModelConfig(**out)


def tower(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that describes the language model: often all of it."""
    for key in _TOWERS:
        inner = raw.get(key)
        if isinstance(inner, dict) and inner.keys() & {"hidden_size", "model_type", "architectures"}:
            return {k: raw[k] for k in (*_SHARED, "quantization_config") if k in raw} | inner
    return raw


def kept(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config.json that a ModelConfig does not hold, for `write` to be joined by them.

    A foreign `model_type` (kimi_k2) is one of them. The classes that a model of images names are not: what is
    written is its language model alone.
    """
    raw = tower(source)
    kind, inside = _family(raw), raw is not source
    moe = "deepseek" in kind and bool(raw.get("n_routed_experts") or raw.get("num_local_experts"))
    held = _fields(kind, moe) | {"dtype", "architectures", "hidden_act", "mlp_layer_types", "use_mla"}
    held |= {"quantization_config", "compression_config"}
    held |= {*MLA_SHAPE, "q_lora_rank"} if raw.get("use_mla") is False else set()
    held |= {"auto_map"} if inside else set()
    held |= {"model_type"} if inside or raw.get("model_type") in (None, *FAMILIES) else set()
    return {k: v for k, v in raw.items() if k not in held}


def _names() -> set[str]:
    return {f.name for f in dataclasses.fields(ModelConfig)}


def _fields(kind: str, moe: bool) -> set[str]:
    """Return the keys of config.json that this family obeys."""
    return (_names() - absent_fields(kind, moe) - {"rope", "model_type"}) | _ALIASES.keys() | _ROPE_KEYS


def _family(raw: Mapping[str, Any]) -> str:
    """Return the model type, which the classes in `architectures` tell where `model_type` is of another name.

    DeepSeek-V2 without latent attention (the small VL2, OCR) is the architecture of DeepSeekMoE.
    """
    kind, classes = raw.get("model_type"), raw.get("architectures")
    stems = {cls.removesuffix("ForCausalLM"): name for name, (cls, _, _) in FAMILIES.items()}
    names = [c for c in classes if isinstance(c, str)] if isinstance(classes, list) else []
    named = {re.sub(r"(LMHead)?Model$|For[A-Z]\w*$", "", c) for c in names}
    told = sorted({stems[stem] for stem in named & stems.keys()})
    known = isinstance(kind, str) and kind in FAMILIES
    if known and told not in ([], [kind]):
        raise ConfigError(
            f"model_type is {brief(kind)}, but architectures is {brief(classes)}; expected two names of one "
            "family. Correct the one that is wrong"
        )
    if not known and len(told) != 1:
        ours = re.search("deepseek|multi_modality|janus", f"{kind} {names}", re.IGNORECASE)
        whose = "a release of DeepSeek that jaxseek does not support" if ours else "not DeepSeek's"
        raise ConfigError(
            f"model_type is {brief(kind)}; jaxseek knows {', '.join(sorted(FAMILIES))}. "
            f"This architecture{f' ({names[0]})' if names else ''} is {whose}."
        )
    found = str(kind) if known else told[0]
    if found == "deepseek_v2" and raw.get("use_mla") is False:
        return "deepseek"
    return found


def _refuse_other_computations(raw: Mapping[str, Any], kind: str) -> None:
    """Raise ConfigError for keys that ask for what no model here computes, all at once."""
    problems = []
    for name, values in (_NEUTRAL | _NEUTRAL_IN.get(kind, {})).items():
        value = raw.get(name)
        if name in ("layer_norm_eps", "norm_eps") and raw.get("rms_norm_eps") is not None:
            continue  # only another spelling of it, where it stands alone, would change anything
        if value is not None and value not in values:
            what = f"every DeepSeek model uses {values[0]!r}" if values else "no DeepSeek model has it"
            problems.append(f"{name} is {brief(value)}; {what}")
    if raw.get("qkv_bias") not in (None, raw.get("attention_bias", kind == "qwen2")):
        problems.append(f"qkv_bias is {brief(raw['qkv_bias'])}; jaxseek reads attention_bias in its place")
    problems += _windows(raw, kind)
    if problems:
        raise ConfigError("; ".join(problems))


def _windows(raw: Mapping[str, Any], kind: str) -> list[str]:
    """Return what is wrong if a layer sees less than the context (Qwen2Config, Qwen3Config)."""
    types, window = raw.get("layer_types"), raw.get("sliding_window")
    known = (
        "full_attention",
        "sliding_attention",
        *(("indexed_attention",) if kind == "deepseek_v32" else ()),
    )
    if isinstance(types, list) and (other := [t for t in types if t not in known]):
        return [f"layer_types has {brief(other[0])}; every DeepSeek model uses 'full_attention'"]
    if not raw.get("use_sliding_window") or window is None:
        return []
    default = _MAX_WINDOW_LAYERS if "qwen" in kind else 0
    first = raw.get("max_window_layers") if raw.get("max_window_layers") is not None else default
    numbers = (window, first, raw["num_hidden_layers"], raw["max_position_embeddings"])
    if any(type(n) is not int for n in numbers):
        return [f"sliding_window is {brief(window)} from layer {brief(first)} on, expected integers"]
    some = "sliding_attention" in types if isinstance(types, list) else first < raw["num_hidden_layers"]
    if not some or window >= raw["max_position_embeddings"]:
        return []
    return [
        f"use_sliding_window is true, and sliding_window {window} is below max_position_embeddings "
        f"{raw['max_position_embeddings']}; no DeepSeek model uses a sliding window"
    ]


def _leading_dense(layer_types: list[str]) -> int:
    """Convert DeepseekV32Config's `mlp_layer_types` to `first_k_dense_replace`.

    Raises ConfigError if a dense layer follows a sparse one.
    """
    k = layer_types.index("sparse") if "sparse" in layer_types else len(layer_types)
    if layer_types[k:] != ["sparse"] * (len(layer_types) - k):
        raise ConfigError(
            f"mlp_layer_types is {brief(layer_types)}; expected dense layers first, then sparse ones only"
        )
    return k


def _dtype(value: Any, where: str) -> str:
    """Return the dtype that config.json hints at; a hint that cannot be read is bfloat16, with a warning.

    The tensors say what they are.
    """
    if value is None:
        return "bfloat16"
    name = str(value).removeprefix("torch.")
    name = _DTYPE_NAMES.get(name, name)
    if name not in DTYPES:
        _warn(f"{where}: dtype is {brief(value)}, expected {', '.join(DTYPES)}; read as bfloat16")
        return "bfloat16"
    return name


def _rope(raw: dict[str, Any], where: str) -> RopeConfig:
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
        raise ConfigError(f"rope parameters are {brief(given)}, expected one flat table for all layers")
    given = {k: v for k, v in given.items() if v is not None}
    kind = given.get("rope_type") or given.get("type") or "default"
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise ConfigError(f"rope_type is {brief(kind)}; jaxseek knows {', '.join(_ROPE_FIELDS)}")
    if (partial := given.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"partial_rotary_factor is {brief(partial)}; every DeepSeek model uses 1.0")
    needs, may_have = _ROPE_FIELDS[kind]
    if "original_max_position_embeddings" in needs:  # transformers' default, standardize_rope_params
        given.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
    if missing := [k for k in needs if k not in given]:
        raise ConfigError(f"rope_type {kind!r} needs {', '.join(missing)}")
    if unknown := sorted(map(repr, given.keys() - _ROPE_KNOWN)):
        _warn(f"{where}: rope keys that jaxseek does not know, and passes over: {', '.join(unknown)}")
    values: dict[str, Any] = {k: given[k] for k in (*needs, *may_have) if k in given}
    if kind == "yarn" and "attn_factor" in given and "attention_factor" not in given:
        values["attention_factor"] = _attention_factor(given["attn_factor"], given["factor"])
    values["rope_theta"] = given.get("rope_theta") or raw.get("rope_theta") or 10000.0
    values["rope_type"] = kind
    return RopeConfig(**values)


def _attention_factor(attn_factor: Any, factor: Any) -> float:
    """Return the factor of cos and sin for `attn_factor`, by which YaRN's own temperature is multiplied.

    DeepSeek-R1-0528-Qwen3-8B has it, so that the product is 1 (vLLM's YaRNScalingRotaryEmbedding, llama.cpp).
    """
    if not all(type(n) in (int, float) for n in (attn_factor, factor)):
        raise ConfigError(f"attn_factor is {brief(attn_factor)} and factor {brief(factor)}, expected numbers")
    return round(attn_factor * yarn_mscale(factor, 1.0), 12)


@functools.cache
def _warn(text: str) -> None:
    """Log a warning once: a command may read the same config several times."""
    log.warning("%s", text)


# -------------------------------------------------------------------- writing


def write(cfg: ModelConfig) -> dict[str, Any]:
    """Return a model's config.json as a dict; `read` gives the config again."""
    absent = absent_fields(cfg.model_type, cfg.n_routed_experts > 0) | {"rope", "dtype", "generation"}
    out = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in absent}
    if cfg.is_mla and not cfg.n_routed_experts:  # transformers' default is a mixture of experts
        out |= {"n_routed_experts": 0, "first_k_dense_replace": cfg.num_hidden_layers}
    if not cfg.num_nextn_predict_layers and cfg.model_type != "deepseek_v3":  # V3's class defaults to 1
        del out["num_nextn_predict_layers"]
    if isinstance(cfg.eos_token_id, tuple):
        out["eos_token_id"] = list(cfg.eos_token_id)
    return out | {
        "architectures": [FAMILIES[cfg.model_type][0]],
        "hidden_act": "silu",
        "torch_dtype": cfg.dtype,
        "rope_theta": cfg.rope.rope_theta,
        "rope_scaling": _rope_to_hf(cfg.rope),
    }


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.rope_type == "default":
        return None
    out: dict[str, Any] = {"type": rope.rope_type, "rope_type": rope.rope_type}
    needs, may_have = _ROPE_FIELDS[rope.rope_type]
    return out | {k: v for k in (*needs, *may_have) if (v := getattr(rope, k)) is not None}
