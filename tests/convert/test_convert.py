import json
import logging
import math
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hf_checkpoints import (
    BF16,
    F8,
    MODELS,
    random_tensors,
    read_with_safetensors,
    same_model,
    to_fp8,
    values,
    write_hf,
)

from jaxseek.api import load
from jaxseek.checkpoint import models
from jaxseek.checkpoint.models import CheckpointError
from jaxseek.config.model import ConfigError, ModelConfig
from jaxseek.sharding.parameters import parameters
from jaxseek_convert import convert, hf_tensors, load_hf, save_hf
from jaxseek_convert.conversion import target_forms
from jaxseek_convert.files import Writer
from jaxseek_convert.from_hf import HFCheckpoint
from jaxseek_convert.layout import Layout
from jaxseek_convert.safetensors_io import read_safetensors, write_safetensors

every_model = pytest.mark.parametrize("raw", MODELS.values(), ids=MODELS.keys())


@pytest.fixture
def hf(tmp_path):
    """Makes a Hugging Face directory of a model and gives its path, config and tensors."""

    def make(raw, dtype=BF16, change=lambda tensors: None, name="hf"):
        tensors = random_tensors(raw, dtype)
        change(tensors)
        return write_hf(tmp_path / name, raw, tensors), tensors

    return make


# ---------------------------------------------------------------- the table


def test_r1_has_the_tensors_and_elements_of_the_released_checkpoint():
    cfg = ModelConfig.from_preset("deepseek-r1")
    tensors = hf_tensors(cfg)
    assert sum(math.prod(s) for s in tensors.values()) == 684_489_845_504
    main = hf_tensors(cfg.replace(num_nextn_predict_layers=0))
    assert sum(math.prod(s) for s in main.values()) == 671_026_419_200
    # the released map has 91,991 names: these, and a scale for each linear weight but the router and eh_proj
    linear = re.compile(r"(_proj|_proj_with_mqa)\.weight$")
    assert len(tensors) + sum(bool(linear.search(n)) and "eh_proj" not in n for n in tensors) == 91_991
    assert tensors["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert tensors["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)


def test_v2_lite_has_the_tensors_of_the_released_checkpoint():
    tensors = hf_tensors(ModelConfig.from_preset("deepseek-v2-lite"))
    assert len(tensors) == 5_291
    assert sum(math.prod(s) for s in tensors.values()) == 15_706_484_224


@pytest.mark.parametrize(
    "name", ["deepseek-llm-67b-base", "deepseek-moe-16b-base", "deepseek-v3.2-exp", "tiny-v2"]
)
def test_a_presets_tensors_add_up_to_its_parameters(name):
    cfg = ModelConfig.from_preset(name)
    copies = cfg.num_nextn_predict_layers * 2 * cfg.vocab_size * cfg.hidden_size
    total = sum(math.prod(s) for s in hf_tensors(cfg).values())
    assert total == cfg.num_params(mtp=True) + copies


def test_rows_of_the_latent_projections_go_where_the_modelling_code_reads_them(hf):
    path, disk = hf(MODELS["deepseek_v3"], np.float32)
    held = values(load_hf(path))
    N, P, V, R = 4, 6, 8, 4
    kv_b = disk["model.layers.2.self_attn.kv_b_proj.weight"]
    q_b = disk["model.layers.2.self_attn.q_b_proj.weight"]
    for n in range(N):  # kv_b: each head's nope keys, then its values; q_b: nope, then rope
        rows = kv_b[n * (P + V) : (n + 1) * (P + V)]
        np.testing.assert_array_equal(held["stacks.1.attn.k_b_NPC"][1, n], rows[:P])
        np.testing.assert_array_equal(held["stacks.1.attn.v_b_NHC"][1, n], rows[P:])
        np.testing.assert_array_equal(
            held["stacks.1.attn.q_b_QNH"][1, :, n], q_b[n * (P + R) : (n + 1) * (P + R)].T
        )
    o = disk["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(held["stacks.0.attn.o_NHD"][0].reshape(N * V, 16), o.T)


def test_experts_and_multi_token_projections_go_where_the_modelling_code_reads_them(hf):
    path, disk = hf(MODELS["deepseek_v3"], np.float32)
    held = values(load_hf(path))
    for e in range(4):
        up = disk[f"model.layers.1.mlp.experts.{e}.up_proj.weight"]
        np.testing.assert_array_equal(held["stacks.1.mlp.up_EDF"][0, e], up.T)
    eh = disk["model.layers.3.eh_proj.weight"]  # the embedding's columns come first
    np.testing.assert_array_equal(held["mtp.0.proj_2DD"], [eh[:, :16].T, eh[:, 16:].T])
    np.testing.assert_array_equal(held["mtp.0.hidden_norm.scale_D"], disk["model.layers.3.hnorm.weight"])
    np.testing.assert_array_equal(held["head_DV"], disk["lm_head.weight"].T)


def test_grouped_query_heads_go_where_the_modelling_code_reads_them(hf):
    path, disk = hf(MODELS["qwen2"], np.float32)
    held = values(load_hf(path))
    q, bias = (disk[f"model.layers.1.self_attn.q_proj.{k}"] for k in ("weight", "bias"))
    for head in range(4):  # heads of a group share a key-value head: 0 and 1, 2 and 3
        k, g = divmod(head, 2)
        rows = slice(head * 4, head * 4 + 4)
        np.testing.assert_array_equal(held["stacks.0.attn.q_DKGH"][1, :, k, g], q[rows].T)
        np.testing.assert_array_equal(held["stacks.0.attn.q_bias_KGH"][1, k, g], bias[rows])


@pytest.mark.parametrize(
    ("line", "shapes"),
    [
        ("NH Q -> QNH", [(5, 3, 4)]),
        ("N[P|H] C -> NPC, NHC", [(3, 2, 5), (3, 4, 5)]),
        ("M 2D -> 2DM", [(2, 5, 3)]),
        ("E [F|f] D -> EDF, EDf", [(3, 5, 2), (3, 5, 4)]),
    ],
)
def test_a_part_of_a_parameter_is_that_part_of_the_whole(line, shapes):
    layout = Layout(line, shapes)
    whole = [np.random.default_rng(i).standard_normal(s) for i, s in enumerate(shapes)]
    disk = layout.join(whole)
    for i, parameter in enumerate(whole):
        for axis, n in enumerate(parameter.shape):
            index = [slice(0, m) for m in parameter.shape]
            index[axis] = slice(n // 2, n)
            part = layout.read(i, tuple(index), lambda at: disk[at])
            np.testing.assert_array_equal(part, parameter[tuple(index)])


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", [BF16, np.float32], ids=["bf16", "f32"])
@every_model
def test_weights_survive_the_way_there_and_back_bit_for_bit(raw, dtype, hf, tmp_path):
    path, disk = hf(raw, dtype)
    model = load_hf(path)
    source = HFCheckpoint(path)
    save_hf(model, tmp_path / "back", origin=source.origin(target_forms(source, "hf", None)))
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(path)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["torch_dtype"] == np.dtype(dtype).name
    assert len(disk) == len(read_safetensors(tmp_path / "back"))


@every_model
def test_every_mesh_gets_the_same_weights(raw, hf):
    path, _ = hf(raw)
    sparse = ModelConfig.from_hf(raw).n_routed_experts > 0
    assert same_model(load_hf(path), load_hf(path, "fsdp=2,tensor=2" + ",expert=2" * sparse))


def test_a_model_on_a_mesh_is_written_as_one_on_a_single_device(hf, tmp_path):
    path, _ = hf(MODELS["deepseek_v3"])
    save_hf(load_hf(path, "fsdp=2,tensor=2,expert=2"), tmp_path / "back", check=True)
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(path)


def test_a_shard_fetches_just_its_own_part_of_the_files(hf, monkeypatch):
    path, disk = hf(MODELS["deepseek_v3"])
    fetched = {}

    def fetch(self, name, index):
        part = self.tensors[name][index]
        fetched.setdefault(name, []).append(part.shape)
        return part

    monkeypatch.setattr(HFCheckpoint, "fetch", fetch)
    held = parameters(load_hf(path, "fsdp=2,tensor=2,expert=2"))

    def shard_shape(path):
        value = held[path].get_value()
        return value.sharding.shard_shape(value.shape)

    _, E, F, D = shard_shape("stacks.1.mlp.down_EFD")
    assert E == 2  # of four, so four of eight devices read expert 3
    assert fetched["model.layers.1.mlp.experts.3.down_proj.weight"] == [(D, F)] * 4
    _, Q, N, H = shard_shape("stacks.1.attn.q_b_QNH")
    assert N == 2
    assert set(fetched["model.layers.1.self_attn.q_b_proj.weight"]) == {(N * H, Q)}
    assert fetched.keys() == disk.keys() - {
        n for n in disk if "layers.3.embed" in n or "shared_head.head" in n
    }


def test_mixed_dtypes_are_held_in_the_widest_and_come_back_as_they_were(hf, tmp_path):
    def mix(tensors):
        for name in list(tensors):
            if "experts.1." in name:
                tensors[name] = tensors[name].astype(np.float32)
            if "experts.2." in name:
                tensors[name] = tensors[name].astype(np.float16)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
        tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = np.ones(4, BF16)

    path, _ = hf(MODELS["deepseek_v32"], change=mix)
    convert(path, tmp_path / "ours", progress=False)
    held = values(models.restore(tmp_path / "ours"))
    assert held["stacks.1.mlp.up_EDF"].dtype == np.float32
    assert held["norm.scale_D"].dtype == np.float16
    assert held["stacks.1.mlp.router_bias_E"].dtype == np.float32
    assert held["embed_VD"].dtype == BF16
    convert(tmp_path / "ours", tmp_path / "back", to="hf", progress=False)
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(path)


def test_router_biases_stay_float32_whatever_dtype_is_asked_for(hf, tmp_path):
    path, disk = hf(MODELS["deepseek_v3"], np.float32)
    model = load_hf(path, dtype="bfloat16")
    held = values(model)
    assert held["stacks.1.mlp.router_bias_E"].dtype == np.float32
    np.testing.assert_array_equal(held["embed_VD"], disk["model.embed_tokens.weight"].astype(BF16))
    save_hf(load_hf(path), tmp_path / "back", dtype=jnp.bfloat16)
    kinds = {name: kind for name, (kind, *_) in read_with_safetensors(tmp_path / "back").items()}
    assert kinds.pop("model.layers.1.mlp.gate.e_score_correction_bias") == "F32"
    assert kinds["model.layers.1.mlp.experts.0.up_proj.weight"] == "BF16"


def test_transformers_fused_expert_names_are_read_when_a_file_has_them(hf, tmp_path):
    path, disk = hf(MODELS["deepseek_v3"])
    fused = dict(disk)
    for layer in (1, 3):  # layer 2 keeps a tensor for each expert
        names = [f"model.layers.{layer}.mlp.experts.{e}." for e in range(4)]
        gate, up, down = (
            np.stack([fused.pop(f"{n}{kind}_proj.weight") for n in names]) for kind in ("gate", "up", "down")
        )
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = down
    other = write_hf(tmp_path / "fused", MODELS["deepseek_v3"], fused)
    assert same_model(load_hf(path), load_hf(other))
    assert same_model(load_hf(path), load_hf(other, "tensor=2,expert=2"))
    convert(other, tmp_path / "back", to="hf", progress=False)
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(path)


def test_rotary_buffers_of_old_checkpoints_are_ignored(hf):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    load_hf(hf(MODELS["llama"], change=add)[0])


# ---------------------------------------------------------------- FP8


@pytest.fixture
def fp8(hf):
    raw = MODELS["deepseek_v3"] | {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [5, 3]}
    }
    exact = {}
    path, _ = hf(MODELS["deepseek_v3"], np.float32, change=lambda tensors: exact.update(to_fp8(tensors)))
    (path / "config.json").write_text(json.dumps(raw))
    return path, exact


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2,expert=2"])
@pytest.mark.parametrize("dtype", ["float32", None])
def test_block_scaled_fp8_is_read_as_the_numbers_it_stands_for(fp8, mesh, dtype, tmp_path):
    path, exact = fp8
    save_hf(load_hf(path, mesh, dtype), tmp_path / "back")
    back = read_safetensors(tmp_path / "back")
    for name, value in exact.items():
        np.testing.assert_array_equal(back[name], value if dtype else value.astype(BF16))
        assert back[name].dtype == (np.float32 if dtype else BF16)


def test_an_fp8_checkpoint_is_converted_to_bfloat16(fp8, tmp_path):
    path, _ = fp8
    done = convert(path, tmp_path / "ours", dtype="bfloat16", progress=False, verify=True)
    assert done["dtype"] == "bfloat16"
    assert same_model(models.restore(tmp_path / "ours"), load_hf(path, dtype="bfloat16"))


def test_fp8_survives_the_way_there_and_back_bit_for_bit(fp8, tmp_path):
    path, _ = fp8
    assert convert(path, tmp_path / "ours", progress=False, verify=True)["dtype"] == "float8_e4m3fn"
    convert(tmp_path / "ours", tmp_path / "back", to="hf", progress=False, verify=True)
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(path)
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["quantization_config"] == {"quant_method": "fp8", "weight_block_size": [5, 3]}


def test_fp8_without_its_scale_is_an_error(hf):
    def forget(tensors):
        to_fp8(tensors, (128, 128))
        del tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"]

    with pytest.raises(
        CheckpointError, match=r"(?s)scales.*1 missing: model.layers.0.self_attn.o_proj.weight_sc"
    ):
        load_hf(hf(MODELS["deepseek_v3"], np.float32, change=forget)[0])


COMPRESSED = {"num_bits": 8, "type": "float", "strategy": "channel"}


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        (lambda rows: (), {"quant_method": "fp8", "activation_scheme": "static"}),
        (lambda rows: (1,), {"quant_method": "modelopt", "quant_algo": "FP8"}),
        (lambda rows: (rows,), {"quant_method": "fbgemm_fp8"}),
        (
            lambda rows: (rows, 1),
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": COMPRESSED}}},
        ),
    ],
    ids=["tensor", "tensor [1]", "row", "row [R, 1]"],
)
def test_fp8_with_a_scale_for_each_tensor_or_row_is_the_numbers_it_stands_for(
    shape, kind, hf, tmp_path, caplog
):
    rng, exact = np.random.default_rng(3), {}

    def quantise(tensors):
        for name in [n for n in tensors if n.endswith("_proj.weight") and "eh_proj" not in n]:
            value, grid = tensors[name].astype(F8), shape(tensors[name].shape[0])
            scale = rng.uniform(0.5, 2, grid).astype(np.float32)
            exact[name] = value.astype(np.float32) * scale.reshape(-1, 1)
            tensors |= {name: value, f"{name}_scale": scale, name.replace("weight", "input_scale"): scale}

    raw = MODELS["deepseek_v3"]
    path, _ = hf(raw, np.float32, change=quantise)
    (path / "config.json").write_text(json.dumps(raw | {"quantization_config": kind}))
    held = convert(path, tmp_path / "ours", progress=False, verify=True)
    assert held["dtype"] == "float8_e4m3fn"
    assert "scales of activations are not read (input_scale)" in caplog.text
    logits = [load(at)[0](np.arange(8)[None]) for at in (path, tmp_path / "ours")]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    convert(tmp_path / "ours", tmp_path / "eight", to="hf", progress=False, verify=True)
    for at, dtype in ((path, "f32"), (tmp_path / "ours", "f32"), (tmp_path / "eight", "f32")):
        convert(at, tmp_path / "back", to="hf", dtype=dtype, progress=False, overwrite=True)
        back = read_safetensors(tmp_path / "back")
        for name, value in exact.items():
            np.testing.assert_array_equal(back[name], value)


def test_other_quantizations_are_refused_by_name(hf):
    path, _ = hf(MODELS["llama"])
    (path / "config.json").write_text(
        json.dumps(MODELS["llama"] | {"quantization_config": {"quant_method": "awq"}})
    )
    with pytest.raises(CheckpointError, match="quantized by 'awq'"):
        load_hf(path)


# ---------------------------------------------------------------- multi-token module, tied heads


def mtp_names(tensors):
    return [n for n in tensors if n.startswith("model.layers.3.")]


def test_files_without_the_multi_token_module_give_a_model_without_one(hf, caplog, tmp_path):
    path, _ = hf(MODELS["deepseek_v3"], change=lambda t: [t.pop(n) for n in mtp_names(t)])
    with caplog.at_level(logging.WARNING, "jaxseek"):
        model = load_hf(path)
    assert "no tensors of the multi-token module" in caplog.text
    assert model.cfg.num_nextn_predict_layers == 0
    save_hf(model, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(path)


def test_the_multi_token_module_can_be_left_out(hf, tmp_path):
    path, disk = hf(MODELS["deepseek_v3"])
    convert(path, tmp_path / "back", to="hf", mtp=False, progress=False)
    back = read_with_safetensors(tmp_path / "back")
    assert back.keys() == disk.keys() - mtp_names(disk)


def test_a_part_of_the_multi_token_module_is_an_error(hf):
    path, _ = hf(MODELS["deepseek_v3"], change=lambda t: t.pop("model.layers.3.enorm.weight"))
    with pytest.raises(CheckpointError, match=r"1 missing: model.layers.3.enorm.weight"):
        load_hf(path)


@pytest.mark.parametrize(
    "name", ["model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"]
)
def test_a_copy_in_the_multi_token_module_that_differs_is_an_error(name, hf):
    path, _ = hf(MODELS["deepseek_v3"], change=lambda t: t.update({name: t[name] * BF16.type(2)}))
    with pytest.raises(CheckpointError, match=rf"{name} should be a copy of .*mtp=False"):
        load_hf(path)
    load_hf(path, mtp=False)


def test_copies_that_the_source_lacks_are_not_written_back(hf, tmp_path):
    path, _ = hf(MODELS["deepseek_v3"], change=lambda t: t.pop("model.layers.3.embed_tokens.weight"))
    convert(path, tmp_path / "ours", progress=False)
    convert(tmp_path / "ours", tmp_path / "back", to="hf", progress=False)
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(path)


def test_a_tied_head_on_disk_must_equal_the_embedding_and_comes_back(hf, tmp_path):
    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    path, _ = hf(MODELS["llama, tied"], change=tie)
    convert(path, tmp_path / "ours", progress=False)
    convert(tmp_path / "ours", tmp_path / "back", to="hf", progress=False)
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(path)


def test_a_tied_head_that_differs_from_the_embedding_is_an_error(hf):
    path, _ = hf(
        MODELS["llama, tied"], change=lambda t: t.update({"lm_head.weight": np.ones((32, 16), BF16)})
    )
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        load_hf(path)


# ---------------------------------------------------------------- bad inputs


def test_all_misfits_are_named_at_once_with_counts(hf):
    def spoil(tensors):
        for e in range(4):
            for kind in ("gate", "up"):
                tensors[f"model.layers.1.mlp.experts.{e}.{kind}.weight"] = tensors.pop(
                    f"model.layers.1.mlp.experts.{e}.{kind}_proj.weight"
                )
        tensors["model.norm.weight"] = np.ones(15, BF16)

    with pytest.raises(CheckpointError) as error:
        load_hf(hf(MODELS["deepseek_v3"], change=spoil)[0])
    text = str(error.value)
    assert "8 missing: model.layers.1.mlp.experts.0.gate_proj.weight" in text
    assert "8 unknown: model.layers.1.mlp.experts.0.gate.weight" in text
    assert text.count("experts.") == 10  # five examples of each
    assert "1 misshapen: model.norm.weight is [15], expected [16]" in text
    assert "download" in text


def test_integer_weights_are_refused(hf):
    path, _ = hf(MODELS["llama"], change=lambda t: t.update({"model.norm.weight": np.ones(16, np.int8)}))
    with pytest.raises(CheckpointError, match=r"model.norm.weight \(int8\)"):
        load_hf(path)


def test_a_dtype_that_weights_cannot_have_is_refused(hf):
    with pytest.raises(CheckpointError, match="dtype is 'int8', expected one of bfloat16"):
        load_hf(hf(MODELS["llama"])[0], dtype="int8")


def shard(path):
    """Split the one file of a directory in three, with an index."""
    tensors = {n: np.array(t) for n, t in read_safetensors(path).items()}
    (path / "model.safetensors").unlink()
    write_safetensors(path, {n: (t.shape, t.dtype) for n, t in tensors.items()}, tensors.items(), 6000)
    return sorted(path.glob("*.safetensors"))


def test_an_index_over_several_files_is_read(hf):
    path, _ = hf(MODELS["llama"])
    model = load_hf(path)
    assert len(shard(path)) > 2
    assert same_model(load_hf(path), model)
    (path / "model.safetensors.index.json").unlink()  # the files alone say as much
    assert same_model(load_hf(path), model)


def test_an_absent_file_is_named(hf):
    path, _ = hf(MODELS["llama"])
    second = shard(path)[1]
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"1 are absent \({second.name}\)"):
        load_hf(path)


def test_a_tensor_in_two_files_is_an_error(hf):
    path, _ = hf(MODELS["llama"])
    first, second, *_ = shard(path)
    shutil.copyfile(first, second)
    with pytest.raises(CheckpointError, match=r"stand in two files, such as .* in model-00001"):
        load_hf(path)


def test_an_index_that_does_not_fit_its_files_is_told_and_the_whole_weights_are_read(hf, caplog):
    path, _ = hf(MODELS["llama"])
    model = load_hf(path)
    shard(path)
    index = path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    where = raw["weight_map"]
    where["other"] = where["model.norm.weight"]
    index.write_text(json.dumps(raw))
    assert same_model(load_hf(path), model)
    assert "does not fit its files in 1 tensors, such as other" in caplog.text
    where["other"] = "model-00009-of-00009.safetensors"
    index.write_text(json.dumps(raw))
    assert same_model(load_hf(path), model)  # the set of numbered files is whole without it
    assert "names other files (model-00009-of-00009.safetensors), not followed" in caplog.text
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        load_hf(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b[:-10], "header describes .* bytes, the file has"),
        (lambda b: b + b"!", "header describes .* bytes, the file has"),
        (lambda b: b[:100], "header should have"),
        (lambda b: b[:4], "cut off"),
        (lambda b: b"", "is empty"),
        (lambda b: b"<html>not found</html>", "header should have"),
        (lambda b: b[:8] + b"?" + b[9:], "the header: not valid JSON"),
        (lambda b: b.replace(b'"BF16"', b'"BF99"', 1), "dtype 'BF99'; known: BF16"),
        (lambda b: b.replace(b'"shape":[16]', b'"shape":[15]', 1), r"should take 30 bytes from"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(spoil, message, hf):
    path, _ = hf(MODELS["llama"])
    file = path / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as error:
        load_hf(path)
    assert str(file) in str(error.value)
    assert any(advice in str(error.value) for advice in ("fetch it again", "known", "is the file whole"))


def test_a_directory_of_pickles_says_what_to_do(hf):
    path, _ = hf(MODELS["llama"])
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: save it as safetensors"):
        load_hf(path)


# ---------------------------------------------------------------- the writer


def test_files_are_split_by_size_and_read_by_the_safetensors_package(hf, tmp_path):
    path, disk = hf(MODELS["deepseek_v3"])
    save_hf(load_hf(path), tmp_path / "back", max_shard_bytes=10_000)
    files = sorted(tmp_path.glob("back/*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in disk.values())
    for file in files:
        header = json.loads(file.read_bytes()[8:][: int.from_bytes(file.read_bytes()[:8], "little")])
        assert header.pop("__metadata__") == {"format": "pt"}
        assert all(index["weight_map"][name] == file.name for name in header)
        assert max(entry["data_offsets"][1] for entry in header.values()) <= 10_000
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(path)


def test_a_single_file_has_no_index(hf, tmp_path):
    save_hf(load_hf(hf(MODELS["llama"])[0]), tmp_path / "back")
    assert sorted(f.name for f in (tmp_path / "back").iterdir()) == ["config.json", "model.safetensors"]


# ---------------------------------------------------------------- convert


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("to", ["hf", "jaxseek"])
def test_a_conversion_that_fails_has_no_destination_and_goes_on_the_next_time(to, hf, tmp_path, monkeypatch):
    path, _ = hf(MODELS["llama"])

    def fail(*_):
        raise Interrupted

    with monkeypatch.context() as m:
        m.setattr("jaxseek_convert.conversion.Beside.save", fail)
        with pytest.raises(Interrupted):
            convert(path, tmp_path / "new", to=to, progress=False)
    assert not (tmp_path / "new").exists()
    done = convert(path, tmp_path / "new", to=to, progress=False, verify=True)
    assert done["tensors_resumed"] == done["tensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "new"]
    assert same_model(load(tmp_path / "new")[0], load(path)[0])


@pytest.mark.parametrize("to", ["hf", "jaxseek"])
def test_a_disk_that_gives_back_other_bits_is_noticed(to, hf, tmp_path, monkeypatch):
    path, _ = hf(MODELS["llama"])
    settle = Writer.close

    def rot(self):
        settle(self)
        name = max(self.files, key=self.files.get)
        raw = bytearray((self.folder / name).read_bytes())
        raw[-1] ^= 1
        (self.folder / name).write_bytes(raw)

    with monkeypatch.context() as m:
        m.setattr(Writer, "close", rot)
        with pytest.raises(CheckpointError, match="1 tensors were read back with other values"):
            convert(path, tmp_path / "new", to=to, progress=False, verify=True)
    assert not (tmp_path / "new").exists()
    done = convert(path, tmp_path / "new", to=to, progress=False, verify=True)
    assert done["tensors_resumed"] == done["tensors"] - 1


def test_the_summary_says_what_was_done_and_progress_goes_to_stderr(hf, tmp_path, capsys):
    path, _ = hf(MODELS["deepseek_v3"], np.float32)
    done = convert(path, tmp_path / "ours", dtype="bfloat16", verify=True)
    cfg = ModelConfig.from_hf(MODELS["deepseek_v3"])
    assert done["parameters"] == cfg.num_params(mtp=True)
    assert (done["to"], done["dtype"], done["mtp"]) == ("jaxseek", "bfloat16", 1)
    assert json.loads(json.dumps(done)) == done
    out, err = capsys.readouterr()
    assert not out
    assert "read back" in err


def test_converting_onto_itself_or_an_existing_place_is_refused(hf, tmp_path):
    path, _ = hf(MODELS["llama"])
    with pytest.raises(CheckpointError, match="is or holds the checkpoint to be converted"):
        convert(path, path, overwrite=True, progress=False)
    with pytest.raises(CheckpointError, match="is or holds the checkpoint to be converted"):
        convert(path, tmp_path, overwrite=True, progress=False)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="already exists; choose another name"):
        convert(path, tmp_path / "ours", progress=False)
    with pytest.raises(CheckpointError, match="no checkpoint, so it is not overwritten"):
        convert(path, tmp_path / "ours", overwrite=True, progress=False)
    assert (tmp_path / "ours" / "notes.txt").read_text() == "mine"


def test_what_cannot_be_converted_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="tiny-v3: is a preset with random weights"):
        convert("tiny-v3", tmp_path / "ours", progress=False)
    with pytest.raises(CheckpointError, match="expected 'jaxseek' or 'hf'"):
        convert("tiny-v3", tmp_path / "ours", to="gguf", progress=False)
    other = tmp_path / "mixtral"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ConfigError, match="model_type is 'mixtral'"):
        convert(other, tmp_path / "ours", progress=False)
    assert not (tmp_path / "ours").exists()


def test_files_beside_the_weights_are_copied_byte_for_byte(hf, tmp_path):
    path, _ = hf(MODELS["llama"])
    (path / "generation_config.json").write_bytes(b'{"temperature":   0.6}\n')
    convert(path, tmp_path / "ours", progress=False)
    convert(tmp_path / "ours", tmp_path / "back", to="hf", progress=False)
    for folder in ("ours", "back"):
        assert (tmp_path / folder / "generation_config.json").read_bytes() == b'{"temperature":   0.6}\n'
