"""Chunks, slots and the queue, without JAX: every token is read once, and nobody waits for a free slot."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxseek.engine.request import Handle, Request
from jaxseek.engine.sampling import Sampling
from jaxseek.engine.scheduler import FIRST, REST, Scheduler, chunks, rounded


def handle(prompt, budget=4):
    return Handle(Request(prompt, Sampling(budget)), budget)


@given(st.integers(0, 20_000))
@settings(deadline=None)
def test_chunks_hold_all_tokens_and_little_more(n):
    plan = chunks(n)
    assert sum(plan) >= n
    assert sum(plan[:-1]) < n or not plan
    assert set(plan[:1]) <= set(FIRST)
    assert set(plan[1:]) <= set(REST)
    assert sum(plan) <= max(64, n + 63, 1.34 * n)
    assert len(plan) <= n / 1024 + 1 + 4 + 8  # 1,024 at a time, then 256, then 64


@pytest.mark.parametrize(
    ("n", "expected"), [(1, 16), (13, 16), (48, 16), (49, 64), (96, 64), (97, 128), (192, 128), (193, 256)]
)
def test_a_size_is_taken_where_three_quarters_of_it_are_used(n, expected):
    assert rounded(n, FIRST) == expected


@given(
    parts=st.sampled_from([1, 2, 4]),
    own=st.integers(1, 6),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_every_request_gets_one_slot_in_the_part_that_read_its_prompt(parts, own, lengths, seed):
    line, rng = Scheduler(parts, parts * own), np.random.default_rng(seed)
    handles = [handle([n % 7] * n) for n in lengths]  # equal lengths are the same prompt
    for h in handles:
        line.add(h)
    seated, rounds = [], 0
    while len(seated) < len(handles):
        rounds += 1
        assert rounds < 500
        reading = line.next_reading(1)
        if reading is not None:
            assert all(len(lane) <= reading.width for lane in reading.lanes)
            assert max(p.to_read for _, p in reading.rows) <= sum(reading.plan)
            line.read.append(reading)
        for reading in list(line.read):
            for slot, row, prompt, h in line.seat(reading):
                assert line.seats[slot] is h
                assert slot // own == row // reading.width
                assert list(h.request.prompt) == prompt.tokens
                seated.append(h)
        for slot, h in enumerate(line.seats):
            if h is not None and rng.random() < 0.5:
                line.seats[slot] = None
    assert {id(h) for h in seated} == {id(h) for h in handles}
    assert line.waiting == 0
    assert not line.read


def test_requests_for_one_prompt_are_read_together_and_first_come_is_first_read():
    line = Scheduler(1, 4)
    for prompt in ([1] * 200, [2] * 5, [1] * 200, [3] * 180):
        line.add(handle(prompt))
    reading = line.next_reading(1)
    assert [(p.tokens[0], len(p.waiting)) for _, p in reading.rows] == [(1, 2)]
    line.read.append(reading)
    assert line.wanted() == [2]
    assert line.next_reading(1).lanes[0][0].tokens[0] == 2  # a long prompt beside it would be mostly padding


def test_a_request_that_is_removed_leaves_nothing_behind():
    line, some = Scheduler(1, 1), [handle([1, 2]), handle([1, 2]), handle([3])]
    for h in some:
        line.add(h)
    line.remove(some[2])
    line.remove(some[0])
    reading = line.next_reading(1)
    line.read.append(reading)
    assert [h for *_, h in line.seat(reading)] == [some[1]]
    line.remove(some[1])
    assert (line.live, line.waiting) == (0, 0)
