"""The rewards of a run have as many processes as it asks for, and say which answers they do not judge."""

import os

import numpy as np
import pytest

from jaxseek.config.run import RunConfig
from jaxseek.rl.evaluate import Marking
from jaxseek.rl.problem import Answer, Problem


def config(rewards, **rollout):
    return RunConfig.from_dict({
        "objective": "grpo", "model": "m", "out": "o", "steps": 1, "data": {"train": "d"},
        "rewards": rewards, "rollout": rollout,
    })  # fmt: skip


@pytest.mark.parametrize(("asked", "given"), [(0, 6), (3, 3)])
def test_rewards_are_computed_by_a_process_for_each_core_or_as_many_as_asked(asked, given, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    with Marking(config([{"kind": "length"}], reward_workers=asked), None) as marking:
        assert marking._rewards.pool.size == given


def test_answers_that_the_first_reward_does_not_apply_to_are_not_judged(tmp_path, monkeypatch):
    source = "def f(answers): return [{'a': 1.0, 'b': None}.get(a.text, 'fails') for a in answers]"
    (tmp_path / "applies.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    answers = [Answer(Problem("", ""), text, None, text, 1, "stop") for text in "abc"]
    rewards = [{"kind": "python", "function": "applies:f", "weight": weight} for weight in (1.0, 1.0)]
    rewards[1] |= {"kind": "length", "name": "short"}
    with Marking(config(rewards, reward_workers=1), None) as marking:
        totals, _ = marking(answers)
    np.testing.assert_array_equal(totals, [2, 1, np.nan])
    assert (marking.left_out, marking.unjudged) == (set(), {1})
    assert "'fails' is not a finite number" in marking.failure
