"""Adapters: nothing before training, base + change after it, on a mesh and in the export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close, random_model, random_tokens, slow, tiny_config

from jaxseek.checkpoint import models
from jaxseek.config.model import ConfigError
from jaxseek.config.run import LoraConfig, RunConfig
from jaxseek.sharding.parameters import parameters
from jaxseek.train import lora
from jaxseek.train.batch import make_batch, to_devices
from jaxseek.train.loss import StepInputs
from jaxseek.train.optimizer import decays, make_optimizer
from jaxseek.train.pretrain import LanguageLoss
from jaxseek.train.step import changed, init_state, make_step, trained, with_values

pytestmark = pytest.mark.usefixtures("quick_compilation")

LORA = LoraConfig(rank=3, alpha=6.0)
TOKENS_BT = random_tokens(4, 8)
CONFIGS = {
    "v3": tiny_config("v3", num_nextn_predict_layers=1, num_hidden_layers=2),
    "v3, one layer": tiny_config(
        "v3", num_nextn_predict_layers=0, num_hidden_layers=1, first_k_dense_replace=0
    ),
    "v2-lite": tiny_config("v2-lite"),
    "v1": tiny_config("v1"),
    "llama": tiny_config("llama"),
}
PRODUCTS = {  # of the two factors, with the layer axis in front
    "attn.q_b_QNH": "lQz,lzNH->lQNH",
    "attn.q_DNH": "lDz,lzNH->lDNH",
    "attn.k_b_NPC": "lNPz,lzC->lNPC",
    "attn.v_b_NHC": "lNHz,lzC->lNHC",
    "attn.o_NHD": "lNHz,lzD->lNHD",
    "attn.q_DKGH": "lDz,lzKGH->lDKGH",
    "attn.o_KGHD": "lKGHz,lzD->lKGHD",
    "mlp.gate_EDF": "lEDz,lEzF->lEDF",
    "mlp.down_EFD": "lEFz,lEzD->lEFD",
    "mlp.shared.up_DF": "lDz,lzF->lDF",
    "mlp.gate_DF": "lDz,lzF->lDF",
}


def values(model):
    return {p: np.asarray(v[...]) for p, v in parameters(model).items()}


def drawn(model):
    """As after training: right factors that are not zero, the same on every mesh."""
    new = {}
    for path, value in trained(model).items():
        if path.endswith(".right"):
            draw = np.random.default_rng(len(path)).standard_normal(value.shape).astype(np.float32)
            new[path] = jax.device_put(0.1 * draw, value.sharding)
    return with_values(model, new)


@pytest.mark.parametrize("name", ["v3", "llama", *(slow(n) for n in ("v1", "v2-lite"))])
def test_an_adapted_model_is_its_base_until_trained_and_merges_into_base_plus_change(name, tmp_path):
    base = random_model(CONFIGS[name])
    adapted = lora.adapt(base, LORA, seed=0)
    expected = np.asarray(base(TOKENS_BT))
    np.testing.assert_array_equal(adapted(TOKENS_BT), expected)
    assert values(lora.merge(base)).keys() == values(base).keys()

    adapted = drawn(adapted)
    changed_logits = np.asarray(adapted(TOKENS_BT))
    assert np.abs(changed_logits - expected).max() > 0.01
    merged = lora.merge(adapted)
    assert not lora.is_adapted(merged)
    assert merged.embed_VD.get_value() is adapted.embed_VD.get_value()  # only what has adapters is made
    assert_close(merged(TOKENS_BT), changed_logits, 1e-5)

    models.save(merged, tmp_path / "model")
    exported, before, factors = values(models.restore(tmp_path / "model")), values(base), values(adapted)
    assert exported.keys() == before.keys()
    checked = 0
    for path, value in exported.items():
        if f"{path}.left" not in factors:
            np.testing.assert_array_equal(value, before[path])
            continue
        product = next((p for name, p in PRODUCTS.items() if path.endswith(f".{name}")), None)
        if product is not None:
            left, right = (factors[f"{path}.{side}"].astype(np.float64) for side in ("left", "right"))
            assert_close(value, before[path] + 6.0 / 3 * np.einsum(product, left, right), 1e-6)
            checked += 1
    assert checked >= 3


def test_every_matrix_of_the_layers_has_an_adapter_and_each_its_own_draw():
    adapted = lora.adapt(random_model(CONFIGS["v3"]), LORA, seed=0)
    paths = {p.removesuffix(".left") for p in trained(adapted) if p.endswith(".left")}
    plain = {p for p, v in parameters(random_model(CONFIGS["v3"])).items() if "stack" in p and v.ndim > 2}
    assert paths == {p for p in plain if "router" not in p and "norm" not in p}
    lefts = [np.asarray(v) for p, v in trained(adapted).items() if p.endswith(".left")]
    assert len({left.tobytes() for left in lefts}) == len(lefts)
    assert not any(np.asarray(v).any() for p, v in trained(adapted).items() if p.endswith(".right"))


def test_targets_choose_the_parts_and_must_name_one_that_the_model_has():
    model = random_model(CONFIGS["v1"])
    for target, part in (("attention", ".attn."), ("experts", "_E"), ("mlp", "mlp.")):
        found = trained(lora.adapt(model, LoraConfig(rank=2, targets=[target]), seed=0))
        assert found
        assert all(part in path for path in found)
    with pytest.raises(ConfigError, match=r"targets is \['experts'\], of which a llama model has none"):
        lora.adapt(random_model(CONFIGS["llama"]), LoraConfig(rank=2, targets=["experts"]), seed=0)


@pytest.mark.parametrize("name", ["v3", slow("v1")])
def test_on_a_mesh_adapters_compute_and_merge_the_same(name):
    mesh = "fsdp=2,expert=2,tensor=2"
    expected, split = (drawn(lora.adapt(random_model(CONFIGS[name], m), LORA, 0)) for m in (None, mesh))
    for path, value in values(expected).items():
        np.testing.assert_array_equal(values(split)[path], value)
    assert_close(split(TOKENS_BT), expected(TOKENS_BT), 1e-5)
    merged, whole = values(lora.merge(split)), values(lora.merge(expected))
    for path, value in whole.items():
        assert_close(merged[path], value, 1e-6)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("v3, one layer", None),
        slow("v3", None),
        slow("v3", "fsdp=2,expert=2,tensor=2"),
    ],
)
def test_training_changes_the_adapters_and_nothing_else(name, mesh):
    model = lora.adapt(random_model(CONFIGS[name], mesh), LORA, seed=0)
    config = RunConfig.from_dict(
        {"objective": "sft", "model": "m", "out": "o", "steps": 9, "data": {"train": "d"}, "remat": "none"}
        | {"optimizer": {"learning_rate": 0.01}}
    )
    optimizer = make_optimizer(config.program, decays(model))
    step = make_step(LanguageLoss(config.program, jnp.dtype("float32")), optimizer)
    before, state = values(model), init_state(model, optimizer)
    assert changed(model).keys() == trained(model).keys()  # which is what a checkpoint holds
    ones = np.ones_like(TOKENS_BT)
    with model.on_mesh():
        batch = to_devices(
            make_batch(TOKENS_BT, ones, ones.astype(np.float32), model.cfg.num_nextn_predict_layers), model
        )
        losses = []
        for _ in range(4):
            state, aux = step(state, batch, StepInputs(np.float32(0.3), np.float32(0.1)))
            losses.append(float(aux.metrics["loss"]))
    assert losses == sorted(losses, reverse=True)
    for path, value in values(state.model).items():
        adapter = path.endswith((".left", ".right"))
        assert np.array_equal(value, before[path]) != adapter, path
