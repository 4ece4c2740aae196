"""Tokenizer: one interface to `tokenizer.json` (tokenizers) and `*.model` (sentencepiece) files.

User text never becomes a control token: `encode` treats `<｜User｜>`, `<think>` or `<|im_start|>` as plain
characters. Only `render_chat`, `render_fim` and `encode_trusted` produce control tokens. A control token is
an added token that is marked special or looks like markup; other added tokens (such as the letters that the
100k DeepSeek vocabulary adds) are ordinary vocabulary.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from jaxseek.storage.hub import model_place
from jaxseek.storage.place import Place, place, write_bytes
from jaxseek.storage.untrusted import expect, parse_json, read_bytes
from jaxseek.tokenizer import chat
from jaxseek.tokenizer.chat import Mark, Message, TokenizerError

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
_MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_TOKEN = (str, {"content": str}, None)
_ID = (int, [int], None)
_MOST_GROWTH = 1 << 10  # of a text that is normalised, in characters for one
# What is read of each file, in the terms of `untrusted.expect`.
_FORMS: dict[str, Any] = {
    "tokenizer.json": {
        "model": {"vocab": (dict, list)},
        "added_tokens": [{"content": str, "id": int, "special": bool}],
    },
    "tokenizer_config.json": {
        **{f"{name}?": _TOKEN for name in _NAMED},
        "chat_template?": (str, [{"name": str, "template": str}], None),
        "add_bos_token?": (bool, None),
        "added_tokens_decoder?": {str: {"content": str}},
    },
    "special_tokens_map.json": {f"{name}?": _TOKEN for name in _NAMED},
    "generation_config.json": {"bos_token_id?": _ID, "eos_token_id?": _ID, "pad_token_id?": _ID},
}
# Words, numbers, scripts, white space and runs on which a bad pre-tokenizer fails: tried when it is loaded.
_TRIAL = "It's a test, 12345.\n\n\tΩ你好 é\u0301 😀 <x>" + "a" * 40 + "!" + " " * 40 + "_"


class Tokenizer:
    """Encodes text to ids and decodes ids; create it with `Tokenizer.from_dir`.

    vocab_size is the largest id + 1; bos_id and pad_id may be None; eos_ids are all ids that end a reply.
    template names the chat template: one of `jaxseek.tokenizer.chat.TEMPLATES`, "jinja" for the model's own
    chat_template, or None if it has none. generation holds generation_config.json, with sampling settings.
    """

    def __init__(self, files: Mapping[str, bytes], template: str | None = None):
        """`files` maps names to contents, as `from_dir` reads them; one is tokenizer.json or a *.model file.

        Raises TokenizerError if a file cannot be read or names a BOS or EOS that does not exist.
        """
        self._files, self.generation = dict(files), _read_json(files, "generation_config.json")
        models = sorted(name for name in files if name.endswith(".model"))
        source = next(name for name in ("tokenizer.json", "tokenizer.model", *models) if name in files)
        special_map = _read_json(files, "special_tokens_map.json")
        config = _read_json(files, "tokenizer_config.json")
        names = {key: _content(c[key]) for c in (special_map, config) for key in _NAMED if c.get(key)}
        try:
            with _quietly():
                if source == "tokenizer.json":
                    backend = _HuggingFace(_read_json(files, source), names.values())
                else:
                    backend = _SentencePiece(files[source], config.get("added_tokens_decoder", {}))
                with contextlib.suppress(Exception):  # some have no token for some of its letters
                    backend.decode(backend.encode([_TRIAL]))
        except BaseException as error:
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            raise TokenizerError(
                f"{source} cannot be read as a tokenizer ({type(error).__name__}: {error}); fetch the file "
                "again, or remove it to load the model without a tokenizer"
            ) from error
        names = backend.named | names
        for key in ("bos_token", "eos_token"):
            if key in names and names[key] not in backend.control:
                raise TokenizerError(f"the config names {key} {names[key]!r}, which {source} does not hold")

        def ids(key: str) -> list[int]:
            also = self.generation.get(f"{key}_token_id")
            found = [backend.control.get(names.get(f"{key}_token", ""))]
            return [i for i in found + (also if isinstance(also, list) else [also]) if i is not None]

        bos = names.get("bos_token")
        add_bos = config.get("add_bos_token")
        self._backend = backend
        self._names = names
        self.vocab_size = backend.size
        self.bos_id = next(iter(ids("bos")), None)
        self.eos_ids = tuple(dict.fromkeys(ids("eos")))
        self.pad_id = next(iter([*ids("pad"), *self.eos_ids]), None)
        self.add_bos = backend.adds_bos(bos) if add_bos is None else bool(add_bos)
        self.chat_template = _chat_template(files, config)
        self.template = template or chat.detect(backend.control, bos, self.chat_template)
        self._skipped = backend.special.union(ids("bos"), ids("pad"), self.eos_ids)

    @classmethod
    def from_dir(cls, path: str | Place, *, template: str | None = None) -> Tokenizer | None:
        """Load the tokenizer of a Hugging Face directory, local or remote; None if it has none.

        Reads tokenizer.json, or else tokenizer.model, and the config files beside it. `template` overrides
        the detected chat template. Raises TokenizerError for an invalid file.
        """
        path = model_place(path, weights=False)
        paths = [path / name for name in _FILES] + sorted(path.glob("*.model"), key=str)
        files = {file.name: read_bytes(file, TokenizerError) for file in paths if file.exists()}
        if "tokenizer.json" not in files and not any(name.endswith(".model") for name in files):
            return None
        try:
            return cls(files, template)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    def save(self, path: str | Place) -> None:
        """Write the files that this tokenizer was read from, byte for byte, the vocabulary last."""
        folder = place(path)
        for name in sorted(self._files, key=lambda name: name.endswith(("tokenizer.json", ".model"))):
            write_bytes(folder / name, self._files[name])

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Encode untrusted text: no control tokens but a leading BOS, if the model uses one and `bos`."""
        return self._encode([text], bos)

    def encode_trusted(self, text: str, *, bos: bool = True) -> list[int]:
        """Encode trusted text: control tokens in it are parsed. A BOS is never doubled."""
        return self._encode(list(chat.split_marks(text, self._backend.control)), bos)

    def encode_reply(self, text: str) -> list[int]:
        """Encode a reply as a training target: thinking tags parsed, the rest as text, EOS appended."""
        tags = self._backend.control.keys() & {chat.THINK, chat.THINK_END}
        return self._encode(list(chat.split_marks(text, tags)), bos=False) + list(self.eos_ids[:1])

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Decode `ids`; unused ids (embedding padding) are dropped, invalid UTF-8 becomes U+FFFD.

        `skip_special` drops BOS, EOS, pad and tokens marked special; `<think>` and role marks stay.
        """
        kept = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        with _told():
            return self._backend.decode([i for i in kept if not (skip_special and i in self._skipped)])

    def token_id(self, token: str) -> int | None:
        """Return the id of a control token or vocabulary piece, or None."""
        return self._backend.token_id(token)

    def check_fits(self, rows: int) -> None:
        """Raise TokenizerError if an id is outside an embedding with `rows` rows; spare rows are fine."""
        if self.vocab_size > rows:
            raise TokenizerError(
                f"the tokenizer has ids up to {self.vocab_size - 1} but the embedding has {rows} rows; "
                "use the tokenizer that belongs to this model"
            )

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
    ) -> list[int]:
        """Encode a conversation as prompt ids; message contents are plain text, whatever they spell.

        `thinking` turns the model's thinking mode on or off; None is the template's default. Only the model's
        own chat_template (template="jinja") renders `tools`. Raises TokenizerError.
        """
        name = template or self.template
        if name is None or (name == "jinja" and not self.chat_template):
            known = ", ".join(chat.TEMPLATES)
            raise TokenizerError(f"this tokenizer has no chat template; pass template= one of {known}")
        if name == "jinja":
            mode = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
            variables = {**self._names, **mode, "add_generation_prompt": add_generation_prompt}
            source = self.chat_template or ""
            segments = chat.render_jinja(source, messages, self._backend.control, tools, **variables)
            return self._encode(segments, bos=False)
        if tools:
            raise TokenizerError(
                f"{name} has no fixed wording for tool descriptions; put them into the system message, or "
                'pass template="jinja" for a model that brings its own chat_template'
            )
        return self._encode(chat.render(name, messages, add_generation_prompt, thinking), bos=True)

    def render_fim(self, prefix: str, suffix: str) -> list[int]:
        """Encode a fill-in-the-middle prompt: a base model continues with the text between the two."""
        segments = [chat.FIM_BEGIN, prefix, chat.FIM_HOLE, suffix, chat.FIM_END]
        return self._encode(segments, bos=True)

    def opened_think(self, prompt: Sequence[int]) -> bool:
        """Return whether a prompt ends with `<think>`, so that the reply starts with reasoning."""
        return self.decode(prompt[-16:], skip_special=False).rstrip().endswith(chat.THINK)

    def _encode(self, segments: Sequence[str], bos: bool) -> list[int]:
        """Encode marks and text; thinking tags absent from the vocabulary are text, as in the V3 files."""
        control = self._backend.control
        segments = [str(s) if s in (chat.THINK, chat.THINK_END) and s not in control else s for s in segments]
        unknown = sorted({s for s in segments if isinstance(s, Mark) and s not in control})
        if unknown:
            raise TokenizerError(
                f"this tokenizer has no token {', '.join(unknown)}, which the chat template needs; "
                "choose a template that fits the model"
            )
        try:
            "".join(segments).encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode: {error}") from error
        with _told():
            ids = self._backend.encode(segments)
        if bos and self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids


class StreamDecoder:
    """Decodes a stream of ids; the pieces and the flush concatenate to `tokenizer.decode` of all ids.

    A piece never ends inside a character: text that ends with U+FFFD waits for its remaining bytes. (Invalid
    UTF-8 may give a different number of U+FFFD with a tokenizer.json that has ByteFallback.)
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special)
        self._context: list[int] = []  # last ids returned; the next are decoded after them
        self._pending: list[int] = []

    def feed(self, ids: int | Sequence[int] | np.ndarray) -> str:
        """Return the text that `ids` complete, possibly empty."""
        self._pending += [int(i) for i in np.atleast_1d(ids)]
        text = self._text()
        return "" if text.endswith("\ufffd") else self._give(text)

    def flush(self) -> str:
        """Return the text held back, at the end of the stream."""
        return self._give(self._text())

    def _text(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]

    def _give(self, text: str) -> str:
        if text:
            # Some sentencepiece models drop white space at the start of a text, so the context must not be
            # white space alone.
            self._context = self._pending if text.strip() else self._context + self._pending
            self._pending = []
        return text


class _HuggingFace:
    """Backend for tokenizer.json, with every control token renamed to an unguessable alias.

    Ids, normalizer, pre-tokenizer and merges stay, so text is encoded as before but cannot spell a control
    token; a mark in the segments is encoded by its alias.
    """

    def __init__(self, spec: dict[str, Any], named: Iterable[str]):
        _raise_growing(spec)
        model = spec["model"]
        vocab = model["vocab"]
        ids = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        added = {token["content"]: token for token in spec["added_tokens"]}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for name in named:
            if name in ids and name not in added:
                added[name] = {"id": ids[name], "content": name, "special": True, **flags}
        self._literals = {token["id"]: name for name, token in added.items()}
        self.control = {n: t["id"] for n, t in added.items() if t["special"] or _MARKUP.fullmatch(n)}
        self.special = frozenset(token["id"] for token in added.values() if token["special"])
        self.size = max([*ids.values(), *self._literals]) + 1
        usual = {"bos_token": str(chat.BOS), "eos_token": str(chat.EOS)}
        self.named = {key: name for key, name in usual.items() if name in self.control}
        self._template = json.dumps(spec.get("post_processor"), ensure_ascii=False)

        nonce = uuid.uuid4().hex
        self._alias = {name: f"{nonce}{i:06d}" for i, name in enumerate(self.control)}
        renamed = [{**token, "content": self._alias.get(name, name)} for name, token in added.items()]
        spec["added_tokens"] = sorted(renamed, key=lambda token: token["id"])
        _rename(model, self._alias, self._alias.keys() & ids.keys())
        spec |= {"post_processor": None, "truncation": None, "padding": None}
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        if "ByteLevel" in json.dumps(spec["decoder"]):
            byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            self._literals = {i: byte_level.pre_tokenize_str(n)[0][0] for i, n in self._literals.items()}

    def adds_bos(self, bos: str | None) -> bool:
        """Return whether the post-processor prepends `bos`; always True for DeepSeek's BOS."""
        first = re.search(r'"single": \[\{"SpecialToken": \{"id": ("(?:[^"\\]|\\.)*")', self._template)
        return bos == chat.BOS or (first is not None and json.loads(first[1]) == bos)

    def encode(self, segments: Sequence[str]) -> list[int]:
        text = "".join(self._alias[s] if isinstance(s, Mark) else s for s in segments)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode as tokenizers does, but keep added letters literal, which it would read as bytes."""
        pieces = [self._literals.get(i) or self._tokenizer.id_to_token(i) for i in ids]
        pieces = [piece for piece in pieces if piece is not None]
        decoder = self._tokenizer.decoder
        return " ".join(pieces) if decoder is None else decoder.decode(pieces)

    def token_id(self, token: str) -> int | None:
        return self.control.get(token, self._tokenizer.token_to_id(token))


def _raise_growing(spec: Mapping[str, Any]) -> None:
    """Raise ValueError for replacements that make texts absurdly longer, one after the other."""
    for part in ("normalizer", "decoder"):
        steps, times = [spec.get(part)], 1
        for step in steps:
            if isinstance(step, dict):
                steps += [*(step.get("normalizers") or ()), *(step.get("decoders") or ())]
                times *= max(1, len(str(step.get("content", "")))) if step.get("type") == "Replace" else 1
        if times > _MOST_GROWTH:
            raise ValueError(f"its {part} makes a text up to {times:,} times longer")


def _rename(model: dict[str, Any], alias: Mapping[str, str], taken: Iterable[str]) -> None:
    """Rename control tokens in the base vocabulary, where merges could produce them."""
    taken = set(taken)
    if not taken:
        return
    if isinstance(model["vocab"], dict):
        model["vocab"] = {alias[p] if p in taken else p: i for p, i in model["vocab"].items()}
    else:
        model["vocab"] = [[alias[p] if p in taken else p, score] for p, score in model["vocab"]]
    if model.get("unk_token") in taken:
        model["unk_token"] = alias[model["unk_token"]]
    if "merges" in model:
        merges = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        model["merges"] = [[a, b] for a, b in merges if taken.isdisjoint((a, b, a + b))]


class _SentencePiece:
    """Backend for a sentencepiece model; each run of text between marks is encoded on its own.

    Sentencepiece never matches control symbols in text; user-defined symbols that are markup become control
    symbols, so that they are not matched either. Sentencepiece decodes U+2581 in a text as a space.
    """

    def __init__(self, blob: bytes, added: Mapping[str, Mapping[str, Any]]):
        proto = sentencepiece_model_pb2.ModelProto.FromString(blob)  # pyright: ignore
        if not proto.pieces:
            raise ValueError("it holds no pieces")
        kinds = proto.SentencePiece
        self.control: dict[str, int] = {}
        for i, piece in enumerate(proto.pieces):
            if piece.type == kinds.USER_DEFINED and _MARKUP.fullmatch(piece.piece):
                piece.type = kinds.CONTROL
            if piece.type in (kinds.CONTROL, kinds.UNKNOWN):
                self.control[piece.piece] = i
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.control |= {token["content"]: int(i) for i, token in added.items()}
        special_ids = {
            "unk_token": self._sp.unk_id(),
            "bos_token": self._sp.bos_id(),
            "eos_token": self._sp.eos_id(),
            "pad_token": self._sp.pad_id(),
        }
        self.named = {key: proto.pieces[i].piece for key, i in special_ids.items() if i >= 0}
        special = {int(i) for i, token in added.items() if token.get("special")}
        self.special = frozenset(special | {i for i in special_ids.values() if i >= 0})
        self.size = max(len(proto.pieces) - 1, *self.control.values()) + 1
        self._marks = {i: name for name, i in self.control.items()}

    def adds_bos(self, bos: str | None) -> bool:
        return bos is not None

    def encode(self, segments: Sequence[str]) -> list[int]:
        ids = []
        for is_mark, group in itertools.groupby(segments, key=lambda s: isinstance(s, Mark)):
            run = list(group)
            ids += [self.control[mark] for mark in run] if is_mark else self._sp.encode("".join(run))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text = ""
        for is_mark, group in itertools.groupby(ids, key=self._marks.__contains__):
            run = [i for i in group if is_mark or i < len(self._sp)]
            text += "".join(self._marks[i] for i in run) if is_mark else self._sp.decode(run)
        return text

    def token_id(self, token: str) -> int | None:
        if token in self.control:
            return self.control[token]
        i = self._sp.piece_to_id(token)
        return None if i == self._sp.unk_id() else i


def _read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    value = parse_json(files.get(name, b"{}"), name, TokenizerError)
    return expect(value, _FORMS[name], name, TokenizerError)


def _is_panic(error: BaseException) -> bool:
    """Return whether the tokenizers library panicked, which is no Exception."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn whatever a tokenizer's library raises for a text into a TokenizerError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise TokenizerError(
            f"the tokenizer fails with this text ({type(error).__name__}: {error})"
        ) from None


_quiet = threading.Lock()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hold back what is written to standard error, also by libraries, and drop it if something is raised."""
    try:
        before = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with _quiet, tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
            kept.seek(0)
            os.write(before, kept.read())
        finally:
            os.dup2(before, 2)
            os.close(before)


def _content(token: str | Mapping[str, Any]) -> str:
    """Return the text of a token in a config file: a string, or an AddedToken as a dict."""
    return token["content"] if isinstance(token, Mapping) else token


def _chat_template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    """Return chat_template.jinja, or else the config's template (in older files a list of named ones)."""
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"chat_template.jinja is not UTF-8 text ({error})") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    directory: str | Path,
    control: Sequence[str] = (chat.USER, chat.ASSISTANT, chat.THINK, chat.THINK_END),
) -> Tokenizer:
    """Train a small BPE model on `texts` and write tokenizer.model and tokenizer_config.json to `directory`.

    Any text survives a round trip (byte fallback, no normalisation, no added space), except that U+2581 comes
    back as a space. BOS, EOS and pad are DeepSeek's, with ids 0, 1 and 2; `control` tokens follow the unknown
    token. The same texts give the same file. `vocab_size` is an upper limit that little text may not reach.
    Raises TokenizerError if sentencepiece cannot train such a model.
    """
    names = {"bos_token": str(chat.BOS), "eos_token": str(chat.EOS), "pad_token": "<｜▁pad▁｜>"}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=1 << 24,
            bos_id=0,
            eos_id=1,
            pad_id=2,
            unk_id=3,
            bos_piece=names["bos_token"],
            eos_piece=names["eos_token"],
            pad_piece=names["pad_token"],
            control_symbols=list(map(str, control)),
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(
            f"sentencepiece cannot make {vocab_size} pieces of these texts ({error}); 256 bytes, the control "
            "symbols and the texts' characters must fit"
        ) from error
    config = {"add_bos_token": True, "tokenizer_class": "LlamaTokenizer", **names}
    files = {
        "tokenizer.model": model.getvalue(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode(),
    }
    tokenizer = Tokenizer(files)
    tokenizer.save(directory)
    return tokenizer
