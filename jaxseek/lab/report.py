"""Report a compiled step: time by kind and scope, bounds, rates, costliest operations, collectives."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from jaxseek.hardware import Topology
from jaxseek.lab.analytic import Estimate, first_pass, touched_experts
from jaxseek.lab.collectives import Coords, cost, mesh_axes
from jaxseek.lab.compile import Compiled
from jaxseek.lab.hlo import Op, Program, read_program
from jaxseek.lab.job import TOKENS_PER_DISPATCH, Job
from jaxseek.storage.place import save_figure

KINDS: tuple[str, ...] = ("xla", "pallas", "collective", "copy")


@dataclass(frozen=True)
class Timed:
    """An operation with the seconds of all its executions and, for a collective, its mesh axes."""

    op: Op
    seconds: float
    axes: str = ""


@dataclass(frozen=True)
class Report:
    """One step on one device. `lower` overlaps all kinds of work, `upper` none; both in seconds.

    `xla` and `pallas` share the core, so their `seconds` add up; prefetches from HBM (`copy`) and collectives
    that the schedule starts ahead may overlap with them. The core waits `awaited` seconds for all other
    collectives: with those, `lower` is out of reach, and `expected` adds them. `dispatch` is the time outside
    the loop over decode steps, once per dispatch.
    """

    job: Job
    estimate: Estimate
    memory: dict[str, float]
    cycles: int
    seconds: dict[str, float]
    scopes: dict[str, dict[str, float]]
    operations: list[Timed]
    dispatch: float
    left_out: dict[str, list[str]]
    awaited: float = 0.0
    compile_seconds: float = 0.0

    @property
    def expected(self) -> float:
        return max(self.seconds["xla"] + self.seconds["pallas"] + self.awaited, self.lower)

    @property
    def lower(self) -> float:
        s = self.seconds
        return max(s["xla"] + s["pallas"], s["collective"], s["copy"], self.estimate.limit)

    @property
    def upper(self) -> float:
        return max(sum(self.seconds.values()), self.lower)

    @property
    def fits(self) -> bool:
        return self.memory["peak"] <= self.job.topology.chip.device.usable

    @property
    def kernel_calls(self) -> int:
        """Pallas calls per step."""
        return sum(t.op.times for t in self.operations if t.op.kind == "pallas")

    @property
    def warnings(self) -> list[str]:
        """Reasons why the figures may be far too low."""
        loops = self.left_out["loops_counted_once"]
        if not loops:
            return []
        names = ", ".join(loops[:5]) + (", ..." if len(loops) > 5 else "")
        return [
            f"{len(loops)} loop(s) of unknown length ({names}) counted as one turn: times here are too low"
        ]

    @property
    def core_cycles(self) -> float:
        """Cycles of XLA code plus the kernels' cost estimates in cycles."""
        return self.cycles + self.seconds["pallas"] * self.job.topology.chip.clock

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; rates are pairs [at `upper`, at `lower`]."""
        job, e, chips = self.job, self.estimate, math.prod(self.job.topology.dims)
        rates = [job.tokens / t for t in (self.upper, self.lower)]
        return {
            "topology": job.topology.name,
            "mesh": {a: n for a, n in job.strategy.sizes if n > 1},
            "workload": job.workload,
            "batch": job.batch,
            "context": job.context,
            "weights": job.weights,
            "bytes_per_device": self.memory | {"hbm": job.topology.chip.device.usable},
            "fits": self.fits,
            "cycles": {"xla": self.cycles, "core": self.core_cycles},
            "kernel_calls": self.kernel_calls,
            "seconds": self.seconds
            | {"lower": self.lower, "upper": self.upper, "per_dispatch": self.dispatch},
            "expected_ms": self.expected * 1e3,
            "warnings": self.warnings,
            "roofline": {
                "hbm_seconds": e.hbm_seconds,
                "flops_seconds": e.flops_seconds,
                "limit_seconds": e.limit,
                "fraction": [e.limit / self.upper, e.limit / self.lower],
            },
            "tokens_per_second": {
                "per_chip": [r / chips for r in rates],
                "per_sequence": [r / job.batch / job.microbatches for r in rates],
            },
            "scopes": self.scopes,
            "dearest": [_row(t) for t in self.operations[:10]],
            "collectives": [_row(t) for t in self.operations if t.op.kind == "collective"],
            "left_out": self.left_out,
            "compile_seconds": self.compile_seconds,
        }


def _row(t: Timed) -> dict[str, Any]:
    o = t.op
    row = {
        "name": o.name, "kind": o.kind, "opcode": o.opcode, "scope": o.scope, "times": o.times,
        "primitive": o.what, "seconds": t.seconds, "cycles": o.cycles, "bytes": o.bytes,
    }  # fmt: skip
    return row | ({"axes": t.axes, "algorithm": o.algorithm} if o.kind == "collective" else {})


def report(job: Job, compiled: Compiled) -> Report:
    """Report the cost of a compiled job."""
    given, m = compiled.given, compiled.memory
    memory = {
        "weights": given["weights"],
        "cache": given.get("cache", 0.0),
        "optimizer": given.get("optimizer", 0.0),
        "padding": m["argument"] - sum(given.values()),  # tile padding and small inputs
        "new_outputs": float(m["output"] - m["alias"]),
        "temp": float(m["temp"]),
        "code": float(m["generated_code"]),
        "peak": float(compiled.peak),
    }
    program = read_program(compiled.text)
    return summarise(job, program, memory, compiled.coords, sum(compiled.seconds.values()))


def summarise(
    job: Job, program: Program, memory: dict[str, float], coords: Coords, compile_seconds: float = 0.0
) -> Report:
    """Report on a program that has been parsed."""
    decoding = job.phase == "decode"
    timed = [_time(op, job.topology, coords, job) for op in program.ops]
    step = [t for t in timed if not (decoding and t.op.dispatch)]
    seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    scopes: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(KINDS, 0.0))
    for t in step:
        seconds[t.op.kind] += t.seconds
        scopes[t.op.scope or "other"][t.op.kind] += t.seconds
    return Report(
        job=job,
        estimate=first_pass(job),
        memory=memory,
        cycles=sum(t.op.cycles * t.op.times for t in step if t.op.kind == "xla"),
        seconds=seconds,
        scopes=dict(sorted(scopes.items(), key=lambda kv: -sum(kv[1].values()))),
        operations=sorted(step, key=lambda t: -t.seconds),
        awaited=sum(t.seconds for t in step if t.op.awaited),
        dispatch=sum(t.seconds for t in timed) - sum(t.seconds for t in step),
        left_out={
            "no_cycles": program.sentinels,
            "loops_counted_once": program.loops[1:] if decoding else program.loops,
            "kernels_without_estimate": program.kernels_without_estimate,
        },
        compile_seconds=compile_seconds,
    )


def _time(op: Op, topology: Topology, coords: Coords, job: Job) -> Timed:
    chip = topology.chip.device
    if op.kind == "collective":
        axes = mesh_axes(op.groups, job.strategy.sizes)
        return Timed(op, cost(op, topology, coords).seconds * op.times, axes)
    if op.kind == "xla":
        return Timed(op, op.cycles / chip.clock * op.times)
    seconds = max(op.flops / chip.peak["bf16"], op.bytes / chip.hbm_bandwidth)
    if op.kind == "pallas":
        seconds *= filled(job) if re.match(r"t?gmm\b", op.name) else 1.0
        if re.match(r"chosen_experts\b", op.name):  # its own estimate is for the average chip
            mean, most = touched_experts(job)
            seconds *= most / mean
        seconds = max(seconds, chip.operation_cycles / chip.clock)  # a call takes no less than any operation
    return Timed(op, seconds * op.times)


def filled(job: Job) -> float:
    """Share of a chip's padded rows that hold tokens when the load is even.

    megablox's cost estimate counts all rows, but it multiplies only those with tokens.
    """
    rules, cfg = job.rules, job.cfg
    parts = job.strategy.parts(rules, "expert")
    if not rules.exchanges:
        return 1 / parts  # rows of all tokens; those for other chips' experts come last
    K, S = cfg.num_experts_per_tok, cfg.n_routed_experts + job.strategy.redundant_experts
    room = parts * min(K, S // parts) / K  # in units of the even share
    if rules.room_factor is not None:
        room = min(room, rules.room_factor)
    if rules.capacity_factor is not None:
        room = min(room, rules.capacity_factor)
    return min(1.0, 1 / room)


# -------------------------------------------------------------------- output


def lines(title: str, r: Report, memory: list[str] | None = None) -> str:
    """Format the report as text; `memory` replaces the lines on the program's own memory."""
    s, e = {k: v * 1e3 for k, v in r.seconds.items()}, r.estimate
    reached = [e.limit / r.upper, e.limit / r.lower]
    chips = math.prod(r.job.topology.dims)
    rates = [r.job.tokens / r.upper, r.job.tokens / r.lower]
    waits = f"; {r.awaited * 1e3:.3f} of {s['collective']:.3f} ms of collectives are waited for"
    waits = waits if s["collective"] else ""
    sequences = r.job.batch * r.job.microbatches
    floors = f"HBM {e.hbm_seconds * 1e3:.3f}, flops {e.flops_seconds * 1e3:.3f}"
    out = [
        title,
        *(memory or [_memory(r)]),
        f"  step     {r.expected * 1e3:.3f} ms; {r.lower * 1e3:.3f} with all overlapped, {r.upper * 1e3:.3f} "
        f"with nothing{waits}",
        *(f"  WARNING  {warning}" for warning in r.warnings),
        f"           XLA {s['xla']:.3f} ms ({r.cycles / 1e6:.2f} M cycles), kernels {s['pallas']:.3f} "
        f"({r.kernel_calls:,} calls), "
        f"collectives {s['collective']:.3f}, prefetch {s['copy']:.3f}",
        f"  limit    {e.limit * 1e3:.3f} ms ({floors}), {reached[0]:.0%} to {reached[1]:.0%} reached",
        f"  tokens/s {_range([x / chips for x in rates])} per chip, "
        f"{_range([x / sequences for x in rates])} per sequence",
    ]
    if r.dispatch:
        out.append(f"  and      {r.dispatch * 1e3:.3f} ms once per dispatch of {TOKENS_PER_DISPATCH} steps")
    out.append("  by scope (ms: XLA, kernels, collectives, prefetch)")
    for scope, times in list(r.scopes.items())[:10]:
        out.append(f"    {scope:24s} " + "  ".join(f"{times[k] * 1e3:8.3f}" for k in KINDS))
    out.append("  dearest operations (us over all turns)")
    for t in r.operations[:10]:
        o = t.op
        out.append(
            f"    {t.seconds * 1e6:10.1f} {o.times:4d} x {o.kind:10s} {o.scope:22s} {o.what} ({o.name})"
        )
    out.append("  collectives (us over all turns; bytes of a device's operand)")
    for t, count in _alike(r.operations):
        o = t.op
        each = f"{o.times} x" if count == 1 else f"{count} x {o.times} x"
        size = f"{o.bytes / 1024:.1f} KiB over {t.axes}"
        out.append(f"    {t.seconds * count * 1e6:10.1f} {each:>12s} {o.opcode:18s} {size:34s} {o.scope}")
    for what, names in r.left_out.items():
        if names and what != "loops_counted_once":  # the warning above names those loops
            out.append(f"  {what.replace('_', ' ')}: {len(names)} ({', '.join(names[:5])})")
    return "\n".join(out)


def _memory(r: Report) -> str:
    """Format the program's memory on one device."""
    gib, m, usable = 2**30, r.memory, r.job.topology.chip.device.usable
    parts = ", ".join(f"{k} {m[k] / gib:.2f}" for k in ("weights", "cache", "optimizer", "temp") if m[k])
    fits = "fits" if r.fits else "DOES NOT FIT"
    return f"  memory   peak {m['peak'] / gib:.2f} of {usable / gib:.2f} GiB per device ({parts}): {fits}"


def _alike(operations: list[Timed]) -> list[tuple[Timed, int]]:
    """Group equal collectives as (one of them, their number), costliest first."""
    kinds: dict[tuple, list[Timed]] = defaultdict(list)
    for t in operations:
        if t.op.kind == "collective":
            kinds[t.op.opcode, t.op.bytes, t.axes, t.op.scope, t.op.times].append(t)
    return sorted(((ts[0], len(ts)) for ts in kinds.values()), key=lambda k: -k[0].seconds * k[1])


def _range(values: list[float]) -> str:
    return " to ".join(f"{v:,.1f}" for v in values)


def draw(title: str, r: Report, path: str) -> None:
    """Plot memory by kind, and time by scope."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=[1, 2.6], layout="constrained")
    figure.suptitle("\n".join([title, *(f"WARNING: {w}" for w in r.warnings)]), fontsize=11)
    bottom = 0.0
    for name in ("weights", "cache", "optimizer", "padding", "new_outputs", "temp", "code"):
        gib = r.memory[name] / 2**30
        if gib > 0.001:
            left.bar(0, gib, bottom=bottom, width=0.6, label=f"{name.replace('_', ' ')} {gib:.2f}")
            bottom += gib
    usable = r.job.topology.chip.device.usable / 2**30
    left.axhline(usable, color="black", linewidth=1, linestyle="--")
    left.text(0.32, usable, f"{usable:.2f}", va="bottom", fontsize=8)
    left.set(xticks=[], xlim=(-0.5, 0.5), ylabel="GiB per device", ylim=(0, max(usable, bottom) * 1.1))
    left.legend(fontsize=8, loc="upper left")
    names = list(r.scopes)[:9][::-1]
    start = [0.0] * len(names)
    for kind, label in zip(KINDS, ("XLA", "kernels", "collectives", "prefetch")):
        values = [r.scopes[n][kind] * 1e3 for n in names]
        if any(values):
            right.barh(names, values, left=start, label=label)
            start = [a + b for a, b in zip(start, values)]
    values = (r.estimate.limit, r.lower, r.expected, r.upper)
    for value, label in zip(values, ("roofline", "overlapped", "expected", "in turn")):
        right.plot([], [], " ", label=f"{label}: {value * 1e3:.2f} ms")
    right.set(xlabel="ms per step")
    right.legend(fontsize=8, loc="lower right")
    save_figure(figure, path, dpi=130)
    plt.close(figure)
