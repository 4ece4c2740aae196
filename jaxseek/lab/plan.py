"""`jaxseek plan`: one strategy on one slice, compiled and reported."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxseek.config.model import ConfigError, ModelConfig, configs_dir, presets
from jaxseek.config.run import is_run_file, raise_near_run_file
from jaxseek.hardware import Topology
from jaxseek.lab.analytic import first_pass, sensible
from jaxseek.lab.compile import Compiled, CompileError, compile_job
from jaxseek.lab.info import read_config
from jaxseek.lab.job import TOKENS_PER_DISPATCH, Job
from jaxseek.lab.measure import Measured, devices_of, measure
from jaxseek.lab.memory import points, programs, table
from jaxseek.lab.planned_run import check_agrees, job_of, read_runs
from jaxseek.lab.report import Report, draw, lines, report
from jaxseek.machine.terminal import PlainConsole
from jaxseek.sharding.strategy import Strategy
from jaxseek.storage.place import writable, write_text


def plan(
    model: str,
    topology: str,
    mesh: str | None = None,
    workload: str | None = None,
    batch: int | None = None,
    context: int | None = None,
    weights: str | None = None,
    lora: int | None = None,
    remat: str | None = None,
    overrides: Sequence[str] = (),
    as_json: bool = False,
    hlo: str | None = None,
    plot: str | None = None,
    repeats: int = 0,
    trace: str | None = None,
) -> int:
    """Compile the step and print what it costs; with `repeats`, run it here too, that often, and with `trace`
    write a profile of it. `model` may be a run file, which then says all else but the slice. Returns 1 for a
    program that does not fit."""
    outputs = {"as_json": as_json, "hlo": hlo, "plot": plot, "repeats": repeats, "trace": trace}
    if not is_run_file(model):
        raise_near_run_file(model)
        workload, context = workload or "decode", context or 2048
        if batch is None:  # training needs a row for every device
            trains = workload in ("train", "grpo")
            batch = max(8, Topology.parse(topology).num_devices if trains else 0)
        shape = (workload, batch, context, weights or "bf16", lora or 0, remat or "full")
        job, layout = make_job(read_config(model), topology, mesh, *shape)
        return _plan(model, job, layout, **outputs)
    given = {
        "mesh": mesh, "workload": workload, "batch": batch, "context": context, "weights": weights,
        "lora": lora, "remat": remat,
    }  # fmt: skip
    jobs = {}
    for name, (run, source) in read_runs(model, overrides).items():
        jobs[name] = job_of(run, source, topology)
        check_agrees(model, jobs[name], given)
    if len(jobs) > 1 and (hlo or plot):
        raise ConfigError(f"{model} has the stages {', '.join(jobs)}; --hlo and --plot need --set only=STAGE")
    return max(
        _plan(f"{name}: {job.run.model}", job, f"{job.run.mesh or 'all on fsdp'}, of the run", **outputs)
        for name, job in jobs.items()
        if job.run is not None
    )


def _plan(
    name: str,
    job: Job,
    layout: str,
    as_json: bool,
    hlo: str | None,
    plot: str | None,
    repeats: int,
    trace: str | None,
) -> int:
    """`plan` of one job."""
    devices = devices_of(job.topology, jax.devices()) if repeats else []
    writes = not devices or jax.process_index() == 0
    console = PlainConsole(stderr=True)
    console.print(f"layout: {layout}", highlight=False)
    jobs, compiled = programs(job) if job.workload == "grpo" else {job.workload: job}, {}
    for number, (program, one) in enumerate(jobs.items(), 1):
        which = f"{program}, {number} of {len(jobs)}: " if len(jobs) > 1 else ""
        try:
            compiled[program] = _compiled(one, which, console)
        except CompileError as e:
            if e.needed is None:
                raise
            found = {"fits": False, "error": f"{which}{e}", "layout": layout}
            found |= {"bytes_per_device": {"peak": e.needed}}
            held = first_pass(job).held / 2**30
            text = f"{title(name, job)}\n  {which}{e} ({held:.2f} GiB of weights and cache)"
            print(json.dumps(found) if as_json else text)
            return 1
    main = compiled[job.workload]
    r = report(job, main)
    if hlo and writes:
        write_text(writable(hlo), main.text)
    if plot and writes:
        draw(title(name, job), r, plot)
    found, fits, memory = {"model": name, "layout": layout} | r.to_dict(), r.fits, None
    if job.workload == "grpo":
        usable, sums = job.topology.chip.device.usable, points(job, compiled)
        fits, memory = all(p.total <= usable for p in sums), table(sums, usable)
        found |= {"fits": fits, "points": [p.to_dict() for p in sums]}
    text = lines(title(name, job), r, memory)
    if devices and fits:
        with console.status(f"running on {len(devices)} devices"):
            measured = measure(job, job.strategy.make_mesh(devices), repeats, trace)
        found |= {"measured": measured.to_dict()}
        text += "\n" + beside(r, measured)
    print(json.dumps(found) if as_json else text)
    return 0 if fits else 1


def _compiled(job: Job, which: str, console: PlainConsole) -> Compiled:
    """A program of the plan, with a note of its progress; `which` one of several it is, if it is."""
    held = first_pass(job).held / 2**30
    if which and not console.is_terminal:
        console.print(f"{which}compiling", highlight=False)
    with console.status("starting the TPU compiler") as status:
        return compile_job(job, lambda text: status.update(f"{which}{text} ({held:.1f} GiB held)"))


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
    rows = f"{job.microbatches} x {job.batch}" if job.microbatches > 1 else f"{job.batch}"
    adapters = f" with adapters of rank {job.lora}" if job.lora else ""
    return (
        f"{model}, {job.workload}{adapters} of {rows} x {job.context:,} tokens, {job.weights} weights, "
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
    remat: str = "full",
) -> tuple[Job, str]:
    """The job, and in words where its layout comes from. Raises ConfigError."""
    slice_, shape = Topology.parse(topology), (workload, batch, context, weights, lora, remat)
    if mesh is not None:
        return Job(cfg, Strategy.parse(mesh), slice_, *shape), mesh
    problem = ""
    for path in shipped(cfg, slice_, workload):
        try:
            job = Job(cfg, Strategy.from_toml(path), slice_, *shape)
        except ConfigError as e:
            problem = f"; {path.name} is not for this: {e}"
            continue
        return job, f"{path.name}, which is shipped"
    name, job = sensible(cfg, slice_, workload, batch, context, weights, lora)
    job = dataclasses.replace(job, remat=remat)
    rules, _, sizes = name.partition(" ")
    where = "the default strategy" if rules == "default" else f"{rules}.toml"
    return job, f"{where} with {sizes or 'one device'}, by a first estimate of all sizes{problem}"


def shipped(cfg: ModelConfig, topology: Topology, workload: str) -> list[Path]:
    """Shipped layouts for a model of these shapes: configs/meshes/PRESET.CHIP-AxB.WORKLOAD[.NOTE].toml.

    Rollouts take those for decoding; GRPO those of its own first, then those for training.
    """
    wanted = {"rollout": ("decode",), "grpo": ("grpo", "train")}.get(workload, (workload,))
    found = []
    for path in sorted((configs_dir() / "meshes").glob("*.*.*.toml")):
        preset, slice_, of, *_ = path.name.removesuffix(".toml").split(".")
        if slice_ != topology.name.replace(":", "-") or of not in wanted or preset not in presets():
            continue
        if _shape(ModelConfig.from_preset(preset)) == _shape(cfg):
            found.append((wanted.index(of), path))
    return [path for _, path in sorted(found)]


def _shape(cfg: ModelConfig) -> tuple[int, ...]:
    return (
        cfg.hidden_size, cfg.num_hidden_layers, cfg.num_attention_heads, cfg.vocab_size,
        cfg.n_routed_experts, cfg.intermediate_size,
    )  # fmt: skip
