"""Whole runs: they end the same however interrupted, say what is wrong, and learn each objective."""

import dataclasses
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from oracles import assert_close
from training_runs import (
    STEPS,
    TEXT,
    assert_same_bits,
    exported,
    losses,
    make_home,
    run,
    toml,
    write_jsonl,
)

from jaxseek.checkpoint import models
from jaxseek.checkpoint.models import CheckpointError
from jaxseek.cli.main import main
from jaxseek.config.model import ConfigError
from jaxseek.recipes.pipeline import run_stage as train
from jaxseek.sharding.parameters import parameters
from jaxseek.tokenizer.tokenizer import Tokenizer, TokenizerError, train_sentencepiece
from jaxseek.train import distill, dpo, start, trainer
from jaxseek.train.checkpoints import Checkpoints
from jaxseek.train.optimizer import decays, make_optimizer
from jaxseek.train.step import init_state, with_values
from jaxseek.train.trainer import TrainingError

pytestmark = pytest.mark.usefixtures("quick_compilation", "undrawn")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """An undisturbed run of the dense model."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(run(home, out))
    return out


# -------------------------------------------------------------------- interrupted


def interrupt(monkeypatch, step, act):
    """Do something when a step is recorded."""
    update = trainer.Progress.update

    def patched(self, s, values):
        update(self, s, values)
        if s == step:
            act()

    monkeypatch.setattr(trainer.Progress, "update", patched)


def test_a_run_learns_and_leaves_a_model_a_plot_and_every_step(whole):
    found = losses(whole)
    assert list(found) == list(range(STEPS))
    assert found[STEPS - 1] < 0.9 * found[0]
    assert (whole / "loss.png").stat().st_size > 1000
    assert Tokenizer.from_dir(whole / "model") is not None
    assert models.read_manifest(whole / "model")["origin"]["steps"] == STEPS


def test_a_run_stopped_by_sigterm_saves_and_ends_with_the_same_bits(home, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = train(run(home, tmp_path / "run"))
    assert (result.stopped, result.steps) == (True, 3)
    assert not (tmp_path / "run/model").exists()
    assert train(run(home, tmp_path / "run")).steps == STEPS
    assert losses(tmp_path / "run") == losses(whole)
    assert_same_bits(tmp_path / "run", whole)


def test_an_exception_loses_the_steps_since_the_checkpoint_and_no_more(home, whole, tmp_path, monkeypatch):
    config = run(home, tmp_path / "run", checkpoint={"every": 3})
    with monkeypatch.context() as patch:
        interrupt(patch, 4, lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    began = []
    interrupt(monkeypatch, 3, lambda: began.append(3))
    interrupt(monkeypatch, 2, lambda: began.append(2))
    train(config)
    assert began == [3]
    assert losses(tmp_path / "run") == losses(whole)
    assert_same_bits(tmp_path / "run", whole)


def test_a_run_goes_on_on_another_mesh_with_the_same_loss(home, whole, tmp_path):
    for steps, mesh in ((2, ""), (4, "fsdp=2,tensor=2"), (STEPS, "data=4")):
        train(run(home, tmp_path / "run", steps=steps, mesh=mesh))
    np.testing.assert_allclose(
        list(losses(tmp_path / "run").values()), list(losses(whole).values()), rtol=1e-5
    )


def test_a_finished_run_started_again_does_nothing(home, whole):
    before = {p: p.stat().st_mtime_ns for p in (whole / "model").rglob("*")}
    started = time.perf_counter()
    assert train(run(home, whole)).steps == STEPS
    assert time.perf_counter() - started < 5
    assert before == {p: p.stat().st_mtime_ns for p in (whole / "model").rglob("*")}


def test_a_run_killed_while_it_exports_exports_when_started_again(home, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    train(run(home, tmp_path / "run"))
    assert_same_bits(tmp_path / "run", whole)


def killed_until_done(home, tmp_path, kills, steps, model):
    """A run undisturbed, and one killed at random moments and started again."""
    draw = random.Random(0)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}
    environment = os.environ | cache | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_NUM_CPU_DEVICES": "8"}
    whole, config = (
        run(home, tmp_path / o, model=str(home / model), steps=steps, checkpoint={"every": 2, "keep": 1})
        for o in ("whole", "run")
    )
    train(whole)
    command = [sys.executable, "-m", "jaxseek.cli", "train", toml(config, tmp_path / "run.toml")]
    killed = 0
    for attempt in range(kills + 1):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        log = tmp_path / "run/metrics.jsonl"
        at = draw.randint(attempt * steps // (kills + 1), (attempt + 1) * steps // (kills + 1))
        while attempt < kills and process.poll() is None:
            if log.exists() and len(losses(tmp_path / "run")) >= at:
                time.sleep(draw.random() / 20)
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        killed += process.wait() == -signal.SIGKILL
    assert killed == kills
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert list(losses(tmp_path / "run")) == list(range(steps))
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(home, tmp_path):
    killed_until_done(home, tmp_path, 1, STEPS, "dense")


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_with_the_same_bits(home, tmp_path):
    killed_until_done(home, tmp_path, 10, 80, "sparse")


# -------------------------------------------------------------------- checkpoints


@pytest.fixture
def state(home):
    model = models.restore(home / "dense")
    return init_state(model, make_optimizer(run(home, "o").program, decays(model)))


def kept(tmp_path, home, state, saves):
    checkpoints = Checkpoints(tmp_path, run(home, "o", checkpoint={"keep": 2}).checkpoint)
    for step, loss in saves.items():
        updated = dataclasses.replace(state, step=state.step + 2 * step)  # a step may have several updates
        checkpoints.save(step, updated, {"step": step}, loss)
    checkpoints.wait()
    return checkpoints


def test_the_newest_checkpoints_stay_and_the_best(home, tmp_path, state):
    saves = {1: None, 2: 3.0, 3: 1.0, 4: None, 5: 2.0, 6: None, 7: None}
    checkpoints = kept(tmp_path, home, state, saves)
    assert sorted(p.name for p in checkpoints.directory.iterdir() if p.name.isdigit()) == ["3", "6", "7"]
    assert (checkpoints.latest, checkpoints.best_loss) == (7, 1.0)
    checkpoints.close()
    again = Checkpoints(tmp_path, checkpoints.cfg)
    assert (again.latest, again.best_loss) == (7, 1.0)
    back, position = again.restore(3, state)
    assert position == {"step": 3}
    assert int(back.step) == 6
    chex.assert_trees_all_equal((back.model, back.moments), (state.model, state.moments))
    again.close()


def test_a_checkpoint_is_of_its_step_though_training_goes_on_in_its_memory(home, tmp_path, state):
    step = jax.jit(lambda s: jax.tree.map(lambda a: a + a.dtype.type(1), s), donate_argnums=0)
    sharding = parameters(state.model)["embed_VD"][...].sharding
    large = with_values(
        state.model, {"embed_VD": jax.device_put(np.zeros((320, 1 << 15), np.float32), sharding)}
    )
    state = init_state(large, make_optimizer(run(home, "o").program, decays(large)))
    with state.model.on_mesh():
        checkpoints = Checkpoints(tmp_path, run(home, "o").checkpoint)
        for number in range(1, 5):
            state = step(state)
            checkpoints.save(number, state, None)
    checkpoints.wait()
    for number in (3, 4):
        back, _ = checkpoints.restore(number, state)
        embed_VD = np.asarray(parameters(back.model)["embed_VD"][...])
        assert (embed_VD.min(), embed_VD.max()) == (number, number)
    checkpoints.close()


def test_a_checkpoint_from_when_every_host_had_its_own_place_says_what_to_do(home, tmp_path, state):
    checkpoints = kept(tmp_path, home, state, {1: None})
    (file,) = (checkpoints.directory / "1/run").glob("metadata*")
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | {"positions": saved["positions"] * 2}))
    with pytest.raises(CheckpointError, match="older jaxseek on 2 hosts, each with its own place"):
        checkpoints.restore(1, state)
    checkpoints.close()


def test_too_little_room_is_said_before_anything_is_written(home, tmp_path, state, monkeypatch):
    checkpoints = kept(tmp_path, home, state, {1: None})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"needs 0.00 GB, 0.00 GB are free.*goes on from step 1"):
        checkpoints.save(2, state, None)
    assert checkpoints.restore(1, state)[1] == {"step": 1}
    checkpoints.close()


def test_a_disk_that_fills_while_writing_is_said_and_the_checkpoint_before_restores(
    home, tmp_path, monkeypatch
):
    config = run(home, tmp_path / "run", checkpoint={"every": 2})
    save = ocp.CheckpointManager.save

    def full(self, step, **options):
        if step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(self, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(CheckpointError, match=r"could not be written \(the disk is full\).*from step 2"):
            train(config)
    train(config)
    assert list(losses(tmp_path / "run")) == list(range(STEPS))


# -------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mesh": "fsdp=8"}, "batch.size 4 is not divisible by the mesh's 8 parts of the batch x 1"),
        ({"data": {"length": 512}}, "data.length 512 is more than the model's context of 256"),
        ({"mesh": "context=8", "data": {"length": 12}}, "not divisible by the mesh's 8 parts of the length"),
        ({"tokenizer": "train:4000"}, "'train:4000' is larger than the model's vocabulary of 320"),
        ({"tokenizer": "EMPTY"}, "has no tokenizer; name a directory"),
        ({"model": "tiny-v4"}, "did you mean|similar name: .*tiny-v3"),
        ({"config": {"hidden_siz": 3}}, "config has hidden_siz, which llama models have not"),
        ({"config": {"hidden_size": 64}}, r"\[config\] makes another model"),
        ({"data": {"train": "EMPTY"}}, "no file in"),
        ({"data": {"train": "absent.jsonl"}}, "there is no absent.jsonl"),
        ({"data": {"eval": "EMPTY"}}, "no file in"),
        ({"lora": {"rank": 2, "targets": ["experts"]}}, "of which a llama model has none"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_the_numbers_and_leaves_the_directory_free(
    home, tmp_path, sections, message
):
    (tmp_path / "empty").mkdir()
    text = json.dumps(sections).replace("EMPTY", str(tmp_path / "empty"))
    with pytest.raises((ConfigError, CheckpointError, TokenizerError), match=message):
        train(run(home, tmp_path / "run", **json.loads(text)))
    start.claim(run(home, tmp_path / "run"))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(home, tmp_path):
    train_sentencepiece([TEXT + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 9], 400, tmp_path / "large")
    with pytest.raises(TokenizerError, match="but the embedding has 320 rows"):
        train(run(home, tmp_path / "run", tokenizer=str(tmp_path / "large")))


def test_misspelt_keys_name_their_neighbour(home):
    for sections, message in (
        ({"stps": 3}, "unknown key stps; did you mean steps"),
        ({"optimizer": {"learning_rat": 1.0}}, "did you mean optimizer.learning_rate"),
        ({"warmup": 3}, r"it belongs in \[schedule\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(home, "o", **sections)


def test_a_directory_with_another_run_or_other_things_is_not_touched(home, whole, tmp_path):
    with pytest.raises(ConfigError, match=r"other settings: seed \(was 0, is 1\)\. Choose another out"):
        train(run(home, whole, seed=1))
    start.claim(run(home, whole, mesh="fsdp=2", log={"every": 5}))  # where it runs may change
    shutil.copytree(whole, tmp_path / "older")
    settings = json.loads((whole / "run.json").read_text())
    del settings["optimizer"]["weight_decay"]  # as if it had come since: it has its default
    (tmp_path / "older" / "run.json").write_text(json.dumps(settings | {"out": str(tmp_path / "older")}))
    start.claim(run(home, tmp_path / "older"))
    shutil.rmtree(tmp_path / "older")
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        train(run(home, tmp_path))


# -------------------------------------------------------------------- not finite


def test_weights_that_are_not_finite_are_named_with_their_layer(home, tmp_path):
    model = models.restore(home / "dense")
    q = parameters(model)["stacks.0.attn.q_DKGH"][...]
    broken = with_values(model, {"stacks.0.attn.q_DKGH": q.at[1, 0, 0].set(np.nan)})
    models.save(broken, tmp_path / "model", Tokenizer.from_dir(home / "dense"))
    with pytest.raises(TrainingError, match=r"step 1: .*not: layer 1's attn.q_DKGH.*nothing was saved"):
        train(run(home, tmp_path / "run", model=str(tmp_path / "model")))


def test_an_exploding_run_names_the_layer_keeps_the_last_good_checkpoint_and_exits_with_1(
    home, tmp_path, capsys
):
    config = run(
        home,
        tmp_path / "run",
        optimizer={"learning_rate": 3e18, "weight_decay": 0.0},
        checkpoint={"every": 1},
    )
    assert main(["train", toml(config, tmp_path / "run.toml")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    found = re.search(
        r"step (\d+): loss or gradient is not finite, first after layer 0.*step (\d+) is kept", error
    )
    assert found, error
    assert int(found[2]) == int(found[1]) - 1 == max(losses(tmp_path / "run")) + 1
    kept = exported_step(config, int(found[2]))
    assert all(np.isfinite(a).all() for a in kept.values())


def exported_step(config, step):
    """The parameters in a checkpoint of a run."""
    model = models.restore(config.model)
    state = init_state(model, make_optimizer(config.program, decays(model)))
    checkpoints = Checkpoints(config.out, config.checkpoint)
    back, _ = checkpoints.restore(step, state)
    checkpoints.close()
    return {p: np.asarray(v[...]) for p, v in parameters(back.model).items()}


# -------------------------------------------------------------------- objectives


def test_supervised_fine_tuning_learns_the_answers_and_evaluates(home, tmp_path):
    train(run(home, tmp_path / "run", "sft", data={"holdout": 0.2}, eval={"every": 4, "rows": 4}))
    found = losses(tmp_path / "run", "eval_loss")
    assert list(found) == [0, 3, 7]
    assert found[7] < found[3]
    manifest = models.read_manifest(tmp_path / "run/model")
    assert_close(manifest["origin"]["eval_loss"], found[7], 1e-6)


def test_a_run_with_adapters_exports_base_and_change_and_its_checkpoints_hold_adapters_only(home, tmp_path):
    config = run(home, tmp_path / "run", "sft", lora={"rank": 2}, checkpoint={"every": 4})
    train(config)
    base, after = exported_base(home / "dense"), exported(tmp_path / "run")
    for path, value in after.items():
        assert np.array_equal(value, base[path]) != ("stacks" in path and "norm" not in path), path
    train(run(home, tmp_path / "half", "sft", lora={"rank": 2}, steps=4))
    train(run(home, tmp_path / "half", "sft", lora={"rank": 2}))
    assert_same_bits(tmp_path / "half", tmp_path / "run")
    names = {p.name for p in (tmp_path / "run/checkpoints/8/params").iterdir()}
    held = [json.loads((tmp_path / "run/checkpoints/8/params/_METADATA").read_text())]
    assert names
    assert all(".left" in k or ".right" in k for m in held for k in m["tree_metadata"])


def exported_base(path):
    return {p: np.asarray(v[...]) for p, v in parameters(models.restore(path)).items()}


def test_preferences_raise_the_margin_and_the_reference_is_computed_once(home, tmp_path, monkeypatch):
    config = run(home, tmp_path / "run", "dpo", data={"holdout": 0.2}, eval={"every": 0, "rows": 2}, steps=4)
    train(config)
    found = losses(tmp_path / "run", "margin")
    assert abs(found[0]) < 1e-4  # the model is its own reference
    assert_close(losses(tmp_path / "run")[0], np.log(2), 1e-4)

    def never(*_):
        raise AssertionError("the reference is computed again")

    monkeypatch.setattr(dpo.Dpo, "_computed", never)
    train(run(home, tmp_path / "run", "dpo", data={"holdout": 0.2}, eval={"every": 0, "rows": 2}))
    found = losses(tmp_path / "run", "margin")
    assert list(found) == list(range(STEPS))
    assert found[7] > found[3] > 0.01
    assert len(losses(tmp_path / "run", "eval_margin")) == 2


def test_distillation_by_logits_lowers_the_divergence_and_leaves_the_teacher(home, tmp_path):
    train(run(home, tmp_path / "run", "distill", distill={"teacher": str(home / "teacher")}))
    found = losses(tmp_path / "run", "kl")
    assert found[STEPS - 1] < 0.8 * found[0]


def test_distillation_by_samples_trains_on_finished_answers_and_goes_on_sampling(home, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "BATCH", 4)
    given = {"teacher": str(home / "teacher"), "by": "samples", "max_new_tokens": 12, "per_prompt": 2}

    def config(out):
        write_jsonl(home / "prompts.jsonl", [{"prompt": f"the {w}"} for w in TEXT.split()[:6]])
        return run(home, out, "distill", distill=given, data={"train": str(home / "prompts.jsonl")}, steps=2)

    train(config(tmp_path / "run"))
    lines = (tmp_path / "run/samples.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 12
    records = [json.loads(line) for line in lines]
    assert [r["messages"][0]["content"] for r in records[:3]] == ["the the", "the the", "the quick"]
    finished = (tmp_path / "run/samples.finished.jsonl").read_text().splitlines(keepends=True)
    assert finished == [l for l, r in zip(lines, records) if r["finish_reason"] == "stop"]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/run.json").write_text(json.dumps(config(tmp_path / "cut").to_dict()))
    (tmp_path / "cut/samples.jsonl").write_text("".join(lines[:4]) + lines[4][:9])
    train(config(tmp_path / "cut"))
    assert (tmp_path / "cut/samples.jsonl").read_text().splitlines(keepends=True) == lines
    assert losses(tmp_path / "cut") == losses(tmp_path / "run")
