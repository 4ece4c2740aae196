"""The forms of a decode step, against a float64 model written by hand."""

import numpy as np
import pytest
from decoding import decode
from oracles import assert_close, forward, random_tokens, tiny_config, tiny_model, tiny_weights

from jaxseek.config.model import ConfigError
from jaxseek.decode import cpu, forms
from jaxseek.sharding.parameters import parameters

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 3


@pytest.mark.parametrize("form", ["plain", "cpu"])
@pytest.mark.parametrize("name", ["llama with biases", "qwen2", "qwen3", "v1", "v2", "v3", "v3.2"])
def test_each_form_gives_the_logits_of_the_formula(name, form):
    model, prompts = tiny_model(name), [list(row[:n]) for row, n in zip(random_tokens(3, 6), (6, 1, 4))]
    tokens, logits = decode(model, form, prompts, STEPS)
    for prompt, made, got in zip(prompts, tokens, logits):
        expected, *_ = forward(model.cfg, tiny_weights(name), np.array([*prompt, *made[:-1]]))
        assert_close(got, expected[len(prompt) - 1 :], 2e-5)


@pytest.mark.parametrize("name", ["qwen2", "v1, every second layer", "v3"])
def test_the_unrolled_model_equals_the_stacked_one(name):
    model, tokens_BT = tiny_model(name), random_tokens(2, 8)
    with model.on_mesh():
        unrolled = cpu.unroll(model, False)
    assert len(unrolled.stacks) == model.cfg.num_hidden_layers
    assert unrolled.embed_VD.get_value() is model.embed_VD.get_value()
    assert_close(unrolled(tokens_BT), model(tokens_BT), 2e-6)


def test_the_cpu_form_keeps_no_matrix_twice():
    model = tiny_model("v3")
    prepared = cpu.prepare(model)
    size = sum(p.get_value().size for p in parameters(model).values())
    assert sum(p.get_value().size for p in parameters(prepared).values()) == size


def test_a_form_is_chosen_by_name_and_says_why_not():
    model = tiny_model("v3")
    assert forms.choose("auto", model).__name__ == "jaxseek.decode.cpu"
    assert forms.choose("plain", model).__name__ == "jaxseek.decode.plain"
    with pytest.raises(ConfigError, match="form tpu does not apply: it is for TPUs, and the model is on cpu"):
        forms.choose("tpu", model)
    with pytest.raises(ConfigError, match="'gpu', expected auto or one of tpu, cpu, plain"):
        forms.choose("gpu", model)
    assert tiny_config("v3") == model.cfg
