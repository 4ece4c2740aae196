"""Logits, chosen experts and greedy tokens equal transformers' on random configs of every family it has.

Needs the extra `parity`. Weights are written by transformers' own save_pretrained and read by `jaxseek.load`.
"""

import numpy as np
import pytest

import jaxseek
from jaxseek.engine.engine import Engine
from jaxseek.engine.sampling import Sampling

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

FAMILIES = ("llama", "qwen2", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "deepseek_v32", "qwen3")
CASES = [(family, seed) for family in FAMILIES for seed in range(4)]


def random_config(family: str, seed: int):
    """A transformers config in which every field of the family varies over the seeds."""
    import transformers as tf

    rng = np.random.default_rng([seed, FAMILIES.index(family)])

    def pick(*options):
        return options[int(rng.integers(len(options)))]

    heads = pick(2, 4, 8)
    common = {
        "vocab_size": pick(97, 128, 200),
        "num_hidden_layers": pick(2, 3, 4),
        "num_attention_heads": heads,
        "max_position_embeddings": 256,
        "rms_norm_eps": pick(1e-6, 1e-5),
        "tie_word_embeddings": pick(True, False),
        "initializer_range": pick(0.1, 0.2),
        "intermediate_size": pick(48, 96),
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    rope = {"rope_type": "default", "rope_theta": pick(1e4, 5e5)}
    if family in ("llama", "qwen2", "qwen3"):
        if family == "llama" and seed % 2:
            rope |= {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": pick(16, 32),
            }
        common |= {
            "hidden_size": heads * pick(16, 24),
            "num_key_value_heads": pick(*(k for k in (1, 2, 4, 8) if heads % k == 0)),
            "rope_parameters": rope,
        }
        if family == "qwen2":
            return tf.Qwen2Config(**common, use_sliding_window=False)
        if family == "qwen3":
            return tf.Qwen3Config(**common, attention_bias=pick(True, False), head_dim=pick(16, 32))
        return tf.LlamaConfig(
            **common, attention_bias=pick(True, False), mlp_bias=pick(True, False), head_dim=pick(16, 32)
        )
    if seed != 1:
        rope |= {
            "rope_type": "yarn",
            "factor": pick(4.0, 40.0),
            "original_max_position_embeddings": pick(16, 64),
            "beta_fast": pick(16, 32),
            "beta_slow": 1,
            "mscale": (mscale := pick(0.707, 1.0)),
            "mscale_all_dim": pick(mscale, 0.5),
        }
    groups = pick(1, 2, 4)
    kept = pick(*range(1, groups + 1))
    per_group = pick(4, 6)
    common |= {
        "hidden_size": heads * pick(12, 16),
        "q_lora_rank": pick(24, 32),
        "kv_lora_rank": pick(16, 32),
        "num_key_value_heads": heads,
        "qk_nope_head_dim": pick(16, 24),
        "qk_rope_head_dim": pick(8, 16),
        "v_head_dim": pick(16, 20),
        "n_routed_experts": groups * per_group,
        "n_shared_experts": pick(1, 2),
        "num_experts_per_tok": pick(*(k for k in (2, 3, 4) if k <= kept * per_group)),
        "moe_intermediate_size": pick(16, 32),
        "first_k_dense_replace": pick(0, 1, 2),
        "n_group": groups,
        "topk_group": kept,
        "routed_scaling_factor": pick(1.0, 2.5, 16.0),
        "attention_bias": pick(True, False),
        "rope_parameters": rope,
    }
    if family.startswith("deepseek_v2"):
        if family == "deepseek_v2_lite":
            common |= {"q_lora_rank": None}
        return tf.DeepseekV2Config(
            **common,
            topk_method="group_limited_greedy" if groups > 1 else "greedy",
            mlp_bias=pick(True, False),
        )
    common |= {"norm_topk_prob": pick(True, False)}
    if family == "deepseek_v32":
        first = common.pop("first_k_dense_replace")
        sparse = ["dense"] * min(first, common["num_hidden_layers"])
        common["mlp_layer_types"] = sparse + ["sparse"] * (common["num_hidden_layers"] - len(sparse))
        # enough heads that no two keys tie at a score of zero: of those, either may be kept
        return tf.DeepseekV32Config(
            **common,
            index_n_heads=pick(16, 32),
            index_head_dim=common["qk_rope_head_dim"] + 16,
            index_topk=pick(6, 12),
        )
    return tf.DeepseekV3Config(**common)


def reference_model(config, folder, seed):
    """A random transformers model, its router biases away from zero, saved to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(
                    torch.randn_like(tensor)
                )  # negative biased scores: masking with zero would differ
            elif name.endswith("bias"):
                tensor.copy_(0.1 * torch.randn_like(tensor))
            elif "norm" in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif name.endswith("gate.weight"):
                tensor.copy_(0.3 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return model


def reference_experts(model, tokens):
    """Logits and, per sparse layer, the sorted chosen experts [B, T, K], by hooks on the routers."""
    import torch

    found = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: found.append(out[2]))
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.numpy()
    for hook in hooks:
        hook.remove()
    return logits, [np.sort(ids.reshape(*tokens.shape, -1).numpy(), axis=-1) for ids in found]


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_logits_experts_and_greedy_tokens_equal_those_of_transformers(family, seed, tmp_path):
    import torch

    config = random_config(family, seed)
    reference = reference_model(config, tmp_path, seed)
    tokens = np.random.default_rng(seed).integers(2, config.vocab_size, (3, 24))
    expected, experts = reference_experts(reference, tokens)

    model, tokenizer = jaxseek.load(tmp_path)
    assert tokenizer is None
    logits = np.asarray(model(tokens))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    if experts:
        ours = np.sort(np.asarray(model.expert_ids(tokens)), axis=-1)
        np.testing.assert_array_equal(ours, np.stack(experts))

    prompts = [tokens[0, :17].tolist(), tokens[1, :9].tolist()]
    completions = Engine(model).generate(prompts, Sampling(max_new_tokens=32, temperature=0))
    reference.generation_config.eos_token_id = None
    for prompt, completion in zip(prompts, completions):
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids,
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=False,
            pad_token_id=0,
            attention_mask=torch.ones_like(ids),
        )
        assert completion.tokens == out[0, len(prompt) :].tolist()
