"""Distillation: the student learns a teacher's distribution, or answers sampled from it.

By logits the loss is the KL divergence from the teacher (Hinton et al., arXiv:1503.02531). By samples the run
becomes SFT on the teacher's answers, as R1 distilled (R1 paper, section 2.4).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from dataclasses import dataclass
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
from jaxseek.storage.untrusted import expect, parse_json
from jaxseek.tokenizer import chat
from jaxseek.tokenizer.tokenizer import Tokenizer
from jaxseek.train.loss import Loss, divergence
from jaxseek.train.pretrain import Pretrain, cross_entropy
from jaxseek.train.sft import Sft
from jaxseek.train.start import Setup, compute_dtype

log = logging.getLogger("jaxseek")

FILE = "samples.jsonl"
BATCH = 16  # answers that are sampled together


@dataclass(frozen=True)
class DistillationLoss(Loss):
    """KL from the teacher's distribution at every position that counts, mixed with the usual loss."""

    def __call__(self, model, batch, totals, inputs):
        ctx, given, teacher = self.context(model, batch), self.program.distill, inputs.teacher
        out = model.forward(batch.tokens_BT, ctx)
        taught = jax.lax.stop_gradient(teacher.forward(batch.tokens_BT, self.context(teacher, batch)))
        kl_BT = divergence(
            jax.lax.stop_gradient(teacher),
            model,
            taught.hidden_BTD,
            out.hidden_BTD,
            ctx.rules,
            given.temperature,
        )
        kl = (batch.weights_BJT[:, 0] * kl_BT).sum() / totals.weight
        nll = cross_entropy(model, out.hidden_BTD, batch, totals, ctx)
        extra, aux = self.auxiliary(model, out, batch, totals, inputs.mtp, ctx)
        loss = given.weight * kl + extra
        if given.weight < 1:  # otherwise the head's backward pass would compute a gradient of zeros
            loss += (1 - given.weight) * nll
        return loss, aux.with_metrics(loss=nll, kl=kl)


class Distill(Pretrain):
    """Steps on rows of documents with the teacher's logits, on the student's mesh."""

    averaged = ("loss", "kl")

    def __init__(self, setup: Setup, closing: contextlib.ExitStack):
        """Raises ConfigError for a teacher with another vocabulary."""
        super().__init__(setup, closing)
        run, cfg = setup.run, setup.cfg
        self.teacher, _ = load(run.distill.teacher, setup.strategy, compute_dtype(run))
        if self.teacher.cfg.vocab_size != cfg.vocab_size:
            raise ConfigError(
                f"distill.teacher has a vocabulary of {self.teacher.cfg.vocab_size}, the student of "
                f'{cfg.vocab_size}; logits need the same one; use distill.by = "samples"'
            )

    def make_loss(self) -> Loss:
        return DistillationLoss(self.run.program, compute_dtype(self.run))


def open_distillation(setup: Setup, closing: contextlib.ExitStack) -> Pretrain:
    """Make the recipe of a run: by logits, or SFT on samples, which are made first."""
    if setup.run.distill.by == "samples":
        return Sft(dataclasses.replace(setup, run=sampled_run(setup)), closing)
    return Distill(setup, closing)


def sampled_run(setup: Setup) -> RunConfig:
    """Sample the teacher's answers into OUT/samples.jsonl, and return the SFT run that learns them.

    Answers that are in the file already stay. Those that `max_new_tokens` cut off are not learnt, since they
    teach not to end.
    """
    run = setup.run
    path = place(run.out) / FILE
    prompts = [(talk, i) for talk in open_prompts(run) or () for i in range(run.distill.per_prompt)]
    done = from_first(lambda: len(read_log(path)))  # drops a line that a kill cut short
    if done < len(prompts):
        _sample(run, setup.strategy, setup.tokenizer, prompts, done, path)
    data = dataclasses.replace(run.data, train=[str(from_first(lambda: _finished(path)))])
    return run.replace(objective="sft", data=data)


def _sample(run: RunConfig, strategy: Strategy, tokenizer: Tokenizer, prompts: Any, done: int, path: Place):
    from rich.progress import Progress

    teacher, teachers_tokenizer = load(run.distill.teacher, strategy)
    tokenizer = teachers_tokenizer or tokenizer
    distill, names, left = run.distill, run.data.columns, prompts[done:]
    base = Sampling(distill.max_new_tokens, distill.temperature, top_p=distill.top_p)
    opened: dict[int, bool] = {}  # whether a prompt ends within a thought

    def requests():
        for i, (talk, _) in enumerate(left):
            try:
                ids = encode(tokenizer, talk)
                opened[i] = tokenizer.opened_think(ids)
                yield request(teacher, tokenizer, ids, dataclasses.replace(base, seed=run.seed + done + i))
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
    """Write the answers that ended by themselves into a file of their own; return its place."""
    kept = path.with_name("samples.finished.jsonl")
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        where = f"{path}, line {number}"
        if expect(parse_json(line, where), {"finish_reason": str}, where)["finish_reason"] == "stop":
            lines.append(line)
    if not lines:
        raise ConfigError(f"{path}: the teacher finished none of its answers; raise distill.max_new_tokens")
    write_bytes(kept, b"".join(lines))
    return kept
