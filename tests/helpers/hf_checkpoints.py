"""Small Hugging Face checkpoints of every family with random tensors, in plain numbers and in FP8."""

import json
import re

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from jaxseek.checkpoint import models
from jaxseek.config.model import ModelConfig
from jaxseek.sharding.parameters import parameters
from jaxseek_convert import hf_tensors
from jaxseek_convert.safetensors_io import write_safetensors

BF16 = np.dtype(ml_dtypes.bfloat16)
F8 = np.dtype(ml_dtypes.float8_e4m3fn)

BASE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
MLA = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
V2 = {"model_type": "deepseek_v2", **BASE, **MOE, **MLA}
V3 = {"model_type": "deepseek_v3", **BASE, **MOE, **MLA, "n_group": 2, "topk_group": 1}
MODELS = {
    "llama": {"model_type": "llama", **BASE, "num_key_value_heads": 2},
    "llama, all biases": {"model_type": "llama", **BASE, "attention_bias": True, "mlp_bias": True},
    "llama, tied": {"model_type": "llama", **BASE, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", **BASE, "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", **BASE, "num_key_value_heads": 2, "head_dim": 6},
    "deepseek": {"model_type": "deepseek", **BASE, **MOE},
    "deepseek_v2": V2 | {"mlp_bias": True},
    "deepseek_v2, no q_lora": V2 | {"q_lora_rank": None},
    "deepseek_v2, every second layer sparse": V2 | {"moe_layer_freq": 2, "num_hidden_layers": 5},
    "deepseek_v3": V3 | {"num_nextn_predict_layers": 1},
    "deepseek_v3, two depths, tied": V3 | {"num_nextn_predict_layers": 2, "tie_word_embeddings": True},
    "deepseek_v3, attention biases": V3 | {"attention_bias": True, "num_nextn_predict_layers": 0},
    "deepseek_v32": V3
    | {"model_type": "deepseek_v32", "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
    | {"num_nextn_predict_layers": 1},
}
# Sizes that are no multiples of a block of 128, and heads that straddle blocks.
ODD = MODELS["deepseek_v3"] | {
    "hidden_size": 160,
    "intermediate_size": 200,
    "moe_intermediate_size": 136,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": 144,
    "kv_lora_rank": 130,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 6,
    "v_head_dim": 20,
    "num_hidden_layers": 2,
    "n_routed_experts": 2,
    "n_group": 1,
}


def random_tensors(raw, dtype=BF16, seed=0):
    """A checkpoint's tensors; router biases float32 and copies equal, as in releases."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in hf_tensors(ModelConfig.from_hf(raw)).items():
        fixed = np.float32 if name.endswith("e_score_correction_bias") else dtype
        out[name] = rng.standard_normal(shape, np.float32).astype(fixed)
    for name in out:
        if re.search(r"layers\.\d+\.embed_tokens|shared_head\.head", name):
            tied = raw.get("tie_word_embeddings") or "embed_tokens" in name
            out[name] = out["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return out


def write_hf(path, raw, tensors):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    save_file(tensors, path / "model.safetensors")
    return path


def write_shards(path, raw, tensors, shards=1, **quantization):
    """A Hugging Face directory; tensors go round the shards, so scales are in others than their weights."""
    path.mkdir()
    how = {"quantization_config": {"quant_method": "fp8", **quantization}} if quantization else {}
    (path / "config.json").write_text(json.dumps(raw | how))
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        part = {n: t for n, t in tensors.items() if where[n] == file}
        write_safetensors(path, {n: (t.shape, t.dtype) for n, t in part.items()}, part.items())
        (path / "model.safetensors").rename(path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return path


def is_linear(name):
    return bool(re.search(r"_proj(_with_mqa)?\.weight$", name)) and "eh_proj" not in name


def to_fp8(tensors, block=(5, 3)):
    """Replace linear weights by FP8 with scales; gives the numbers that these stand for."""
    exact = {}
    for name, w in list(tensors.items()):
        if is_linear(name):
            shape = [-(-n // b) for n, b in zip(w.shape, block)]
            scale = np.random.default_rng(1).uniform(0.5, 2, shape).astype(np.float32)
            tensors[name], tensors[f"{name}_scale_inv"] = w.astype(F8), scale
            grid = np.kron(scale, np.ones(block, np.float32))[: w.shape[0], : w.shape[1]]
            exact[name] = tensors[name].astype(np.float32) * grid
    return exact


def fp8_tensors(raw, block=(128, 128), powers=False, scale_dtype=np.float32):
    """A checkpoint's tensors with FP8 in place of linear weights, as releases have it."""
    rng = np.random.default_rng(7)
    out = random_tensors(raw)
    for name in [n for n in out if is_linear(n)]:
        shape = out[name].shape
        codes = rng.integers(0, 256, shape, np.uint8)
        codes[codes & 0x7F == 0x7F] = 1  # no NaN
        grid = [-(-n // b) for n, b in zip(shape, block)]
        scale = 2.0 ** rng.integers(-9, 2, grid) if powers else rng.uniform(1e-4, 1e-2, grid)
        out[name], out[f"{name}_scale_inv"] = codes.view(F8), scale.astype(scale_dtype)
    return out


def read_with_safetensors(path):
    """All tensors of a directory as the safetensors package decodes them: name to (dtype, shape, bytes)."""
    out = {}
    for file in path.glob("*.safetensors"):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            out[name] = (entry["dtype"], list(entry["shape"]), bytes(entry["data"]))
    return out


def values(model):
    return {path: np.asarray(v.get_value()) for path, v in parameters(model).items()}


def same_model(a, b):
    a, b = values(a), values(b)
    return a.keys() == b.keys() and all(models.same_bits(a[p], b[p]) for p in a)
