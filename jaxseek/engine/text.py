"""Between text and tokens: prompts and chats in, an answer's text out as its tokens come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxseek.storage.untrusted import brief

if TYPE_CHECKING:
    from jaxseek.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""Text, token ids, or a chat: messages of {"role", "content"}, alone or as {"messages"} with `CHAT` keys."""
CHAT = ("tools", "documents", "chat_template_kwargs")


def encode(
    tokenizer: Tokenizer | None, prompt: Prompt, thinking: bool | None = None, **rendering: Any
) -> list[int]:
    """Token ids of a prompt: text gets its BOS, a chat its template, ids stay as they are.

    A chat that ends with the assistant is continued there, unless that message calls tools or has a `prefix`
    of False. `rendering` holds arguments of `render_chat`, which a chat's own keys come before. Raises
    ValueError for anything else, for text or a chat without a tokenizer, and for `rendering` without a chat.
    """
    rendering = {key: value for key, value in rendering.items() if value is not None}
    if isinstance(prompt, Mapping):
        if "messages" not in prompt or prompt.keys() - {"messages", *CHAT}:
            raise ValueError(
                f"a prompt is a mapping with {', '.join(map(str, prompt))}; expected text, token ids (its "
                f"input_ids, say), a list of messages, or a mapping with messages and {', '.join(CHAT)}"
            )
        rendering |= {key: prompt[key] for key in CHAT if prompt.get(key) is not None}
        prompt = prompt["messages"]
        if not isinstance(prompt, list | tuple) or not prompt:
            raise ValueError(f"messages is {brief(prompt)}, expected a list of messages")
    if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
        raise ValueError(f"a prompt is {brief(prompt)}, expected text, token ids or a list of messages")
    if isinstance(prompt, str) or any(isinstance(m, Mapping) for m in prompt):
        if tokenizer is None:
            raise ValueError("the model has no tokenizer; give prompts as lists of token ids")
        if not isinstance(prompt, str):
            return tokenizer.render_chat(
                prompt,  # type: ignore[arg-type]
                thinking=thinking, continue_final_message=_continues(prompt[-1]), **rendering,
            )  # fmt: skip
    if rendering:
        raise ValueError(f"{', '.join(rendering)} belong to a chat; give the prompt as a list of messages")
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)  # type: ignore[union-attr]
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists of several lengths
        ids = np.asarray([brief(prompt)])
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(
            f"a prompt of token ids is {ids.dtype}{list(ids.shape)}, expected whole numbers in a row"
        )
    return ids.tolist()


def _continues(last: Any) -> bool:
    """Return whether the last message is the beginning of the reply: the assistant's, calling no tools."""
    return (
        isinstance(last, Mapping)
        and last.get("role") == "assistant"
        and not last.get("tool_calls")
        and bool(last.get("prefix", True))
    )


class Text:
    """The text of an answer, which ends before the first stop string in it."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...], skip_special: bool = True):
        from jaxseek.tokenizer.tokenizer import StreamDecoder

        self.text, self._stops = "", stops
        self._decoder, self._shown, self._ended = StreamDecoder(tokenizer, skip_special), 0, False

    def feed(self, tokens: Sequence[int]) -> tuple[int, bool]:
        """Add tokens; returns how many belong to the answer, and whether a stop string ended it."""
        if not self._stops:
            self.text += self._decoder.feed(tokens) if len(tokens) else ""
            return len(tokens), False
        for i, token in enumerate(tokens):
            self.text += self._decoder.feed(token)
            if self._cut():
                return i + 1, True
        return len(tokens), False

    def end(self) -> None:
        """Finish: no more tokens will come, so withheld characters belong to the text."""
        if not self._ended:
            self.text += self._decoder.flush()
            self._cut()
            self._ended = True

    def piece(self) -> str:
        """Text since the last call, but for an end that may be the beginning of a stop string."""
        withheld = 0 if self._ended else max((_overlap(self.text, s) for s in self._stops), default=0)
        start, self._shown = self._shown, max(len(self.text) - withheld, self._shown)
        return self.text[start : self._shown]

    def _cut(self) -> bool:
        found = [at for s in self._stops if (at := self.text.find(s)) >= 0]
        if found:
            self.text, self._ended = self.text[: min(found)], True
        return bool(found)


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of the text with which the stop string begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
