"""Rejection sampling: keep a model's good answers as examples for SFT (R1 paper, 2.3.3)."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import jax
import numpy as np

from jaxseek.checkpoint.directory import LOCK, alone
from jaxseek.config.model import ConfigError, ModelConfig
from jaxseek.config.run import RunConfig
from jaxseek.data.sources import open_sources
from jaxseek.data.split import shuffled
from jaxseek.machine.hosts import from_first
from jaxseek.rl.evaluate import Marking
from jaxseek.rl.problem import Problem
from jaxseek.rl.rollout import Episode, Sampler, seed_of
from jaxseek.rl.tasks import open_task
from jaxseek.sharding.strategy import Strategy
from jaxseek.storage.place import Log, Place, cut, place, writable, write_text
from jaxseek.storage.untrusted import expect, parse_json
from jaxseek.train import start
from jaxseek.train.metrics import Progress
from jaxseek.train.trainer import Result, signals

FILE = "samples.jsonl"


def reject(run: RunConfig) -> Result:
    """Write OUT/samples.jsonl as [reject] describes, resuming an earlier call that was stopped.

    Raises ConfigError if no answer is good enough.
    """
    cfg = start.model_config(run)
    strategy = start.open_strategy(run, cfg)
    with alone(writable(run.out) / LOCK):
        start.claim(run)
        return _reject(run, cfg, strategy)


def _reject(run: RunConfig, cfg: ModelConfig, strategy: Strategy) -> Result:
    path = place(run.out) / FILE
    if from_first(path.is_file):
        return _result(run, path, False)
    tokenizer = start.open_tokenizer(run, cfg)
    task, dtype = open_task(run), start.compute_dtype(run)
    sampler = Sampler(run, tokenizer, run.rollout.dtype or dtype)
    partial = path.with_suffix(".partial.jsonl")
    kept, done = from_first(lambda: _whole_rounds(partial))
    rounds = -(-run.reject.problems // run.rollout.prompts)
    with (
        contextlib.ExitStack() as stack,
        Marking(run, strategy) as marking,
        signals() as asked_to_stop,
        Progress(rounds, done) as progress,
    ):
        log = stack.enter_context(Log(partial)) if jax.process_index() == 0 else None
        if done < rounds:
            sampler.load(start.open_model(run, cfg, strategy))
        for turn in range(done, rounds):
            first = turn * run.rollout.prompts
            numbers = range(first, min(first + run.rollout.prompts, run.reject.problems))
            problems = [task.problem(number) for number in numbers]
            prompts = [sampler.encode(problem) for problem in problems]
            fitting = [i for i, p in enumerate(prompts) if len(p) <= run.rollout.max_prompt_tokens]
            groups: list[list[Episode]] = []
            if fitting:
                seeds = [
                    [seed_of(run.seed, turn, numbers[i], g) for g in range(run.grpo.group_size)]
                    for i in fitting
                ]
                groups, _ = sampler.sample(
                    [problems[i] for i in fitting],
                    [prompts[i] for i in fitting],
                    seeds,
                    run.rollout.temperature,
                )
            found = _good(run, groups, marking)
            kept += found
            if log is not None:
                lines = [json.dumps(record, ensure_ascii=False) for record in found]
                log.add(*lines, json.dumps({"round": turn}))
            progress.update(turn, {"answers kept": len(kept)})
            if asked_to_stop() and turn + 1 < rounds:
                return _result(run, partial, True)
    if not kept:
        wanted = " and ".join(f"{name} >= {least:g}" for name, least in run.reject.keep.items())
        raise ConfigError(
            f"{run.out}: no answer to {run.reject.problems} problems ended by itself "
            f"with {wanted or 'a reward'}; lower reject.keep, or raise rollout.max_new_tokens"
        )
    from_first(lambda: _finish(run, kept, path))
    return _result(run, path, False)


def _good(run: RunConfig, groups: list[list[Episode]], marking: Marking) -> list[dict[str, Any]]:
    """Return the records of the answers to keep."""
    if not groups:
        return []
    _, parts = marking([e.answer for group in groups for e in group])
    shape = (len(groups), -1)
    good_PG = np.ones((len(groups), len(groups[0])), bool)
    for name, least in run.reject.keep.items():
        good_PG &= np.nan_to_num(parts[name], nan=-np.inf).reshape(shape) >= least
    out = []
    for group, good_G in zip(groups, good_PG):
        fine = [e for e, good in zip(group, good_G) if good and e.answer.finish_reason == "stop"]
        texts = dict.fromkeys(e.answer.text for e in fine)  # deduplicated
        out += [_record(run, group[0].answer.problem, text) for text in list(texts)[: run.reject.per_problem]]
    return out


def _record(run: RunConfig, problem: Problem, text: str) -> dict[str, Any]:
    names = run.data.columns
    if isinstance(problem.prompt, str):
        return {names.prompt: problem.prompt, names.response: text}
    talk = [*problem.prompt, {"role": "assistant", "content": text}]
    return {names.messages: [{names.role: m["role"], names.content: m["content"]} for m in talk]}


def _finish(run: RunConfig, kept: list[dict[str, Any]], path: Place) -> None:
    """Write kept answers, and the examples mixed in, atomically and in a fixed shuffled order."""
    records = list(kept)
    if run.reject.mix_count:
        others = open_sources(run.reject.mix, "reject.mix")
        records += [others[int(i) % len(others)] for i in range(run.reject.mix_count)]
    ordered = [records[int(i)] for i in shuffled(len(records))]
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ordered))


def _whole_rounds(partial: Place) -> tuple[list[dict[str, Any]], int]:
    """Return the answers kept in complete rounds, and the number of those; truncate the file after them."""
    kept: list[dict[str, Any]] = []
    if not partial.is_file():
        return kept, 0
    pending, whole, at, done = [], 0, 0, 0
    for line in partial.read_bytes().splitlines(keepends=True):
        at += len(line)
        if not line.endswith(b"\n"):
            break
        record = expect(parse_json(line, str(partial)), {"round?": int}, str(partial))
        if set(record) == {"round"}:
            kept, pending, whole, done = kept + pending, [], at, record["round"] + 1
        else:
            pending.append(record)
    cut(partial, whole)
    return kept, done


def _result(run: RunConfig, path: Place, stopped: bool) -> Result:
    return Result(str(run.out), run.reject.problems, None, None, stopped, samples=str(path))
