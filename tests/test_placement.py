"""EPLB against the written algorithm, and what placements do to the load."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxseek.lab.placement import device_load, imbalance, pack, place, replicate, touched


def test_packing_puts_the_heaviest_into_the_lightest_pack_with_room():
    pack_N, rank_N = pack(np.array([5.0, 4, 3, 3, 1, 0]), 2)
    # 5 -> 0, 4 -> 1, 3 -> 1 (4 < 5), 3 -> 0 (5 < 7), 1 -> 1 (7 < 8), 0 -> 0: pack 1 is full
    assert pack_N.tolist() == [0, 1, 1, 0, 1, 0]
    assert rank_N.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="5 items do not fill 2 packs"):
        pack(np.ones(5), 2)


def test_extra_slots_go_to_the_largest_load_for_a_copy():
    # 10/1 first, then 10/2 = 5 against 6, then 5 against 3
    assert replicate(np.array([10.0, 6, 1]), 6).tolist() == [0, 1, 2, 0, 1, 0]
    with pytest.raises(ValueError, match="2 slots are fewer than the 3 experts"):
        replicate(np.ones(3), 2)


def written(load_E, slots, groups, nodes, devices):
    """The algorithm as its description says it, on lists: the experts of every device."""
    size = len(load_E) // groups
    total = [sum(load_E[g * size : (g + 1) * size]) for g in range(groups)]

    def packing(weights, packs):
        held = [[] for _ in range(packs)]
        for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
            free = [p for p in held if len(p) < len(weights) // packs]
            min(free, key=lambda p: sum(weights[j] for j in p)).append(i)
        return held

    out = []
    for node in packing(total, nodes):
        experts = [g * size + i for g in sorted(node) for i in range(size)]
        copies = dict.fromkeys(experts, 1)
        extra = []
        for _ in range(slots // nodes - len(experts)):
            extra.append(max(experts, key=lambda e: load_E[e] / copies[e]))
            copies[extra[-1]] += 1
        physical = experts + extra
        for held in packing([load_E[e] / copies[e] for e in physical], devices // nodes):
            out.append([physical[i] for i in held])
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(8, 12, 4, 2, 4), (16, 16, 8, 4, 8), (8, 16, 3, 2, 4)]))
def test_placements_are_those_of_the_written_algorithm(seed, shape):
    E, slots, groups, nodes, devices = shape
    load_LE = np.random.default_rng(seed).integers(0, 50, (2, E)).astype(float)
    found = place(load_LE, slots, groups, nodes, devices)
    if groups % nodes:  # the global policy
        groups = nodes = 1
    for load_E, expert_S in zip(load_LE, found.expert_LS):
        assert expert_S.reshape(devices, -1).tolist() == written(load_E, slots, groups, nodes, devices)


def test_every_expert_has_its_slots_and_they_lead_back_to_it():
    load_LE = np.random.default_rng(0).integers(1, 90, (3, 16)).astype(float)
    found = place(load_LE, 24, 8, 4, 8)
    assert (found.copies_LE >= 1).all()
    assert (found.copies_LE.sum(axis=1) == 24).all()
    for l in range(3):
        for e in range(16):
            own = found.slots_LEK[l, e, : found.copies_LE[l, e]]
            assert (found.expert_LS[l, own] == e).all()
            assert (found.slots_LEK[l, e, found.copies_LE[l, e] :] == -1).all()


def test_copies_of_busy_experts_relieve_the_slowest_device():
    load_LE = 1e4 / np.arange(1, 65)[None] ** 0.8  # a few are asked for far more often
    before = place(load_LE, 64, 1, 1, 16)
    after = place(load_LE, 96, 1, 1, 16)
    plain, relieved = (imbalance(device_load(load_LE, p, 16)) for p in (before, after))
    assert plain > 1.5
    assert 1.0 <= relieved < 1.1
    assert device_load(load_LE, after, 16).sum() == pytest.approx(load_LE.sum())


def test_a_trace_touches_the_experts_that_its_rows_chose():
    found = place(np.array([[9.0, 1, 1, 1]]), 6, 1, 1, 2)
    ids_TBK = np.array([[[0, 1], [0, 2]], [[3, 2], [3, 2]]])
    touched_TD = touched(ids_TBK, found, 2)
    distinct = [{*row.flat} for row in ids_TBK]
    assert touched_TD.shape == (2, 2)
    assert touched_TD[1].sum() == len(distinct[1])
    assert touched_TD[0].sum() == len(distinct[0]) + 1  # two rows, two copies of expert 0


def test_numbers_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="6 slots are not divisible by 4"):
        place(np.ones((1, 4)), 6, 1, 1, 4)
