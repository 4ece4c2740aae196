"""The files of a tokenizer: those that travel with a checkpoint, and what several of them say together."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxseek.storage.place import Place
from jaxseek.storage.untrusted import read_bytes
from jaxseek.tokenizer.chat import TokenizerError, UnusableTokenizer

VOCABULARY = "tokenizer.json"
PIECES = ("vocab.json", "merges.txt")  # byte-level BPE in the older form
_OTHER = (
    "tiktoken.model",
    "*.tiktoken",
    "tokenizer.model.*",
    "tekken.json",
    "vocab.*",
    "*.bpe",
    "merges.txt",
)
_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_NAMED_TEMPLATES = "additional_chat_templates"
MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
_TOKEN = (str, {"content": str}, None)
_NAMES = {f"{name}?": _TOKEN for name in NAMED}
_TEMPLATES = (str, [{"name": str, "template": str}], {str: str}, None)
# What is read of each file, in the terms of `untrusted.expect`.
FORMS: dict[str, Any] = {
    VOCABULARY: {
        "model": {"vocab": (dict, list)},
        "added_tokens": [{"content": str, "id": int, "special": bool}],
    },
    PIECES[0]: {str: int},
    "added_tokens.json": {str: int},
    "tokenizer_config.json": {
        **_NAMES,
        "chat_template?": _TEMPLATES,
        "add_bos_token?": (bool, None),
        "added_tokens_decoder?": {str: {"content": str}},
    },
    "special_tokens_map.json": _NAMES,
    "chat_template.json": {"chat_template?": _TEMPLATES},
}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def read(folder: Place) -> dict[str, bytes]:
    """Read every file of a tokenizer in a folder, by name; those of kinds that are not read too."""
    paths = {file.name: file for file in sorted(folder.glob("*"), key=str)}
    paths = {name: file for name, file in paths.items() if name in _SETTINGS or holds_vocabulary(name)}
    for file in sorted((folder / _NAMED_TEMPLATES).glob("*.jinja"), key=str):
        paths[f"{_NAMED_TEMPLATES}/{file.name}"] = file
    return {name: read_bytes(file, TokenizerError) for name, file in paths.items() if file.exists()}


def holds_vocabulary(name: str) -> bool:
    """Return whether a file of this name is a vocabulary, of any kind."""
    return name == VOCABULARY or name.endswith(".model") or _is_other(name)


def _is_other(name: str) -> bool:
    """Return whether a file of this name is a vocabulary that is not read, at least not alone."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _OTHER)


def source(files: Mapping[str, bytes]) -> str | None:
    """Return the name of the vocabulary to read, or None if there is none of any kind.

    Raises UnusableTokenizer if there are only ones of kinds that are not read.
    """
    models = sorted(name for name in files if name.endswith(".model") and not _is_other(name))
    for name in (VOCABULARY, "tokenizer.model", *models):
        if name in files:
            return name
    if all(name in files for name in PIECES):
        return PIECES[0]
    if found := [name for name in files if holds_vocabulary(name)]:
        raise UnusableTokenizer(
            f"{' and '.join(found)}: a tokenizer of a kind that is not read; expected tokenizer.json, a "
            "sentencepiece .model, or vocab.json with merges.txt. transformers makes the first: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    return None


def content(token: str | Mapping[str, Any]) -> str:
    """Return the text of a token in a config file: a string, or an AddedToken as a dict."""
    return token["content"] if isinstance(token, Mapping) else token


def special_names(*tables: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tokens that special_tokens_map.json or tokenizer_config.json name as special."""
    for table in tables:
        more = table.get("additional_special_tokens") or []
        yield from (content(table[key]) for key in NAMED if table.get(key))
        yield from map(content, more.values() if isinstance(more, Mapping) else more)


def added_tokens(
    config: Mapping[str, Any], special_map: Mapping[str, Any], added: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Return the added tokens of tokenizer_config.json and of added_tokens.json, by their text.

    Raises UnusableTokenizer if the files give a token two ids.
    """
    special, found = set(special_names(special_map, config)), {}
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        found[token["content"]] = FLAGS | {"special": False} | dict(token) | {"id": int(number)}
    for name, number in added.items():
        one = FLAGS | {"special": name in special, "normalized": name not in special, "content": name}
        if found.setdefault(name, one | {"id": int(number)})["id"] != number:
            raise UnusableTokenizer(
                f"added_tokens.json gives {name!r} the id {number}, tokenizer_config.json "
                f"{found[name]['id']}; expected one id, as the weights were trained with"
            )
    for name in found.keys() & special:
        found[name]["special"] = True
    return found


def byte_level(
    vocab: Mapping[str, int], merges: str, added: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the tokenizer.json of vocab.json and merges.txt, as transformers makes it for their class."""
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    if kind == "Qwen2Tokenizer":
        split = {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False}
        cut: dict[str, Any] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    elif kind == "GPT2Tokenizer":
        space = bool(config.get("add_prefix_space"))
        cut = byte_level | {"use_regex": True, "add_prefix_space": space}
    else:
        raise UnusableTokenizer(
            f"tokenizer_class is {config.get('tokenizer_class')!r}, so how it cuts text into words is not "
            "known; with vocab.json and merges.txt Qwen2Tokenizer and GPT2Tokenizer are read. transformers "
            "makes a tokenizer.json: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    lines = [line.removesuffix("\r") for line in merges.split("\n")]  # letters of bytes are no line ends
    pairs = [line.split(" ") for line in lines[lines[0].startswith("#version") :] if line]
    return {
        "version": "1.0",
        "added_tokens": [dict(token) for token in added.values()],
        "normalizer": {"type": "NFC"} if kind == "Qwen2Tokenizer" else None,
        "pre_tokenizer": cut,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": dict(vocab), "merges": pairs, "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                  "byte_fallback": False},
    }  # fmt: skip


def chat_templates(
    files: Mapping[str, bytes], config: Mapping[str, Any], older: Mapping[str, Any]
) -> dict[str, str]:
    """Return the chat templates by name: "default", and others that a checkpoint brings, such as "tool_use".

    chat_template.jinja comes before `older`, chat_template.json, and that before tokenizer_config.json.
    """
    given = older.get("chat_template") or config.get("chat_template") or {}
    if isinstance(given, list):
        given = {one["name"]: one["template"] for one in given}
    found = {"default": given} if isinstance(given, str) else dict(given)
    if "chat_template.jinja" in files:
        found["default"] = _text(files, "chat_template.jinja")
    for name in files:
        if name.startswith(f"{_NAMED_TEMPLATES}/"):
            found[name.removeprefix(f"{_NAMED_TEMPLATES}/").removesuffix(".jinja")] = _text(files, name)
    return found


def _text(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{name} is not UTF-8 text ({error})") from None
