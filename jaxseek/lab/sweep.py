"""`jaxseek sweep`: many layouts of a step, pruned by a first estimate, compiled, and compared."""

from __future__ import annotations

import concurrent.futures
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from jaxseek.config import ConfigError, ModelConfig
from jaxseek.info import read_config
from jaxseek.lab.analytic import candidates, first_pass
from jaxseek.lab.chips import Topology
from jaxseek.lab.compile import CompileError, compile_job
from jaxseek.lab.job import Job
from jaxseek.lab.report import Report, report
from jaxseek.sharding import Strategy

COMPILE_BYTES = 3 * 2**30  # what one compilation of a 671B step takes at most, and more


@dataclass(frozen=True)
class Entry:
    """A layout with what came of it: a report, or why there is none."""

    name: str
    job: Job
    report: Report | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        found = {"layout": self.name, "batch": self.job.batch, "context": self.job.context}
        return found | (self.report.to_dict() if self.report else {"reason": self.reason})


def layouts(
    cfg: ModelConfig,
    topology: Topology,
    workload: str,
    batch: int,
    context: int,
    weights: str,
    meshes: Sequence[str],
) -> list[Entry]:
    """The jobs of these meshes, or else of the shipped rule tables with every split of the slice; one of
    those that are the same layout by other names."""
    shape = (topology, workload, batch, context, weights)
    given = ((m, Job(cfg, Strategy.parse(m), *shape)) for m in meshes)
    found: dict[Any, Entry] = {}
    for name, job in given if meshes else candidates(cfg, *shape):
        found.setdefault(_signature(job), Entry(name, job))
    return list(found.values())


def _signature(job: Job) -> Any:
    """What a layout is but for the names of its axes: neighbours that only ever split together are one."""
    axes = [(a, n) for a, n in job.strategy.sizes if n > 1]
    without = ("kv_heads", "q_groups") if job.cfg.is_mla else ("heads", "latent", "q_lora")
    rules = [job.strategy.weights, job.rules] + ([job.strategy.decode] if job.phase == "prefill" else [])
    splits = [{name: of for name, of in r.table if of and name not in without} for r in rules]
    merged: list[tuple[str, int]] = []
    for a, n in axes:
        last = merged[-1][0] if merged else ""
        together = all((a in of) == (last in of) for table in splits for of in table.values())
        if last and together:
            splits = [{k: tuple(x for x in of if x != a) for k, of in table.items()} for table in splits]
            merged[-1] = (last, merged[-1][1] * n)
        else:
            merged.append((a, n))
    index = {a: i for i, (a, _) in enumerate(merged)}
    named = [sorted((k, [index[a] for a in of]) for k, of in table.items()) for table in splits]
    return repr(([n for _, n in merged], [r.dispatch for r in rules], named))


def prune(entries: list[Entry], keep: int) -> tuple[list[Entry], list[Entry]]:
    """The `keep` layouts of the least estimated time that can fit, among them the best of every rule table,
    and the others with the reason."""
    usable, fitting, out = entries[0].job.topology.chip.device.usable if entries else 0, [], []
    for e in entries:
        estimate = first_pass(e.job)
        if estimate.held > usable:
            out.append(Entry(e.name, e.job, None, f"holds {estimate.held / 2**30:.1f} GiB per device"))
        else:
            fitting.append((estimate.seconds, e))
    fitting.sort(key=lambda f: f[0])
    first: dict[str, Entry] = {}
    for _, e in fitting:
        first.setdefault(e.name.split()[0], e)
    wanted = [*first.values(), *(e for _, e in fitting if e not in first.values())][:keep]
    for seconds, e in fitting:
        if e not in wanted:
            text = f"estimated at {seconds * 1e3:.1f} ms, the best at {fitting[0][0] * 1e3:.1f}"
            out.append(Entry(e.name, e.job, None, text))
    return [e for _, e in fitting if e in wanted], out


def workers() -> int:
    """Compilations at a time: within the memory that is free, and a core each."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, int(pages // COMPILE_BYTES)))


def run(entries: list[Entry], advance: Callable[[Entry], None]) -> list[Entry]:
    """Every entry compiled and reported; what was compiled before is there at once."""

    def one(e: Entry) -> Entry:
        try:
            done = Entry(e.name, e.job, report(e.job, compile_job(e.job)))
        except CompileError as error:
            done = Entry(e.name, e.job, None, str(error).splitlines()[0])
        advance(done)
        return done

    with concurrent.futures.ThreadPoolExecutor(workers()) as pool:
        return list(pool.map(one, entries))


def pareto(entries: list[Entry]) -> list[Entry]:
    """Those that fit and than which none is both faster for a sequence and cheaper for a token."""
    fits = [e for e in entries if e.report and e.report.fits]

    def better(a: Entry, b: Entry) -> bool:
        (ta, ra), (tb, rb) = _rates(a), _rates(b)
        return ta <= tb and ra >= rb and (ta, ra) != (tb, rb)

    front = {_rates(e): e for e in reversed(fits) if not any(better(o, e) for o in fits)}
    return sorted(front.values(), key=_rates)


def _rates(e: Entry) -> tuple[float, float]:
    """Seconds of a step with nothing overlapped, and tokens per second and device."""
    assert e.report is not None
    return e.report.upper, e.job.tokens / e.report.upper / e.job.topology.num_devices


def verdict(entries: list[Entry]) -> str:
    """The winner for each batch, and in words where the next best loses."""
    out = []
    for batch in sorted({e.job.batch for e in entries}):
        done = [e for e in entries if e.job.batch == batch and e.report and e.report.fits]
        done.sort(key=lambda e: _rates(e)[0])
        if not done:
            out.append(f"batch {batch}: nothing fits")
            continue
        best = done[0].report
        assert best is not None
        scope, parts = next(iter(best.scopes.items()))
        text = (
            f"batch {batch}: {done[0].name}, {best.lower * 1e3:.2f} to {best.upper * 1e3:.2f} ms a step; "
            f"{sum(parts.values()) / best.upper:.0%} of it is {scope}"
        )
        if len(done) > 1:
            other = done[1].report
            assert other is not None
            losses = {
                s: sum(p.values()) - sum(best.scopes.get(s, {}).values()) for s, p in other.scopes.items()
            }
            where = max(losses, key=lambda s: losses[s])
            text += (
                f"; {done[1].name} takes {other.upper * 1e3:.2f} ms, {losses[where] * 1e3:+.2f} in {where}"
            )
        out.append(text)
    return "\n".join(out)


def sweep(
    model: str,
    topology: str,
    meshes: Sequence[str],
    workload: str,
    batches: Sequence[int],
    context: int,
    weights: str,
    keep: int,
    as_json: bool = False,
    plot: str | None = None,
) -> int:
    """Compare layouts and print the table. Returns 1 where nothing fits."""
    cfg, slice_, console = read_config(model), Topology.parse(topology), Console(stderr=True)
    chosen, left = [], []
    for batch in batches:
        some, rest = prune(layouts(cfg, slice_, workload, batch, context, weights, meshes), keep)
        chosen += some
        left += rest
    if not chosen:
        raise ConfigError(
            f"no layout of {model} can fit {slice_.name} with these batches and context {context}"
        )
    console.print(f"{len(chosen)} to compile, {len(left)} left out by a first estimate", highlight=False)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=len(chosen))
        done = run(chosen, lambda e: progress.update(task, advance=1, description=e.name[:50]))
    if plot:
        draw(f"{model}, {workload} on {slice_.name}, {weights} weights, context {context:,}", done, plot)
    if as_json:
        print(json.dumps({"entries": [e.to_dict() for e in done], "left_out": [e.to_dict() for e in left]}))
    else:
        Console(width=None if console.is_terminal else 150).print(table(done))
        print(verdict(done))
    return 0 if any(e.report and e.report.fits for e in done) else 1


def table(entries: list[Entry]) -> Table:
    """One row for each layout, the fastest first; * marks those that none beats in both."""
    t, best = Table(), {id(e) for e in pareto(entries)}
    for name in (
        "",
        "layout",
        "batch",
        "GiB",
        "ms",
        "M cycles",
        "tok/s/chip",
        "tok/s/sequence",
        "dearest scope",
    ):
        t.add_column(name, no_wrap=name != "dearest scope")
    for e in sorted(entries, key=lambda e: (e.report is None, e.report.upper if e.report else 0.0)):
        r = e.report
        if r is None:
            t.add_row("", e.name, str(e.job.batch), "", "", "", "", "", e.reason)
            continue
        scope, parts = next(iter(r.scopes.items()))
        t.add_row(
            "*" if id(e) in best else "",
            e.name,
            str(e.job.batch),
            f"{r.memory['peak'] / 2**30:.1f}" + ("" if r.fits else "!"),
            f"{r.lower * 1e3:.2f} to {r.upper * 1e3:.2f}",
            f"{r.core_cycles / 1e6:.1f}",
            f"{_rates(e)[1]:,.1f}",
            f"{r.job.tokens / r.job.batch / r.upper:,.1f}",
            f"{scope}, {sum(parts.values()) * 1e3:.2f} ms",
        )
    return t


def draw(title: str, entries: list[Entry], path: str | Path) -> None:
    """Latency against throughput, memory as colour; the front is joined, and its layouts are named."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    done = [e for e in entries if e.report]
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    points = [_rates(e) for e in done]
    gib = [e.report.memory["peak"] / 2**30 for e in done if e.report]
    dots = axes.scatter([t * 1e3 for t, _ in points], [r for _, r in points], c=gib, s=60, cmap="viridis")
    for e, (t, r) in zip(done, points):
        if e.report and not e.report.fits:
            axes.scatter([t * 1e3], [r], marker="x", c="red", s=90)
    front = pareto(entries)
    axes.plot([_rates(e)[0] * 1e3 for e in front], [_rates(e)[1] for e in front], color="grey", zorder=0)
    for i, e in enumerate(front, 1):
        at = (_rates(e)[0] * 1e3, _rates(e)[1])
        axes.annotate(str(i), at, (7, -3), textcoords="offset points", fontsize=9, weight="bold")
        axes.plot([], [], " ", label=f"{i}  batch {e.job.batch}: {e.name}, {at[0]:.1f} ms")
    usable = entries[0].job.topology.chip.device.usable / 2**30
    figure.colorbar(dots, label=f"GiB per device, of {usable:.2f}; x does not fit")
    axes.set(yscale="log", xlabel="ms per step, nothing overlapped", ylabel="tokens/s per device")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3, which="both")
    if front:
        figure.legend(loc="outside lower left", fontsize=8, handlelength=0, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
