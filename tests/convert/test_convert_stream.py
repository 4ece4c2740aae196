"""Conversions that stream: exact, resumable, and clear about what they cannot do."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from disk import Interrupted, stop_after, tree
from hf_checkpoints import (
    MODELS,
    ODD,
    fp8_tensors,
    is_linear,
    random_tensors,
    read_with_safetensors,
    same_model,
    values,
    write_hf,
    write_shards,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import slow
from safetensors.numpy import save_file

from jaxseek.checkpoint import models
from jaxseek.checkpoint.digests import NAME as DIGESTS
from jaxseek.checkpoint.models import CheckpointError
from jaxseek.config.model import ModelConfig
from jaxseek.storage.place import PlaceError
from jaxseek_convert import convert, hf_tensors, load_hf, stream
from jaxseek_convert import files as files_module
from jaxseek_convert.files import Writer
from jaxseek_convert.safetensors_io import read_safetensors, write_safetensors
from jaxseek_convert.tensors import StoreCheckpoint, boxes

pytestmark = pytest.mark.usefixtures("quick_compilation")

BF16 = np.dtype(ml_dtypes.bfloat16)
F8 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)

SMALL = MODELS["deepseek_v3"]


def dequantized(tensors, name, block=(128, 128)):
    w, s = tensors[name].astype(np.float32), tensors[f"{name}_scale_inv"].astype(np.float32)
    i, j = np.indices(w.shape)
    return w * s[i // block[0], j // block[1]]


def run(src, dst, **options):
    return convert(src, dst, progress=False, **options)


def left(path):
    return path.with_name(path.name + ".jaxseek-partial")


@pytest.fixture
def pieces(monkeypatch):
    """Tensors are handled in many pieces, and stored in many chunks, as big ones are."""
    monkeypatch.setattr(stream, "_PIECE", 10_000)
    monkeypatch.setattr("jaxseek.checkpoint.store.CHUNK_BYTES", 5000)


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf", SMALL, random_tensors(SMALL))


@pytest.fixture
def fp8(tmp_path):
    tensors = fp8_tensors(ODD)
    return write_shards(tmp_path / "fp8", ODD, tensors, 3, weight_block_size=[128, 128]), tensors


# ---------------------------------------------------------------- bit for bit


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32", "llama, all biases", "llama, tied"])
def test_bfloat16_comes_back_bit_for_bit_by_many_pieces(name, pieces, tmp_path):
    src = write_hf(tmp_path / "hf", MODELS[name], random_tensors(MODELS[name]))
    run(src, tmp_path / "ours", verify=True)
    run(tmp_path / "ours", tmp_path / "again", verify=True)
    run(tmp_path / "again", tmp_path / "back", to="hf", verify=True)
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(src)
    assert tree(tmp_path / "again") == tree(tmp_path / "ours")


@pytest.mark.parametrize(
    ("block", "powers", "scale_dtype"),
    [
        ((128, 128), False, np.float32),
        ((128, 128), True, np.float32),
        ((5, 3), False, BF16),
        ((128, 128), True, E8M0),
        slow((64, 32), False, np.float32),
    ],
)
def test_fp8_and_its_scales_come_back_bit_for_bit(block, powers, scale_dtype, pieces, tmp_path):
    tensors = fp8_tensors(ODD, block, powers, scale_dtype)
    how = {"weight_block_size": list(block)} | ({"scale_fmt": "ue8m0"} if powers else {})
    src = write_shards(tmp_path / "hf", ODD, tensors, 3, **how)
    run(src, tmp_path / "ours", dtype="fp8", verify=True)
    run(tmp_path / "ours", tmp_path / "back", to="hf", verify=True)
    run(src, tmp_path / "same", to="hf", verify=True)
    expected = read_with_safetensors(src)
    assert read_with_safetensors(tmp_path / "back") == expected
    assert read_with_safetensors(tmp_path / "same") == expected
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "fp8", **how}


def test_fp8_stands_for_its_numbers_times_the_scales_of_their_blocks(fp8, pieces, tmp_path):
    src, tensors = fp8
    for dtype, kind in (("bf16", BF16), ("f32", np.dtype(np.float32))):
        run(src, tmp_path / dtype, to="hf", dtype=dtype)
        run(src, tmp_path / f"ours-{dtype}", dtype=dtype)
        run(tmp_path / f"ours-{dtype}", tmp_path / f"back-{dtype}", to="hf")
        for folder in (dtype, f"back-{dtype}"):
            found = read_safetensors(tmp_path / folder)
            assert not any(n.endswith("scale_inv") for n in found)
            for name in filter(is_linear, tensors):
                assert models.same_bits(found[name], dequantized(tensors, name).astype(kind))


def test_a_store_of_fp8_gives_the_same_numbers_as_its_source(fp8, pieces, tmp_path):
    src, tensors = fp8
    run(src, tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "f32", to="hf", dtype="f32")
    found = read_safetensors(tmp_path / "f32")
    for name in filter(is_linear, tensors):
        np.testing.assert_array_equal(found[name], dequantized(tensors, name))


def test_fused_experts_of_fp8_come_back_as_each_ones(tmp_path):
    raw = SMALL | {"moe_intermediate_size": 10}
    tensors, block = fp8_tensors(raw, (5, 3)), {"weight_block_size": [5, 3]}
    fused = dict(tensors)
    for layer in (1, 2, 3):
        for suffix, end in (("", ""), ("_scale_inv", "_scale_inv")):
            of = {
                k: [
                    fused.pop(f"model.layers.{layer}.mlp.experts.{e}.{k}_proj.weight{suffix}")
                    for e in range(4)
                ]
                for k in ("gate", "up", "down")
            }
            prefix = f"model.layers.{layer}.mlp.experts."
            both = [np.concatenate(pair) for pair in zip(of["gate"], of["up"])]
            fused[f"{prefix}gate_up_proj{end}"], fused[f"{prefix}down_proj{end}"] = (
                np.stack(both),
                np.stack(of["down"]),
            )
    src = write_shards(tmp_path / "fused", raw, fused, 2, **block)
    plain = write_shards(tmp_path / "plain", raw, tensors, 1, **block)
    run(src, tmp_path / "ours", verify=True)
    run(tmp_path / "ours", tmp_path / "back", to="hf")
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(plain)


def test_matrices_that_were_left_in_bfloat16_become_fp8_of_the_same_blocks(tmp_path):
    tensors = fp8_tensors(SMALL, (5, 3))
    for name in [n for n in tensors if "shared_experts.up_proj" in n]:
        if name.endswith("scale_inv"):
            del tensors[name]
        else:
            tensors[name] = tensors[name].astype(np.float32).astype(BF16)
    src = write_shards(tmp_path / "hf", SMALL, tensors, weight_block_size=[5, 3])
    run(src, tmp_path / "ours", dtype="fp8")
    run(tmp_path / "ours", tmp_path / "back", to="hf", verify=True)
    back = read_safetensors(tmp_path / "back")
    assert back["model.layers.1.mlp.shared_experts.up_proj.weight_scale_inv"].shape == (2, 6)
    load_hf(tmp_path / "back")
    run(tmp_path / "ours", tmp_path / "bf16", dtype="bf16")  # what they were quantised by is remembered
    run(tmp_path / "bf16", tmp_path / "eight", dtype="fp8")
    run(tmp_path / "eight", tmp_path / "hf again", to="hf", verify=True)
    assert load_hf(tmp_path / "hf again").cfg == load_hf(src).cfg


def test_fp8_that_is_no_matrix_of_a_linear_layer_is_held_as_bfloat16(tmp_path):
    tensors = fp8_tensors(SMALL, (5, 3))
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(F8)
    tensors["lm_head.weight_scale_inv"] = np.full((7, 6), 0.5, np.float32)
    del tensors["model.layers.3.shared_head.head.weight"]
    src = write_shards(tmp_path / "hf", SMALL, tensors, weight_block_size=[5, 3])
    run(src, tmp_path / "same", to="hf")
    assert read_with_safetensors(tmp_path / "same") == read_with_safetensors(src)
    for dtype in (None, "int8", "fp8"):
        run(src, tmp_path / "ours", dtype=dtype, overwrite=True)
        run(tmp_path / "ours", tmp_path / "back", to="hf", dtype="f32", overwrite=True)
        head = dequantized(tensors, "lm_head.weight", (5, 3))
        np.testing.assert_array_equal(read_safetensors(tmp_path / "back")["lm_head.weight"], head)


@pytest.mark.parametrize("to", ["hf", "jaxseek"])
def test_the_dtype_that_is_asked_for_wins_over_the_sources(to, tmp_path):
    src = write_hf(tmp_path / "hf", SMALL, random_tensors(SMALL, np.float32))
    run(src, tmp_path / "out", to=to, dtype="bf16")
    run(tmp_path / "out", tmp_path / "back", to="hf")
    for name, tensor in read_safetensors(tmp_path / "back").items():
        assert tensor.dtype == (np.float32 if name.endswith("correction_bias") else BF16), name


@pytest.mark.parametrize("dtype", ["int8", *(slow(d) for d in ("int4", "fp8"))])
def test_a_quantised_store_holds_the_same_whichever_way_it_is_made(dtype, tmp_path):
    src = write_hf(tmp_path / "hf", ODD, random_tensors(ODD))
    run(src, tmp_path / "direct", dtype=dtype, verify=True)
    run(src, tmp_path / "plain")
    run(tmp_path / "plain", tmp_path / "by way of ours", dtype=dtype)
    a, b = tree(tmp_path / "direct"), tree(tmp_path / "by way of ours")
    told = ("jaxseek.json", DIGESTS)  # name the file as well
    assert {n: x for n, x in a.items() if n not in told} == {n: x for n, x in b.items() if n not in told}
    run(tmp_path / "direct", tmp_path / "f32", to="hf", dtype="f32")
    was, found = read_safetensors(src), read_safetensors(tmp_path / "f32")
    for name in filter(is_linear, was):
        error = np.abs(found[name] - was[name].astype(np.float32)).max()
        assert error < {"int8": 0.03, "int4": 0.8, "fp8": 0.3}[dtype], name


# ---------------------------------------------------------------- other readers


def test_every_mesh_orbax_and_tensorstore_read_the_same_values(pieces, tmp_path):
    src = write_hf(tmp_path / "hf", SMALL, random_tensors(SMALL))
    run(src, tmp_path / "ours")
    expected = values(load_hf(src))
    for mesh in (None, "fsdp=2,tensor=2,expert=2", "data=2,tensor=4"):
        restored = values(models.restore(tmp_path / "ours", mesh))
        assert all(models.same_bits(restored[p], expected[p]) for p in expected), mesh
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        raw = checkpointer.restore(tmp_path / "ours" / "params")
        split = NamedSharding(jax.make_mesh((8,), ("x",)), P("x"))
        how = ocp.ArrayRestoreArgs(sharding=split, global_shape=(32, 16), dtype=BF16)
        some = ocp.args.PyTreeRestore({"embed_VD": 0}, {"embed_VD": how}, partial_restore=True)
        embed = checkpointer.restore(tmp_path / "ours" / "params", args=some)["embed_VD"]
    assert embed.sharding == split
    assert models.same_bits(np.asarray(embed), expected["embed_VD"])
    assert raw.keys() == expected.keys()
    for path, value in expected.items():
        assert models.same_bits(raw[path], value)
        store = {"driver": "file", "path": f"{tmp_path}/ours/params/{path}/"}
        array = tensorstore.open({"driver": "zarr3", "kvstore": store}).result()
        assert models.same_bits(array.read().result(), value)


def test_a_store_is_read_in_the_chunks_that_it_was_written_in(hf, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr("jaxseek.checkpoint.store.CHUNK_BYTES", 500)
        run(hf, tmp_path / "ours")
    assert same_model(models.restore(tmp_path / "ours"), load_hf(hf))
    run(tmp_path / "ours", tmp_path / "back", to="hf", verify=True)
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(hf)


@pytest.mark.parametrize("name", ["deepseek_v3", slow("llama, all biases")])
def test_what_orbax_wrote_is_converted_by_parts_of_its_chunks(name, pieces, tmp_path, monkeypatch):
    src = write_hf(tmp_path / "hf", MODELS[name], random_tensors(MODELS[name]))
    monkeypatch.setattr(models, "_CHUNK_BYTES", 1 << 9)
    monkeypatch.setattr(stream, "_PIECE", 100)
    models.save(load_hf(src, "tensor=2"), tmp_path / "saved")
    found = StoreCheckpoint(tmp_path / "saved")
    for path in found.arrays:  # a chunk of every layer and expert would be read for each of them
        if "_EDF" in path:
            assert found._opened(path).chunk_layout.read_chunk.shape[:2] == (1, 1)
    run(tmp_path / "saved", tmp_path / "back", to="hf", verify=True)
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(src)
    run(tmp_path / "saved", tmp_path / "ours")
    assert same_model(models.restore(tmp_path / "ours"), load_hf(src))
    run(tmp_path / "saved", tmp_path / "eight", dtype="int8")
    run(src, tmp_path / "directly", dtype="int8")
    a, b = tree(tmp_path / "eight"), tree(tmp_path / "directly")
    assert all(a[n] == b[n] for n in a if n.startswith("params/"))


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 5)])
def test_a_range_of_an_array_is_the_boxes_that_hold_it(shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    for start in range(array.size + 1):
        for stop in range(start, array.size + 1):
            found = [array[box].reshape(-1) for box in boxes(shape, start, stop)]
            np.testing.assert_array_equal(np.concatenate([[], *found]), np.arange(start, stop))


# ---------------------------------------------------------------- killed, and going on


@pytest.mark.parametrize("options", [{}, {"to": "hf"}, {"dtype": "int4"}], ids=["", "to hf", "int4"])
def test_what_was_interrupted_again_and_again_is_the_same_in_the_end(options, hf, tmp_path, monkeypatch):
    run(hf, tmp_path / "whole", **options)
    resumed = 0
    for _ in range(50):
        with monkeypatch.context() as m:
            stop_after(m, 40)
            try:
                done = run(hf, tmp_path / "new", **options)
                break
            except Interrupted:
                assert not (tmp_path / "new").exists()
    else:
        pytest.fail("it gets nowhere")
    assert done["tensors_resumed"] > resumed
    assert tree(tmp_path / "new") == tree(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "new", "whole"]


@pytest.mark.parametrize("change", ["source", "dtype", "to", "mtp", "scales"])
def test_what_another_conversion_left_is_not_mixed_in(change, tmp_path, monkeypatch):
    tensors = fp8_tensors(SMALL, (5, 3))
    scales = {n: tensors.pop(n) for n in list(tensors) if n.endswith("scale_inv")}
    src = write_shards(tmp_path / "hf", SMALL, tensors, weight_block_size=[5, 3])
    (src / "model.safetensors.index.json").unlink()
    save_file(scales, src / "scales.safetensors")
    with monkeypatch.context() as m:
        stop_after(m, 40)
        with pytest.raises(Interrupted):
            run(src, tmp_path / "new")
    options = {"dtype": {"dtype": "bf16"}, "to": {"to": "hf"}, "mtp": {"mtp": False}}.get(change, {})
    if change == "source":
        other = {n: t[::-1] if t.ndim == 1 else t for n, t in tensors.items()}
        write_safetensors(src, {n: (t.shape, t.dtype) for n, t in other.items()}, other.items())
        (src / "model.safetensors").rename(src / "model-00001-of-00001.safetensors")
    if change == "scales":
        save_file({n: 2 * s for n, s in scales.items()}, src / "scales.safetensors")
    done = run(src, tmp_path / "new", **options)
    assert done["tensors_resumed"] == 0
    run(src, tmp_path / "whole", **options)
    assert tree(tmp_path / "new") == tree(tmp_path / "whole")


def test_a_kill_while_another_conversions_files_are_removed_loses_no_track(hf, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        stop_after(m, 40)
        with pytest.raises(Interrupted):
            run(hf, tmp_path / "new")
    with monkeypatch.context() as m:

        def half(folder):
            next(f for f in folder.rglob("c.*")).unlink()
            raise Interrupted

        m.setattr(stream, "_clear", half)
        with pytest.raises(Interrupted):
            run(hf, tmp_path / "new", dtype="f32")
    run(hf, tmp_path / "new", verify=True)
    run(hf, tmp_path / "whole")
    assert tree(tmp_path / "new") == tree(tmp_path / "whole")


def test_files_that_vanished_are_written_again(hf, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr("jaxseek_convert.conversion.Beside.save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(hf, tmp_path / "new")
    next(left(tmp_path / "new").rglob("c.*")).unlink()
    done = run(hf, tmp_path / "new", verify=True)
    assert 0 < done["tensors_resumed"] < done["tensors"]
    run(hf, tmp_path / "whole")
    assert tree(tmp_path / "new") == tree(tmp_path / "whole")


def test_after_the_machine_went_down_what_was_written_is_read_first(hf, tmp_path, monkeypatch):
    """Until that is through, also when it is killed itself."""
    with monkeypatch.context() as m:
        stop_after(m, 80)
        with pytest.raises(Interrupted):
            run(hf, tmp_path / "new")
    lost = max(left(tmp_path / "new").rglob("c.*"), key=lambda f: any(f.read_bytes()) * f.stat().st_size)
    lost.write_bytes(bytes(lost.stat().st_size))
    monkeypatch.setattr(stream, "_boot", lambda: "another")
    with monkeypatch.context() as m:
        m.setattr("jaxseek_convert.conversion.differing", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(hf, tmp_path / "new")
    run(hf, tmp_path / "new")
    run(hf, tmp_path / "whole")
    assert tree(tmp_path / "new") == tree(tmp_path / "whole")


def test_a_journal_is_read_up_to_the_line_that_was_cut_off(tmp_path):
    folder = tmp_path / "partial"
    folder.mkdir()
    journal = stream.Journal(folder, {"n": 1})
    journal.add("a", {"a": "1"})
    journal.add("b", {"b": "2"})
    journal.forget(["a"])
    journal.add("c", {"c": "3"})
    journal.close()
    whole = (folder / stream.JOURNAL).read_bytes()
    (folder / "part").write_text("written")
    for n in range(len(whole) + 1):
        (folder / stream.JOURNAL).write_bytes(whole[:n])
        again = stream.Journal(folder, {"n": 1})
        again.add("d", {"d": "4"})
        again.close()
        found = stream.Journal(folder, {"n": 1})
        found.close()
        expected = [set(), {"a"}, {"a", "b"}, {"b"}, {"b", "c"}][max(0, whole[:n].count(b"\n") - 1)]
        assert set(found.done) == expected | {"d"}
    (folder / stream.JOURNAL).write_bytes(whole + bytes(100))  # what a crash may leave of a file
    found = stream.Journal(folder, {"n": 1})
    found.close()
    assert found.done == {"b": {"b": "2"}, "c": {"c": "3"}}
    stream.Journal(folder, {"n": 2}).close()
    assert [f.name for f in folder.iterdir()] == [stream.JOURNAL]


KILLER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
os.environ["JAX_PLATFORMS"] = "cpu"
from jaxseek_convert.conversion import convert
from jaxseek_convert.files import Writer

genuine = Writer.write

def slowly(self, *args):
    time.sleep(0.004)
    genuine(self, *args)

Writer.write = slowly

def start(src, dst, options):
    if pid := os.fork():
        return pid
    try:
        convert(src, dst, progress=False, **options)
        os._exit(0)
    except BaseException as e:
        print(repr(e), file=sys.stderr, flush=True)
        os._exit(1)

def tree(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}

jobs, kills, seed = json.loads(sys.argv[1])
random.seed(seed)
for src, name, options in jobs:
    whole, dst = Path(name + "-whole"), Path(name)
    begun = time.monotonic()
    assert os.waitpid(start(src, whole, options), 0)[1] == 0
    took, done = time.monotonic() - begun, 0
    while done < kills:
        pid = start(src, dst, options)
        time.sleep(random.uniform(0.2, 1) * took)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done += 1
        if dst.exists():
            assert tree(dst).items() >= tree(whole).items(), "complete before it was"
            shutil.rmtree(dst)
    assert os.waitpid(start(src, dst, options), 0)[1] == 0
    assert tree(dst) == tree(whole), name
    print(name, "ok")
"""


def killed(jobs, kills, seed=0):
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": f"{root}:{root / 'convert'}", "PYTHONWARNINGS": "ignore"}
    jobs = [(str(src), str(dst), options) for src, dst, options in jobs]
    command = [sys.executable, "-c", KILLER, json.dumps([jobs, kills, seed])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == len(jobs)


def test_a_conversion_killed_at_random_moments_is_the_same_in_the_end(hf, tmp_path):
    killed([(hf, tmp_path / "ours", {})], 3)


@pytest.mark.slow
def test_conversions_of_every_kind_survive_twenty_kills(hf, fp8, tmp_path):
    src, _ = fp8
    run(src, tmp_path / "store")
    models.save(load_hf(hf), tmp_path / "saved")
    killed(
        [
            (hf, tmp_path / "ours", {"verify": True}),
            (src, tmp_path / "eight", {}),
            (tmp_path / "store", tmp_path / "back", {"to": "hf"}),
            (src, tmp_path / "four", {"dtype": "int4"}),
            (tmp_path / "saved", tmp_path / "hf of saved", {"to": "hf"}),
        ],
        20,
    )


# ---------------------------------------------------------------- two at once, and disks


def test_a_second_conversion_to_the_same_place_is_refused_and_harms_nothing(hf, tmp_path, monkeypatch):
    refused, genuine = [], Writer.write

    def write(self, *args):
        if not refused:
            with pytest.raises(
                CheckpointError,
                match=rf"another process is at work there \(process {os.getpid()} on .*wait for",
            ) as e:
                run(hf, tmp_path / "new", dtype="f32")
            refused.append(e)
        genuine(self, *args)

    monkeypatch.setattr(Writer, "write", write)
    run(hf, tmp_path / "new", verify=True)
    assert refused
    assert same_model(models.restore(tmp_path / "new"), load_hf(hf))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "new"]


@pytest.mark.parametrize("where", ["allocate", "pwrite"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_what_was_written_stays_and_the_same_command_goes_on(
    where, number, hf, tmp_path, monkeypatch
):
    calls = iter(range(10**9))
    module = files_module if where == "allocate" else files_module.os
    genuine = getattr(module, where)

    def full(*args):
        if next(calls) >= 12:
            raise OSError(number, os.strerror(number))
        return genuine(*args)

    with monkeypatch.context() as m:
        m.setattr(module, where, full)
        with pytest.raises(
            CheckpointError, match=r"is full; .* are free; free some and run the same command"
        ):
            run(hf, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert run(hf, tmp_path / "new", verify=True)["tensors_resumed"] > 0
    assert same_model(models.restore(tmp_path / "new"), load_hf(hf))


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(hf, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, but .* has 1,000 bytes free"):
            run(hf, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    run(hf, tmp_path / "new")


def test_a_destination_that_cannot_be_written_is_said(hf, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*Not a directory.*\); choose another"):
        run(hf, tmp_path / "file" / "new")
    with pytest.raises(CheckpointError, match=r"already exists; choose another name"):
        run(hf, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_source_that_cannot_be_used_leaves_nothing_but_what_was_there(hf, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        stop_after(m, 40)
        with pytest.raises(Interrupted):
            run(hf, tmp_path / "new")
    before = tree(left(tmp_path / "new"))
    with pytest.raises(CheckpointError, match="expected a jaxseek checkpoint"):
        run(tmp_path, tmp_path / "new" / "x")
    with pytest.raises(CheckpointError, match="expected one of bfloat16, float16, float32, int8"):
        run(hf, tmp_path / "new", dtype="int5")
    assert tree(left(tmp_path / "new")) == before
    with pytest.raises(CheckpointError, match="expected one of"):
        run(hf, tmp_path / "other", dtype="int5")
    assert not left(tmp_path / "other").exists()


# ---------------------------------------------------------------- bad inputs


def test_a_source_that_is_changed_while_it_is_read_is_noticed(hf, tmp_path, monkeypatch):
    file, genuine = hf / "model.safetensors", Writer.close

    def close(self):
        raw = file.read_bytes()
        file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        os.utime(file, ns=(1, 1))
        genuine(self)

    with monkeypatch.context() as m:
        m.setattr(Writer, "close", close)
        with pytest.raises(
            CheckpointError, match="hf: was changed while it was read, expected the same files"
        ):
            run(hf, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert run(hf, tmp_path / "new")["tensors_resumed"] == 0
    assert same_model(models.restore(tmp_path / "new"), load_hf(hf))


@pytest.mark.parametrize("kind", ["hf", "jaxseek"])
def test_a_source_that_is_truncated_while_it_is_read_is_noticed(kind, hf, tmp_path, monkeypatch):
    src = hf
    if kind == "jaxseek":
        run(hf, src := tmp_path / "ours")
    genuine = Writer.write

    def write(self, *args):
        for file in (*src.rglob("*.safetensors"), *src.rglob("c.*")):
            os.truncate(file, 5000 if kind == "hf" else 0)
        genuine(self, *args)

    monkeypatch.setattr(Writer, "write", write)
    with pytest.raises(CheckpointError, match=r"ended at [\d,]+ bytes while it was read, expected [\d,]+"):
        run(src, tmp_path / "new", to="hf")
    assert not (tmp_path / "new").exists()


def spoiled(tensors, **changes):
    return {n: t for n, t in (tensors | changes).items() if t is not None}


O = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "block", "message"),
    [
        ({f"{O}_scale_inv": None}, 128, r"(?s)scales of its FP8.*1 missing: model.layers.0.self_attn.o_proj"),
        ({f"{O}_scale_inv": np.ones((1, 1), np.float32)}, 128, r"o_proj.*_inv is \[1, 1\], expected \[2"),
        ({f"{O}_scale_inv": np.ones((2, 1), np.int32)}, 128, r"no scale has.*int32\); expected one of fl"),
        ({}, 64, r"(?s)not those of blocks of \[64, 64\].*misshapen.*expected"),
        ({"extra.weight": np.ones((2, 2), BF16)}, 128, r"1 unknown: extra.weight"),
        ({"model.norm.weight": np.ones(160, F8), "model.norm.weight_scale_inv": np.ones(2, np.float32)}, 128,
         r"model.norm.weight is FP8, expected that of matrices alone"),
    ],
)  # fmt: skip
def test_fp8_that_does_not_fit_is_named(change, block, message, tmp_path):
    src = write_shards(
        tmp_path / "hf", ODD, spoiled(fp8_tensors(ODD), **change), weight_block_size=[block, block]
    )
    with pytest.raises(CheckpointError, match=message):
        run(src, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("how", ["fp8", ["fp8"], {"weight_block_size": 128}, {"weight_block_size": [0, 128]}])
def test_an_account_of_quantization_that_makes_no_sense_is_an_error(how, tmp_path):
    src = write_hf(tmp_path / "hf", SMALL, random_tensors(SMALL))
    (src / "config.json").write_text(json.dumps(SMALL | {"quantization_config": how}))
    with pytest.raises(CheckpointError, match="quantized by"):
        run(src, tmp_path / "new")


def test_files_of_a_download_that_went_wrong_are_named(hf, tmp_path):
    src = write_shards(tmp_path / "shards", SMALL, dict(read_safetensors(hf)), 3)
    index, shards = src / "model.safetensors.index.json", sorted(src.glob("*.safetensors"))
    sound, raw = index.read_text(), shards[1].read_bytes()

    def fails(message):
        with pytest.raises(CheckpointError, match=message):
            run(src, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    for text in (
        "<html>",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../x"}}',
    ):
        index.write_text(text)
        fails(r"index.json: (not valid JSON|has no weight_map|weight_map.* is 3, expected|names the file)")
    index.write_text(sound)
    shards[1].write_bytes(raw[:-1])
    fails(r"header describes [\d,]+ bytes, the file has [\d,]+")
    shards[1].write_bytes(shards[0].read_bytes())
    fails(r"tensors stand in two files, such as .* in model-00001-of-00003.safetensors and model-00002")
    shards[1].unlink()
    fails(r"1 are absent \(model-00002-of-00003.safetensors\)")
    shards[1].write_bytes(raw)
    run(src, tmp_path / "new")


def test_headers_of_any_kind_are_read_or_refused(tmp_path):
    """Nothing but a CheckpointError comes of a header that is not one."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    values = (None, 3, "F", [], [-2], [0], [8, 0], [0.5, 8.5], ["a", "b"], [0, 8, 9], {"a": 1}, [2, -4])
    bad = [3, [], "x", None, {}, *({**entry, key: value} for key in entry for value in values)]
    for header in ([], 3, None, "x", *({"t": b} for b in bad)):
        text = json.dumps(header).encode()
        file = tmp_path / "model.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        with pytest.raises(CheckpointError):
            read_safetensors(tmp_path)


def test_options_that_cannot_be_met_are_said_before_anything_is_written(hf, tmp_path):
    with pytest.raises(CheckpointError, match=r"not written as int8; choose fp8, bfloat16"):
        run(hf, tmp_path / "new", to="hf", dtype="int8")
    with pytest.raises(CheckpointError, match=r"--memory is 0.05 GiB, .* expected at least \d"):
        run(hf, tmp_path / "new", memory=50 << 20)
    odd = SMALL | {"v_head_dim": 7}  # four heads: the inputs of o_proj are even together, but not of each
    src = write_hf(tmp_path / "odd", odd, random_tensors(odd))
    with pytest.raises(
        CheckpointError, match=r"in pairs of inputs, of which .*o_proj.weight has 7 a head; exp"
    ):
        run(src, tmp_path / "new", dtype="int4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "odd"]
    run(src, tmp_path / "new", dtype="int8", verify=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["int8", "int4", "fp8"])
def test_numbers_that_are_not_finite_are_not_quantised(bad, dtype, tmp_path):
    tensors = random_tensors(SMALL)
    tensors[O][3, 5] = bad
    src = write_hf(tmp_path / "hf", SMALL, tensors)
    with pytest.raises(CheckpointError, match=rf"{O}: has numbers that are not finite in rows 0 to"):
        run(src, tmp_path / "new", dtype=dtype)
    run(src, tmp_path / "same")
    run(tmp_path / "same", tmp_path / "back", to="hf")
    assert read_with_safetensors(tmp_path / "back") == read_with_safetensors(src)


# ---------------------------------------------------------------- far away


@pytest.fixture
def remote(fp8):
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    for file in fp8[0].iterdir():
        fs.pipe(f"/models/r1/{file.name}", file.read_bytes())
    yield fs, "memory://models/r1"
    fs.rm("/models", recursive=True)


def test_a_remote_checkpoint_is_converted_as_a_local_one(remote, fp8, tmp_path):
    fs, url = remote
    fs.pipe("/models/r1/generation_config.json", b'{"top_p":  0.9}')
    done = run(url, tmp_path / "ours", verify=True)
    assert done["src"] == url
    run(fp8[0], tmp_path / "local")
    a, b = tree(tmp_path / "ours"), tree(tmp_path / "local")
    assert a.pop("generation_config.json") == b'{"top_p":  0.9}'
    told = ("jaxseek.json", DIGESTS)  # name the file as well
    assert {n: x for n, x in a.items() if n not in told} == {n: x for n, x in b.items() if n not in told}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fp8", "local", "ours"]


def test_a_remote_conversion_goes_on_unless_the_source_was_changed(remote, tmp_path, monkeypatch):
    fs, url = remote
    for changed in (False, True):
        with monkeypatch.context() as m:
            stop_after(m, 60)
            with pytest.raises(Interrupted):
                run(url, tmp_path / "ours")
        if changed:
            file = "/models/r1/model-00002-of-00003.safetensors"
            fs.pipe(file, fs.cat(file)[:-1] + b"\0")
        assert bool(run(url, tmp_path / "ours")["tensors_resumed"]) is not changed
        shutil.rmtree(tmp_path / "ours")


def test_what_goes_wrong_far_away_is_said(remote, fp8, tmp_path, monkeypatch):
    fs, url = remote
    with pytest.raises(PlaceError, match=r"nothing:// cannot be opened here .* use gs://, s3:// or a path"):
        run("nothing://models/r1", tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"memory://nowhere: .* does not exist"):
        run("memory://nowhere", tmp_path / "new")
    genuine = type(fs).cat_file
    with monkeypatch.context() as m:
        calls = iter(range(10**9))

        def broken(self, path, start=None, end=None, **kwargs):
            if end and next(calls) > 60:
                raise TimeoutError("no answer")
            return genuine(self, path, start, end, **kwargs)

        m.setattr(type(fs), "cat_file", broken)
        with pytest.raises(
            CheckpointError, match=r"cannot be read \(TimeoutError: no answer\); the same command"
        ):
            run(url, tmp_path / "new")
        m.setattr(type(fs), "cat_file", lambda self, path, start=None, end=None: genuine(self, path))
        with pytest.raises(CheckpointError, match=r"does the server answer requests of a range"):
            run(url, tmp_path / "new")
    assert run(url, tmp_path / "new", verify=True)["tensors_resumed"] > 0


def test_a_name_on_the_hub_is_downloaded_by_its_own_tool_and_checked(hf, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    cache, asked = tmp_path / "snapshot", []
    (tmp_path / "blobs").mkdir()
    cache.mkdir()
    import hashlib

    for file in hf.iterdir():
        blob = tmp_path / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (cache / file.name).symlink_to(blob)

    def download(repo, revision=None, allow_patterns=None):
        asked.append((repo, revision))
        return str(cache)

    monkeypatch.setattr(hub, "snapshot_download", download)
    run("hf://deepseek-ai/Tiny@main", tmp_path / "new")
    run("hf://deepseek-ai/Tiny", tmp_path / "second")
    assert asked == [("deepseek-ai/Tiny", "main"), ("deepseek-ai/Tiny", None)]
    assert same_model(models.restore(tmp_path / "new"), load_hf(hf))
    blob = (cache / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    with pytest.raises(
        CheckpointError, match=r"1 files have another SHA-256 than on the hub, as model\.safet"
    ):
        run("hf://deepseek-ai/Tiny", tmp_path / "third")
    run("hf://deepseek-ai/Tiny", tmp_path / "third", checksums=False)

    def gone(*_, **__):
        raise RuntimeError("404")

    monkeypatch.setattr(hub, "snapshot_download", gone)
    with pytest.raises(PlaceError, match=r"cannot be downloaded \(RuntimeError: 404\); expected hf://OWNER"):
        run("hf://deepseek-ai/Gone", tmp_path / "fourth")


def test_checksums_that_a_download_noted_are_checked(hf, tmp_path):
    import hashlib

    notes = hf / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    made = hashlib.sha256((hf / "model.safetensors").read_bytes()).hexdigest()
    note = notes / "model.safetensors.metadata"
    note.write_text(f"{'a' * 40}\n{made}\n1700000000.0\n")
    run(hf, tmp_path / "new")
    note.write_text(f"{'a' * 40}\n{made[::-1]}\n1700000000.0\n")
    with pytest.raises(CheckpointError, match="another SHA-256 than on the hub"):
        run(hf, tmp_path / "other")
    note.write_text("what is this")
    run(hf, tmp_path / "other")


# ---------------------------------------------------------------- what is written


def test_digests_have_a_line_for_every_tensor_in_an_order(fp8, tmp_path):
    src, tensors = fp8
    run(src, tmp_path / "back", to="hf")
    digests = json.loads((tmp_path / "back" / DIGESTS).read_text())["tensors"]
    assert list(digests) == sorted(n for n in tensors if not n.endswith("scale_inv"))
    assert {n for d in digests.values() for n in d} == set(tensors)


def test_the_journal_that_a_kill_left_in_a_finished_destination_is_removed(hf, tmp_path):
    run(hf, tmp_path / "new")
    (tmp_path / "new" / stream.JOURNAL).write_text("left")
    with pytest.raises(CheckpointError, match="already exists"):
        run(hf, tmp_path / "new")
    assert not (tmp_path / "new" / stream.JOURNAL).exists()
    with pytest.raises(CheckpointError, match="already exists"):
        run(hf, tmp_path / "new")


def test_memory_is_asked_for_by_what_the_largest_piece_takes():
    """Heads of odd sizes make rows belong together: a piece of them is larger than others."""
    raw = SMALL | {"qk_nope_head_dim": 191, "v_head_dim": 128, "kv_lora_rank": 256}
    cfg = ModelConfig.from_hf(raw)
    assert hf_tensors(cfg)["model.layers.0.self_attn.kv_b_proj.weight"] == (4 * 319, 256)
    from jaxseek_convert.numbers import BF16, FLOAT8, Form
    from jaxseek_convert.table import Table

    layouts = {name: row.layout for name, row, _ in Table(cfg)}
    plain = stream.working_memory(layouts, lambda _: Form(BF16.name), lambda _: Form(BF16.name))
    assert plain == stream._PIECE  # nothing is large
    many = cfg.replace(num_attention_heads=4096, num_key_value_heads=4096)
    layouts = {name: row.layout for name, row, _ in Table(many)}
    eight = stream.working_memory(layouts, lambda _: Form(BF16.name), lambda _: FLOAT8)
    assert eight == 8 * 4 * 319 * 128 * 256
