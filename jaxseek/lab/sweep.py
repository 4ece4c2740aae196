"""`jaxseek sweep`: many layouts of a step, pruned by a first estimate, compiled, and compared."""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

from jaxseek.config.model import ConfigError, ModelConfig
from jaxseek.hardware import Topology
from jaxseek.lab.analytic import candidates, first_pass
from jaxseek.lab.compile import CompileError, compile_job
from jaxseek.lab.info import read_config
from jaxseek.lab.job import Job
from jaxseek.lab.report import Report, report
from jaxseek.machine.terminal import PlainConsole
from jaxseek.sharding.strategy import Strategy
from jaxseek.storage.place import save_figure

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
        first.setdefault(_table(e), e)
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
    """Those that fit and that none of the same batch beats in both bounds of time, fastest first."""

    def bounds(e: Entry) -> tuple[float, float]:
        assert e.report is not None
        return e.report.upper, e.report.lower

    found: list[Entry] = []
    for batch in sorted({e.job.batch for e in entries}):
        least = math.inf
        for e in sorted((e for e in entries if e.job.batch == batch and fits(e)), key=bounds):
            if bounds(e)[1] < least:
                least = bounds(e)[1]
                found.append(e)
    return found


def fits(e: Entry) -> bool:
    """Whether it was compiled, and fits."""
    return e.report is not None and e.report.fits


def _rates(e: Entry) -> tuple[float, float]:
    """Seconds of a step with nothing overlapped, and tokens per second and device."""
    assert e.report is not None
    return e.report.upper, e.job.tokens / e.report.upper / e.job.topology.num_devices


def verdict(entries: list[Entry]) -> str:
    """The winner for each batch, and in words where the next best loses."""
    out = []
    for batch in sorted({e.job.batch for e in entries}):
        done = [e for e in entries if e.job.batch == batch and fits(e)]
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
        text += "".join(
            f"; WARNING: {e.name}: {w}" for e in done for w in (e.report.warnings if e.report else ())
        )
        first: dict[str, Entry] = {}
        for e in done:
            first.setdefault(_table(e), e)
        rivals = [
            *done[1:2],
            *(e for e in [*first.values()][1:] if e is not done[1]),
        ]  # next, and other tables'
        for other in (e.report for e in rivals):
            assert other is not None
            losses = {
                s: sum(p.values()) - sum(best.scopes.get(s, {}).values()) for s, p in other.scopes.items()
            }
            where = max(losses, key=lambda s: losses[s])
            name = next(e.name for e in rivals if e.report is other)
            text += f"; {name} takes {other.upper * 1e3:.2f} ms, {losses[where] * 1e3:+.2f} in {where}"
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
    cfg, slice_, console = read_config(model), Topology.parse(topology), PlainConsole(stderr=True)
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
        PlainConsole(width=None if console.is_terminal else 150).print(table(done))
        print(verdict(done))
    return 0 if any(map(fits, done)) else 1


def table(entries: list[Entry]) -> Table:
    """One row for each layout, the fastest first; * marks those that none beats in both bounds of time."""
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
            f"{r.lower * 1e3:.2f} to {r.upper * 1e3:.2f}" + ("?" if r.warnings else ""),
            f"{r.core_cycles / 1e6:.1f}",
            f"{_rates(e)[1]:,.1f}",
            f"{r.job.tokens / r.job.batch / r.upper:,.1f}",
            f"{scope}, {sum(parts.values()) * 1e3:.2f} ms",
        )
    return t


MARKERS = "osD^vP*X"


def draw(title: str, entries: list[Entry], path: str | Path) -> None:
    """For each batch, both bounds of a step's time, memory as colour and rule tables as markers; those that
    none beats in both bounds are joined, the best are named, and the winner is ringed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    done = [e for e in entries if e.report]
    batches = sorted({e.job.batch for e in done})
    tables = list(dict.fromkeys(map(_table, done)))
    gib = [e.report.memory["peak"] / 2**30 for e in done if e.report]
    usable = entries[0].job.topology.chip.device.usable / 2**30
    most = max(len(_named(entries, b)) for b in batches) if batches else 0
    figure, axes = plt.subplots(
        1, max(1, len(batches)), figsize=(5.4 * max(1, len(batches)) + 1.2, 5.0 + 0.2 * most),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    figure.suptitle(title, fontsize=11)
    dots = None
    for ax, batch in zip(axes[0], batches):
        some = [e for e in done if e.job.batch == batch]
        best = min((e.report.upper for e in some if e.report and fits(e)), default=math.inf)
        seen = [e for e in some if e.report and e.report.upper <= 6 * best]
        for e in seen:
            assert e.report is not None
            at = _bounds(e)
            colour = {"c": [e.report.memory["peak"] / 2**30], "vmin": min(gib), "vmax": max(*gib, usable)}
            marker = MARKERS[tables.index(_table(e)) % len(MARKERS)]
            dots = ax.scatter(
                *at, **colour, s=52, cmap="viridis_r", marker=marker, edgecolors="0.3", linewidths=0.5
            )
            if not e.report.fits:
                ax.scatter(*at, marker="x", c="red", s=90)
        front = [e for e in pareto(entries) if e.job.batch == batch]
        ax.plot(*zip(*map(_bounds, front)), color="0.5", zorder=0) if front else None
        notes = []
        for i, e in enumerate(_named(entries, batch), 1):
            at = _bounds(e)
            beside = (-13, -13) if e in front else (6, -14)
            ax.annotate(str(i), at, beside, textcoords="offset points", fontsize=10, weight="bold")
            notes.append(
                f"{i}  {e.name}: {at[0]:.1f} to {at[1]:.1f} ms, {e.job.tokens / at[1] * 1e3:,.0f} tokens/s"
            )
        if front:
            ax.scatter(*_bounds(front[0]), s=210, facecolors="none", edgecolors="#D55E00", linewidths=2)
        hidden = len(some) - len(seen)
        ax.set_title(
            f"batch {batch}" + (f" ({hidden} slower by more than 6x)" if hidden else ""), fontsize=10
        )
        ax.set(xscale="log", yscale="log", xlabel="ms per step, all overlapped\n" + "\n".join(notes))
        ax.xaxis.label.set(fontsize=8.5, linespacing=1.5)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(
                ScalarFormatter() if _near(axis.get_view_interval()) else NullFormatter()
            )
        ax.tick_params(which="both", labelsize=8)
        ax.margins(0.09)
        ax.grid(alpha=0.25, which="both")
    axes[0][0].set_ylabel("ms per step, nothing overlapped")
    for i, name in enumerate(tables):
        axes[0][-1].scatter([], [], marker=MARKERS[i % len(MARKERS)], c="0.6", edgecolors="0.3", label=name)
    axes[0][-1].scatter(
        [], [], s=120, facecolors="none", edgecolors="#D55E00", linewidths=2, label="least time in turn"
    )
    axes[0][-1].legend(fontsize=8, loc="lower right")
    if dots is not None:
        figure.colorbar(dots, ax=axes[0][-1], label=f"GiB per device, of {usable:.2f}; x does not fit")
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def _bounds(e: Entry) -> tuple[float, float]:
    assert e.report is not None
    return e.report.lower * 1e3, e.report.upper * 1e3


def _near(interval: Any) -> bool:
    return interval[1] < 4 * interval[0]


def _named(entries: list[Entry], batch: int) -> list[Entry]:
    """The front of a batch and the best of every rule table, without those that differ by less than 2 % from
    one before: numbers beside them would overlap."""
    done = [e for e in entries if e.job.batch == batch and fits(e)]
    first: dict[str, Entry] = {}
    for e in sorted(done, key=lambda e: _bounds(e)[1]):
        first.setdefault(_table(e), e)
    named: list[Entry] = []
    for e in [*(e for e in pareto(done)), *first.values()]:
        if _bounds(e)[1] > 6 * min(_bounds(f)[1] for f in first.values()):
            continue
        if all(max(abs(a / b - 1) for a, b in zip(_bounds(e), _bounds(n))) > 0.02 for n in named):
            named.append(e)
    return named


def _table(e: Entry) -> str:
    """The rule table of an entry's name; sizes or a file given by hand have none."""
    return e.name.split()[0] if " " in e.name else "given"
