"""Plot the progress of a GRPO run from its metrics.jsonl, as rewards.png."""

from __future__ import annotations

from typing import Any

import jax

from jaxseek.storage.place import Place, place, save_figure
from jaxseek.train.metrics import curve, read_metrics, series

PLOT = "rewards.png"


def draw_rewards(axes: Any, records: list[dict[str, Any]]) -> None:
    """Plot on four axes: reward and held-out accuracy, lengths, KL and entropy, expert load.

    Without expert load, the last one shows the gradient norm.
    """
    reward, length, distance, load = axes
    curve(reward, *series(records, "reward"), "tab:blue", "reward")
    steps, accuracy = series(records, "eval_accuracy")
    reward.plot(
        steps, accuracy, "o-", color="tab:orange", markersize=4, linewidth=1, label="held-out accuracy"
    )
    reward.set_ylabel("reward, accuracy")
    curve(length, *series(records, "tokens"), "tab:blue", "answer")
    curve(length, *series(records, "thinking_tokens"), "tab:green", "thinking")
    length.set_ylabel("tokens")
    for name, color in (("kl", "tab:red"), ("entropy", "tab:purple")):
        curve(distance, *series(records, name), color, name)
    distance.set_ylabel("nats a token")
    steps, values = series(records, "load_max_over_mean")
    if steps:
        curve(load, steps, values, "tab:green", "expert load, max / mean")
        load.axhline(1, color="0.7", linewidth=0.8)
    else:
        curve(load, *series(records, "grad_norm"), "tab:gray", "gradient norm")
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=0)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.set_xlabel("step")


def plot_rewards(directory: str | Place) -> Place:
    """Write rewards.png into a run's directory, and return its path."""
    from matplotlib.figure import Figure

    directory = place(directory)
    path = directory / PLOT
    records = list(read_metrics(directory))
    if jax.process_index() == 0 and records:
        figure = Figure(figsize=(10, 6.4), dpi=130, layout="constrained")
        axes: Any = figure.subplots(2, 2, sharex=True)
        draw_rewards(list(axes.flat), records)
        figure.suptitle(directory.resolve().name)
        save_figure(figure, path)
    return path
