"""Training steps and conversions timed in processes of their own; what cannot be done is said in one line."""

import json

import pytest

from jaxseek.bench import convert
from jaxseek.cli.main import main
from jaxseek.config.model import ModelConfig
from jaxseek.model.deepseek import DeepSeek
from jaxseek.train.metrics import train_flops
from jaxseek_convert import save_hf

CFG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "hf"
    save_hf(DeepSeek.init(CFG), folder)
    return str(folder)


def test_more_tokens_than_have_room_are_not_timed(capsys, tiny):
    assert main(["bench", tiny, "--prompt-tokens", "30", "--new-tokens", "8"]) == 1
    assert "30 prompt tokens and 8 new ones are more than the context of 32" in capsys.readouterr().err


@pytest.mark.slow
def test_training_steps_are_timed_beside_the_peak(capsys, tiny):
    argv = ["bench", tiny, "--train", "--rows", "2", "--length", "8", "--repeats", "3", "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    [row] = found["rows"]
    assert (row["program"], row["remat"], found["shape"]) == ("jaxseek", "none", "2 x 8 tokens")
    middle = sorted(row["seconds"])[1]
    assert row["seconds_per_step"] == middle
    assert row["tokens_per_second"] == pytest.approx(16 / middle)
    peak = found["machine"]["peak_flops"]
    assert row["fraction_of_peak_flops"] == pytest.approx(train_flops(CFG, 16, 8) / middle / peak)
    assert row["first_step_seconds"] > middle  # compiled there
    assert len(row["losses"]) == 4
    assert 2**26 < row["peak_memory_bytes"] < 2**32


def test_what_the_process_cannot_do_it_says_in_one_line(capsys, tiny, tmp_path):
    for argv, message in (
        ([tiny, "--length", "64"], "data.length 64 is more than the model's context of 32"),
        ([str(tmp_path / "absent")], "does not exist"),
        ([tiny, "--against", "transformers", "--dtype", "bfloat16"], "compares in float32"),
    ):
        assert main(["bench", *argv, "--train"]) == 1
        [line] = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("jaxseek bench: error: "), line
        assert message in line


def test_conversion_is_timed_beside_cat_of_the_same_files(capsys, tmp_path, monkeypatch):
    small = dict.fromkeys(("hidden_size", "intermediate_size"), 32) | {"vocab_size": 128}
    small |= dict.fromkeys(("moe_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16)
    small |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2)
    monkeypatch.setattr(convert, "_V3", convert._V3 | small)
    size = ["--gigabytes", "0.0009", "--shards", "1", "--repeats", "1", "--dir", str(tmp_path)]
    assert main(["bench", "--convert", *size, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0.0009e9 <= found["bytes"] < 0.002e9
    assert set(found["seconds"]) == {"cat", "jaxseek convert"}
    assert found["seconds"]["jaxseek convert"] > 0.1
    assert 2**26 < found["peak_memory_bytes"]["jaxseek convert"] < 2**30
    assert not list(tmp_path.iterdir())  # nothing is left behind
    for words, message in (
        (["--dir", str(tmp_path / "absent")], "no such directory"),
        (["--gigabytes", "1e9"], "has not the room"),
    ):
        assert main(["bench", "--convert", *words]) == 1
        assert message in capsys.readouterr().err
    for words in ([], ["tiny-v3", "--convert"], ["--convert", "--against", "trl"]):
        assert main(["bench", *words]) == 2
