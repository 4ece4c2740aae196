"""Summaries of a GRPO step: means over its updates, seconds of its parts, and alarms."""

from __future__ import annotations

import time

import numpy as np


def of_updates(totals: list[dict[str, float]]) -> dict[str, float]:
    """Average metrics over the tokens of all updates.

    The gap between sampler and trainer is that of the first update alone, which has the weights that sampled.
    """
    first, out = totals[0], {}
    tokens = sum(t["tokens"] for t in totals)
    for name in totals[0]:
        if name.endswith("_max"):
            out[name] = max(t[name] for t in totals)
        elif name in ("loss", "grad_norm", "load_max_over_mean", "balance_loss"):
            out[name] = float(np.mean([t[name] for t in totals]))
        elif name == "learning_rate":
            out[name] = totals[-1][name]
        elif name not in ("gap", "tokens", "routed", "rerouted", "dropped"):
            out[name] = sum(t[name] for t in totals) / max(tokens, 1)
    out.pop("gap_max", None)
    if first["tokens"]:
        out |= {"gap": first["gap"] / first["tokens"], "gap_max": first["gap_max"]}
    if "routed" in first:
        out["rerouted"] = first["rerouted"] / max(first["routed"], 1)
    if "dropped" in first:
        out["dropped"] = sum(t["dropped"] for t in totals)
    return out


class Clock:
    """Measures the seconds between notes."""

    def __init__(self):
        self.begin = self.last = time.perf_counter()

    def note(self, name: str, values: dict[str, float]) -> None:
        """Add the seconds since the last note to values[name]."""
        now = time.perf_counter()
        values[name] = values.get(name, 0.0) + now - self.last
        self.last = now

    @property
    def total(self) -> float:
        return time.perf_counter() - self.begin


class Alarms:
    """Warns, once each, about signs that a run is going wrong."""

    PATIENCE = 20  # steps

    def __init__(self):
        self.silent: dict[str, int] = {}
        self.raised: set[str] = set()
        self.kl_before = 0.0

    def of(self, step: int, values: dict[str, float]) -> list[str]:
        """Return the warnings to show after this step."""
        signs = {
            name: (
                value == 0,
                f"{name} has been 0 for {self.PATIENCE} steps: nothing can be learnt from it; look at the "
                "answers in OUT/answers, and whether the prompt asks for what it rewards",
            )
            for name, value in values.items()
            if name.startswith("reward_") and name not in ("reward_std", "reward_failures")
        }
        signs["flat"] = (
            values["flat_groups"] == 1,
            f"in every group all rewards have been equal for {self.PATIENCE} steps: there is no gradient; "
            "raise grpo.group_size, or use easier or harder problems",
        )
        signs["cut"] = (
            values["cut_off"] > 0.5,
            f"more than half of the answers have been cut off for {self.PATIENCE} steps; raise "
            "rollout.max_new_tokens",
        )
        told = []
        for name, (bad, text) in signs.items():
            self.silent[name] = self.silent.get(name, 0) + 1 if bad else 0
            if self.silent[name] == self.PATIENCE:
                told.append(text)
        at_once = {
            "kl": (
                min(values.get("kl", 0), self.kl_before) > 1,  # one rare token can dominate k3 of one step
                "KL against the reference stays above 1 per token: the policy has left it; lower "
                "optimizer.learning_rate or raise grpo.beta",
            ),
            "gap": (
                values.get("gap_max", 0) > 1,
                "sampler and trainer disagree by a factor of e or more on some token; see rollout.dtype, "
                "grpo.importance_cap and grpo.routing_replay",
            ),
        }
        self.kl_before = values.get("kl", 0.0)
        for name, (bad, text) in at_once.items():
            if bad and name not in self.raised:
                self.raised.add(name)
                told.append(text)
        return [f"step {step + 1}: {text}" for text in told]
