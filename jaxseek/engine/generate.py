"""`jaxseek.generate`: texts in, texts out, on an engine that is kept between calls."""

from __future__ import annotations

import functools
import json
import logging
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
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
log = logging.getLogger("jaxseek")


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
    *,
    template: str | Path | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[str]:
    """Texts that continue the prompts, one each; without a tokenizer, prompts and results are token ids.

    A prompt is text, token ids, or a chat: a list of messages, rendered by the tokenizer's template, or a
    mapping of messages with tools, documents or chat_template_kwargs of its own. A chat that ends with the
    assistant's words is continued there. `template`, `tools`, `documents` and `chat_template_kwargs` are as
    in `Tokenizer.render_chat`, for every chat.

    Settings that are None are those of the checkpoint's generation_config.json, or else of `Sampling`; a line
    in the log says which. One seed (None: 0) serves every prompt, as if it were alone: other prompts get
    other noise, the same prompt the same; give one per prompt to sample one several times. `batch_size` (16)
    answers grow at a time. Raises ValueError for bad settings, an empty prompt, or one that leaves no room in
    the context.
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
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given["max_new_tokens"] = None if max_new_tokens is None else _whole("max_new_tokens", max_new_tokens)
    stops = () if stop is None else tuple(stop) if isinstance(stop, list | tuple) else (stop,)
    given["stop"] = stops or None
    base, said = settings(model.cfg.generation, given, strings=tokenizer is not None)
    _log_once(said)
    rendering = {"template": template, "tools": tools, "documents": documents}
    rendering |= {"chat_template_kwargs": chat_template_kwargs}
    requests = []
    for prompt, one in zip(prompts, seeds):
        ids = encode(tokenizer, prompt, **rendering)
        requests.append(request(model, tokenizer, ids, replace(base, seed=seed_for(one, ids))))
    found = engine_for(model, min(slots, len(requests))).answers(requests)
    return [a.text if tokenizer else a.tokens for a in found]  # type: ignore[misc]


# Keys of generation_config.json that change no token: ids that others read, caches, what is returned.
_NEUTRAL = re.compile(
    "(bos|pad|decoder_start)_token_id|_from_model_config|transformers_version|use_cache|cache_.*|return_.*"
    "|output_.*|early_stopping|length_penalty|low_memory|disable_compile|compile_config|renormalize_logits"
    "|remove_invalid_values|trust_remote_code"
)


_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens", "repetition_penalty")


def settings(
    generation: Mapping[str, Any], given: Mapping[str, Any], strings: bool = True, **otherwise: Any
) -> tuple[Sampling, str]:
    """Sampling by the settings given; where None, by generation_config.json, then `otherwise`, then Sampling.

    Also returns a line that says which of the file's settings are in use, and which of them jaxseek cannot
    honour; it is empty if there are none. Stop strings of the file need `strings`, a tokenizer. Raises
    ValueError for a setting given that is no number of its range.
    """
    chosen = {name: _number(name, value) for name, value in given.items() if value is not None}
    Sampling(**chosen)  # raises for these, before others come in
    used, lost = dict[str, Any](), dict[str, Any]()
    for name, value in generation.items():
        off = value is not True and value in (None, False, 0, 1, "", [], {})
        if name == "do_sample":
            if value is False and given.get("temperature") is None:
                used["temperature"], used[name] = 0.0, False
        elif name == "eos_token_id":
            if not all(type(end) is int for end in (value if isinstance(value, list) else [value or 0])):
                lost[name] = value
        elif name == "stop_strings" and strings:
            stops = [value] if isinstance(value, str) else value or []
            if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
                lost[name] = value
            elif stops and given.get("stop") is None:
                used["stop"] = tuple(stops)
        elif name in _SETTINGS and not (name == "repetition_penalty" and off):
            try:
                number = None if value is None else _number(name, value)
                Sampling(**{} if number is None else {name: number})
            except ValueError:
                lost[name] = value
                continue
            if number is not None and given.get(name) is None:
                used.setdefault(name, number)
        elif not off and not _NEUTRAL.fullmatch(name):
            lost[name] = value
    sampling = Sampling(**otherwise | {k: v for k, v in used.items() if k != "do_sample"} | chosen)
    said = [f"{_listed(used)} (options come first)"] if used else []
    said += [f"not honoured: {_listed(lost)}"] if lost else []
    return sampling, f"generation_config.json: {'; '.join(said)}" if said else ""


def _number(name: str, value: Any) -> Any:
    """A setting as a number of Python; stop strings as they are. Raises ValueError for what is neither."""
    if name == "stop":
        return value
    array = np.asarray(value) if not isinstance(value, bool | str) else None
    if array is None or array.ndim or not np.issubdtype(array.dtype, np.number):
        raise ValueError(f"{name} is {value!r}, expected a number")
    return array.item()


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value, default=str)[:60]}" for name, value in values.items())


@functools.cache
def _log_once(said: str) -> None:
    if said:
        log.log(logging.WARNING if "not honoured" in said else logging.INFO, "%s", said)


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
    ids = list(prompt)
    entropy = [seed % 2**32, seed >> 32, len(ids), *ids]  # without its length, [5] would be [5, 0]
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
    if isinstance(first, Mapping):
        return [prompts] if "messages" not in first else prompts
    return prompts if isinstance(first, str) or _has_items(first) else [prompts]


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
