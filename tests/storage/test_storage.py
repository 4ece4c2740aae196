"""Places: an object store serves as a disk does, whole or not at all, and what cannot be written says so."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import buckets
import numpy as np
import pytest
from disk import Interrupted, stop_after, tree
from hf_checkpoints import MODELS, ODD, fp8_tensors, random_tensors, write_hf, write_shards
from training_runs import losses, make_home, run, toml

import jaxseek
from jaxseek.checkpoint import directory, models
from jaxseek.checkpoint.models import CheckpointError
from jaxseek.cli.main import main
from jaxseek.config.model import ConfigError
from jaxseek.data.sources import open_sources
from jaxseek.model.deepseek import DeepSeek
from jaxseek.recipes.pipeline import run_stage as train
from jaxseek.storage import place as places
from jaxseek.storage.place import Log, Mirror, PlaceError, Remote, cut, file_sizes, place, read_log, upload
from jaxseek.train.checkpoints import Checkpoints
from jaxseek_convert import convert, stream

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:Sending a large body directly"),  # gcsfs by aiohttp
]


@pytest.fixture
def hf(tmp_path):
    return write_hf(tmp_path / "hf", MODELS["deepseek_v3"], random_tensors(MODELS["deepseek_v3"]))


@pytest.fixture
def fp8(tmp_path):
    tensors = fp8_tensors(ODD)
    return write_shards(tmp_path / "fp8", ODD, tensors, 3, weight_block_size=[128, 128]), tensors


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def memory():
    at = place("memory://bucket/here")
    yield at
    at.fs.store.clear()
    at.fs.pseudo_dirs[:] = [""]


def stored(at):
    return {name: (at / name).read_bytes() for name in at.sizes()}


def both(memory, tmp_path):
    return (memory, tmp_path / "here")


# ---------------------------------------------------------------- names


def test_a_path_is_a_path_and_a_url_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place("runs/x") == Path("runs/x")
    assert place("~/x") == tmp_path / "x"
    assert place("file:///tmp/x") == Path("/tmp/x")
    at = place("memory://bucket/a/b.json/")
    assert isinstance(at, Remote)
    assert (str(at), at.name, at.stem, at.suffix, str(at.parent)) == (
        "memory://bucket/a/b.json",
        "b.json",
        "b",
        ".json",
        "memory://bucket/a",
    )
    assert str(at.with_name("c") / "d") == "memory://bucket/a/c/d"
    assert place(at) is at


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gs:/bucket/x", "gs:/bucket/x: is neither a path nor a URL; did you mean gs://bucket/x?"),
        ("S3:bucket/x", "did you mean s3://bucket/x?"),
        ("simplecache::s3://bucket/x", "is no URL that can be opened"),
        ("s3://", "names no bucket"),
        ("nothing://x", "nothing:// cannot be opened here .* use gs://, s3:// or a path"),
    ],
)
def test_what_is_no_place_is_refused(name, words):
    with pytest.raises(PlaceError, match=words):
        place(name)


def test_one_store_has_one_name():
    assert str(place(" MEMORY://bucket/x ")) == "memory://bucket/x"
    assert places.is_url("S3://bucket/x")


def test_a_missing_driver_is_named_with_what_installs_it(monkeypatch):
    import fsspec

    def absent(*_, **__):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    places._driver.cache_clear()
    with pytest.raises(PlaceError, match=r"gs:// cannot be opened here .* pip install gcsfs"):
        place("gs://bucket/x")


# ---------------------------------------------------------------- files and trees


def test_a_store_and_a_disk_hold_files_alike(memory, tmp_path):
    for at in both(memory, tmp_path):
        assert not at.exists()
        assert not at.is_dir()
        assert list(at.glob("*")) == []
        places.write_text(at / "a.json", "1")
        places.write_bytes(at / "deep" / "b.txt", b"\xff\x00")
        assert (at / "a.json").is_file()
        assert at.is_dir()
        assert [p.name for p in at.glob("*.json")] == ["a.json"]
        assert sorted(p.name for p in at.iterdir()) == ["a.json", "deep"]
        assert (at / "deep" / "b.txt").read_bytes() == b"\xff\x00"
        assert file_sizes(at) == {"a.json": 1, "deep/b.txt": 2}
        before = places.file_state(at / "a.json")
        time.sleep(0.01)
        places.write_text(at / "a.json", "2")
        assert places.file_state(at / "a.json") != before
        (at / "a.json").unlink()
        (at / "a.json").unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError):
            (at / "a.json").unlink()
        with pytest.raises(FileNotFoundError):
            (at / "a.json").read_bytes()
        places.remove(at)
        places.remove(at)
        assert file_sizes(at) == {}


def test_what_marks_a_tree_as_whole_is_sent_last(memory, tmp_path, monkeypatch):
    for name in ("jaxseek.json", "a", "config.json", "z"):
        (tmp_path / name).write_text(name)
    sent = []
    genuine = Remote.upload
    monkeypatch.setattr(Remote, "upload", lambda self, f: (sent.append(self.name), genuine(self, f))[1])
    upload(tmp_path, memory, directory.MARKERS)
    assert sent[2:] == ["config.json", "jaxseek.json"]
    assert sorted(sent) == ["a", "config.json", "jaxseek.json", "z"]


def test_what_a_driver_raises_names_the_place(memory, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("403 Forbidden")

    monkeypatch.setattr(type(memory.fs), "pipe_file", broken)
    with pytest.raises(PlaceError, match=r"here/x: cannot be written .*403 Forbidden.*doctor"):
        (memory / "x").write_bytes(b"1")


def test_a_store_that_cannot_be_reached_is_not_taken_for_an_empty_one(memory, monkeypatch):
    (memory / "log").write_text("1\n")

    def refused(*_, **__):
        raise OSError("connection refused")

    with monkeypatch.context() as m:
        m.setattr(type(memory.fs), "info", refused)
        for look in (memory.exists, memory.is_dir, (memory / "log").is_file):
            with pytest.raises(PlaceError, match=r"cannot be looked at .*connection refused"):
                look()
        for read in (read_log, Log):
            with pytest.raises(PlaceError, match="connection refused"):
                read(memory / "log")
    assert read_log(memory / "log") == [1]
    with pytest.raises(FileNotFoundError, match=r"no such file or bucket: 'memory://bucket/here/none'"):
        (memory / "none").read_bytes()


def test_a_remote_file_is_downloaded_once_and_again_when_it_was_changed(memory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    at = memory / "x.jsonl"
    at.write_text('{"text": "1"}\n')
    first = places.cached(at)
    with monkeypatch.context() as m:
        m.setattr(Remote, "download", None)
        assert places.cached(at) == first
    time.sleep(0.01)
    at.write_text('{"text": "2"}\n')
    assert open_sources([str(at)], "data.train")[0] == {"text": "2"}
    (memory / "y.jsonl").write_text('{"text": "3"}\n')
    assert len(open_sources([str(memory)], "data.train")) == 2
    assert len(open_sources([str(memory / "y*.jsonl")], "data.train")) == 1
    for nothing in (memory / "z.jsonl", memory / "z*.jsonl"):
        with pytest.raises(ConfigError, match="there is no file that memory://bucket/here/z"):
            open_sources([str(nothing)], "data.train")


# ---------------------------------------------------------------- what grows


def test_a_log_grows_and_what_a_kill_cut_short_is_cut_off(memory, tmp_path):
    for at in both(memory, tmp_path):
        log = at / "log.jsonl"
        with Log(log, seconds=0) as out:
            out.add("1", "2")
            assert read_log(log) == [1, 2]
        places.write_bytes(log, log.read_bytes() + b"3")
        assert read_log(log) == [1, 2]
        with Log(log) as out:
            out.add("4")
        places.write_bytes(log, log.read_bytes() + b"{\n5\n")
        assert read_log(log) == [1, 2, 4]
        assert log.read_bytes() == b"1\n2\n4\n"
        cut(log, 2)
        assert log.read_bytes() == b"1\n"
        assert read_log(at / "none") == []


def test_a_store_is_written_to_every_few_seconds_and_not_for_every_line(memory, monkeypatch):
    written = []
    genuine = Remote.write_bytes
    monkeypatch.setattr(Remote, "write_bytes", lambda self, d: (written.append(d), genuine(self, d)))
    with Log(memory / "log", seconds=60) as out:
        for i in range(100):
            out.add(str(i))
        assert written == []
    assert len(written) == 1
    assert written[0].count(b"\n") == 100


def test_a_mirror_is_the_folder_itself_on_a_disk_and_sent_elsewhere(memory, tmp_path):
    for at in both(memory, tmp_path):
        mirror = Mirror(at)
        (mirror.local / "events").parent.mkdir(exist_ok=True)
        (mirror.local / "events").write_text("1")
        mirror.close()
        assert (at / "events").read_bytes() == b"1"


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_in_a_store_is_marked_last_and_unmarked_first(memory, monkeypatch):
    model = DeepSeek.init(jaxseek.ModelConfig.from_preset("tiny-llm"), seed=1)
    at = memory / "model"
    models.save(model, str(at))
    assert models.kind_of(str(at)) == "jaxseek"
    tokens = [[1, 2, 3]]
    np.testing.assert_array_equal(models.restore(str(at))(tokens), model(tokens))
    with pytest.raises(CheckpointError, match="memory://bucket/here/model: already exists"):
        models.save(model, at)
    seen = []
    genuine = Remote.unlink
    monkeypatch.setattr(Remote, "unlink", lambda self, **k: (seen.append(self.name), genuine(self, **k)))
    models.save(model, at, overwrite=True)
    assert seen[:2] == ["jaxseek.json", "config.json"]
    loaded, _ = jaxseek.load(str(at))
    np.testing.assert_array_equal(loaded(tokens), model(tokens))


def test_what_a_kill_has_left_of_an_export_is_no_checkpoint_and_makes_way(memory):
    model = DeepSeek.init(jaxseek.ModelConfig.from_preset("tiny-llm"), seed=1)
    models.save(model, memory / "model")
    (memory / "model/jaxseek.json").unlink()
    assert models.kind_of(memory / "model") is None
    with pytest.raises(CheckpointError, match=r"has no jaxseek\.json, so the save was interrupted"):
        models.restore(memory / "model")
    models.save(model, memory / "model", overwrite=True)
    assert models.kind_of(memory / "model") == "jaxseek"


def test_what_is_no_checkpoint_in_a_store_is_not_overwritten(memory):
    (memory / "notes.txt").write_text("mine")
    model = DeepSeek.init(jaxseek.ModelConfig.from_preset("tiny-llm"), seed=1)
    with pytest.raises(CheckpointError, match="already exists and is no checkpoint"):
        models.save(model, memory, overwrite=True)
    assert (memory / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------- conversion


@pytest.mark.parametrize("options", [{}, {"to": "hf"}, {"dtype": "int8"}], ids=["", "to hf", "int8"])
def test_a_conversion_into_a_store_has_the_bytes_of_one_onto_a_disk(options, fp8, memory, tmp_path):
    convert(fp8[0], tmp_path / "disk", progress=False, **options)
    done = convert(fp8[0], str(memory / "store"), progress=False, verify=True, **options)
    ours, theirs = tree(tmp_path / "disk"), stored(memory / "store")
    assert theirs.keys() == ours.keys()
    assert theirs == ours
    assert done["bytes_on_disk"] == sum(map(len, ours.values()))
    if "to" not in options:
        floats = {"to": "hf", "dtype": "bf16" if options else None, "progress": False}
        convert(str(memory / "store"), tmp_path / "back", **floats)
        convert(tmp_path / "disk", tmp_path / "own", **floats)
        assert tree(tmp_path / "back") == tree(tmp_path / "own")


@pytest.mark.parametrize("to", ["jaxseek", "hf"])
def test_a_conversion_into_a_store_goes_on_and_nothing_half_done_counts(
    to, hf, memory, tmp_path, monkeypatch
):
    monkeypatch.setattr("jaxseek.checkpoint.store.CHUNK_BYTES", 5000)
    monkeypatch.setattr(Log, "flush", Log.flush)
    convert(hf, tmp_path / "whole", to=to, progress=False)
    at, resumed = memory / "store", 0
    for turn in range(1, 40):
        with monkeypatch.context() as m:
            stop_after(m, 60 * turn)  # a group is written in one go
            try:
                done = convert(hf, str(at), to=to, progress=False)
                break
            except Interrupted:
                assert not any((at / name).is_file() for name in directory.MARKERS)
    else:
        pytest.fail("it gets nowhere")
    resumed = done["tensors_resumed"]
    assert to == "hf" or resumed > 0
    assert stored(at) == tree(tmp_path / "whole")


@pytest.mark.parametrize("wrong", [{"src": "no/such"}, {"dtype": "int3"}, {"memory": 1}])
def test_what_is_to_be_overwritten_in_a_store_stays_where_the_source_cannot_be_read(wrong, hf, memory):
    convert(hf, str(memory / "good"), progress=False)
    before = stored(memory / "good")
    wrong = dict(wrong)
    with pytest.raises((CheckpointError, OSError)):
        convert(wrong.pop("src", hf), str(memory / "good"), overwrite=True, progress=False, **wrong)
    assert stored(memory / "good") == before
    convert(hf, str(memory / "good"), dtype="f16", overwrite=True, progress=False)
    assert models.read_manifest(memory / "good")["params"]["embed_VD"]["dtype"] == "float16"
    assert not any("journal" in name for name in (memory / "good").sizes())


def test_of_two_conversions_into_one_place_the_earlier_stops(hf, memory, monkeypatch):
    monkeypatch.setattr(directory, "_SECONDS", 0.0)
    at, genuine, begun = memory / "two", Remote.upload, []

    def upload(self, file):
        if not begun:
            begun.append(True)
            convert(hf, str(at), dtype="f16", progress=False)
        genuine(self, file)

    monkeypatch.setattr(Remote, "upload", upload)
    with pytest.raises(CheckpointError, match=r"another process \(process \d+ on .* has begun to write"):
        convert(hf, str(at), progress=False)
    assert models.read_manifest(at)["params"]["embed_VD"]["dtype"] == "float16"


def test_a_conversion_that_was_killed_before_its_first_tensor_goes_on(hf, memory):
    (memory / "new/journal-owner.jsonl").write_text("of a process that was killed")
    convert(hf, str(memory / "new"), progress=False)
    assert models.kind_of(memory / "new") == "jaxseek"
    assert "journal-owner.jsonl" not in (memory / "new").sizes()


def test_a_source_is_known_by_another_name_of_it(hf):
    with pytest.raises(CheckpointError, match="is or holds the checkpoint to be converted"):
        convert(f"file://{hf}", hf, overwrite=True, dtype="f16", progress=False)


def test_files_that_share_tensors_are_written_by_one_host(fp8, monkeypatch):
    monkeypatch.setattr("jaxseek.checkpoint.store.CHUNK_BYTES", 5000)
    from jaxseek_convert.conversion import opened, sink_for, target_forms

    source = opened(fp8[0])
    for to in ("jaxseek", "hf"):
        forms = target_forms(source, to, None)
        sink, _ = sink_for(source, forms, source.origin(forms), to)
        groups = stream.groups(sink)
        assert sorted(n for g in groups for n in g.names) == sorted(sink.tensors)
        assert sorted(f for g in groups for f in g.files) == sorted(sink.files)  # each in one group
        for group in groups:
            own = {file for name in group.names for _, file, *_ in sink.spans(name)}
            assert own == set(group.files)
        for hosts in (1, 2, 3):
            shares = [stream.share(groups, host, hosts) for host in range(hosts)]
            assert sorted(g.names for share in shares for g in share) == sorted(g.names for g in groups)
        loads = [sum(g.nbytes for g in share) for share in shares]
        assert max(loads) - min(loads) <= max(g.nbytes for g in groups)


# ---------------------------------------------------------------- runs


def test_a_run_in_a_store_is_the_run_on_a_disk_also_when_it_goes_on(home, memory, tmp_path):
    alike = {"checkpoint": {"every": 2, "keep": 2}, "log": {"tensorboard": True}}
    train(run(home, tmp_path / "disk", steps=6, **alike))
    out = str(memory / "run")
    train(run(home, out, steps=4, **alike))
    stale = place(out) / "checkpoints/8/params/x"
    stale.write_bytes(b"what a kill has left")
    result = train(run(home, out, steps=6, **alike))
    assert result.steps == 6
    assert losses(place(out), "loss") == losses(tmp_path / "disk", "loss")
    steps = {name.split("/")[1] for name in place(out).sizes() if name.startswith("checkpoints/")}
    assert {"4", "6"} <= steps <= {"4", "6", "8"}
    a, b = jaxseek.load(f"{out}/model")[0], jaxseek.load(tmp_path / "disk/model")[0]
    np.testing.assert_array_equal(a([[1, 2, 3]]), b([[1, 2, 3]]))
    assert {"run.json", "metrics.jsonl", "loss.png"} <= place(out).sizes().keys()
    assert any(name.startswith("tensorboard/") for name in place(out).sizes())


def test_a_run_file_a_mesh_and_prompts_may_be_in_a_store(home, memory, tmp_path, capsys):
    config = run(home, memory / "run", steps=1, mesh=str(memory / "mesh.toml"))
    (memory / "mesh.toml").write_text("[mesh]\nfsdp = 2\n")
    (memory / "run.toml").write_text(Path(toml(config, tmp_path / "run.toml")).read_text())
    assert main(["train", str(memory / "run.toml"), "--json"]) == 0
    (memory / "prompts.txt").write_text("the quick\nbrown fox\n")
    capsys.readouterr()
    model = str(memory / "run/model")
    assert main(["generate", model, "-f", str(memory / "prompts.txt"), "-n", "2", "--json"]) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == [
        "the quick",
        "brown fox",
    ]
    assert main(["train", str(memory / "rum.toml")]) == 1
    assert "memory://bucket/here/rum.toml: no such run file" in capsys.readouterr().err


def test_several_hosts_do_not_write_through_the_disk_of_one(memory, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(CheckpointError, match="2 hosts write a checkpoint together"):
        Checkpoints(memory, run_checkpoint())
    with pytest.raises(CheckpointError, match="at gs:// and on a disk that they share"):
        directory.raise_one_host(memory)


def run_checkpoint():
    from jaxseek.config.run import CheckpointConfig

    return CheckpointConfig()


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "{hf}", "https://example.invalid/x"],
        ["convert", "{hf}", "nothing://x/y"],
        ["convert", "{hf}", "gs:/x/y"],
        ["quantize", "{hf}", "nothing://x/y", "--weights", "int8"],
        ["train", "{run}", "--set", "out=nothing://x/y"],
        ["train", "{run}", "--set", "out=https://example.invalid/x"],
        ["quickstart", "--out", "nothing://x/y"],
        ["generate", "nothing://x/y", "-p", "1"],
        ["info", "nothing://x/y"],
        ["plan", "tiny-v3", "--topology", "v5e:1x1", "--plot", "nothing://x/y.png"],
        ["plan", "tiny-v3", "--topology", "v5e:1x1", "--hlo", "nothing://x/y.txt"],
        ["sweep", "tiny-v3", "--topology", "v5e:1x1", "--plot", "nothing://x/y.png"],
        ["placement", "tiny-v3", "-p", "1 2", "--devices", "2", "--save", "nothing://x/y.npz"],
        ["placement", "tiny-v3", "-p", "1 2", "--devices", "2", "--place", "nothing://x/y.npz"],
        ["placement", "tiny-v3", "-p", "1 2", "--devices", "2", "--plot", "nothing://x/y.png"],
    ],
    ids=lambda c: " ".join(c[:1] + c[-2:]),
)
def test_a_url_that_cannot_be_written_is_refused_before_any_work(
    command, hf, home, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    file = toml(run(home, tmp_path / "out"), tmp_path / "run.toml")
    before = sorted(p.name for p in tmp_path.iterdir())
    with monkeypatch.context() as m:
        works = ("lab.plan.make_job", "lab.sweep.Topology", "api.DeepSeek", "train.start.first_state")
        for work in works:
            m.setattr(f"jaxseek.{work}", None)
        assert main([part.format(hf=hf, run=file) for part in command]) == 1
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "://" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("verb", ["generate", "info", "convert"])
def test_a_bare_name_of_a_repository_is_taken_for_one_on_the_hub(verb, tmp_path, capsys):
    rest = {"generate": ["-p", "1"], "info": [], "convert": [str(tmp_path / "x")]}[verb]
    assert main([verb, "someone/some-model", *rest]) == 1
    assert "did you mean hf://someone/some-model?" in capsys.readouterr().err


# ---------------------------------------------------------------- real servers


@pytest.fixture(scope="module", params=["s3", "gcs"])
def bucket(request):
    """A server; gives a URL. What looks at the environment looks while the module's tests run."""
    with buckets.running(request.param) as (url, environment), pytest.MonkeyPatch.context() as m:
        for name, value in environment.items():
            m.setenv(name, value)
        places._driver.cache_clear()
        yield url
    places._driver.cache_clear()


def test_a_real_store_holds_files_and_their_parts(bucket, tmp_path):
    at = place(f"{bucket}/files")
    (at / "a/b.bin").write_bytes(bytes(range(100)))
    assert at.sizes() == {"a/b.bin": 100}
    from jaxseek_convert.files import RemoteFile

    file = RemoteFile(at / "a/b.bin")
    assert file.read(10, 20).tolist() == list(range(10, 20))
    (tmp_path / "big").write_bytes(b"x" * 7_000_000)
    (at / "big").upload(tmp_path / "big")
    assert (at / "big").state()[1] == 7_000_000
    before = (at / "a/b.bin").state()
    (at / "a/b.bin").write_bytes(b"other")
    assert (at / "a/b.bin").state() != before
    places.remove(at)
    assert not at.exists()


def test_a_real_store_takes_a_conversion_and_gives_it_back(bucket, hf, tmp_path):
    convert(hf, f"{bucket}/hf", to="hf", progress=False)
    convert(f"{bucket}/hf", f"{bucket}/ours", progress=False, verify=True)
    convert(f"{bucket}/ours", tmp_path / "back", to="hf", progress=False)
    convert(hf, tmp_path / "own", to="hf", progress=False)
    assert tree(tmp_path / "back") == tree(tmp_path / "own")
    a, b = jaxseek.load(f"{bucket}/ours")[0], jaxseek.load(hf)[0]
    np.testing.assert_array_equal(a([[1, 2, 3]]), b([[1, 2, 3]]))


@pytest.mark.slow
def test_a_run_in_a_real_store_killed_again_and_again_ends_as_if_it_had_not(bucket, home, tmp_path):
    alike = {"checkpoint": {"every": 1, "keep": 2}, "steps": 12}
    out, command = f"{bucket}/killed", [sys.executable, "-m", "jaxseek.cli", "train", "--json"]
    disk = toml(run(home, tmp_path / "disk", **alike), tmp_path / "disk.toml")
    subprocess.run([*command, disk], cwd=ROOT, check=True, capture_output=True)
    command.append(toml(run(home, out, **alike), tmp_path / "run.toml"))
    kills = 0
    for seconds in (12, 14, 16, None):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            outs = process.communicate(timeout=seconds)
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
    assert kills
    assert process.returncode == 0, outs[1][-2000:]
    assert json.loads(outs[0].splitlines()[-1])["steps"] == 12
    assert losses(place(out), "loss") == losses(tmp_path / "disk", "loss")
    convert(f"{out}/model", tmp_path / "hf", to="hf", progress=False)
    a, b = jaxseek.load(tmp_path / "hf")[0], jaxseek.load(tmp_path / "disk/model")[0]
    np.testing.assert_array_equal(a([[1, 2, 3]]), b([[1, 2, 3]]))
