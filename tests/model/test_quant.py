"""Quantised weights compute what their numbers, value times scale, compute; checkpoints keep every bit."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import (
    assert_close,
    forward,
    predict_ahead,
    random_tokens,
    slow,
    tiny_config,
    weights,
)
from quantiser import SPECS, arrays_of, ordinary_model, quantized_model

from jaxseek.api import load
from jaxseek.checkpoint import models
from jaxseek.checkpoint.models import CheckpointError
from jaxseek.config.formats import FORMATS
from jaxseek.config.model import ConfigError, ModelConfig, configs_dir
from jaxseek.config.run import RunConfig
from jaxseek.decode import cpu
from jaxseek.engine.engine import Engine
from jaxseek.engine.sampling import Sampling
from jaxseek.lab.info import describe, read_quantization
from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.weight import (
    MATRICES,
    Quantized,
    quantization,
    quantize_abstract,
    scale_shape,
)
from jaxseek.ops import int4
from jaxseek.ops.grouped_mlp import _gmm_mlp, _tiled_mlp
from jaxseek.ops.scaled import Scaled, dequantize, few_times_scaled
from jaxseek.sharding.parameters import parameters
from jaxseek.sharding.rules import Rules
from jaxseek.sharding.strategy import Strategy
from jaxseek.train import start

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS_BT = random_tokens(2, 12)
GREEDY = Sampling(max_new_tokens=6, temperature=0)


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for path, param in got.items():
        values = (np.asarray(v.get_value()) for v in (param, expected[path]))
        assert models.same_bits(*values), path


# -------------------------------------------------------------------- shapes and products


@pytest.mark.parametrize(
    ("name", "shape", "group", "expected"),
    [
        ("q_DKGH", (576, 3, 3, 64), None, (1, 3, 3, 64)),
        ("o_KGHD", (30, 3, 3, 64, 576), None, (30, 1, 1, 1, 576)),
        ("o_KGHD", (30, 3, 3, 96, 576), 128, (30, 3, 3, 3, 576)),
        ("gate_EDF", (4, 8, 300, 20), 128, (4, 8, 3, 20)),
        ("v_b_NHC", (16, 128, 512), 128, (16, 128, 4)),
    ],
)
def test_a_scale_is_one_or_an_entry_per_group_along_the_inputs(name, shape, group, expected):
    assert scale_shape(name, shape, group) == expected


def test_every_matrix_of_every_family_but_the_named_exceptions_is_one_of_matrices():
    stay = {"embed_VD", "head_DV", "proj_2DD", "router_DE", "weights_DN"}
    found = set()
    for name in ("qwen2", "v2-lite", "v3.2", "v3"):
        for path, param in parameters(DeepSeek.abstract(tiny_config(name))).items():
            if len(param.get_metadata("axes")) > 1 and "bias" not in path:
                found.add(path.rsplit(".", 1)[-1])
    assert found == MATRICES.keys() | stay


@pytest.mark.parametrize("groups", [1, 6])
def test_the_product_of_few_rows_equals_the_formula(groups, monkeypatch):
    monkeypatch.setattr("jaxseek.ops.scaled._BLOCK", 40)
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((3, 24), np.float32))
    value = draw.integers(-127, 128, (2, 24, 10)).astype(np.int8)
    scale = draw.random((2, groups, 10), np.float32)
    expected = np.asarray(x, np.float64) @ (value * scale.repeat(24 // groups, 1).astype(np.float64))[1]
    assert_close(few_times_scaled(x, Scaled(jnp.asarray(value), jnp.asarray(scale)), 1), expected, 1e-6)


@pytest.mark.parametrize("implementation", [functools.partial(_gmm_mlp, interpret=True), _tiled_mlp])
@pytest.mark.parametrize("rows", [20, 300])  # CPU: tiles of 8 rows, and of 64
def test_experts_compute_with_their_numbers(implementation, rows):
    draw, sizes_E = np.random.default_rng(0), jnp.array([5, 0, rows - 9])
    x = jnp.asarray(0.01 * draw.standard_normal((rows, 256), np.float32))
    experts = [
        Scaled(
            jnp.asarray(draw.integers(-7, 8, (3, *shape)), jnp.int4),
            jnp.asarray(draw.random((3, shape[0] // 128, shape[1]), np.float32)),
        )
        for shape in ((256, 128), (256, 128), (128, 256))
    ]
    numbers = [dequantize(w, jnp.float32) for w in experts]
    expected = jax.jit(_tiled_mlp)(x, *numbers, sizes_E)
    assert_close(jax.jit(implementation)(x, *experts, sizes_E), expected, 1e-5)


def test_in_bfloat16_a_number_is_the_rounded_float32_product():
    model = quantized_model(tiny_config("llama"), "fp8")
    numbers = arrays_of(model.cfg, SPECS["fp8"])[1]["stacks.0.mlp.up_DF"][0]
    with model.on_mesh():
        layer = jax.tree.map(lambda a: a[0], model.stacks[0])
        got = layer.mlp.up_DF.dense(Rules(), jnp.bfloat16)
    assert models.same_bits(np.asarray(got), numbers.astype(jnp.bfloat16))


# -------------------------------------------------------------------- models


QUICK = {"llama with biases": "int4", "qwen2": "int8", "v1": "fp8", "v2-lite": "int4", "v3": "fp8"}
QUICK |= {"v3.2": "int8"}
NAMED = [(name, kind) if kind == QUICK[name] else slow(name, kind) for name in QUICK for kind in FORMATS]


@pytest.mark.parametrize(("name", "kind"), NAMED)
def test_logits_equal_the_formula_with_the_numbers(name, kind):
    model = quantized_model(tiny_config(name), kind)
    w = weights(ordinary_model(model.cfg, kind))
    expected = np.stack([forward(model.cfg, w, row)[0] for row in TOKENS_BT])
    assert_close(model(TOKENS_BT), expected, 1e-5)
    if model.mtp:
        ahead = np.stack([predict_ahead(model.cfg, w, row) for row in TOKENS_BT])
        assert_close(model.predict_ahead(TOKENS_BT), ahead, 1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "form"),
    [
        ("v3", "fp8", "cpu"),
        slow("qwen2", "int4", "cpu"),
        slow("v3.2", "int8", "plain"),
        slow("v2-lite", "int8", "cpu"),
        slow("v3", "int4", "plain"),
    ],
)
def test_greedy_tokens_are_those_of_an_ordinary_model_and_of_whole_passes(name, kind, form):
    cfg = tiny_config(name, num_hidden_layers=2, num_nextn_predict_layers=0)
    model, ordinary = quantized_model(cfg, kind), ordinary_model(cfg, kind)
    prompts = [row[: 5 + 2 * i].tolist() for i, row in enumerate(TOKENS_BT)]
    completions = Engine(model, form=form).generate(prompts, GREEDY)
    expected = Engine(ordinary, form="plain").generate(prompts, GREEDY)
    assert [c.tokens for c in completions] == [c.tokens for c in expected]
    whole = [prompt + completion.tokens for prompt, completion in zip(prompts, completions)]
    longest = max(map(len, whole))  # what stands behind a sequence changes nothing before it
    logits_BTV = np.asarray(model(np.array([row + [0] * (longest - len(row)) for row in whole])))
    for prompt, completion, logits_TV in zip(prompts, completions, logits_BTV):
        logits_TV = logits_TV[: len(prompt + completion.tokens)]
        assert completion.tokens == logits_TV.argmax(-1)[len(prompt) - 1 : -1].tolist()
        logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV))
        chosen = [logprobs_TV[len(prompt) - 1 + i, t] for i, t in enumerate(completion.tokens)]
        assert_close(completion.logprobs, chosen, 1e-4)


@pytest.mark.parametrize(
    ("name", "mesh", "kind"),
    [
        ("v3", "fsdp=2,expert=2,tensor=2", "fp8"),
        slow("v3", "attention-data-parallel", "int4"),
        slow("llama", "data=2,tensor=2", "int8"),
        slow("v3", "fsdp=2,expert=2,tensor=2", "int8"),
        slow("v3", "expert=4,context=2", "int4"),
        slow("v3.2", "fsdp=4,tensor=2", "fp8"),
        slow("llama", "fsdp=8", "int4"),
    ],
)
def test_every_mesh_computes_what_one_device_computes(name, mesh, kind):
    cfg = tiny_config(name, num_hidden_layers=1, num_nextn_predict_layers=0)
    cfg = cfg if name == "llama" else cfg.replace(first_k_dense_replace=0)
    if mesh == "attention-data-parallel":
        mesh = Strategy.from_toml(configs_dir() / "meshes" / f"{mesh}.toml", fsdp=2, expert=4)
    model, tokens_BT = quantized_model(cfg, kind, mesh), random_tokens(8, 8)
    assert_close(model(tokens_BT), quantized_model(cfg, kind)(tokens_BT), 1e-5)
    prompts = [row[: 3 + i % 4].tolist() for i, row in enumerate(tokens_BT)]
    ours, theirs = (Engine(m, form="plain") for m in (model, quantized_model(cfg, kind)))
    assert [c.tokens for c in ours.generate(prompts, GREEDY)] == [
        c.tokens for c in theirs.generate(prompts, GREEDY)
    ]


# -------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", [slow("int4"), slow("int8"), slow("fp8")])
def test_a_checkpoint_is_restored_bit_for_bit_onto_another_mesh(tmp_path, kind):
    cfg = tiny_config(
        "v3", kv_lora_rank=18, moe_intermediate_size=10
    )  # int4: rows of which a shard cuts a byte
    model = quantized_model(cfg, kind, "tensor=2,fsdp=2")
    models.save(model, tmp_path / "q", check=True)
    manifest = json.loads((tmp_path / "q/jaxseek.json").read_text())
    path = "stacks.1.mlp.down_EFD"
    assert manifest["quantization"][path] == SPECS[kind].group
    assert manifest["params"][f"{path}.value"] == {"shape": [2, 8, 10, 32], "dtype": SPECS[kind].dtype}
    assert manifest["params"][f"{path}.scale"] == {"shape": [2, 8, 1, 32], "dtype": "float32"}

    for mesh in (None, "expert=2,fsdp=2", "tensor=2"):
        assert_same_bits(parameters(models.restore(tmp_path / "q", mesh)), parameters(model))
    again, _ = load(tmp_path / "q", dtype="bfloat16")
    assert again.embed_VD[...].dtype == jnp.bfloat16
    assert again(TOKENS_BT).dtype == jnp.float32
    assert quantization(again) == quantization(model)
    held, expected = parameters(again), parameters(model)
    for path in held.keys() & {f"{p}.{part}" for p in quantization(model) for part in ("value", "scale")}:
        assert held[path].get_value().dtype == expected[path].get_value().dtype
    without = models.restore(tmp_path / "q", mtp=False)
    assert not any(path.startswith("mtp.") for path in quantization(without))
    with pytest.raises(ValueError, match="other stacks"):
        models.save(cpu.unroll(quantized_model(cfg, kind), False), tmp_path / "unrolled")


def test_a_manifest_that_does_not_fit_is_named(tmp_path):
    models.save(quantized_model(tiny_config("llama"), "int8"), tmp_path / "q")
    manifest = json.loads((tmp_path / "q/jaxseek.json").read_text())
    manifest["quantization"]["stacks.0.mlp.up_DF"] = 8
    models.write_json(tmp_path / "q/jaxseek.json", manifest)
    (tmp_path / "q/digests.json").unlink()
    with pytest.raises(CheckpointError, match=r"up_DF.scale is \[2, 1, 48\], expected \[2, 4, 48\]"):
        models.restore(tmp_path / "q")


@pytest.mark.parametrize("size", [1, 5, 8])
def test_two_int4_values_share_a_byte_the_first_in_its_low_bits(size):
    values = np.random.default_rng(0).integers(-8, 8, (3, size))
    padded = np.pad(values, ((0, 0), (0, size % 2))) & 15
    stored = int4.pack(jnp.asarray(values, jnp.int4), -1)
    np.testing.assert_array_equal(stored, padded[:, ::2] + 16 * padded[:, 1::2])
    assert (stored.dtype, stored.shape) == (jnp.uint8, int4.packed_shape(values.shape, -1))
    np.testing.assert_array_equal(np.asarray(int4.unpack(stored, size, -1)).astype(int), values)
    np.testing.assert_array_equal(int4.pack(jnp.asarray(values.T, jnp.int4), -2), stored.T)
    np.testing.assert_array_equal(np.asarray(int4.unpack(stored.T, size, -2)).astype(int), values.T)


# -------------------------------------------------------------------- around them


def test_memory_can_be_planned_with_no_weights(tmp_path):
    cfg = ModelConfig.from_preset("deepseek-r1")
    mesh, share = "expert=16,tensor=4", {}
    model, plain = DeepSeek.abstract(cfg, mesh), describe(cfg, mesh)["weight_bytes_per_chip"]
    for kind in FORMATS:
        specs = quantization(quantize_abstract(model, kind))
        share[kind] = describe(cfg, mesh, quantization=specs)["weight_bytes_per_chip"] / plain
    assert share == pytest.approx({"int8": 0.52, "int4": 0.3, "fp8": 0.54}, abs=0.01)

    models.save(quantized_model(tiny_config("llama"), "int4"), tmp_path / "q")
    assert {spec.dtype for spec in read_quantization(str(tmp_path / "q")).values()} == {"int4"}


def test_training_says_to_convert_first(tmp_path):
    model = quantized_model(tiny_config("llama"), "int8")
    models.save(model, tmp_path / "q")
    raw = {"objective": "pretrain", "model": str(tmp_path / "q"), "out": str(tmp_path / "out"), "steps": 1}
    run = RunConfig.from_dict(raw | {"data": {"train": ["x.txt"]}, "tokenizer": "train:48"})
    with pytest.raises(ConfigError, match=r"jaxseek convert \S+/q DST --dtype bfloat16"):
        start.model_config(run)
    with model.on_mesh(), pytest.raises(ValueError, match="fp8"):
        model.context(Rules(), jnp.asarray(TOKENS_BT), fp8=True)


@pytest.mark.parametrize(("kind", "dtype"), [("int8", "int8"), ("int4", "int8"), ("fp8", "float16")])
def test_one_cpu_device_decodes_with_values_that_are_quick_to_read(kind, dtype):
    decoder = cpu.prepare(quantized_model(tiny_config("v3"), kind))
    held = [m.value[...].dtype.name for _, m in nnx.iter_modules(decoder.stacks) if isinstance(m, Quantized)]
    assert held
    assert set(held) == {dtype}
