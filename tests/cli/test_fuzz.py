"""Mutated files and command lines: whatever is read ends in a line that says what is wrong, soon, in little
memory. Each test takes about a minute on an idle core; hypothesis keeps the seed of an input that fails."""

import contextlib
import json
import random
import shutil
from types import SimpleNamespace

import fuzzing
import numpy as np
import pytest
import tiny_gguf
from fuzzing import NUMBERS, as_json, command, mutate, refused_or_done, spoil, toml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxseek
from jaxseek.cli import main as cli
from jaxseek.config.model import ModelConfig, configs_dir, presets
from jaxseek.config.run import shipped_runs
from jaxseek.model.deepseek import DeepSeek
from jaxseek.recipes import pipeline
from jaxseek.storage.untrusted import read_toml
from jaxseek.tokenizer.template_process import TemplateFault, run_template
from jaxseek.tokenizer.tokenizer import Tokenizer, train_sentencepiece
from jaxseek.train import start
from jaxseek_convert import convert, dry_run, save_hf

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]
CHATML = "{% for m in messages %}{{ '<|' + m['role'] + '\n' + m['content'] + '|>\n' }}{% endfor %}"
EXPRESSIONS = (
    *(
        "1/0",
        "'a' * 10**10",
        "10**(10**9)",
        "range(99999)|list",
        "[0] * 10**9",
        "2.0**100000",
        "m()",
        "x.y.z",
    ),
    *("'%9999999999d' % 1", "'{:>9999999999}'.format(1)", "lipsum(n=10**8)", "messages|tojson(indent=10**9)"),
    *("messages|batch(10**9)|list", "'a'.center(10**10)", "''.__class__.__mro__", "messages.append(1)"),
    *("raise_exception('no')", "strftime_now(5)", "messages[99]", "none + 1", "'a'|replace('', 'b' * 10**8)"),
    *("namespace(a=1)", "''.join", "self", "[" * 900, "cycler(1).next()", "joiner()()", "messages|sort"),
    *("dict(a=1)|xmlattr", "'a'|indent(10**10)", "messages|sum", "{}|random"),
)
WRAPS = (
    "{{{{ {} }}}}",
    "{{% set x = {} %}}{{{{ x }}}}",
    "{{% if {} %}}a{{% endif %}}",
    "{{% for i in {} %}}{{{{ i }}}}{{% endfor %}}",
    "{{% macro m() %}}{{{{ {} }}}}{{% endmacro %}}{{{{ m() }}}}",
    "{{% for i in range(99999) %}}{{% set x = {} %}}{{% endfor %}}",
    "{{% macro m() %}}{{{{ m() }}}}{{% endmacro %}}{{{{ {} }}}}",
    "{{% for i in range(999) recursive %}}{{{{ {} }}}}{{% endfor %}}",
)


def fuzz(examples):
    """Run a test on so many inputs, of any duration."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    bounds = settings(max_examples=examples, deadline=None, suppress_health_check=checks)
    return lambda test: bounds(given(rng=st.integers(0, 2**32 - 1).map(random.Random))(test))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny checkpoint in both formats, a GGUF file, and a tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("fuzz")
    tokenizer = train_sentencepiece(
        ["the quick brown fox jumps over the lazy dog. " * 20], 300, folder / "sp"
    )
    raw = {"model_type": "llama", "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    save_hf(DeepSeek.init(ModelConfig.from_hf(raw)), folder / "hf", tokenizer=tokenizer)
    convert(folder / "hf", folder / "ours", progress=False, dtype="int8")
    tiny_gguf.write_gguf(folder / "a.gguf")
    convert(folder / "a.gguf", folder / "bpe", to="hf", progress=False)
    return folder


@pytest.fixture
def fresh(place, tmp_path):
    """Copies a file or directory of `place` to the same path each time."""

    def copy(name):
        target = tmp_path / name
        if target.is_dir():
            shutil.rmtree(target)
        (shutil.copytree if (place / name).is_dir() else shutil.copyfile)(place / name, target)
        return target

    return copy


CONFIGS = {name: ModelConfig.from_preset(name).to_hf() for name in presets() if name.startswith("tiny-")}
CONFIGS |= {"deepseek-v3": ModelConfig.from_preset("deepseek-v3").to_hf()}


@fuzz(300)
def test_configs(tmp_path, monkeypatch, rng):
    monkeypatch.setattr(dry_run, "_rates", lambda *_: None)
    raw = mutate(CONFIGS[rng.choice(sorted(CONFIGS))], rng)
    (tmp_path / "config.json").write_bytes(as_json(raw, rng))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    command("info", tmp_path)
    command("convert", tmp_path, tmp_path / "out", "--dry-run", "--json")


@fuzz(300)
def test_headers_and_indices(fresh, rng):
    folder = fresh("hf")
    file = folder / "model.safetensors"
    blob = file.read_bytes()
    size = int.from_bytes(blob[:8], "little")
    header, data = json.loads(blob[8 : 8 + size]), blob[8 + size :]
    if rng.random() < 0.2:
        file.write_bytes(spoil(blob, rng))
    elif rng.random() < 0.3:
        weights = {name: file.name for name in header if name != "__metadata__"}
        index = mutate({"weight_map": weights}, rng)
        (folder / "model.safetensors.index.json").write_bytes(as_json(index, rng))
    else:
        text = as_json(mutate(header, rng), rng)
        length = rng.choice((len(text),) * 9 + (0, 2**63, 10**9))
        file.write_bytes(length.to_bytes(8, "little") + text + data)
    command("convert", folder, folder / "out", "--json")


@fuzz(200)
def test_manifests_and_stores(fresh, rng):
    folder = fresh("ours")
    names = [
        "jaxseek.json",
        "config.json",
        "digests.json",
        *(str(p) for p in sorted(folder.rglob("zarr.json"))),
    ]
    for name in rng.sample([n for n in names if (folder / n).exists()], rng.choice((1, 1, 2))):
        file = folder / name
        file.write_bytes(as_json(mutate(json.loads(file.read_bytes()), rng), rng))
    if rng.random() < 0.2:
        file = rng.choice([p for p in sorted(folder.rglob("c.*")) if p.is_file()])
        file.write_bytes(spoil(file.read_bytes(), rng))
    command("verify", folder, "--json")
    command("info", folder)
    refused_or_done("load", lambda: jaxseek.load(folder))


@fuzz(150)
def test_journals(fresh, place, rng):
    folder = fresh("hf")
    partial = folder.parent / "out.jaxseek-partial"
    partial.mkdir(exist_ok=True)
    lines = [{"identity": {"source": []}, "boot": "x"}, {"name": "a", "digests": {"a": "00"}}, {"boot": "y"}]
    text = b"\n".join(as_json(mutate(line, rng), rng) for line in lines)
    (partial / "journal.jsonl").write_bytes(spoil(text, rng) if rng.random() < 0.3 else text)
    code, _ = command("convert", folder, folder.parent / "out", "--json", "--overwrite")
    assert code == 0 or not partial.exists() or (partial / "journal.jsonl").exists()


@fuzz(400)
def test_gguf(fresh, rng):
    file = fresh("a.gguf")
    blob = file.read_bytes()
    head, tail = blob[:6000], blob[6000:]
    file.write_bytes(spoil(head, rng) + tail if rng.random() < 0.9 else spoil(blob, rng))
    command("convert", file, file.parent / "out", "--to", "hf", "--overwrite", "--json")


@fuzz(400)
def test_tokenizers(fresh, rng):
    folder = fresh(rng.choice(("sp", "bpe")))
    for file in sorted(folder.glob("*.safetensors")):
        file.unlink()
    file = rng.choice(sorted(folder.glob("tokenizer*")))
    data = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.85:
        data = as_json(mutate(json.loads(data), rng), rng)
    else:
        data = spoil(data, rng)
    file.write_bytes(data)
    if rng.random() < 0.5:
        (folder / "special_tokens_map.json").write_bytes(
            as_json(mutate({"bos_token": "<x>", "pad_token": "y"}, rng), rng)
        )
    if rng.random() < 0.5:
        raw = {"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": True}
        (folder / "generation_config.json").write_bytes(as_json(mutate(raw, rng), rng))

    def use():
        tokenizer = Tokenizer.from_dir(folder)
        if tokenizer is not None:
            ids = tokenizer.encode("It's a test 123\u2028 <x> é 😀 " + "a" * rng.choice((1, 30)))
            tokenizer.decode(ids)
            tokenizer.render_chat([{"role": "user", "content": "hi"}])

    refused_or_done("use of a tokenizer", use)


@fuzz(150)
def test_templates(rng):
    if rng.random() < 0.3:
        source = spoil(CHATML.encode(), rng, 3).decode(errors="replace")
    else:
        parts = [rng.choice(WRAPS).format(rng.choice(EXPRESSIONS)) for _ in range(rng.choice((1, 1, 2)))]
        source = "".join(parts)
    with fuzzing.bounded(source), contextlib.suppress(TemplateFault):
        assert isinstance(run_template(source, {"messages": [{"role": "user", "content": "hi"}]}), str)


RUNS = {name: read_toml(path) for name, path in shipped_runs().items()}
STRATEGIES = [read_toml(path) for path in sorted((configs_dir() / "meshes").glob("*.toml"))]


@fuzz(400)
def test_run_files(tmp_path, monkeypatch, rng):
    def checked(run, *_):
        start.open_strategy(run, start.model_config(run))
        return SimpleNamespace(stopped=False)

    monkeypatch.setattr(pipeline, "run_stage", checked)
    monkeypatch.setattr(pipeline, "run_pipeline", lambda found: next(map(checked, found.stages.values())))
    raw = mutate(RUNS[rng.choice(sorted(RUNS))], rng)
    raw = raw if isinstance(raw, dict) else {}
    text = toml(raw).encode(errors="replace")
    file = tmp_path / "run.toml"
    file.write_bytes(spoil(text, rng) if rng.random() < 0.3 else text)
    change = (
        f"{rng.choice(('steps', 'grpo', 'data.train', 'rewards', 'config', 'a.b'))}={rng.choice(NUMBERS)}"
    )
    command("train", file, *(["--set", change] if rng.random() < 0.3 else []))


@fuzz(300)
def test_strategies(tmp_path, rng):
    raw = mutate(rng.choice(STRATEGIES), rng)
    text = toml(raw if isinstance(raw, dict) else {}).encode(errors="replace")
    (tmp_path / "mesh.toml").write_bytes(spoil(text, rng) if rng.random() < 0.3 else text)
    command("info", "tiny-v3", "--mesh", tmp_path / "mesh.toml")


ROWS = [
    {"prompt": "a"},
    {"prompt": [1, 2]},
    {"messages": [{"role": "user", "content": "x"}]},
    {"text": "é\u2028b"},
]


@fuzz(1000)
def test_prompts_and_rows_of_data(tmp_path, rng):
    from jaxseek.cli.prompts import read_prompts
    from jaxseek.data.sources import open_sources

    text = b"\n".join(as_json(mutate(rng.choice(ROWS), rng), rng) for _ in range(3))
    text = spoil(text, rng) if rng.random() < 0.3 else text
    for suffix in (".jsonl", ".txt", ".json"):
        file = tmp_path / f"rows{suffix}"
        file.write_bytes(text)
        refused_or_done(
            text, lambda file=file: read_prompts([], str(file)) if file.stat().st_size > 4 else None
        )
        refused_or_done(
            text, lambda file=file: [open_sources([str(file)], "data.train")[i] for i in range(1)]
        )


@fuzz(300)
def test_traces(tmp_path, rng):
    file = tmp_path / rng.choice(("a.npz", "a.npy"))
    load = np.ones((4, 2, 8), np.int64)
    np.save(file, load) if file.suffix == ".npy" else np.savez(file, ids=load[..., None] % 2, experts=8)
    file.write_bytes(spoil(file.read_bytes(), rng))
    command("placement", file, "--devices", "2")


def _options():
    """Every verb with its options that take a value."""
    sub = next(a for a in cli.parser()._actions if a.dest == "verb")
    for verb, parser in sub.choices.items():
        yield (
            verb,
            [(a.option_strings, a.nargs) for a in parser._actions if a.option_strings and a.nargs != 0],
        )


OPTIONS = dict(_options())


@fuzz(1500)
def test_command_lines(tmp_path, monkeypatch, rng):
    """The verbs that compute end after the arguments are read; `info` runs whole."""
    monkeypatch.chdir(tmp_path)
    verb = rng.choice((*OPTIONS, "info", "info"))
    module = __import__(f"jaxseek.cli.{verb}", fromlist=["run"])
    if verb != "info":
        monkeypatch.setattr(module, "run", lambda args: 0)
        monkeypatch.setattr(module, "ALL_HOSTS", False, raising=False)
        monkeypatch.setattr(module, "uses_devices", lambda args: False, raising=False)
    words = [
        rng.choice(("tiny-v3", "deepseek-r1", "", "/dev/null", "x" * 300, "a\0b", "hf://", "..", "\udcff"))
    ]
    for names, _ in rng.sample(OPTIONS[verb], min(len(OPTIONS[verb]), rng.choice((1, 2, 3)))):
        value = rng.choice((*NUMBERS, "tiny-v3", "tensor=2", "v5e:2x2", "1GiB", "bf16"))
        words += [f"{names[-1]}={value}"] if rng.random() < 0.7 else [names[0], value]
    rng.shuffle(words)
    command(verb, *words)


@fuzz(100)
def test_generate_with_any_settings(rng):
    words = []
    for option in (
        "-n",
        "-t",
        "--top-k",
        "--top-p",
        "--min-p",
        "--seed",
        "--samples",
        "--batch-size",
        "--stop",
    ):
        if rng.random() < 0.3:
            words += [option, rng.choice((*NUMBERS, "0.5", "3"))]
    prompt = rng.choice(("1 2 3", "", "-1", "99999999999", "x", "1 " * 9000, "\x1b[31m", "1.5"))
    command("generate", "tiny-llm", *words, "-n", "2", f"--prompt={prompt}", "--samples=1")
