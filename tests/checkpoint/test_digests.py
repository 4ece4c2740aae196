"""Flipped bits are found by loading, converting and verifying: stored values are read, or none."""

import json
import os
import shutil
import threading

import jax
import numpy as np
import pytest
from damage import flipped_bits
from hf_checkpoints import MODELS, random_tensors, same_model, write_hf
from oracles import tiny_config

from jaxseek.api import load
from jaxseek.checkpoint import digests, models
from jaxseek.checkpoint.digests import NAME, NO_CHECKSUM, Digests
from jaxseek.checkpoint.models import CheckpointError
from jaxseek.checkpoint.store import Array
from jaxseek.cli.main import main
from jaxseek.config.model import ConfigError
from jaxseek.model.deepseek import DeepSeek
from jaxseek.storage.place import _local_tree, file_sizes, place
from jaxseek.tokenizer.tokenizer import TokenizerError, train_sentencepiece
from jaxseek_convert import convert, stream
from jaxseek_convert.tensors import StoreCheckpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")

REFUSED = (CheckpointError, ConfigError, TokenizerError)
DAMAGED = r"is damaged: .* not as written, by the digests; copy the checkpoint again"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with checkpoints of every kind: hf, and ours saved, converted and quantised."""
    folder = tmp_path_factory.mktemp("made")
    hf = write_hf(folder / "hf", MODELS["deepseek_v3"], random_tensors(MODELS["deepseek_v3"]))
    convert(hf, folder / "converted", progress=False)
    convert(hf, folder / "int4", dtype="int4", progress=False)
    convert(hf, folder / "fp8", dtype="fp8", progress=False)
    tokenizer = train_sentencepiece(["the quick brown fox"] * 20, 310, folder / "tokenizer")
    model = DeepSeek.init(tiny_config("v3", vocab_size=320), seed=0)
    models.save(model, folder / "saved", tokenizer)
    return folder


KINDS = ["saved", "converted", "int4", "fp8"]


@pytest.fixture
def checkpoint(made, tmp_path, request):
    return shutil.copytree(made / request.param, tmp_path / request.param)


def convert_back(folder):
    out = folder.with_name("back")
    shutil.rmtree(out, ignore_errors=True)
    convert(folder, out, to="hf", dtype="bf16", progress=False)


@pytest.mark.parametrize("read", [load, convert_back])
@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpoint", KINDS, indirect=True)
def test_any_bit_that_flips_in_a_checkpoint_is_found(read, count, checkpoint):
    read(checkpoint)
    for name in flipped_bits(checkpoint, count):
        if name != NAME:  # in which some letters mean nothing
            with pytest.raises(REFUSED):
                read(checkpoint)
    read(checkpoint)


@pytest.mark.parametrize("checkpoint", KINDS, indirect=True)
def test_every_file_of_a_checkpoint_has_a_digest(checkpoint):
    noted = json.loads((checkpoint / NAME).read_text())
    assert noted["algorithm"] == "xxh3-128"
    sizes = {name: sum(n for n, _ in parts) for name, parts in noted["files"].items()}
    assert sizes == {name: n for name, n in file_sizes(checkpoint).items() if name != NAME}
    assert Digests.of(checkpoint).damaged() == []


@pytest.mark.parametrize("checkpoint", KINDS, indirect=True)
def test_verify_names_what_is_damaged(checkpoint, capsys):
    pattern = "params/**/d/*" if checkpoint.name == "saved" else "params/*/c.*"
    chunk = max(checkpoint.glob(pattern), key=lambda f: f.stat().st_size)
    raw = bytearray(chunk.read_bytes())
    raw[len(raw) // 2] ^= 1
    chunk.write_bytes(raw)
    assert main(["verify", str(checkpoint), "--memory", "32GiB", "--json"]) == 1
    (damaged,) = json.loads(capsys.readouterr().out)["damaged"]
    assert damaged.startswith("params/" if checkpoint.name == "saved" else "model.")


@pytest.mark.parametrize("checkpoint", ["converted"], indirect=True)
def test_a_reader_of_a_part_checks_that_part(checkpoint):
    chunk = min(checkpoint.glob("params/mtp.*/c.*"), key=str)
    raw = bytearray(chunk.read_bytes())
    raw[0] ^= 1
    chunk.write_bytes(raw)
    models.restore(checkpoint, mtp=False)
    with pytest.raises(CheckpointError, match=f"{chunk.parent.name}/{chunk.name} is {DAMAGED[13:]}"):
        models.restore(checkpoint)


@pytest.mark.parametrize("checkpoint", ["saved", "converted"], indirect=True)
def test_a_checkpoint_without_digests_is_read_with_a_line(checkpoint, caplog, made):
    (checkpoint / NAME).unlink()
    assert same_model(models.restore(checkpoint), models.restore(made / checkpoint.name))
    assert caplog.text.count("has no digests (an older jaxseek wrote it") == 1
    convert_back(checkpoint)


@pytest.mark.parametrize("checkpoint", ["converted"], indirect=True)
def test_digests_by_tensor_of_an_older_jaxseek_still_verify(checkpoint, capsys, caplog):
    source = StoreCheckpoint(checkpoint)
    names = [name for name, row, _ in source.table if row.kind == "own"]
    by_tensor = dict(stream.digest(checkpoint, source.spans, names, 2, lambda _: None))
    (checkpoint / NAME).write_text(json.dumps({"algorithm": "xxh3-128", "tensors": by_tensor}))
    models.restore(checkpoint)
    assert "has no digests" in caplog.text
    assert main(["verify", str(checkpoint), "--memory", "32GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["digests"], found["damaged"]) == (True, [])


@pytest.mark.parametrize("checkpoint", ["saved", "converted"], indirect=True)
def test_checks_are_switched_off_by_name_alone_and_that_is_said(checkpoint, monkeypatch, caplog):
    config = checkpoint / "config.json"
    config.write_text(config.read_text() + " ")
    for read in (load, convert_back):
        with pytest.raises(CheckpointError, match=DAMAGED):
            read(checkpoint)
    convert(checkpoint, checkpoint.with_name("third"), progress=False, checksums=False)
    assert f"{checkpoint}: is read unchecked, by --no-checksum" in caplog.text
    monkeypatch.setenv(NO_CHECKSUM, "1")
    load(checkpoint)
    convert_back(checkpoint)
    assert f"{checkpoint}: is read unchecked, by {NO_CHECKSUM}" in caplog.text


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"files": 3}', '{"files": {"a": [[1]]}}', '{"files": {"a": [[-1, ""]]}}', "[" * 100_000],
)
@pytest.mark.parametrize("checkpoint", ["saved"], indirect=True)
def test_digests_that_cannot_be_read_are_an_error(text, checkpoint):
    (checkpoint / NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"digests.json: cannot be read \(.*damaged; copy it again"):
        models.restore(checkpoint)


def test_a_checkpoint_in_a_store_is_checked_as_one_on_a_disk(made):
    at = place("memory://bucket/model")
    for kind in ("saved", "converted"):
        for name in file_sizes(made / kind):
            (at / name).write_bytes((made / kind / name).read_bytes())
        assert same_model(models.restore(at), models.restore(made / kind))
        sizes = file_sizes(made / kind / "params")
        name = f"params/{max(sizes, key=lambda name: sizes[name])}"
        raw = bytearray((at / name).read_bytes())
        raw[9] ^= 1
        (at / name).write_bytes(raw)
        _local_tree.cache_clear()
        with pytest.raises(CheckpointError, match=DAMAGED):
            models.restore(at)
        at.fs.store.clear()
        at.fs.pseudo_dirs[:] = [""]


def test_parts_of_a_file_have_digests_of_their_own(tmp_path):
    (tmp_path / "file").write_bytes(b"abcdef")
    parts = digests.parts(tmp_path / "file", (2, 3))
    assert parts == [(2, digests.digest(b"ab")), (3, digests.digest(b"cde")), (1, digests.digest(b"f"))]
    noted = Digests(tmp_path, {"file": parts})
    assert noted.damaged() == []
    for raw, bad in ((b"abXdef", [2]), (b"abcde", [5]), (b"a", [0, 2, 5]), (b"abcdefg", [6])):
        (tmp_path / "file").write_bytes(raw)
        assert noted.damaged() == [("file", at) for at in bad]
        with pytest.raises(CheckpointError, match="file is not as written"):
            noted.check_file("file", np.frombuffer(raw, np.uint8))
    (tmp_path / "file").unlink()
    os.mkfifo(tmp_path / "file")
    assert noted.damaged() == [("file", 0), ("file", 2), ("file", 5)]
    (tmp_path / "file").unlink()
    assert noted.damaged() == [("file", 0), ("file", 2), ("file", 5)]
    with pytest.raises(CheckpointError, match="other is not as written"):
        noted.check_file("other", np.zeros(1, np.uint8))


def test_parts_are_followed_by_every_thread_for_itself(tmp_path):
    data = np.arange(100, dtype=np.uint8)
    noted = Digests(
        tmp_path, {"file": [(60, digests.digest(data[:60].data)), (40, digests.digest(data[60:].data))]}
    )
    turn = threading.Barrier(2, timeout=10)
    failed = []

    def read(wrong):
        own = data.copy()
        own[70] ^= wrong
        for start, stop in ((0, 30), (30, 60), (60, 80), (80, 100)):
            turn.wait()
            try:
                noted.follow("file", start, own[start:stop])
            except CheckpointError:
                failed.append((wrong, start))

    threads = [threading.Thread(target=read, args=(wrong,)) for wrong in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [(1, 80)]


def test_padding_of_the_last_chunk_has_a_digest_too(tmp_path, monkeypatch):
    """A prime number of rows is not cut evenly: the last file ends with zeros."""
    monkeypatch.setattr("jaxseek.checkpoint.store.CHUNK_BYTES", 3000)
    raw = MODELS["deepseek_v3"] | {"vocab_size": 331}
    convert(write_hf(tmp_path / "hf", raw, random_tensors(raw)), tmp_path / "new", progress=False)
    array = Array.of(tmp_path / "new", "embed_VD")
    assert sum(array.files().values()) > array.nbytes
    assert Digests.of(tmp_path / "new").damaged() == []
    models.restore(tmp_path / "new")
    convert_back(tmp_path / "new")


def test_every_host_checks_its_share(made, monkeypatch):
    noted, seen = Digests.of(made / "saved"), []
    monkeypatch.setattr(digests, "gather", lambda value: [value])
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for host in range(3):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        monkeypatch.setattr(noted, "damaged", lambda names, _: seen.extend(names) or [])
        noted.check()
    assert sorted(seen) == sorted(noted.files)
