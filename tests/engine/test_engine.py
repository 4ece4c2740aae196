"""Generation: greedy tokens against the formula, independence of the batch, filters, stopping, and errors."""

import functools

import jax
import numpy as np
import pytest
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

from jaxseek.engine.engine import Engine, Timing
from jaxseek.engine.request import Request
from jaxseek.engine.sampling import Sampling
from jaxseek.model.deepseek import DeepSeek

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = [random_tokens(n, seed=n).tolist() for n in (3, 11, 1, 16)]
GREEDY = Sampling(max_new_tokens=10, temperature=0)
CONTEXT = 30


@functools.cache
def engine(name):
    """An engine of a tiny model; that of the small dense one has a context that generation can reach."""
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
    """A batch of prompts goes through prefill and decode, so each row also equals the prompt alone."""
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
    assert [c.tokens for c in Engine(small_model(), dispatch=4).generate(PROMPTS, GREEDY)] == expected


@pytest.mark.parametrize("name", ["v3", slow("llama"), slow("v3.2")])
def test_a_prompt_read_in_chunks_is_answered_as_the_formula_says(name):
    """Chunks after the first attend to the cache; the last is not full."""
    model = random_model(tiny_config(name, max_position_embeddings=256))
    long = [random_tokens(n, seed=n).tolist() for n in (152, 65)]
    for prompt, answer in zip(long, Engine(model, slots=2).generate(long, GREEDY)):
        assert answer.tokens == greedy_as_written(model.cfg, weights(model), prompt, 10)[0]


@pytest.mark.parametrize("mesh", ["context=2", slow("data=2,context=2")])
@pytest.mark.parametrize("name", ["v3", slow("llama"), slow("v3.2")])
def test_chunks_are_read_on_a_mesh_that_splits_queries_and_cache_slots(name, mesh):
    """Over the same devices. V3 expands latents for the second chunk; V3.2 and Llama attend at the cache."""
    cfg = tiny_config(name, max_position_embeddings=256)
    model = random_model(cfg, mesh)
    prompt = random_tokens(152, seed=3).tolist()
    (answer,) = Engine(model, slots=2).generate([prompt], GREEDY)
    assert answer.tokens == greedy_as_written(cfg, weights(random_model(cfg)), prompt, 10)[0]


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


def test_answers_grow_by_dispatches_and_can_be_cancelled():
    one, lengths = Engine(small_model(), dispatch=4), []
    handles = [one.submit(Request(PROMPTS[0], GREEDY)) for _ in range(3)]
    while one.busy:
        one.step()
        lengths.append([len(h.answer.tokens) for h in handles])
        one.cancel(handles[2])
    assert lengths == [[1, 1, 1], [5, 5, 1], [9, 9, 1], [10, 10, 1]]
    assert [h.answer.finish_reason for h in handles] == ["length", "length", "cancelled"]
    waiting = one.submit(Request(PROMPTS[1], GREEDY))
    one.cancel(waiting)
    assert not one.busy
    assert one.step() == []


def test_timing_counts_the_tokens_of_each_phase():
    engine("small").timing = timing = Timing()
    engine("small").generate([PROMPTS[0]] * 4, GREEDY)
    assert (timing.prefill_tokens, timing.decode_tokens, timing.new_tokens) == (len(PROMPTS[0]), 4 * 9, 40)
    assert timing.decode_rate == pytest.approx(36 / timing.decode_seconds)
    assert timing.occupancy == 4 / 16


# -------------------------------------------------------------------- requests that come and go


def mixed(count, context):
    """Requests of all lengths, settings, seeds and ends; some share a prompt."""
    settings = [
        {"temperature": 0.0}, {"temperature": 1.3}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 9},
    ]  # fmt: skip
    out = []
    for i in range(count):
        prompt = random_tokens(1 + (7 * (i // 2)) % (context - 8), seed=i // 2).tolist()
        own = {"temperature": 1.0, "top_p": 1.0} | settings[i % len(settings)]
        own |= {"max_new_tokens": 1 + (5 * i) % 23, "seed": i, "stop_ids": (3, 5, 9)[: i % 4]}
        out.append(Request(prompt, Sampling(**own)))
    return out


def test_each_of_64_mixed_requests_gets_the_tokens_that_it_gets_alone():
    model = random_model(tiny_config("v3", num_hidden_layers=1, first_k_dense_replace=0,
                                     max_position_embeddings=96))  # fmt: skip
    requests, few = mixed(64, 96), Engine(model, slots=5)
    together = few.answers(requests)
    assert few.timing.prefill_tokens < 0.6 * sum(len(r.prompt) for r in requests)  # shared ones are read once
    alone = Engine(model, slots=1, capacity=96, mode="filtered")
    for request, answer in zip(requests, together):
        (own,) = alone.answers([request])
        assert (answer.tokens, answer.finish_reason) == (own.tokens, own.finish_reason)
        np.testing.assert_allclose(answer.logprobs, own.logprobs, atol=2e-5)


def test_a_thousand_prompts_pass_in_one_go_and_bad_ones_cost_the_others_nothing():
    taken, answered = [0], 0
    expected = {n: engine("small").generate([[n] * 3], Sampling(2, 0.0))[0].tokens for n in (5, 6)}

    def requests():
        for i in range(1000):
            taken[0] += 1
            bad = {300: [], 500: [1] * CONTEXT, 700: [64]}
            yield (
                ValueError("unreadable")
                if i == 900
                else Request(bad.get(i, [5 + i % 2] * 3), Sampling(2, 0.0))
            )

    errors = {}
    for index, answer in engine("small").run(requests()):
        answered += 1
        assert taken[0] - answered <= 3 * 16  # those with a slot and those next in line
        if isinstance(answer, ValueError):
            errors[index] = str(answer)
        else:
            assert answer.tokens == expected[5 + index % 2]
    assert answered == 1000
    assert sorted(errors) == [300, 500, 700, 900]
    assert f"has {CONTEXT} tokens, which leaves no room" in errors[500]


def test_a_long_prompt_is_read_beside_answers_that_go_on():
    model = random_model(tiny_config("llama", num_hidden_layers=1, max_position_embeddings=8192))
    one = Engine(model, slots=2)
    short = one.submit(Request(PROMPTS[0], Sampling(40, 0.0)))
    one.step()
    long = one.submit(Request(random_tokens(4100, seed=1).tolist(), Sampling(2, 0.0)))
    lengths = []
    while not long.ended:
        one.step()
        lengths.append(len(short.answer.tokens))
    assert lengths[:4] == [9, 17, 25, 33]  # a chunk of 1,024 tokens between them
    assert short.answer.tokens == Engine(model).generate(PROMPTS[:1], Sampling(40, 0.0))[0].tokens


def test_a_slot_grows_for_a_longer_request_while_others_decode():
    model = random_model(tiny_config("v3", num_hidden_layers=1, first_k_dense_replace=0,
                                     max_position_embeddings=2048))  # fmt: skip
    prompts = [random_tokens(n, seed=n).tolist() for n in (9, 300)]
    one = Engine(model, slots=2, dispatch=8)
    first = one.submit(Request(prompts[0], Sampling(30, 0.0)))
    one.step()
    one.step()
    second = one.submit(Request(prompts[1], Sampling(600, 0.0)))
    while one.busy:
        one.step()
    alone = [Engine(model, slots=1).generate([p], Sampling(n, 0.0))[0] for p, n in zip(prompts, (30, 600))]
    assert [first.answer.tokens, second.answer.tokens] == [a.tokens for a in alone]


def test_a_chat_of_twenty_turns_compiles_only_where_it_outgrows_its_programs():
    model, counts = random_model(tiny_config("llama", num_hidden_layers=1, max_position_embeddings=2048)), []
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    one, talk = Engine(model, slots=1), random_tokens(70, seed=3).tolist()
    for turn in range(20):
        before = len(compiled)
        (answer,) = one.generate([talk], Sampling(300, 0.0, stop_ids=tuple(range(0, 64, 7))))
        talk = [*talk, *answer.tokens, *random_tokens(8, seed=turn).tolist()]
        counts.append(len(compiled) - before)
    assert counts[0] > 3
    assert len(talk) > 4 * 70
    later = [count for count in counts[3:] if count]  # another chunk size or capacity
    assert len(later) <= 4, counts
    assert sum(later) <= 12, counts


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1: the prompt has no tokens"),
        (
            [[1], [2] * CONTEXT],
            f"prompt 1: the prompt has {CONTEXT} tokens, which leaves no room in the context of {CONTEXT}",
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


@pytest.mark.parametrize("mesh", [slow(None), "data=2,tensor=2"])
def test_weights_laid_out_by_the_compiler_give_the_same(mesh):
    model, sampling = DeepSeek.init(tiny_config("llama"), mesh), Sampling(temperature=0.0, max_new_tokens=6)
    prompts = PROMPTS[:2]
    want = Engine(model, form="plain").generate(prompts, sampling)
    engine = Engine(model, form="plain", lay_out=True)
    for batch in (prompts, prompts, prompts * 2):  # laid out, as it lies, another shape for the same weights
        for found, expected in zip(engine.generate(batch, sampling), want * 2):
            assert found.tokens == expected.tokens
            np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize("owns", [True, False])
def test_arrays_that_an_engine_does_not_own_stay(owns):
    model = DeepSeek.init(tiny_config("llama"))
    twin = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))  # the same arrays
    engine = Engine(model, form="plain", lay_out=True, owns=owns)
    engine.generate(PROMPTS[:1], Sampling(max_new_tokens=2, temperature=0))
    assert all(a is b for a, b in zip(engine.decoder.arrays, jax.tree.leaves(model)))
    if not owns:
        assert not any(a.is_deleted() for a in jax.tree.leaves(twin))
