"""Run several stages, one after the other, from one file: those of R1's training, or of any other recipe.

    out = "runs/mine"
    [common]                       settings that all stages share, as in a run file
    [stages.cold-start]            a run; its directory is OUT/cold-start
    objective = "sft"
    model = "tiny-r1"
    [stages.reason]
    objective = "grpo"
    model = "stage:cold-start"     that stage's output; also in data.train and distill.teacher
    [evaluation]                   task, rollout and rewards that evaluate every stage's model

`only = "reason"` runs one stage alone. A pipeline that is started again resumes, also within a stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxseek.api import load
from jaxseek.checkpoint.directory import LOCK, alone
from jaxseek.checkpoint.models import write_json
from jaxseek.config.model import ConfigError
from jaxseek.config.run import RunConfig, read_toml
from jaxseek.machine.hosts import from_first
from jaxseek.recipes.reject import FILE, reject
from jaxseek.rl.evaluate import HeldOut, Marking, evaluate
from jaxseek.rl.recipe import Grpo
from jaxseek.rl.rollout import Sampler
from jaxseek.rl.tasks import open_task
from jaxseek.storage.place import Place, place, writable, write_text
from jaxseek.storage.untrusted import expect, read_json
from jaxseek.train import start
from jaxseek.train.distill import open_distillation
from jaxseek.train.dpo import Dpo
from jaxseek.train.pretrain import Pretrain
from jaxseek.train.sft import Sft
from jaxseek.train.trainer import Result, train

KEYS = ("out", "seed", "only", "common", "stages", "evaluation")
REFERENCE = "stage:"
RECIPES = {"pretrain": Pretrain, "sft": Sft, "dpo": Dpo, "distill": open_distillation, "grpo": Grpo}


@dataclass(frozen=True)
class Pipeline:
    """Stages as runs, by name and in order, and the evaluation of their models (None: no evaluation)."""

    out: Place
    stages: dict[str, RunConfig]
    evaluation: RunConfig | None
    only: str

    @classmethod
    def from_toml(cls, path: str | Place, overrides: list[str] | tuple[str, ...] = ()) -> Pipeline:
        """Read a pipeline file, with `stages.NAME.key=value` overrides. Raises ConfigError."""
        return cls.from_dict(read_toml(path, overrides), str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "pipeline") -> Pipeline:
        """Build a pipeline from nested tables. Raises ConfigError, naming the stage."""
        if unknown := [key for key in raw if key not in KEYS]:
            raise ConfigError(
                f"{where}: unknown key(s) {', '.join(unknown)}; a pipeline has {', '.join(KEYS)}"
            )
        tables = raw.get("stages")
        if not isinstance(raw.get("out"), str) or not isinstance(tables, dict) or not tables:
            raise ConfigError(f"{where}: expected out = DIRECTORY and a table [stages.NAME] for each stage")
        shared = {key: raw[key] for key in ("common", "evaluation") if key in raw}
        for name, own in (*shared.items(), *((f"stages.{name}", own) for name, own in tables.items())):
            if not isinstance(own, dict):
                raise ConfigError(f"{where}: {name} is {own!r}, expected a table [{name}]")
            if "out" in own:
                raise ConfigError(f"{where}: [{name}] has out; a stage's directory is OUT/NAME")
        out, only = writable(raw["out"]), raw.get("only", "")
        stages: dict[str, RunConfig] = {}
        common = {"seed": raw.get("seed", 0)} | raw.get("common", {})
        for name, own in tables.items():
            settings = _merged(common, own) | {"out": str(out / name)}
            try:
                stages[name] = RunConfig.from_dict(_resolved(settings, stages))
            except ConfigError as e:
                raise ConfigError(f"{where}: [stages.{name}]: {e}") from None
        if only not in ("", *stages):
            raise ConfigError(f"{where}: only is {only!r}, expected one of {', '.join(stages)}")
        evaluation = None
        if "evaluation" in raw:
            fixed = {"objective": "grpo", "model": "", "out": str(out), "steps": 1}
            try:
                evaluation = RunConfig.from_dict(_merged(common, raw["evaluation"]) | fixed)
            except ConfigError as e:
                raise ConfigError(f"{where}: [evaluation]: {e}") from None
        return cls(out, stages, evaluation, only)


@dataclass(frozen=True)
class PipelineResult:
    """The figures that every finished stage reached, and whether a signal stopped the pipeline."""

    out: str
    stopped: bool
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        end = "stopped; the same command goes on" if self.stopped else f"{self.out}: done"
        return f"{table(self.stages)}\n{end}"


def run_pipeline(
    pipeline: Pipeline,
    deadlines: Mapping[str, float] | None = None,
    tell: Callable[[str], None] = print,
) -> PipelineResult:
    """Run the stages that are not finished; `deadlines` (of time.monotonic) cut stages short.

    Writes the figures of every stage to OUT/pipeline.json, and as a table to OUT/pipeline.md. Raises as
    stages do.
    """
    with alone(pipeline.out / LOCK):
        return _run_stages(pipeline, deadlines or {}, tell)


def _run_stages(
    pipeline: Pipeline, deadlines: Mapping[str, float], tell: Callable[[str], None]
) -> PipelineResult:
    names = [pipeline.only] if pipeline.only else list(pipeline.stages)
    for number, name in enumerate(names, 1):
        run = pipeline.stages[name]
        tell(f"\nstage {number} of {len(names)}: {name} ({run.objective}, up to {run.steps} steps)")
        if name in _reached(pipeline) and start.finished(run) is not None:
            start.claim(run)  # raises if the settings have changed
            tell("it is over already")
            _write(pipeline)
            continue
        begin = time.monotonic()
        result = run_stage(run, deadlines.get(name, float("inf")))
        if result.stopped:
            return PipelineResult(str(pipeline.out), True, _reached(pipeline))
        _measure(pipeline, name, result, time.monotonic() - begin, tell)
        _write(pipeline)
    return PipelineResult(str(pipeline.out), False, _reached(pipeline))


def run_stage(run: RunConfig, deadline: float = float("inf")) -> Result:
    """Run one stage by its objective. Raises as train and reject do."""
    if run.objective == "reject":
        return reject(run)
    return train(RECIPES[run.objective], run, deadline)


def _measure(
    pipeline: Pipeline, name: str, result: Result, seconds: float, tell: Callable[[str], None]
) -> None:
    """Write OUT/NAME/stage.json: steps, and the evaluation of the stage's model on held-out problems."""
    run, path = pipeline.stages[name], place(result.out) / "stage.json"
    if _reached(pipeline).get(name, {}).get("steps") == result.steps:
        return
    reached: dict[str, Any] = {
        "objective": run.objective,
        "steps": result.steps,
        "seconds": round(seconds, 1),
    }
    if pipeline.evaluation is not None and run.objective != "reject":
        model, tokenizer = load(place(run.out) / "model", run.mesh or None, start.compute_dtype(run))
        how = pipeline.evaluation
        if tokenizer is None:
            raise ConfigError(f"{run.out}/model has no tokenizer to evaluate it with")
        sampler = Sampler(how, tokenizer, start.compute_dtype(how))
        sampler.load(model)
        with Marking(how, model.strategy) as marking:
            found = evaluate(how, sampler, HeldOut.of(open_task(how).held_out, sampler, how), marking)
        reached |= found.values
        if jax.process_index() == 0:
            found.write(place(run.out) / "evaluation.jsonl")
        tell(f"{name}: {found}")
    if jax.process_index() == 0:
        write_json(path, reached)


def _reached(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """Read the figures of finished stages, as host 0 sees them."""
    paths = {name: place(run.out) / "stage.json" for name, run in pipeline.stages.items()}
    form = {"objective": str, "steps": int, "seconds": float, "accuracy?": float, "thinking_tokens?": float}

    def read() -> dict[str, dict[str, Any]]:
        found = {name: (path, read_json(path, ConfigError)) for name, path in paths.items() if path.is_file()}
        return {name: expect(value, form, str(path), ConfigError) for name, (path, value) in found.items()}

    return from_first(read)


def _write(pipeline: Pipeline) -> None:
    reached = _reached(pipeline)
    if jax.process_index() == 0:
        write_json(pipeline.out / "pipeline.json", reached)
        write_text(pipeline.out / "pipeline.md", table(reached) + "\n")


def table(reached: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the figures of every stage as a Markdown table."""
    rewards = dict.fromkeys(key for row in reached.values() for key in row if key.startswith("reward_"))
    columns = {"objective": "", "steps": "", "seconds": ".0f", "accuracy": ".1%", "thinking_tokens": ".1f"}
    columns |= dict.fromkeys(rewards, ".2f")
    lines = [
        ["stage", *(c.replace("reward_", "").replace("_", " ") for c in columns)],
        ["---"] * (1 + len(columns)),
    ]
    for name, row in reached.items():
        lines.append([name, *(format(row[c], f) if c in row else "" for c, f in columns.items())])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `over` into `base`, table by table."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else value
    return out


def _resolved(value: Any, stages: Mapping[str, RunConfig], key: str = "") -> Any:
    """Replace `stage:NAME` by a path: to the stage's model, or to the samples of a rejection stage."""
    if isinstance(value, dict):
        return {k: _resolved(v, stages, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolved(v, stages, key) for v in value]
    if not isinstance(value, str) or not value.startswith(REFERENCE):
        return value
    name = value.removeprefix(REFERENCE)
    if name not in stages:
        known = ", ".join(stages) or "none"
        raise ConfigError(f"{key} is {value!r}, expected a stage that comes before: {known}")
    out = place(stages[name].out)
    return str(out / (FILE if stages[name].objective == "reject" else "model"))
