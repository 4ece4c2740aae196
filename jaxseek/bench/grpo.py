"""Time a GRPO step on this machine, rollout and update, beside TRL's GRPOTrainer.

Both start from the same weights, with prompts and answers of equal, fixed lengths. Rewards cost nothing,
there is no KL, and updates are in float32, with one microbatch per prompt.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from jaxseek.bench.peers import Worker, cpus, export, listen, take_turns
from jaxseek.config.model import ConfigError
from jaxseek.machine.host_memory import peak_memory

MODULE = "jaxseek.bench.grpo"
RATE = 1e-6


def bench_grpo(
    source: str, prompts: int, group: int, length: int, repeats: int, against: str | None, as_json: bool
) -> list[dict[str, Any]]:
    """Time steps of `prompts` x `group` answers; prompts and answers have `length` tokens each.

    Prints a table or one line of JSON, and returns the rows.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected 1 or more")
    shape = {"prompts": prompts, "group": group, "length": length, "steps": repeats + 1}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = str(Path(scratch) / "hf")
        with Worker("export", {"model": source, "folder": folder}, MODULE) as worker:
            worker.ask("export")
        task = {"model": folder, "scratch": scratch, **shape}
        workers = []
        for name in ("jaxseek", *([against] if against else [])):
            workers.append(stack.enter_context(Worker(name, task, MODULE)))
            workers[-1].ask("load")  # also takes a first step
        take_turns(workers, repeats)
        rows = [{"program": w.program, **_summary(w.ask("finish"))} for w in workers]
    for row in rows[:-1] if against else ():
        row["speedup"] = rows[-1]["seconds_per_step"] / row["seconds_per_step"]
    _report(rows, f"{source}: GRPO step, {prompts} x {group} answers, {length} + {length} tokens", as_json)
    return rows


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    _, *steps = found["seconds"]
    return {
        "seconds_per_step": statistics.median(steps),
        "rollout_seconds": statistics.median(found["rollout_seconds"][1:]),
        "first_step_seconds": found["seconds"][0],
        "peak_memory_bytes": found["peak_memory_bytes"],
        "seconds": steps,
    }


def _report(rows: list[dict[str, Any]], title: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"title": title, "cpus": cpus(), "rows": rows}))
        return
    from rich.table import Table

    from jaxseek.machine.terminal import PlainConsole

    table = Table(title=title, caption=f"{cpus()} CPUs, float32")
    for name in ("program", "s/step", "sampling", "first step", "memory", "speedup"):
        table.add_column(name, justify="left" if name == "program" else "right")
    for row in rows:
        table.add_row(
            row["program"],
            f"{row['seconds_per_step']:.2f}",
            f"{row['rollout_seconds']:.2f} s",
            f"{row['first_step_seconds']:.1f} s",
            f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"{row['speedup']:.2f}x" if "speedup" in row else "",
        )
    PlainConsole().print(table)


# -------------------------------------------------------------------- inside a worker process


class _Turns:
    """Worker side of the protocol: reports every step, then waits for the next command on standard input."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # keep the prints of libraries out of the answers
        self.seconds: list[float] = []
        self.rollout: list[float] = []
        listen()

    def answer(self, found: dict[str, Any]) -> None:
        print(json.dumps(found), file=self._answers, flush=True)

    def step_done(self, seconds: float, rollout: float) -> None:
        """Report a finished step, and wait for the next command."""
        self.seconds.append(seconds)
        self.rollout.append(rollout)
        self.answer({})
        listen()

    def finish(self) -> None:
        about = {"seconds": self.seconds, "rollout_seconds": self.rollout}
        self.answer(about | {"peak_memory_bytes": peak_memory()})


def _work(program: str, task: dict[str, Any]) -> None:
    turns = _Turns()
    try:
        if program == "export":
            export(task["model"], task["folder"])
            return turns.answer({})
        {"jaxseek": _jaxseek, "trl": _trl}[program](task, turns)
        turns.finish()
    except BrokenPipeError:
        return  # the parent process has ended
    except Exception as e:
        if os.environ.get("JAXSEEK_TRACEBACK"):
            raise
        turns.answer({"error": f"{program}: {str(e) or type(e).__name__}"})


def _prompts(task: dict[str, Any], vocabulary: int, step: int) -> np.ndarray:
    shape = (task["prompts"], task["length"])
    return np.random.default_rng(step).integers(4, min(vocabulary, 2000), shape)


def _jaxseek(task: dict[str, Any], turns: _Turns) -> None:
    """Run the parts of a GRPO step, without tasks and rewards."""
    import jax

    from jaxseek.config.run import RunConfig
    from jaxseek.engine.request import LOGPROBS, Request
    from jaxseek.engine.sampling import Sampling
    from jaxseek.machine.host_memory import keep_freed_memory, release_freed_memory
    from jaxseek.rl import grpo
    from jaxseek.rl.objective import PolicyLoss
    from jaxseek.rl.packing import Shapes, make_policy_batch
    from jaxseek.rl.problem import Answer, Problem
    from jaxseek.rl.rollout import Episode, as_engine, seed_of
    from jaxseek.train import start
    from jaxseek.train.loss import StepInputs
    from jaxseek.train.optimizer import decays, make_optimizer
    from jaxseek.train.step import init_state, make_step

    keep_freed_memory()
    P, G, length = task["prompts"], task["group"], task["length"]
    run = RunConfig.from_dict(
        {
            "objective": "grpo",
            "model": task["model"],
            "out": "none",
            "steps": task["steps"],
            "remat": "none",
            "task": {"kind": "arithmetic"},
            "rollout": {"prompts": P, "max_prompt_tokens": length, "max_new_tokens": length},
            "grpo": {"preset": "r1_zero", "group_size": G, "beta": 0.0},
            "rewards": [{"kind": "exact"}],
            "batch": {"accumulation": P},
            "optimizer": {"learning_rate": RATE, "weight_decay": 0.0},
            "schedule": {"kind": "constant"},
        }
    )
    cfg = start.model_config(run)
    model = start.open_model(run, cfg, start.open_strategy(run, cfg))
    shapes = Shapes.of(run, 1, 1)
    optimizer = make_optimizer(run.program, decays(model))
    update = make_step(PolicyLoss(run.program, start.compute_dtype(run), shapes.segments), optimizer)
    state = init_state(model, optimizer)
    del model
    nothing = Answer(Problem("", ""), "", None, "", length, "length")
    for step in range(task["steps"]):
        begin = time.perf_counter()
        engine = as_engine(state.model, "float32")
        prompts = [row.tolist() for row in _prompts(task, cfg.vocab_size, step)]
        engine.resize(P * G, 2 * length)
        numbered = [(p, Sampling(length, 1.0, top_p=1.0, seed=seed_of(0, step, p, g)))
                    for p in range(P) for g in range(G)]  # fmt: skip
        answers = engine.answers([Request(prompts[p], s, record=(LOGPROBS,)) for p, s in numbered])
        del engine
        release_freed_memory()
        rollout = time.perf_counter() - begin
        rewards_PG = np.array([a.tokens[0] % 7 for a in answers], np.float64).reshape(P, G)
        episodes = [Episode(prompts[p], a, nothing, 0) for (p, _), a in zip(numbered, answers)]
        lengths_N = np.full(P * G, length)
        shares_N = grpo.sequence_weights(lengths_N, np.ones(P * G, bool), run.grpo, length)
        known = {"advantage": list(grpo.advantages(rewards_PG, run.grpo).reshape(-1))}
        batch = make_policy_batch(episodes, shares_N, known, shapes, state.model, False)
        with state.model.on_mesh():
            state, _ = update(state, batch, StepInputs())
        jax.block_until_ready(state)
        turns.step_done(time.perf_counter() - begin, rollout)


def _trl(task: dict[str, Any], turns: _Turns) -> None:
    """Run the steps in TRL's GRPOTrainer, whose loop waits for a command before every step."""
    try:
        import torch
        import transformers
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer
    except ImportError:
        raise ConfigError("--against trl needs the parity extra: pip install 'jaxseek[parity]'") from None
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(cpus())
    P, G, length = task["prompts"], task["group"], task["length"]
    model: Any = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1")
    texts = [
        " ".join(f"w{i}" for i in row)
        for step in range(task["steps"])
        for row in _prompts(task, model.config.vocab_size, step)
    ]

    def reward(completions: Any, **_: Any) -> Any:
        return [float(int(text.split()[0][1:]) % 7) for text in completions]

    class Turn(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step_done(time.perf_counter() - self.begin, spent.pop() if spent else 0.0)

    spent: list[float] = []

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            begin = time.perf_counter()
            found = super()._generate_and_score_completions(inputs)
            spent.append(time.perf_counter() - begin)
            return found

    config = GRPOConfig(
        output_dir=str(Path(task["scratch"]) / "trl"),
        per_device_train_batch_size=G,
        gradient_accumulation_steps=P,
        num_generations=G,
        max_completion_length=length,
        max_steps=task["steps"],
        learning_rate=RATE,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        generation_kwargs={"min_new_tokens": length},
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Timed(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[Turn()],
    )
    trainer.train()


if __name__ == "__main__":
    _work(sys.argv[1], json.loads(sys.argv[2]))
