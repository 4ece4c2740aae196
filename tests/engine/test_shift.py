"""Penalties, biases, likeliest tokens and a prompt's own log-probabilities, against whole forward passes."""

import numpy as np
import pytest
from oracles import random_tokens, tiny_model

from jaxseek.engine.engine import Engine
from jaxseek.engine.request import PROMPT, TOPS, Request
from jaxseek.engine.sampling import Sampling

pytestmark = pytest.mark.usefixtures("quick_compilation")


def logprobs(model, tokens):
    logits = np.asarray(model([tokens])[0], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def greedy(model, prompt, new, bias=(), presence=0.0, frequency=0.0, repetition=1.0):
    """Tokens by the formulas, one whole forward pass for each."""
    tokens, length = list(prompt), len(prompt) + new
    for _ in range(new):  # tokens that come later change nothing, so that one shape serves all
        logits = np.asarray(model([tokens + [0] * (length - len(tokens))])[0, len(tokens) - 1], np.float64)
        for token, value in bias:
            logits[token] += value
        for token in set(tokens):
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        answer = tokens[len(prompt) :]
        for token in set(answer):
            logits[token] -= presence + frequency * answer.count(token)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_model("v3"), 4)


def test_penalties_and_biases_are_those_of_the_formulas_each_row_its_own(engine):
    model = engine.model
    prompts = [random_tokens(n, seed=n).tolist() for n in (5, 9, 20, 3)]
    own = [
        {},
        {"presence": 1.5, "frequency": 0.7},
        {"repetition": 1.8},
        {"bias": ((7, 30.0), (8, 29.5)), "frequency": 0.4},
    ]
    requests = []
    for prompt, one in zip(prompts, own):
        penalties = {f"{name}_penalty": value for name, value in one.items() if name != "bias"}
        settings = Sampling(14, temperature=0, logit_bias=one.get("bias", ()), **penalties)
        requests.append(Request(prompt, settings))
    found = [answer.tokens for answer in engine.answers(requests)]
    expected = [greedy(model, prompt, 14, **one) for prompt, one in zip(prompts, own)]
    assert found == expected
    assert found[3] != greedy(model, prompts[3], 14)


def test_a_penalty_goes_on_from_dispatch_to_dispatch(engine):
    prompt = random_tokens(6, seed=3).tolist()
    settings = Sampling(80, temperature=0, frequency_penalty=0.5)
    (found,) = engine.answers([Request(prompt, settings)])  # 64 tokens a dispatch at most
    assert found.tokens == greedy(engine.model, prompt, 80, frequency=0.5)


def test_the_likeliest_tokens_are_told_with_their_log_probabilities(engine):
    prompt = random_tokens(8, seed=1).tolist()
    settings = Sampling(5, temperature=1.0, top_p=1.0, seed=3)
    asked, other = engine.answers([Request(prompt, settings, record=(TOPS,)), Request(prompt, settings)])
    assert asked.tokens == other.tokens
    assert other.top == []
    expected = logprobs(engine.model, prompt + asked.tokens)[len(prompt) - 1 : -1]
    for row, top in zip(expected, asked.top, strict=True):
        order = np.argsort(-row, kind="stable")[: len(top)]
        assert [token for token, _ in top] == order.tolist()
        np.testing.assert_allclose([p for _, p in top], row[order], atol=2e-5)


@pytest.mark.parametrize("length", [2, 40, 200])  # in one chunk, and in several
def test_a_prompts_own_log_probabilities(length):
    model = tiny_model("v3")
    prompt = random_tokens(length, seed=length).tolist()
    engine = Engine(model, 2)
    settings = Sampling(2, temperature=0)
    asked, other = engine.answers([Request(prompt, settings, record=(PROMPT,)), Request(prompt, settings)])
    assert asked.tokens == other.tokens
    assert other.prompt == []
    expected = logprobs(model, prompt)[:-1]
    assert [best for _, best, _ in asked.prompt] == expected.argmax(-1).tolist()
    own = expected[range(length - 1), prompt[1:]]
    np.testing.assert_allclose([p for p, _, _ in asked.prompt], own, atol=3e-5)
    np.testing.assert_allclose([most for _, _, most in asked.prompt], expected.max(-1), atol=3e-5)


@pytest.mark.parametrize(
    "bad", [{"presence_penalty": 1e9}, {"repetition_penalty": 0.0}, {"logit_bias": ((-1, 2.0),)}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)
