"""The decoder of every family against the formulas in float64: logits, experts, packing, multi-token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import (
    TINY,
    YARN,
    assert_close,
    forward,
    predict_ahead,
    random_model,
    random_tokens,
    tiny_config,
    tiny_model,
    tiny_weights,
    weights,
)

from jaxseek.config.model import ConfigError, ModelConfig, RopeConfig, presets
from jaxseek.model.context import positions_in_segments
from jaxseek.model.deepseek import DeepSeek, layer_runs
from jaxseek.sharding.parameters import parameters

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T = 2, 12
TOKENS_BT = random_tokens(B, T)


@functools.cache
def written(name):
    """Logits and expert ids of TOKENS_BT by the formulas: [B, T, V] and [sparse layers, B, T, K]."""
    rows = [forward(tiny_config(name), tiny_weights(name), row) for row in TOKENS_BT]
    return np.stack([r[0] for r in rows]), np.stack([r[2] for r in rows], axis=1)


# -------------------------------------------------------------------- against the formulas


@jax.jit
def logits_and_routing(model, tokens_BT):
    rules = model.strategy.train
    out = model.forward(tokens_BT, model.context(rules, tokens_BT))
    return model.logits(out.hidden_BTD, rules), out.routing


@pytest.mark.parametrize("name", TINY)
def test_logits_and_chosen_experts_of_every_family_equal_the_formula(name):
    model, (expected_BTV, expected_LBTK) = tiny_model(name), written(name)
    with model.on_mesh():
        logits_BTV, routing = logits_and_routing(model, jnp.asarray(TOKENS_BT))
    assert_close(logits_BTV, expected_BTV, 1e-5)
    chosen = [(ids_BTK, load_E) for r in routing for ids_BTK, load_E in zip(r.ids_BTK, r.load_E)]
    assert len(chosen) == len(expected_LBTK)
    for (ids_BTK, load_E), expected_BTK in zip(chosen, expected_LBTK):
        np.testing.assert_array_equal(ids_BTK, expected_BTK)
        np.testing.assert_array_equal(load_E, np.bincount(expected_BTK.ravel(), minlength=8))


def test_a_call_gives_float32_logits_and_expert_ids_integers():
    model, (expected_BTV, expected_LBTK) = tiny_model("v3"), written("v3")
    logits_BTV, ids_LBTK = model(TOKENS_BT), model.expert_ids(TOKENS_BT)
    assert (logits_BTV.dtype, ids_LBTK.dtype) == (jnp.float32, jnp.int32)
    assert_close(logits_BTV, expected_BTV, 1e-5)
    np.testing.assert_array_equal(ids_LBTK, expected_LBTK)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_logits_and_experts_of_random_configurations_equal_the_formula(seed):
    cfg = random_config(seed)
    model, tokens_BT = random_model(cfg), random_tokens(2, 9, seed=seed, vocab=cfg.vocab_size)
    w = weights(model)
    rows = [forward(cfg, w, row) for row in tokens_BT]
    assert_close(model(tokens_BT), np.stack([r[0] for r in rows]), 1e-5)
    if any(sparse for sparse, _ in layer_runs(cfg)):
        np.testing.assert_array_equal(model.expert_ids(tokens_BT), np.stack([r[2] for r in rows], axis=1))


def random_config(seed):
    """A tiny model of a random family with random shapes."""
    rng = np.random.default_rng(seed)

    def pick(*options):
        return options[rng.integers(len(options))]

    family = sorted(TINY)[seed % len(TINY)]
    changes = {
        "num_hidden_layers": pick(1, 2, 3),
        "hidden_size": pick(24, 40),
        "vocab_size": pick(17, 50),
        "intermediate_size": pick(20, 36),
        "rms_norm_eps": pick(1e-6, 1e-2),
        "tie_word_embeddings": pick(True, False),
        "num_nextn_predict_layers": 0,
        "rope": pick(
            RopeConfig(), YARN, RopeConfig("llama3", 300.0, 4.0, 32), RopeConfig("linear", 50.0, 3.0)
        ),
    }
    if "n_routed_experts" in TINY[family]:
        groups = TINY[family].get("n_group", 1)
        changes |= {
            "n_routed_experts": groups * pick(2, 3, 5) if groups > 1 else pick(5, 9),
            "num_experts_per_tok": pick(1, 2, 4),
            "n_shared_experts": pick(0, 1, 3),
            "routed_scaling_factor": pick(1.0, 2.5),
        }
    if "kv_lora_rank" in TINY[family]:
        changes |= {"qk_nope_head_dim": pick(6, 10), "v_head_dim": pick(6, 10), "kv_lora_rank": pick(8, 20)}
    return tiny_config(family, **changes)


@pytest.mark.parametrize("name", ["llama with biases", "v3", "v3.2"])
def test_packed_and_padded_sequences_equal_each_alone(name):
    model, w = tiny_model(name), tiny_weights(name)
    segments_BT = np.array(
        [
            [1] * 5 + [2] * 7,  # two sequences packed
            [3] * 4 + [1] * 4 + [2] * 3 + [0],  # three, and padding
            [0] * 4 + [1] * 8,  # padded on the left
            [1] * 9 + [0] * 3,  # padded on the right
        ]
    )
    tokens_BT = random_tokens(4, T, seed=1)
    logits_BTV = np.asarray(model(tokens_BT, segment_ids_BT=segments_BT))
    other = np.where(segments_BT > 0, tokens_BT, 63)
    np.testing.assert_array_equal(
        np.asarray(model(other, segment_ids_BT=segments_BT))[segments_BT > 0], logits_BTV[segments_BT > 0]
    )
    for row, segments_T, logits_TV in zip(tokens_BT, segments_BT, logits_BTV):
        for segment in set(segments_T) - {0}:
            alone = forward(model.cfg, w, row[segments_T == segment])[0]
            assert_close(logits_TV[segments_T == segment], alone, 1e-5)


def test_multi_token_modules_that_feed_each_other_equal_the_formula():
    model, w = tiny_model("v3"), tiny_weights("v3")
    expected = np.stack([predict_ahead(model.cfg, w, row, depth=1) for row in TOKENS_BT])
    logits = model.predict_ahead(TOKENS_BT, depth=1)
    assert logits.shape == (B, T - 2, 64)
    assert_close(logits, expected, 1e-5)


def test_models_without_the_part_asked_for_say_so():
    with pytest.raises(ValueError, match=r"depth is 2, but the model has 2 multi-token"):
        tiny_model("v3").predict_ahead(TOKENS_BT, depth=2)
    with pytest.raises(ValueError, match="no mixture-of-experts layer"):
        tiny_model("llama").expert_ids(TOKENS_BT)


# -------------------------------------------------------------------- forms of one model


def test_layers_of_one_kind_stand_in_one_stack():
    assert layer_runs(ModelConfig.from_preset("deepseek-r1")) == [(False, 3), (True, 58)]
    assert layer_runs(tiny_config("v1, every second layer")) == [(True, 1), (False, 1), (True, 1)]
    assert layer_runs(tiny_config("qwen2")) == [(False, 2)]


def test_random_weights_are_the_same_on_every_mesh_and_differ_by_seed():
    cfg = tiny_config("v3")
    one = weights(DeepSeek.init(cfg))
    many = weights(DeepSeek.init(cfg, "fsdp=2,expert=2,tensor=2"))
    other = weights(DeepSeek.init(cfg, seed=1))
    for path, value in one.items():
        np.testing.assert_array_equal(many[path], value)
    assert not np.array_equal(other["embed_VD"], one["embed_VD"])
    gate = one["stacks.1.mlp.gate_EDF"]
    assert gate.std() == pytest.approx(cfg.initializer_range, rel=0.05)
    assert len({m.tobytes() for layer in gate for m in layer}) == 2 * 8  # no layer or expert repeats another
    assert (one["norm.scale_D"] == 1).all()


# -------------------------------------------------------------------- sizes


@functools.cache
def abstract(cfg):
    return DeepSeek.abstract(cfg, dtype=jnp.bfloat16)


@pytest.mark.parametrize("preset", sorted(presets()))
def test_every_preset_builds_with_as_many_parameters_as_its_config_counts(preset):
    cfg = ModelConfig.from_preset(preset)
    # token ids, context and names change no shape: those that differ in them alone are built once
    model = abstract(cfg.replace(bos_token_id=None, eos_token_id=None, pad_token_id=None))
    sizes = {path: p.get_value().size for path, p in parameters(model).items()}
    assert sum(sizes.values()) == cfg.num_params(mtp=True)
    assert sum(n for path, n in sizes.items() if not path.startswith("mtp")) == cfg.num_params()


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_have_as_many_parameters_as_their_config_counts(name):
    cfg = tiny_config(name)
    assert sum(v.size for v in tiny_weights(name).values()) == cfg.num_params(mtp=True)


@pytest.mark.parametrize("preset", ["deepseek-r1", "deepseek-v3.2"])
def test_the_largest_models_lay_out_on_a_pod_without_one(preset):
    model = DeepSeek.abstract(ModelConfig.from_preset(preset), "expert=64,tensor=2,fsdp=8")
    for path, p in parameters(model).items():
        value = p.get_value()
        parts = value.size // np.prod(value.sharding.shard_shape(value.shape))
        if value.size > 64e6:  # of one layer, or of the embedding: every large matrix is split
            assert parts >= (1024 if "_ED" in path or "_EF" in path else 8), path


# -------------------------------------------------------------------- what it accepts


def test_tokens_may_be_lists_numpy_or_jax_arrays():
    model, expected = tiny_model("llama"), written("llama")[0]
    for tokens in (TOKENS_BT.tolist(), jnp.asarray(TOKENS_BT), TOKENS_BT.astype(np.int64)):
        assert_close(model(tokens), expected, 1e-5)


def test_a_bfloat16_model_computes_near_its_own_weights_in_float64():
    cfg = tiny_config("v2", num_hidden_layers=1, first_k_dense_replace=0)
    model = random_model(cfg, dtype=jnp.bfloat16)
    logits_BTV = model(TOKENS_BT)
    assert logits_BTV.dtype == jnp.float32
    assert_close(logits_BTV, np.stack([forward(cfg, weights(model), row)[0] for row in TOKENS_BT]), 0.05)


def test_positions_may_be_given_and_only_distances_matter():
    model = tiny_model("v3")
    positions_BT = np.broadcast_to(40 + np.arange(T), (B, T))
    assert_close(model(TOKENS_BT, positions_BT), written("v3")[0], 1e-4)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.full((1, T), 64), r"token ids span 64\.\.64, outside the vocabulary 0\.\.63"),
        (np.full((1, T), -1), r"token ids span -1\.\.-1"),
        (np.zeros(T, int), r"tokens have shape \(12,\), expected \[batch, length\]"),
        (np.zeros((1, 257), int), "257 tokens are more than the context of 256"),
    ],
    ids=["too large", "negative", "no batch", "too long"],
)
def test_tokens_that_cannot_be_computed_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("v3")(tokens)


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_built():
    with pytest.raises(ConfigError, match="heads 4 is not divisible by tensor=8"):
        DeepSeek.abstract(tiny_config("v3"), "tensor=8")


def test_positions_count_from_zero_in_every_segment():
    segments = jnp.array([[0, 0, 1, 1, 1, 2, 2, 0], [5, 5, 5, 5, 6, 7, 7, 7]])
    expected = [[0, 1, 0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0, 1, 2]]
    assert positions_in_segments(segments).tolist() == expected
