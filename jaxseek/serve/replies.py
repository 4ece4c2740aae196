"""From updates of an answer to the JSON of the interface, whole or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from jaxseek.serve.engine_thread import Update
from jaxseek.serve.tools import Call, ToolCalls
from jaxseek.tokenizer.chat import ReasoningSplitter
from jaxseek.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability, and the likeliest in its place with theirs."""

    token: int
    logprob: float | None  # None: the first of a prompt has none
    top: list[tuple[int, float]]


@dataclass
class Choice:
    """One answer to a prompt, as far as it has come. `index` is its place among the choices; `top` is the
    number of likeliest tokens that are told, None to tell no log-probabilities."""

    index: int
    tokenizer: Tokenizer
    top: int | None = None
    tokens: int = 0
    finish_reason: str | None = None
    text: str = ""
    scored: list[Scored] = field(default_factory=list)

    def take(self, update: Update) -> dict[str, Any] | None:
        """Add an update; returns what a stream shows of it, None for nothing."""
        self.tokens += len(update.tokens)
        tops = update.top or [[]] * len(update.tokens)
        new = [Scored(t, p, top[: self.top]) for t, p, top in zip(update.tokens, update.logprobs, tops)]
        self.scored += new if self.top is not None else []
        self.finish_reason = update.finish_reason
        return self._add(update, new)

    def _add(self, update: Update, new: list[Scored]) -> dict[str, Any] | None:
        raise NotImplementedError

    def whole(self) -> dict[str, Any]:
        """The choice of a reply in one piece."""
        raise NotImplementedError

    def _token(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special=False)


@dataclass
class Completion(Choice):
    """A choice of /v1/completions; `echoed` is the prompt, where it is to stand before the answer."""

    echoed: list[int] | None = None

    def _add(self, update: Update, new: list[Scored]) -> dict[str, Any] | None:
        if self.echoed is not None and update.tokens and self.tokens == len(update.tokens):
            read = zip(self.echoed[1:], update.prompt)
            before = [Scored(t, p, [(best, most)]) for t, (p, best, most) in read]
            before = [Scored(self.echoed[0], None, []), *before] if before else []
            self.scored, new = before + self.scored, before + new
        offset, self.text = len(self.text), self.text + update.text
        if not update.text and not update.last and not (new and self.top is not None):
            return None
        return self._json(update.text, new, offset)

    def whole(self) -> dict[str, Any]:
        """The choice of a reply in one piece."""
        return self._json(self.text, self.scored, 0)

    def _json(self, text: str, scored: list[Scored], offset: int) -> dict[str, Any]:
        found = None
        if self.top is not None:
            tokens = [self._token(s.token) for s in scored]
            found = {
                "tokens": tokens,
                "token_logprobs": [s.logprob for s in scored],
                "top_logprobs": [
                    None if s.logprob is None else {self._token(t): p for t, p in s.top} or {text: s.logprob}
                    for text, s in zip(tokens, scored)
                ],
                "text_offset": [offset + n for n in accumulate(map(len, tokens), initial=0)][: len(tokens)],
            }
        return {"index": self.index, "text": text, "logprobs": found, "finish_reason": self.finish_reason}


@dataclass
class Chat(Choice):
    """A choice of /v1/chat/completions: reasoning apart from content, calls of tools apart from both."""

    opened: bool = False  # the prompt ends with <think>
    with_tools: bool = False
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._split, self._tools = ReasoningSplitter(self.opened), ToolCalls()
        self._unshown: list[Scored] = []  # of tokens whose text is not certain yet
        self._ends = [self.tokenizer.decode([t], skip_special=False) for t in self.tokenizer.eos_ids]

    def _add(self, update: Update, new: list[Scored]) -> dict[str, Any] | None:
        delta: dict[str, Any] = {}
        for kind, piece in self._parts(update):
            if isinstance(piece, Call):
                delta.setdefault("tool_calls", []).append({"index": len(self.calls)} | piece.to_json())
                self.calls.append(piece)
            elif kind == "reasoning":
                self.reasoning += piece
                delta["reasoning_content"] = delta.get("reasoning_content", "") + piece
            else:
                self.text += piece
                delta["content"] = delta.get("content", "") + piece
        if self.calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        self._unshown += new
        if not delta and not update.last:
            return None
        shown, self._unshown = self._unshown, []
        return {
            "index": self.index,
            "delta": delta,
            "logprobs": self._logprobs(shown),
            "finish_reason": self.finish_reason,
        }

    def _parts(self, update: Update) -> Iterator[tuple[str, str | Call]]:
        text = update.text
        if self.with_tools:  # the text comes with control tokens, of which only those of tools are looked for
            for end in self._ends:
                text = text.partition(end)[0]
        parts = self._split.feed(text) + (self._split.flush() if update.last else [])
        for kind, piece in parts:
            if kind == "answer" and self.with_tools:
                yield from ((kind, p) for p in self._tools.feed(piece))
            else:
                yield kind, piece
        if update.last and self.with_tools:
            yield from (("answer", p) for p in self._tools.flush())

    def whole(self) -> dict[str, Any]:
        """The choice of a reply in one piece."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [call.to_json() for call in self.calls]
            message["content"] = self.text or None
        return {
            "index": self.index,
            "message": message,
            "logprobs": self._logprobs(self.scored),
            "finish_reason": self.finish_reason,
        }

    def _logprobs(self, scored: list[Scored]) -> dict[str, Any] | None:
        if self.top is None:
            return None

        def one(token: int, logprob: float | None) -> dict[str, Any]:
            text = self._token(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [one(s.token, s.logprob) | {"top_logprobs": [one(*t) for t in s.top]} for s in scored]
        return {"content": content, "refusal": None}
