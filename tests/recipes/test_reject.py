"""Rejection sampling: what is kept satisfies the filters, once each, and a kill changes no byte."""

import json
import os
import re
import signal

import numpy as np
import pytest
from policies import config, make_home

from jaxseek.config.model import ConfigError
from jaxseek.config.run import RunConfig
from jaxseek.data.dataset import open_rows
from jaxseek.engine.request import Answer as Sampled
from jaxseek.recipes import reject as rejecting
from jaxseek.recipes.reject import FILE, _good, _whole_rounds, reject
from jaxseek.rl.arithmetic import WORDS
from jaxseek.rl.problem import Answer, Problem
from jaxseek.rl.rollout import Episode
from jaxseek.tokenizer.tokenizer import Tokenizer
from jaxseek.train import start
from jaxseek.train.metrics import Progress

pytestmark = pytest.mark.usefixtures("quick_compilation")

OTHERS = "python:jaxseek.rl.arithmetic:demonstrations?terms=3&shown=0&count=5"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def run(home, out, **sections):
    """Eight problems, answered four times each, in rounds of two."""
    sections = {"reject": {"problems": 8, "per_problem": 4}} | sections
    return config(home, out, "dense", objective="reject", **sections)


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    reject(run(home, out))
    return out


def records(out):
    return [json.loads(line) for line in (out / FILE).read_text("utf-8").splitlines()]


# -------------------------------------------------------------------- which answers are kept


class Given:
    """Marks by the answer's text, `exact/length`."""

    def __call__(self, answers):
        table = np.array([[float(x) for x in a.text.split("/")[:2]] for a in answers])
        return table.sum(1), {"exact": table[:, 0], "length": table[:, 1]}


def group(name, *texts):
    problem = Problem(name, "4")
    ends = ["length" if "!" in text else "stop" for text in texts]
    answers = [Answer(problem, text.rstrip("!"), None, "", 3, end) for text, end in zip(texts, ends)]
    return [Episode([], Sampled(finish_reason="stop"), answer, 0) for answer in answers]


def kept(home, groups, **reject):
    settings = run(home, "unused", reject={"problems": 8} | reject)
    return [(r["prompt"], r["response"]) for r in _good(settings, groups, Given())]


def test_an_answer_is_kept_where_every_reward_named_is_at_least_as_given(home):
    groups = [group("a", "1/.4", "1/.5", "0/1"), group("b", "0/1", "nan/1", "0/0")]
    wanted = {"exact": 1.0, "length": 0.5}
    assert kept(home, groups, keep=wanted, per_problem=9) == [("a", "1/.5")]
    assert kept(home, groups, keep={"exact": 1.0}, per_problem=9) == [("a", "1/.4"), ("a", "1/.5")]
    assert len(kept(home, groups, keep={}, per_problem=9)) == 6


def test_answers_that_were_cut_off_are_not_kept(home):
    assert kept(home, [group("a", "1/1!", "1/.5")], keep={"exact": 1.0}) == [("a", "1/.5")]


def test_equal_answers_are_kept_once_and_no_more_than_asked_for_of_a_problem(home):
    groups = [group("a", "1/1", "1/1", "1/.9", "1/.8"), group("b", "1/1", "1/1", "1/1", "1/1")]
    assert kept(home, groups, per_problem=2) == [("a", "1/1"), ("a", "1/.9"), ("b", "1/1")]
    assert kept(home, groups, per_problem=1) == [("a", "1/1"), ("b", "1/1")]


def test_a_problem_that_is_a_conversation_becomes_one_under_the_names_of_the_run(home):
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    columns = {"messages": "turns", "role": "from", "content": "value"}
    settings = run(home, "unused", data={"columns": columns})
    (record,) = _good(settings, [group(talk, "1/1")], Given())
    assert record == {
        "turns": [
            {"from": "system", "value": "s"},
            {"from": "user", "value": "u"},
            {"from": "assistant", "value": "1/1"},
        ]
    }
    assert len(talk) == 2


# -------------------------------------------------------------------- the file


def test_samples_are_of_the_problems_unique_and_fewer_with_filters(home, whole, tmp_path):
    result = reject(run(home, whole))
    assert result.samples == str(whole / FILE)
    everything = records(whole)
    assert len({(r["prompt"], r["response"]) for r in everything}) == len(everything) <= 32
    keep = {"length": 0.6}
    reject(run(home, tmp_path / "short", reject={"problems": 8, "per_problem": 4, "keep": keep}))
    short = {(r["prompt"], r["response"]) for r in records(tmp_path / "short")}
    assert short < {(r["prompt"], r["response"]) for r in everything}
    piece = re.compile("|".join(["</?[a-z]+>", *WORDS["en"], "."]))
    longest = max(len(piece.findall(response)) for _, response in short)
    assert longest + 1 == 4  # with the end of sequence: 2 - 4/3 is above 0.6, 2 - 5/3 not
    some = {"problems": 5, "per_problem": 4}  # the last round is not whole
    assert reject(run(home, tmp_path / "some", reject=some)).steps == 5
    assert set(map(str, records(tmp_path / "some"))) < set(map(str, everything))
    reject(run(home, tmp_path / "one", reject={"problems": 8, "per_problem": 1}))
    prompts = [r["prompt"] for r in records(tmp_path / "one")]
    assert len(prompts) <= 8
    assert set(prompts) == {r["prompt"] for r in everything}


def test_what_is_mixed_in_is_counted_and_scattered(home, whole, tmp_path):
    settings = {"problems": 8, "per_problem": 4, "mix": [OTHERS], "mix_count": 12}
    reject(run(home, tmp_path / "mixed", reject=settings))
    found = records(tmp_path / "mixed")
    mixed = [len(r["prompt"]) == 6 for r in found]  # 1+2+3= among 1+2=
    assert sum(mixed) == 12
    assert len({r["prompt"] for r, m in zip(found, mixed) if m}) == 5  # again from the first, when they end
    assert not all(mixed[-12:])
    own = [r for r, m in zip(found, mixed) if not m]
    assert sorted(map(str, own)) == sorted(map(str, records(whole)))


def test_samples_are_data_of_an_sft_run(home, whole):
    raw = run(home, "unused").to_dict() | {"objective": "sft"}
    raw["data"] |= {"train": [str(whole / FILE)], "length": 64}
    rows = open_rows(RunConfig.from_dict(raw), Tokenizer.from_dir(home / "dense"), "train")
    assert next(iter(rows))["tokens"].shape == (64,)
    rows.close()


def test_no_answer_that_is_good_enough_is_an_error_that_says_what_was_asked(home, tmp_path):
    keep = {"length": 1.0, "exact": 2.0}
    with pytest.raises(ConfigError, match=r"no answer to 8 problems .* length >= 1 and exact >= 2; lower"):
        reject(run(home, tmp_path / "none", reject={"problems": 8, "keep": keep}))
    assert not (tmp_path / "none" / FILE).exists()


def test_a_reward_that_is_not_there_cannot_be_asked_for(home):
    with pytest.raises(
        ConfigError, match=r"reject\.keep names math, expected one of the rewards: length, exact"
    ):
        run(home, "unused", reject={"keep": {"math": 1.0}})


# -------------------------------------------------------------------- interrupted


def test_a_finished_run_samples_nothing_and_another_is_refused(home, whole, monkeypatch):
    monkeypatch.setattr(rejecting, "Sampler", None)
    before = (whole / FILE).read_bytes()
    assert not reject(run(home, whole)).stopped
    assert (whole / FILE).read_bytes() == before
    with pytest.raises(ConfigError, match=r"other settings: reject\.per_problem"):
        reject(run(home, whole, reject={"problems": 8, "per_problem": 3}))


class Killed(BaseException):
    """As sudden as a signal."""


@pytest.mark.parametrize("round_", [0, 2, 3])
def test_a_run_that_ends_suddenly_goes_on_to_the_same_bytes(home, whole, tmp_path, monkeypatch, round_):
    update = Progress.update

    def patched(self, step, values):
        update(self, step, values)
        if step == round_:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", patched)
        with pytest.raises(Killed):
            reject(run(home, tmp_path / "run"))
    asked = []
    sample = rejecting.Sampler.sample
    monkeypatch.setattr(
        rejecting.Sampler, "sample", lambda self, *given: asked.append(1) or sample(self, *given)
    )
    reject(run(home, tmp_path / "run"))
    assert len(asked) == 3 - round_
    assert (tmp_path / "run" / FILE).read_bytes() == (whole / FILE).read_bytes()


def test_a_signal_ends_a_run_after_its_round(home, whole, tmp_path, monkeypatch):
    update = Progress.update

    def patched(self, step, values):
        update(self, step, values)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", patched)
        result = reject(run(home, tmp_path / "run"))
    assert result.stopped
    assert not (tmp_path / "run" / FILE).exists()
    assert "the same command goes on" in str(result)
    assert not reject(run(home, tmp_path / "run")).stopped
    assert (tmp_path / "run" / FILE).read_bytes() == (whole / FILE).read_bytes()


def test_a_round_of_which_a_part_was_written_is_sampled_again(tmp_path):
    lines = ['{"prompt": "a", "response": "b"}', '{"round": 0}', '{"round": 1}']
    good = "".join(f"{line}\n" for line in lines)
    path = tmp_path / "samples.partial.jsonl"
    for torn in ("", '{"prompt": "c", "response": "d"}\n', '{"prompt": "c", "resp', '{"round": 2}'):
        path.write_text(good + torn, "utf-8")
        assert _whole_rounds(path) == ([{"prompt": "a", "response": "b"}], 2)
        assert path.read_text("utf-8") == good
    path.unlink()
    assert _whole_rounds(path) == ([], 0)


def test_answers_longer_than_the_models_context_are_refused(home, tmp_path):
    with pytest.raises(ConfigError, match=r"8 \+ max_new_tokens 57 are more than the model's context of 64"):
        reject(run(home, tmp_path / "run", rollout={"max_new_tokens": 57}))


def test_where_it_runs_may_change(home, whole):
    start.claim(run(home, whole, log={"every": 3, "tensorboard": False}))
