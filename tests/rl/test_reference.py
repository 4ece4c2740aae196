"""The reference policy: every kind gives the same KL, it stays while the policy learns, and is replaced."""

import jax
import numpy as np
import pytest
from policies import config, make_home, policy, trained, values_of

from jaxseek.config.run import ReferenceConfig
from jaxseek.rl.reference import ReferencePolicy
from jaxseek.sharding.parameters import parameters

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def test_on_the_devices_or_in_the_hosts_memory_is_the_same_and_a_new_one_begins_at_zero(home, tmp_path):
    found = {}
    for kind in ("device", "host"):
        given = {"grpo": {"beta": 0.1}, "reference": {"kind": kind, "replace_every": 2}}
        found[kind] = trained(home, tmp_path / kind, "dense", steps=4, **given)
    names = "kl", "loss", "grad_norm", "reward"
    assert values_of(found["host"], *names) == values_of(found["device"], *names)
    kl = [r["kl"] for r in found["device"]]
    assert all(abs(kl[step]) < 1e-8 for step in (0, 2))
    assert all(kl[step] > 1e-4 for step in (1, 3))


@pytest.mark.slow
def test_of_adapters_the_base_is_the_reference_that_a_copy_is(home, tmp_path):
    found = {}
    for kind in ("base", "device"):
        given = {"grpo": {"beta": 0.1}, "reference": {"kind": kind}, "lora": {"rank": 2}}
        found[kind] = trained(home, tmp_path / kind, "dense", steps=2, **given)
    for a, b in zip(found["base"], found["device"]):
        np.testing.assert_allclose([a["kl"], a["loss"]], [b["kl"], b["loss"]], rtol=1e-5, atol=1e-8)
    assert found["base"][1]["kl"] > 1e-6


def test_without_beta_there_is_none(home, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a reference is opened")

    monkeypatch.setattr(ReferencePolicy, "open", never)
    (found,) = trained(home, tmp_path / "run", "dense", steps=1)
    assert "kl" not in found


@pytest.mark.parametrize("kind", ["device", "host"])
@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
def test_it_is_a_copy_that_outlives_the_policys_arrays(home, tmp_path, kind, mesh):
    run = config(home, tmp_path / "run", "dense")
    run = run.replace(reference=ReferenceConfig(kind=kind))
    model = jax.tree.map(lambda a: a + 0, policy("dense", mesh))
    reference = ReferencePolicy(run, model.strategy, np.float32)
    reference.open(0, lambda: model)
    expected = {p: np.asarray(v[...]) for p, v in parameters(model).items()}
    shardings = {p: v[...].sharding for p, v in parameters(model).items()}
    for leaf in jax.tree.leaves(model):
        leaf.delete()  # as the update does that is given them
    for path, value in parameters(reference.of(policy("dense", mesh))).items():
        np.testing.assert_array_equal(np.asarray(value[...]), expected[path])
        assert value[...].sharding == shardings[path]


def test_what_took_its_place_is_kept_as_long_as_a_checkpoint_needs_it(home, tmp_path):
    run = config(home, tmp_path / "run", "dense")
    reference = ReferencePolicy(run, policy("dense").strategy, np.float32)

    def held():
        return sorted(int(p.name) for p in reference.directory.iterdir())

    for step, needed in ((2, ()), (4, (2,)), (6, (2,)), (8, (2, 6, 0)), (10, (8,))):
        double = jax.tree.map(lambda a, step=step: a * np.float32(step), policy("dense"))
        reference.replace(double, step, needed)
        assert held() == sorted({step, *needed} - {0} & set(range(11)))
    again = ReferencePolicy(run, policy("dense").strategy, np.float32)
    again.open(8, lambda: pytest.fail("it is not the first"))
    for (path, value), first in zip(
        parameters(again.of(policy("dense"))).items(), parameters(policy("dense")).values()
    ):
        np.testing.assert_array_equal(np.asarray(value[...]), 8 * np.asarray(first[...]), path)
