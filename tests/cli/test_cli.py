"""The command line: exit codes, one-line errors, JSON, and text that streams and stops."""

import json
from pathlib import Path

import pytest

import jaxseek
from jaxseek.cli.main import VERBS, main
from jaxseek.config.model import ModelConfig
from jaxseek.config.run import find_run_file, shipped_runs
from jaxseek.engine.engine import Engine
from jaxseek.engine.generate import generate, stream
from jaxseek.engine.request import Request
from jaxseek.engine.sampling import Sampling
from jaxseek.model.deepseek import DeepSeek
from jaxseek.tokenizer.tokenizer import train_sentencepiece
from jaxseek_convert import save_hf

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXT = "the quick brown fox jumps over the lazy dog while seven wizards boil green tea for the king. " * 20


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A Hugging Face directory of a tiny llama with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_sentencepiece([TEXT], 300, folder / "tokenizer")
    cfg = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_ids[0],
        }
    )
    save_hf(DeepSeek.init(cfg), folder / "hf", tokenizer=tokenizer)
    return folder / "hf"


def test_help_of_every_verb_shows_an_example(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert f"example:\n  jaxseek {verb}" in capsys.readouterr().out


def test_wrong_use_is_2_and_failure_is_1_with_one_line(capsys, tiny, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["no-such-verb"])
    assert stop.value.code == 2
    for argv, code, message in (
        (["info"], 2, "no model: give MODEL, --list or --compute"),
        (["generate", str(tiny)], 2, "no prompt"),
        (["info", "deepseek-v33"], 1, "did you mean deepseek-v3"),
        (["info", "deepseek-v3", "--mesh", "tensr=4"], 1, "did you mean tensor"),
        (["info", "deepseek-v3", "--mesh", "expert=3"], 1, "expert 256 is not divisible by expert=3"),
        (["generate", "deepseek-r1", "-p", "x"], 1, "convert hf://deepseek-ai/DeepSeek-R1 deepseek-r1"),
        (["generate", str(tmp_path / "absent"), "-p", "x"], 1, "does not exist"),
        (["generate", str(tiny), "-p", "fox " * 200], 1, "no room in the context of 128"),
        (["convert", str(tiny), str(tiny)], 1, "choose another destination"),
    ):
        assert main(argv) == code, argv
        errors = capsys.readouterr().err.strip().splitlines()
        assert message in errors[-1], errors


def test_info_counts_what_the_spec_says(capsys):
    assert main(["info", "deepseek-r1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 671_026_419_200
    assert found["cache_bytes_per_token"] == 70_272
    assert main(["info", "--list"]) == 0
    assert "tiny-v3" in capsys.readouterr().out.split()


def test_a_checkpoint_is_converted_and_generates_what_the_source_does(capsys, tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the quick"}\n{"messages": [{"role": "user", "content": "boil tea"}]}\n')
    assert main(["convert", str(tiny), str(tmp_path / "ours"), "--memory", "32GiB"]) == 0
    capsys.readouterr()
    texts = []
    for model in (tiny, tmp_path / "ours"):
        assert main(["generate", str(model), "-f", str(prompts), "-n", "6", "-t", "0", "--json"]) == 0
        texts.append([json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2


def test_train_says_in_one_line_what_is_wrong_with_a_run_and_ends_with_its_result(capsys, tiny, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    path = tmp_path / "run.toml"
    path.write_text(
        f'objective = "pretrain"\nmodel = "{tiny}"\nout = "{tmp_path}/out"\nsteps = 2\n'
        f'[data]\ntrain = "{tmp_path}/data.jsonl"\nlength = 32\n'
        "[batch]\nsize = 2\n[log]\ntensorboard = false\n"
    )
    assert main(["train"]) == 2
    assert "RUN.toml" in capsys.readouterr().err
    for argv, message in (
        (["absent.toml"], "absent.toml: no such run file"),
        ([path, "--set", "step=3"], "unknown key step; did you mean steps"),
        ([path, "--set", "steps"], "expected key=value"),
        ([path, "--set", "steps=many"], "steps is 'many', expected int"),
        ([path, "--set", "data.length=256"], "data.length 256 is more than the model's context of 128"),
        ([path, "--set", "mesh=tensor=3"], "the mesh does not fit the model"),
        ([path, "--set", "data.train=absent.jsonl"], "there is no absent.jsonl"),
    ):
        assert main(["train", *map(str, argv)]) == 1, argv
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1
        assert errors[0].startswith("jaxseek train: error: ")
        assert message in errors[0]
    assert main(["train", str(path), "--set", "batch.size=1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["steps"], result["stopped"]) == (2, False)
    assert main(["generate", str(tmp_path / "out/model"), "-p", "the", "-n", "2", "--json"]) == 0


def test_a_shipped_run_is_found_by_its_name_from_any_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in listed} == set(shipped_runs())
    assert all(len(line.split()) > 4 for line in listed), "each says what it trains"
    shipped = find_run_file("pretrain-tiny")
    assert shipped.name == "pretrain-tiny.toml"
    assert find_run_file("pretrain-tiny.toml") == find_run_file("configs/runs/pretrain-tiny.toml") == shipped
    (tmp_path / "pretrain-tiny.toml").write_text("steps = 'many'")  # a file of one's own comes first
    assert find_run_file("pretrain-tiny.toml") == Path("pretrain-tiny.toml")
    for given in ("elsewhere/pretrain-tiny.toml", "pretrain-tinny"):
        assert main(["train", given]) == 1
        assert f"{given}: no such run file; did you mean pretrain-tiny" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"jaxseek {jaxseek.__version__}\n"


def test_generate_is_a_function_even_after_its_package_was_imported(tiny):
    model, tokenizer = jaxseek.load(tiny)
    texts = jaxseek.generate(model, tokenizer, "the quick", max_new_tokens=6, temperature=0)
    assert texts == generate(model, tokenizer, ["the quick"], max_new_tokens=6, temperature=0)
    ids = tokenizer.encode("the quick")
    assert len(generate(model, None, ids, max_new_tokens=3, temperature=0)[0]) <= 3


def test_streamed_pieces_make_the_text_and_end_before_a_stop_string(tiny):
    model, tokenizer = jaxseek.load(tiny)
    engine, prompt = Engine(model, dispatch=4), tokenizer.encode("seven wizards")

    def streamed(**more):
        handle = engine.submit(Request(prompt, Sampling(24, 0.0, **more), tokenizer))
        return list(stream(engine, handle)), handle.answer

    pieces, whole = streamed()
    text = whole.text
    assert "".join(pieces) == text
    assert len(text) > 8
    stop = text[5:8]
    pieces, reply = streamed(stop=(stop,))
    assert reply.text == "".join(pieces) == text[: text.find(stop)]
    assert reply.finish_reason == "stop"
    assert len(reply.tokens) == len(reply.logprobs) < len(whole.tokens)
