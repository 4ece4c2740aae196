"""Generation from text to text: prompts and chats in, replies out, whole or as they come."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax

from jaxseek.engine.engine import Completion, Engine
from jaxseek.engine.sampling import Sampling
from jaxseek.model.deepseek import DeepSeek

if TYPE_CHECKING:
    from jaxseek.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("jaxseek")

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or a chat: messages of {"role", "content"}."""


@dataclass(frozen=True)
class Reply:
    """Of one prompt: its text (end of sequence and stop string cut off), tokens and log-probabilities."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str


def generate(
    model: DeepSeek,
    tokenizer: Tokenizer | None,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int = 256,
    temperature: float = 0.6,
    top_p: float = 0.95,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    batch_size: int = 16,
) -> list[str]:
    """Texts that continue the prompts, one each; without a tokenizer, prompts and results are token ids.

    A prompt is text, a list of ids, or a chat (a list of messages, rendered by the tokenizer's template). One
    seed serves every prompt, as if it were alone; give one per prompt to sample the same prompt differently.
    Raises ValueError for bad settings, an empty prompt, or one that leaves no room in the context.
    """
    prompts = _as_list(prompts)
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds were given for {len(prompts)} prompts")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    base = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, 0, stop)
    requests = [replace(base, seed=s) for s in seeds]
    engine = engine_for(model)
    replies: list[Any] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        stream = TextStream(engine, tokenizer, [encode(tokenizer, p) for p in prompts[part]], requests[part])
        for _ in stream:
            pass
        replies += [r.text if tokenizer else r.tokens for r in stream.replies()]
    return replies


def encode(tokenizer: Tokenizer | None, prompt: Prompt, thinking: bool | None = None) -> list[int]:
    """Token ids of a prompt: text gets its BOS, a chat its template, ids stay as they are."""
    if not isinstance(prompt, str) and all(not isinstance(m, Mapping) for m in prompt):
        return [int(i) for i in prompt]  # type: ignore[arg-type]
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; give prompts as lists of token ids")
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return tokenizer.render_chat(prompt, thinking=thinking)  # type: ignore[arg-type]


def _as_list(prompts: Any) -> list[Prompt]:
    """A single text, list of ids or chat is a batch of one."""
    if isinstance(prompts, str):
        return [prompts]
    prompts = list(prompts)
    single = prompts and (isinstance(prompts[0], Mapping) or not hasattr(prompts[0], "__len__"))
    return [prompts] if single else prompts


_last: Engine | None = None


def engine_for(model: DeepSeek) -> Engine:
    """An engine for the model; the last one is kept for as long as the same weights are asked for."""
    global _last
    leaves = jax.tree.leaves(model)
    if _last is None or list(map(id, _last.weights)) != list(map(id, leaves)):
        _last = None  # free its copy of the weights before the next is made
        _last = Engine(model)
    return _last


class TextStream:
    """Iterates over new pieces of text, one list per dispatch with a piece for every row.

    Text that may be the beginning of a stop string is held back; what follows a stop string is never shown.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        prompts: list[list[int]],
        requests: list[Sampling],
        tokens_per_dispatch: int = 32,
    ):
        from jaxseek.tokenizer.tokenizer import StreamDecoder

        eos = (*engine.model.cfg.eos_ids, *(tokenizer.eos_ids if tokenizer else ()))
        self.requests = [replace(r, stop_ids=tuple(dict.fromkeys((*r.stop_ids, *eos)))) for r in requests]
        if tokenizer is None and any(r.stop for r in requests):
            raise ValueError("stop strings need a tokenizer; use stop_ids")
        self.completions: list[Completion] = [Completion() for _ in prompts]
        self.texts = [""] * len(prompts)
        self._shown, self._fed = [0] * len(prompts), [0] * len(prompts)
        self._decoders = [StreamDecoder(tokenizer) for _ in prompts] if tokenizer else None
        self._stream = engine.stream(prompts, self.requests, tokens_per_dispatch)

    def __iter__(self) -> Iterator[list[str]]:
        for completions in self._stream:
            self.completions = completions
            yield [self._advance(i, c) for i, c in enumerate(completions)]

    def _advance(self, i: int, completion: Completion) -> str:
        if self._decoders is None:
            return ""
        stops, fresh = self.requests[i].stop, completion.tokens[self._fed[i] :]
        for token in fresh:
            self._fed[i] += 1
            self.texts[i] += self._decoders[i].feed(token)
            if stops and self._cut(i, stops, completion):
                break
        if completion.finish_reason is not None and self._fed[i] == len(completion.tokens):
            self.texts[i] += self._decoders[i].flush()
            self._cut(i, stops, completion)
            held = 0
        else:
            held = max((_overlap(self.texts[i], s) for s in stops), default=0)
        end = max(len(self.texts[i]) - held, self._shown[i])
        piece, self._shown[i] = self.texts[i][self._shown[i] : end], end
        return piece

    def _cut(self, i: int, stops: tuple[str, ...], completion: Completion) -> bool:
        """End the row at the first stop string in its text, tokens beyond it included."""
        found = [at for s in stops if (at := self.texts[i].find(s)) >= 0]
        if found:
            self.texts[i] = self.texts[i][: min(found)]
            del completion.tokens[self._fed[i] :], completion.logprobs[self._fed[i] :]
            completion.finish_reason = "stop"
        return bool(found)

    def replies(self) -> list[Reply]:
        """The finished replies."""
        return [
            Reply(text, c.tokens, c.logprobs, c.finish_reason or "length")
            for text, c in zip(self.texts, self.completions)
        ]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
