"""Tasks: problems with answers that can be checked, made to order or read from files.

A training problem is a function of the run's seed and its number, so that there is no state to save. What is
held out is the same for every seed, and no run trains on it: of made problems those that `set_apart` names,
of files data.eval, data.holdout, or the first task.held_out records in an order that is always the same.
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from jaxseek.config.model import ConfigError
from jaxseek.config.rl import TaskConfig
from jaxseek.config.run import Columns, DataConfig, RunConfig
from jaxseek.data.dataset import shuffled
from jaxseek.data.examples import Talk, prompt
from jaxseek.data.sources import Joined, Record, open_sources
from jaxseek.rl import arithmetic, countdown
from jaxseek.rl.problem import Messages, Problem

# Rewards that look at Problem.answer; with others alone, records of kind jsonl may go without.
_COMPARE = {"exact", "math"}
# What the data sets call our columns.
_NAMES = {"gsm8k": {"prompt": "question"}, "math": {"prompt": "problem"}}


class Task(Protocol):
    """`size`: how many training problems there are, None where they are made. `held_out`: to evaluate on."""

    size: int | None
    held_out: list[Problem]

    def problem(self, index: int) -> Problem:
        """The training problem with this number, 0 and up, without end."""
        ...


def open_task(run: RunConfig) -> Task:
    """The task of [task], with its prompts laid out. Raises ConfigError for data that it cannot use."""
    match run.task.kind:
        case "arithmetic":
            return MadeTask(run, arithmetic.draw, lambda problem: problem.record["problem"])
        case "countdown":
            return MadeTask(run, countdown.draw, countdown.key)
    return FileTask(run)


class MadeTask:
    """Problems from `draw(rng, terms)`; those with the same `key` are held out together."""

    size: int | None = None

    def __init__(
        self, run: RunConfig, draw: Callable[[random.Random, int], Problem], key: Callable[[Problem], str]
    ):
        self._run, self._draw, self._key = run, draw, key
        rng, found = random.Random(f"{run.task.kind} held out"), {}
        for _ in range(1000 + 64 * run.task.held_out):  # a small space has fewer than are asked for
            problem = draw(rng, run.task.terms)
            if arithmetic.set_apart(key(problem)):
                found.setdefault(key(problem), problem)
            if len(found) == run.task.held_out:
                break
        self.held_out = [self._laid_out(problem) for problem in found.values()]

    def problem(self, index: int) -> Problem:
        rng = random.Random(f"{self._run.task.kind} {self._run.seed} {_checked(index)}")
        while arithmetic.set_apart(self._key(problem := self._draw(rng, self._run.task.terms))):
            pass
        return self._laid_out(problem)

    def _laid_out(self, problem: Problem) -> Problem:
        talk = [{"role": "user", "content": problem.prompt}]
        return replace(problem, prompt=lay_out(talk, self._run.task, "the problem"))


class FileTask:
    """Records of [data]. Others with the prompt of one that is held out are left out: `dropped` counts them.

    Every record is read once when the task is opened, so that none fails in the midst of training.
    """

    size: int | None

    def __init__(self, run: RunConfig):
        self._run = run
        data, count = run.data, run.task.held_out
        self._records = open_sources(data.train, "data.train")
        held = shuffled(len(self._records))[:0]
        if data.eval:
            apart = open_sources(data.eval, "data.eval")
            chosen = shuffled(len(apart))[:count]
            problems = [self._read(apart, i) for i in range(len(apart))]
            self.held_out = [problems[i] for i in chosen]
        else:
            n = max(1, round(data.holdout * len(self._records))) if data.holdout else count
            held = shuffled(len(self._records))[:n]
            if len(held) == len(self._records):
                name = f"data.holdout {data.holdout}" if data.holdout else f"task.held_out {count}"
                raise ConfigError(
                    f"{name} of {len(held)} problems leaves none to train on; lower it, or name data.eval"
                )
            problems = [self._read(self._records, int(i)) for i in held]
            self.held_out = problems[:count]
        known = {str(problem.prompt) for problem in problems}
        rest = np.setdiff1d(np.arange(len(self._records)), held)
        fresh = [str(self._read(self._records, int(i)).prompt) not in known for i in rest]
        self._train = rest[np.array(fresh, bool)]
        self.size, self.dropped = len(self._train), len(rest) - len(self._train)
        if not self.size:
            raise ConfigError(
                f"all {self.dropped} problems of data.train are held out too, which leaves none to train on; "
                "data.eval and data.train must differ"
            )
        self._epoch, self._order = -1, self._train

    def problem(self, index: int) -> Problem:
        epoch, at = divmod(_checked(index), len(self._train))
        if self._run.data.shuffle and epoch != self._epoch:
            order = list(map(int, self._train))
            random.Random(f"order {self._run.seed} {epoch}").shuffle(order)
            self._epoch, self._order = epoch, order
        return self._read(self._records, int(self._order[at]))

    def _read(self, records: Joined, i: int) -> Problem:
        record, place = records[i], records.place(i)
        talk = prompt(*_under_our_names(record, self._run, place), place)
        answer = _answer(record, self._run, place)
        return Problem(lay_out(talk, self._run.task, place), answer, record)


def lay_out(talk: Talk, task: TaskConfig, place: str) -> str | Messages:
    """A problem as a prompt, in task.template; the instruction stands behind it, on a line of its own."""
    content = talk[-1]["content"]
    if not content.strip():
        raise ConfigError(f"{place}: the prompt is empty, so that there is nothing to answer")
    if task.instruction:
        content += task.instruction if task.instruction[0].isspace() else "\n" + task.instruction
    talk = [*talk[:-1], talk[-1] | {"content": content}]
    if task.template == "chat":
        if task.system and talk[0]["role"] == "system":
            raise ConfigError(f"{place} has a system message of its own; leave task.system empty")
        return [*([{"role": "system", "content": task.system}] if task.system else []), *talk]
    if [message["role"] for message in talk] != ["user"]:
        raise ConfigError(
            f'{place} is a conversation of {len(talk)} messages; task.template = "{task.template}" takes one '
            'by the user, expected "chat"'
        )
    return content if task.template == "plain" else talk


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` of a text, braces balanced; None where there is none."""
    begin = text.rfind(r"\boxed{")
    depth = 0
    for end in range(begin + len(r"\boxed"), len(text)) if begin >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
        if not depth:
            return text[begin + len(r"\boxed{") : end]
    return None


def _under_our_names(record: Record, run: RunConfig, place: str) -> tuple[Record, DataConfig]:
    """The record and the names of its columns; `A+B` as columns.prompt stands for both, line after line."""
    name = run.data.columns.prompt
    own = _NAMES.get(run.task.kind, {}).get("prompt", name)
    if name == Columns.prompt and (own in record or name not in record):
        name = own
    parts = [part.strip() for part in name.split("+")]
    if name not in record and len(parts) > 1:
        values = [_column(record, part, "prompt", place) for part in parts]
        record = record | {name: "\n".join(_text(v, p, place) for v, p in zip(values, parts))}
    return record, replace(run.data, columns=replace(run.data.columns, prompt=name))


def _answer(record: Record, run: RunConfig, place: str) -> str:
    """The reference answer of a record as text, without what the data set writes around it."""
    name, kind = run.data.columns.answer, run.task.kind
    if kind == "math" and name == Columns.answer and name not in record and "solution" in record:
        name = "solution"
    if kind == "jsonl" and not _COMPARE & {reward.kind for reward in run.rewards}:
        if name not in record and name == Columns.answer:
            return ""
        value = _column(record, name, "answer", place)
        return "" if value is None else _text(value, name, place)
    text = _text(_column(record, name, "answer", place), name, place)
    if kind == "gsm8k":
        _, mark, text = text.rpartition("####")
        text = text.replace(",", "").strip()
        if not mark:
            raise ConfigError(
                f'{place}: {name} does not end in "#### 72" or the like, as in GSM8K; task.kind = "jsonl" '
                "takes answers as they are"
            )
    elif kind == "math" and (name == "solution" or r"\boxed{" in text):
        boxed = last_boxed(text)
        if boxed is None:
            raise ConfigError(rf"{place}: {name} holds no whole \boxed{{...}} to take the answer from")
        text = boxed.strip()
    if not text:
        raise ConfigError(f"{place}: the answer in {name} is empty, so that nothing can be compared with it")
    return text


def _text(value: Any, name: str, place: str) -> str:
    """A column's text; of a number its shortest, so that 72.0 is 72."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(int(value)) if value == int(value) else repr(value)
    raise ConfigError(f"{place}: {name} is {value!r:.60}, expected a string or a number")


def _column(record: Record, name: str, ours: str, place: str) -> Any:
    if name in record:
        return record[name]
    near = difflib.get_close_matches(name.lower(), {key.lower(): key for key in record}, 1, 0.5)
    hint = next((key for key in record if near and key.lower() == near[0]), "...")
    raise ConfigError(
        f"{place} has no column {name!r} (it has {', '.join(map(repr, record))}); name the right one in "
        f'[data.columns]: {ours} = "{hint}"'
    )


def _checked(index: int) -> int:
    if index < 0:
        raise IndexError(f"problem {index}: the first is number 0")
    return index
