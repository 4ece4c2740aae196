"""Generation: greedy tokens against the formula, independence of the batch, filters, stopping, and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    forward,
    random_model,
    random_tokens,
    slow,
    softmax,
    tiny_config,
    tiny_model,
    tiny_weights,
    weights,
)

from jaxseek.engine.engine import Engine
from jaxseek.engine.sampling import Sampling, SamplingArrays, batch_mode, sample
from jaxseek.model.deepseek import DeepSeek

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = [random_tokens(n, seed=n).tolist() for n in (3, 11, 1, 16)]
GREEDY = Sampling(max_new_tokens=10, temperature=0)
CONTEXT = 30


@functools.cache
def engine(name):
    """Of a tiny model; that of the small dense one has a context that generation can reach."""
    return Engine(small_model() if name == "small" else tiny_model(name))


@functools.cache
def small_model():
    return random_model(tiny_config("llama", num_hidden_layers=1, max_position_embeddings=CONTEXT))


@functools.cache
def small():
    """Greedy completions of the small model."""
    return engine("small").generate(PROMPTS, GREEDY)


def greedy_as_written(cfg, w, prompt, count):
    """Argmax after argmax of full forward passes, and the log-probability of each."""
    tokens, logprobs = list(prompt), []
    for _ in range(count):
        p_V = softmax(forward(cfg, w, tokens)[0][-1])
        tokens.append(int(p_V.argmax()))
        logprobs.append(float(np.log(p_V.max())))
    return tokens[len(prompt) :], logprobs


# -------------------------------------------------------------------- what is generated


@pytest.mark.parametrize("name", ["v3", slow("v3.2")])
def test_greedy_tokens_are_the_argmax_of_full_forward_passes(name):
    """Of a batch of prompts, through prefill and decode: so each row also equals the prompt alone."""
    model, w = tiny_model(name), tiny_weights(name)
    for prompt, completion in zip(PROMPTS, engine(name).generate(PROMPTS, GREEDY)):
        tokens, logprobs = greedy_as_written(model.cfg, w, prompt, 10)
        assert completion.tokens == tokens
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)
        assert completion.finish_reason == "length"


def test_dispatches_of_any_length_give_the_same_tokens():
    w = weights(small_model())
    expected = [greedy_as_written(small_model().cfg, w, p, 10)[0] for p in PROMPTS]
    assert [c.tokens for c in small()] == expected
    *_, last = engine("small").stream(PROMPTS, GREEDY, tokens_per_dispatch=4)
    assert [c.tokens for c in last] == expected


def test_a_request_gives_the_same_text_in_any_batch():
    requests = [Sampling(max_new_tokens=8, temperature=0.9, top_p=0.9, seed=s) for s in (0, 1, 2)]
    requests.append(Sampling(max_new_tokens=8, temperature=0))
    together = engine("small").generate(PROMPTS, requests)
    turned = engine("small").generate(PROMPTS[::-1], requests[::-1])[::-1]
    assert [c.tokens for c in turned] == [c.tokens for c in together]
    alone = engine("small").generate(PROMPTS[:1], requests[:1])
    assert alone[0].tokens == together[0].tokens
    assert together[3].tokens == small()[3].tokens[:8]


def test_seeds_decide_the_text():
    def run(seeds):
        requests = [Sampling(max_new_tokens=8, temperature=1.5, top_p=0.999, seed=s) for s in seeds]
        return [tuple(c.tokens) for c in engine("small").generate([PROMPTS[0]] * 4, requests)]

    first = run([0, 1, 2, 0])
    assert first[0] == first[3]
    assert len(set(first)) == 3
    assert run([2, 1, 0, 7])[:3] == [first[2], first[1], first[0]]


# -------------------------------------------------------------------- where it ends


def test_a_stop_token_ends_its_row_alone_and_is_kept():
    free = small()
    stop = free[1].tokens[3]
    requests = [GREEDY] * 4
    requests[1] = Sampling(max_new_tokens=10, temperature=0, stop_ids=(stop, 5))
    stopped = engine("small").generate(PROMPTS, requests)
    at = free[1].tokens.index(stop)
    assert stopped[1].tokens == free[1].tokens[: at + 1]
    assert stopped[1].finish_reason == "stop"
    assert len(stopped[1].logprobs) == at + 1
    assert [c.tokens for i, c in enumerate(stopped) if i != 1] == [
        c.tokens for i, c in enumerate(free) if i != 1
    ]


def test_a_first_token_may_already_stop():
    stops = tuple(c.tokens[0] for c in small())
    for completion in engine("small").generate(PROMPTS, Sampling(temperature=0, stop_ids=stops)):
        assert len(completion.tokens) == 1
        assert completion.finish_reason == "stop"


def test_rows_end_at_their_own_length_and_at_the_context():
    counts = (1, 5, 10, 100)
    requests = [Sampling(max_new_tokens=n, temperature=0) for n in counts]
    completions = engine("small").generate(PROMPTS, requests)
    assert [len(c.tokens) for c in completions] == [1, 5, 10, CONTEXT - len(PROMPTS[3])]
    assert {c.finish_reason for c in completions} == {"length"}
    for short, full in zip(completions, small()):
        common = min(len(short.tokens), 10)
        assert short.tokens[:common] == full.tokens[:common]


def test_streams_grow_and_a_row_can_be_ended_by_the_reader():
    lengths = []
    for completions in engine("small").stream(PROMPTS, GREEDY, tokens_per_dispatch=4):
        lengths.append([len(c.tokens) for c in completions])
        completions[2].finish_reason = "stop"
    assert lengths == [[1] * 4, [5, 5, 1, 5], [9, 9, 1, 9], [10, 10, 1, 10]]


def test_timing_counts_the_tokens_of_each_phase():
    timing = engine("small").timing
    engine("small").generate(PROMPTS, GREEDY)
    timing = engine("small").timing
    assert (timing.prefill_tokens, timing.decode_tokens) == (sum(map(len, PROMPTS)), 4 * 9)
    assert timing.decode_rate == pytest.approx(36 / timing.decode_seconds)


# -------------------------------------------------------------------- distributions


def probabilities(logits_V, request):
    """transformers' warpers in their order: temperature, top-k, top-p, min-p."""
    scores = np.asarray(logits_V, np.float64) / request.temperature
    if request.top_k:
        k = min(request.top_k, len(scores))
        scores = np.where(scores < np.sort(scores)[-k], -np.inf, scores)
    if request.top_p < 1:
        ascending = np.argsort(scores, kind="stable")
        remove = np.cumsum(softmax(scores)[ascending]) <= 1 - request.top_p
        remove[-1] = False
        scores[ascending[remove]] = -np.inf
    if request.min_p > 0:
        p = softmax(scores)
        scores = np.where(p < request.min_p * p.max(), -np.inf, scores)
    return softmax(scores)


@functools.partial(jax.jit, static_argnames="mode")
def draw(logits_BV, position_B, params, mode):
    drawn = sample(logits_BV, position_B, params, mode)
    return drawn.token_B, drawn.logprob_B


def frequencies(logits_V, request, rows=4096):
    """How often each token is drawn, over rows that differ in their seed alone."""
    params = SamplingArrays.of([request])
    keys = np.random.default_rng(1).integers(0, 2**32, (rows, 2), np.uint32)
    columns = {
        n: np.repeat(getattr(params, n), rows) for n in ("temperature_B", "top_k_B", "top_p_B", "min_p_B")
    }
    logits_BV = np.broadcast_to(np.asarray(logits_V, np.float32), (rows, len(logits_V)))
    tokens, logprobs = draw(
        logits_BV, np.full(rows, 7, np.int32), SamplingArrays(keys, **columns), batch_mode([request])
    )
    expected = np.log(softmax(np.asarray(logits_V, np.float64)))[np.asarray(tokens)]
    np.testing.assert_allclose(logprobs, expected, atol=1e-4)  # of the model, whatever the filters
    return np.bincount(tokens, minlength=len(logits_V))


@given(
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.2, 3),
    top_k=st.sampled_from([0, 1, 3, 8, 100]),
    top_p=st.sampled_from([1.0, 0.95, 0.8, 0.5, 0.1]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_draws_follow_the_filters_of_transformers(seed, temperature, top_k, top_p, min_p):
    request = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits_V = np.random.default_rng(seed).standard_normal(12)
    expected_V, counts_V = probabilities(logits_V, request), frequencies(logits_V, request)
    assert not counts_V[expected_V == 0].any()
    likely = expected_V * counts_V.sum() > 20
    assert (counts_V[likely] > 0).all()
    chi_square = ((counts_V - expected_V * counts_V.sum()) ** 2)[likely] / (expected_V * counts_V.sum())[
        likely
    ]
    assert chi_square.sum() < 45  # 11 degrees of freedom: one in 200,000 exceeds it


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_plain_sampling_follows_the_softmax_at_its_temperature(temperature):
    request = Sampling(temperature=temperature, top_p=1.0)
    assert request.mode == "plain"
    logits_V = np.linspace(-1, 2, 12)
    counts_V, expected_V = frequencies(logits_V, request), 4096 * probabilities(logits_V, request)
    assert ((counts_V - expected_V) ** 2 / expected_V).sum() < 35


def test_requests_of_all_kinds_share_a_batch_and_keep_their_draws():
    rng, rows = np.random.default_rng(0), 64
    plain = [Sampling(temperature=1.2, top_p=1.0, seed=i) for i in range(rows)]
    greedy = [Sampling(temperature=0, seed=i) for i in range(rows)]
    filtered = [Sampling(temperature=1.2, top_k=2, top_p=1.0, seed=i) for i in range(rows)]
    logits_BV = jnp.asarray(rng.standard_normal((rows, 5000)), jnp.float32)  # a tail that sums must not lose
    position_B = np.arange(rows, dtype=np.int32)

    def run(requests):
        return np.asarray(draw(logits_BV, position_B, SamplingArrays.of(requests), batch_mode(requests))[0])

    kinds = (plain, greedy, filtered)
    mixed = [kinds[i % 3][i] for i in range(rows)]
    assert batch_mode(mixed) == "filtered"
    np.testing.assert_array_equal(run(mixed), np.choose(np.arange(rows) % 3, [run(k) for k in kinds]))
    np.testing.assert_array_equal(run(greedy), logits_BV.argmax(-1))


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1 has no tokens"),
        (
            [[1], [2] * CONTEXT],
            f"prompt 1 has {CONTEXT} tokens, which leaves no room in the context of {CONTEXT}",
        ),
        ([[1, 64]], r"outside the vocabulary 0\.\.63"),
        ([[-1]], r"outside the vocabulary 0\.\.63"),
    ],
    ids=["empty", "too long", "unknown token", "negative token"],
)
def test_prompts_that_cannot_be_answered_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        engine("small").generate(prompts, GREEDY)


def test_as_many_requests_as_prompts_are_needed():
    with pytest.raises(ValueError, match="2 requests for 4 prompts"):
        engine("small").generate(PROMPTS, [GREEDY] * 2)


def test_no_prompts_give_no_completions():
    assert engine("small").generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("seed", -1),
    ],
)
def test_sampling_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        Sampling(**{field: value})


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty"):
        Sampling(stop=("",))


@pytest.mark.parametrize("mesh", [slow(None), "data=2,tensor=2"])
def test_weights_laid_out_by_the_compiler_give_the_same(mesh):
    model, sampling = DeepSeek.init(tiny_config("llama"), mesh), Sampling(temperature=0.0, max_new_tokens=6)
    prompts = PROMPTS[:2]
    want = Engine(model, unroll=False).generate(prompts, sampling)
    engine = Engine(model, unroll=False, lay_out=True)
    for batch in (prompts, prompts, prompts * 2):  # laid out, as it lies, another shape for the same weights
        for found, expected in zip(engine.generate(batch, sampling), want * 2):
            assert found.tokens == expected.tokens
            np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize("owns", [True, False])
def test_arrays_that_an_engine_does_not_own_stay(owns):
    model = DeepSeek.init(tiny_config("llama"))
    twin = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))  # the same arrays
    engine = Engine(model, unroll=False, lay_out=True, owns=owns)
    engine.generate(PROMPTS[:1], Sampling(max_new_tokens=2, temperature=0))
    assert all(a is b for a, b in zip(engine.weights, jax.tree.leaves(model)))
    if not owns:
        assert not any(a.is_deleted() for a in jax.tree.leaves(twin))
