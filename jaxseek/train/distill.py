"""Distillation as R1 did it: the student learns the teacher's answers (R1 paper, section 2.4)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any

import jax

from jaxseek.api import load
from jaxseek.config.model import ConfigError
from jaxseek.config.run import RunConfig
from jaxseek.data.dataset import open_prompts
from jaxseek.engine.sampling import Sampling
from jaxseek.engine.text import TextStream, encode, engine_for
from jaxseek.machine.hosts import from_first
from jaxseek.sharding.strategy import Strategy
from jaxseek.storage.place import Log, Place, place, read_log, write_bytes
from jaxseek.tokenizer import chat
from jaxseek.tokenizer.tokenizer import Tokenizer

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
    engine, distill, names = engine_for(teacher), run.distill, run.data.columns
    writes = jax.process_index() == 0
    with (
        Log(path) if writes else contextlib.nullcontext() as out,
        Progress(transient=True, disable=not writes) as progress,
    ):
        task = progress.add_task("sampling the teacher", total=len(prompts), completed=done)
        for begin in range(done, len(prompts), BATCH):
            some = prompts[begin : begin + BATCH]
            requests = [
                Sampling(
                    distill.max_new_tokens,
                    distill.temperature,
                    top_p=distill.top_p,
                    seed=run.seed + begin + i,
                )
                for i in range(len(some))
            ]
            encoded = [encode(own, talk) for talk, _ in some]
            stream = TextStream(engine, own, encoded, requests)
            for _ in stream:
                pass
            progress.update(task, advance=len(some))
            if out is None:
                continue
            for (talk, _), ids, reply in zip(some, encoded, stream.replies()):
                opening = f"{chat.THINK}\n" if own.opened_think(ids) else ""  # stood in the prompt
                talk = [*talk, {"role": "assistant", "content": opening + reply.text}]
                record = {
                    names.messages: [{names.role: m["role"], names.content: m["content"]} for m in talk]
                }
                record |= {"finish_reason": reply.finish_reason}
                out.add(json.dumps(record, ensure_ascii=False))
            progress.update(task, advance=len(some))


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
