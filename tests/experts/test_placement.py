"""EPLB against the written algorithm, and what placements do to the load."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import forward, random_model, tiny_config, weights

from jaxseek.cli import main as cli
from jaxseek.config.model import ConfigError
from jaxseek.engine.engine import Engine
from jaxseek.engine.sampling import Sampling
from jaxseek.experts.balance import contiguous, device_load, imbalance, pack, place, replicate, serve
from jaxseek.lab import replay

pytestmark = pytest.mark.usefixtures("quick_compilation")


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


def one_by_one(ids_TLBK, placement, devices):
    """Tokens and experts read of every device, counted token by token."""
    T, L = ids_TLBK.shape[:2]
    per_device = placement.expert_LS.shape[1] // devices
    tokens, read = np.zeros((2, T, L, devices), int)
    for t in range(T):
        for l in range(L):
            slots_of, turn, used = {}, {}, set()
            for slot, e in enumerate(placement.expert_LS[l].tolist()):
                slots_of.setdefault(e, []).append(slot)
            for e in ids_TLBK[t, l].ravel().tolist():
                if e >= 0:
                    slot = slots_of[e][turn.get(e, 0) % len(slots_of[e])]
                    turn[e] = turn.get(e, 0) + 1
                    tokens[t, l, slot // per_device] += 1
                    used.add(slot)
            for slot in used:
                read[t, l, slot // per_device] += 1
    return tokens, read


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(8, 12, 2, 4), (16, 16, 1, 8), (8, 20, 1, 4)]))
def test_a_trace_is_served_as_if_counted_token_by_token(seed, shape):
    E, slots, nodes, devices = shape
    rng = np.random.default_rng(seed)
    ids_TLBK = rng.integers(-1, E, (3, 2, int(rng.integers(1, 9)), 2))
    found = place(rng.integers(1, 50, (2, E)).astype(float), slots, 4, nodes, devices)
    tokens_TLD, read_TLD = serve(replay.counts(ids_TLBK, E), found, devices)
    expected_tokens, expected_read = one_by_one(ids_TLBK, found, devices)
    assert (tokens_TLD == expected_tokens).all()
    assert (read_TLD == expected_read).all()


def test_experts_in_order_are_split_as_a_mesh_splits_them():
    found = contiguous(1, 6, 3)
    tokens_TLD, read_TLD = serve(np.array([[[5, 0, 1, 1, 0, 0]]]), found, 3)
    assert tokens_TLD.tolist() == [[[5, 2, 0]]]
    assert read_TLD.tolist() == [[[1, 2, 0]]]
    with pytest.raises(ValueError, match="6 experts are not divisible by 4 devices"):
        contiguous(1, 6, 4)


# -------------------------------------------------------------------- traces


def skewed(steps=40, experts=32, batch=64, layers=2):
    """Tokens that ask for a few experts, neighbours all, far more often."""
    p = 1 / np.arange(1, experts + 1) ** 0.7
    draw = np.random.default_rng(0).choice(experts, (steps, layers, batch, 2), p=p / p.sum())
    return replay.Load(replay.counts(draw, experts))


def test_balancing_helps_and_redundant_experts_help_more():
    order, plain, more = (s.to_dict() for s in replay.compare(skewed(), 8, 16))
    assert [r["placement"] for r in (order, plain, more)] == ["in order", "EPLB", "EPLB, 16 redundant"]
    assert order["load_max_over_mean"] > 2.5
    assert plain["load_max_over_mean"] < 0.6 * order["load_max_over_mean"]
    assert more["load_max_over_mean"] < plain["load_max_over_mean"]
    assert {r["tokens_mean"] for r in (order, plain, more)} == {64 * 2 / 8}
    assert [r["slots_per_device"] for r in (order, plain, more)] == [4, 4, 6]
    assert order["experts_read_busiest_per_step"] == pytest.approx(2 * order["experts_read_busiest"])


def test_experts_are_placed_by_the_first_half_and_served_the_second():
    load_TLE = np.zeros((4, 1, 4), int)
    load_TLE[:2, 0] = [9, 8, 1, 1]  # then it turns
    load_TLE[2:, 0] = [1, 9, 8, 1]
    order, plain = replay.compare(replay.Load(load_TLE), 2, 0)
    assert order.tokens_TLD[:, 0].tolist() == [[10, 9]] * 2
    assert plain.placement.expert_LS.tolist() == [[0, 3, 1, 2]]
    assert plain.tokens_TLD[:, 0].tolist() == [[2, 17]] * 2


def test_a_recorded_trace_is_what_the_routers_choose(tmp_path):
    cfg = tiny_config("v3", num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    model, prompts = random_model(cfg), [[5, 6, 7], [8, 9], [3, 1, 4, 1]]
    greedy = Sampling(6, temperature=0.0)
    load = replay.record(model, prompts, greedy, str(tmp_path / "trace.npz"))
    assert load.load_TLE.shape == (5, 1, cfg.n_routed_experts)
    expected = np.zeros_like(load.load_TLE)
    for row, answer in zip(prompts, Engine(model).generate(prompts, greedy)):
        _, _, ids = forward(cfg, weights(model), [*row, *answer.tokens[:-1]])
        for t, ids_K in enumerate(ids[0][len(row) :]):
            expected[t, 0, list(ids_K)] += 1
    assert (load.load_TLE == expected).all()
    again = replay.read_load(tmp_path / "trace.npz")
    assert (again.load_TLE == load.load_TLE).all()
    assert again.groups == cfg.n_group


def test_traces_that_cannot_be_say_why(tmp_path):
    def refused(message, name="t.npz", **arrays):
        path = tmp_path / name
        np.savez(path, **arrays) if name.endswith(".npz") else np.save(path, arrays["load"])
        with pytest.raises(ConfigError, match=message):
            replay.read_load(path)

    refused("has ids; expected ids and experts, or load", ids=np.zeros((1, 1, 1, 1), int))
    refused(r"go from 0 to 7, expected .* below the 4 experts", ids=np.full((1, 1, 1, 1), 7), experts=4)
    refused(r"load is float64\[2, 4\]|float64\[1, 2, 4\]", "t.npy", load=np.zeros((2, 4)))
    (tmp_path / "x.npy").write_text("no")
    with pytest.raises(ConfigError, match="not a trace that numpy can read"):
        replay.read_load(tmp_path / "x.npy")
    with pytest.raises(ConfigError, match=r"33 slots are not divisible by 8.*--redundant"):
        replay.compare(skewed(), 8, 1)


def test_the_command_prints_a_table_json_and_a_picture(tmp_path, capsys):
    trace, picture = tmp_path / "trace.npy", tmp_path / "p.png"
    np.save(trace, skewed().load_TLE)
    arguments = ["placement", str(trace), "--devices", "8", "--redundant", "8"]
    assert cli.main([*arguments, "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "placed by the first 20, served: the other 20" in text
    assert "EPLB, 8 redundant" in text
    assert picture.stat().st_size > 10_000
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [p["placement"] for p in found["placements"]] == ["in order", "EPLB", "EPLB, 8 redundant"]
    assert cli.main([*arguments, "-p", "1"]) == 2


def test_numbers_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="6 slots are not divisible by 4"):
        place(np.ones((1, 4)), 6, 1, 1, 4)
