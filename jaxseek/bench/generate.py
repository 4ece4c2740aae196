"""Prefill and decode speed of a model on this machine, beside its memory bandwidth and, on CPU, transformers.

Both programs run in turn in one process, with the same weights, prompts and number of threads, and medians
are compared, so that a drift in the machine's speed affects both.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxseek.config.model import ConfigError, ModelConfig


def memory_bandwidth(seconds: float = 2.0) -> float:
    """Measure the bytes per second that this process's CPUs read from memory together (best of the runs)."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [np.ones(2**27 // threads, np.float32) for _ in range(threads)]  # 512 MiB exceeds every cache
    best, end = 0.0, time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() < end:
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, sum(p.nbytes for p in parts) / (time.perf_counter() - start))
    return best


def bytes_per_step(cfg: ModelConfig, weight_bytes: float, batch: int, slots: float, itemsize: int) -> float:
    """Bytes that a decode step must read: caches, and weights with the experts that uniform routing hits."""
    read = cfg.num_params() - (0 if cfg.tie_word_embeddings else cfg.vocab_size * cfg.hidden_size)
    if cfg.n_routed_experts:
        E, K = cfg.n_routed_experts, cfg.num_experts_per_tok
        sparse = sum(cfg.is_moe_layer(l) for l in range(cfg.num_hidden_layers))
        idle = E * (1 - K / E) ** batch
        read -= sparse * idle * 3 * cfg.hidden_size * cfg.moe_intermediate_size
    name = {4: "float32", 2: "bfloat16"}[itemsize]
    return read * weight_bytes + batch * slots * cfg.cache_bytes_per_token(name)


def bench(
    source: str,
    mesh: Any = None,
    dtype: str | None = None,
    batches: list[int] | None = None,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    repeats: int = 5,
    against: str | None = None,
    as_json: bool = False,
) -> list[dict[str, Any]]:
    """Time greedy generation for each batch size; print a table or one line of JSON, and return the rows.

    Raises ValueError for fewer than two new tokens, ConfigError if the comparison is not possible here.
    """
    from jaxseek.api import load
    from jaxseek.engine.engine import Engine, Timing
    from jaxseek.engine.sampling import Sampling
    from jaxseek.sharding.parameters import parameters

    if new_tokens < 2:
        raise ValueError(f"new_tokens is {new_tokens}, expected 2 or more: the first comes from prefill")
    model, tokenizer = load(source, mesh=mesh, dtype=dtype)
    cfg, itemsize = model.cfg, model.embed_VD[...].dtype.itemsize
    if prompt_tokens + new_tokens > cfg.max_position_embeddings:
        raise ValueError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones are more than the context of "
            f"{cfg.max_position_embeddings}; lower --prompt-tokens or --new-tokens"
        )
    on_cpu = model.mesh.devices.flat[0].platform == "cpu"
    bandwidth = memory_bandwidth() if on_cpu else None
    reference = _transformers(source, model, tokenizer) if against else None
    engine, rows = Engine(model, dispatch=new_tokens), []
    values = [v.get_value() for v in parameters(engine.decoder.weights).values()]
    weight_bytes = sum(v.nbytes for v in values) / cfg.num_params(mtp=bool(len(model.mtp)))
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0)

    def ours(prompts: np.ndarray) -> tuple[float, float]:
        engine.resize(len(prompts))
        engine.timing = Timing()
        engine.generate(prompts.tolist(), sampling)
        return engine.timing.prefill_seconds, len(prompts) * (new_tokens - 1) / engine.timing.decode_rate

    for batch in batches or [1, 8]:
        prompts = np.random.default_rng(batch).integers(3, cfg.vocab_size, (batch, prompt_tokens))
        programs: dict[str, Callable[[np.ndarray], tuple[float, float]]] = {"jaxseek": ours}
        if reference:
            programs["transformers"] = lambda p: reference(p, new_tokens)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for turn in range(repeats + 1):
            for name, run in programs.items():
                result = run(prompts)
                if turn:  # the first run compiles
                    times[name].append(result)
            print(f"batch {batch}: run {turn}/{repeats}", end="\r", file=sys.stderr, flush=True)
        print(" " * 40, end="\r", file=sys.stderr)
        for name, runs in times.items():
            prefill, decode = (statistics.median(r[i] for r in runs) for i in (0, 1))
            steps = (new_tokens - 1) / decode
            row = {
                "program": name,
                "batch": batch,
                "prefill_tokens_per_second": batch * prompt_tokens / prefill,
                "decode_tokens_per_second": batch * steps,
                "decode_milliseconds_per_step": 1000 / steps,
            }
            if bandwidth:
                slots = prompt_tokens + new_tokens / 2
                row["fraction_of_memory_bandwidth"] = (
                    bytes_per_step(cfg, weight_bytes, batch, slots, itemsize) * steps / bandwidth
                )
            rows.append(row)
        if reference:
            rows[-2]["decode_speedup"] = (
                rows[-2]["decode_tokens_per_second"] / rows[-1]["decode_tokens_per_second"]
            )
    _report(rows, source, cfg, str(model.embed_VD[...].dtype), bandwidth, as_json)
    return rows


def _transformers(
    source: str, model: Any, tokenizer: Any
) -> Callable[[np.ndarray, int], tuple[float, float]]:
    """Load the same weights into transformers, in the same dtype, for greedy generation.

    The result maps (prompts, new tokens) to (prefill, decode) seconds.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ConfigError(
            "--against transformers needs the parity extra: pip install 'jaxseek[parity]'"
        ) from None
    if not model.mesh.devices.flat[0].platform == "cpu":
        raise ConfigError("--against transformers compares on CPU; this process uses an accelerator")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = getattr(torch, str(model.embed_VD[...].dtype))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(source)
        if not (folder / "model.safetensors").exists() and not list(folder.glob("*.index.json")):
            from jaxseek_convert import save_hf

            folder = Path(scratch) / "hf"
            save_hf(model, folder, tokenizer=tokenizer)
        reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    reference.generation_config.eos_token_id = None

    def run(prompts: np.ndarray, new_tokens: int) -> tuple[float, float]:
        ids = torch.tensor(prompts)
        options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        seconds = []
        for n in (1, new_tokens):
            start = time.perf_counter()
            out = reference.generate(ids, max_new_tokens=n, min_new_tokens=n, **options)
            seconds.append(time.perf_counter() - start)
            if out.shape[1] != prompts.shape[1] + n:
                raise RuntimeError(
                    f"transformers made {out.shape[1] - prompts.shape[1]} tokens, expected {n}"
                )
        return seconds[0], seconds[1] - seconds[0]

    return run


def _report(
    rows: list[dict[str, Any]],
    source: str,
    cfg: ModelConfig,
    dtype: str,
    bandwidth: float | None,
    as_json: bool,
) -> None:
    import jax

    machine = {
        "device": jax.devices()[0].device_kind,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "memory_bandwidth": bandwidth,
        "jax": jax.__version__,
    }
    if as_json:
        print(json.dumps({"model": source, "dtype": dtype, "machine": machine, "rows": rows}))
        return
    from rich.table import Table

    from jaxseek.machine.terminal import PlainConsole

    total, active = cfg.num_params() / 1e6, cfg.num_active_params() / 1e6
    title = f"{source}: {total:.0f} M parameters, {active:.0f} M active, {dtype}"
    limit = f", reads {bandwidth / 1e9:.1f} GB/s" if bandwidth else ""
    table = Table(title=title, caption=f"{machine['device']}, {machine['cpus']} CPUs{limit}")
    for name in ("program", "batch", "prefill tok/s", "decode tok/s", "ms/step", "of bandwidth", "speedup"):
        table.add_column(name, justify="left" if name == "program" else "right")
    for row in rows:
        fraction, speedup = row.get("fraction_of_memory_bandwidth"), row.get("decode_speedup")
        table.add_row(
            row["program"],
            str(row["batch"]),
            f"{row['prefill_tokens_per_second']:.0f}",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['decode_milliseconds_per_step']:.2f}",
            f"{fraction:.0%}" if fraction else "",
            f"{speedup:.2f}x" if speedup else "",
        )
    PlainConsole().print(table)
