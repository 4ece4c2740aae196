"""`jaxseek.generate`: texts in, texts out, on an engine that is kept between calls."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from jaxseek.engine.engine import Engine
from jaxseek.engine.request import Handle, Request
from jaxseek.engine.sampling import Sampling
from jaxseek.engine.text import Prompt, encode
from jaxseek.model.deepseek import DeepSeek
from jaxseek.storage.untrusted import brief

if TYPE_CHECKING:
    from jaxseek.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")


def generate(
    model: DeepSeek,
    tokenizer: Tokenizer | None,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    stop: str | Sequence[str] | None = None,
    batch_size: int | None = None,
) -> list[str]:
    """Texts that continue the prompts, one each; without a tokenizer, prompts and results are token ids.

    A prompt is text, token ids, or a chat (a list of messages, rendered by the tokenizer's template).
    Sampling settings that are None are those of the checkpoint's generation_config.json, or else of
    `Sampling`. One seed (None: 0) serves every prompt, as if it were alone: other prompts get other noise,
    the same prompt the same; give one per prompt to sample one several times. `batch_size` (16) answers of up
    to `max_new_tokens` (256) grow at a time. Raises ValueError for bad settings, an empty prompt, or one that
    leaves no room in the context.
    """
    prompts = _as_list(prompts)
    seed = 0 if seed is None else seed
    several = isinstance(seed, Sequence | np.ndarray | jax.Array) and np.ndim(seed) > 0
    each: Iterable[Any] = seed if several else [seed] * len(prompts)  # type: ignore[assignment]
    seeds = [_whole("seed", s) for s in each]
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds were given for {len(prompts)} prompts")
    slots = _whole("batch_size", 16 if batch_size is None else batch_size)
    if slots < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
    longest = _whole("max_new_tokens", 256 if max_new_tokens is None else max_new_tokens)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    stops = () if stop is None else tuple(stop) if isinstance(stop, list | tuple) else (stop,)
    base = replace(settings(tokenizer, given), max_new_tokens=longest, stop=stops)
    requests = []
    for prompt, one in zip(prompts, seeds):
        ids = encode(tokenizer, prompt)
        requests.append(request(model, tokenizer, ids, replace(base, seed=seed_for(one, ids))))
    found = engine_for(model, min(slots, len(requests))).answers(requests)
    return [a.text if tokenizer else a.tokens for a in found]  # type: ignore[misc]


def settings(tokenizer: Tokenizer | None, given: Mapping[str, Any]) -> Sampling:
    """Sampling by the settings given; where None, by those of the checkpoint's generation_config.json.

    Raises ValueError for a setting that is no number of its range.
    """
    file = tokenizer.generation if tokenizer else {}
    chosen: dict[str, Any] = {
        name: value for name in given if isinstance(value := file.get(name), int | float)
    }
    for name, value in given.items():
        if value is not None:
            if (
                isinstance(value, bool)
                or np.ndim(value)
                or not np.issubdtype(np.asarray(value).dtype, np.number)
            ):
                raise ValueError(f"{name} is {value!r}, expected a number")
            chosen[name] = np.asarray(value).item()
    if file.get("do_sample") is False and given.get("temperature") is None:
        chosen["temperature"] = 0.0
    return Sampling(**chosen)


def request(
    model: DeepSeek, tokenizer: Tokenizer | None, prompt: Sequence[int], sampling: Sampling
) -> Request:
    """A request that also ends where the model or its tokenizer ends a sequence."""
    eos = (*model.cfg.eos_ids, *(tokenizer.eos_ids if tokenizer else ()))
    stops = tuple(dict.fromkeys((*sampling.stop_ids, *eos)))
    return Request(prompt, replace(sampling, stop_ids=stops), tokenizer)


def seed_for(seed: int, prompt: Iterable[int]) -> int:
    """A seed for this prompt: by the same one, different prompts would be answered with the same noise."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, expected within 0..2^63-1")
    entropy = [seed % 2**32, seed >> 32, *prompt]
    high, low = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
    return (int(high) << 31) ^ int(low)


def stream(engine: Engine, handle: Handle) -> Iterator[str]:
    """Pieces of an answer's text as they come; a reader that leaves ends the answer."""
    try:
        while not handle.ended:
            engine.step()
            yield handle.piece()
    finally:
        engine.cancel(handle)


def in_order(numbered: Iterable[tuple[int, T]]) -> Iterator[T]:
    """Results by their index, 0 first, each as soon as all before it are there."""
    early, wanted = dict[int, T](), 0
    for index, result in numbered:
        early[index] = result
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1


def _as_list(prompts: Any) -> list[Prompt]:
    """A single text, array or list of ids, or chat is a batch of one."""
    if isinstance(prompts, str | bytes | Mapping):
        return [prompts]  # type: ignore[list-item]
    if not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0:
        raise ValueError(f"prompts is {brief(prompts)}, expected texts, token ids or lists of messages")
    prompts = list(np.asarray(prompts)) if hasattr(prompts, "ndim") else list(prompts)
    first = prompts[0] if prompts else ""
    single = isinstance(first, Mapping) or not (isinstance(first, str) or _has_items(first))
    return [prompts] if single else prompts


def _has_items(value: Any) -> bool:
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {brief(value)}, expected a whole number") from None


_last: Engine | None = None


def engine_for(model: DeepSeek, slots: int = 16) -> Engine:
    """An engine for the model with slots for at least so many; the last one is kept for as long as the same
    weights are asked for. Raises ValueError where it is to change and has requests."""
    global _last
    slots = 1 << (max(slots, 1) - 1).bit_length()  # few programs serve any number
    leaves = jax.tree.leaves(model)
    if _last is None or list(map(id, _last.decoder.arrays)) != list(map(id, leaves)):
        _last = None  # free its copy of the weights before the next is made
        _last = Engine(model, slots)
    _last.resize(slots)
    return _last
