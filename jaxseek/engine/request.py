"""A request to the engine, and the answer that grows while it is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from jaxseek.engine.sampling import Sampling
from jaxseek.engine.text import Text

if TYPE_CHECKING:
    from jaxseek.tokenizer.tokenizer import Tokenizer

LOGPROBS, EXPERTS, TOPS, PROMPT = "logprobs", "experts", "top", "prompt"  # what may be recorded


@dataclass(frozen=True)
class Request:
    """A tokenised prompt and how it is answered.

    With a `tokenizer` the answer gets its text, and may end at the strings in `sampling.stop`; the text is
    without special tokens unless `special`. `record` may name LOGPROBS, for those under the temperature and
    the filters; EXPERTS, for the experts that every token was routed to; TOPS, for the likeliest tokens at
    every step; and PROMPT, for log-probabilities of the prompt's own tokens. `watch` are token ids whose
    log-probabilities are recorded at every step.
    """

    prompt: Sequence[int]
    sampling: Sampling
    tokenizer: Tokenizer | None = None
    record: tuple[str, ...] = ()
    watch: tuple[int, ...] = ()
    special: bool = False


@dataclass
class Answer:
    """New tokens (the stop token included) with float32 log-probabilities of each, as in Drawn.

    `tempered` and `drawn` are there where recorded, and so are `watched` and `top`, a row per token, `top` of
    (token, log-probability), likeliest first. `prompt` has, for every token of the prompt but the first, its
    log-probability, and the likeliest token in its place with that one's. `experts`
    [sparse layers, prompt + answer - 1, K] are those of every token but the last, which none follows.
    `finish_reason` is None until the end, then "stop", "length" or "cancelled".
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tempered: list[float] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    watched: list[list[float]] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt: list[tuple[float, int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    text: str = ""
    experts: np.ndarray | None = None


class Handle:
    """A request in the engine. `answer` grows with every step of the engine."""

    def __init__(self, request: Request, budget: int):
        self.request, self.budget, self.answer = request, budget, Answer()
        sampling, tokenizer = request.sampling, request.tokenizer
        self._text = Text(tokenizer, sampling.stop, not request.special) if tokenizer else None
        self.routed: list[np.ndarray] = []  # parts of `answer.experts`, along its tokens

    @property
    def ended(self) -> bool:
        return self.answer.finish_reason is not None

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return 0 if self.ended else self.budget - len(self.answer.tokens)

    def take(self, columns: dict[str, list], experts_LNK: np.ndarray | None) -> int:
        """Add new tokens, with what the answer has beside them, until it ends; returns how many steps made
        them, which are more than it keeps where a stop string ended it earlier."""
        answer, tokens = self.answer, columns["tokens"][: self.left]
        stops = self.request.sampling.stop_ids
        steps = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
        stopped, kept = bool(steps) and tokens[steps - 1] in stops, steps
        if self._text is not None:
            kept, found = self._text.feed(tokens[:steps])
            stopped |= found
        for name, column in columns.items():
            getattr(answer, name).extend(column[:kept])
        if experts_LNK is not None:
            self.routed.append(experts_LNK[:, :kept])
        if stopped:
            self.end("stop")
        elif self.left == 0:
            self.end("length")
        elif self._text is not None:
            answer.text = self._text.text
        return steps

    def end(self, reason: str) -> None:
        """Finish the answer."""
        self.answer.finish_reason = reason
        if self._text is not None:
            self._text.end()
            self.answer.text = self._text.text
        if self.routed:
            self.answer.experts = np.concatenate(self.routed, axis=1)

    def piece(self) -> str:
        """The text that came since the last call; what may begin a stop string waits until that is known."""
        return self._text.piece() if self._text is not None else ""
