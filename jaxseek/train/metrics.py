"""Metrics of a run: metrics.jsonl and its copies, loss.png, a progress line, and the fraction of peak FLOPs.

Metrics are numbers by name. The plot and the progress line know `loss`, `eval_loss`, `learning_rate`,
`tokens_per_second`, `mfu` (`train_flops` per second / `peak_flops`), `load_max_over_mean` and `dropped`.
Steps count from 0. On several hosts the first one writes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxseek.config.model import ConfigError, ModelConfig
from jaxseek.config.run import LogConfig
from jaxseek.hardware import chip_of
from jaxseek.machine.terminal import PlainConsole
from jaxseek.storage.place import Log, Place, place, save_figure, write_text
from jaxseek.storage.untrusted import expect, parse_json
from jaxseek.train.scaling import attention_flops_per_token
from jaxseek.train.tensorboard import TensorBoard

log = logging.getLogger("jaxseek")

FILE, PLOT = "metrics.jsonl", "loss.png"


@dataclass(frozen=True)
class Evaluated:
    """An evaluation: values by name, the text that tells them, and the loss that checkpoints compare."""

    values: dict[str, float]
    text: str
    loss: float
    enough: bool = False  # the run may end here


def summarize(metrics: Mapping[str, Any], load_LE: Any = None) -> dict[str, float]:
    """Fetch a step's metrics as floats; the experts' load, if given, adds `load_max_over_mean`.

    It divides the load of a layer's busiest expert by the mean over its experts, and averages that over
    layers: 1 is even (it is 1 + MaxVio of arXiv:2408.15664, section 4.1).
    """
    metrics, load_LE = jax.device_get((dict(metrics), load_LE))
    out = {name: float(value) for name, value in metrics.items()}
    if load_LE is not None:
        load_LE = np.asarray(load_LE, np.float64)
        mean_L = np.maximum(load_LE.mean(axis=1), np.finfo(np.float64).tiny)
        out["load_max_over_mean"] = float((load_LE.max(axis=1) / mean_L).mean())
    return out


# -------------------------------------------------------------------- records


class MetricsLog:
    """Appends records to metrics.jsonl in the run's directory, and to TensorBoard and wandb as configured.

    A run that continues from `resume_step` first cuts off the records of that step and later ones. Raises
    ConfigError if `log.wandb` names a project and wandb is not installed. Later on nothing raises: if
    metrics.jsonl cannot be written, `failed` says why, and the run goes on without what else cannot.
    """

    def __init__(self, directory: str | Place, cfg: LogConfig, resume_step: int = 0):
        self._file, self.failed = None, ""
        self._others: dict[str, Any] = {}  # with `write(step, values)` and `close()`
        if cfg.wandb and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                f"log.wandb is {cfg.wandb!r}, but wandb is not installed: pip install wandb, or take it out"
            )
        if jax.process_index() != 0:
            return
        directory = place(directory)
        _cut(directory / FILE, resume_step)
        self._file = Log(directory / FILE)
        if cfg.wandb:
            self._others["wandb"] = _Wandb(directory, cfg.wandb)
        if cfg.tensorboard:
            self._try("TensorBoard", lambda: self._open_tensorboard(directory, resume_step))

    def _open_tensorboard(self, directory: Place, resume_step: int) -> None:
        self._others["TensorBoard"] = TensorBoard(directory / "tensorboard", resume_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a record; numbers that are not finite become null."""
        if self._file is None:
            return
        numbers = {name: float(f"{float(value):.8g}") for name, value in values.items()}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        record = {"step": step, "time": round(time.time(), 3)} | {n: finite.get(n) for n in numbers}
        self._try("", lambda: self._file and self._file.add(json.dumps(record)))
        for name, other in list(self._others.items()):
            self._try(name, lambda other=other: other.write(step, finite))

    def flush(self) -> None:
        """Write out every record, before a checkpoint that is newer than they are."""
        self._try("", lambda: self._file and self._file.flush())

    def close(self) -> None:
        """Write out everything and close; a second call does nothing."""
        for name, other in list(self._others.items()):
            self._try(name, other.close)
        self._try("", lambda: self._file and self._file.close())
        self._file, self._others = None, {}

    def _try(self, name: str, act: Callable[[], Any]) -> None:
        """Call a writer. If it raises, drop it and say so once; metrics.jsonl ("") is not done without."""
        try:
            act()
        except Exception as e:  # writers raise exceptions of many kinds
            why = f"{type(e).__name__}: {str(e)[:300]}"
            if not name:
                self.failed = self.failed or f"{FILE} cannot be written ({why})"
                return
            log.warning("%s cannot be written (%s); the run goes on without it", name, why)
            if name in self._others:
                with contextlib.suppress(Exception):
                    self._others.pop(name).close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def read_metrics(directory: str | Place) -> Iterator[dict[str, Any]]:
    """Read a run's records in order, without a last line that was cut short."""
    path = place(directory) / FILE
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            if line:
                yield expect(parse_json(line, where), {"step": int}, where)
        except ValueError as error:
            if number < len(lines):
                log.warning("%s: it is left out", error)


def _cut(path: Place, step: int) -> None:
    """Drop the records of `step` and later; a crash leaves the old file or the new one."""
    if path.is_file():
        write_text(path, "".join(json.dumps(r) + "\n" for r in read_metrics(path.parent) if r["step"] < step))


class _Wandb:
    """This directory's wandb run; the directory keeps its id, so that a resumed run continues it."""

    def __init__(self, directory: Place, project: str):
        wandb: Any = importlib.import_module("wandb")
        name = directory / "wandb_id"
        if not name.is_file():
            write_text(name, uuid.uuid4().hex[:8])
        run_id = name.read_text(encoding="utf-8").strip()
        files = str(directory) if isinstance(directory, Path) else None  # None: wandb chooses
        called = directory.resolve().name
        self._run = wandb.init(project=project, name=called, dir=files, id=run_id, resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


# -------------------------------------------------------------------- the plot


def plot_loss(directory: str | Place) -> Place:
    """Draw loss.png from metrics.jsonl: losses, learning rate and, for experts, their load.

    Raises ValueError if no record has a loss.
    """
    from matplotlib.figure import Figure  # a third of a second to import; without pyplot it draws with Agg

    directory = place(directory)
    path = directory / PLOT
    if jax.process_index() != 0:
        return path
    records = list(read_metrics(directory))
    steps, loss = series(records, "loss")
    eval_steps, eval_loss = series(records, "eval_loss")
    if not steps and not eval_steps:
        raise ValueError(f"{directory / FILE} has no loss to plot")
    load_steps, load = series(records, "load_max_over_mean")
    fig, panels = Figure(figsize=(8, 6.4 if load else 4.5), dpi=130, layout="constrained"), 1 + bool(load)
    axes: Any = fig.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=[3, 1][:panels])
    top = axes[0, 0]
    curve(top, steps, loss, "tab:blue", "train")
    top.plot(eval_steps, eval_loss, "o-", color="tab:orange", markersize=4, linewidth=1, label="eval")
    top.set_ylabel("loss")
    rate_steps, rate = series(records, "learning_rate")
    if rate:
        right = top.twinx()
        right.plot(rate_steps, rate, "--", color="0.55", linewidth=1)
        right.set_ylim(bottom=0)
        right.set_ylabel("learning rate", color="0.45")
        right.ticklabel_format(axis="y", scilimits=(0, 0))
        right.tick_params(colors="0.45")
        right.spines["top"].set_visible(False)
        top.plot([], [], "--", color="0.55", linewidth=1, label="learning rate")
    top.legend(frameon=False)
    top.set_title(directory.resolve().name)
    if load:
        curve(axes[1, 0], load_steps, load, "tab:green", "")
        axes[1, 0].axhline(1, color="0.7", linewidth=0.8)
        axes[1, 0].set_ylabel("expert load,\nmax / mean")
    axes[-1, 0].set_xlabel("step")
    for ax in axes[:, 0]:
        ax.grid(alpha=0.25)
        ax.spines["top"].set_visible(False)
    save_figure(fig, path)
    return path


def series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return [s for s, _ in found], [v for _, v in found]


def curve(ax: Any, steps: list[int], values: list[float], color: str, label: str) -> None:
    """Plot the values, faint, and their moving mean over a fiftieth of all, over fewer at both ends."""
    at, sums = np.arange(len(values)), np.cumsum([0.0, *values])
    half = np.minimum(np.minimum(at, at[::-1]), len(values) // 100)
    smooth = (sums[at + half + 1] - sums[at - half]) / (2 * half + 1)
    ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    ax.plot(steps, smooth, color=color, linewidth=1.6, label=label)


# -------------------------------------------------------------------- the terminal


class Progress:
    """Shows steps, time left, loss and speed: a bar in a terminal, elsewhere a line every few seconds.

    A context manager: call `update` after each step, `note` for a line that stays. It stops showing where
    that cannot be written, such as in a terminal that was closed.
    """

    def __init__(self, steps: int, start: int = 0, seconds: float = 5.0, console: Any = None):
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self.steps, self.seconds = steps, seconds
        self.console = console or PlainConsole(highlight=False, force_jupyter=False)
        self._quiet, self._bar, self._line, self._shown = jax.process_index() != 0, None, "", 0.0
        self._times: deque[tuple[float, int]] = deque(maxlen=50)
        if self.console.is_terminal and not self._quiet:
            columns = (BarColumn(20), TextColumn("{task.description}", markup=False))
            self._bar = Bar(*columns, console=self.console, refresh_per_second=4)
            self._task = self._bar.add_task("compiling", total=steps, completed=start)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show a finished step with its metrics."""
        if self._quiet:
            return
        now = time.monotonic()
        self._times.append((now, step))
        self._line = self._text(step, values)
        if self._bar is not None:
            self._bar.update(self._task, completed=step + 1, description=self._line)
        elif now - self._shown >= self.seconds or step + 1 >= self.steps:
            self._print()

    def during(self, step: int, text: str) -> None:
        """Show the progress within a long step, in a terminal only."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{step + 1}/{self.steps}  {text}")

    def note(self, text: str) -> None:
        """Print a line that stays, such as the result of an evaluation."""
        if not self._quiet:
            self._show(lambda: self.console.print(text, soft_wrap=True))

    def _show(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except (OSError, SystemExit) as e:  # rich ends the process where nobody reads its output
            self._quiet, self._bar = True, None
            why = e if isinstance(e, OSError) else "nobody reads it"
            log.warning("the output cannot be written (%s); the run goes on without it", why)

    def _print(self) -> None:
        if self._line:
            self._show(lambda: self.console.print(self._line, soft_wrap=True))
        self._line, self._shown = "", time.monotonic()

    def _text(self, step: int, values: Mapping[str, float]) -> str:
        (then, first), (now, _) = self._times[0], self._times[-1]
        left = (self.steps - step - 1) * (now - then) / (step - first) if step > first else None
        parts = [f"{step + 1}/{self.steps}", "" if left is None else f"{_duration(left)} left"]
        for name, show in (
            ("loss", "loss {:.4f}"),
            ("reward", "reward {:.3f}"),
            ("accuracy", "accuracy {:.1%}"),
            ("tokens", "{:.0f} tokens an answer"),
            ("flat_groups", "{:.0%} flat"),
            ("tokens_per_second", "{:,.0f} tok/s"),
            ("mfu", "{:.1%} of peak"),
            ("load_max_over_mean", "load max/mean {:.2f}"),
            ("dropped", "dropped {:.0f}"),
            ("answers kept", "{:,.0f} answers kept"),
        ):
            if name in values:
                parts.append(show.format(values[name]))
        return "  ".join(p for p in parts if p)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._show(self._bar.start)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._show(self._bar.stop)
        elif not self._quiet:
            self._print()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# -------------------------------------------------------------------- the machine's limit


def train_flops(cfg: ModelConfig, tokens: float, length: int) -> float:
    """FLOPs to train on `tokens` in rows of `length`: forward, and backward at twice its cost.

    Counts 6 for every parameter that multiplies a token (Kaplan et al., arXiv:2001.08361, section 2.1): all
    active ones and the head, not the embedding, with one more layer, projection and head for each multi-token
    module. Attention counts as in PaLM, at half of `length`, since causal queries see half the keys on
    average. Rematerialisation does not count, and frozen weights (LoRA) count as trained.
    """
    D, V = cfg.hidden_size, cfg.vocab_size
    active = cfg.num_active_params() - (0 if cfg.tie_word_embeddings else V * D)
    if depth := cfg.num_nextn_predict_layers:
        deeper = cfg.replace(num_hidden_layers=cfg.num_hidden_layers + depth)
        active += deeper.num_active_params() - cfg.num_active_params() + depth * (2 * D * D + V * D)
        cfg = deeper
    return tokens * (6 * active + attention_flops_per_token(cfg, length / 2))


def peak_flops(mesh: Mesh) -> float | None:
    """Peak FLOPs per second of all devices of a mesh; None for devices that hardware.py does not have.

    TPUs: bfloat16, as published. CPU: float32, as measured once on this host, whose simulated devices share
    it; other hosts count the same.
    """
    devices = list(mesh.devices.flat)
    if devices[0].platform == "cpu":
        return _measured_peak() * len({d.process_index for d in devices})
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        return None
    chips = {(d.process_index, *d.coords) for d in devices}  # a chip is one device or, by core, two
    return chip.peak["bf16"] * len(chips)


@functools.cache
def _measured_peak(size: int = 1024, seconds: float = 0.2) -> float:
    """Best FLOPs per second of numpy's float32 matmul, which uses all cores."""
    a, out = np.ones((size, size), np.float32), np.empty((size, size), np.float32)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        np.matmul(a, a, out=out)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
