import errno
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import slow

from jaxseek.api import load, widest
from jaxseek.checkpoint import models
from jaxseek.checkpoint.digests import NAME as DIGESTS
from jaxseek.checkpoint.models import CheckpointError, restore, same_bits, save
from jaxseek.config.model import ConfigError, ModelConfig
from jaxseek.decode import cpu
from jaxseek.model.deepseek import DeepSeek
from jaxseek.sharding.parameters import parameters
from jaxseek.tokenizer.tokenizer import train_sentencepiece
from jaxseek_convert import save_hf

RAW = {
    "model_type": "deepseek_v3",
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_nextn_predict_layers": 1,
}
TIED = {k: RAW[k] for k in list(RAW)[1:8]} | {"model_type": "llama", "tie_word_embeddings": True}
WIDE = "fsdp=2,tensor=2,expert=2"


@pytest.fixture(scope="module")
def model():
    return DeepSeek.init(ModelConfig.from_hf(RAW), dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def original(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "model"
    save(model, path)
    return path


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def values(model):
    return {path: np.asarray(v.get_value()) for path, v in parameters(model).items()}


def same_model(a, b):
    a, b = values(a), values(b)
    return a.keys() == b.keys() and all(same_bits(a[p], b[p]) for p in a)


# ---------------------------------------------------------------- save and restore


@pytest.mark.parametrize(
    ("given", "onto"),
    [
        *(slow(*p) for p in ((None, "tensor=4"), (WIDE, None))),
        (None, WIDE),
        (WIDE, "data=2,expert=4"),
    ],
)
def test_a_checkpoint_is_restored_onto_any_mesh(given, onto, tmp_path):
    model = DeepSeek.init(ModelConfig.from_hf(RAW), given, dtype=jnp.bfloat16)
    save(model, tmp_path / "model", check=True)
    back = restore(tmp_path / "model", onto)
    assert same_model(back, model)
    expected = parameters(DeepSeek.abstract(model.cfg, onto))
    for path, param in parameters(back).items():
        assert param.get_value().sharding.spec == expected[path].get_value().sharding.spec
    assert back.mesh.size == (1 if onto is None else {WIDE: 8, "tensor=4": 4}.get(onto, 8))


def test_tied_embeddings_and_dense_models_are_restored(tmp_path):
    model = DeepSeek.init(ModelConfig.from_hf(TIED))
    save(model, tmp_path / "model")
    assert same_model(restore(tmp_path / "model", "tensor=2"), model)
    assert restore(tmp_path / "model").cfg == model.cfg.replace(dtype="float32")


def test_a_dtype_can_be_asked_for_and_router_biases_stay_float32(saved, model):
    back, was = values(restore(saved, dtype="float32")), values(model)
    assert {v.dtype for v in back.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(back["head_DV"], was["head_DV"].astype(np.float32))
    again = values(restore(saved, dtype=jnp.float16))
    assert again["embed_VD"].dtype == np.float16
    assert again["stacks.1.mlp.router_bias_E"].dtype == np.float32


def test_the_multi_token_module_can_be_left_out(saved, model):
    back = restore(saved, mtp=False)
    assert back.cfg.num_nextn_predict_layers == 0
    assert values(back).keys() == {p for p in values(model) if not p.startswith("mtp.")}


def test_the_directory_holds_a_hugging_face_config_and_a_manifest(saved, model):
    assert ModelConfig.from_hf(saved) == model.cfg
    manifest = json.loads((saved / "jaxseek.json").read_text())
    assert manifest["format"] == 1
    assert manifest["params"]["embed_VD"] == {"shape": [512, 16], "dtype": "bfloat16"}
    assert manifest["origin"] == {}


def test_an_unrolled_model_is_refused_for_the_one_it_came_from(model, tmp_path):
    for write in (save, save_hf):
        with pytest.raises(ValueError, match="save the one it was unrolled from"):
            write(cpu.unroll(model, False), tmp_path / "model")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- destinations


def test_an_existing_checkpoint_is_replaced_only_when_told_to(saved, tmp_path):
    other = DeepSeek.init(ModelConfig.from_hf(TIED))
    with pytest.raises(CheckpointError, match="already exists; choose another name, or overwrite it"):
        save(other, saved)
    assert restore(saved).cfg.model_type == "deepseek_v3"
    save(other, saved, overwrite=True)
    assert same_model(restore(saved), other)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_directory_that_is_no_checkpoint_is_never_overwritten(model, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is no checkpoint, so it is not overwritten"):
        save(model, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_an_empty_directory_may_be_the_destination(model, tmp_path):
    (tmp_path / "new").mkdir()
    save(model, tmp_path / "new")
    assert same_model(restore(tmp_path / "new"), model)


def test_what_an_interrupted_save_left_is_replaced_by_the_next(saved, model, tmp_path):
    saved.rename(tmp_path / "model.jaxseek-partial")  # as if the process had been killed before its last step
    with pytest.raises(
        CheckpointError, match=r"no such checkpoint; .*model.jaxseek-partial was left by an interr"
    ):
        restore(saved)
    save(model, saved)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("write", [save, save_hf])
def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(write, model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, but .* has 1,000 bytes free"):
        write(model, tmp_path / "deep" / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: ... No space left on device"),
    ],
)
def test_a_disk_that_fills_up_midway_is_said_and_what_was_written_is_removed(
    error, model, tmp_path, monkeypatch
):
    def fail(path, arrays):
        path.mkdir()
        (path / "part").write_text("x" * 100)
        raise error

    monkeypatch.setattr(models, "_orbax_save", fail)
    with pytest.raises(
        CheckpointError, match=r"the disk of .* is full; [\d,]+ bytes are needed, .* are free"
    ):
        save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_failed_overwrite_keeps_the_older_checkpoint(saved, model, tmp_path, monkeypatch):
    def fail(path, arrays):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_orbax_save", fail)
    with pytest.raises(KeyboardInterrupt):
        save(model, saved, overwrite=True)
    assert same_model(restore(saved), model)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_gives_back_other_bits_is_noticed(model, tmp_path, monkeypatch):
    written = models._orbax_save

    def rot(path, arrays):
        written(path, arrays | {"norm.scale_D": jax.device_put(arrays["norm.scale_D"] * 2)})

    monkeypatch.setattr(models, "_orbax_save", rot)
    with pytest.raises(CheckpointError, match=r"norm.scale_D was read back with other values"):
        save(model, tmp_path / "model", check=True)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what is no checkpoint


def test_what_is_no_checkpoint_is_said_with_what_was_expected(tmp_path, model):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        restore(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is no checkpoint; expected a directory with jaxseek.json"):
        restore(tmp_path)
    save_hf(model, tmp_path / "hf")
    with pytest.raises(
        CheckpointError, match=r"is a Hugging Face checkpoint; convert it first \(jaxseek convert"
    ):
        restore(tmp_path / "hf")


def test_a_checkpoint_without_its_manifest_was_interrupted(saved):
    (saved / "jaxseek.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no jaxseek.json, so the save was interrupted"):
        restore(saved)


def test_a_newer_format_is_refused(saved):
    (saved / DIGESTS).unlink()
    manifest = json.loads((saved / "jaxseek.json").read_text())
    (saved / "jaxseek.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(CheckpointError, match=r"has format 2, this jaxseek reads 1; update jaxseek"):
        restore(saved)


def test_a_config_that_belongs_to_another_model_is_refused(saved):
    (saved / DIGESTS).unlink()
    (saved / "config.json").write_text(json.dumps(RAW | {"moe_intermediate_size": 4, "q_lora_rank": None}))
    with pytest.raises(
        CheckpointError, match=r"(?s)missing.*q_DNH.*unknown.*q_a_DQ.*misshapen.*_EDF is .*expected"
    ):
        restore(saved)


def test_a_checkpoint_that_was_copied_in_part_is_refused(saved):
    largest = max((saved / "params").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=rf"1 of \d+ files in params/ are not as .* such as .*{largest.name}"
    ):
        restore(saved)
    shutil.rmtree(saved / "params")
    with pytest.raises(CheckpointError, match=r"no bytes, expected \d+\); copy the checkpoint again"):
        restore(saved)


def test_a_checkpoint_whose_arrays_were_changed_is_refused(saved):
    (saved / "params" / "_METADATA").write_text("{" * (saved / "params" / "_METADATA").stat().st_size)
    with pytest.raises(CheckpointError, match=r"is damaged: params/_METADATA is not as written"):
        restore(saved)
    (saved / DIGESTS).unlink()
    with pytest.raises(CheckpointError, match=r"cannot be restored, so the checkpoint is damaged"):
        restore(saved)


# ---------------------------------------------------------------- load


@pytest.fixture
def tokenizer(tmp_path):
    texts = ["What is 12 + 30? It is 42.", "naïve café"] * 20
    return train_sentencepiece(texts, 330, tmp_path / "tokenizer")


@pytest.mark.parametrize("write", [save, save_hf])
def test_load_reads_either_kind_with_its_tokenizer_in_float32_on_cpu(write, model, tokenizer, tmp_path):
    write(model, tmp_path / "model", tokenizer=tokenizer)
    back, found = load(tmp_path / "model")
    assert back.embed_VD[...].dtype == jnp.float32
    assert back.mesh.size == 1
    np.testing.assert_array_equal(values(back)["head_DV"], values(model)["head_DV"].astype(np.float32))
    assert found is not None
    assert found.decode(found.encode("It is 42.")) == "It is 42."
    for file in (tmp_path / "tokenizer").iterdir():
        assert (tmp_path / "model" / file.name).read_bytes() == file.read_bytes()


def test_load_takes_a_mesh_and_a_dtype(saved):
    model, tokenizer = load(saved, WIDE, "bfloat16")
    assert tokenizer is None
    assert model.mesh.size == 8
    assert model.embed_VD[...].dtype == jnp.bfloat16


def test_load_goes_on_without_a_tokenizer_that_does_not_fit(tokenizer, tmp_path, caplog):
    small = DeepSeek.init(ModelConfig.from_hf(RAW | {"vocab_size": 64}))
    save(small, tmp_path / "model", tokenizer)
    assert load(tmp_path / "model")[1] is None
    assert "the embedding has 64 rows" in caplog.text


def test_how_to_sample_is_saved_with_the_model_and_ends_its_texts(tmp_path):
    cfg = ModelConfig.from_hf(RAW | {"eos_token_id": 1}).replace(
        generation={"eos_token_id": [1, 5], "top_k": 3}
    )
    save(DeepSeek.init(cfg), tmp_path / "model")
    found = load(tmp_path / "model")[0].cfg
    assert (found.generation, found.eos_ids) == (cfg.generation, (1, 5))
    (tmp_path / "model" / "generation_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"generation_config.json: holds .1., expected a JSON object"):
        ModelConfig.from_hf(tmp_path / "model")


def test_load_makes_tiny_presets_with_random_weights():
    model, tokenizer = load("tiny-llm")
    assert tokenizer is None
    assert model.cfg == ModelConfig.from_preset("tiny-llm")
    assert float(jnp.std(model.embed_VD[...])) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", ["deepseek-r1", "deepseek-ai/DeepSeek-R1"])
def test_load_says_where_the_weights_of_a_released_model_are(name):
    with pytest.raises(CheckpointError, match=r"convert hf://deepseek-ai/DeepSeek-R1 deepseek-r1$"):
        load(name)


def test_load_says_what_it_looked_for(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"jaxseek.json.*config.json.*does not exist.*similar name: tiny-v3"
    ):
        load("tiny-v4")
    with pytest.raises(CheckpointError, match="this exists, but is none"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="dtype is 'int8', expected one of bfloat16, float16, float32"):
        load("tiny-llm", dtype="int8")
    with pytest.raises(ConfigError, match="needs 16 devices"):
        load("tiny-v3", mesh="fsdp=16")


def test_the_default_mesh_is_as_wide_as_the_model_allows():
    sizes = lambda preset, n: dict(widest(ModelConfig.from_preset(preset), n).sizes)["tensor"]
    assert sizes("deepseek-v3", 8) == 8
    assert sizes("deepseek-r1-distill-qwen-1.5b", 8) == 2  # two key-value heads
    assert sizes("tiny-v3", 3) == 2
    assert sizes("tiny-v3", 1) == 1
