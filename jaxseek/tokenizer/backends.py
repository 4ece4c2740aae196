"""The libraries that cut text into tokens: tokenizers for a tokenizer.json, sentencepiece for a .model.

Both take segments: a mark is encoded as its control token, any other text as text, whatever it spells.
"""

from __future__ import annotations

import itertools
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from jaxseek.tokenizer import chat, folder
from jaxseek.tokenizer.chat import Mark

_MOST_GROWTH = 1 << 10  # of a text that is normalised, in characters for one


class HuggingFace:
    """Backend for tokenizer.json, with every control token renamed to an unguessable alias.

    Ids, normalizer, pre-tokenizer and merges stay, so text is encoded as before but cannot spell a control
    token; a mark in the segments is encoded by its alias.
    """

    def __init__(self, spec: dict[str, Any], special: Iterable[str], beside: Mapping[str, dict[str, Any]]):
        """`special` are names of control tokens, `beside` added tokens that other files than `spec` have."""
        _raise_growing(spec)
        model: Any = spec["model"]
        vocab = model["vocab"]
        ids = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        added: dict[str, dict[str, Any]] = {token["content"]: token for token in spec["added_tokens"]}
        for name, token in beside.items():
            added.setdefault(name, token | {"id": ids.get(name, token["id"])})
        for name in special:
            if name in added:
                added[name]["special"] = True
            elif name in ids:
                added[name] = {"id": ids[name], "content": name, "special": True, **folder.FLAGS}
        self.added = {name: token["id"] for name, token in added.items()}
        self.vocabulary = max((i for piece, i in ids.items() if piece not in added), default=-1) + 1
        self._literals = {token["id"]: name for name, token in added.items()}
        self.control = {n: t["id"] for n, t in added.items() if t["special"] or folder.MARKUP.fullmatch(n)}
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
        apart = added.keys() - ids.keys()
        own: dict[str, int] = {self._alias.get(name, name): added[name]["id"] for name in apart}
        if isinstance(vocab, dict) and any(self._tokenizer.token_to_id(name) != i for name, i in own.items()):
            model["vocab"] |= own  # tokenizers numbers what is not there, one after the other
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


class SentencePiece:
    """Backend for a sentencepiece model; each run of text between marks is encoded on its own.

    Sentencepiece never matches control symbols in text; user-defined symbols that are markup become control
    symbols, so that they are not matched either. Sentencepiece decodes U+2581 in a text as a space. A model
    that puts a space before a text puts it before every run, or, where it is not `legacy`, before a run that
    opens the text alone, as transformers' LlamaTokenizer.
    """

    def __init__(self, blob: bytes, added: Mapping[str, Mapping[str, Any]], legacy: bool = True):
        proto = sentencepiece_model_pb2.ModelProto.FromString(blob)  # pyright: ignore
        if not proto.pieces:
            raise ValueError("it holds no pieces")
        kinds = proto.SentencePiece
        self.control: dict[str, int] = {}
        for i, piece in enumerate(proto.pieces):
            if piece.type == kinds.USER_DEFINED and folder.MARKUP.fullmatch(piece.piece):
                piece.type = kinds.CONTROL
            if piece.type in (kinds.CONTROL, kinds.UNKNOWN):
                self.control[piece.piece] = i
        self.added = {name: token["id"] for name, token in added.items()}
        is_control = {n for n, token in added.items() if token["special"] or folder.MARKUP.fullmatch(n)}
        self._words = {name: i for name, i in self.added.items() if name not in is_control}
        self._strips = {name: (token["lstrip"], token["rstrip"]) for name, token in added.items()}
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        proto.normalizer_spec.add_dummy_prefix &= legacy
        self._later = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.control |= {name: self.added[name] for name in is_control}
        special_ids = {
            "unk_token": self._sp.unk_id(),
            "bos_token": self._sp.bos_id(),
            "eos_token": self._sp.eos_id(),
            "pad_token": self._sp.pad_id(),
        }
        self.named = {key: proto.pieces[i].piece for key, i in special_ids.items() if i >= 0}
        special = {token["id"] for token in added.values() if token["special"]}
        self.special = frozenset(special | {i for i in special_ids.values() if i >= 0})
        self.vocabulary = len(proto.pieces)
        self.size = max(self.vocabulary - 1, *self.control.values(), *self.added.values()) + 1
        self._marks = {i: name for name, i in (self.control | self._words).items()}

    def adds_bos(self, bos: str | None) -> bool:
        return bos is not None

    def encode(self, segments: Sequence[str]) -> list[int]:
        runs: list[str] = []
        for is_mark, group in itertools.groupby(segments, key=lambda s: isinstance(s, Mark)):
            run = list(group)
            runs += run if is_mark else chat.split_marks("".join(run), self._words)
        ids, known = [], self.control | self._words
        for before, run, after in zip([None, *runs], runs, [*runs[1:], None]):
            if isinstance(run, Mark):
                ids.append(known[run])
                continue
            if before is not None and self._strips.get(before, (False, False))[1]:
                run = run.lstrip()
            if after is not None and self._strips.get(after, (False, False))[0]:
                run = run.rstrip()
            ids += (self._sp if before is None else self._later).encode(run)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text, sp = "", self._sp
        for is_mark, group in itertools.groupby(ids, key=self._marks.__contains__):
            run = [i for i in group if is_mark or i < len(self._sp)]
            text += "".join(self._marks[i] for i in run) if is_mark else sp.decode(run)
            sp = self._later
        return text

    def token_id(self, token: str) -> int | None:
        if token in self.control:
            return self.control[token]
        i = self._sp.piece_to_id(token)
        return None if i == self._sp.unk_id() else i
