"""`jaxseek plan`: one strategy on one slice, compiled and reported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
from rich.console import Console

from jaxseek.config import ConfigError, ModelConfig, configs_dir, presets
from jaxseek.info import read_config
from jaxseek.lab.analytic import first_pass, sensible
from jaxseek.lab.chips import Topology
from jaxseek.lab.compile import CompileError, compile_job
from jaxseek.lab.job import TOKENS_PER_DISPATCH, Job
from jaxseek.lab.report import Report, draw, lines, report
from jaxseek.lab.run import Measured, devices_of, measure
from jaxseek.sharding import Strategy
from jaxseek.storage.place import writable, write_text


def plan(
    model: str,
    topology: str,
    mesh: str | None,
    workload: str,
    batch: int,
    context: int,
    weights: str,
    lora: int = 0,
    remat: str = "full",
    as_json: bool = False,
    hlo: str | None = None,
    plot: str | None = None,
    repeats: int = 0,
    trace: str | None = None,
) -> int:
    """Compile the step and print what it costs; with `repeats`, run it here too, that often, and with `trace`
    write a profile of it. Returns 1 for a program that does not fit."""
    job, layout = make_job(read_config(model), topology, mesh, workload, batch, context, weights, lora)
    job = dataclasses.replace(job, remat=remat)
    devices = devices_of(job.topology, jax.devices()) if repeats else []
    writes = not devices or jax.process_index() == 0
    console = Console(stderr=True)
    console.print(f"layout: {layout}", highlight=False)
    held = first_pass(job).held / 2**30
    try:
        with console.status("starting the TPU compiler") as status:
            compiled = compile_job(job, lambda text: status.update(f"{text} ({held:.1f} GiB held)"))
    except CompileError as e:
        if e.needed is None:
            raise
        found = {"fits": False, "error": str(e), "layout": layout, "bytes_per_device": {"peak": e.needed}}
        text = f"{title(model, job)}\n  {e} ({held:.2f} GiB of weights and cache)"
        print(json.dumps(found) if as_json else text)
        return 1
    r = report(job, compiled)
    if hlo and writes:
        write_text(writable(hlo), compiled.text)
    if plot and writes:
        draw(title(model, job), r, plot)
    found, text = {"model": model, "layout": layout} | r.to_dict(), lines(title(model, job), r)
    if devices and r.fits:
        with console.status(f"running on {len(devices)} devices"):
            measured = measure(job, job.strategy.make_mesh(devices), repeats, trace)
        found |= {"measured": measured.to_dict()}
        text += "\n" + beside(r, measured)
    print(json.dumps(found) if as_json else text)
    return 0 if r.fits else 1


def beside(r: Report, measured: Measured) -> str:
    """What was measured, and what of it the estimate had said."""
    ms, share = measured.median * 1e3, r.dispatch / TOKENS_PER_DISPATCH if r.job.phase == "decode" else 0.0
    low, high = ((t + share) / measured.median for t in (r.lower, r.upper))
    return (
        f"  measured {ms:.3f} ms a step, median of {len(measured.seconds)} "
        f"({min(measured.seconds) * 1e3:.3f} to {max(measured.seconds) * 1e3:.3f}) on {measured.device}; "
        f"the estimate is {low:.2f} to {high:.2f} of it, {r.estimate.limit / measured.median:.0%} of the "
        "roofline is reached"
    )


def title(model: str, job: Job) -> str:
    sizes = " x ".join(f"{a}={n}" for a, n in job.strategy.sizes if n > 1) or "one device"
    adapters = f" with adapters of rank {job.lora}" if job.lora else ""
    return (
        f"{model}, {job.workload}{adapters} of {job.batch} x {job.context:,} tokens, {job.weights} weights, "
        f"on {job.topology.name} as {sizes}"
    )


def make_job(
    cfg: ModelConfig,
    topology: str,
    mesh: str | None,
    workload: str,
    batch: int,
    context: int,
    weights: str,
    lora: int = 0,
) -> tuple[Job, str]:
    """The job, and in words where its layout comes from. Raises ConfigError."""
    slice_ = Topology.parse(topology)
    if mesh is not None:
        return Job(cfg, Strategy.parse(mesh), slice_, workload, batch, context, weights, lora), mesh
    problem = ""
    for path in shipped(cfg, slice_, workload):
        try:
            job = Job(cfg, Strategy.from_toml(path), slice_, workload, batch, context, weights, lora)
        except ConfigError as e:
            problem = f"; {path.name} is not for this: {e}"
            continue
        return job, f"{path.name}, which is shipped"
    name, job = sensible(cfg, slice_, workload, batch, context, weights, lora)
    table, _, sizes = name.partition(" ")
    where = "the default strategy" if table == "default" else f"{table}.toml"
    return job, f"{where} with {sizes or 'one device'}, by a first estimate of all sizes{problem}"


def shipped(cfg: ModelConfig, topology: Topology, workload: str) -> list[Path]:
    """Shipped layouts for a model of these shapes: configs/meshes/PRESET.CHIP-AxB.WORKLOAD[.NOTE].toml."""
    found = []
    for path in sorted((configs_dir() / "meshes").glob("*.*.*.toml")):
        preset, slice_, of, *_ = path.name.removesuffix(".toml").split(".")
        wanted = {"rollout": "decode", "grpo": "train"}.get(workload, workload)
        if slice_ != topology.name.replace(":", "-") or of != wanted or preset not in presets():
            continue
        if _shape(ModelConfig.from_preset(preset)) == _shape(cfg):
            found.append(path)
    return found


def _shape(cfg: ModelConfig) -> tuple[int, ...]:
    return (
        cfg.hidden_size, cfg.num_hidden_layers, cfg.num_attention_heads, cfg.vocab_size,
        cfg.n_routed_experts, cfg.intermediate_size,
    )  # fmt: skip
