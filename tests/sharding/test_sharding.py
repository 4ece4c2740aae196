"""Strategies: what a user may write for a mesh, and what is refused with both numbers in the message."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from oracles import random_model, tiny_config

from jaxseek.config.model import ConfigError, ModelConfig, configs_dir, presets
from jaxseek.sharding.parameters import jit_sharing, parameters
from jaxseek.sharding.rules import MESH_AXES, PHASES
from jaxseek.sharding.strategy import Strategy

DENSE, V3 = tiny_config("llama"), tiny_config("v3")


def sizes(strategy):
    return {a: n for a, n in strategy.sizes if n > 1}


def toml(folder, text):
    path = folder / "mine.toml"
    path.write_text(text)
    return path


# -------------------------------------------------------------------- reading


@pytest.mark.parametrize("mesh", [{"data": 2, "tensor": 4}, "tensor=4,data=2", " data=2 , tensor = 4 "])
def test_sizes_may_be_a_dict_or_text(mesh):
    strategy = Strategy.parse(mesh)
    assert sizes(strategy) == {"data": 2, "tensor": 4}
    assert strategy.num_devices == 8
    assert Strategy.parse(strategy) is strategy


def test_nothing_given_is_one_device_and_the_default_tables():
    assert Strategy.parse(None) == Strategy.default() == Strategy.parse("default")
    assert sizes(Strategy.parse(None)) == {}
    assert Strategy.default().make_mesh().shape == dict.fromkeys(MESH_AXES, 1)


def test_a_file_replaces_single_entries_of_the_tables(tmp_path):
    file = toml(
        tmp_path,
        """
        [mesh]
        fsdp = 2
        tensor = 2
        [weights]
        vocab = ["tensor", "fsdp"]
        [train]
        dispatch = "replicated"
        capacity_factor = 1.5
        heads = []
        """,
    )
    strategy = Strategy.parse(str(file))
    assert sizes(strategy) == {"fsdp": 2, "tensor": 2}
    assert strategy.weights.axes("vocab") == ("tensor", "fsdp")
    assert strategy.weights.axes("embed") == ("fsdp",)
    assert (strategy.train.dispatch, strategy.train.capacity_factor) == ("replicated", 1.5)
    assert strategy.train.axes("heads") == ()
    assert strategy.decode == Strategy.default(fsdp=2, tensor=2).decode
    assert sizes(Strategy.from_toml(file, fsdp=4)) == {"fsdp": 4, "tensor": 2}


TABLES = sorted(p.stem for p in (configs_dir() / "meshes").glob("*.toml") if "." not in p.stem)


@pytest.mark.parametrize("name", TABLES)  # those for a model and a slice: tests/lab/test_lab.py
def test_shipped_strategies_fit_one_device_and_the_largest_model(name):
    assert Strategy.parse(name).num_devices == 1
    file = configs_dir() / "meshes" / f"{name}.toml"
    Strategy.from_toml(file, expert=32, tensor=4, fsdp=2).check_fits(ModelConfig.from_preset("deepseek-r1"))


def test_axes_of_size_one_split_nothing():
    rules = Strategy.default(fsdp=2, expert=2).train
    assert rules.spec("batch", "length", "heads", None) == P(("fsdp", "expert"), None, None, None)
    assert Strategy.default(data=2).train.spec("batch") == P("data")
    assert Strategy.default(data=2, fsdp=2, expert=2).parts(rules, "batch") == 4


def test_strategies_are_hashable_and_equal_by_what_they_say():
    assert hash(Strategy.parse("tensor=2")) == hash(Strategy.parse({"tensor": 2}))
    assert Strategy.parse("tensor=2") != Strategy.parse("tensor=4")


# -------------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensr=4", r"unknown mesh axis 'tensr'; did you mean tensor\?"),
        ({"exprt": 2}, r"unknown mesh axis 'exprt'; did you mean expert\?"),
        ({"zzz": 2}, "unknown mesh axis 'zzz'; known: data, fsdp, expert, tensor, context"),
        ("tensor=0", "mesh axis tensor has size 0, expected a positive integer"),
        ({"data": 2.0}, "mesh axis data has size 2.0"),
        ("tensor=two", "mesh is 'tensor=two', expected sizes such as tensor=4,data=2"),
        ("tensor=2,data", "mesh is 'tensor=2,data', expected sizes"),
        ("nowhere", "nowhere: no such strategy file"),
        ("nowhere.toml", r"nowhere\.toml: no such strategy file"),
    ],
)
def test_a_mesh_that_means_nothing_is_refused_with_a_hint(mesh, message):
    with pytest.raises(ConfigError, match=message):
        Strategy.parse(mesh)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[mesh", r"mine\.toml: not valid TOML"),
        ("[trains]\n", r"unknown table 'trains'; did you mean train\?"),
        ("[train]\nbacth = 'data'\n", r"unknown logical axis in \[train\] 'bacth'; did you mean batch\?"),
        ("[train]\nbatch = 'dta'\n", r"\[train\] batch names mesh axis 'dta'; known: data, fsdp"),
        ("[decode]\ndispatch = 'a2a'\n", r"\[decode\] dispatch is 'a2a', expected one of local, replicated"),
        ("[train]\ncapacity_factor = 0.0\n", r"\[train\] capacity_factor is 0\.0, expected a number above 0"),
        ("[train]\nroom_factor = -1\n", r"\[train\] room_factor is -1, expected a number above 0"),
        ("[decode]\nroom_factor = 2.0\n", r"\[decode\] room_factor is for dispatch 'all_to_all'"),
        (
            "[mesh]\nexpert = 2\n[train]\nbatch = ['data', 'fsdp']\n",
            r"\[train\] dispatch 'all_to_all' needs batch split over the axes of expert",
        ),
        (
            "[mesh]\nexpert = 2\n[decode]\ndispatch = 'local'\n",
            r"\[decode\] dispatch 'local' keeps all experts, but expert is split; use 'replicated'",
        ),
    ],
    ids=[
        "TOML",
        "table",
        "logical axis",
        "mesh axis",
        "dispatch",
        "capacity",
        "room",
        "room elsewhere",
        "all_to_all",
        "local",
    ],
)
def test_a_file_that_cannot_work_is_refused_and_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as e:
        Strategy.parse(toml(tmp_path, text))
    assert "mine.toml" in str(e.value)


def test_more_devices_than_there_are_names_both_numbers():
    with pytest.raises(ConfigError, match=r"data=4 x tensor=4 needs 16 devices, but 8 are available \(cpu\)"):
        Strategy.default(data=4, tensor=4).make_mesh()


@pytest.mark.parametrize(
    ("cfg", "mesh", "message"),
    [
        (DENSE, "tensor=4", r"kv_heads 2 is not divisible by tensor=4 \(\[weights\], "),
        (DENSE, "expert=2", "expert=2, but the model has no routed experts"),
        (V3, "tensor=8", "heads 4 is not divisible by tensor=8"),
        (V3, "expert=16", "expert 8 is not divisible by expert=16"),
        (V3, "fsdp=64", "embed 32 is not divisible by fsdp=64"),
        (V3, "fsdp=16", "latent 8 is not divisible by fsdp=16"),
        (V3.replace(vocab_size=65), "tensor=2", "vocab 65 is not divisible by tensor=2"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_names_both_numbers(cfg, mesh, message):
    with pytest.raises(ConfigError, match=f"the mesh does not fit the model: .*{message}"):
        Strategy.parse(mesh).check_fits(cfg)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(presets())),
    st.sampled_from(TABLES),
    st.dictionaries(st.sampled_from(MESH_AXES), st.sampled_from([2, 3, 4, 8, 16, 64]), max_size=2),
)
def test_a_proposed_mesh_fits_the_model_and_has_as_many_devices(preset, table, asked):
    cfg, file = ModelConfig.from_preset(preset), configs_dir() / "meshes" / f"{table}.toml"
    strategy = Strategy.from_toml(file, **asked)
    found = strategy.nearest(cfg)
    if not strategy.misfits(cfg):
        assert {a: n for a, n in found.items() if n > 1} == sizes(strategy)  # nothing is nearer than itself
        return
    with pytest.raises(ConfigError) as e:
        strategy.check_fits(cfg)
    named = re.search(r"as many devices, (?:--mesh )?([a-z0-9=,]+)", str(e.value))
    if found is None:
        assert named is None
        return
    proposed = dict(kv.split("=") for kv in named[1].split(","))
    other = Strategy.from_toml(file, **{a: int(n) for a, n in proposed.items()})
    assert sizes(other) == {a: n for a, n in found.items() if n > 1}
    assert other.num_devices == strategy.num_devices == math.prod(asked.values())
    other.check_fits(cfg)


@pytest.mark.parametrize(
    ("preset", "mesh", "proposal"),
    [
        ("deepseek-r1-distill-qwen-1.5b", "tensor=8", "--mesh tensor=2,data=4 fits"),
        ("deepseek-r1-distill-qwen-1.5b", "expert=4,tensor=2", "--mesh tensor=2,data=4 fits"),
        ("deepseek-v2-lite", "expert=4,tensor=32", "--mesh expert=8,tensor=16 fits"),
        ("deepseek-v2-lite", "deepseek-v3.v5e-8x8.decode", "in its [mesh] fits"),
    ],
)
def test_the_proposed_mesh_is_the_nearest_and_keeps_the_axes_that_were_asked_for(preset, mesh, proposal):
    with pytest.raises(ConfigError, match=re.escape(proposal)):
        Strategy.parse(mesh).check_fits(ModelConfig.from_preset(preset))


def test_freeing_an_axis_lets_a_mesh_fit(tmp_path):
    kinds = "".join(f"[{phase}]\nkv_heads = []\nq_groups = 'tensor'\n" for phase in ("weights", *PHASES))
    strategy = Strategy.from_toml(toml(tmp_path, kinds), tensor=4)
    cfg = DENSE.replace(num_attention_heads=8)
    strategy.check_fits(cfg)
    with pytest.raises(ConfigError, match="kv_heads 2"):
        Strategy.default(tensor=4).check_fits(cfg)


# -------------------------------------------------------------------- laying out


def test_weights_rest_where_the_tables_say():
    model = random_model(V3, "fsdp=2,expert=2,tensor=2")
    specs = {path: p[...].sharding.spec for path, p in parameters(model).items()}
    assert specs["embed_VD"] == P("tensor", "fsdp")
    assert specs["stacks.1.mlp.gate_EDF"] == P(None, "expert", "fsdp", "tensor")
    assert specs["stacks.1.mlp.down_EFD"] == P(None, "expert", "tensor", "fsdp")
    assert specs["stacks.0.attn.q_b_QNH"] == P(None, "fsdp", "tensor", None)
    assert specs["norm.scale_D"] == P(None)
    gate = dict(parameters(model))["stacks.1.mlp.gate_EDF"][...]
    assert {s.data.shape for s in gate.addressable_shards} == {(2, 4, 16, 8)}


def test_a_mesh_may_use_any_devices():
    devices = jax.devices()[4:]
    mesh = Strategy.default(tensor=2).make_mesh(devices)
    assert set(mesh.devices.flat) == set(devices[:2])
    assert mesh.axis_names == MESH_AXES


def test_parameters_are_listed_once_by_path():
    listed = parameters(random_model(DENSE))
    assert list(listed) == sorted(listed)
    assert {"embed_VD", "head_DV", "norm.scale_D", "stacks.0.attn.q_DKGH"} <= set(listed)
    assert np.asarray(listed["stacks.0.attn.q_DKGH"][...]).shape == (2, 32, 2, 2, 8)


def test_one_axis_cannot_split_two_of_an_array(tmp_path):
    text = """
        mesh = {data = 2, tensor = 2}
        [decode]
        heads = ["tensor", "data"]
        batch = []
        cache_batch = "data"
    """
    with pytest.raises(ConfigError, match=r"cache_batch and cache_heads .* both split over data"):
        Strategy.from_toml(toml(tmp_path, text)).check_fits(V3)
    Strategy.from_toml(toml(tmp_path, text + 'cache_heads = "tensor"')).check_fits(V3)


def test_what_a_function_returns_as_given_is_no_copy_and_the_rest_is_computed():
    calls = []

    @jit_sharing
    def f(tree, times, name):
        calls.append(times)
        return {name: tree["b"], "more": [tree["a"] * times, tree["b"]]}

    tree = {"a": jnp.arange(3.0), "b": jnp.ones(2)}
    for _ in range(2):
        out = f(tree, 2, "same")
        assert out["same"] is tree["b"]
        assert out["more"][1] is tree["b"]
        np.testing.assert_array_equal(out["more"][0], [0, 2, 4])
    np.testing.assert_array_equal(f(tree, 3, "same")["more"][0], [0, 3, 6])
    assert calls == [2, 3]


def test_a_mesh_beyond_any_slice_is_refused_at_once():
    cfg = ModelConfig.from_preset("tiny-v3")
    with pytest.raises(ConfigError, match=r"the mesh does not fit the model: .* Choose another size"):
        Strategy.parse("tensor=30000000").check_fits(cfg)
    with pytest.raises(ConfigError, match=r"With as many devices, --mesh .* fits"):
        Strategy.parse("tensor=4096").check_fits(ModelConfig.from_preset("deepseek-v3"))
