"""Checkpoints of a run that are damaged, a run's second process, and disks and terminals that fail it."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from damage import flipped_bits
from rich.console import Console
from training_runs import assert_same_bits, losses, make_home, run

from jaxseek.checkpoint.digests import NAME, NO_CHECKSUM
from jaxseek.checkpoint.directory import LOCK, CheckpointError, alone
from jaxseek.config.model import ConfigError
from jaxseek.config.run import LogConfig
from jaxseek.recipes.pipeline import run_stage as train
from jaxseek.storage.place import Log
from jaxseek.train import trainer
from jaxseek.train.checkpoints import Checkpoints
from jaxseek.train.metrics import MetricsLog, Progress
from jaxseek.train.tensorboard import TensorBoard
from jaxseek.train.trainer import TrainingError

pytestmark = pytest.mark.usefixtures("quick_compilation", "undrawn")

ROOT = Path(__file__).parents[2]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """A run of four steps, with checkpoints 2 and 4."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(settings(home, out))
    return out


@pytest.fixture(scope="module")
def longer(home, tmp_path_factory):
    """The same run of six steps."""
    out = tmp_path_factory.mktemp("longer") / "run"
    train(settings(home, out, 6))
    return out


def settings(home, out, steps=4, **sections):
    return run(home, out, steps=steps, checkpoint={"every": 2}, **sections)


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def newest(out, home):
    with contextlib.closing(Checkpoints(out, settings(home, out).checkpoint)) as checkpoints:
        return checkpoints.newest_whole()


def files(folder):
    """From the smallest to the largest."""
    found = (f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("digests"))
    return sorted(found, key=lambda f: f.stat().st_size)


# -------------------------------------------------------------------- damage


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_any_bit_that_flips_in_a_training_checkpoint_is_found(count, copy, home):
    assert newest(copy, home) == 4
    for name in flipped_bits(copy / "checkpoints" / "4", count):
        assert newest(copy, home) == 2, name
    assert newest(copy, home) == 4


def lose(folder):
    files(folder)[-1].unlink()


def garble(folder):
    for file in files(folder):
        if file.read_bytes()[:1] == b"{":
            file.write_text("{")


def truncate(folder):
    for file in files(folder):
        os.truncate(file, file.stat().st_size // 2)


def empty(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            os.truncate(file, 0)


def cut_before_its_digests(folder):
    (folder / NAME).unlink()
    os.truncate(folder / "params" / "manifest.ocdbt", 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's, after an error
@pytest.mark.parametrize("damage", [lose, garble, truncate, empty, cut_before_its_digests])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(damage, copy, longer, home, caplog):
    damage(copy / "checkpoints" / "4")
    train(settings(home, copy, 6))
    (line,) = (r.getMessage() for r in caplog.records if "damaged (" in r.getMessage())
    assert "damaged (step 4: " in line
    assert line.endswith("going on from step 2 instead")
    assert losses(copy) == losses(longer)
    assert_same_bits(copy, longer)
    assert newest(copy, home) == 6
    os.truncate(copy / "checkpoints" / "6" / "run" / "metadata", 3)
    assert newest(copy, home) == 4  # which the second save of step 4 replaced


def test_where_every_checkpoint_is_damaged_all_are_named_and_none_is_deleted(copy, home):
    for step in ("2", "4"):
        lose(copy / "checkpoints" / step)
    before = sorted(copy.rglob("*"))
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged \(step 4: .*; step 2: .*\); put"):
        train(settings(home, copy, 6))
    assert sorted(copy.rglob("*")) == before


def test_a_checkpoint_without_digests_is_read_with_a_line(copy, longer, home, caplog):
    (copy / "checkpoints" / "4" / NAME).unlink()
    train(settings(home, copy, 6))
    assert "checkpoints/4: has no digests (an older jaxseek wrote it" in caplog.text
    assert_same_bits(copy, longer)


def test_checks_can_be_switched_off_which_is_said(copy, home, monkeypatch, caplog):
    file = copy / "checkpoints" / "4" / "run" / "metadata"
    file.write_text(file.read_text() + " ")
    monkeypatch.setenv(NO_CHECKSUM, "1")
    assert newest(copy, home) == 4
    assert f"checkpoints/4: is read unchecked, by {NO_CHECKSUM}" in caplog.text


def test_a_loss_that_changed_on_the_disk_does_not_make_a_checkpoint_the_best(copy, home):
    (copy / "checkpoints" / "2" / "metrics" / "metrics").write_text('{"loss": -9}')
    checkpoints = Checkpoints(copy, settings(home, copy).checkpoint)
    assert checkpoints.best_loss == float("inf")
    checkpoints.close()


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000])
def test_settings_of_a_run_that_cannot_be_read_are_an_error_that_names_them(text, copy, home):
    (copy / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run.json: is damaged \(.*put back a copy of it"):
        train(settings(home, copy, 6))


def test_reference_logprobs_that_changed_on_the_disk_are_refused(home, tmp_path):
    train(run(home, tmp_path / "run", "dpo", steps=1))
    path = tmp_path / "run" / "reference.npz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"reference.npz: is damaged .*; remove it, it is computed"):
        train(run(home, tmp_path / "run", "dpo", steps=2))


# -------------------------------------------------------------------- one process


def test_a_second_process_on_a_run_is_refused_and_one_that_was_killed_is_no_hindrance(home, tmp_path):
    out = tmp_path / "run"
    hold = (
        "import sys, pathlib, time; from jaxseek.checkpoint.directory import alone\n"
        f"with alone(pathlib.Path({str(out / LOCK)!r})): print('held', flush=True); time.sleep(99)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'convert'}"},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(CheckpointError, match=rf"another process is at work there \(process {holder.pid} on"):
        train(settings(home, out))
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert (out / LOCK).exists()
    train(settings(home, out, 1))
    assert not (out / LOCK).exists()


def test_on_a_file_system_without_locks_the_later_process_stops_the_earlier(
    home, tmp_path, monkeypatch, caplog
):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", unsupported)
    monkeypatch.setattr("jaxseek.checkpoint.directory._SECONDS", 0.0)
    begun, update = [], trainer.Progress.update

    def patched(self, step, values):
        update(self, step, values)
        if step == 1 and not begun:
            begun.append(True)
            train(settings(home, tmp_path / "run"))

    monkeypatch.setattr(trainer.Progress, "update", patched)
    with pytest.raises(CheckpointError, match=r"another process has begun to write there"):
        train(settings(home, tmp_path / "run"))
    assert "has no file locks" in caplog.text
    assert newest(tmp_path / "run", home) == 4


# -------------------------------------------------------------------- signals, and what cannot be written


def interrupt(monkeypatch, step, act):
    """Do something when a step is recorded."""
    update = trainer.Progress.update

    def patched(self, s, values):
        update(self, s, values)
        if s == step:
            act()

    monkeypatch.setattr(trainer.Progress, "update", patched)


def test_a_closed_terminal_saves_the_run(home, longer, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    with monkeypatch.context() as patch:
        interrupt(patch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
        result = train(settings(home, tmp_path / "run", 6))
    signal.signal(signal.SIGHUP, before)
    assert (result.stopped, result.steps) == (True, 3)
    train(settings(home, tmp_path / "run", 6))
    assert_same_bits(tmp_path / "run", longer)


def test_under_nohup_a_closed_terminal_is_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with trainer.signals() as asked_to_stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not asked_to_stop()
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_run_whose_metrics_cannot_be_written_saves_and_says_so(home, longer, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text(json.dumps(settings(home, out, 6).to_dict()))
    (out / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        TrainingError, match=r"metrics.jsonl cannot be written \(.*No space left.*after step 1, w"
    ):
        train(settings(home, out, 6))
    (out / "metrics.jsonl").unlink()
    train(settings(home, out, 6))
    assert list(losses(out)) == [1, 2, 3, 4, 5]
    assert_same_bits(out, longer)


@pytest.mark.parametrize("method", ["__init__", "write", "close"])
def test_a_run_goes_on_without_tensorboard_where_it_cannot_be_written(method, tmp_path, monkeypatch, caplog):
    genuine = getattr(TensorBoard, method)

    def full(self, *args):
        if method == "close":
            genuine(self)
        raise FULL

    monkeypatch.setattr(TensorBoard, method, full)
    with MetricsLog(tmp_path, LogConfig()) as log:
        for step in range(50):
            log.write(step, {"loss": step})
    assert not log.failed
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 50
    assert caplog.text.count("TensorBoard cannot be written (OSError: [Errno 28]") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_goes_on_where_its_progress_cannot_be_written(terminal, caplog):
    file = open("/dev/full", "w")  # noqa: SIM115 - closing it fails
    with Progress(2, console=Console(file=file, force_terminal=terminal)) as progress:
        for step in range(2):
            progress.note("text")
            progress.update(step, {"loss": 1.0})
    assert caplog.text.count("the output cannot be written") == 1
    with contextlib.suppress(OSError):
        file.close()


def test_a_picture_that_cannot_be_drawn_costs_no_run(home, tmp_path, monkeypatch, caplog):
    def full(_):
        raise FULL

    monkeypatch.setattr("jaxseek.train.pretrain.plot_loss", full)
    assert train(settings(home, tmp_path / "run", 1)).steps == 1
    assert "picture cannot be drawn" in caplog.text


def test_the_lock_of_a_run_is_not_a_file_of_it(home, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text("process 1 on elsewhere, 2")
    train(settings(home, tmp_path / "run", 1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        train(settings(home, tmp_path / "mine", 1))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["note"]


def test_a_log_that_cannot_be_written_names_its_file(tmp_path):
    (tmp_path / "log").symlink_to("/dev/full")
    log = Log(tmp_path / "log")
    with pytest.raises(OSError, match=r"No space left on device: '.*/log'"):
        log.add("line")
    with contextlib.suppress(OSError):
        log.close()
    with alone(tmp_path / LOCK):
        pass
