"""Tokenizers that are spread over several files, of a kind that is not read, or larger than the embedding."""

import base64
import io
import json
import logging

import pytest
import sentencepiece
import tokenizers

from jaxseek.tokenizer.chat import TokenizerError, UnusableTokenizer
from jaxseek.tokenizer.tokenizer import Tokenizer

CORPUS = ["the sun and the moon, hello user assistant 123 don't"] * 50
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}


def put(folder, **files):
    """Write JSON files, of which `a_b` is a_b.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), "utf-8")


@pytest.fixture(scope="module")
def pieces():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=300,
        hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue(), sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture
def older(tmp_path, pieces):
    """A tokenizer.model whose chat marks are in added_tokens.json alone."""
    blob, sp = pieces
    n = len(sp)
    put(tmp_path, tokenizer_config=NAMES | {"eos_token": "<|im_end|>"},
        added_tokens={"<|im_end|>": n, "<|im_start|>": n + 1, "word": n + 5})  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(blob)
    return tmp_path, sp, n


def test_added_tokens_of_their_own_file_have_the_ids_that_it_gives(older):
    folder, sp, n = older
    tokenizer = Tokenizer.from_dir(folder)
    assert (tokenizer.eos_ids, tokenizer.vocab_size) == ((n,), n + 6)
    text = "<|im_start|>user\nhello<|im_end|>"
    assert tokenizer.encode_trusted(text, bos=False) == [n + 1, *sp.encode("user\nhello"), n]
    assert not {n, n + 1} & set(tokenizer.encode(text))
    assert tokenizer.encode("the word", bos=False) == [*sp.encode("the "), n + 5]
    assert tokenizer.decode([n + 1, *sp.encode("hello"), n + 5, n]) == "<|im_start|>helloword"


def test_added_tokens_of_the_config_join_and_may_strip_the_text_beside_them(older):
    folder, sp, n = older
    config = NAMES | {
        "added_tokens_decoder": {str(n + 7): {"content": "[SEP]", "lstrip": True, "rstrip": True}}
    }
    put(folder, tokenizer_config=config)
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.encode_trusted("the [SEP] sun", bos=False) == [
        *sp.encode("the"),
        n + 7,
        *sp.encode("sun"),
    ]
    assert tokenizer.token_id("<|im_start|>") == n + 1


def test_a_model_that_is_not_legacy_puts_a_space_before_the_first_run_alone(older):
    folder, sp, n = older
    put(folder, tokenizer_config=NAMES | {"legacy": False})
    tokenizer = Tokenizer.from_dir(folder)
    ids = tokenizer.encode_trusted("user<|im_end|>user the", bos=False)
    assert ids[: ids.index(n)] == sp.encode("user")
    assert sp.id_to_piece(ids[ids.index(n) + 1])[0] != "▁"
    assert tokenizer.decode(ids) == "user<|im_end|>user the"


def test_one_token_with_two_ids_is_told(older):
    folder, _, n = older
    put(
        folder,
        tokenizer_config=NAMES | {"added_tokens_decoder": {str(n): {"content": "word", "special": False}}},
    )
    with pytest.raises(UnusableTokenizer, match=rf"'word' the id {n + 5}, tokenizer_config.json {n}"):
        Tokenizer.from_dir(folder)


ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "word")


def byte_level(folder, kind, gap=0):
    """vocab.json and merges.txt; the ids of the added tokens begin `gap` behind the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    tok.train_from_iterator(CORPUS, trainer)
    tok.model.save(str(folder))
    first = tok.get_vocab_size() + gap
    added = {str(first + i): {"content": c, "special": c != "word"} for i, c in enumerate(ADDED)}
    put(
        folder,
        tokenizer_config={"tokenizer_class": kind, "eos_token": "<|im_end|>", "added_tokens_decoder": added},
    )
    return tok, first


@pytest.mark.parametrize("gap", [0, 9])
@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer"])
def test_vocab_and_merges_are_a_tokenizer_and_travel_with_it(tmp_path, kind, gap):
    tok, first = byte_level(tmp_path / "a", kind, gap)
    Tokenizer.from_dir(tmp_path / "a").save(tmp_path / "b")
    tokenizer = Tokenizer.from_dir(tmp_path / "b")
    assert tokenizer.eos_ids == (first + 2,)
    assert tokenizer.encode("hello sun", bos=False) == tok.encode("hello sun").ids
    assert tokenizer.encode_trusted("<|im_start|>a word<|im_end|>", bos=False) == [
        first + 1, *tok.encode("a ").ids, first + 3, first + 2,
    ]  # fmt: skip
    text = "don't 123 é\u0301 \r\n你好"
    assert tokenizer.decode(tokenizer.encode(text)) == (text.replace("é\u0301", "é\u0301"))
    digits = tokenizer.encode("123", bos=False)
    assert (len(digits) == 3) == kind.startswith("Qwen2")  # digits of one token each


def test_vocab_and_merges_of_an_unknown_class_say_how_to_make_a_tokenizer_json(tmp_path):
    byte_level(tmp_path, "CLIPTokenizer")
    with pytest.raises(UnusableTokenizer, match=r"tokenizer_class is 'CLIPTokenizer'.*save_pretrained"):
        Tokenizer.from_dir(tmp_path)


def test_tokens_beside_a_tokenizer_json_are_added_to_it(tmp_path):
    tok, first = byte_level(tmp_path, "Qwen2Tokenizer", gap=3)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    tok.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.encode_trusted("<|im_end|>", bos=False) == [first + 2] == list(tokenizer.eos_ids)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tiktoken.model", b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))),
        ("tekken.json", b"{}"), ("vocab.txt", b"[PAD]\n"), ("qwen.tiktoken", b"YQ== 0\n"),
        ("merges.txt", b""), ("tokenizer.model", b"version https://git-lfs"),
        ("tokenizer.json", b'{"half": '), ("tokenizer.json", b'{"model": {"type": "Other", "vocab": {}}}'),
        ("vocab.json", b"{}"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_read_is_a_warning_beside_the_weights(tmp_path, caplog, name, data):
    put(tmp_path, tokenizer_config=NAMES)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnusableTokenizer, match=name):
        Tokenizer.from_dir(tmp_path)
    assert Tokenizer.beside(tmp_path, 300) is None
    (said,) = caplog.messages
    assert f"{tmp_path}: goes on without a tokenizer: " in said
    assert name in said


def test_a_bos_that_does_not_exist_and_is_not_asked_for_is_a_warning(tmp_path, caplog):
    byte_level(tmp_path, "Qwen2Tokenizer")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"bos_token": "<s>"}
    put(tmp_path, tokenizer_config=config)
    assert Tokenizer.from_dir(tmp_path).bos_id is None
    assert "the config names bos_token '<s>', which vocab.json does not hold" in caplog.text
    put(tmp_path, tokenizer_config=config | {"add_bos_token": True})
    with pytest.raises(UnusableTokenizer, match="the config names bos_token '<s>'"):
        Tokenizer.from_dir(tmp_path)


def test_a_damaged_settings_file_is_an_error_and_no_tokenizer_is_none(tmp_path, caplog):
    assert Tokenizer.beside(tmp_path, 300) is None
    assert not caplog.messages
    byte_level(tmp_path, "Qwen2Tokenizer")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config.json: not valid JSON"):
        Tokenizer.beside(tmp_path, 400)


def test_an_added_token_beyond_the_embedding_is_a_warning_and_its_use_an_error(tmp_path, caplog):
    _, first = byte_level(tmp_path, "Qwen2Tokenizer")
    tokenizer = Tokenizer.beside(tmp_path, first + 3)  # "word" has no row
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"word (id {first + 3})" in caplog.text
    assert tokenizer.encode("hello")
    with pytest.raises(
        TokenizerError, match=f"'word', token {first + 3}, which has no row in .* of {first + 3}"
    ):
        tokenizer.encode("a word")


def test_a_padding_token_beyond_the_embedding_is_never_used(tmp_path):
    _, first = byte_level(tmp_path, "Qwen2Tokenizer")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    put(tmp_path, tokenizer_config=config | {"pad_token": "word"}, special_tokens_map={"pad_token": "word"})
    assert Tokenizer.from_dir(tmp_path).pad_id == first + 3
    assert Tokenizer.beside(tmp_path, first + 3).pad_id == first + 2


def test_a_tokenizer_whose_vocabulary_or_end_lies_beyond_the_embedding_is_another_models(tmp_path, caplog):
    _, first = byte_level(tmp_path, "Qwen2Tokenizer")
    for rows in (first - 1, first + 2):
        assert Tokenizer.beside(tmp_path, rows) is None
        assert f"but the embedding has {rows} rows" in caplog.messages[-1]
