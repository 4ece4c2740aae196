"""Turn a run file into the job that `jaxseek train RUN.toml` would run on a slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxseek.checkpoint import models
from jaxseek.config.model import ConfigError, ModelConfig, presets
from jaxseek.config.run import RunConfig, read_toml
from jaxseek.hardware import Topology
from jaxseek.lab.job import Job
from jaxseek.recipes.pipeline import Pipeline
from jaxseek.rl.packing import Shapes
from jaxseek.sharding.strategy import Strategy
from jaxseek.storage.hub import model_place
from jaxseek.storage.place import place
from jaxseek.train import start

WORKLOAD = {"pretrain": "train", "sft": "train", "grpo": "grpo"}  # by objective


def read_runs(path: str, overrides: Sequence[str] = ()) -> dict[str, tuple[RunConfig, str]]:
    """Read the plannable runs of a file as {name: (run, model)}: one run, or a pipeline's stages.

    A stage that starts from another stage's output has the shapes of the model that the first one started
    from. Raises ConfigError if no stage can be planned.
    """
    if "stages" not in read_toml(path, list(overrides)):
        run = RunConfig.from_toml(path, list(overrides))
        found = {Path(path).stem: (run, run.model)}
    else:
        pipeline = Pipeline.from_toml(path, list(overrides))
        left = {str(place(run.out) / "model"): run for run in pipeline.stages.values()}

        def first(model: str) -> str:
            return first(left[model].model) if model in left else model

        names = [pipeline.only] if pipeline.only else list(pipeline.stages)
        found = {name: (run, first(run.model)) for name, run in pipeline.stages.items() if name in names}
    planned = {name: pair for name, pair in found.items() if pair[0].objective in WORKLOAD}
    if not planned:
        kinds = ", ".join(sorted({run.objective for run, _ in found.values()}))
        raise ConfigError(f"{path}: objective {kinds} has no plan; expected one of {', '.join(WORKLOAD)}")
    return planned


def job_of(run: RunConfig, model: str, topology: str) -> Job:
    """Return the job of one step of the run on a slice. Raises ConfigError if run and slice do not match."""
    slice_, cfg = Topology.parse(topology), start.with_changes(run, config_of(model))
    strategy = Strategy.parse(run.mesh or {"fsdp": slice_.num_devices})
    workload = WORKLOAD[run.objective]
    rows, length = run.batch.size // run.batch.accumulation, run.data.length
    if workload == "grpo":
        shapes = Shapes.of(run, *(strategy.parts(strategy.train, axis) for axis in ("batch", "length")))
        rows, length = shapes.rows, shapes.length
    job = Job(cfg, strategy, slice_, workload, rows, length, run=run)
    start.check_strategy(run, job.cfg, strategy)
    return job


def config_of(model: str) -> ModelConfig:
    """Return the config of a run's model. The model need not exist here if its directory has a preset's name.

    Raises ConfigError otherwise.
    """
    at = model_place(model, weights=False)
    if models.kind_of(at) is not None:
        return ModelConfig.from_hf(at)
    name = at.name.lower()
    if name not in presets():
        raise ConfigError(
            f"model {model!r} is not here, and {name!r} is no preset (jaxseek info --list); say which it has "
            "the shapes of, such as --set model=deepseek-v3-base"
        )
    return ModelConfig.from_preset(name)


def check_agrees(path: str, job: Job, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for command-line arguments that contradict the run file."""
    assert job.run is not None
    said = {
        "mesh": job.run.mesh, "workload": job.workload, "batch": job.batch, "context": job.context,
        "weights": job.weights, "lora": job.lora, "remat": job.remat,
    }  # fmt: skip
    differ = [
        f"--{name} {value} (it has {said[name] or 'none'})"
        for name, value in given.items()
        if value is not None and value != said[name]
    ]
    if differ:
        raise ConfigError(
            f"{path} says itself what is planned, other than {', '.join(differ)}; leave that out, or change "
            "the run with --set KEY=VALUE, as for `jaxseek train`"
        )
