"""Groups of answers: each is a function of its prompt, its request and the weights; log-probabilities and
experts are those of the full forward pass."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close, log_softmax, random_model, random_tokens, slow, tiny_config

from jaxseek.engine.engine import Engine, Timing
from jaxseek.engine.request import EXPERTS, LOGPROBS, Request
from jaxseek.engine.sampling import Sampling
from jaxseek.rl.rollout import as_engine, seed_of
from jaxseek.sharding.parameters import parameters

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONTEXT = 40
CFG = {
    "dense": tiny_config("llama", num_hidden_layers=1, max_position_embeddings=CONTEXT),
    "sparse": tiny_config(
        "v3",
        num_hidden_layers=2,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
        max_position_embeddings=CONTEXT,
    ),
}
PROMPTS = [random_tokens(n, seed=n).tolist() for n in (3, 11, 1, 14, 6)]
FILTERS = [{"temperature": 1.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.0}]
FILTERS += [{"temperature": 0.8, "top_k": 9, "top_p": 0.7, "min_p": 0.05}]
STOPS = (3, 5)


def request(p, g, **changes):
    """Lengths differ, so that slots become free at different times."""
    own = {"max_new_tokens": 3 + (5 * p + 3 * g) % 9, "temperature": 1.0, "top_p": 1.0, "stop_ids": STOPS}
    return Sampling(**own | FILTERS[g % len(FILTERS)] | {"seed": seed_of(0, 0, p, g)} | changes)


REQUESTS = [[request(p, g) for g in range(6)] for p in range(len(PROMPTS))]


@functools.cache
def engine(name, mesh=None):
    return Engine(random_model(CFG[name], mesh))


def sample_groups(engine, prompts, groups, slots=0, experts=False, mode="greedy", tokenizer=None):
    """Answers to every prompt, one per request of its group, and the timing."""
    record = (LOGPROBS, EXPERTS) if experts else (LOGPROBS,)
    requests = [Request(p, r, tokenizer, record) for p, group in zip(prompts, groups) for r in group]
    engine.mode, engine.timing = mode, Timing()
    engine.resize(slots or len(requests))
    found = iter(engine.answers(requests))
    return [[next(found) for _ in group] for group in groups], engine.timing


@functools.cache
def whole(name):
    """All groups at once, on one device."""
    return sample_groups(engine(name), PROMPTS, REQUESTS, experts=name == "sparse")[0]


def flat(groups):
    return [answer for group in groups for answer in group]


def assert_same(got, expected):
    assert [[a.tokens for a in group] for group in got] == [[a.tokens for a in group] for group in expected]
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert a.finish_reason == b.finish_reason
        np.testing.assert_allclose(a.tempered, b.tempered, atol=2e-5)
        np.testing.assert_allclose(a.drawn, b.drawn, atol=2e-5)
        assert (a.experts is None) == (b.experts is None)
        if a.experts is not None:
            np.testing.assert_array_equal(a.experts, b.experts)


# -------------------------------------------------------------------- the same whatever is around it


@pytest.mark.parametrize("slots", [7, *(slow(n) for n in (1, 4))])
def test_answers_do_not_depend_on_the_number_of_slots(slots):
    got, timing = sample_groups(engine("sparse"), PROMPTS, REQUESTS, slots=slots, experts=True)
    assert_same(got, whole("sparse"))
    assert timing.new_tokens == sum(len(a.tokens) for group in got for a in group)
    assert timing.prefill_tokens == sum(map(len, PROMPTS))  # each is read once for its group
    assert 0 < timing.occupancy <= 1


def test_answers_do_not_depend_on_their_order_or_on_other_prompts():
    turned, _ = sample_groups(
        engine("sparse"), PROMPTS[::-1], [g[::-1] for g in REQUESTS[::-1]], slots=7, experts=True
    )
    assert_same([group[::-1] for group in turned[::-1]], whole("sparse"))
    alone, _ = sample_groups(engine("dense"), PROMPTS[3:4], REQUESTS[3:4])
    assert_same(alone, whole("dense")[3:4])


def test_answers_are_those_of_the_engine_for_one_prompt_at_a_time():
    for prompt, requests, group in zip(PROMPTS, REQUESTS, whole("dense")):
        for completion, answer in zip(engine("dense").generate([prompt] * 6, requests), group):
            assert completion.tokens == answer.tokens
            assert completion.finish_reason == answer.finish_reason


@pytest.mark.parametrize(
    "mesh",
    [
        "data=2,expert=4",
        slow("fsdp=4,tensor=2"),
        slow("context=2,expert=2,data=2"),
        slow("fsdp=8"),
        slow("context=4,tensor=2"),
    ],
)
def test_answers_do_not_depend_on_the_mesh(mesh):
    """Prompts and slots do not fill the mesh's parts."""
    got, _ = sample_groups(engine("sparse", mesh), PROMPTS, REQUESTS, slots=9, experts=True)
    assert_same(got, whole("sparse"))


def test_weights_that_decoding_uses_as_they_rest_are_the_policys_own():
    def moved(name, mesh, dtype="float32"):
        policy = random_model(CFG[name], mesh)
        own, used = (parameters(m) for m in (policy, as_engine(policy, dtype).model))
        return {path for path in own if used[path].get_value() is not own[path].get_value()}, own

    assert moved("sparse", None)[0] == set()
    assert moved("sparse", {"expert": 2, "tensor": 2})[0] == set()
    gathered, all = moved("sparse", {"fsdp": 2})
    assert {"embed_VD", "stacks.0.mlp.gate_EDF"} <= gathered < set(all)
    cast, all = moved("sparse", None, "bfloat16")
    assert set(all) - cast == {path for path in all if "router_" in path}


def test_seeds_differ_for_every_step_problem_and_answer_and_so_do_answers():
    seeds = {seed_of(7, step, p, g) for step in range(30) for p in range(40) for g in range(16)}
    assert len(seeds) == 30 * 40 * 16
    assert all(0 <= s < 2**63 for s in seeds)
    requests = [[request(0, 0, max_new_tokens=10, stop_ids=(), seed=seed_of(7, s, 0, g)) for g in range(6)]
                for s in range(3)]  # fmt: skip
    groups, _ = sample_groups(engine("dense"), [PROMPTS[0]] * 3, requests)
    assert len({tuple(a.tokens) for group in groups for a in group}) == 18
    again, _ = sample_groups(engine("dense"), [PROMPTS[0]] * 3, requests)
    assert_same(again, groups)


# -------------------------------------------------------------------- what is recorded


def filtered(logits_V, r):
    """log of what is drawn from, as transformers writes it: temperature, top-k, top-p, min-p."""
    x = logits_V / r.temperature
    if r.top_k:
        x = np.where(x >= np.sort(x)[-r.top_k], x, -np.inf)
    if r.top_p < 1:
        order = np.argsort(-x)
        p = np.exp(log_softmax(x))[order]
        out = order[np.cumsum(p) - p >= r.top_p]
        x[out] = -np.inf
    p = np.exp(log_softmax(x))
    return log_softmax(np.where(p >= r.min_p * p.max(), x, -np.inf))


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_log_probabilities_are_of_the_temperature_and_of_what_is_drawn_from(name):
    biased = 0
    for prompt, requests, group in zip(PROMPTS, REQUESTS, whole(name)):
        rows = np.zeros((len(group), 32), np.int32)
        for row, answer in zip(rows, group):
            row[: len(prompt) + len(answer.tokens)] = prompt + answer.tokens
        logits = np.asarray(engine(name).model(rows), np.float64)
        for x, r, answer in zip(logits, requests, group):
            begin, n = len(prompt) - 1, len(answer.tokens)
            x, tokens = x[begin : begin + n], np.array(answer.tokens)
            at = np.arange(n), tokens
            tempered = log_softmax(x / (r.temperature or 1))[at]
            np.testing.assert_allclose(answer.tempered, tempered, atol=1e-4)
            if r.temperature == 0:
                np.testing.assert_array_equal(tokens, x.argmax(axis=-1))
                assert not any(answer.drawn)
                continue
            drawn = np.array([filtered(row, r) for row in x])[at]
            np.testing.assert_allclose(answer.drawn, drawn, atol=1e-4)
            biased += (drawn > tempered + 0.05).sum()
    assert biased > 20  # filters do make a difference here


def test_experts_are_those_of_the_full_forward_pass_and_none_is_missing():
    model = engine("sparse").model
    for prompt, group in zip(PROMPTS, whole("sparse")):
        for answer in group:
            row = np.zeros((1, 32), np.int32)
            n = len(prompt) + len(answer.tokens)
            row[0, :n] = prompt + answer.tokens
            ids_LTK = np.asarray(model.expert_ids(row))[:, 0]
            assert answer.experts.shape == (2, n - 1, 3)
            np.testing.assert_array_equal(
                np.sort(answer.experts, axis=-1), np.sort(ids_LTK[:, : n - 1], axis=-1)
            )


def test_log_probabilities_of_a_bfloat16_engine_are_none_above_zero():
    model = random_model(CFG["dense"], dtype=jnp.bfloat16)
    groups, _ = sample_groups(Engine(model), PROMPTS[:1], [[request(0, 0), request(0, 1)]])
    for answer in flat(groups):
        assert all(x <= 1e-6 for x in answer.tempered + answer.drawn)


# -------------------------------------------------------------------- where an answer ends


def free(count=10):
    """Greedy answers of two equal requests for each prompt, that nothing ends."""
    greedy = Sampling(max_new_tokens=count, temperature=0)
    return [[a.tokens for a in g] for g in sample_groups(engine("dense"), PROMPTS, [[greedy] * 2] * 5)[0]]


def test_a_greedy_answer_is_the_same_in_the_program_that_draws(monkeypatch):
    decode, modes = Engine.decode, []

    def seen(self, *args):
        modes.append(args[7])
        return decode(self, *args)

    monkeypatch.setattr(Engine, "decode", seen)
    some = [[Sampling(max_new_tokens=10, temperature=0)] * 2] * 5
    own, other = (flat(sample_groups(engine("dense"), PROMPTS, some, mode=m)[0]) for m in (None, "plain"))
    for a, b in zip(own, other):
        assert a.tokens == b.tokens
        assert_close(b.tempered, a.tempered, 1e-5)
        assert not any(a.drawn + b.drawn)
    assert set(modes) == {"greedy", "plain"}


def test_a_stop_token_ends_an_answer_and_is_kept_even_as_the_first():
    tokens = free()
    for stop in {group[0][0] for group in tokens} | {tokens[1][0][4]}:
        asked = [[Sampling(max_new_tokens=10, temperature=0, stop_ids=(stop, 63)), request(p, 4)]
                 for p in range(5)]  # fmt: skip
        for (answer, _), (all_, _) in zip(sample_groups(engine("dense"), PROMPTS, asked, slots=3)[0], tokens):
            ends = [t in (stop, 63) for t in all_]
            assert answer.tokens == (all_[: ends.index(True) + 1] if any(ends) else all_)
            assert answer.finish_reason == ("stop" if any(ends) else "length")
            assert len(answer.tokens) == len(answer.tempered) == len(answer.drawn)


class Letters:
    """A letter for every token."""

    def decode(self, ids, skip_special=True):
        return "".join(chr(ord("A") + i) for i in ids)


@pytest.mark.parametrize("budget", [1, 10])
def test_a_stop_string_ends_an_answer_with_the_token_that_completes_it(budget):
    tokens = free(budget)
    marks = {tokens[0][0][0], tokens[1][0][-1], tokens[3][0][budget // 2]}
    stops = tuple(Letters().decode([mark]) for mark in marks)
    asked = [[Sampling(max_new_tokens=budget, temperature=0, stop=stops)] * 2] * 5
    got, _ = sample_groups(engine("sparse"), PROMPTS, asked, slots=3, experts=True, tokenizer=Letters())
    for group, prompt in zip(got, PROMPTS):
        for answer in group:
            assert answer.experts.shape[1] == len(prompt) + len(answer.tokens) - 1
    got, _ = sample_groups(engine("dense"), PROMPTS, asked, slots=3, tokenizer=Letters())
    for group, (all_, _) in zip(got, tokens):
        for answer in group:
            keep = next((i + 1 for i, t in enumerate(all_) if t in marks), None)
            assert answer.tokens == all_[:keep]
            assert answer.finish_reason == ("length" if keep is None else "stop")
            assert answer.text == Letters().decode(all_ if keep is None else all_[: keep - 1])
            assert len(answer.tokens) == len(answer.tempered) == len(answer.drawn)


def test_the_context_ends_an_answer():
    prompts = [random_tokens(n, seed=n).tolist() for n in (CONTEXT - 1, CONTEXT - 4, 2)]
    asked = [[Sampling(max_new_tokens=6, temperature=0)] * 2] * 3
    groups, _ = sample_groups(engine("dense"), prompts, asked, slots=2)
    assert [[len(a.tokens) for a in group] for group in groups] == [[1, 1], [4, 4], [6, 6]]
    for prompt, group in zip(prompts, groups):
        (alone,) = engine("dense").generate([prompt], asked[0][0])
        assert group[0].tokens == group[1].tokens == alone.tokens


def test_answers_longer_than_a_dispatch_are_whole(monkeypatch):
    monkeypatch.setattr("jaxseek.engine.engine.WIDTH", 4)
    got, _ = sample_groups(engine("sparse"), PROMPTS, REQUESTS, slots=7, experts=True)
    assert_same(got, whole("sparse"))
