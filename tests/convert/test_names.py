"""Checkpoints as people have them: names under any prefix, other files beside, and what errors tell."""

import json

import numpy as np
import pytest
from hf_checkpoints import (
    MODELS,
    random_tensors,
    read_with_safetensors,
    same_model,
    write_hf,
    write_shards,
)
from safetensors.numpy import save_file

from jaxseek.api import load
from jaxseek.checkpoint.models import CheckpointError
from jaxseek.config.model import ModelConfig
from jaxseek_convert import convert, load_hf
from jaxseek_convert.dry_run import rehearse

TIED, V3, QWEN2 = MODELS["llama, tied"], MODELS["deepseek_v3"], MODELS["qwen2"]


def renamed(tensors, prefix, head):
    """The tensors of a model under another prefix; `head` stands before `lm_head`."""
    new = {"model": prefix.removesuffix("."), "lm_head": f"{head}lm_head"}
    return {
        f"{new[first]}.{rest}".lstrip("."): t
        for n, t in tensors.items()
        for first, _, rest in [n.partition(".")]
    }


# -------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("", ""),
        ("language.model.", "language."),
        ("model.language_model.", ""),
        ("_orig_mod.model.", "_orig_mod."),
    ],
)
@pytest.mark.parametrize("raw", [TIED, V3], ids=["llama, tied", "deepseek_v3"])
def test_a_model_is_read_under_any_prefix(raw, prefix, head, tmp_path, caplog):
    tensors = random_tensors(raw)
    plain = write_hf(tmp_path / "plain", raw, tensors)
    other = write_hf(tmp_path / "other", raw, renamed(tensors, prefix, head))
    assert same_model(load_hf(plain), load_hf(other))
    assert f"its tensors are named {prefix}layers..., and read as model.layers..." in caplog.text
    convert(other, tmp_path / "back", to="hf", progress=False)
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(plain)


@pytest.mark.parametrize(("prefix", "head"), [("language.model.", "language."), ("model.", "")])
def test_the_language_model_is_taken_out_of_a_model_of_images(prefix, head, tmp_path, caplog):
    tensors = random_tensors(V3)
    plain = write_hf(tmp_path / "plain", V3, tensors)
    eyes = {"vision.blocks.0.attn.qkv.weight": np.ones((4, 4), np.float32)}
    eyes |= {"model.projector.layers.weight": np.ones((4, 4), np.float32)}
    whole = {"model_type": "deepseek_vl_v2", "language_config": V3, "vision_config": {"width": 4}}
    other = write_hf(tmp_path / "other", whole, renamed(tensors, prefix, head) | eyes)
    assert same_model(load_hf(plain), load_hf(other))
    assert "2 tensors beside the language model are not read (model.projector, vision.blocks)" in caplog.text
    convert(other, tmp_path / "back", to="hf", progress=False)
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(plain)


def test_a_multi_token_module_that_config_json_does_not_name_is_read(tmp_path, caplog):
    tensors = random_tensors(V3)
    raw = {k: v for k, v in V3.items() if k != "num_nextn_predict_layers"}
    path = write_hf(tmp_path / "hf", raw, tensors)
    assert load_hf(path).cfg.num_nextn_predict_layers == 1
    assert "has a multi-token module that config.json does not name" in caplog.text
    assert load_hf(path, mtp=False).cfg.num_nextn_predict_layers == 0


def test_the_biases_of_qwen2_are_used_whatever_config_json_says(tmp_path, caplog):
    tensors = random_tensors(QWEN2)
    path = write_hf(tmp_path / "hf", QWEN2 | {"attention_bias": False}, tensors)
    assert same_model(load_hf(path), load_hf(write_hf(tmp_path / "plain", QWEN2, tensors)))
    assert "has biases, against attention_bias false in config.json" in caplog.text
    without = {n: t for n, t in tensors.items() if not n.endswith("bias")}
    assert not load_hf(
        write_hf(tmp_path / "none", QWEN2 | {"attention_bias": False}, without)
    ).cfg.attention_bias


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (
            lambda t: {f"base_model.model.{n}.lora_A.weight": x for n, x in t.items()},
            "those of a LoRA adapter",
        ),
        (lambda t: {n.replace("weight", "qweight"): x for n, x in t.items()}, "fetch the original weights"),
        (lambda t: {"layers.0.attention.wq.weight": t["model.norm.weight"]}, "the authors' own names"),
        (lambda t: {n: x for n, x in t.items() if "lm_head" not in n}, "There is no output head"),
        (
            lambda t: t | {"model.layers.0.self_attn.q_norm.weight": t["model.norm.weight"]},
            "config.json's model_type .qwen3 has norms",
        ),
        (
            lambda t: t | {"model.layers.0.self_attn.q_proj.bias": t["model.norm.weight"]},
            "config.json's attention_bias",
        ),
        (
            lambda t: t | {"model.layers.3.input_layernorm.weight": t["model.norm.weight"]},
            "config.json's num_hidden_layers",
        ),
        (lambda t: {n: x for n, x in t.items() if "o_proj" not in n}, "is the download complete"),
    ],
)
def test_weights_that_do_not_match_are_told_with_the_likely_cause(change, cause, tmp_path):
    raw = MODELS["llama"]
    path = write_hf(tmp_path / "hf", raw, change(random_tensors(raw)))
    with pytest.raises(CheckpointError, match=rf"(?s)its tensors are not those of config.json.*{cause}"):
        load_hf(path)


# -------------------------------------------------------------------- files


def test_weights_of_another_kind_beside_the_model_are_told_and_not_read(tmp_path, caplog):
    tensors = random_tensors(TIED)
    path = write_hf(tmp_path / "hf", TIED, tensors)
    model = load_hf(path)
    for name in ("adapter_model", "consolidated", "optimizer"):
        save_file({"other": np.ones(3, np.float32)}, path / f"{name}.safetensors")
    assert same_model(load_hf(path), model)
    assert (
        "adapter_model.safetensors, consolidated.safetensors, optimizer.safetensors beside model.safe"
        in caplog.text
    )
    assert "the adapter is not applied; merge it" in caplog.text
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    assert same_model(load_hf(path), model)


def test_a_set_of_shards_is_read_whole_or_named(tmp_path):
    tensors = random_tensors(TIED)
    path = write_shards(tmp_path / "hf", TIED, tensors, 3)
    (path / "model.safetensors.index.json").unlink()
    save_file({"stray": np.ones(3, np.float32)}, path / "model-00002-of-00009.safetensors")
    assert same_model(load_hf(path), load_hf(write_hf(tmp_path / "plain", TIED, tensors)))
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"files of a set are absent \(1 of model-00001-of-00003"):
        load_hf(path)


@pytest.mark.parametrize("config", [False, True])
def test_an_adapters_folder_is_told_with_its_base_model(config, tmp_path):
    path = write_hf(
        tmp_path / "lora", TIED, {"base_model.model.x.lora_A.weight": np.ones((2, 2), np.float32)}
    )
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "the/base"}))
    if not config:
        (path / "config.json").unlink()
    for use in (
        load,
        lambda p: convert(p, tmp_path / "out", progress=False),
        lambda p: rehearse(p, tmp_path / "out"),
    ):
        with pytest.raises(
            CheckpointError, match=r"is an adapter .LoRA., not a model: .*the/base.*Merge it first"
        ):
            use(path)
    (path / "adapter_config.json").write_text("[" * 100)
    with pytest.raises(CheckpointError, match="changes the weights of its base model"):
        load(path)


def test_a_folder_that_holds_models_names_them(tmp_path):
    for step in (5, 10):
        write_hf(tmp_path / f"checkpoint-{step}", TIED, {})
    with pytest.raises(CheckpointError, match=r"holds .*checkpoint-10 and .*checkpoint-5: give one of these"):
        load(tmp_path)


def test_keys_and_files_that_are_not_understood_survive_the_way_there_and_back(tmp_path, caplog):
    more = {
        "auto_map": {"AutoModel": "modeling_x.X"},
        "ep_size": 1,
        "new_trick": [3],
        "model_type": "kimi_k2",
    }
    more |= {"architectures": ["DeepseekV3ForCausalLM"]}
    path = write_hf(tmp_path / "hf", V3 | more, random_tensors(V3))
    files = {"modeling_x.py": b"import os\n", "LICENSE": b"MIT", "README.md": b"", "empty": b""}
    for name, content in files.items():
        (path / name).write_bytes(content)
    (path / "figures").mkdir()
    (path / "pytorch_model.bin").write_bytes(b"x")
    convert(path, tmp_path / "there", progress=False)
    assert "not carried along: figures/, pytorch_model.bin" in caplog.text
    convert(tmp_path / "there", tmp_path / "back", to="hf", progress=False)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {k: back[k] for k in more} == more
    assert {name: (tmp_path / "back" / name).read_bytes() for name in files} == files
    assert not (tmp_path / "back" / "jaxseek.json").exists()
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(path)
    assert ModelConfig.from_hf(tmp_path / "back") == ModelConfig.from_hf(tmp_path / "there")


# -------------------------------------------------------------------- the rehearsal


def fused(tensors):
    """The experts as transformers 5 holds them in memory."""
    out = dict(tensors)
    for layer in (1, 2, 3):
        names = [f"model.layers.{layer}.mlp.experts.{e}." for e in range(4)]
        gate, up, down = (
            np.stack([out.pop(f"{n}{k}_proj.weight") for n in names]) for k in ("gate", "up", "down")
        )
        out[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        out[f"model.layers.{layer}.mlp.experts.down_proj"] = down
    return out


SOURCES = {
    "as released": lambda t: t,
    "without the module that config.json names": lambda t: {
        n: x for n, x in t.items() if ".layers.3." not in n
    },
    "buffers": lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)},
    "no prefix": lambda t: renamed(t, "", ""),
    "experts fused": fused,
}


@pytest.mark.parametrize("weights", [True, False], ids=["with weights", "index alone"])
@pytest.mark.parametrize("change", SOURCES.values(), ids=SOURCES)
def test_the_rehearsal_says_what_convert_does(change, weights, tmp_path):
    path = write_shards(tmp_path / "hf", V3, change(random_tensors(V3)), 2)
    done = convert(path, tmp_path / "out", progress=False)
    if not weights:
        (path / "model-00001-of-00002.safetensors").unlink()
    plan = rehearse(path, tmp_path / "out2")
    assert plan["bytes_written"] == done["bytes"]
    assert plan["parameters"] == done["parameters"]
    stored = {d["source"] for d in plan["destinations"] if not d["target"].startswith("not stored")}
    assert len(stored) == done["tensors"]
