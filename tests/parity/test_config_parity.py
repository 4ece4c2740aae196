"""ModelConfig against transformers: the same fields and parameter counts, and configs that load there."""

import random
from typing import Any

import pytest

from jaxseek.config.model import ModelConfig, RopeConfig, presets

pytestmark = pytest.mark.parity

KINDS = ("llama", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3", "deepseek_v32")
SEEDS = range(12)
# One preset of every shape that transformers has a class for (it has none for model_type deepseek).
SHAPES = (
    "deepseek-llm-7b-base",
    "deepseek-llm-67b-base",
    "deepseek-v2-lite",
    "deepseek-v2",
    "deepseek-v2.5",
    "deepseek-r1",
    "deepseek-v3.2-exp",
    "deepseek-r1-distill-qwen-1.5b",
    "deepseek-r1-distill-qwen-7b",
    "deepseek-r1-distill-qwen-14b",
    "deepseek-r1-distill-qwen-32b",
    "deepseek-r1-0528-qwen3-8b",
    "deepseek-r1-distill-llama-8b",
    "deepseek-r1-distill-llama-70b",
    "tiny-llm",
    "tiny-v2",
    "tiny-v3",
    "tiny-r1",
)


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    return module


def random_hf_fields(kind: str, seed: int) -> dict[str, Any]:
    """Arguments of transformers' config class: small, valid, and different in every field that matters."""
    rng = random.Random(f"{kind} {seed}")
    latent, kv_heads = "deepseek" in kind, rng.randint(1, 4)
    heads = kv_heads if latent else kv_heads * rng.randint(1, 4)
    fields: dict[str, Any] = {
        "vocab_size": rng.randint(8, 99),
        "hidden_size": 2 * heads * rng.randint(1, 9),
        "intermediate_size": rng.randint(1, 99),
        "num_hidden_layers": rng.randint(1, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": rng.choice([256, 512, 4096]),
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "initializer_range": rng.choice([0.006, 0.02]),
        "tie_word_embeddings": rng.random() < 0.5,
        "bos_token_id": rng.choice([None, 1]),
        "eos_token_id": rng.choice([None, 2, [2, 3]]),
        "pad_token_id": rng.choice([None, 4]),
        "dtype": rng.choice([None, "float32", "bfloat16"]),
        "rope_parameters": random_rope(rng),
    }
    if kind != "qwen2":
        fields["attention_bias"] = rng.random() < 0.5
    if kind in ("llama", "deepseek_v2", "deepseek_v32"):
        fields["mlp_bias"] = rng.random() < 0.5  # V3.2 has the field, and its layers ignore it
    if kind in ("llama", "qwen2", "qwen3") and rng.random() < 0.5:
        fields["head_dim"] = 2 * rng.randint(3, 20)
    if not latent:
        return fields
    groups, per_group = rng.randint(1, 4), rng.randint(2, 5)
    kept = rng.randint(1, groups)
    fields |= {
        "q_lora_rank": rng.choice([rng.randint(1, 30), None])
        if kind != "deepseek_v32"
        else rng.randint(1, 30),
        "kv_lora_rank": rng.randint(1, 30),
        "qk_nope_head_dim": rng.randint(1, 30),
        "qk_rope_head_dim": 2 * rng.randint(3, 15),
        "v_head_dim": rng.randint(1, 30),
        "n_routed_experts": groups * per_group,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": rng.randint(1, kept * per_group),
        "n_shared_experts": rng.randint(1, 3),
        "moe_intermediate_size": rng.randint(1, 30),
        "first_k_dense_replace": rng.randint(0, fields["num_hidden_layers"]),
        "routed_scaling_factor": rng.choice([1.0, 2.5, 16.0]),
    }
    if kind == "deepseek_v2":
        fields["topk_method"] = rng.choice(["greedy", "group_limited_greedy"])
    else:
        fields["norm_topk_prob"] = rng.random() < 0.5
    if kind == "deepseek_v3":
        fields |= {"num_mtp_layers": rng.randint(0, 2), "rope_interleave": rng.random() < 0.5}
        fields["hidden_size"] += rng.randint(0, 1)  # its heads need not divide the hidden size
    if kind == "deepseek_v32":
        fields |= {"index_n_heads": rng.randint(1, 4), "index_topk": rng.randint(1, 9)}
        fields["index_head_dim"] = fields["qk_rope_head_dim"] + rng.randint(0, 9)
        if rng.random() < 0.5:  # the list wins over the number
            dense, layers = rng.randint(0, fields["num_hidden_layers"]), fields["num_hidden_layers"]
            fields["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (layers - dense)
    return fields


def random_rope(rng: random.Random) -> dict[str, Any] | None:
    kind = rng.choice([None, "default", "linear", "yarn", "yarn", "llama3"])
    if kind is None:
        return None
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": rng.choice([1e4, 5e5, 1e6])}
    if kind != "default":
        rope["factor"] = rng.choice([2.0, 8.0, 40.0])
    if kind in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = rng.choice([64, 128])
    if kind == "yarn":
        rope |= {k: rng.choice([0.707, 1.0]) for k in ("mscale", "mscale_all_dim") if rng.random() < 0.7}
        rope |= {k: v for k, v in (("beta_fast", 16.0), ("beta_slow", 2.0)) if rng.random() < 0.5}
        rope |= {k: v for k, v in (("attention_factor", 1.5), ("truncate", False)) if rng.random() < 0.3}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return rope


def meta_model(transformers, hf):
    """The model of transformers without memory, and its parameters with the routers' selection bias."""
    import torch

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf)
    bias = sum(b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    return model, sum(p.numel() for p in model.parameters()) + bias


def assert_same_fields(cfg: ModelConfig, hf) -> None:
    for name in ModelConfig.__dataclass_fields__:
        if name in ("rope", "head_dim", "eos_token_id", "dtype") or not hasattr(hf, name):
            continue
        got, want = getattr(cfg, name), getattr(hf, name)
        if name == "mlp_bias" and cfg.model_type == "deepseek_v32":
            want = False
        if name == "first_k_dense_replace" and getattr(hf, "mlp_layer_types", None):
            want = hf.mlp_layer_types.count("dense")
        if name in ("n_group", "topk_group") and want is None:
            want = 1
        assert got == want, f"{name}: jaxseek has {got!r}, transformers {want!r}"
    eos = hf.eos_token_id
    assert cfg.eos_token_id == (tuple(eos) if isinstance(eos, list) else eos)
    assert cfg.dtype == str(hf.dtype or "bfloat16").removeprefix("torch.")
    if cfg.is_mla:
        assert (cfg.head_dim, cfg.rope_dim) == (hf.qk_head_dim, hf.head_dim)
    else:
        assert cfg.head_dim == (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    for name, want in hf.rope_parameters.items():
        assert name == "type" or getattr(cfg.rope, name) == want, name


def assert_same_model(cfg: ModelConfig, model, hf) -> None:
    layers = model.model.layers
    assert [hasattr(layer.mlp, "experts") for layer in layers] == [
        cfg.is_moe_layer(layer) for layer in range(cfg.num_hidden_layers)
    ]
    for layer in layers:
        assert layer.self_attn.scaling == pytest.approx(cfg.softmax_scale, rel=1e-12)
    assert (layers[0].self_attn.o_proj.bias is not None) == cfg.attention_out_bias


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_random_config_agrees_in_fields_parameters_and_both_directions(kind, seed, transformers):
    hf = transformers.AutoConfig.for_model(kind, **random_hf_fields(kind, seed))
    cfg = ModelConfig.from_hf(hf.to_dict())
    assert_same_fields(cfg, hf)

    model, params = meta_model(transformers, hf)
    assert cfg.num_params() == params
    assert_same_model(cfg, model, hf)

    back = transformers.AutoConfig.for_model(**cfg.to_hf())
    assert type(back) is type(hf)
    assert_same_fields(cfg, back)
    elsewhere = {"architectures", "dtype", "rope_parameters"}  # compared by assert_same_fields and _rotation
    if kind == "deepseek_v32":
        elsewhere |= {"mlp_bias", "first_k_dense_replace"}
    for name, want in hf.to_dict().items():
        if name not in elsewhere:
            assert back.to_dict()[name] == want, name
    assert_same_rotation(transformers, hf, back)
    assert ModelConfig.from_hf(back.to_dict()) == cfg
    assert meta_model(transformers, back)[1] == params


def assert_same_rotation(transformers, hf, back) -> None:
    """Equal frequencies and cos/sin factor, whichever keys are spelled out."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = hf.rope_parameters["rope_type"]
    assert back.rope_parameters["rope_type"] == kind
    assert back.rope_parameters["rope_theta"] == hf.rope_parameters["rope_theta"]
    if kind != "default":
        (f1, a1), (f2, a2) = (ROPE_INIT_FUNCTIONS[kind](c, torch.device("cpu")) for c in (hf, back))
        assert torch.equal(f1, f2)
        assert a1 == a2


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mtp_modules_of_transformers_have_as_many_parameters(seed, transformers):
    import torch
    from transformers.modeling_layers import MtpModel

    hf = transformers.AutoConfig.for_model("deepseek_v3", **random_hf_fields("deepseek_v3", seed))
    if not hf.num_mtp_layers or hf.first_k_dense_replace >= hf.num_hidden_layers:
        hf.num_mtp_layers, hf.first_k_dense_replace = 1, 0
    main, params = meta_model(transformers, hf)
    with torch.device("meta"):
        mtp = MtpModel(main, hf.num_mtp_layers)
    own = sum(p.numel() for p in mtp.layers.parameters())
    own += sum(b.numel() for n, b in mtp.layers.named_buffers() if n.endswith("e_score_correction_bias"))
    assert ModelConfig.from_hf(hf.to_dict()).num_params(mtp=True) == params + own


@pytest.mark.parametrize("name", SHAPES)
def test_a_preset_is_a_model_of_transformers_with_as_many_parameters(name, transformers):
    cfg = ModelConfig.from_preset(name)
    hf = transformers.AutoConfig.for_model(**cfg.to_hf())
    assert_same_fields(cfg, hf)
    model, params = meta_model(transformers, hf)
    assert cfg.num_params() == params
    assert_same_model(cfg, model, hf)
    assert ModelConfig.from_hf(hf.to_dict()) == cfg


def test_every_preset_that_transformers_can_load_has_a_tested_shape():
    def shape(cfg):
        return cfg.replace(aux_loss_alpha=0.0)

    tested = {shape(ModelConfig.from_preset(name)) for name in SHAPES}
    rest = {n for n in presets() if shape(ModelConfig.from_preset(n)) not in tested}
    assert rest == {"deepseek-moe-16b-base", "deepseek-moe-16b-chat", "tiny-moe"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_of_transformers_are_read_where_a_file_states_them(kind, transformers):
    hf = transformers.AutoConfig.for_model(
        kind, **({"num_experts_per_tok": 6} if kind == "deepseek_v2" else {})
    )
    cfg = ModelConfig.from_hf(hf.to_dict())
    assert_same_fields(cfg, hf)
    assert cfg.rope == RopeConfig()


def test_a_dense_latent_model_stays_dense_in_transformers(transformers):
    fields = random_hf_fields("deepseek_v3", 0)
    raw = {k: v for k, v in fields.items() if "expert" not in k} | {"model_type": "deepseek_v3"}
    cfg = ModelConfig.from_hf(raw)
    hf = transformers.AutoConfig.for_model(**cfg.to_hf())
    model, params = meta_model(transformers, hf)
    assert not any(hasattr(layer.mlp, "experts") for layer in model.model.layers)
    assert cfg.num_params() == params


@pytest.mark.parametrize("kind", ["llama", "deepseek_v2"])
def test_a_hidden_size_that_heads_do_not_divide_is_refused_here_as_there(kind, transformers):
    fields = random_hf_fields(kind, 0) | {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_size": 30,
    }
    with pytest.raises(Exception, match=r"30.*not a multiple.*4"):
        transformers.AutoConfig.for_model(kind, **fields)
    with pytest.raises(ValueError, match="hidden_size 30 is not divisible by num_attention_heads 4"):
        ModelConfig.from_hf(fields | {"model_type": kind})
