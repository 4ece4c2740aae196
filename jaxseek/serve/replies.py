"""From updates of an answer to the JSON of the interface, whole or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxseek.serve.engine_thread import Update
from jaxseek.serve.tools import Call, ToolCalls
from jaxseek.tokenizer.chat import ReasoningSplitter
from jaxseek.tokenizer.tokenizer import Tokenizer


@dataclass
class Choice:
    """One answer to a prompt, as far as it has come. `index` is its place among the choices."""

    index: int
    tokenizer: Tokenizer
    tokens: int = 0
    finish_reason: str | None = None
    text: str = ""
    logprobs: list[tuple[int, float]] | None = None  # where asked for

    def take(self, update: Update) -> dict[str, Any] | None:
        """Add an update; returns what a stream shows of it, None for nothing."""
        self.tokens += len(update.tokens)
        new = list(zip(update.tokens, update.logprobs))
        if self.logprobs is not None:
            self.logprobs += new
        self.finish_reason = update.finish_reason
        return self._add(update, new)

    def _add(self, update: Update, new: list[tuple[int, float]]) -> dict[str, Any] | None:
        raise NotImplementedError

    def whole(self) -> dict[str, Any]:
        """The choice of a reply in one piece."""
        raise NotImplementedError

    def _token(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special=False)


@dataclass
class Completion(Choice):
    """A choice of /v1/completions."""

    def _add(self, update: Update, new: list[tuple[int, float]]) -> dict[str, Any] | None:
        offset, self.text = len(self.text), self.text + update.text
        if not update.text and not update.last and not (new and self.logprobs is not None):
            return None
        return self._json(update.text, new, offset)

    def whole(self) -> dict[str, Any]:
        """The choice of a reply in one piece."""
        return self._json(self.text, self.logprobs or [], 0)

    def _json(self, text: str, new: list[tuple[int, float]], offset: int) -> dict[str, Any]:
        found = None
        if self.logprobs is not None:
            tokens = [self._token(t) for t, _ in new]
            offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
            found = {
                "tokens": tokens,
                "token_logprobs": [p for _, p in new],
                "top_logprobs": [{t: p} for t, (_, p) in zip(tokens, new)],
                "text_offset": offsets,
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
        self._ends = [self.tokenizer.decode([t], skip_special=False) for t in self.tokenizer.eos_ids]

    def _add(self, update: Update, new: list[tuple[int, float]]) -> dict[str, Any] | None:
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
        if not delta and not update.last:
            return None
        return {
            "index": self.index,
            "delta": delta,
            "logprobs": self._logprobs(new),
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
            "logprobs": self._logprobs(self.logprobs or []),
            "finish_reason": self.finish_reason,
        }

    def _logprobs(self, new: list[tuple[int, float]]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        content = []
        for token, logprob in new:
            text = self._token(token)
            one = {"token": text, "logprob": logprob, "bytes": list(text.encode())}
            content.append(one | {"top_logprobs": []})
        return {"content": content, "refusal": None}
