"""Records survive a kill and a resumed run, the plot is drawn, and progress is plain without a terminal."""

import io
import json
import struct
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxseek.config.model import ConfigError, ModelConfig
from jaxseek.config.run import LogConfig
from jaxseek.sharding.strategy import Strategy
from jaxseek.train import metrics
from jaxseek.train.metrics import (
    MetricsLog,
    Progress,
    peak_flops,
    plot_loss,
    read_metrics,
    summarize,
    train_flops,
)

ALONE = LogConfig(tensorboard=False)


def steps_of(directory):
    return [r["step"] for r in read_metrics(directory)]


def test_each_record_is_a_line_of_json_that_is_there_at_once(tmp_path):
    log = MetricsLog(tmp_path / "run", ALONE)
    log.write(0, {"loss": jnp.float32(2.5), "learning_rate": 1e-4, "dropped": np.int32(3)})
    log.write(1, {"loss": float("nan")})
    first, second = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first.pop("time") > 1e9
    assert first == {"step": 0, "loss": 2.5, "learning_rate": 1e-4, "dropped": 3}
    assert second["loss"] is None
    log.close()
    log.close()


def test_a_resumed_run_cuts_off_what_it_does_again(tmp_path):
    with MetricsLog(tmp_path, ALONE) as log:
        for step in range(10):
            log.write(step, {"loss": 10 - step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # killed as it wrote
    with MetricsLog(tmp_path, ALONE, resume_step=7) as log:
        assert steps_of(tmp_path) == list(range(7))
        log.write(7, {"loss": 0})
    assert steps_of(tmp_path) == list(range(8))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    with MetricsLog(tmp_path, ALONE, resume_step=0):
        assert steps_of(tmp_path) == []


def test_a_kill_while_records_are_cut_off_leaves_them_all(tmp_path, monkeypatch):
    with MetricsLog(tmp_path, ALONE) as log:
        for step in range(4):
            log.write(step, {"loss": step})

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(tmp_path, ALONE, resume_step=2)
    assert steps_of(tmp_path) == [0, 1, 2, 3]


def test_tensorboard_has_every_finite_number_and_is_purged_where_a_run_goes_on(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with MetricsLog(tmp_path, LogConfig(), resume_step=5) as log:
        log.write(5, {"loss": 2.5, "learning_rate": float("inf")})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert [e.step for e in events if e.HasField("session_log")] == [5]
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [(5, "loss", 2.5)]


def test_wandb_is_used_where_it_is_named_and_goes_on_with_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log.wandb is 'seek', but wandb is not installed"):
        MetricsLog(tmp_path, LogConfig(tensorboard=False, wandb="seek"))
    assert not list(tmp_path.iterdir())

    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("finished")
    )
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(metrics.importlib, "import_module", lambda name: fake)
    for step in (0, 1):
        with MetricsLog(tmp_path, LogConfig(tensorboard=False, wandb="seek"), resume_step=step) as log:
            log.write(step, {"loss": 1.0})
    first, _, _, second, logged, finished = calls
    assert first == second
    assert (first["project"], first["resume"]) == ("seek", "allow")
    assert (logged, finished) == (({"loss": 1.0}, 1), "finished")


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsLog(tmp_path / "run", LogConfig()) as log, Progress(3) as progress:
        log.write(0, {"loss": 1.0})
        progress.update(0, {"loss": 1.0})
        progress.note("text")
    plot_loss(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_metrics_of_a_step_become_numbers():
    load_LE = jnp.array([[4, 4, 4, 4], [8, 0, 4, 4]])
    found = summarize({"loss": jnp.float32(1.5), "tokens": jnp.int32(3)}, load_LE)
    assert found == {"loss": 1.5, "tokens": 3.0, "load_max_over_mean": 1.5}
    assert summarize({"loss": jnp.float32(1.5)}) == {"loss": 1.5}


@pytest.mark.parametrize("sparse", [False, True])
def test_the_plot_is_drawn_from_the_records(tmp_path, sparse):
    with MetricsLog(tmp_path, ALONE) as log:
        for step in range(120):
            values = {"loss": 8 / (1 + step / 9), "learning_rate": 1e-3}
            log.write(step, values | ({"load_max_over_mean": 1.3} if sparse else {}))
            if step % 40 == 39:
                log.write(step, {"eval_loss": 8.5 / (1 + step / 9)})
        log.write(120, {"loss": float("nan")})
    path = plot_loss(tmp_path)
    assert path == tmp_path / "loss.png"
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG")
    assert (height > 0.7 * width) == sparse  # a second panel


def test_a_plot_without_a_loss_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no loss to plot"):
        plot_loss(tmp_path)


def test_progress_prints_plain_lines_where_there_is_no_terminal(monkeypatch):
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with Progress(200, console=Console(file=out, width=40)) as progress:
        for step in range(200):
            now[0] += 1.0
            values = {"loss": 2.0, "tokens_per_second": 12345, "mfu": 0.31, "load_max_over_mean": 1.5}
            progress.update(step, values | {"dropped": 7.0})
        progress.note("eval loss 1.9")
    lines = out.getvalue().splitlines()
    assert len(lines) == 200 // 5 + 1
    assert lines[0].startswith("5/200  3:15 left  loss 2.0000  12,345 tok/s  31.0% of peak")
    assert lines[0].endswith("load max/mean 1.50  dropped 7")
    assert lines[-2].startswith("200/200  0:00 left")
    assert lines[-1] == "eval loss 1.9"


def test_progress_is_a_bar_in_a_terminal_and_says_the_last_line_when_it_stops():
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    with Progress(2, console=console) as progress:
        progress.update(0, {"loss": 3.0})
        progress.note("saved")
        progress.update(1, {"loss": 2.0})
    assert "━" in out.getvalue()
    assert "saved" in out.getvalue()
    assert "2/2  0:00 left  loss 2.0000" in out.getvalue()


def test_the_peak_is_the_chips_or_what_this_cpu_does():
    one, eight = (Strategy.parse(mesh).make_mesh() for mesh in (None, "data=8"))
    assert peak_flops(one) == peak_flops(eight) > 1e9  # simulated devices share the machine

    def mesh(kind, coords, platform="tpu"):
        device = [
            types.SimpleNamespace(platform=platform, device_kind=kind, process_index=0, coords=c)
            for c in coords
        ]
        return types.SimpleNamespace(devices=np.array(device, object))

    assert peak_flops(mesh("TPU v5p", [(0, 0, 0), (1, 0, 0)])) == 2 * 459e12
    assert peak_flops(mesh("TPU7x", [(0, 0, 0), (0, 0, 0)])) == 2307e12  # two devices, one chip
    assert peak_flops(mesh("some GPU", [(0, 0, 0)], "gpu")) is None


def test_training_flops_are_six_per_parameter_and_token_plus_half_of_attention():
    dense = ModelConfig.from_preset("deepseek-llm-7b-base")
    D, L, F, V = 4096, 30, 11008, 102400
    matrices = L * (4 * D * D + 3 * D * F) + V * D
    norms = (2 * L + 1) * D  # counted, and nothing beside the rest
    expected = 1000 * (6 * (matrices + norms) + 12 * L * D * 4096 / 2)
    assert train_flops(dense, 1000, 4096) == pytest.approx(expected, rel=1e-12)


def test_a_multi_token_module_costs_a_layer_a_projection_and_a_head():
    cfg = ModelConfig.from_preset("tiny-v3")
    D, V, T = cfg.hidden_size, cfg.vocab_size, 512
    layer = 6 * (_active_layer(cfg) + 2 * D * D + V * D) + 6 * 4 * (128 + 64) * T / 2
    without = cfg.replace(num_nextn_predict_layers=0)
    assert train_flops(cfg, 1, T) - train_flops(without, 1, T) == pytest.approx(layer, rel=1e-9)


def _active_layer(cfg):
    """Parameters that a token uses in a sparse layer of tiny-v3, counted by hand."""
    D, Q, C, R, F = 256, 128, 128, 64, 128
    attention = D * Q + Q + Q * 4 * 128 + D * (C + R) + C + C * 4 * (64 + 64) + 4 * 64 * D
    return attention + 2 * D + D * 16 + 16 + (4 + 1) * 3 * D * F
