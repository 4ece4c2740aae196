"""Checking, shrinking and rehearsing conversions: each as a user would run it."""

import json
import re

import fsspec
import ml_dtypes
import numpy as np
import pytest
from hf_checkpoints import MODELS, random_tensors, read_with_safetensors, to_fp8, write_hf
from oracles import slow
from safetensors.numpy import load_file, save_file

from jaxseek.api import load
from jaxseek.checkpoint import models
from jaxseek.checkpoint.digests import NAME as DIGESTS
from jaxseek.cli.main import main
from jaxseek.config.model import ModelConfig
from jaxseek.model.weight import MATRICES
from jaxseek.sharding.parameters import parameters
from jaxseek.tokenizer.tokenizer import train_sentencepiece
from jaxseek_convert import convert
from jaxseek_convert.conversion import bars
from jaxseek_convert.dry_run import rehearse, summary
from jaxseek_convert.table import Table
from jaxseek_convert.verify import verify

pytestmark = pytest.mark.usefixtures("quick_compilation")

V3 = MODELS["deepseek_v3"]
BF16 = ml_dtypes.bfloat16
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf", V3, random_tensors(V3))


def run(capsys, *argv):
    code = main([*map(str, argv), "--memory", "32GiB"])  # the tests' own process is large
    out, err = capsys.readouterr()
    return code, out, err


def flip(path, at=-1):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


# ---------------------------------------------------------------- verify


@pytest.mark.parametrize("to", ["jaxseek", "hf"])
def test_a_sound_checkpoint_is_found_sound_beside_its_source(to, hf, tmp_path, capsys):
    convert(hf, tmp_path / "new", to=to, progress=False)
    code, out, _ = run(capsys, "verify", tmp_path / "new", "--source", hf, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["ok"], found["damaged"], found["unlike_source"]) == (True, [], [])
    assert found["logits"]["layers"] == V3["num_hidden_layers"]
    assert found["logits"]["max_difference"] == 0


@pytest.mark.parametrize("to", ["jaxseek", "hf"])
def test_a_flipped_byte_is_found_and_its_tensor_named(to, hf, tmp_path, capsys):
    convert(hf, tmp_path / "new", to=to, progress=False)
    if to == "hf":
        flip(tmp_path / "new" / "model.safetensors")
        name = list(load_file(hf / "model.safetensors"))
    else:
        flip(tmp_path / "new" / "params" / "stacks.1.mlp.up_EDF" / "c.0.0.0.0", 3)
        name = ["model.layers.1.mlp.experts.0.up_proj.weight"]
    code, out, _ = run(capsys, "verify", tmp_path / "new", "--json")
    found = json.loads(out)
    assert (code, found["ok"], len(found["damaged"])) == (1, False, 1)
    assert found["damaged"][0] in name
    code, out, _ = run(capsys, "verify", tmp_path / "new")
    assert code == 1
    assert "NOT sound" in out
    assert found["damaged"][0] in re.sub(r"[\s│]", "", out)


def test_a_source_that_changed_is_told_from_a_damaged_copy(hf, tmp_path, capsys):
    convert(hf, tmp_path / "new", progress=False)
    tensors = dict(load_file(hf / "model.safetensors"))
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name] + BF16(1)
    save_file(tensors, hf / "model.safetensors")
    code, out, _ = run(capsys, "verify", tmp_path / "new", "--source", hf, "--json")
    found = json.loads(out)
    assert (code, found["damaged"], found["unlike_source"]) == (1, [], [name])
    assert found["logits"]["max_difference"] > 0


def test_a_quantised_checkpoint_is_what_its_source_rounds_to(hf, tmp_path, capsys):
    convert(hf, tmp_path / "new", dtype="int8", progress=False)
    code, out, _ = run(capsys, "verify", tmp_path / "new", "--source", hf, "--json")
    found = json.loads(out)
    assert (code, found["unlike_source"]) == (0, [])
    assert 0 < found["logits"]["kl"] < 0.1


def test_too_little_memory_for_the_logits_is_said(hf, tmp_path, monkeypatch):
    convert(hf, tmp_path / "new", progress=False)
    monkeypatch.setattr("jaxseek_convert.verify.free_memory", lambda: 1000)
    with bars(False, None) as stage:
        found = verify(tmp_path / "new", hf, stage=stage)
    assert found["ok"]
    assert found["logits"]["layers"] == 0
    assert "memory" in found["logits"]["why"]


def test_as_many_layers_are_compared_as_fit(hf, tmp_path, monkeypatch):
    convert(hf, tmp_path / "new", progress=False)
    two = ModelConfig.from_hf(V3).replace(num_hidden_layers=2, num_nextn_predict_layers=0)
    monkeypatch.setattr("jaxseek_convert.verify.free_memory", lambda: 8 * two.num_params() + 2)
    with bars(False, None) as stage:
        found = verify(tmp_path / "new", hf, stage=stage)
    assert found["logits"] == {"layers": 2, "max_difference": 0, "kl": 0, "same_token": 1}


def test_a_checkpoint_that_no_conversion_wrote_has_no_digests(hf, tmp_path, capsys):
    code, out, _ = run(capsys, "verify", hf)
    assert code == 0
    assert "not written by a conversion" in re.sub(r"\s+", " ", out)
    (hf / DIGESTS).write_text('{"tensors": {}}')
    code, _, err = run(capsys, "verify", hf)
    assert code == 1
    assert "has other tensors than the checkpoint" in err


# ---------------------------------------------------------------- quantize


@pytest.mark.parametrize("kind", ["int8", *(slow(k) for k in ("int4", "fp8"))])
def test_quantised_weights_run_as_the_numbers_they_stand_for(kind, hf, tmp_path, capsys):
    code, out, _ = run(capsys, "quantize", hf, tmp_path / "small", "--weights", kind, "--json")
    assert code == 0
    summary = json.loads(out.splitlines()[-1])
    assert 0 < summary["error"]["kl"] < {"int8": 0.1, "fp8": 1, "int4": 4}[kind]
    convert(tmp_path / "small", tmp_path / "plain", dtype="float32", progress=False)
    tokens = [[1, 2, 3, 4, 5]]
    small, plain = (load(tmp_path / name)[0] for name in ("small", "plain"))
    np.testing.assert_allclose(small(tokens), plain(tokens), rtol=1e-4, atol=1e-5)
    held = {p.rsplit(".", 2)[-2] for p in parameters(small) if p.endswith(".value")}
    assert held == {p.rsplit(".", 1)[-1] for p in parameters(plain) if p.rsplit(".", 1)[-1] in MATRICES}
    same = [p for p in parameters(small) if not p.endswith((".value", ".scale"))]
    for p in same:
        a, b = (np.asarray(parameters(m)[p].get_value()) for m in (small, plain))
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("int8", "fsdp=2,tensor=2"),
        *(slow(k, "tensor=2,expert=4") for k in ("int4", "fp8")),
    ],
)
def test_a_quantised_store_is_restored_onto_any_mesh(kind, mesh, hf, tmp_path):
    convert(hf, tmp_path / "small", dtype=kind, progress=False)
    one, many = (models.restore(tmp_path / "small", m) for m in (None, mesh))
    for path, value in parameters(one).items():
        a, b = (np.asarray(v.get_value()) for v in (value, parameters(many)[path]))
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize("kind", ["int8", "fp8", slow("int4")])
def test_a_saved_quantised_model_is_converted_like_the_store_it_came_from(kind, hf, tmp_path):
    convert(hf, tmp_path / "small", dtype=kind, progress=False)
    models.save(models.restore(tmp_path / "small"), tmp_path / "saved")
    for name in ("small", "saved"):
        convert(tmp_path / name, tmp_path / f"{name}-hf", to="hf", dtype="float32", progress=False)
    assert read_with_safetensors(tmp_path / "small-hf") == read_with_safetensors(tmp_path / "saved-hf")


def test_int8_is_not_written_for_hugging_face(hf, tmp_path, capsys):
    code, _, err = run(capsys, "convert", hf, tmp_path / "new", "--to", "hf", "--dtype", "int8")
    assert code == 1
    assert "choose fp8, bfloat16" in err
    assert not (tmp_path / "new").exists()


def test_a_text_that_is_too_short_is_said(tmp_path, capsys):
    tokenizer = train_sentencepiece(["one two three four"] * 20, 300, tmp_path / "tokenizer")
    raw = MODELS["llama"] | {"vocab_size": 300}
    path = write_hf(tmp_path / "hf", raw, random_tensors(raw))
    tokenizer.save(path)
    (tmp_path / "short.txt").write_text("one two")
    argv = ("quantize", path, tmp_path / "small", "--weights", "int8", "--text", tmp_path / "short.txt")
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "give a longer text" in re.sub(r"\s+", " ", out)
    code, _, err = run(capsys, *argv[:2], tmp_path / "none", *argv[3:-1], tmp_path / "nowhere.txt")
    assert code == 1
    assert "nowhere.txt" in err
    assert not (tmp_path / "none").exists()  # it is read before the conversion
    (tmp_path / "long.txt").write_text("one two three four " * 200)
    code, out, _ = run(capsys, *argv[:-1], tmp_path / "long.txt", "--overwrite", "--json")
    assert code == 0
    error = json.loads(out.splitlines()[-1])["error"]
    assert error["perplexity"] == pytest.approx(error["perplexity_quantized"], rel=0.05)


# ---------------------------------------------------------------- dry run


def announce(path, raw, names):
    """A directory with config.json and an index, and no weights."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    where = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


def r1():
    """The released checkpoint's config and tensor names (spec: 91,991 of them)."""
    cfg = ModelConfig.from_preset("deepseek-r1")
    names = Table(cfg).names()
    rows = {name: row for name, row, _ in Table(cfg)}
    eight = [n for n in names if all(p.rsplit(".", 1)[-1] in MATRICES for p in rows[n].paths)]
    return cfg.to_hf() | FP8, [*names, *(f"{n}_scale_inv" for n in eight)]


def test_every_tensor_of_r1_has_a_destination(tmp_path, capsys):
    raw, names = r1()
    assert len(names) == 91_991
    path = announce(tmp_path / "r1", raw, names)
    plan = rehearse(path, tmp_path / "out", mesh="expert=16,tensor=4")
    assert plan["tensors"] == 91_991
    assert {d["source"] for d in plan["destinations"]} == set(names)
    eight, bf16, f32 = 680_571_043_840, 3_918_786_560, 41_555_600  # elements of the release
    assert plan["bytes_read"] == eight + 2 * bf16 + 4 * f32
    gate = [d for d in plan["destinations"] if d["target"] == "stacks.1.mlp.gate_EDF.value"]
    assert len(gate) == 58 * 256
    assert gate[-1] | {"index": tuple(gate[-1]["index"])} == {
        "source": "model.layers.60.mlp.experts.255.gate_proj.weight",
        "target": "stacks.1.mlp.gate_EDF.value",
        "index": (57, 255),
        "nbytes": 2048 * 7168,
    }
    assert 10.5 < plan["bytes_per_chip"] / 2**30 < 16  # of 64: 636 GiB, and what no rule splits
    assert sum(n for *_, n, _ in summary(plan)) == 91_991
    assert not (tmp_path / "out").exists()


def test_an_index_that_lacks_a_tensor_is_told_before_anything_is_downloaded(tmp_path, capsys):
    raw, names = r1()
    lost = "model.layers.40.mlp.experts.7.up_proj.weight"
    path = announce(tmp_path / "r1", raw, [*(n for n in names if n != lost), "model.layers.99.x"])
    code, _, err = run(capsys, "convert", path, tmp_path / "out", "--dry-run")
    assert code == 1
    assert f"missing: {lost}" in err
    assert "unknown: model.layers.99.x" in err


@pytest.mark.parametrize("to", ["jaxseek", "hf"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8", "fp8"])
@pytest.mark.parametrize("mtp", [True, False])
def test_a_rehearsal_is_what_then_happens(to, dtype, mtp, tmp_path):
    if to == "hf" and dtype == "int8":
        return
    tensors = random_tensors(V3)
    to_fp8(tensors, (128, 128))
    path = write_hf(tmp_path / "hf", V3 | FP8 | {"torch_dtype": "bfloat16"}, tensors)
    plan = rehearse(path, tmp_path / "new", to, dtype, mtp)
    done = convert(path, tmp_path / "new", to, dtype, mtp, progress=False)
    assert plan["bytes_written"] == done["bytes"]
    layer = f"model.layers.{V3['num_hidden_layers']}."
    assert {d["source"] for d in plan["destinations"]} == {n for n in tensors if mtp or layer not in n}
    assert plan["disk_free"] > 0
    assert plan["seconds"][0] + 1 > 0


def test_a_checkpoint_of_ours_is_rehearsed_too(hf, tmp_path):
    convert(hf, tmp_path / "small", dtype="int8", progress=False)
    plan = rehearse(tmp_path / "small", tmp_path / "back", "hf", "bfloat16")
    done = convert(tmp_path / "small", tmp_path / "back", "hf", "bfloat16", progress=False)
    assert plan["bytes_written"] == done["bytes"]
    places = {"model.safetensors", "multiplied into its numbers"}  # the scales
    assert {d["target"] for d in plan["destinations"]} == places


def test_where_nothing_can_be_written_the_time_is_not_estimated(hf, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxseek_convert.files.allocate", full)
    code, out, _ = run(capsys, "convert", hf, tmp_path / "new", "--dry-run")
    assert code == 0
    assert "not estimated" in out


@pytest.mark.parametrize("verb", ["quantize", "verify"])
def test_a_source_is_all_that_convert_takes(verb, hf, tmp_path, capsys):
    fs = fsspec.filesystem("memory")
    for file in hf.iterdir():
        fs.pipe(f"/verify/{file.name}", file.read_bytes())
    if verb == "verify":
        convert("memory://verify", tmp_path / "new", progress=False)
        code, out, _ = run(capsys, "verify", tmp_path / "new", "--source", "memory://verify", "--json")
        assert json.loads(out)["logits"]["max_difference"] == 0
    else:
        code, out, _ = run(
            capsys, "quantize", "memory://verify", tmp_path / "new", "--weights", "int8", "--json"
        )
        assert 0 < json.loads(out.splitlines()[-1])["error"]["kl"] < 0.1
    assert code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "new"]


def test_a_mesh_is_refused_where_it_would_do_nothing(hf, tmp_path, capsys):
    code, _, err = run(capsys, "convert", hf, tmp_path / "new", "--mesh", "tensor=2")
    assert code == 2
    assert "--dry-run" in err
