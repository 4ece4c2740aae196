"""Whole runs by GRPO: sampler and trainer agree, runs end the same however interrupted and on every mesh, and
what is wrong is said."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from oracles import slow
from policies import (
    ENDS,
    SAME,
    answers_in,
    config,
    make_home,
    steps_of,
    trained,
    values_of,
)
from training_runs import assert_same_bits, exported

from jaxseek.checkpoint import models
from jaxseek.config.model import ConfigError
from jaxseek.engine.engine import Engine
from jaxseek.recipes.pipeline import run_stage
from jaxseek.rl import recipe
from jaxseek.rl.evaluate import Marking
from jaxseek.rl.watch import Alarms
from jaxseek.sharding.parameters import parameters
from jaxseek.train.metrics import read_metrics
from jaxseek.train.start import finished
from jaxseek.train.trainer import Progress, TrainingError

pytestmark = pytest.mark.usefixtures("quick_compilation", "undrawn")

ROOT = Path(__file__).parents[2]
STEPS = 6
# All that a run has to remember: its schedule, place in the task, reference, and updates within a step.
MUCH = {
    "steps": STEPS,
    "grpo": {"beta": 0.04, "dynamic_sampling": True, "minibatches": 2, "epochs": 2, "group_size": 4},
    "reference": {"replace_every": 2},
    "schedule": {"kind": "linear", "final": 0.1},
    "optimizer": {"learning_rate": 3e-3},
    "rollout": {"temperature": 0.8},
    "eval": {"every": 3},
    "checkpoint": {"every": 2},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    trained(home, out, "dense", **MUCH)
    return out


@pytest.fixture
def seen(monkeypatch):
    """What was rewarded: (problem's prompt, answer's text) of every call."""
    calls = []
    mark = Marking.__call__

    def patched(self, answers):
        calls.append([(a.problem.prompt, a.text, a.tokens) for a in answers])
        return mark(self, answers)

    monkeypatch.setattr(Marking, "__call__", patched)
    return calls


def rewarded(monkeypatch, function):
    """Rewards from a function of (call number, answers) in place of the run's; evaluations count."""
    numbers = iter(range(1000))

    def patched(self, answers):
        totals = np.asarray(function(next(numbers), answers), np.float64)
        self.failure = "answer 0, reward length: it was told to fail" if np.isnan(totals).any() else ""
        return totals, dict.fromkeys(self._names, totals)

    monkeypatch.setattr(Marking, "__call__", patched)


# -------------------------------------------------------------------- interrupted


def interrupt(monkeypatch, step, act):
    """Do something when a step is recorded."""
    update = Progress.update

    def patched(self, s, values):
        update(self, s, values)
        if s == step:
            act()

    monkeypatch.setattr(Progress, "update", patched)


def assert_same_run(a, b):
    assert values_of(steps_of(a), *SAME) == values_of(steps_of(b), *SAME)
    evaluated = [[(r["step"], r["eval_accuracy"]) for r in read_metrics(o) if "eval_accuracy" in r]
                 for o in (a, b)]  # fmt: skip
    assert evaluated[0] == evaluated[1]
    assert_same_bits(a, b)
    for path in (Path(b) / "answers").iterdir():
        assert path.read_text() == (Path(a) / "answers" / path.name).read_text()


def test_a_run_records_every_step_evaluates_and_leaves_a_model_and_a_plot(whole, home):
    found = steps_of(whole)
    assert len(found) == STEPS
    assert all(r["reward_std"] > 0 and r["grad_norm"] > 0 for r in found)
    assert [r["step"] for r in read_metrics(whole) if "eval_accuracy" in r] == [0, 2, 5]
    assert sorted(p.name for p in (whole / "answers").iterdir()) == [f"{n:06}.jsonl" for n in (0, 3, 6)]
    assert (whole / "rewards.png").stat().st_size > 1000
    assert models.read_manifest(whole / "model")["origin"]["steps"] == STEPS
    assert {"4", "6"} <= {p.name for p in (whole / "reference").iterdir()}
    before = {p: np.asarray(v[...]) for p, v in parameters(models.restore(home / "dense")).items()}
    for path, value in exported(whole).items():
        assert not np.array_equal(value, before[path]), path


def test_sampler_and_trainer_agree_after_updates_within_a_step_and_at_a_temperature(whole):
    """The sampler has the new weights: after large updates it would be far off with the old ones."""
    found = steps_of(whole)
    assert all(r["gap_max"] < 1e-4 for r in found)
    assert all(r["ratio_max"] > 1.02 for r in found)


def test_a_run_stopped_by_sigterm_ends_with_the_same_bits(home, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = run_stage(config(home, tmp_path / "run", "dense", **MUCH))
    assert (result.stopped, result.steps) == (True, 3)
    assert not (tmp_path / "run/model").exists()
    result = run_stage(config(home, tmp_path / "run", "dense", **MUCH))
    assert (result.stopped, result.steps) == (False, STEPS)
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_run_does_nothing_and_still_knows_its_accuracy(home, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.suffix != ".png"}
    result = run_stage(config(home, whole, "dense", **MUCH))
    accuracy = [r["eval_accuracy"] for r in read_metrics(whole) if "eval_accuracy" in r][-1]
    assert result.steps == STEPS
    assert abs(result.accuracy - accuracy) < 1e-6
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.suffix != ".png"}


SCRIPT = """
import sys
from jaxseek.recipes.pipeline import run_stage
from jaxseek.config.run import RunConfig
import json
run_stage(RunConfig.from_dict(json.loads(sys.argv[1])))
"""


def command(run):
    return [sys.executable, "-c", SCRIPT, json.dumps(run.to_dict())]


def environment():
    cache = {"JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_NUM_CPU_DEVICES": "8"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | cache | quick | {"PYTHONPATH": path}


def killed_until_done(run, kills):
    """A run that is killed at random moments and started again until it ends."""
    draw, out, killed = random.Random(0), Path(run.out), 0
    for attempt in range(kills + 1):
        process = subprocess.Popen(command(run), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
        at = draw.randint(attempt * run.steps // (kills + 1), (attempt + 1) * run.steps // (kills + 1) - 1)
        log = out / "metrics.jsonl"
        while attempt < kills and process.poll() is None:
            if log.exists() and sum("reward" in r for r in read_metrics(out)) >= at:
                time.sleep(draw.random() / 10)
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        killed += process.wait() == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL)
    assert killed == kills


@pytest.mark.slow  # a pipeline's kill is in the default run
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(home, whole, tmp_path):
    killed_until_done(config(home, tmp_path / "run", "dense", **MUCH), kills=1)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_run_killed_eight_times_ends_with_the_same_bits(home, tmp_path):
    """Of experts, whose routing is replayed; one checkpoint is kept, and the best."""
    grpo = MUCH["grpo"] | {"routing_replay": True}
    long = MUCH | {"steps": 40, "checkpoint": {"every": 3, "keep": 1}, "grpo": grpo}
    trained(home, tmp_path / "whole", **long)
    killed_until_done(config(home, tmp_path / "run", **long), kills=8)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_checkpoint_older_than_the_newest_references_finds_its_own(home, tmp_path, monkeypatch):
    """Checkpoints every 6 steps and a new reference at each: the run goes on from 6 at step 11."""
    often = {"steps": 12, "reference": {"replace_every": 1}, "checkpoint": {"every": 6}}
    with monkeypatch.context() as patch:
        interrupt(patch, 10, lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run_stage(config(home, tmp_path / "run", "dense", grpo={"beta": 0.1}, **often))
    assert {"6", "11"} <= {p.name for p in (tmp_path / "run/reference").iterdir()}
    found = trained(home, tmp_path / "run", "dense", grpo={"beta": 0.1}, **often)
    assert [r["kl"] < 1e-6 for r in found] == [True] * 12  # each step begins at its reference


# -------------------------------------------------------------------- sampler and trainer


@pytest.mark.parametrize("model", ["sparse", slow("dense")])
def test_sampler_and_trainer_agree_in_float32(home, tmp_path, model):
    found = trained(home, tmp_path / "run", model, steps=2, rollout={"temperature": 0.6, "top_p": 0.9})
    assert all(r["gap_max"] < 1e-4 for r in found)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("model", ["tiny-llm", "tiny-moe", "tiny-v2", "tiny-r1"])
def test_sampler_and_trainer_agree_in_float32_for_every_shipped_architecture(
    home, tmp_path, model, temperature, monkeypatch
):
    rewarded(monkeypatch, lambda number, answers: np.arange(len(answers)))
    found = trained(
        home, tmp_path / "run", model, rollout={"temperature": temperature}, optimizer={"learning_rate": 1e-3}
    )
    print(f"FIGURE {model} T={temperature} gap_max {max(r['gap_max'] for r in found):.1e}")
    assert all(r["gap_max"] < 1e-4 and r["grad_norm"] > 0 for r in found)


@pytest.mark.slow
def test_a_bfloat16_rollout_routes_some_tokens_elsewhere_and_replay_brings_the_trainer_along(home, tmp_path):
    """The same answers, as the weights are the same: the trainer is nearer to them with their experts."""
    common = {"steps": 1, "rollout": {"dtype": "bfloat16", "record_experts": True, "prompts": 8}}
    (own,) = trained(home, tmp_path / "own", **common)
    (replayed,) = trained(home, tmp_path / "replayed", grpo={"routing_replay": True}, **common)
    assert own["tokens"] == replayed["tokens"]
    assert own["reward"] == replayed["reward"]
    print(f"FIGURE rerouted {own['rerouted']:.4f} / {replayed['rerouted']:.4f}, gap {own['gap']:.5f} / "
          f"{replayed['gap']:.5f}, max {own['gap_max']:.4f} / {replayed['gap_max']:.4f}")  # fmt: skip
    assert own["rerouted"] > 0
    assert replayed["rerouted"] > 0
    assert 1e-4 < replayed["gap_max"] < own["gap_max"]


def test_importance_weights_are_against_what_was_drawn_from_and_the_gap_is_not(home, tmp_path, monkeypatch):
    """With top-p 0.5 the policy gives a drawn token at least half of the probability that it was drawn with,
    and less than all of it; without filters both are the same, and evaluations share the rollout's program.
    """
    grpo = {"old_logprobs": "trainer", "importance_cap": 2.0}
    weights, decode, modes = {}, Engine.decode, {}

    def seen(self, *args):
        modes.setdefault(top_p, set()).add(args[7])
        return decode(self, *args)

    monkeypatch.setattr(Engine, "decode", seen)
    for top_p in (0.5, 1.0):
        rollout = {"top_p": top_p}
        (found,) = trained(home, tmp_path / f"{top_p}", "dense", grpo=grpo, rollout=rollout, steps=1)
        assert found["gap_max"] < 1e-4
        weights[top_p] = found["importance"]
    assert 0.5 <= weights[0.5] < 0.9
    np.testing.assert_allclose(weights[1.0], 1, atol=1e-4)
    assert modes == {0.5: {"filtered", "greedy"}, 1.0: {"plain"}}


def test_noise_differs_at_every_step(home, tmp_path, seen):
    """One problem, and weights that stay: what differs is the noise alone."""
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "1+2=", "answer": "3"}) + "\n")
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "2+2=", "answer": "4"}) + "\n")
    data = {"train": str(tmp_path / "one.jsonl"), "eval": str(tmp_path / "held.jsonl")}
    task = {"kind": "jsonl", "held_out": 1}
    trained(home, tmp_path / "run", "dense", data=data, task=task, optimizer={"learning_rate": 1e-30})
    answers = [[text for prompt, text, _ in call if prompt == "1+2="] for call in seen]
    by_step = [texts for texts in answers if texts]
    assert [len(texts) for texts in by_step] == [8] * 3
    assert len({tuple(texts) for texts in by_step}) == 3
    assert all(len(set(texts)) > 4 for texts in by_step)


# -------------------------------------------------------------------- meshes


@functools.cache
def curve(home, out, model, mesh, steps):
    found = trained(
        home, out, model, mesh=mesh, steps=steps, grpo={"beta": 0.04, "routing_replay": model == "sparse"},
        rollout={"prompts": 4}, optimizer={"learning_rate": 1e-3},
    )  # fmt: skip
    return [[r[name] for r in found] for name in ("reward", "loss", "grad_norm", "kl", "tokens")]


@pytest.fixture(scope="module")
def one_device(home, tmp_path_factory):
    return tmp_path_factory.mktemp("one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mesh", "steps"),
    [
        ("dense", "fsdp=4,tensor=2", 4),
        *(("sparse", m, 10) for m in (
            "data=2,expert=4", "fsdp=4,tensor=2", "fsdp=8", "context=2,expert=4", "data=2,context=2,tensor=2"
        )),
    ],
)  # fmt: skip
def test_a_mesh_learns_as_one_device_does(home, one_device, tmp_path, model, mesh, steps):
    expected = curve(home, one_device / f"{model} {steps}", model, "", steps)
    got = curve(home, tmp_path / "run", model, mesh, steps)
    assert got[0] == expected[0]  # the same answers
    assert got[4] == expected[4]
    for own, one in zip(got[1:4], expected[1:4]):
        np.testing.assert_allclose(own, one, rtol=1e-3, atol=1e-6)


# -------------------------------------------------------------------- variants

LORA = {"lora": {"rank": 2}, "reference": {"kind": "base"}}
QUICK = {
    "adapters on a mesh": {"model": "dense", "mesh": "fsdp=4,tensor=2", "grpo": {"beta": 0.1}, **LORA},
}
SLOW = {
    "adapters": {"grpo": {"beta": 0.1}, **LORA},
    "importance": {"grpo": {"old_logprobs": "trainer", "importance_cap": 1.5}, "rollout": {"top_p": 0.8}},
    "kl in the reward": {"grpo": {"beta": 0.1, "kl_in": "reward", "kl": "k1"}},
    **{f"preset {p}": {"grpo": {"preset": p, "group_size": 4}}
       for p in ("r1", "deepseekmath", "dapo", "dr_grpo", "gspo", "cispo")},
    "rloo": {"grpo": {"baseline": "leave_one_out", "scale": "none"}},
    "reinforce++": {"grpo": {"baseline": "none", "scale": "batch", "beta": 0.1, "kl_in": "reward"}},
    "the ratio of a sequence": {"grpo": {"ratio": "sequence", "beta": 0.1}},
    "adapters with replay": {"grpo": {"beta": 0.1, "routing_replay": True}, **LORA},
    "stop strings": {"rollout": {"stop": ["7", "<think>"]}},
    "slots": {"rollout": {"slots": 3}},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "many updates": {"grpo": {"minibatches": 4, "epochs": 3}, "batch": {"accumulation": 1}},
    "countdown": {"model": "tiny-llm", "config": ENDS, "task": {"kind": "countdown"},
                  "rollout": {"max_prompt_tokens": 170}},
    "remat": {"remat": "full"},
}  # fmt: skip


@pytest.mark.parametrize("variant", [*QUICK, *(slow(name) for name in SLOW)])
def test_a_variant_learns_something_finite(home, tmp_path, variant):
    found = trained(home, tmp_path / "run", **{"steps": 2, **(QUICK | SLOW)[variant]})
    assert len(found) == 2
    assert all(np.isfinite(v) for r in found for v in r.values() if isinstance(v, float))
    assert any(r["grad_norm"] > 0 for r in found)
    assert found[1]["gap_max"] < (0.5 if variant == "bfloat16" else 1e-4)


def test_dynamic_sampling_learns_from_groups_that_differ_and_from_no_problem_twice(
    home, tmp_path, monkeypatch
):
    """Every second group of a round is flat: twice as many are sampled."""
    prompts = []

    def reward(number, answers):
        if len(answers) != 8:  # an evaluation
            return np.zeros(len(answers))
        prompts.extend(a.problem.record["problem"] for a in answers[::4])
        return [1.0, 0.0, 0.0, 0.5] + [1.0] * 4

    rewarded(monkeypatch, reward)
    few = {"task": {"terms": 5, "held_out": 4}, "rollout": {"max_prompt_tokens": 12}}
    found = trained(home, tmp_path / "run", "dense", grpo={"dynamic_sampling": True}, **few, steps=2)
    assert [r["sampling_rounds"] for r in found] == [2, 2]
    assert [r["flat_groups"] for r in found] == [0.5, 0.5]
    assert all(abs(r["reward"] - 0.375) < 1e-9 for r in found)  # flat ones would make it 0.6875
    assert len(set(prompts)) == len(prompts) == 8


def test_dynamic_sampling_makes_do_after_some_rounds(home, tmp_path, monkeypatch):
    rewarded(monkeypatch, lambda number, answers: np.ones(len(answers)))
    (found,) = trained(home, tmp_path / "run", "dense", grpo={"dynamic_sampling": True}, steps=1)
    assert found["sampling_rounds"] == recipe.ROUNDS
    assert (found["flat_groups"], found["grad_norm"]) == (1, 0)


def test_long_answers_are_punished_by_their_tokens(home, tmp_path, monkeypatch):
    """DAPO, eq. 13, with a buffer of 4 of 8 tokens: -1 at 8, -1/4 at 5."""
    lengths = []

    def reward(number, answers):
        if number:
            lengths.extend(a.tokens for a in answers)
        return np.zeros(len(answers))

    rewarded(monkeypatch, reward)
    (found,) = trained(home, tmp_path / "run", "dense", grpo={"overlong_buffer": 0.5}, steps=1)
    expected = np.mean([-min(max(n - 4, 0) / 4, 1) for n in lengths[:8]])
    assert len(set(lengths[:8])) > 2
    np.testing.assert_allclose(found["reward"], expected, rtol=1e-6)


# -------------------------------------------------------------------- what is wrong


def weights_of(home, model="dense"):
    return {p: np.asarray(v[...]) for p, v in parameters(models.restore(home / model)).items()}


def assert_unchanged(home, out):
    before = weights_of(home)
    for path, value in exported(out).items():
        assert models.same_bits(value, before[path]), path


def test_equal_rewards_leave_the_weights_as_they_are(home, tmp_path, monkeypatch):
    rewarded(monkeypatch, lambda number, answers: np.full(len(answers), 0.1))
    found = trained(home, tmp_path / "run", "dense")
    assert all(r["loss"] == r["grad_norm"] == 0 and r["flat_groups"] == 1 for r in found)
    assert_unchanged(home, tmp_path / "run")


def test_answers_that_cannot_be_rewarded_are_left_out_and_counted(home, tmp_path, monkeypatch):
    """Two in eight: the others' advantages are those of the rest of their group."""

    def reward(number, answers):
        totals = np.arange(len(answers), dtype=np.float64)
        totals[[0, 5]] = np.nan
        return totals

    rewarded(monkeypatch, reward)
    (found,) = trained(home, tmp_path / "run", "dense", steps=1)
    assert found["reward_failures"] == 0.25
    np.testing.assert_allclose(found["reward"], np.mean([1, 2, 3, 4, 6, 7]))
    assert found["grad_norm"] > 0


BROKEN = """
def some(answers):
    return [1 / (answer.tokens % 3 - 1) ** 2 if answer.tokens % 3 - 1 else float("nan") for answer in answers]

def broken(answers):
    raise RuntimeError("the service is down")

def none(answers):
    return [None] * len(answers)
"""


def test_a_reward_function_that_breaks_stops_the_run_with_its_first_error_and_nan_does_not(
    home, tmp_path, monkeypatch
):
    (tmp_path / "breaking.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    rewards = [{"kind": "python", "function": "breaking:some", "name": "own"}]
    (found,) = trained(home, tmp_path / "some", "dense", rewards=rewards, steps=1, seed=1)
    assert 0 < found["reward_failures"] <= 0.5
    assert np.isfinite(found["reward"])
    rewards[0]["function"] = "breaking:none"
    (found,) = trained(home, tmp_path / "none", "dense", rewards=rewards, steps=1)
    assert (found["answers_left_out"], found["reward_failures"], found["grad_norm"]) == (1, 0, 0)
    monkeypatch.setattr("jaxseek.rl.recipe.WITHOUT_REWARD", 1)
    with pytest.raises(
        TrainingError, match=r"no answer of 1 rollouts in a row has a reward: no term .* applies"
    ):
        trained(home, tmp_path / "nothing", "dense", rewards=rewards, steps=1)
    rewards[0]["function"] = "breaking:broken"
    message = r"step 1: 8 of 8 answers could not be rewarded; the first: .*own.*the service is down"
    with pytest.raises(TrainingError, match=message):
        trained(home, tmp_path / "broken", "dense", rewards=rewards)


def test_a_reward_of_no_weight_may_fail_in_one_round_of_sampling(home, tmp_path, monkeypatch):
    mark = Marking.__call__
    calls = iter(range(100))

    def patched(self, answers):
        _, parts = mark(self, answers)
        flat = np.zeros(len(answers))
        flat[0] = 1
        return flat, parts | {"exact": parts["exact"] * (1 if next(calls) % 2 else np.nan)}

    monkeypatch.setattr(Marking, "__call__", patched)
    (found,) = trained(home, tmp_path / "run", "dense", grpo={"dynamic_sampling": True}, steps=1)
    assert np.isfinite(found["reward_exact"])


def test_answers_that_never_end_count_for_nothing_with_the_mask(home, tmp_path, monkeypatch):
    rewarded(monkeypatch, lambda number, answers: np.arange(len(answers)))
    monkeypatch.setattr("jaxseek.rl.rollout.Sampling", lambda *a, stop_ids=(), **k: loop_sampling(*a, **k))
    found = trained(home, tmp_path / "run", "dense", grpo={"overlong_mask": True, "minibatches": 2},
                    batch={"accumulation": 1})  # fmt: skip
    assert all(r["cut_off"] == 1 and r["loss"] == r["grad_norm"] == 0 for r in found)
    assert_unchanged(home, tmp_path / "run")


def loop_sampling(*args, **kwargs):
    from jaxseek.engine.sampling import Sampling

    return Sampling(*args, **kwargs)


def test_prompts_that_are_too_long_are_skipped_and_counted_also_after_a_stop(home, tmp_path, seen):
    records = [{"prompt": "1+2=" if i % 3 else "1+2+3+4+5+6=", "answer": str(i)} for i in range(30)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r | {"prompt": f"{i % 10}{r['prompt']}"}) + "\n"
                                              for i, r in enumerate(records)))  # fmt: skip
    data = {"train": str(tmp_path / "d.jsonl"), "shuffle": False}
    given = {"data": data, "task": {"kind": "jsonl", "held_out": 3}}
    found = trained(home, tmp_path / "run", "dense", **given, steps=4)
    assert found[-1]["prompts_too_long"] > 2
    trained(home, tmp_path / "half", "dense", **given, steps=2)
    assert steps_of(tmp_path / "half")[1]["prompts_too_long"] == found[1]["prompts_too_long"]
    again = trained(home, tmp_path / "half", "dense", **given, steps=4)
    assert values_of(again, *SAME) == values_of(found, *SAME)
    assert not any(len(prompt) > 8 for call in seen for prompt, *_ in call)


@pytest.mark.parametrize(
    ("model", "sections", "message"),
    [
        ("dense", {"rollout": {"max_prompt_tokens": 60}},
         r"max_prompt_tokens 60 \+ max_new_tokens 8 are more than the model's context of 64"),
        ("dense", {"rollout": {"record_experts": True}}, "without experts has no routing to record"),
        ("dense", {"grpo": {"routing_replay": True}}, "without experts has no routing to record or replay"),
        ("dense", {"rollout": {"max_prompt_tokens": 2}}, "all held-out prompts are longer than"),
        ("sparse", {"reference": {"kind": "base"}, "grpo": {"beta": 0.1}}, "set lora.rank"),
        ("dense", {"grpo": {"importance_cap": 2.0}}, 'needs old_logprobs = "trainer"'),
        ("sparse", {"loss": {"sequence_balance": 1e-4}}, "a mean over rows, which GRPO packs anew"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(home, tmp_path, model, sections, message):
    with pytest.raises(ConfigError, match=message):
        run_stage(config(home, tmp_path / "run", model, **sections))


def test_an_exploding_run_names_what_is_not_finite(home, tmp_path):
    message = (
        r"step [23]: loss or gradient is not finite, (because these weights are not|first after|in the )"
    )
    with pytest.raises(TrainingError, match=message):
        trained(home, tmp_path / "run", "dense", steps=3, optimizer={"learning_rate": 1e30})


def test_training_prompts_that_are_all_too_long_end_the_run(home, tmp_path, monkeypatch):
    for name, prompt in (("d", "1+2+3+4+5="), ("held", "1+2=")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": prompt, "answer": "1"}) + "\n")
    data = {"train": str(tmp_path / "d.jsonl"), "eval": str(tmp_path / "held.jsonl")}
    monkeypatch.setattr(recipe, "TOO_LONG", 10)
    message = "10 prompts in a row are longer than rollout.max_prompt_tokens 8"
    with pytest.raises(ConfigError, match=message):
        trained(home, tmp_path / "run", "dense", data=data, task={"kind": "jsonl", "held_out": 1})


def test_alarms_are_told(home, tmp_path, monkeypatch, capsys):
    """A reward that is always 0, groups that are flat, answers that are cut off; once each."""
    monkeypatch.setattr(Alarms, "PATIENCE", 2)
    rewarded(monkeypatch, lambda number, answers: np.zeros(len(answers)))
    monkeypatch.setattr("jaxseek.rl.rollout.Sampling", lambda *a, stop_ids=(), **k: loop_sampling(*a, **k))
    trained(home, tmp_path / "run", "dense", steps=4)
    told = capsys.readouterr().out
    for text in (
        "step 2: reward_length has been 0 for 2 steps",
        "step 2: in every group all rewards have been equal for 2 steps",
        "step 2: more than half of the answers have been cut off for 2 steps",
    ):
        assert told.count(text) == 1
    assert told.count("have been equal") == 1


def test_alarms_of_lasting_kl_and_of_the_gap_are_told_once():
    alarms = Alarms()
    values = {"flat_groups": 0.0, "cut_off": 0.0, "gap_max": 0.1, "kl": 0.1}
    assert alarms.of(0, values) == []
    assert alarms.of(1, values | {"kl": 1.5}) == []
    assert alarms.of(1, values) == []
    assert alarms.of(1, values | {"kl": 1.5}) == []
    (kl,) = alarms.of(1, values | {"kl": 1.5})
    assert kl.startswith("step 2: KL against the reference stays above 1")
    (gap,) = alarms.of(2, values | {"kl": 1.5, "gap_max": 2.0})
    assert gap.startswith("step 3: sampler and trainer disagree")


# -------------------------------------------------------------------- evaluation and the end


def test_evaluations_are_the_same_whenever_they_are_repeated(home, tmp_path):
    """Sampled, not greedy: several answers to each problem, by fixed seeds that no two answers share."""
    task = {"samples": 3, "temperature": 1.0, "held_out": 5}
    still = {"task": task, "optimizer": {"learning_rate": 1e-30}, "eval": {"every": 1}}
    trained(home, tmp_path / "run", "dense", steps=2, **still)
    first = answers_in(tmp_path / "run", 0)
    assert len(first) == 15
    assert [a["prompt"] for a in first] == [a["prompt"] for a in first for _ in range(3)][:45:3]
    assert first == answers_in(tmp_path / "run", 1) == answers_in(tmp_path / "run", 2)
    assert len({(a["text"]) for a in first}) > 5
    trained(home, tmp_path / "other", "dense", steps=1, seed=5, **still)
    assert answers_in(tmp_path / "other", 0) == first  # of the run's seed independent


def test_past_its_deadline_a_run_ends_and_is_over(home, tmp_path):
    run = config(home, tmp_path / "run", "dense", steps=50)
    result = run_stage(run, deadline=time.monotonic())
    assert (result.steps, result.stopped, finished(run)) == (1, False, 1)
    assert result.accuracy is not None
    assert run_stage(run).steps == 1
    assert len(steps_of(tmp_path / "run")) == 1
