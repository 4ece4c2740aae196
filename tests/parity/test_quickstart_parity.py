"""What the quickstart exports answers in transformers as it does here.

Needs the extra `parity`.
"""

import pytest

import jaxseek
from jaxseek.engine.generate import engine_for
from jaxseek.engine.sampling import Sampling
from jaxseek.recipes.quickstart import quickstart
from jaxseek.rl.arithmetic import demonstrations

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


def test_greedy_answers_to_20_problems_are_those_of_transformers(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = quickstart(tmp_path, minutes=0.5)
    model, tokenizer = jaxseek.load(result.checkpoint)
    reference = AutoModelForCausalLM.from_pretrained(result.hf, dtype=torch.float32).eval()
    theirs = AutoTokenizer.from_pretrained(result.hf)
    prompts = [record["prompt"] for record in demonstrations(20, seed=7)]
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    assert [theirs(prompt)["input_ids"] for prompt in prompts] == encoded
    ours = engine_for(model).generate(encoded, Sampling(20, 0.0, stop_ids=tokenizer.eos_ids))
    for prompt, completion in zip(encoded, ours):
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids,
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=theirs.pad_token_id,
            attention_mask=torch.ones_like(ids),
        )
        assert completion.tokens == out[0, len(prompt) :].tolist()
        text = tokenizer.decode(completion.tokens, False)
        assert theirs.decode(completion.tokens) == text
