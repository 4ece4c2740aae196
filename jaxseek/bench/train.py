"""Training speed and memory on this machine, beside its peak FLOPs and, on CPU, PyTorch with transformers.

A step is forward, loss, backward, clipping and AdamW, on float32 weights. All programs start from the same
weights and see the same batches.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from jaxseek.bench.peers import Worker, cpus, export, listen, take_turns
from jaxseek.config.model import ConfigError, ModelConfig
from jaxseek.machine.host_memory import peak_memory

MODULE = "jaxseek.bench.train"

# Of a step, in every program.
OPTIMIZER = {
    "learning_rate": 1e-4,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip": 1.0,
}

Step = Callable[[np.ndarray], float]


def bench_train(
    source: str,
    mesh: str | None = None,
    dtype: str | None = None,
    rows: int = 4,
    length: int = 256,
    repeats: int = 5,
    remat: list[str] | None = None,
    against: str | None = None,
    as_json: bool = False,
) -> list[dict[str, Any]]:
    """Time training steps on `rows` x `length` random tokens; prints a table or JSON, returns its rows.

    A program for each of `remat`, then transformers' where asked for; in that case no model has multi-token
    modules, which transformers does not train.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected 1 or more")
    if against and dtype not in (None, "float32"):
        raise ConfigError(f"--against transformers compares in float32, not {dtype}")
    task = {
        "model": source,
        "mesh": mesh,
        "dtype": dtype,
        "rows": rows,
        "length": length,
        "steps": repeats + 1,
    }
    programs = [("jaxseek", name) for name in remat or ["none"]] + ([(against, "none")] if against else [])
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        if against:
            folder = str(Path(scratch) / "hf")
            with Worker("export", task | {"folder": folder}, MODULE) as worker:
                worker.ask("load")
            task["model"] = folder
        workers, about = [], []
        for name, kept in programs:  # one after the other: loading, compiling, the first step
            workers.append(stack.enter_context(Worker(name, task | {"remat": kept}, MODULE)))
            about.append(workers[-1].ask("load"))
            if about[-1]["platform"] != "cpu" and len(programs) > 1:
                raise ConfigError("programs share CPUs only: on an accelerator, time one --remat at a time")
        take_turns(workers, repeats)
        results = [worker.ask("finish") for worker in workers]
    table = [_row(*program, result, about[0], rows, length) for program, result in zip(programs, results)]
    for row in table[:-1] if against else ():
        row["speedup"] = row["tokens_per_second"] / table[-1]["tokens_per_second"]
        pairs = zip(row["losses"], table[-1]["losses"])
        row["loss_difference"] = max(abs(ours / theirs - 1) for ours, theirs in pairs)
    _report(table, source, f"{rows} x {length} tokens", about[0], as_json)
    return table


def _row(
    program: str, remat: str, result: dict[str, Any], about: dict[str, Any], rows: int, length: int
) -> dict[str, Any]:
    """What a program did: medians, and every step's seconds and loss."""
    from jaxseek.train.metrics import train_flops

    first, *seconds = result["seconds"]
    median = statistics.median(seconds)
    row = {
        "program": program,
        "remat": remat,
        "tokens_per_second": rows * length / median,
        "seconds_per_step": median,
        "first_step_seconds": first,
        "peak_memory_bytes": result["peak_memory_bytes"],
        "seconds": seconds,
        "losses": result["losses"],
    }
    if about["peak_flops"]:
        flops = train_flops(ModelConfig.from_hf(about["config"]), rows * length, length)
        row["fraction_of_peak_flops"] = flops / median / about["peak_flops"]
    return row


def _report(
    rows: list[dict[str, Any]], source: str, shape: str, about: dict[str, Any], as_json: bool
) -> None:
    device, peak = about["device"], about["peak_flops"]
    if as_json:
        machine = {"device": device, "cpus": cpus(), "peak_flops": peak}
        print(json.dumps({"model": source, "shape": shape, "machine": machine, "rows": rows}))
        return
    from rich.table import Table

    from jaxseek.machine.terminal import PlainConsole

    limit = f", {peak / 1e9:.0f} GFLOP/s" if peak else ""
    table = Table(title=f"{source}: training, {shape}", caption=f"{device}, {cpus()} CPUs{limit}")
    for name in ("program", "remat", "tok/s", "s/step", "of peak", "first step", "memory", "speedup"):
        table.add_column(name, justify="left" if name in ("program", "remat") else "right")
    for row in rows:
        fraction, speedup = row.get("fraction_of_peak_flops"), row.get("speedup")
        table.add_row(
            row["program"],
            row["remat"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['seconds_per_step']:.2f}",
            f"{fraction:.0%}" if fraction else "",
            f"{row['first_step_seconds']:.1f} s",
            f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"{speedup:.2f}x" if speedup else "",
        )
    PlainConsole().print(table)
    if differences := [row["loss_difference"] for row in rows if "loss_difference" in row]:
        print(f"losses differ from those of transformers by {max(differences):.1e} at most")


# -------------------------------------------------------------------- a program in its process


def _work(program: str, task: dict[str, Any]) -> None:
    """Answer the words on standard input: load (and take a first step), step, finish."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    losses, seconds = [], []

    def take(step: Step, tokens: np.ndarray) -> None:
        start = time.perf_counter()
        losses.append(step(tokens))
        seconds.append(time.perf_counter() - start)

    try:
        listen()
        if program == "export":
            export(task["model"], task["folder"])
            return answer({})
        step, about = {"jaxseek": _jaxseek, "transformers": _transformers}[program](task)
        shape = (task["steps"], task["rows"], task["length"])
        first, *batches = np.random.default_rng(0).integers(0, about["vocab_size"], shape)
        take(step, first)
        answer(about)
        for tokens in batches:
            listen()
            take(step, tokens)
            answer({})
        listen()
        answer({"seconds": seconds, "losses": losses, "peak_memory_bytes": peak_memory()})
    except BrokenPipeError:
        return  # who asked has left
    except (ConfigError, ValueError, OSError, RuntimeError, ImportError) as e:
        if os.environ.get("JAXSEEK_TRACEBACK"):
            raise
        answer({"error": str(e)})


def _jaxseek(task: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """A step of `jaxseek train`, and what there is to say of it."""
    import jax

    from jaxseek.config.run import RunConfig, at_fraction
    from jaxseek.machine.host_memory import keep_freed_memory
    from jaxseek.train import start
    from jaxseek.train.batch import make_batch, to_devices
    from jaxseek.train.metrics import peak_flops
    from jaxseek.train.objectives import Objective
    from jaxseek.train.optimizer import decays, make_optimizer
    from jaxseek.train.step import init_state, make_step

    keep_freed_memory()
    run = RunConfig.from_dict(
        {
            "objective": "pretrain",
            "model": task["model"],
            "out": "none",
            "steps": task["steps"],
            "mesh": task["mesh"] or "",
            "compute_dtype": task["dtype"] or "",
            "remat": task["remat"],
            "data": {"train": ["none"], "length": task["length"]},
            "batch": {"size": task["rows"]},
            "optimizer": OPTIMIZER,
            "schedule": {"kind": "constant"},
        }
    )
    cfg = start.model_config(run)
    model = start.open_model(run, cfg, start.open_strategy(run, cfg))
    optimizer = make_optimizer(run.recipe, decays(model))
    train_step = make_step(Objective(run.recipe, start.compute_dtype(run)), optimizer)
    state, mesh = init_state(model, optimizer), model.mesh
    mtp, modules = np.float32(at_fraction(run.loss.mtp, 0)), cfg.num_nextn_predict_layers
    del model

    def step(tokens: np.ndarray) -> float:
        nonlocal state
        ones = np.ones(tokens.shape, np.int32)
        host = make_batch(tokens, ones, ones.astype(np.float32), modules)
        with state.model.on_mesh():
            state, metrics = train_step(state, None, to_devices(host, state.model), mtp, np.float32(0))
        jax.block_until_ready(state)
        return float(metrics["loss"])

    device = mesh.devices.flat[0]
    about = {"device": device.device_kind, "platform": device.platform, "peak_flops": peak_flops(mesh)}
    return step, about | {"vocab_size": cfg.vocab_size, "config": cfg.to_hf()}


def _transformers(task: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """The same step as one writes it in PyTorch. AdamW is the fused one, the default of their Trainer."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ConfigError(
            "--against transformers needs the parity extra: pip install 'jaxseek[parity]'"
        ) from None
    logging.disable_progress_bar()
    torch.set_num_threads(cpus())
    model: Any = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32).train()
    o = OPTIMIZER
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": o["weight_decay"]},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, o["learning_rate"], (o["b1"], o["b2"]), o["eps"], fused=True)

    def step(tokens: np.ndarray) -> float:
        ids = torch.tensor(tokens)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o["clip"])
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, {"platform": "cpu", "vocab_size": model.config.vocab_size}


if __name__ == "__main__":
    _work(sys.argv[1], json.loads(sys.argv[2]))
