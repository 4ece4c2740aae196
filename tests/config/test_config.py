"""ModelConfig: presets against the published numbers, both Hugging Face dialects, and unusable input."""

import datetime
import json
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxseek.config import hf
from jaxseek.config.model import ConfigError, ModelConfig, RopeConfig, presets, yarn_mscale
from jaxseek.config.run import RunConfig

PRESETS = sorted(presets())

# Parameters, parameters that one token uses (embedding and head included), cache elements per token.
LLM_7B = (6_910_365_696, 6_910_365_696, 245_760)
LLM_67B = (67_425_001_472, 67_425_001_472, 194_560)
MOE_16B = (16_375_728_128, 2_828_650_496, 114_688)
V2_LITE = (15_706_484_224, 2_661_150_208, 15_552)
V2 = (235_741_434_880, 21_375_800_320, 34_560)
V3 = (671_026_419_200, 37_552_297_472, 35_136)
V32 = (671_877_944_064, 37_552_297_472 + 61 * 13_959_424, 35_136 + 7_808)
PUBLISHED = {
    "deepseek-llm-7b-base": LLM_7B,
    "deepseek-llm-7b-chat": LLM_7B,
    "deepseek-llm-67b-base": LLM_67B,
    "deepseek-llm-67b-chat": LLM_67B,
    "deepseek-math-7b-base": LLM_7B,
    "deepseek-math-7b-instruct": LLM_7B,
    "deepseek-math-7b-rl": LLM_7B,
    "deepseek-moe-16b-base": MOE_16B,
    "deepseek-moe-16b-chat": MOE_16B,
    "deepseek-v2-lite": V2_LITE,
    "deepseek-v2-lite-chat": V2_LITE,
    "deepseek-v2": V2,
    "deepseek-v2-chat": V2,
    "deepseek-v2.5": V2,
    "deepseek-v3": V3,
    "deepseek-v3-base": V3,
    "deepseek-v3-0324": V3,
    "deepseek-r1": V3,
    "deepseek-r1-zero": V3,
    "deepseek-r1-0528": V3,
    "deepseek-v3.1": V3,
    "deepseek-v3.1-base": V3,
    "deepseek-v3.1-terminus": V3,
    "deepseek-v3.2": V32,
    "deepseek-v3.2-exp": V32,
    "deepseek-r1-distill-qwen-1.5b": (1_777_088_000, 1_777_088_000, 14_336),
    "deepseek-r1-distill-qwen-7b": (7_615_616_512, 7_615_616_512, 28_672),
    "deepseek-r1-distill-qwen-14b": (14_770_033_664, 14_770_033_664, 98_304),
    "deepseek-r1-distill-qwen-32b": (32_763_876_352, 32_763_876_352, 131_072),
    "deepseek-r1-0528-qwen3-8b": (8_190_735_360, 8_190_735_360, 73_728),
    "deepseek-r1-distill-llama-8b": (8_030_261_248, 8_030_261_248, 65_536),
    "deepseek-r1-distill-llama-70b": (70_553_706_496, 70_553_706_496, 163_840),
}
# The attention scale of DeepSeek-V3's and V2's modelling code: 192^-1/2 times YaRN's mscale squared.
SCALE_V3, SCALE_V2, SCALE_128 = 0.1352337789, 0.1147213868, 128**-0.5

# DeepSeek-R1's config.json, with what a reader must skip.
R1 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V2_CLASS = {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}
V32_CLASS = {"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"]}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}


# -------------------------------------------------------------------- presets


def test_the_released_presets_are_the_published_checkpoints():
    assert {name for name in PRESETS if name.startswith("deepseek-")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_released_preset_has_the_published_numbers_to_the_last_digit(name):
    cfg = ModelConfig.from_preset(name)
    assert (cfg.num_params(), cfg.num_active_params(), cfg.cache_bytes_per_token("int8")) == PUBLISHED[name]
    assert cfg.cache_bytes_per_token() == 2 * PUBLISHED[name][2]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_round_trips_through_its_hugging_face_config(name, tmp_path):
    cfg = ModelConfig.from_preset(name)
    assert ModelConfig.from_hf(cfg.to_hf()) == cfg
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_hf()), encoding="utf-8")
    assert ModelConfig.from_hf(tmp_path) == cfg
    assert ModelConfig.from_hf(str(tmp_path / "config.json")) == cfg


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_file_names_its_model_and_source_and_has_only_fields_that_are_read(name):
    text = presets()[name].read_text(encoding="utf-8")
    title, source = text.splitlines()[:2]
    if name.startswith("deepseek-"):
        assert title.lower() == f"# deepseek-ai/{name}"
    assert source.startswith("# source: ")
    known = set(ModelConfig.from_preset("tiny-v3").to_hf()) | set(ModelConfig.from_preset("tiny-llm").to_hf())
    known |= {"same_as", "use_sliding_window", "index_n_heads", "index_head_dim", "index_topk"}
    assert set(tomllib.loads(text)) <= known


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("tiny-")])
def test_a_tiny_preset_fits_a_laptop_and_says_its_size(name):
    cfg = ModelConfig.from_preset(name)
    assert cfg.num_params() < 12e6
    assert f" {cfg.num_params() / 1e6:.1f}M " in presets()[name].read_text(encoding="utf-8").splitlines()[0]
    if name == "tiny-r1":  # the quickstart's: as fast as can be on a CPU, with a tokenizer of its own
        return
    assert (cfg.bos_token_id, cfg.eos_ids) == (0, (1,))
    assert cfg.hidden_size % 128 == cfg.intermediate_size % 128 == cfg.moe_intermediate_size % 128 == 0


def test_the_parts_of_deepseek_v3_have_the_published_sizes():
    cfg = ModelConfig.from_preset("deepseek-v3")
    moe_layer, dense_layer, embedding = 11_507_286_272, 583_483_392, 926_679_040
    assert cfg.num_params() - cfg.replace(num_hidden_layers=60).num_params() == moe_layer
    assert cfg.num_params() - cfg.replace(first_k_dense_replace=4).num_params() == moe_layer - dense_layer
    assert cfg.num_params() - cfg.replace(tie_word_embeddings=True).num_params() == embedding
    assert cfg.num_active_params() - embedding == 36_625_618_432
    assert cfg.num_params(mtp=True) == 671_026_419_200 + 11_610_068_224
    assert cfg.num_params(mtp=True) + 2 * embedding == 684_489_845_504  # the module's copies are on disk too
    assert [layer for layer in range(61) if not cfg.is_moe_layer(layer)] == [0, 1, 2]


def test_the_indexer_of_deepseek_v3_2_has_its_size_in_every_layer_and_in_the_mtp_module():
    cfg = ModelConfig.from_preset("deepseek-v3.2-exp")
    assert cfg.num_params(mtp=True) + 2 * 926_679_040 == 685_355_329_792
    assert cfg.num_params(mtp=True) - cfg.num_params() == 11_610_068_224 + 13_959_424


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("deepseek-r1", SCALE_V3),
        ("deepseek-v3.2-exp", SCALE_V3),
        ("deepseek-v2.5", SCALE_V3),
        ("deepseek-v2", SCALE_V2),
        ("deepseek-v2-lite", SCALE_V2),
        ("deepseek-moe-16b-base", SCALE_128),
        ("deepseek-r1-distill-llama-8b", SCALE_128),
    ],
)
def test_the_softmax_scale_has_yarn_in_it_for_latent_attention_only(name, scale):
    cfg = ModelConfig.from_preset(name)
    assert cfg.softmax_scale == pytest.approx(scale, rel=1e-9)
    assert cfg.replace(rope=RopeConfig()).softmax_scale == cfg.head_dim**-0.5


def test_yarn_mscale_is_that_of_the_papers():
    assert yarn_mscale(40, 1.0) == pytest.approx(1.3688879454, abs=1e-10)
    assert yarn_mscale(40, 0.707) == pytest.approx(1.2608037774, abs=1e-10)
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == 1.0


def test_cache_bytes_follow_the_dtype():
    cfg = ModelConfig.from_preset("deepseek-r1")
    assert (cfg.cache_bytes_per_token(), cfg.cache_bytes_per_token("float32")) == (70_272, 140_544)
    with pytest.raises(ConfigError, match=r"'int3'.*bfloat16"):
        cfg.cache_bytes_per_token("int3")


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("deepsek-r1", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-V3-0324", "deepseek-v3-0324"),
        ("tinyv3", "tiny-v3"),
    ],
)
def test_a_misspelt_preset_suggests_the_nearest(typo, nearest):
    with pytest.raises(ConfigError, match=f"no preset '{typo}'; did you mean {nearest}[ ?]"):
        ModelConfig.from_preset(typo)


def test_a_preset_that_resembles_none_is_refused_without_a_suggestion():
    with pytest.raises(ConfigError, match="no preset 'xyz' "):
        ModelConfig.from_preset("xyz")


# -------------------------------------------------------------------- Hugging Face dialects


def test_the_released_r1_config_reads_as_its_preset():
    assert ModelConfig.from_hf(R1) == ModelConfig.from_preset("deepseek-r1")


def test_transformers_5_spelling_reads_the_same():
    rope = R1["rope_scaling"] | {"rope_type": "yarn", "rope_theta": 10000.0}
    new = {k: v for k, v in R1.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype", "head_dim")}
    new |= {"rope_parameters": rope, "dtype": "bfloat16", "head_dim": 64, "qk_head_dim": 192}
    new["num_mtp_layers"] = new.pop("num_nextn_predict_layers")
    new["num_local_experts"] = new.pop("n_routed_experts")
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(R1)


def test_reading_leaves_the_dict_as_it_was():
    raw = dict(R1, num_nextn_predict_layers=None, num_mtp_layers=1, rope_scaling=dict(R1["rope_scaling"]))
    before = json.dumps(raw)
    ModelConfig.from_hf(raw)
    assert json.dumps(raw) == before


def test_the_dtype_is_read_in_every_spelling():
    for given_dtype in ({"torch_dtype": "float16"}, {"dtype": "float16"}, {"dtype": "torch.float16"}):
        assert ModelConfig.from_hf(LLAMA | given_dtype).dtype == "float16"
    assert ModelConfig.from_hf(LLAMA | {"dtype": None, "torch_dtype": None}).dtype == "bfloat16"


def test_end_tokens_may_be_none_one_or_a_list():
    for eos, stored, ids in ((None, None, ()), (1, 1, (1,)), ([1, 7], (1, 7), (1, 7))):
        cfg = ModelConfig.from_hf(LLAMA | {"eos_token_id": eos})
        assert (cfg.eos_token_id, cfg.eos_ids, cfg.to_hf()["eos_token_id"]) == (stored, ids, eos)
        assert ModelConfig.from_hf(cfg.to_hf()) == cfg


def test_a_field_left_out_takes_the_default_of_its_class():
    plain = ModelConfig.from_hf(LLAMA)
    assert (plain.num_key_value_heads, plain.head_dim, plain.rope) == (4, 64, RopeConfig())
    router = (
        "topk_method",
        "scoring_func",
        "norm_topk_prob",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
    )
    lean = {k: v for k, v in R1.items() if k not in router}
    assert ModelConfig.from_hf(lean) == ModelConfig.from_hf(R1)
    assert ModelConfig.from_hf(lean | {"n_group": None, "topk_group": None}).n_group == 1
    v2 = ModelConfig.from_hf(lean | V2_CLASS)
    assert (v2.topk_method, v2.scoring_func, v2.norm_topk_prob, v2.has_router_bias) == (
        "greedy",
        "softmax",
        False,
        False,
    )


def test_a_head_width_of_its_own_is_kept():
    cfg = ModelConfig.from_hf(LLAMA | {"head_dim": 128, "num_key_value_heads": 2})
    assert (cfg.head_dim, cfg.rope_dim, cfg.softmax_scale) == (128, 128, 128**-0.5)
    assert cfg.num_params() == 2 * (2 * 256 * 512 + 2 * 256 * 256 + 3 * 256 * 768 + 512) + 2 * 512 * 256 + 256


def test_qwen_has_biases_on_queries_keys_and_values_only():
    qwen, llama = (ModelConfig.from_hf(LLAMA | {"model_type": kind}) for kind in ("qwen2", "llama"))
    assert qwen.num_params() - llama.num_params() == 2 * 3 * 256
    assert (qwen.attention_bias, qwen.attention_out_bias) == (True, False)
    biased = llama.replace(attention_bias=True, mlp_bias=True)
    assert biased.num_params() - llama.num_params() == 2 * (4 * 256 + 2 * 768 + 256)
    assert biased.attention_out_bias


def test_the_width_of_a_latent_head_follows_its_parts():
    cfg = ModelConfig.from_preset("tiny-v3").replace(qk_rope_head_dim=32)
    assert (cfg.head_dim, cfg.rope_dim) == (96, 32)


def test_an_absent_query_latent_may_be_null_or_zero():
    for rank in (None, 0):
        assert ModelConfig.from_hf(R1 | {"q_lora_rank": rank}).q_lora_rank is None


def test_layer_types_of_transformers_v3_2_say_which_layers_are_dense():
    raw = ModelConfig.from_preset("deepseek-v3.2-exp").to_hf() | {"num_hidden_layers": 4}
    for dense in range(5):
        types = ["dense"] * dense + ["sparse"] * (4 - dense)
        assert ModelConfig.from_hf(raw | {"mlp_layer_types": types}).first_k_dense_replace == dense
    with pytest.raises(ConfigError, match=r"mlp_layer_types is \['sparse', 'dense'\]; expected dense"):
        ModelConfig.from_hf(raw | {"mlp_layer_types": ["sparse", "dense"]})


def test_the_routers_of_vl2_are_obeyed_under_v2():
    router = {"norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    v2 = ModelConfig.from_hf(ModelConfig.from_preset("tiny-v2").to_hf() | router)
    assert (v2.norm_topk_prob, v2.scoring_func, v2.has_router_bias) == (True, "sigmoid", True)
    assert ModelConfig.from_hf(R1 | {"scoring_func": "softmax"}).scoring_func == "softmax"


def test_the_family_is_told_by_the_classes_where_the_model_type_is_of_another_name():
    kimi = ModelConfig.from_hf(R1 | {"model_type": "kimi_k2"})
    assert kimi == ModelConfig.from_hf(R1)
    assert ModelConfig.from_hf({k: v for k, v in R1.items() if k != "model_type"}) == kimi
    base = ModelConfig.from_hf(LLAMA | {"model_type": None, "architectures": ["Qwen2Model"]})
    assert base.model_type == "qwen2"
    with pytest.raises(ConfigError, match="expected two names of one family"):
        ModelConfig.from_hf(LLAMA | {"architectures": ["Qwen2ForCausalLM"]})
    with pytest.raises(
        ConfigError, match=r"DeepseekV4ForCausalLM.* is a release of DeepSeek that jaxseek does"
    ):
        ModelConfig.from_hf(LLAMA | {"model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"]})


OCR = {  # as of DeepSeek-OCR, whose language model has no model_type
    "architectures": ["DeepseekV2ForCausalLM"],
    "first_k_dense_replace": 1,
    "hidden_size": 1280,
    "intermediate_size": 6848,
    "kv_lora_rank": None,
    "lm_head": True,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 896,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 10,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 12,
    "num_key_value_heads": 10,
    "q_lora_rank": None,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0,
    "rm_head": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "use_mla": False,
    "v_head_dim": 0,
    "vocab_size": 129280,
}


def test_the_language_model_of_a_model_of_images_is_read_from_inside():
    whole = {"model_type": "deepseek_vl_v2", "torch_dtype": "float16", "vision_config": {"width": 8}}
    ocr = ModelConfig.from_hf(whole | {"language_config": OCR})
    assert (ocr.model_type, ocr.head_dim, ocr.n_routed_experts, ocr.dtype) == ("deepseek", 128, 64, "float16")
    assert ModelConfig.from_hf(ocr.to_hf()) == ocr
    vl = ModelConfig.from_hf({"model_type": "deepseek_vl", "text_config": LLAMA, "image_token_id": 3})
    assert vl == ModelConfig.from_hf(LLAMA)
    kimi = {"model_type": "kimi_vl", "text_config": R1, "media_placeholder_token_id": 3}
    assert ModelConfig.from_hf(kimi) == ModelConfig.from_hf(R1)


def test_a_key_that_is_unknown_is_named_and_one_that_changes_nothing_is_not(caplog):
    harmless = {"_name_or_path": "x", "pretraining_tp": 2, "attention_dropout": 0.1, "head_dim": 64}
    harmless |= {"logits_scaling": 1.0, "hidden_act": "swish", "clip_qkv": None, "num_experts": 0}
    assert ModelConfig.from_hf(R1 | harmless) == ModelConfig.from_hf(R1)
    assert not caplog.text
    ModelConfig.from_hf(R1 | {"new_trick": 3})
    assert "config: keys that jaxseek does not know, and passes over: 'new_trick'" in caplog.text


def test_a_window_of_no_layer_or_of_the_whole_context_is_none():
    window = {"model_type": "qwen3", "head_dim": 64, "use_sliding_window": True, "sliding_window": 64}
    plain = ModelConfig.from_hf(LLAMA | {"model_type": "qwen3", "head_dim": 64})
    for none in (
        {"max_window_layers": 2},
        {},  # Qwen3's default is the 28th layer
        {"max_window_layers": 0, "sliding_window": 2048},
        {"max_window_layers": 0, "sliding_window": None},
        {"max_window_layers": 0, "use_sliding_window": False},
        {"max_window_layers": 0, "layer_types": ["full_attention"] * 2},
    ):
        assert ModelConfig.from_hf(LLAMA | window | none) == plain
    for some in ({"max_window_layers": 1}, {"layer_types": ["full_attention", "sliding_attention"]}):
        with pytest.raises(ConfigError, match="sliding_window 64 is below max_position_embeddings 2048"):
            ModelConfig.from_hf(LLAMA | window | some)


@pytest.mark.parametrize("hint", ["auto", "float8_e4m3fn", "int8", 8, ["float32"], {"": "float32"}])
def test_a_dtype_that_cannot_be_read_is_a_hint_alone(hint, caplog):
    assert ModelConfig.from_hf(LLAMA | {"torch_dtype": hint}).dtype == "bfloat16"
    assert f"dtype is {hint!r}, expected bfloat16, float16, float32; read as bfloat16" in caplog.text
    assert ModelConfig.from_hf(LLAMA | {"torch_dtype": "half"}).dtype == "float16"


def test_the_temperature_of_r1_0528_qwen3_is_obeyed():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    cfg = ModelConfig.from_hf(LLAMA | {"rope_scaling": rope | {"attn_factor": 0.8782488562869419}})
    assert cfg.rope.attention_factor == 1.0
    assert ModelConfig.from_hf(cfg.to_hf()) == cfg
    with pytest.raises(ConfigError, match="attn_factor is 'x' and factor"):
        ModelConfig.from_hf(LLAMA | {"rope_scaling": rope | {"attn_factor": "x"}})


def test_keys_without_a_part_in_the_model_are_kept_apart():
    known = {"auto_map": R1["auto_map"], "ep_size": 1, "attention_dropout": 0.0, "pretraining_tp": 1}
    known |= {"transformers_version": "4.46.3", "use_cache": True}
    assert hf.kept(R1) == known
    assert hf.kept(R1 | {"model_type": "kimi_k2"}) == known | {"model_type": "kimi_k2"}
    inside = hf.kept({"model_type": "x", "language_config": R1 | {"new_trick": 3}})
    assert inside == {k: v for k, v in known.items() if k != "auto_map"} | {"new_trick": 3}
    for raw in (R1, LLAMA, ModelConfig.from_preset("tiny-v3").to_hf()):
        cfg = ModelConfig.from_hf(raw)
        assert ModelConfig.from_hf(cfg.to_hf() | hf.kept(raw)) == cfg


def test_integers_become_floats_because_transformers_refuses_them():
    cfg = ModelConfig.from_hf(R1 | {"routed_scaling_factor": 2})
    out = cfg.to_hf()
    assert isinstance(out["routed_scaling_factor"], float)
    assert isinstance(out["rope_theta"], float)
    assert isinstance(out["rope_scaling"]["factor"], float)


def test_a_dense_latent_model_does_not_become_a_mixture_of_experts_in_its_config():
    cfg = ModelConfig.from_hf({k: v for k, v in R1.items() if "expert" not in k})
    out = cfg.to_hf()
    assert (out["n_routed_experts"], out["first_k_dense_replace"]) == (0, 61)
    assert ModelConfig.from_hf(out) == cfg
    assert not any(cfg.is_moe_layer(layer) for layer in range(61))


def test_rope_parameters_that_a_type_does_not_use_are_dropped():
    for rope in (
        {"type": "default", "factor": 8.0},
        {"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0},
    ):
        cfg = ModelConfig.from_hf(LLAMA | {"rope_scaling": rope, "rope_theta": 500000})
        assert cfg.rope.rope_theta == 500000.0
        assert ModelConfig.from_hf(cfg.to_hf()) == cfg


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_the_original_length_defaults_to_the_length(kind):
    rope = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert ModelConfig.from_hf(LLAMA | {"rope_scaling": rope}).rope.original_max_position_embeddings == 2048


# -------------------------------------------------------------------- input that cannot be used

BAD = [
    ({"model_type": "mistral"}, r"model_type is 'mistral'; jaxseek knows deepseek, .*llama"),
    ({"model_type": None}, "model_type is None; jaxseek knows"),
    ({"hidden_size": 250}, "hidden_size 250 is not divisible by num_attention_heads 4"),
    ({"hidden_size": "256"}, "hidden_size is '256', expected int"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0, expected above 0"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
    ({"num_attention_heads": 256}, "head_dim 1 is odd"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; every DeepSeek model uses 'silu'"),
    ({"use_sliding_window": True, "sliding_window": 64}, "no DeepSeek model uses a sliding window"),
    ({"layer_types": ["linear_attention"]}, "'linear_attention'; every DeepSeek model uses 'full_attention'"),
    ({"norm_type": "layernorm"}, "norm_type is 'layernorm'; every DeepSeek model uses 'rmsnorm'"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; every DeepSeek model uses 0.0"),
    ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256; no DeepSeek model has it"),
    ({"norm_eps": 1e-5}, "norm_eps is 1e-05; no DeepSeek model has it"),
    ({"qkv_bias": True}, "qkv_bias is True; jaxseek reads attention_bias in its place"),
    ({"use_qk_norm": True}, "use_qk_norm is True; every DeepSeek model uses False"),
    ({"num_local_experts": 8}, "n_routed_experts is 8, but 'llama' models have none"),
    ({"kv_lora_rank": 512}, "kv_lora_rank is 512, but 'llama' models have none"),
    ({"rope_interleave": True}, "rope_interleave must be False, as 'llama' has it"),
    ({"rms_norm_eps": 0}, r"rms_norm_eps is 0\.0, expected above 0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected bool"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True, expected int"),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; every DeepSeek model"),
    ({"rope_scaling": {"type": "dynamic"}}, "rope_type is 'dynamic'; jaxseek knows default, linear, yarn"),
    ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs factor"),
    ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64}}, "'yarn' needs factor"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "needs factor, low_freq_factor, high_freq_factor"),
    ({"rope_scaling": {"full_attention": {"rope_theta": 1e6}}}, "expected one flat table for all layers"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2', expected float"),
    ({"rope_scaling": {"type": "linear", "factor": -2}}, r"factor -2\.0 must be above 0"),
]
BAD_R1 = [
    ({"n_group": 7}, "n_routed_experts 256 is not divisible by n_group 7"),
    ({"topk_group": 9}, "topk_group 9 is above n_group 8"),
    ({"topk_group": 1, "num_experts_per_tok": 40}, "= 32 is below num_experts_per_tok 40"),
    ({"num_experts_per_tok": 300}, "num_experts_per_tok 300 is above n_routed_experts 256"),
    ({"n_group": 256}, "noaux_tc needs 2 experts in a group; 256 in n_group 256 leave 1"),
    ({"topk_method": "best"}, "topk_method is 'best', expected greedy, group_limited_greedy, noaux_tc"),
    ({"scoring_func": "relu"}, "scoring_func is 'relu', expected softmax, sigmoid"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim 63 is odd"),
    ({"index_topk": 64}, "index_topk is 64, but 'deepseek_v3' models have none"),
    ({"use_mla": False}, "use_mla is False; every DeepSeek model uses True"),
    ({"kv_lora_rank": 0}, "kv_lora_rank is 0, expected above 0"),
    ({"n_shared_experts": -1}, "n_shared_experts is -1, expected 0 or more"),
    (
        V2_CLASS | {"num_attention_heads": 120, "num_key_value_heads": 120},
        "7168 is not .* 120",
    ),
    (
        V32_CLASS | {"index_n_heads": 4, "index_head_dim": 32, "index_topk": 8},
        "32 is below .* 64",
    ),
]


@pytest.mark.parametrize(
    ("base", "change", "message"), [(LLAMA, *b) for b in BAD] + [(R1, *b) for b in BAD_R1]
)
def test_a_value_that_cannot_be_used_is_named_with_what_was_expected(base, change, message):
    with pytest.raises(ConfigError, match=f"^config: .*{message}"):
        ModelConfig.from_hf(base | change)


def test_the_same_head_count_is_fine_where_the_class_does_not_divide():
    heads = {"num_attention_heads": 120, "num_key_value_heads": 120}
    assert ModelConfig.from_hf(R1 | heads).head_dim == 192


def test_missing_fields_are_all_named_at_once():
    keys = ("hidden_size", "kv_lora_rank", "v_head_dim", "moe_intermediate_size")
    with pytest.raises(
        ConfigError, match=r"missing field\(s\) " + ", ".join(keys) + " for model_type 'deepseek_v3'"
    ):
        ModelConfig.from_hf({k: v for k, v in R1.items() if k not in keys})
    with pytest.raises(ConfigError, match="index_n_heads, index_head_dim, index_topk"):
        ModelConfig.from_hf(R1 | V32_CLASS)


def test_all_problems_of_a_config_are_told_together():
    with pytest.raises(ConfigError, match=r"qk_rope_head_dim 63 is odd; .*by n_group 7"):
        ModelConfig.from_hf(R1 | {"n_group": 7, "qk_rope_head_dim": 63})


def test_latent_attention_has_no_key_value_heads_and_reads_past_them():
    # transformers' class default is V3's 128, whatever the number of heads
    assert ModelConfig.from_hf(R1 | {"num_key_value_heads": 8}) == ModelConfig.from_hf(R1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(R1)[:300], "not valid JSON .*is the file whole"),
        ("", "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        (b"\xff\xfe\x00", "not valid JSON"),
    ],
)
def test_a_broken_file_is_named_with_its_cause(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=f"config.json: .*{message}"):
        ModelConfig.from_hf(path)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ConfigError, match=r"config\.json: no such file; expected a Hugging Face config"):
            ModelConfig.from_hf(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tiny-llm", {"model_type": "gpt"}, "model_type is 'gpt'; jaxseek knows llama"),
        ("tiny-llm", {"kv_lora_rank": 64}, "kv_lora_rank is 64, but 'llama' models have none"),
        ("tiny-llm", {"n_routed_experts": 4}, "n_routed_experts is 4, but 'llama' models have none"),
        ("tiny-v3", {"index_topk": 64}, "index_topk is 64, but 'deepseek_v3' models have none"),
        ("tiny-moe", {"head_dim": 32}, "head_dim 32 x num_attention_heads 4 is not hidden_size 256"),
        ("tiny-v3", {"q_lora_rank": 0}, "q_lora_rank is 0"),
        ("tiny-v3", {"eos_token_id": [1]}, r"eos_token_id is \[1\], expected int or tuple or NoneType"),
    ],
)
def test_a_changed_config_is_validated_again(name, change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_preset(name).replace(**change)


def test_a_rotary_embedding_that_cannot_be_computed_is_refused():
    with pytest.raises(ConfigError, match="rope_type 'yarn' has original_max_position_embeddings 0"):
        RopeConfig("yarn", factor=4.0)
    with pytest.raises(ConfigError, match=r"low_freq_factor 4\.0 is not between 0 and high_freq_factor 4\.0"):
        RopeConfig("llama3", original_max_position_embeddings=8, low_freq_factor=4.0)


# -------------------------------------------------------------------- properties


@st.composite
def configs(draw):
    """A random valid ModelConfig of any family."""
    size = st.integers(1, 64)
    flag = st.booleans()
    ids = st.none() | st.integers(0, 99)
    kind = draw(
        st.sampled_from(["llama", "qwen2", "qwen3", "deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32"])
    )
    latent, kv_heads, groups = "_v" in kind, draw(st.integers(1, 4)), draw(st.integers(1, 4))
    heads = kv_heads if latent else kv_heads * draw(st.integers(1, 4))
    fields = {
        "model_type": kind,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * 2 * draw(size),
        "rope": draw(ropes()),
        "eos_token_id": draw(ids | st.lists(st.integers(0, 99)).map(tuple)),
        "dtype": draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        "attention_bias": draw(flag),
        "mlp_bias": kind in ("llama", "deepseek_v2") and draw(flag),
        "tie_word_embeddings": draw(flag),
        "rms_norm_eps": draw(st.floats(1e-8, 1e-3)),
    }
    for name in ("vocab_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
        fields[name] = draw(size)
    for name in ("bos_token_id", "pad_token_id"):
        fields[name] = draw(ids)
    if kind in ("llama", "qwen2", "qwen3"):
        fields["head_dim"] = 2 * draw(st.integers(0, 32))
    if latent:
        fields |= {k: draw(size) for k in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim")}
        fields |= {"qk_rope_head_dim": 2 * draw(size), "q_lora_rank": draw(size | st.none())}
        fields["rope_interleave"] = kind != "deepseek_v3" or draw(flag)
        fields["num_nextn_predict_layers"] = draw(st.integers(0, 2))
    if kind == "deepseek_v32":
        fields |= {"q_lora_rank": draw(size), "index_n_heads": draw(size), "index_topk": draw(size)}
        fields["index_head_dim"] = fields["qk_rope_head_dim"] + draw(size)
    if "deepseek" in kind and draw(flag):
        per_group, kept = draw(st.integers(2, 8)), draw(st.integers(1, groups))
        fields |= {
            "n_routed_experts": groups * per_group,
            "n_group": groups,
            "topk_group": kept,
            "num_experts_per_tok": draw(st.integers(1, kept * per_group)),
            "n_shared_experts": draw(st.integers(0, 2)),
            "moe_intermediate_size": draw(size),
            "first_k_dense_replace": draw(st.integers(0, 4)),
            "moe_layer_freq": draw(st.integers(1, 3)),
            "scoring_func": draw(st.sampled_from(["softmax", "sigmoid"])),
            "topk_method": draw(st.sampled_from(["greedy", "group_limited_greedy", "noaux_tc"])),
            "norm_topk_prob": draw(flag),
            "routed_scaling_factor": draw(st.floats(0.1, 20)),
            "aux_loss_alpha": draw(st.floats(0, 1)),
            "seq_aux": draw(flag),
        }
    return ModelConfig(**fields)


@st.composite
def ropes(draw):
    kind, number, length = (
        draw(st.sampled_from(["default", "linear", "yarn", "llama3"])),
        st.floats(0.1, 9),
        4096,
    )
    fields = {"rope_type": kind, "rope_theta": draw(st.floats(1.5, 1e7))}
    if kind != "default":
        fields["factor"] = draw(st.floats(1, 64))
    if kind in ("yarn", "llama3"):
        fields["original_max_position_embeddings"] = draw(st.integers(1, length))
    if kind == "yarn":
        fields |= {k: draw(number | st.none()) for k in ("mscale", "mscale_all_dim", "attention_factor")}
        fields |= {"beta_fast": draw(number), "beta_slow": draw(number), "truncate": draw(st.booleans())}
    if kind == "llama3":
        fields |= {"low_freq_factor": draw(number), "high_freq_factor": draw(st.floats(10, 20))}
    return RopeConfig(**fields)


@settings(max_examples=150, deadline=None, database=None)
@given(configs())
def test_any_valid_config_round_trips_through_json(cfg):
    assert ModelConfig.from_hf(json.loads(json.dumps(cfg.to_hf()))) == cfg
    assert 0 < cfg.num_active_params() <= cfg.num_params() <= cfg.num_params(mtp=True)
    assert hash(cfg) == hash(ModelConfig.from_hf(cfg.to_hf()))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 999) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None, database=None)
@given(st.sampled_from(["tiny-v3", "tiny-moe", "tiny-llm"]), st.data())
def test_a_corrupted_field_is_a_config_error_or_a_valid_config(name, data):
    raw = ModelConfig.from_preset(name).to_hf()
    where = raw
    if isinstance(raw["rope_scaling"], dict) and data.draw(st.booleans()):
        where = raw["rope_scaling"]
    where[data.draw(st.sampled_from(sorted(where)))] = data.draw(JSON)
    try:
        cfg = ModelConfig.from_hf(raw)
    except ConfigError:
        return
    assert cfg.num_params() > 0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tiny-v3", {"n_routed_experts": 10**9}, "n_routed_experts is 1000000000, expected at most 65,536"),
        ("tiny-v3", {"n_routed_experts": 65536, "num_hidden_layers": 1000}, "are more than 131,072 experts"),
        ("tiny-v3", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most 1,024"),
        ("tiny-v3", {"num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers is .* at most 64"),
        ("tiny-llm", {"vocab_size": 10**30}, "vocab_size is 1000.*, expected at most"),
        ("tiny-llm", {"hidden_size": 2**40}, "hidden_size is"),
        ("tiny-llm", {"num_attention_heads": 2**30}, "num_attention_heads is"),
        ("tiny-llm", {"max_position_embeddings": 2**40}, "max_position_embeddings is"),
        ("tiny-llm", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ("tiny-llm", {"rms_norm_eps": 1e30}, "rms_norm_eps is 1e.30"),
        ("tiny-llm", {"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ("tiny-llm", {"rope_theta": float("inf")}, "rope_theta is inf"),
        ("tiny-llm", {"rope_theta": 10**400}, "rope_theta is 1000"),
        ("tiny-llm", {"rope_scaling": {"type": "linear", "factor": 1e300}}, "factor is 1e.300"),
        ("tiny-llm", {"eos_token_id": [1, "x"]}, r"eos_token_id is .* expected whole numbers"),
        ("tiny-llm", {"eos_token_id": [2**40]}, "eos_token_id is"),
    ],
)
def test_counts_and_numbers_without_measure_are_refused_before_anything_is_counted(name, change, message):
    raw = ModelConfig.from_preset(name).to_hf() | change
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(raw)


RUN = {"objective": "grpo", "model": "tiny-r1", "out": "x", "steps": 1, "rewards": [{"kind": "exact"}]}
RUN |= {"data": {"train": ["a.jsonl"]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grpo": datetime.date(1979, 5, 27)}, r"grpo is datetime.date\(1979, 5, 27\), expected a table"),
        ({"grpo": 5}, "grpo is 5, expected a table"),
        ({"grpo": {"preset": [1]}}, r"grpo.preset is \[1\], expected one of 'r1_zero'"),
        ({"grpo": {"preset": {}}}, r"grpo.preset is {}, expected one of"),
        ({"grpo": {"group_size": 10**9}}, "answers a step"),
        ({"rollout": {"temperature": float("nan")}}, "rollout.temperature is nan"),
        ({"optimizer": {"learning_rate": float("inf")}}, "optimizer.learning_rate is inf"),
        ({"optimizer": {"b1": [0.9]}}, r"optimizer.b1 is \[0.9\], expected float"),
        ({"task": {"held_out": 10**9}}, "task.held_out is 1000000000, expected at most"),
        ({"task": {"terms": 10**9}}, "task.terms is 1000000000, expected at most"),
        ({"batch": {"size": 2**31}}, "batch.size is 2147483648"),
        ({"lora": {"rank": 10**6}}, "lora.rank is 1000000, expected at most"),
        ({"seed": -1}, "seed is -1"),
        ({"loss": {"mtp": [[0, "x"]]}}, "loss.mtp is"),
        ({"rewards": [{"kind": "exact", "seconds": float("inf")}]}, "rewards.*seconds is inf"),
        ({"rewards": [5]}, "rewards is 5, expected a table"),
        ({"data": {"columns": {"text": 5}}}, "data.columns.text is 5, expected str"),
    ],
)
def test_values_of_a_run_file_are_told_by_key_at_any_depth(change, message):
    RunConfig.from_dict(RUN)
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(RUN | change)
