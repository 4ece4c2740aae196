"""Experts in slots, busy ones in several: the same results as with each expert once, on meshes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_experts import E, K, dense_loop, inputs, strategy_of
from oracles import assert_close, random_model, random_tokens, tiny_config
from quantiser import quantized_model

from jaxseek import api
from jaxseek.checkpoint import models
from jaxseek.cli import main as cli
from jaxseek.config.formats import FORMATS
from jaxseek.config.model import ConfigError
from jaxseek.engine.engine import Engine
from jaxseek.engine.sampling import Sampling
from jaxseek.experts import balance
from jaxseek.experts.replicate import experts_of_slots, place_experts
from jaxseek.hardware import Topology
from jaxseek.lab import analytic
from jaxseek.lab.info import describe
from jaxseek.lab.job import Job, abstract_model
from jaxseek.model.dispatch import dispatch
from jaxseek.model.moe import EXPERTS
from jaxseek.model.replicas import replicas_of, table
from jaxseek.ops.experts import Experts
from jaxseek.sharding.parameters import parameters
from jaxseek.sharding.strategy import Strategy

pytestmark = pytest.mark.usefixtures("quick_compilation")

SLOTS = [3, 0, 1, 2, 6, 4, 5, 7, 6, 6, 1, 2, 0, 3, 4, 6]  # of 8 experts; 5 and 7 have one, 6 four


def strategy_file(folder, text, mesh="expert = 2\ntensor = 2"):
    path = folder / "strategy.toml"
    path.write_text(f"[mesh]\n{mesh}\n[weights]\n{text}\n")
    return path


@pytest.mark.parametrize("first", [0, 5])
def test_tokens_take_the_copies_of_their_expert_in_turn(first):
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((30, E)), axis=-1)[:, :K]
    ids[[3, 17]] = E  # none
    got = replicas_of(jnp.asarray(ids), jnp.asarray(table(np.array([SLOTS]))[0]), E, first)
    turn = dict.fromkeys(range(E), first)
    for n, k in np.ndindex(ids.shape):
        if (e := int(ids[n, k])) == E:
            assert got[n, k] == len(SLOTS)
            continue
        own = [s for s, held in enumerate(SLOTS) if held == e]
        assert got[n, k] == own[turn[e] % len(own)]
        turn[e] += 1


@pytest.mark.parametrize(
    ("phase", "mesh"),
    [("decode", "expert=4"), ("decode", "expert=2,data=2"), ("train", "expert=4,tensor=2"), ("train", "")],
)
def test_a_dispatch_to_slots_is_the_dense_loop_over_experts(phase, mesh):
    strategy = strategy_of(mesh)
    rules, slots_XS = getattr(strategy, phase), jnp.asarray(table(np.array([SLOTS]))[0])

    @jax.jit
    def run(x, gates, experts, ids, valid):
        wide = ("expert", None, "expert_mlp")
        names = (wide, wide, ("expert", "expert_mlp", None))
        experts = [rules.shard(w, *n) for w, n in zip(experts, names)]
        x = rules.shard(x, "batch", "length", None)
        y, *counts = dispatch(x, ids, gates, valid, Experts(*experts), rules, replicas=(E, slots_XS))
        return jax.sharding.reshard(y, jax.P()), *counts

    for routing in ("random", "skewed", "padded"):
        x, gates, experts, ids, valid, _ = inputs(routing)
        kept = np.repeat(valid[..., None], K, -1)
        with jax.set_mesh(strategy.make_mesh()):
            y, load, dropped = run(x, gates, [w[np.array(SLOTS)] for w in experts], ids, valid)
        assert_close(y, dense_loop(x, gates, experts, ids, kept), 1e-5)
        assert load.tolist() == np.bincount(ids[valid].reshape(-1), minlength=E).tolist()
        assert dropped == 0


# -------------------------------------------------------------------- models


CFG = tiny_config("v3", num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0)
GREEDY = Sampling(4, temperature=0.0)
PROMPTS = [[5, 6, 7], [8, 9], [3, 1, 4, 1], [2]]


@functools.cache
def expected():
    model = random_model(CFG)
    tokens = [c.tokens for c in Engine(model, form="plain").generate(PROMPTS, GREEDY)]
    return np.asarray(model(random_tokens(4, 8))), tokens


def check(model):
    logits, tokens = expected()
    assert_close(model(random_tokens(4, 8)), logits, 1e-5)
    assert [c.tokens for c in Engine(model, form="plain").generate(PROMPTS, GREEDY)] == tokens


@pytest.mark.slow
def test_a_placed_model_gives_what_it_gave_before(tmp_path):
    model = random_model(CFG, strategy_file(tmp_path, "redundant_experts = 4"))
    experts = CFG.n_routed_experts
    before = np.asarray(model.stacks[0].mlp.up_EDF[...])
    place_experts(model)
    expert_LS = experts_of_slots(model.cfg, model.strategy)
    assert expert_LS.shape == (model.sparse_layers, experts + 4)
    half = experts // 2
    assert expert_LS[0].tolist() == [*range(half), half, half + 1, *range(half, experts), 0, 1]
    after = np.asarray(model.stacks[0].mlp.up_EDF[...])
    assert (after == before[:, expert_LS[0]]).all()
    assert_close(model(random_tokens(4, 8)), expected()[0], 1e-5)
    with pytest.raises(ValueError, match=r"experts of this model are in slots.*without redundant_experts"):
        models.save(model, tmp_path / "no")


def test_every_layer_has_its_own_placement(tmp_path):
    layers, experts = sum(map(CFG.is_moe_layer, range(CFG.num_hidden_layers))), CFG.n_routed_experts
    rng = np.random.default_rng(1)
    rows = [rng.permutation([*range(experts), *rng.integers(0, experts, 8)]) for _ in range(layers)]
    balance.write(tmp_path / "here.npz", balance.Placement.of(np.stack(rows), experts))
    text = 'redundant_experts = 8\nplacement = "here.npz"'
    model = random_model(CFG, strategy_file(tmp_path, text, "expert = 4\ncontext = 2"))
    place_experts(model)
    check(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_quantised_experts_are_placed_with_their_scales(tmp_path, kind):
    model = quantized_model(CFG, kind, strategy_file(tmp_path, "redundant_experts = 4"))
    parts = [(name, part) for name in EXPERTS for part in ("value", "scale")]

    def arrays():
        return [np.asarray(getattr(getattr(model.stacks[0].mlp, n), p)[...]) for n, p in parts]

    before = arrays()
    place_experts(model)
    expert_LS = experts_of_slots(model.cfg, model.strategy)
    for a, b in zip(arrays(), before):
        assert models.same_bits(a, b[:, expert_LS[0]])
    if kind == "int8":
        tokens = random_tokens(4, 8)
        assert_close(model(tokens), quantized_model(CFG, kind)(tokens), 1e-5)


def test_a_placement_of_a_trace_serves_from_the_command_line(tmp_path, capsys):
    trace = np.random.default_rng(0).integers(0, 9, (6, 5, 16))
    np.save(tmp_path / "trace.npy", trace)
    place = ["placement", str(tmp_path / "trace.npy"), "--devices", "2", "--redundant", "4"]
    assert cli.main([*place, "--place", str(tmp_path / "busy.npz"), "--json"]) == 0
    kept = balance.read(tmp_path / "busy.npz", 5, 16, 20)
    assert (kept == balance.place(trace.sum(0).astype(float), 20, 1, 1, 2).expert_LS).all()
    layout = strategy_file(tmp_path, 'redundant_experts = 4\nplacement = "busy.npz"')
    model, _ = api.load("tiny-v3", layout)
    assert model.stacks[1].mlp.slots[...][:, 0].tolist() == kept.tolist()
    capsys.readouterr()


def test_plans_count_the_slots(tmp_path):
    few = Job(CFG, Strategy.parse("expert=2,tensor=2"), Topology.parse("v5e:2x2"), "decode", 4, 64)
    layout = Strategy.parse(strategy_file(tmp_path, "redundant_experts = 8"))
    more = dataclasses.replace(few, strategy=layout)
    experts = [
        sum(
            math.prod(param.get_value().shape)
            for path, param in parameters(abstract_model(j)).items()
            if path.endswith(EXPERTS)
        )
        for j in (few, more)
    ]
    assert experts[1] == 2 * experts[0]
    given = [analytic.first_pass(j).weights for j in (few, more)]
    assert given[1] - given[0] == 2 * experts[0] / 4
    assert analytic.touched_experts(more)[0] < analytic.touched_experts(few)[0]
    sizes = [describe(CFG, j.strategy)["weight_bytes_per_chip"] for j in (few, more)]
    assert sizes[1] - sizes[0] > experts[0] / 4
    with pytest.raises(ConfigError, match="are for serving; training has each expert once"):
        dataclasses.replace(more, workload="train")


def test_what_does_not_fit_says_why(tmp_path):
    def refused(message, text, mesh="expert = 2"):
        with pytest.raises(ConfigError, match=message):
            place_experts(random_model(CFG, Strategy.from_toml(strategy_file(tmp_path, text, mesh))))

    refused(r"redundant_experts is 1\.5, expected a number of slots", "redundant_experts = 1.5")
    refused("redundant_experts is -2, expected a number of slots", "redundant_experts = -2")
    refused(r"redundant_experts 3 is not divisible by expert=2 \(\[weights\]", "redundant_experts = 3")
    refused("placement is 3, expected a file's name", "placement = 3")
    refused(r"nowhere\.npz: no such placement.*--place", 'placement = "nowhere.npz"')
    (tmp_path / "text").write_text("no")
    refused("text: not a placement that", 'placement = "text"')
    experts = CFG.n_routed_experts
    one = balance.contiguous(1, experts, 1)
    balance.write(tmp_path / "short.npz", one)
    refused(r"is for layers and slots \[1, \d+\], but the model has \d+ sparse", 'placement = "short.npz"')
    without = np.zeros((sum(map(CFG.is_moe_layer, range(CFG.num_hidden_layers))), experts), int)
    balance.write(tmp_path / "lost.npz", balance.Placement.of(without, experts))
    refused("layer 0 does not have each of the", 'placement = "lost.npz"')
    with pytest.raises(ConfigError, match=r"llama model has no experts for .* redundant_experts"):
        random_model(tiny_config("llama"), strategy_file(tmp_path, "redundant_experts = 2", "tensor = 2"))
    with pytest.raises(ValueError, match="8 experts in 11 slots are not divisible by 4"):
        balance.neighbours(1, 8, 11, 4)
