"""The quickstart with next to no time: it ends, says what came of it, and goes on with what is there.

Its model is a smaller one here, and so are the held-out problems; tests/parity has it as it is.
"""

import dataclasses
import json

import pytest

import jaxseek
from jaxseek.checkpoint import models
from jaxseek.cli.main import main
from jaxseek.config.model import configs_dir
from jaxseek.recipes import quickstart as quick
from jaxseek.recipes.quickstart import Quickstart, quickstart
from jaxseek.sharding.parameters import parameters
from jaxseek.train.metrics import read_metrics
from jaxseek_convert import convert

pytestmark = pytest.mark.usefixtures("quick_compilation")

MINUTES = 0.001  # a step of each stage
PROBLEMS = 64


@pytest.fixture(scope="module", autouse=True)
def smaller(tmp_path_factory):
    """The shipped file with another model."""
    directory = tmp_path_factory.mktemp("configs")
    text = (configs_dir() / "runs" / "quickstart.toml").read_text("utf-8")
    small = "num_hidden_layers = 1, first_k_dense_replace = 0, num_nextn_predict_layers = 0"
    for old, new in (
        (
            'model = "tiny-r1"',
            f'model = "tiny-r1"\nconfig = {{ {small} }}',
        ),
        ("held_out = 500", f"held_out = {PROBLEMS}"),
        ('kind = "cosine"', 'kind = "constant"'),  # so that two stages have one program
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (directory / "runs").mkdir()
    (directory / "runs" / "quickstart.toml").write_text(text, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick, "configs_dir", lambda: directory)
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out, told = tmp_path_factory.mktemp("quick") / "run", []
    return out, quickstart(out, seed=3, minutes=MINUTES, tell=told.append), "".join(told)


def test_it_ends_a_step_after_its_time_in_every_stage(ran):
    out, result, told = ran
    for name in quick.SHARES:
        assert name in told
        assert json.loads((out / name / "stage.json").read_text())["steps"] == 1
        assert json.loads((out / name / "run.json").read_text())["seed"] == 3
    assert (result.grpo_steps, result.seed, result.problems) == (1, 3, PROBLEMS)


def test_its_figures_are_those_of_the_logs_and_answers(ran):
    out, result, _ = ran
    measured = [r for r in read_metrics(out / "think") if "eval_accuracy" in r]
    assert (result.accuracy_before, result.accuracy_after) == tuple(r["eval_accuracy"] for r in measured)
    for accuracy, step in ((result.accuracy_before, 0), (result.accuracy_after, 1)):
        lines = (out / "think" / "answers" / f"{step:06}.jsonl").read_text().splitlines()
        answers = [json.loads(line) for line in lines]
        assert accuracy == pytest.approx(sum(a["correct"] for a in answers) / PROBLEMS)
        when = ("before", "after")[step]
        said = {a["prompt"]: a["text"] for a in answers}
        assert [said[e["prompt"]] for e in result.examples] == [e[when] for e in result.examples]
    assert len(result.examples) == 3


def test_it_leaves_a_checkpoint_a_curve_and_a_model_for_transformers_with_the_same_weights(ran, tmp_path):
    out, result, _ = ran
    assert (out / "quickstart.png").read_bytes()[:4] == b"\x89PNG"
    model, tokenizer = jaxseek.load(result.checkpoint)
    assert tokenizer is not None
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {
        p.name for p in (out / "hf").iterdir()
    }
    convert(result.hf, tmp_path / "back", progress=False)
    back = parameters(models.restore(tmp_path / "back"))
    for path, value in parameters(model).items():
        assert models.same_bits(value[...], back[path][...]), path


def test_it_says_what_came_of_it(ran):
    _, result, _ = ran
    fields = json.loads(json.dumps(dataclasses.asdict(result)))
    assert set(fields) == {field.name for field in dataclasses.fields(Quickstart)}
    assert set(fields["examples"][0]) == {"prompt", "answer", "before", "after"}
    text = str(result)
    assert f"{result.accuracy_after:.1%}" in text
    assert f"jaxseek generate {result.checkpoint}" in text
    assert f"{PROBLEMS} problems it has never seen" in text


def test_started_again_it_trains_nothing_and_says_the_same(ran, capsys):
    out, result, _ = ran
    before = {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")}
    assert main(["quickstart", "--out", str(out), "--seed", "3", "--minutes", str(MINUTES), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = dataclasses.asdict(result)
    assert {k: v for k, v in fields.items() if k != "seconds"} == {
        k: v for k, v in expected.items() if k != "seconds"
    }
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")}


def test_no_time_at_all_is_refused_and_a_signal_is_passed_on(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="minutes is 0, expected above 0"):
        quickstart(tmp_path / "run", minutes=0)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(quick, "run_pipeline", lambda *_: type("Stopped", (), {"stopped": True}))
    with pytest.raises(KeyboardInterrupt):
        quickstart(tmp_path / "run")
