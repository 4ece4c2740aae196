"""Make Hugging Face's tokenizer files from the vocabulary of a GGUF file.

Sources: llama.cpp's llama-vocab.cpp for the names of the pre-tokenizers; the tokenizer.json of the released
models for how they cut, which for DeepSeek's differs: numbers become single digits there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxseek.config.model import ModelConfig
from jaxseek_convert.gguf_config import NAMED

log = logging.getLogger("jaxseek")

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The letters with a case of the 100k vocabulary, as its tokenizer.json lists them.
_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛ"
    "ὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-"
    "ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
_V3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = pre_tokenizers.Digits(individual_digits=True)


def _cut(*patterns: str) -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


_LLAMA3, _QWEN2 = _cut(_WORDS % "{1,3}"), _cut(_WORDS % "")
_PUNCTUATION = "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+"
# tokenizer.ggml.pre -> (pre-tokenizers that split text into words, whether ByteLevel applies GPT-2's regex)
_PRE: dict[str, tuple[list[pre_tokenizers.PreTokenizer], bool]] = {
    "gpt-2": ([], True),
    "smollm": ([_DIGITS], True),
    "llama-bpe": (_LLAMA3, False),
    "qwen2": (_QWEN2, False),
    "deepseek-r1-qwen": (_QWEN2, False),
    "deepseek-llm": ([*_cut(r"[\r\n]", rf"\s?[{_LETTERS}]+", _PUNCTUATION, r"\s+$", _CJK), _DIGITS], False),
    "deepseek-coder": ([*_cut(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK), _DIGITS], False),
    "deepseek-v3": (_cut(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _V3_WORDS), False),
}
_WITH_BOS = ("llama-bpe", "deepseek-llm", "deepseek-coder", "deepseek-v3")  # where the file does not say


def tokenizer_files(path: Path, meta: Mapping[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """Return the contents of tokenizer.json, tokenizer_config.json and generation_config.json.

    Without the first two, and with a warning, if no tokenizer can be made: the weights do not need one.
    """
    ggml = {k.removeprefix("tokenizer.ggml."): v for k, v in meta.items() if k.startswith("tokenizer.ggml.")}
    try:
        files = _files(ggml, meta.get("tokenizer.chat_template"), cfg)
    except Exception as e:  # tokenizers raises errors of many classes
        why = str(e) if type(e) is ValueError else f"{type(e).__name__}: {e}"
        log.warning(
            "%s: the weights are converted without a tokenizer, as none can be made of its tokens: %s. "
            "Put the tokenizer files of the original model beside them",
            path,
            why,
        )
        files = {}
    ends = dict.fromkeys(i for i in (cfg.eos_token_id, ggml.get("eot_token_id")) if i is not None)
    ids = {"bos_token_id": cfg.bos_token_id, "eos_token_id": list(ends), "pad_token_id": cfg.pad_token_id}
    return {**files, "generation_config.json": {k: v for k, v in ids.items() if v not in (None, [])}}


def _files(ggml: Mapping[str, Any], template: Any, cfg: ModelConfig) -> dict[str, Any]:
    """Return tokenizer.json and tokenizer_config.json. Raises an error if none can be made.

    As in released files, control tokens after the last vocabulary piece are added tokens, not vocabulary, and
    tokens that only pad the embedding are left out.
    """
    kind, pre, tokens = ggml.get("model"), ggml.get("pre"), ggml.get("tokens", [])
    if kind != "gpt2" or pre not in _PRE:
        raise ValueError(
            f"the tokenizer is {kind!r} with pre-tokenizer {pre!r}; supported is 'gpt2' (byte-level BPE) "
            f"with {', '.join(_PRE)}"
        )
    if len(tokens) > cfg.vocab_size:
        raise ValueError(f"{len(tokens)} tokens for an embedding of {cfg.vocab_size} rows")
    types = ggml.get("token_type", [_NORMAL] * len(tokens))
    ids = {key: ggml.get(f"{name}_token_id") for key, name in NAMED.items()}
    names = {key: tokens[i] for key, i in ids.items() if i is not None}
    add_bos = bool(ggml.get("add_bos_token", pre in _WITH_BOS)) and "bos_token" in names
    tokenizer = _byte_level_bpe(tokens, types, ggml["merges"], pre)
    if add_bos:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", f"{bos}:1", "$B:1"],
            special_tokens=[(bos, cfg.bos_token_id)],
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": cfg.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "chat_template": template,
        **names,
    }
    return {
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": {k: v for k, v in config.items() if v is not None},
    }


def _byte_level_bpe(tokens: list[str], types: list[int], merges: list[str], pre: str) -> Tokenizer:
    pieces = max((i for i, kind in enumerate(types) if kind == _NORMAL), default=-1) + 1
    vocab = {token: i for i, token in enumerate(tokens[:pieces])}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe"))
    cuts, use_regex = _PRE[pre]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    special = {_CONTROL: True, _USER_DEFINED: False}
    added = [i for i, kind in enumerate(types) if kind in special]
    tokenizer.add_tokens([AddedToken(tokens[i], special=special[types[i]], normalized=False) for i in added])
    if wrong := [i for i in [*range(pieces), *added] if tokenizer.token_to_id(tokens[i]) != i]:
        token = tokens[wrong[0]]
        raise ValueError(f"{token} is {wrong[0]}, but would be {tokenizer.token_to_id(token)}")
    return tokenizer
