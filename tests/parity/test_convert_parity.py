"""Checkpoints that transformers saves, and those that it loads: the same tensors and logits both ways."""

import json
import logging
import warnings

import numpy as np
import pytest

from jaxseek.checkpoint import models
from jaxseek.model.deepseek import DeepSeek
from jaxseek_convert import convert, load_hf, save_hf
from jaxseek_convert.safetensors_io import read_safetensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SPARSE = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
V2 = COMMON | SPARSE | {"topk_method": "group_limited_greedy"}
MODELS = {
    "llama": ("Llama", COMMON | {"num_key_value_heads": 2}),
    "llama with biases": ("Llama", COMMON | {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("Llama", COMMON | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", COMMON | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", COMMON | {"num_key_value_heads": 2, "head_dim": 8}),
    "deepseek_v2": ("DeepseekV2", V2),
    "deepseek_v2 without q_lora": ("DeepseekV2", V2 | {"q_lora_rank": None, "mlp_bias": True}),
    "deepseek_v3": ("DeepseekV3", COMMON | SPARSE),
    "deepseek_v3 with biases": ("DeepseekV3", COMMON | SPARSE | {"attention_bias": True}),
    # with few index heads many scores are exactly 0, and torch breaks such ties its own way
    "deepseek_v32": (
        "DeepseekV32",
        COMMON | SPARSE | {"index_n_heads": 16, "index_head_dim": 8, "index_topk": 6},
    ),
}
every_model = pytest.mark.parametrize(("family", "raw"), MODELS.values(), ids=MODELS.keys())
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 17)).astype(np.int32)


def reference(family, raw):
    """A random model of transformers; vectors too, which would all be ones or zeros."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**raw, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim == 1 and "inv_freq" not in name:
                tensor.add_(0.3 * torch.randn_like(tensor))
    return model


def logits_of(model):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.float().numpy()


def assert_close(ours, theirs):
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-4 * np.abs(theirs).max()


def read_back(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", attn_implementation="eager", output_loading_info=True
        )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model.eval(), info["unexpected_keys"]


@every_model
def test_what_transformers_saves_gives_its_logits_and_returns_to_it(family, raw, tmp_path, caplog):
    theirs = reference(family, raw)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits_of(theirs)
    with caplog.at_level(logging.ERROR):
        ours = load_hf(tmp_path / "theirs")
    assert_close(ours(TOKENS), expected)

    save_hf(ours, tmp_path / "back")
    again, unexpected = read_back(tmp_path / "back")
    assert not unexpected
    np.testing.assert_array_equal(logits_of(again), expected)
    disk, back = read_safetensors(tmp_path / "theirs"), read_safetensors(tmp_path / "back")
    assert disk.keys() == back.keys()
    assert all(models.same_bits(disk[n], back[n]) for n in disk)


@pytest.mark.parametrize("name", ["qwen2", "deepseek_v2", "deepseek_v3", "deepseek_v32"])
def test_a_bfloat16_checkpoint_returns_as_it_was(name, tmp_path):
    family, raw = MODELS[name]
    theirs = reference(family, raw).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", progress=False)
    convert(tmp_path / "ours", tmp_path / "back", to="hf", progress=False)
    disk, back = read_safetensors(tmp_path / "theirs"), read_safetensors(tmp_path / "back")
    assert disk.keys() == back.keys()
    assert all(models.same_bits(disk[n], back[n]) for n in disk)
    again, _ = read_back(tmp_path / "back")
    assert again.dtype == torch.bfloat16
    np.testing.assert_array_equal(logits_of(again), logits_of(read_back(tmp_path / "theirs")[0]))


# transformers 5.23 takes the block's size from that of the scales, so edge blocks (as those of the released
# 576-row projection) come out wrong there: these weights have none, or one block alone.
WHOLE_BLOCKS = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "head_dim": 64,
    "qk_rope_head_dim": 64, "v_head_dim": 64,
}  # fmt: skip


@pytest.mark.parametrize("sizes", [{}, WHOLE_BLOCKS], ids=["one block", "whole blocks"])
def test_transformers_reads_the_fp8_that_is_written_for_it(sizes, tmp_path):
    family, raw = MODELS["deepseek_v3"]
    reference(family, raw | sizes).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", dtype="float8", progress=False)
    convert(tmp_path / "ours", tmp_path / "eight", to="hf", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "eight",
            dtype=torch.bfloat16,
            attn_implementation="eager",
            output_loading_info=True,
            quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
        )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    convert(tmp_path / "eight", tmp_path / "bf16", to="hf", dtype="bfloat16", progress=False)
    assert_close(load_hf(tmp_path / "bf16", dtype="float32")(TOKENS), logits_of(again.float().eval()))


def test_transformers_loads_the_main_model_of_one_with_a_multi_token_module(tmp_path):
    theirs = reference("DeepseekV3", COMMON | SPARSE | {"num_nextn_predict_layers": 0})
    theirs.save_pretrained(tmp_path / "theirs")
    main = load_hf(tmp_path / "theirs")
    cfg = main.cfg.replace(num_nextn_predict_layers=1)
    both = DeepSeek.init(cfg)
    for path, param in models.parameters(main).items():
        models.parameters(both)[path].set_value(param.get_value())
    save_hf(both, tmp_path / "both")
    assert json.loads((tmp_path / "both" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    again, unexpected = read_back(tmp_path / "both")
    assert all(name.startswith("model.layers.3.") for name in unexpected)
    np.testing.assert_array_equal(logits_of(again), logits_of(theirs))


def test_the_fused_tensors_that_transformers_holds_in_memory_are_read(tmp_path):
    theirs = reference("DeepseekV3", COMMON | SPARSE)
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in read_safetensors(tmp_path / "theirs")
    assert_close(load_hf(tmp_path / "theirs")(TOKENS), logits_of(theirs))
