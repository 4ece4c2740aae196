"""Pipelines: what their files say, what stages hand on, and that a kill at any moment changes nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from oracles import quick_compilation, undrawn  # noqa: F401
from policies import make_home, values_of

from jaxseek.checkpoint import models
from jaxseek.checkpoint.models import CheckpointError
from jaxseek.cli.main import main
from jaxseek.config.model import ConfigError, ModelConfig, configs_dir
from jaxseek.config.run import RunConfig, read_toml
from jaxseek.recipes import pipeline as pipelines
from jaxseek.recipes.pipeline import Pipeline, run_pipeline, table
from jaxseek.rl.packing import Shapes
from jaxseek.sharding.strategy import Strategy
from jaxseek.train import start
from jaxseek.train.metrics import read_metrics
from jaxseek.train.trainer import Result

ROOT = Path(__file__).parent.parent
DATA = "python:jaxseek.rl.arithmetic:demonstrations?terms=2&count="
STAGES = ("learn", "reason", "choose", "again")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def tables(home, out, **changes):
    """A pipeline of seconds: SFT, GRPO, rejection sampling, SFT on what is kept."""
    raw = {
        "out": str(out),
        "common": {
            "compute_dtype": "float32",
            "remat": "none",
            "data": {"length": 32},
            "batch": {"size": 4},
            "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.0},
            "schedule": {"kind": "constant"},
            "task": {"kind": "arithmetic", "template": "plain", "terms": 2, "held_out": 8},
            "rollout": {"prompts": 2, "max_prompt_tokens": 8, "max_new_tokens": 8},
            "grpo": {"group_size": 4},
            "rewards": [{"kind": "length", "target": 3}, {"kind": "exact"}],
            "eval": {"every": 0},
            "checkpoint": {"every": 2},
            "log": {"tensorboard": False},
        },
        "stages": {
            "learn": {
                "objective": "sft",
                "model": str(home / "dense"),
                "steps": 5,
                "data": {"train": f"{DATA}64"},
            },
            "reason": {
                "objective": "grpo",
                "model": "stage:learn",
                "steps": 3,
                "optimizer": {"learning_rate": 1e-3},
            },
            "choose": {
                "objective": "reject",
                "model": "stage:reason",
                "steps": 1,
                "reject": {"problems": 8, "mix": [f"{DATA}4&seed=1"], "mix_count": 4},
            },
            "again": {
                "objective": "sft",
                "model": "stage:learn",
                "steps": 3,
                "data": {"train": "stage:choose"},
            },
        },
        "evaluation": {"rewards": [{"kind": "exact"}, {"kind": "length", "target": 3}]},
    }
    return raw | changes


def quiet(text):
    pass


# -------------------------------------------------------------------- the file


def test_stages_inherit_what_is_common_table_by_table_and_have_directories_of_their_own(home, tmp_path):
    read = Pipeline.from_dict(tables(home, tmp_path, seed=7))
    assert tuple(read.stages) == STAGES
    reason = read.stages["reason"]
    assert (reason.optimizer.learning_rate, reason.optimizer.weight_decay) == (1e-3, 0.0)
    assert read.stages["learn"].optimizer.learning_rate == 1e-2
    assert (read.stages["learn"].data.length, read.stages["learn"].data.train) == (32, [f"{DATA}64"])
    assert [run.out for run in read.stages.values()] == [str(tmp_path / name) for name in STAGES]
    assert {run.seed for run in (*read.stages.values(), read.evaluation)} == {7}
    assert [r.kind for r in read.evaluation.rewards] == ["exact", "length"]
    assert Pipeline.from_dict(tables(home, tmp_path, evaluation={})).evaluation is not None
    raw = tables(home, tmp_path)
    del raw["evaluation"]
    assert Pipeline.from_dict(raw).evaluation is None


def test_a_stage_is_named_by_its_model_and_a_rejecting_one_by_its_samples(home, tmp_path):
    raw = tables(home, tmp_path)
    raw["stages"]["again"] |= {"tokenizer": "stage:learn", "data": {"train": ["more.jsonl", "stage:choose"]}}
    raw["stages"]["taught"] = {
        "objective": "distill",
        "model": "tiny-llm",
        "steps": 1,
        "data": {"train": f"{DATA}4"},
        "distill": {"teacher": "stage:again"},
    }
    stages = Pipeline.from_dict(raw).stages
    assert stages["reason"].model == str(tmp_path / "learn" / "model")
    assert stages["again"].tokenizer == str(tmp_path / "learn" / "model")
    assert stages["again"].data.train == ["more.jsonl", str(tmp_path / "choose" / "samples.jsonl")]
    assert stages["taught"].distill.teacher == str(tmp_path / "again" / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": {}}, r"unknown key\(s\) stage; a pipeline has out, seed"),
        ({"stages": {}}, r"expected out = DIRECTORY and a table \[stages.NAME\]"),
        ({"out": 3}, "expected out = DIRECTORY"),
        ({"only": "reson"}, "only is 'reson', expected one of learn, reason, choose, again"),
        ({"only": ["learn"]}, r"only is \['learn'\], expected one of"),
        ({"common": 1}, r"common is 1, expected a table \[common\]"),
        ({"stages": {"learn": 5}}, r"stages.learn is 5, expected a table \[stages.learn\]"),
        ({"learn.steps": 0}, r"\[stages.learn\]: steps is 0, expected 1 or more"),
        ({"learn.stepz": 1}, r"\[stages.learn\]: unknown key stepz; did you mean steps"),
        ({"learn.out": "x"}, r"\[stages.learn\] has out; a stage's directory is OUT/NAME"),
        ({"learn.model": "stage:reason"}, r"\[stages.learn\]: model is 'stage:reason', .* before: none"),
        ({"reason.model": "stage:lern"}, r"\[stages.reason\]: model is 'stage:lern', .* before: learn$"),
        ({"reason.model": "stage:reason"}, r"\[stages.reason\]: model .* before: learn$"),
        ({"again.data": {"train": ["stage:last"]}}, r"\[stages.again\]: train .*: learn, reason, choose$"),
        ({"evaluation": {"rewards": []}}, r"\[evaluation\]: no \[\[rewards\]\] are given"),
        ({"evaluation": {"grop": {}}}, r"\[evaluation\]: unknown key grop; did you mean grpo"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_the_stage(home, tmp_path, change, message):
    raw = tables(home, tmp_path)
    for key, value in change.items():
        stage, dot, name = key.partition(".")
        if dot:
            raw["stages"][stage][name] = value
        else:
            raw[key] = value
    with pytest.raises(ConfigError, match=message):
        Pipeline.from_dict(raw, "mine.toml")


def test_overrides_reach_one_stage(tmp_path):
    path = configs_dir() / "runs" / "quickstart.toml"
    settings = [f"out={tmp_path}", "seed=3", "stages.think.rollout.prompts=4", "only=think"]
    read = Pipeline.from_toml(path, settings)
    assert (read.only, read.stages["think"].rollout.prompts, read.stages["skill"].seed) == ("think", 4, 3)
    assert read.stages["think"].rollout.max_new_tokens == 20


# -------------------------------------------------------------------- shipped files


def shipped():
    return sorted((configs_dir() / "runs").glob("*.toml"))


def runs_of(path):
    if "stages" in read_toml(path):
        return list(Pipeline.from_toml(path).stages.values())
    return [RunConfig.from_toml(path)]


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_every_shipped_run_file_is_read(path):
    assert runs_of(path)


BASES = {"671b": "deepseek-v3-base", "qwen-7b": "deepseek-r1-distill-qwen-7b"}


@pytest.mark.parametrize("path", [p for p in shipped() if any(b in p.stem for b in BASES)])
def test_runs_of_r1s_size_fit_its_model_and_their_mesh(path):
    base = next(preset for part, preset in BASES.items() if part in path.stem)
    for run in runs_of(path):
        fields = ModelConfig.from_preset(base).to_hf()
        assert not [key for key in run.config if key not in fields]
        cfg = ModelConfig.from_hf(fields | run.config)
        strategy = start.open_strategy(run, cfg)  # rows, microbatches, length and model divide
        assert strategy.num_devices > 1
        if run.objective == "grpo":
            longest = run.rollout.max_prompt_tokens + run.rollout.max_new_tokens
            assert longest <= cfg.max_position_embeddings
            answers = run.rollout.prompts * run.grpo.group_size // run.grpo.minibatches
            assert (answers, answers // run.grpo.group_size) == (512, 32)  # of an update
            assert answers % (run.batch.accumulation * strategy.parts(strategy.train, "batch")) == 0
            assert run.reference.replace_every * run.grpo.minibatches == 400


def test_r1s_figures_in_updates_are_those_of_the_paper():
    zero = Pipeline.from_toml(configs_dir() / "runs" / "r1-671b-zero.toml").stages
    assert [run.steps * 16 for run in zero.values()] == [8192, 10400 - 8192]
    assert [run.rollout.max_new_tokens for run in zero.values()] == [32768, 65536]
    last = Pipeline.from_toml(configs_dir() / "runs" / "r1-671b-all.toml").stages
    assert sum(run.steps * 16 for run in last.values()) == pytest.approx(1700, abs=8)
    assert last["preferences"].steps * 16 == 400
    assert {run.rollout.temperature for run in last.values()} == {0.7}
    assert [len(run.rewards) for run in last.values()] == [3, 4]


def test_a_row_has_two_of_the_longest_answers_unless_that_leaves_chips_without_rows():
    zero = Pipeline.from_toml(configs_dir() / "runs" / "r1-671b-zero.toml").stages
    shapes = [Shapes.of(run, 32, 16) for run in zero.values()]
    assert [(s.microbatches, s.rows, s.length) for s in shapes] == [(8, 32, 2 * 34816), (16, 32, 67584)]


def test_the_name_of_a_released_model_is_no_model_to_go_on_from():
    run = RunConfig.from_toml(configs_dir() / "runs" / "grpo-r1-qwen-1.5b.v5e-1.toml")
    with pytest.raises(
        CheckpointError, match=f"convert hf://deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B {run.model}"
    ):
        start.model_config(run)
    pretrain = RunConfig.from_toml(configs_dir() / "runs" / "pretrain-v3.toml")
    assert start.model_config(pretrain) == ModelConfig.from_preset("deepseek-v3")


def test_meshes_of_shipped_runs_are_known():
    for path in shipped():
        for run in runs_of(path):
            assert Strategy.parse(run.mesh or None).num_devices >= 1


# -------------------------------------------------------------------- a whole pipeline


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """An undisturbed pipeline, and what it told."""
    out, told = tmp_path_factory.mktemp("whole") / "run", []
    result = run_pipeline(Pipeline.from_dict(tables(home, out)), tell=told.append)
    assert not result.stopped
    return out, "".join(told)


TIMED = re.compile("seconds|time|throughput|mfu|tokens_per|speed|occupancy")


def reached(out):
    """What must be the same: each stage's results and metrics but for times, the samples, the answers."""
    found = {}
    for name in STAGES:
        stage = json.loads((out / name / "stage.json").read_text())
        found[name] = {key: value for key, value in stage.items() if key != "seconds"}
        names = (
            {k for r in read_metrics(out / name) for k in r if not TIMED.search(k)}
            if name != "choose"
            else ()
        )
        found[f"{name} metrics"] = values_of(read_metrics(out / name), *sorted(names)) if names else []
        for file in ("evaluation.jsonl", "samples.jsonl"):
            if (out / name / file).is_file():
                found[f"{name} {file}"] = (out / name / file).read_bytes()
    return found


def test_stages_run_in_order_and_all_that_leave_a_model_are_measured(whole):
    out, told = whole
    assert re.findall(r"stage (\d) of 4: (\w+)", told) == [(str(i), n) for i, n in enumerate(STAGES, 1)]
    values = json.loads((out / "pipeline.json").read_text())
    assert list(values) == list(STAGES)
    for name in STAGES:
        measured = {"accuracy", "thinking_tokens", "reward_length"} <= set(values[name])
        assert measured == (name != "choose")
        assert (out / name / "evaluation.jsonl").is_file() == measured
    answers = (out / "again" / "evaluation.jsonl").read_text().splitlines()
    assert len(answers) == 8
    assert values["again"]["accuracy"] == sum(json.loads(a)["correct"] for a in answers) / 8
    rows = (out / "pipeline.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == list(STAGES)


def test_a_pipeline_that_is_over_runs_nothing_again(home, whole, monkeypatch):
    out, _ = whole
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*.json*") if p.parent != out}

    def never(run, deadline=0):
        assert run.objective == "reject", run.out
        return real(run)

    real = pipelines.run_stage
    monkeypatch.setattr(pipelines, "run_stage", never)
    told = []
    result = run_pipeline(Pipeline.from_dict(tables(home, out)), tell=told.append)
    assert "".join(told).count("it is over already") == 3
    assert list(result.stages) == list(STAGES)
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before}


def test_other_settings_of_a_stage_that_is_over_are_refused(home, whole):
    out, _ = whole
    raw = tables(home, out)
    raw["stages"]["reason"]["optimizer"] = {"learning_rate": 2e-3}
    with pytest.raises(ConfigError, match=r"other settings: optimizer\.learning_rate"):
        run_pipeline(Pipeline.from_dict(raw), tell=quiet)


def copied(whole, out, *names):
    """Stages of the undisturbed pipeline as those of another; their settings name its directories."""
    for name in names:
        shutil.copytree(whole[0] / name, out / name)
        settings = out / name / "run.json"
        settings.write_text(settings.read_text("utf-8").replace(str(whole[0]), str(out)), "utf-8")


def test_one_stage_alone_takes_what_others_left_and_leaves_them(home, whole, tmp_path):
    out = tmp_path / "run"
    alone = Pipeline.from_dict(tables(home, out, only="choose"))
    with pytest.raises((ConfigError, models.CheckpointError), match="reason/model"):
        run_pipeline(alone, tell=quiet)
    copied(whole, out, "learn", "reason")
    result = run_pipeline(alone, tell=quiet)
    assert list(result.stages) == ["learn", "reason", "choose"]
    assert (out / "choose" / "samples.jsonl").read_bytes() == reached(whole[0])["choose samples.jsonl"]
    assert not (out / "again").exists()


def test_a_deadline_ends_its_stage_early_and_such_a_stage_is_over(home, tmp_path):
    read = Pipeline.from_dict(tables(home, tmp_path / "run", only="learn"))
    result = run_pipeline(read, {"learn": time.monotonic() - 1, "reason": 0.0}, quiet)
    assert result.stages["learn"]["steps"] == 1
    assert run_pipeline(read, tell=quiet).stages["learn"]["steps"] == 1


def test_a_signal_stops_the_pipeline_and_the_same_command_goes_on(home, whole, tmp_path, monkeypatch):
    ran = []

    def stage(run, deadline=0):
        ran.append(Path(run.out).name)
        return Result(run.out, 2, None, None, len(ran) == 2)

    monkeypatch.setattr(pipelines, "run_stage", stage)
    raw = tables(home, tmp_path / "run")
    del raw["evaluation"]
    (tmp_path / "run" / "learn").mkdir(parents=True)
    result = run_pipeline(Pipeline.from_dict(raw), tell=quiet)
    assert (result.stopped, ran, list(result.stages)) == (True, ["learn", "reason"], ["learn"])
    assert "the same command goes on" in str(result)


def test_the_table_has_a_column_for_each_reward_and_leaves_out_what_was_not_measured():
    rows = table(
        {
            "a": {"objective": "sft", "steps": 5, "seconds": 61.7, "accuracy": 0.25, "reward_exact": 0.25},
            "b": {"objective": "reject", "steps": 9, "seconds": 2.0},
            "c": {"objective": "grpo", "steps": 3, "seconds": 1.2, "accuracy": 1.0, "reward_format": 0.5}
            | {"thinking_tokens": 8.96},
        }
    ).splitlines()
    assert rows == [
        "| stage | objective | steps | seconds | accuracy | thinking tokens | exact | format |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| a | sft | 5 | 62 | 25.0% |  | 0.25 |  |",
        "| b | reject | 9 | 2 |  |  |  |  |",
        "| c | grpo | 3 | 1 | 100.0% | 9.0 |  | 0.50 |",
    ]


def test_the_command_line_runs_a_pipeline_and_says_what_is_wrong(home, whole, tmp_path, capsys):
    path = written(tables(home, whole[0]), tmp_path)
    assert main(["train", str(path), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]) == list(STAGES)
    assert main(["train", str(path), "--set", "only=nothing"]) == 1
    assert "only is 'nothing'" in capsys.readouterr().err


# -------------------------------------------------------------------- killed


def written(raw, directory):
    """A pipeline's tables as a file of dotted keys."""
    path = directory / "pipeline.toml"
    flat = start._flat(raw)

    def toml(value):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = (", ".join(f"{k} = {json.dumps(v)}" for k, v in item.items()) for item in value)
            return "[" + ", ".join(f"{{ {i} }}" for i in inner) + "]"
        return json.dumps(value)

    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in flat.items()), "utf-8")
    return path


# Kills itself, as nothing else could be as punctual, once `number` times the place was come to.
KILLED = """
import os, signal, sys
from jaxseek.cli.main import main
from jaxseek.recipes import pipeline
from jaxseek.train import metrics
stage, place, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
current = []

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

run, measure, update = pipeline.run_stage, pipeline._measure, metrics.Progress.update

def run_stage(settings, deadline):
    current[:] = [os.path.basename(settings.out)]
    return run(settings, deadline)

def patched(self, step, values):
    update(self, step, values)
    if current == [stage] and place == "step" and step + 1 == number:
        die()

def measured(pipeline_, name, *rest):
    if name == stage and place == "measure":
        die()
    measure(pipeline_, name, *rest)
    if name == stage and place == "measured":
        die()

pipeline.run_stage, pipeline._measure, metrics.Progress.update = run_stage, measured, patched
sys.exit(main(["train", sys.argv[4]]))
"""


def killed(path, stage, place, number=0):
    """Run a pipeline's file in a process of its own, which is killed there."""
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as here
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    command = [sys.executable, "-c", KILLED, stage, place, str(number), str(path)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


PLACES = [
    *(("learn", "step", n) for n in (1, 3, 5)),
    ("learn", "measure", 0),
    ("learn", "measured", 0),
    *(("reason", "step", n) for n in (1, 3)),
    ("reason", "measure", 0),
    *(("choose", "step", n) for n in (1, 4)),
    ("choose", "measured", 0),
    ("again", "step", 2),
    ("again", "measured", 0),
]


def test_a_pipeline_killed_in_its_third_stage_ends_as_if_it_had_not_been(home, whole, tmp_path):
    path = written(tables(home, tmp_path / "run"), tmp_path)
    copied(whole, tmp_path / "run", "learn", "reason")
    killed(path, "choose", "step", 2)
    assert (tmp_path / "run" / "choose" / "samples.partial.jsonl").exists()
    assert not run_pipeline(Pipeline.from_toml(path), tell=quiet).stopped
    assert reached(tmp_path / "run") == reached(whole[0])


@pytest.mark.slow
def test_a_pipeline_killed_thirteen_times_ends_as_if_it_had_not_been(home, whole, tmp_path):
    path = written(tables(home, tmp_path / "run"), tmp_path)
    for place in PLACES:
        killed(path, *place)
    assert not run_pipeline(Pipeline.from_toml(path), tell=quiet).stopped
    assert reached(tmp_path / "run") == reached(whole[0])
