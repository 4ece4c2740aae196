"""Tokenizer: one interface to `tokenizer.json`, `*.model` (sentencepiece) and `vocab.json` files.

User text never becomes a control token: `encode` treats `<｜User｜>`, `<think>` or `<|im_start|>` as plain
characters. Only `render_chat`, `render_fim` and `encode_trusted` produce control tokens. A control token is
an added token that is marked special or looks like markup; other added tokens (such as the letters that the
100k DeepSeek vocabulary adds) are ordinary vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from jaxseek.storage.hub import model_place
from jaxseek.storage.place import Place, place, write_bytes
from jaxseek.storage.untrusted import expect, parse_json
from jaxseek.tokenizer import chat, folder
from jaxseek.tokenizer import template as forms
from jaxseek.tokenizer.backends import HuggingFace, SentencePiece
from jaxseek.tokenizer.chat import Mark, Message, TokenizerError, UnusableTokenizer

log = logging.getLogger("jaxseek")

# Words, numbers, scripts, white space and runs on which a bad pre-tokenizer fails: tried when it is loaded.
_TRIAL = "It's a test, 12345.\n\n\tΩ你好 é\u0301 😀 <x>" + "a" * 40 + "!" + " " * 40 + "_"


class Tokenizer:
    """Encodes text to ids and decodes ids; create it with `Tokenizer.from_dir`.

    vocab_size is the largest id + 1; bos_id and pad_id may be None; eos_ids are all ids that end a reply.
    template names the chat template: one of `jaxseek.tokenizer.chat.TEMPLATES`, "jinja" for the model's own
    chat_template, or None if it has none. chat_templates holds the model's own by name.
    """

    def __init__(self, found: Mapping[str, bytes], template: str | Path | None = None):
        """`found` maps names to contents, as `folder.read` gives them; one is a vocabulary.

        Raises TokenizerError if a file cannot be read or names a BOS or EOS that does not exist.
        """
        self._files = dict(found)
        generation = _read_json(found, "generation_config.json")
        special_map = _read_json(found, "special_tokens_map.json")
        config = _read_json(found, "tokenizer_config.json")
        added_ids = _read_json(found, "added_tokens.json")
        older = _read_json(found, "chat_template.json")
        source = folder.source(found)
        if source is None:
            raise TokenizerError("there is no vocabulary, expected tokenizer.json or a sentencepiece .model")
        try:
            with _quietly():
                special = set(folder.special_names(special_map, config))
                added = folder.added_tokens(config, special_map, added_ids)
                if source.endswith(".model"):
                    backend = SentencePiece(found[source], added, config.get("legacy") is not False)
                elif source in folder.PIECES:
                    merges = found["merges.txt"].decode()
                    spec = folder.byte_level(_read_json(found, source), merges, added, config)
                    backend = HuggingFace(spec, special, added)
                else:
                    backend = HuggingFace(_read_json(found, source), special, added)
                with contextlib.suppress(Exception):  # some have no token for some of its letters
                    backend.decode(backend.encode([_TRIAL]))
            names = {k: folder.content(c[k]) for c in (special_map, config) for k in folder.NAMED if c.get(k)}
            self.chat_templates = folder.chat_templates(found, config, older)
        except TokenizerError:
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            raise UnusableTokenizer(
                f"{source} cannot be read as a tokenizer ({type(error).__name__}: {error}); fetch the file "
                "again, or remove it to load the model without a tokenizer"
            ) from error
        names = backend.named | names
        if names.get("bos_token", "") not in ("", *backend.control) and not config.get("add_bos_token"):
            log.warning(
                "the config names bos_token %r, which %s does not hold", names.pop("bos_token"), source
            )
        for key in ("bos_token", "eos_token"):
            if key in names and names[key] not in backend.control:
                raise UnusableTokenizer(
                    f"the config names {key} {names[key]!r}, which {source} does not hold"
                )

        def ids(key: str) -> list[int]:
            also = generation.get(f"{key}_token_id")
            found = [backend.control.get(names.get(f"{key}_token", ""))]
            return [i for i in found + (also if isinstance(also, list) else [also]) if type(i) is int]

        bos = names.get("bos_token")
        add_bos = config.get("add_bos_token")
        self._backend = backend
        self._names = names
        self._rows: int | None = None  # of the embedding, where the vocabulary is larger
        self._checked: set[tuple[str, str]] = set()  # what a template was seen to write, or was told not to
        self.vocab_size = backend.size
        self.bos_id = next(iter(ids("bos")), None)
        self.eos_ids = tuple(dict.fromkeys(ids("eos")))
        self.pad_id = next(iter([*ids("pad"), *self.eos_ids]), None)
        self.add_bos = backend.adds_bos(bos) if add_bos is None else bool(add_bos)
        self.chat_template = self.chat_templates.get("default")
        if template is not None:
            self.template, own = self._chosen(template)
            self.chat_template = own if self.template == "jinja" else None
        self._skipped = backend.special.union(ids("bos"), ids("pad"), self.eos_ids)

    @classmethod
    def from_dir(cls, path: str | Place, *, template: str | Path | None = None) -> Tokenizer | None:
        """Load the tokenizer of a Hugging Face directory, local or remote; None if it has none.

        Reads tokenizer.json, or else tokenizer.model, or vocab.json with merges.txt, and the config files
        beside it. `template` is used instead of the model's own: see `render_chat`. Raises TokenizerError for
        an invalid file, and where there are only files of a kind that is not read.
        """
        at = model_place(path, weights=False)
        found = folder.read(at)
        try:
            return cls(found, template) if folder.source(found) else None
        except TokenizerError as error:
            raise type(error)(f"{at}: {error}") from error

    @classmethod
    def beside(cls, weights: str | Place, rows: int, template: str | Path | None = None) -> Tokenizer | None:
        """Load the tokenizer beside weights with an embedding of `rows` rows.

        One whose vocabulary cannot be used is None, and a warning: the weights are whole without it. Raises
        TokenizerError for a settings file that is damaged.
        """
        try:
            found = cls.from_dir(weights, template=template)
            if found is not None:
                found.check_fits(rows)
        except UnusableTokenizer as error:
            log.warning("%s: goes on without a tokenizer: %s", weights, error)
            return None
        return found

    def save(self, path: str | Place) -> None:
        """Write the files that this tokenizer was read from, byte for byte, the vocabulary last."""
        at = place(path)
        for name in sorted(self._files, key=folder.holds_vocabulary):
            write_bytes(at / name, self._files[name])

    @functools.cached_property
    def template(self) -> str | None:
        """Name of the chat template: a built-in one only where it renders as the model's own does."""
        if self.chat_template is None and self.chat_templates:
            return None  # one of several is to be named
        if self.chat_template is None:
            return chat.detect(self._backend.control, self._names.get("bos_token"))
        if self._ids_of("jinja", forms.PROBES[0], True, None) is None:
            return "jinja"  # why it fails is told where it is used
        return next((n for n in chat.TEMPLATES if self._renders_as_own(n, forms.PROBES)), "jinja")

    @functools.cached_property
    def _calls_tools_as_own(self) -> bool:
        """Return whether the built-in form also stands for conversations with tool calls."""
        return self.chat_template is None or self._renders_as_own(self.template or "", forms.TOOL_PROBES)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Encode untrusted text: no control tokens but a leading BOS, if the model uses one and `bos`."""
        return self._encode([text], bos)

    def encode_trusted(self, text: str, *, bos: bool = True) -> list[int]:
        """Encode trusted text: control tokens in it are parsed. A BOS is never doubled."""
        return self._encode(list(chat.split_marks(text, self._backend.control)), bos)

    def encode_reply(self, text: str) -> list[int]:
        """Encode a reply as a training target: thinking tags parsed, the rest as text, EOS appended."""
        return self._encode_thoughts(text) + list(self.eos_ids[:1])

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
        """Hold the ids against an embedding with `rows` rows; spare rows are fine.

        Added tokens beyond it are a warning, since few are ever used; from then on encoding one is an error.
        Raises UnusableTokenizer where BOS, EOS or the vocabulary itself reaches beyond.
        """
        if self.vocab_size <= rows:
            return
        lost = [name for name, i in self._backend.added.items() if i >= rows]
        ends = [i for i in (self.bos_id, *self.eos_ids[:1]) if i is not None]
        if self._backend.vocabulary > rows or max(ends, default=0) >= rows:
            raise UnusableTokenizer(
                f"the tokenizer has ids up to {self.vocab_size - 1} but the embedding has {rows} rows; "
                "use the tokenizer that belongs to this model"
            )
        log.warning(
            "%d added tokens have no row in the embedding of %d, such as %s (id %d): text that needs one is "
            "an error", len(lost), rows, lost[0], self._backend.added[lost[0]],
        )  # fmt: skip
        self._rows = rows
        if self.pad_id is not None and self.pad_id >= rows:
            self.pad_id = next(iter(self.eos_ids), None)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Encode a conversation as prompt ids; message contents are plain text, whatever they spell.

        `template` is the name of a built-in form or of one of the model's own (jinja: the default one), the
        text of a Jinja template, or a file that holds one. `thinking` turns the model's thinking mode on or
        off; None is the template's default. `chat_template_kwargs` are variables of the template. With
        `continue_final_message` the prompt ends within the last message, which is the assistant's.

        The template gets every key of a message. One that it does not write is a warning; tools, documents,
        tool calls and variables that it does not know raise TokenizerError.
        """
        chat.check_messages(messages)
        for what, given in (("tools", tools), ("documents", documents)):
            if given is not None:
                chat.check_tables(what, given)
        name, source = self._chosen(template, tools)
        extra = dict(chat_template_kwargs or {})
        if name in chat.TEMPLATES:
            switches = [extra.pop(k) for k in forms.SWITCHES if k in extra]
            thinking = next(iter(switches), thinking)
            if source is not None and template is None:  # the form stands for the model's own template
                known = {"role", "content", "prefix", *(("tool_calls",) if self._calls_tools_as_own else ())}
                more = any(m["role"] == "tool" or m.keys() - known for m in messages)
                name = "jinja" if tools or documents or extra or more else name
        if name in chat.TEMPLATES and (tools or documents or extra):
            what = "tool descriptions" if tools else "documents" if documents else ", ".join(extra)
            raise TokenizerError(
                f"{name} has no fixed wording for {what}; put it into the system message, or choose a "
                "template that has one (template=, --template FILE)"
            )
        if name not in chat.TEMPLATES:
            forms.check_variables(source or "", extra)
            if thinking is not None and not self._switches(source):
                self._warn_once(source, f"has no switch for thinking: thinking={thinking} has no effect")
        if continue_final_message and not (
            messages[-1]["role"] == "assistant" and isinstance(messages[-1].get("content"), str)
        ):
            raise TokenizerError("the last message is not the assistant's text, so it cannot be continued")
        whole = name in chat.TEMPLATES  # is the beginning of a reply put behind a whole prompt?
        if continue_final_message and thinking is None:
            if whole:
                thinking = forms.mode_for(name, messages[-1])
            elif forms.thinks(messages[-1]) and not extra.keys() & forms.SWITCHES and self._switches(source):
                thinking = whole = True

        def render(messages: Sequence[Message], generate: bool, tools: Any, documents: Any) -> list[str]:
            return self._render(name, source, messages, generate, thinking, tools, documents, extra)

        self._check_written(name, source, render, messages, tools, documents)
        bos = name in chat.TEMPLATES  # the model's own template writes it
        if not continue_final_message:
            return self._encode(render(messages, add_generation_prompt, tools, documents), bos)
        if not whole:
            begun = forms.cut(lambda talk: render(talk, False, tools, documents), messages)
            if begun:
                return self._encode(begun, bos)
        prompt = self._encode(render(messages[:-1], True, tools, documents), bos)
        tail = self.decode(prompt[-16:], skip_special=False)
        return prompt + self._encode_thoughts(forms.after_prompt(name, messages[-1]["content"], tail))

    def _chosen(self, template: str | Path | None, tools: Any = None) -> tuple[str, str | None]:
        """Return the name of a template, "jinja" for one that is no form of ours, and its Jinja source."""
        own = self.chat_templates | ({"default": self.chat_template} if self.chat_template else {})
        if template is None and tools and "tool_use" in self.chat_templates:
            return "jinja", self.chat_templates["tool_use"]
        if template is None and self.template is not None:
            return self.template, own.get("default")
        if template in chat.TEMPLATES:
            return str(template), own.get("default")
        if template is None or (template == "jinja" and "default" not in own):
            known = ", ".join((*self.chat_templates, *chat.TEMPLATES))
            raise TokenizerError(
                f"this tokenizer has no chat template; pass template= one of {known}, the text of one, or a "
                "file (--template)"
            )
        name = "default" if template == "jinja" else str(template)
        return "jinja", own[name] if name in own else forms.template_text(template, own)

    def _render(
        self,
        name: str,
        source: str | None,
        messages: Sequence[Message],
        generate: bool,
        thinking: bool | None,
        tools: Any = None,
        documents: Any = None,
        extra: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Render with a built-in form, or with `source`."""
        if name in chat.TEMPLATES:
            return chat.render(name, messages, generate, thinking)
        switch = {} if thinking is None else dict.fromkeys(forms.SWITCHES, thinking)
        given = {"tools": tools, "documents": documents, **switch, **(extra or {})}
        names = {**self._names, "add_generation_prompt": generate}
        return chat.render_jinja(source or "", messages, self._backend.control, given, **names)

    def _switches(self, source: str | None) -> bool:
        """Return whether a Jinja template has a switch for thinking."""
        return bool(forms.variables(source or "") & forms.SWITCHES)

    def _ids_of(self, name: str, *options: Any) -> list[int] | None:
        """Return the ids of a probe by a built-in form, or by the model's own template; None if it fails."""
        try:
            segments = self._render(name, self.chat_template, *options)
            return self._encode(segments, bos=name in chat.TEMPLATES)
        except TokenizerError:
            return None

    def _renders_as_own(self, name: str, probes: Sequence[Sequence[Message]]) -> bool:
        """Return whether a built-in form gives the ids of the model's own template for every probe."""
        modes = chat.TEMPLATES[name][1] if self._switches(self.chat_template) else (None,)
        cases = itertools.product(probes, (True, False), modes)
        return all(self._ids_of(name, *case) == self._ids_of("jinja", *case) for case in cases)

    def _check_written(
        self, name: str, source: str | None, render: Any, messages: Any, tools: Any, documents: Any
    ) -> None:
        """Raise TokenizerError, or warn, about parts of a conversation that leave the rendered text as it is.

        What a template was once seen to write is not tried again.
        """
        template = name if name in chat.TEMPLATES else source or ""
        for part, without in forms.parts(messages, tools, documents):
            if (template, part) in self._checked:
                continue
            try:
                written = render(messages, True, tools, documents) != render(*without)
            except TokenizerError:  # it needs this part, or the whole is refused below
                written = True
            if not written and part in forms.NEEDED:
                raise TokenizerError(
                    f"the chat template writes no {part}: the model would not see them; choose a template "
                    "that does (template=, --template FILE), or put them into a message"
                )
            if not written:
                self._warn_once(template, f"does not write {part}: the model does not see it")
            self._checked.add((template, part))

    def _warn_once(self, template: str | None, what: str) -> None:
        if (template or "", what) not in self._checked:
            self._checked.add((template or "", what))
            log.warning("the chat template %s", what)

    def render_fim(self, prefix: str, suffix: str) -> list[int]:
        """Encode a fill-in-the-middle prompt: a base model continues with the text between the two."""
        segments = [chat.FIM_BEGIN, prefix, chat.FIM_HOLE, suffix, chat.FIM_END]
        return self._encode(segments, bos=True)

    def opened_think(self, prompt: Sequence[int]) -> bool:
        """Return whether a prompt ends within a thought, so that the reply starts with reasoning."""
        think, control = self._backend.control.get(chat.THINK), set(self._backend.control.values())
        if think is not None:
            return next((i for i in reversed(prompt) if i in control), None) == think
        return self.decode(prompt[-16:], skip_special=False).rstrip().endswith(chat.THINK)

    def _encode_thoughts(self, text: str) -> list[int]:
        """Encode text of the assistant: thinking tags are parsed, the rest is text."""
        tags = self._backend.control.keys() & {chat.THINK, chat.THINK_END}
        return self._encode(list(chat.split_marks(text, tags)), bos=False)

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
        if self._rows is not None and (beyond := [i for i in ids if i >= self._rows]):
            raise TokenizerError(
                f"the text holds {self.decode(beyond[:1], False)!r}, token {beyond[0]}, which has no row in "
                f"the model's embedding of {self._rows}; leave it out"
            )
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


def _read_json(found: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Parse a file. Raises TokenizerError for one of another form: UnusableTokenizer for a vocabulary."""
    error = UnusableTokenizer if folder.holds_vocabulary(name) else TokenizerError
    try:
        value = parse_json(found.get(name, b"{}"), name, error)
    except UnusableTokenizer as fault:
        if isinstance(fault.__context__, RecursionError):  # no damage nests a file, so it is refused
            raise TokenizerError(str(fault)) from None
        raise
    return expect(value, folder.FORMS.get(name, {}), name, error)


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
    made = {
        "tokenizer.model": model.getvalue(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode(),
    }
    tokenizer = Tokenizer(made)
    tokenizer.save(directory)
    return tokenizer
