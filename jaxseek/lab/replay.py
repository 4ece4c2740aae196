"""`jaxseek placement`: replay a trace of routed experts under several placements of the experts."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from jaxseek.config.model import ConfigError
from jaxseek.engine.engine import Engine
from jaxseek.engine.request import EXPERTS, Request
from jaxseek.engine.sampling import Sampling
from jaxseek.experts import balance
from jaxseek.experts.balance import Placement, contiguous, imbalance, place, serve
from jaxseek.machine.terminal import PlainConsole
from jaxseek.model.deepseek import DeepSeek
from jaxseek.storage import place as places

_MOST_EXPERTS = 1 << 16


@dataclass(frozen=True)
class Load:
    """Tokens per expert, `load_TLE` [steps, sparse layers, experts], and the number of expert groups."""

    load_TLE: np.ndarray
    groups: int = 1


def counts(ids: np.ndarray, experts: int) -> np.ndarray:
    """Count tokens per expert [T, L, E] from routed ids [T, L, tokens, K], where -1 marks no token.

    Raises ConfigError for other shapes or ids out of range.
    """
    whole = np.issubdtype(ids.dtype, np.integer)
    if not whole or ids.ndim != 4 or ids.max(initial=-1) >= experts or ids.min(initial=0) < -1:
        span = f" and go from {ids.min(initial=0)} to {ids.max(initial=-1)}" if whole else ""
        raise ConfigError(
            f"routed ids are {ids.dtype}{list(ids.shape)}{span}, expected whole numbers [steps, layers, "
            f"tokens, K] below the {experts} experts"
        )
    T, L, *_ = ids.shape
    each_TLN = ids.reshape(T, L, -1)
    out = np.zeros((T, L, experts + 1), np.int64)
    np.add.at(out, (np.arange(T)[:, None, None], np.arange(L)[:, None], each_TLN), 1)
    return out[..., :-1]


def read_load(path: str | Path) -> Load:
    """Read a trace. Raises ConfigError for any other content.

    A `.npz` has `ids` [steps, layers, tokens, K] and `experts`, or `load` [steps, layers, experts], and
    optionally `groups`; a `.npy` has loads, also of shape [layers, experts].
    """
    try:
        raw: Any = np.load(io.BytesIO(places.place(path).read_bytes()))
        found = {name: raw[name] for name in raw.files} if hasattr(raw, "files") else {"load": raw}
    except Exception as e:  # numpy and zipfile raise many kinds
        raise ConfigError(f"{path}: not a trace that numpy can read ({e})") from None
    if "load" not in found and not {"ids", "experts"} <= set(found):
        raise ConfigError(f"{path} has {', '.join(found) or 'nothing'}; expected ids and experts, or load")
    for name in ("experts", "groups"):
        value = found.get(name, np.array(1))
        if value.shape or not np.issubdtype(value.dtype, np.integer) or not 1 <= value <= _MOST_EXPERTS:
            raise ConfigError(
                f"{path}: {name} is {value.dtype}{list(value.shape)}, expected a whole number, 1 or more, up "
                f"to {_MOST_EXPERTS:,}"
            )
    load = found["load"] if "load" in found else counts(found["ids"], int(found["experts"]))
    load = load[None] if load.ndim == 2 else load
    if load.ndim != 3 or not np.issubdtype(load.dtype, np.integer) or load.min(initial=0) < 0:
        raise ConfigError(
            f"{path}: load is {load.dtype}{list(load.shape)}, expected whole numbers [steps, layers, experts]"
        )
    return Load(load.astype(np.int64), int(found.get("groups", 1)))


def record(
    model: DeepSeek, prompts: Sequence[Sequence[int]], sampling: Sampling, path: str | None = None
) -> Load:
    """Decode all prompts side by side and count the experts of every step; `path` receives the ids.

    Finished rows have id -1. Raises ConfigError for a model without experts, or if there is no decode step.
    """
    cfg = model.cfg
    if not cfg.n_routed_experts:
        raise ConfigError(f"a {cfg.model_type} model without experts has no routing to record")
    seeds = [dataclasses.replace(sampling, seed=sampling.seed + i) for i in range(len(prompts))]
    requests = [Request(prompt, s, record=(EXPERTS,)) for prompt, s in zip(prompts, seeds)]
    answers = Engine(model, slots=len(prompts)).answers(requests)
    own = [a.experts[:, len(p) :] for p, a in zip(prompts, answers) if a.experts is not None]
    steps = max(ids_LTK.shape[1] for ids_LTK in own)
    if not steps:
        raise ConfigError("every answer ended with its first token: there is no decode step to record")
    ids = np.full((steps, model.sparse_layers, len(own), cfg.num_experts_per_tok), -1, np.int16)
    for b, ids_LTK in enumerate(own):
        ids[: ids_LTK.shape[1], :, b] = ids_LTK.swapaxes(0, 1)
    if path:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, ids=ids, experts=cfg.n_routed_experts, groups=cfg.n_group)
        places.write_bytes(places.writable(path), buffer.getvalue())
    return Load(counts(ids, cfg.n_routed_experts), cfg.n_group)


@dataclass(frozen=True)
class Served:
    """A trace served under one placement: tokens served and experts read, each [steps, layers, devices]."""

    name: str
    placement: Placement
    tokens_TLD: np.ndarray
    read_TLD: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Summarise as means over steps and layers, for the busiest device of each and over all devices."""
        return {
            "placement": self.name,
            "slots_per_device": self.placement.expert_LS.shape[1] // self.tokens_TLD.shape[2],
            "load_max_over_mean": imbalance(self.tokens_TLD),
            "tokens_busiest": float(self.tokens_TLD.max(axis=-1).mean()),
            "tokens_mean": float(self.tokens_TLD.mean()),
            "experts_read_busiest": float(self.read_TLD.max(axis=-1).mean()),
            "experts_read_mean": float(self.read_TLD.mean()),
            "experts_read_busiest_per_step": float(self.read_TLD.max(axis=-1).sum(axis=-1).mean()),
        }


def compare(load: Load, devices: int, redundant: int, nodes: int = 1) -> list[Served]:
    """Serve the second half of a trace in expert order, by EPLB, and by EPLB with `redundant` more slots.

    EPLB places experts by the loads of the first half; a trace of one step serves as both halves. The last
    placement is left out if `redundant` is 0. Raises ConfigError if the sizes do not divide.
    """
    load_TLE = load.load_TLE
    T, L, E = load_TLE.shape
    if T == 0 or not load_TLE.any():
        raise ConfigError("the trace has no tokens")
    if redundant > E * (devices - 1):
        raise ConfigError(
            f"{redundant} redundant slots are more than the {E * (devices - 1)} with which each of {devices} "
            f"devices has all {E} experts; lower --redundant"
        )
    known_LE, served_TLE = load_TLE[: max(1, T // 2)].sum(axis=0), load_TLE[T // 2 :]
    try:
        found = {"in order": contiguous(L, E, devices)}
        for extra in dict.fromkeys((0, redundant)):
            name = f"EPLB, {extra} redundant" if extra else "EPLB"
            found[name] = place(known_LE.astype(float), E + extra, load.groups, nodes, devices)
    except ValueError as e:
        raise ConfigError(f"{e}; choose other --devices, --nodes or --redundant") from None
    return [Served(name, p, *serve(served_TLE, p, devices)) for name, p in found.items()]


def keep(load: Load, devices: int, redundant: int, nodes: int, path: str) -> None:
    """Write the EPLB placement for a whole trace to `path`, for a strategy used in serving."""
    load_LE = load.load_TLE.sum(axis=0).astype(float)
    balance.write(path, place(load_LE, load_LE.shape[1] + redundant, load.groups, nodes, devices))


# -------------------------------------------------------------------- output


def show(load: Load, served: list[Served], as_json: bool = False, plot: str | None = None) -> None:
    """Print the comparison, as a table or as JSON, and plot it to `plot`."""
    T, L, E = load.load_TLE.shape
    if plot:
        draw(served, plot)
    rows = [s.to_dict() for s in served]
    if as_json:
        print(json.dumps({"steps": T, "layers": L, "experts": E, "placements": rows}))
        return
    devices = served[0].tokens_TLD.shape[2]
    split = f"placed by the first {T // 2}, served: the other {T - T // 2}" if T > 1 else "placed by the same"
    table = Table(title=f"{T} steps ({split}), {L} layers, {E} experts on {devices} devices")
    for name in (
        "",
        "slots",
        "tokens: busiest",
        "mean",
        "ratio",
        "experts read: busiest",
        "mean",
        "per step",
    ):
        table.add_column(name, justify="left" if not name else "right")
    for r in rows:
        table.add_row(
            r["placement"],
            str(r["slots_per_device"]),
            f"{r['tokens_busiest']:.2f}",
            f"{r['tokens_mean']:.2f}",
            f"{r['load_max_over_mean']:.2f}",
            f"{r['experts_read_busiest']:.2f}",
            f"{r['experts_read_mean']:.2f}",
            f"{r['experts_read_busiest_per_step']:.1f}",
        )
    PlainConsole(width=None if PlainConsole().is_terminal else 130).print(table)
    print(
        "of a device and layer, mean over steps and layers; per step: the busiest device's, over all layers"
    )


def draw(served: list[Served], path: str) -> None:
    """Plot tokens and experts read per device, ranked from the busiest in every step and layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for s in served:
        for axes, a in ((left, s.tokens_TLD), (right, s.read_TLD)):
            ranked = -np.sort(-a, axis=-1).mean(axis=(0, 1))
            axes.plot(np.arange(1, len(ranked) + 1), ranked, marker=".", label=s.name)
    left.axhline(served[0].tokens_TLD.mean(), color="black", linewidth=1, linestyle="--", label="mean")
    left.set(ylabel="tokens of a device and layer")
    right.set(ylabel="experts that it reads")
    for axes in (left, right):
        axes.set(xlabel="devices, busiest first in every step and layer", ylim=(0, None))
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    places.save_figure(figure, path, dpi=130)
    plt.close(figure)
