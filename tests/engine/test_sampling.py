"""Draws: filters in their order, the softmax at its temperature, and settings out of range."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import softmax

from jaxseek.engine.sampling import Sampling, SamplingArrays, batch_mode, sample

pytestmark = pytest.mark.usefixtures("quick_compilation")


def probabilities(logits_V, request):
    """Temperature, then top-k, top-p and min-p, each on what the one before left.

    Top-k keeps the k likeliest tokens, top-p the smallest set whose mass reaches p, min-p those of at least
    min_p times the greatest probability; of equally likely tokens the lower id goes first.
    """
    scores = np.asarray(logits_V, np.float64) / request.temperature
    order = np.argsort(-scores, kind="stable")
    if request.top_k:
        scores[order[request.top_k :]] = -np.inf
    if request.top_p < 1:
        p = softmax(scores)[order]
        scores[order[np.cumsum(p) - p >= request.top_p]] = -np.inf
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
    ties=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_draws_follow_the_filters_as_defined(seed, temperature, top_k, top_p, min_p, ties):
    request = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits_V = np.random.default_rng(seed).standard_normal(12)
    logits_V = np.round(logits_V) if ties else logits_V
    expected_V, counts_V = probabilities(logits_V, request), frequencies(logits_V, request)
    assert not counts_V[expected_V == 0].any()
    likely = expected_V * counts_V.sum() > 20
    assert (counts_V[likely] > 0).all()
    chi_square = ((counts_V - expected_V * counts_V.sum()) ** 2)[likely] / (expected_V * counts_V.sum())[
        likely
    ]
    assert chi_square.sum() < 45  # 11 degrees of freedom: one in 200,000 exceeds it


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 1}, [1]), ({"top_k": 2}, [1, 2]), ({"top_k": 4}, [0, 1, 2, 4]), ({"top_p": 0.2}, [1]),
        ({"top_p": 0.6}, [1, 2, 4]), ({"top_p": 0.85}, [0, 1, 2, 4]), ({"min_p": 0.9}, [1, 2, 4]),
    ],
)  # fmt: skip
def test_of_equally_likely_tokens_those_of_lower_id_stay(filters, kept):
    logits_V = [0.0, 1.0, 1.0, 0.0, 1.0, -9.0]  # 0.27 for each of 1, 2 and 4, 0.1 for 0 and 3
    counts_V = frequencies(logits_V, Sampling(**{"temperature": 1.0, "top_p": 1.0} | filters))
    assert np.flatnonzero(counts_V).tolist() == kept


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
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", float("inf")),
        ("top_k", float("inf")),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("seed", -1),
        ("seed", float("nan")),
        ("top_k", 10**30),
        ("max_new_tokens", 1.5),
        ("temperature", True),
    ],
)
def test_sampling_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        Sampling(**{field: value})


@pytest.mark.parametrize("stop", [("",), (5,), (None,)])
def test_a_stop_string_that_is_none_is_refused(stop):
    with pytest.raises(ValueError, match=r"stop is .*expected texts"):
        Sampling(stop=stop)
