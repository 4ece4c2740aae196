"""Odd command lines, files and surroundings: each ends in one line that says what is wrong."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxseek.cli import info
from jaxseek.cli.main import main

LONG = "x" * 5000  # longer than a file name may be


def run(capsys, *argv):
    """Exit code, and the last line on stderr, which is the only one that tells of an error."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert "fault of jaxseek" not in shown.err, argv
    errors = [line for line in shown.err.splitlines() if "error: " in line]
    assert len(errors) == (code != 0), (argv, shown.err)
    assert not set(map(chr, range(32))) & set("".join(errors)), "control characters"
    return code, errors[-1] if errors else shown.out


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A directory of files that are not what they should be, which is the current one."""
    monkeypatch.chdir(tmp_path)
    contents = {
        "binary.jsonl": b"\xff\xfe\x00", "empty.jsonl": b"", "deep.jsonl": b"[" * 100_000,
        "number.jsonl": b"\n5\n", "null.jsonl": b'\n{"prompt": null}', "text.jsonl": b"\nfive",
        "ids.jsonl": b'\n{"prompt": [1, "x"]}', "fraction.jsonl": b'\n{"prompt": [1.5]}',
        "no-content.jsonl": b'\n{"messages": [{"role": "user"}]}',
        "object.jsonl": b'\n{"messages": {"role": "user"}}', "five.jsonl": b'\n{"messages": [5]}',
        "nobody.jsonl": b'\n{"messages": [{"role": "me", "content": "x"}]}',
        "no-messages.jsonl": b'\n{"messages": []}', "other.jsonl": b'\n{"text": "x"}',
        "negative.jsonl": b'\n{"prompt": [-1]}', "huge.jsonl": b'\n{"prompt": [99999999999999999999]}',
        "beyond.txt": b"\n99999999", "words.txt": b"\nhello",
        "surrogate.jsonl": b'\n{"prompt": "\\ud800"}', "binary.toml": b"\xff\xfe", "bad.toml": b"==",
        "deep.toml": b"a = " + b"[" * 5000, "types.toml": b"mesh = 5", "axes.toml": b"[weights]\nembed = 5",
        "factor.toml": b"[train]\nroom_factor = 'x'", "sizes.toml": b"[mesh]\ntensor = true",
        "list/config.json": b"[]", "half/config.json": b"{", "deep/config.json": b"[" * 100_000,
        "binary/config.json": b"\xff", "escape/config.json": b'{"model_type": "\\u001b[31m"}',
        "negative/config.json": json.dumps({"model_type": "llama", "hidden_size": -1}).encode(),
        "words/config.json": json.dumps({"model_type": "llama", "hidden_size": "x"}).encode(),
        "bytes.npz": b"xx", "head.npy": b"\x93NUMPY", "head.gguf": b"GGUF",
    }  # fmt: skip
    for name, content in contents.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    Path("folder/config.json").mkdir(parents=True)
    Path("[b]x[/b]").mkdir(parents=True)
    load = np.ones((4, 2, 8), np.int64)
    np.save("load.npy", load)
    np.save("empty.npy", load[:0])
    np.save("fractions.npy", load.astype(float))
    np.save("object.npy", np.array([{}], object))
    np.savez("flat.npz", ids=load, experts=8)
    np.savez("reals.npz", ids=np.zeros((2, 2, 3, 2)), experts=8)
    np.savez("array.npz", ids=np.zeros((2, 2, 3, 2), int), experts=[1, 2])
    np.savez("groups.npz", load=load, groups=0)
    return tmp_path


NUMBERS = {
    "generate m -p x": "-n --temperature --top-k --top-p --min-p --seed --samples --batch-size",
    "chat m": "-n", "info m": "--context --batch", "info": "--compute", "doctor": "--timeout",
    "convert m out": "--memory", "verify m": "--memory", "quickstart": "--minutes --seed",
    "placement m": "--devices", "placement m --devices 2": "--redundant --nodes -n -t",
    "plan m --topology v5e:2x2": "--batch --context --lora --run",
    "sweep m --topology v5e:2x2": "--batch --context --keep",
    "bench m": "--batch --prompt-tokens --new-tokens --rows --length --repeats",
}  # fmt: skip
FROM_ZERO = {"--temperature", "-t", "--top-k", "--min-p", "--seed", "--redundant", "--lora"}


@pytest.mark.parametrize("command", NUMBERS)
def test_a_number_out_of_range_is_wrong_use_and_told_by_option(capsys, command):
    for option in NUMBERS[command].split():
        zero = () if option in FROM_ZERO else ("0",)
        for given in ("-1", "nan", "inf", "1e999", "9" * 5000, "x", "", "--", *zero):
            words = [f"{option}={given}"] if option.startswith("--") else [option, given]
            code, line = run(capsys, *command.split(), *words)
            assert code == 2
            assert option in line
            assert "expected" in line
            assert len(line) < 250


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("binary.jsonl", "UTF-8"), ("deep.jsonl", "line 1: expected JSON"),
        ("number.jsonl", "line 2: expected JSON"), ("null.jsonl", "line 2: prompt is null"),
        ("text.jsonl", "line 2: expected JSON"), ("ids.jsonl", "line 2: message 0"),
        ("fraction.jsonl", "line 2: message 0"), ("no-content.jsonl", "line 2: message 0"),
        ("object.jsonl", "line 2: messages is"), ("five.jsonl", "line 2: message 0"),
        ("nobody.jsonl", "line 2: message 0"), ("other.jsonl", "line 2: expected JSON"),
        ("no-messages.jsonl", "line 2: the conversation is empty"), ("absent.txt", "No such file"),
        ("folder", "directory"), (LONG, "too long"), ("a\0b", "null"),
        ("nosuch://x", "cannot be opened here"), ("gs://", "names no bucket"),
    ],
)  # fmt: skip
def test_a_file_of_prompts_is_checked_before_the_model_is_loaded(capsys, files, name, why):
    for verb in (["generate", "absent"], ["placement", "absent", "--devices", "2"]):
        code, line = run(capsys, *verb, "-f", name)
        assert code == 1
        assert name[:40].replace("\0", "␀") in line or name == "a\0b"
        assert why in line
    code, line = run(capsys, "generate", "absent", "-f", "empty.jsonl")
    assert code == 2
    assert "no prompt: empty.jsonl has none; give -p" in line


def test_a_prompt_that_the_model_cannot_take_is_told_by_its_place(capsys, files):
    for name in ("negative.jsonl", "huge.jsonl", "beyond.txt", "words.txt", "surrogate.jsonl"):
        code, line = run(capsys, "generate", "tiny-llm", "-f", name, "-n", "1")
        assert code == 1
        assert f"{name}, line 2: " in line
    assert "-p: the prompt is empty" in run(capsys, "generate", "tiny-llm", "-p", "")[1]
    assert "-p, number 2: " in run(capsys, "generate", "tiny-llm", "-p", "1", "-p", "-7")[1]
    for option in ("-p", "--system", "--stop"):
        assert run(capsys, "generate", "tiny-llm", option, "a\udcff")[0] == 2


def test_prompts_keep_what_a_line_is(files):
    from jaxseek.cli.prompts import read_prompts

    rows = '\ufeff{"prompt": "one\u2028two"}\r\n\r\n{"messages": [{"role": "user", "content": "x"}]}\n'
    Path("rows.jsonl").write_bytes((rows + '{"prompt": [3, 4]}').encode())
    found = read_prompts(["zero"], "rows.jsonl")
    assert [p.content for p in found] == ["zero", "one\u2028two", [{"role": "user", "content": "x"}], [3, 4]]
    assert [p.where for p in found] == ["-p", *(f"rows.jsonl, line {n}" for n in (1, 3, 4))]
    Path("lines.txt").write_bytes("a\rb\x0cc\u2028d\x85e\t\r\n\n  \n\x0c\n f".encode())
    found = read_prompts([], "lines.txt")
    assert [p.content for p in found] == ["a\rb\x0cc\u2028d\x85e\t", "\x0c", " f"]
    assert [p.where for p in found] == [f"lines.txt, line {n}" for n in (1, 4, 5)]
    for row in (b'{"prompt": "\\ud800"}', b'{"prompt": "a", "prompt": "b"}', b'\x0c{"prompt": "a"}'):
        Path("bad.jsonl").write_bytes(b"\n" + row)
        with pytest.raises(ValueError, match=r"^bad.jsonl, line 2: expected JSON with"):
            read_prompts([], "bad.jsonl")


def test_pipes_folders_and_devices_in_the_place_of_files_are_refused_at_once(capsys, files):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        for make in (Path.mkdir, os.mkfifo, lambda file: file.symlink_to("/dev/zero")):
            shutil.rmtree("hf", ignore_errors=True)
            Path("hf").mkdir()
            small = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
            small |= {"num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 8}
            Path("hf/config.json").write_text(json.dumps(small))
            Path("hf", name).unlink(missing_ok=True)
            make(Path("hf", name))
            code, line = run(capsys, "generate", "hf", "-p", "x")
            assert code == 1
            assert f"hf/{name}: is a" in line
            assert "expected a file" in line


MODELS = (
    *(
        "",
        "/",
        "/dev/null",
        "..",
        LONG,
        "a\nb",
        "\udcff",
        "[b]x[/b]",
        "hf://",
        "hf:///",
        "gs://",
        "nosuch://x",
        "-",
    ),
    *(
        "list",
        "half",
        "deep",
        "binary",
        "escape",
        "negative",
        "words",
        "folder",
        "head.gguf",
        "/dev/null/x",
        "a\0b",
    ),
)


@pytest.mark.parametrize(
    "command",
    [
        *("info", "verify", "generate -p 1", "chat", "placement --devices 2 -p 1", "plan --topology v5e:2x2"),
        *(
            "train",
            "sweep --topology v5e:2x2",
            "convert --dry-run out",
            "quantize --weights int8 out",
            "bench",
        ),
    ],
)
def test_a_model_that_is_none_is_told_in_one_line(capsys, files, command):
    verb, *words = command.split()
    for name in MODELS:
        if name == "head.gguf" and verb in ("convert", "quantize"):
            continue  # reads it by another package
        given = (
            [name, *words]
            if words[-1:] == ["out"]
            else [*words, "--", name]
            if name != "-"
            else [*words, name]
        )
        code, line = run(capsys, verb, *given)
        assert code == (2 if name == "" and verb in ("info", "train", "bench") else 1), (name, line)


def test_settings_and_layouts_that_are_none_are_told_in_one_line(capsys, files):
    for setting in (
        *(
            "",
            "=",
            "a",
            "=1",
            "a.b=1",
            "steps=1e999",
            "steps=nan",
            "data=5",
            "data.train=5",
            "data.train=[1]",
        ),
        *(
            "steps=[1",
            "model=5",
            "model={a=1}",
            "steps=1979-05-27",
            "a..b=1",
            ".=1",
            "data.length=-1",
            "\0=1",
        ),
        *("batch.size=0", "\udcff=1", "steps=" + "[" * 5000, "mesh=5", "optimizer=5", "objective=[1]"),
        "checkpoint.every=-1",
    ):
        assert run(capsys, "train", "pretrain-tiny", "--set", setting)[0] == 1
    for name in ("binary.toml", "bad.toml", "deep.toml", "types.toml", "a\0b", "absent.toml"):
        assert run(capsys, "train", name)[0] == 1
        assert run(capsys, "plan", name, "--topology", "v5e:2x2")[0] == 1
    for mesh in (
        *(
            "",
            "=",
            "tensor",
            "tensor=",
            "tensor=0",
            "tensor=-1",
            "tensor=x",
            "=4",
            "tensor=2=3",
            ",",
            "/",
            LONG,
        ),
        *("tensr=2", "tensor=99999999999999999999", "binary.toml", "bad.toml", "deep.toml", "types.toml"),
        *("axes.toml", "factor.toml", "sizes.toml", "absent.toml", "list"),
    ):
        assert run(capsys, "info", "tiny-v3", f"--mesh={mesh}")[0] == 1, mesh
        assert run(capsys, "plan", "tiny-v3", "--topology", "v5e:2x2", f"--mesh={mesh}")[0] == 1, mesh
    for topology in (
        "",
        "v5e",
        "v5e:",
        "v5e:0x0",
        "v5e:-1x2",
        "v5e:2x",
        "v9:2x2",
        "v5e:999999999x2",
        "v5p:2x2",
    ):
        for verb in ("plan", "sweep"):
            assert run(capsys, verb, "tiny-v3", "--topology", topology)[0] == 1


def test_traces_and_outputs_that_are_none_are_told_in_one_line(capsys, files):
    for trace in (
        "bytes.npz",
        "head.npy",
        "empty.npy",
        "fractions.npy",
        "object.npy",
        "flat.npz",
        "reals.npz",
    ):
        code, line = run(capsys, "placement", trace, "--devices", "2")
        assert code == 1
        assert trace in line or "trace" in line or "ids" in line
    for trace in ("array.npz", "groups.npz", "absent.npz"):
        assert trace in run(capsys, "placement", trace, "--devices", "2")[1]
    for words in (
        ["--devices", "3"],
        ["--devices", "2", "--redundant", "2147483646"],
        ["--devices", "2147483647"],
    ):
        assert run(capsys, "placement", "load.npy", *words)[0] == 1
    for place in ("/dev/null/x", "gs://", "nosuch://x", "a\0b", LONG):
        for option in ("--plot", "--place"):
            assert run(capsys, "placement", "load.npy", "--devices", "2", option, place)[0] == 1


def test_what_goes_wrong_around_a_command_is_told_in_one_line(capsys, monkeypatch):
    def fail(error):
        def run(args):
            raise error

        monkeypatch.setattr(info, "run", run)
        code = main(["info", "tiny-v3"])
        [line] = capsys.readouterr().err.strip().splitlines()
        return code, line

    assert fail(KeyError("a\nb")) == (
        1,
        "jaxseek info: error: KeyError: 'a\\nb' (a fault of jaxseek: JAXSEEK_TRACEBACK=1 shows where, please "
        "report it)",
    )
    assert fail(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes."))[1].startswith(
        "jaxseek info: error: out of memory: RESOURCE_EXHAUSTED"
    )
    assert "out of memory: Unable to allocate" in fail(MemoryError("Unable to allocate 3 TiB"))[1]
    assert fail(ValueError("one\ntwo\x1b[31m"))[1] == "jaxseek info: error: one two␛[31m"
    assert fail(ValueError())[1] == "jaxseek info: error: ValueError"
    assert "jaxseek doctor" in fail(ImportError("No module named 'torch'"))[1]
    assert fail(KeyboardInterrupt()) == (1, "interrupted")
    assert fail(BrokenPipeError("a socket of a bucket"))[0] == 1
    monkeypatch.setenv("JAXSEEK_TRACEBACK", "1")
    with pytest.raises(KeyError):
        fail(KeyError("a"))


def test_a_backend_that_is_missing_is_told_in_one_line():
    command = [sys.executable, "-m", "jaxseek.cli", "generate", "tiny-llm", "-p", "1"]
    done = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "nosuch"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "Unable to initialize backend 'nosuch'" in line


def test_an_interrupt_waits_for_the_end_of_an_import_and_of_a_callback(capsys, monkeypatch, tmp_path):
    (tmp_path / "half_made.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt as e:\n    raise ImportError('half made') from e\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    class Callback:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    def work(args):
        if args.model == "import":
            importlib.import_module("half_made")
        else:
            Callback()
        time.sleep(20)

    monkeypatch.setattr(info, "run", work)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        for where in ("import", "callback"):
            start = time.monotonic()
            assert main(["info", where]) == 1
            assert capsys.readouterr().err == "\ninterrupted\n"
            assert time.monotonic() - start < 5
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
