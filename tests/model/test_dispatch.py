"""Expert dispatch by name on many meshes: the same sums, gradients and loads as a dense loop over experts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_experts import B, E, K, T, dense_loop, inputs, strategy_of
from oracles import assert_close, slow

from jaxseek.model.dispatch import dispatch
from jaxseek.ops.experts import Experts

pytestmark = pytest.mark.usefixtures("quick_compilation")

ALL_TO_ALL = [
    "expert=2",
    "expert=8",
    "expert=4,tensor=2",
    "data=2,fsdp=2,expert=2",
    "expert=2,context=2,tensor=2",
]
REPLICATED = ["expert=4", "expert=2,tensor=2,data=2", "expert=4,context=2"]
ALL_LOCAL = ["", "fsdp=2,context=2,tensor=2"]
CASES = (
    [("train", m) for m in ALL_TO_ALL]
    + [("decode", m) for m in REPLICATED]
    + [("prefill", m) for m in ALL_LOCAL]
)
QUICK = ["", "expert=4", "data=2,fsdp=2,expert=2", "expert=2,context=2,tensor=2", "expert=2,tensor=2,data=2"]


@functools.cache
def program(strategy, phase):
    """(mesh, compiled function of global arrays to output, load, dropped, gradients)."""
    rules = getattr(strategy, phase)

    def run(x_BTD, gates_BTK, experts, ids_BTK, valid_BT, dy_BTD):
        def forward(x_BTD, gates_BTK, experts):
            wide = (
                ("expert", None, "expert_mlp"),
                ("expert", None, "expert_mlp"),
                ("expert", "expert_mlp", None),
            )
            experts = [rules.shard(w, *names) for w, names in zip(experts, wide)]
            x_BTD = rules.shard(x_BTD, "batch", "length", None)
            y_BTD, load_E, dropped = dispatch(x_BTD, ids_BTK, gates_BTK, valid_BT, Experts(*experts), rules)
            y_BTD = jax.sharding.reshard(y_BTD, jax.P())
            return (y_BTD * dy_BTD).sum(), (y_BTD, load_E, dropped)

        grads, out = jax.grad(forward, (0, 1, 2), has_aux=True)(x_BTD, gates_BTK, experts)
        return *out, grads

    return strategy.make_mesh(), jax.jit(run)


def kept_by_capacity(ids, gates, valid, capacity_factor, shards):
    """Shard by shard and expert by expert: which assignments are among the largest gates that fit."""
    kept = np.repeat(valid[..., None], K, -1)
    for rows in np.split(np.arange(B), shards):
        capacity = math.ceil(capacity_factor * len(rows) * T * K / E)
        for e in range(E):
            asking = [
                (b, t, k) for b in rows for t, k in np.ndindex(T, K) if valid[b, t] and ids[b, t, k] == e
            ]
            asking.sort(key=lambda at: -gates[at])
            for at in asking[capacity:]:
                kept[at] = False
    return kept


@jax.jit
def dense_grads(x, gates, experts, ids, kept, dy):
    """Gradients of a loop in which every expert sees every token."""

    def forward(x, gates, experts):
        y = jnp.zeros_like(x)
        for e in range(E):
            own = (jax.nn.silu(x @ experts[0][e]) * (x @ experts[1][e])) @ experts[2][e]
            y += own * jnp.where((ids == e) & kept, gates, 0).sum(-1, keepdims=True)
        return (y * dy).sum()

    return jax.grad(forward, (0, 1, 2))(x, gates, experts)


@functools.cache
def expected(routing):
    x, gates, experts, ids, valid, dy = inputs(routing)
    kept = np.repeat(valid[..., None], K, -1)
    load = np.bincount(ids[valid].reshape(-1), minlength=E)
    return dense_loop(x, gates, experts, ids, kept), dense_grads(x, gates, experts, ids, kept, dy), load


def compute(strategy, phase, routing):
    mesh, run = program(strategy, phase)
    with jax.set_mesh(mesh):
        y, load, dropped, grads = run(*inputs(routing))
    return np.asarray(y), np.asarray(load), int(dropped), jax.tree.map(np.asarray, grads)


def check(strategy, phase, routing):
    y, load, dropped, grads = compute(strategy, phase, routing)
    expected_y, expected_grads, expected_load = expected(routing)
    assert_close(y, expected_y, 1e-5)
    assert load.tolist() == expected_load.tolist()
    assert dropped == 0
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), grads, expected_grads)
    return y, grads


@pytest.mark.parametrize(
    ("phase", "mesh"),
    [pytest.param(p, m, marks=[] if m in QUICK else [pytest.mark.slow]) for p, m in CASES],
    ids=lambda v: v or "one device",
)
def test_sums_gradients_and_loads_equal_the_dense_loop(phase, mesh):
    strategy = strategy_of(mesh)
    assert getattr(strategy, phase).dispatch == ("all_to_all" if phase == "train" else "replicated")
    check(strategy, phase, "random")
    check(strategy, phase, "skewed")  # every token to the same three experts: still none dropped
    y, (dx, dgates, _) = check(strategy, phase, "padded")
    valid = inputs("padded")[4]
    assert not y[~valid].any()
    assert not dx[~valid].any()
    assert not dgates[~valid].any()


@pytest.mark.parametrize("mesh", ["", *REPLICATED])
def test_few_rows_on_tpu_are_multiplied_with_every_expert_to_the_same_end(mesh, monkeypatch):
    monkeypatch.setattr("jaxseek.ops.experts.platform", lambda: "tpu")
    monkeypatch.setattr("jaxseek.ops.experts.grouped_mlp", None)  # the batched products run on CPU too
    program.cache_clear()
    for routing in ("random", "skewed", "padded"):
        check(strategy_of(mesh), "decode", routing)
    program.cache_clear()


def test_local_keeps_all_experts_on_every_device(tmp_path):
    strategy = strategy_of("data=2,tensor=2", tmp_path, dispatch="local")
    check(strategy, "train", "random")
    check(strategy, "train", "padded")


@pytest.mark.parametrize(
    "changes",
    [
        {"dispatch": "replicated"},
        {"expert": ["expert", "fsdp"]},
        {"expert": ["fsdp", "expert"], "dispatch": "replicated"},
        {"batch": ["expert", "data"], "length": "fsdp"},
        {"expert": ["expert", "tensor"], "expert_mlp": [], "dispatch": "replicated"},
    ],
    ids=[
        "replicated in training",
        "two axes",
        "two axes replicated",
        "batch order",
        "tensor axis of experts",
    ],
)
def test_other_tables_of_a_strategy_change_nothing(tmp_path, changes):
    strategy = strategy_of("fsdp=2,expert=2,tensor=2", tmp_path, **changes)
    check(strategy, "train", "random")
    check(strategy, "train", "padded")


@pytest.mark.parametrize(
    ("mesh", "shards", "dispatch_name"),
    [("", 1, "local"), ("expert=4", 4, "all_to_all"), ("expert=2,data=2", 2, "replicated")],
)
@pytest.mark.parametrize("routing", ["padded", "skewed"])
def test_a_capacity_drops_the_smallest_gates_and_counts_them(tmp_path, mesh, shards, dispatch_name, routing):
    x, gates, experts, ids, valid, dy = inputs(routing)
    strategy = strategy_of(mesh, tmp_path, dispatch=dispatch_name, capacity_factor=0.75)
    kept = kept_by_capacity(ids, gates, valid, 0.75, shards)
    y, load, dropped, grads = compute(strategy, "train", routing)
    assert dropped == np.repeat(valid[..., None], K, -1).sum() - kept.sum() > 0
    assert_close(y, dense_loop(x, gates, experts, ids, kept), 1e-5)
    assert load.tolist() == expected(routing)[2].tolist()  # what the router asked for
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), grads, dense_grads(x, gates, experts, ids, kept, dy))


@pytest.mark.parametrize("mesh", ["", "expert=4"])
def test_a_capacity_that_is_large_enough_drops_nothing(tmp_path, mesh):
    strategy = strategy_of(mesh, tmp_path, capacity_factor=E / K)
    check(strategy, "train", "skewed")


def kept_by_room(ids, valid, room_factor, expert, shards):
    """Source by source, expert by expert, token by token: which assignments find room on their shard.

    Each of the `shards` sources has consecutive rows; `expert` of them exchange with each other.
    """
    kept, rows = np.zeros((B, T, K), bool), np.split(np.arange(B), shards)
    room = math.ceil(room_factor * B // shards * T * K)
    for group in range(0, shards, expert):
        taken = np.zeros(expert, int)
        for source in rows[group : group + expert]:
            for e in range(E):
                asking = (at for at in np.ndindex(B, T, K) if at[0] in source and ids[at] == e)
                for at in asking:
                    if valid[at[:2]] and taken[e // (E // expert)] < room:
                        taken[e // (E // expert)] += 1
                        kept[at] = True
    return kept


@pytest.mark.parametrize(
    ("mesh", "expert", "shards"),
    [
        ("expert=4", 4, 4),
        slow("fsdp=2,expert=2,tensor=2", 2, 4),
    ],
)
@pytest.mark.parametrize("routing", ["padded", "skewed"])
def test_what_finds_no_room_on_a_shard_is_dropped_and_counted(tmp_path, mesh, expert, shards, routing):
    x, gates, experts, ids, valid, dy = inputs(routing)
    strategy = strategy_of(mesh, tmp_path, room_factor=0.5)
    kept = kept_by_room(ids, valid, 0.5, expert, shards)
    y, load, dropped, grads = compute(strategy, "train", routing)
    assert dropped == np.repeat(valid[..., None], K, -1).sum() - kept.sum() > 0
    assert_close(y, dense_loop(x, gates, experts, ids, kept), 1e-5)
    assert load.tolist() == expected(routing)[2].tolist()
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), grads, dense_grads(x, gates, experts, ids, kept, dy))


def test_room_for_all_that_comes_drops_nothing(tmp_path):
    strategy = strategy_of("expert=4", tmp_path, room_factor=8 / 3)  # three experts on two of four shards
    check(strategy, "train", "skewed")
    check(strategy, "train", "padded")
