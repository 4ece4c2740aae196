"""Distillation as R1 did it: the student learns the teacher's answers (R1 paper, section 2.4)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from typing import Any

import jax

from jaxseek.api import load
from jaxseek.config.model import ConfigError
from jaxseek.config.run import RunConfig
from jaxseek.data.dataset import open_prompts
from jaxseek.engine.generate import engine_for, in_order, request
from jaxseek.engine.sampling import Sampling
from jaxseek.engine.text import encode
from jaxseek.machine.hosts import from_first
from jaxseek.sharding.strategy import Strategy
from jaxseek.storage.place import Log, Place, place, read_log, write_bytes
from jaxseek.tokenizer import chat
from jaxseek.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("jaxseek")

FILE = "samples.jsonl"
BATCH = 16


def sampled_run(run: RunConfig, strategy: Strategy, tokenizer: Tokenizer) -> RunConfig:
    """An SFT run on the teacher's answers, which are written to samples.jsonl first; what is there is kept.

    Answers that were cut off by `max_new_tokens` are left out, as they teach not to end.
    """
    path = place(run.out) / FILE
    prompts = [(talk, i) for talk in open_prompts(run) or () for i in range(run.distill.per_prompt)]
    done = from_first(lambda: len(read_log(path)))  # what a killed run left of a further one is cut off
    if done < len(prompts):
        _sample(run, strategy, tokenizer, prompts, done, path)
    data = dataclasses.replace(run.data, train=[str(from_first(lambda: _finished(path)))])
    return run.replace(objective="sft", data=data)


def _sample(run: RunConfig, strategy: Strategy, tokenizer: Tokenizer, prompts: Any, done: int, path: Place):
    from rich.progress import Progress

    teacher, own = load(run.distill.teacher, strategy)
    own = own or tokenizer
    distill, names, left = run.distill, run.data.columns, prompts[done:]
    base = Sampling(distill.max_new_tokens, distill.temperature, top_p=distill.top_p)
    opened: dict[int, bool] = {}  # whether a prompt ends within a thought

    def requests():
        for i, (talk, _) in enumerate(left):
            try:
                ids = encode(own, talk)
                opened[i] = own.opened_think(ids)
                yield request(teacher, own, ids, dataclasses.replace(base, seed=run.seed + done + i))
            except ValueError as error:
                yield error

    answers = in_order(engine_for(teacher, BATCH).run(requests()))
    writes = jax.process_index() == 0
    with (
        Log(path) if writes else contextlib.nullcontext() as out,
        Progress(transient=True, disable=not writes) as progress,
    ):
        task = progress.add_task("sampling the teacher", total=len(prompts), completed=done)
        for i, answer in enumerate(answers):
            progress.update(task, advance=1)
            if out is None:
                continue
            talk = left[i][0]
            if isinstance(answer, ValueError):
                log.warning("prompt %d is left out: %s", done + i, answer)
                reason = "refused"
            else:
                opening = f"{chat.THINK}\n" if opened[i] else ""  # stood in the prompt
                talk = [*talk, {"role": "assistant", "content": opening + answer.text}]
                reason = answer.finish_reason
            messages = [{names.role: m["role"], names.content: m["content"]} for m in talk]
            out.add(json.dumps({names.messages: messages, "finish_reason": reason}, ensure_ascii=False))


def _finished(path: Place) -> Place:
    """The file of those answers that came to an end."""
    kept = path.with_name("samples.finished.jsonl")
    lines = [
        l for l in path.read_bytes().splitlines(keepends=True) if json.loads(l)["finish_reason"] == "stop"
    ]
    if not lines:
        raise ConfigError(f"{path}: the teacher finished none of its answers; raise distill.max_new_tokens")
    write_bytes(kept, b"".join(lines))
    return kept
