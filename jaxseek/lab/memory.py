"""Sum the memory of one device at each point of a GRPO step from its compiled programs.

The trainer's state stays on the devices throughout. A rollout adds its copy of the weights, made before it
and freed before log-probs are computed (rl/rollout.py), the caches of the prefilled prompts and those of the
decoding sequences. A reference on the devices stays too; one in host memory is copied to the devices only for
its log-probs (rl/reference.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxseek.lab.compile import Compiled
from jaxseek.lab.job import Job, room, train_run

COLUMNS = ("weights", "moments", "padding", "reference", "rollout", "caches", "temp")
NAMES = {
    "lay out": "laying out weights for decoding",
    "read": "reading prompts",
    "seat": "giving slots to answers",
    "rollout": "decoding",
    "log-probs": "log-probabilities",
    "grpo": "update",
}


@dataclass(frozen=True)
class Point:
    """A point of the step, and its bytes per device by COLUMNS."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        return {"point": self.name, "bytes": self.parts, "sum": self.total}


def programs(job: Job) -> dict[str, Job]:
    """Return the programs of the GRPO step whose update is `job`, by workload, in execution order."""
    run = train_run(job)
    job, found = dataclasses.replace(job, run=run), room(run, job.strategy)
    decoding = {"batch": found.slots, "context": found.capacity}
    sizes: dict[str, dict[str, int]] = {
        "lay out": decoding,
        "read": {"batch": found.prompts, "context": found.length},
        "seat": decoding,
        "rollout": decoding,
    }
    if run.grpo.beta or run.grpo.old_logprobs == "trainer":
        sizes["log-probs"] = {}
    return {
        name: dataclasses.replace(job, workload=name, **own) for name, own in (sizes | {"grpo": {}}).items()
    }


def points(job: Job, compiled: Mapping[str, Compiled]) -> list[Point]:
    """Sum the memory at every point, given all the `programs`, compiled."""
    given, rollout = compiled["grpo"].given, compiled["rollout"]
    trainer = {"weights": given["weights"], "moments": given["optimizer"]}
    trainer["padding"] = compiled["grpo"].memory["argument"] - sum(trainer.values())  # includes the batch
    kind, reference = train_run(job).reference.kind, 0.0
    if "log-probs" in compiled:
        reference = compiled["log-probs"].given["reference"]
    copy = _new_outputs(compiled["lay out"])  # arrays shared with the policy alias it
    prompts = _new_outputs(compiled["read"])
    cache = rollout.memory["argument"] - rollout.given["weights"]
    more: dict[str, dict[str, float]] = {
        "lay out": {"rollout": copy},
        "read": {"rollout": copy, "caches": prompts},
        "seat": {"rollout": copy, "caches": prompts + cache},
        "rollout": {"rollout": copy, "caches": prompts + cache},
        "log-probs": {"reference": reference},
        "grpo": {},
    }
    found = []
    for name, program in compiled.items():
        parts = dict.fromkeys(COLUMNS, 0.0) | trainer | more[name]
        parts["reference"] = reference if kind == "device" else parts["reference"]
        own = program.memory["temp"] + program.memory["generated_code"]
        parts["temp"] = own + (_new_outputs(program) if name in ("rollout", "log-probs", "grpo") else 0.0)
        found.append(Point(NAMES[name], parts))
    return found


def _new_outputs(program: Compiled) -> float:
    """Bytes of results that do not alias an argument."""
    return program.memory["output"] - program.memory["alias"]


def table(found: list[Point], usable: float) -> list[str]:
    """Format the points as a text table in GiB."""
    columns = [c for c in COLUMNS if any(p.parts[c] > 2**20 for p in found)]
    most = max(found, key=lambda p: p.total)
    out = [
        f"  memory   peak {most.total / 2**30:.2f} of {usable / 2**30:.2f} GiB per device, {most.name}: "
        + ("fits" if most.total <= usable else "DOES NOT FIT"),
        f"    {'GiB per device':32s}" + "".join(f"{c:>11s}" for c in (*columns, "sum")),
    ]
    for p in found:
        sizes = [p.parts[c] for c in columns] + [p.total]
        out.append(f"    {p.name:32s}" + "".join(f"{n / 2**30:11.2f}" for n in sizes))
    return out
