"""The rewards of a run have as many processes as the run asks for."""

import os

import pytest

from jaxseek.config.run import RunConfig
from jaxseek.rl.evaluate import Marking


@pytest.mark.parametrize(("asked", "given"), [(0, 6), (3, 3)])
def test_rewards_are_computed_by_a_process_for_each_core_or_as_many_as_asked(asked, given, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    run = RunConfig.from_dict({
        "objective": "grpo", "model": "m", "out": "o", "steps": 1, "data": {"train": "d"},
        "rewards": [{"kind": "length"}], "rollout": {"reward_workers": asked},
    })  # fmt: skip
    with Marking(run, None) as marking:
        assert marking._rewards.pool.size == given
