"""`jaxseek.generate` and what lies between text and tokens: arguments as given, noise, stop strings."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from oracles import random_model, tiny_config

from jaxseek.engine.engine import Engine
from jaxseek.engine.generate import engine_for, generate, in_order, seed_for, settings
from jaxseek.engine.sampling import Sampling
from jaxseek.engine.text import Text

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def model():
    return random_model(tiny_config("llama", num_hidden_layers=1, max_position_embeddings=64))


def ids(prompts, **more):
    return generate(model(), None, prompts, **{"max_new_tokens": 4, "temperature": 0} | more)


def test_a_prompt_of_ids_is_a_list_an_array_or_several():
    (expected,) = ids([[1, 2, 3]])
    for given_ in ([1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), jnp.array([1, 2, 3]), np.array([[1, 2, 3]])):
        assert ids(given_) == [expected]
    assert ids([np.array([1, 2, 3]), [4]]) == [expected, *ids([4])]
    assert ids([]) == []


def test_seeds_are_whole_numbers_of_any_kind_and_defaults_may_be_none():
    drawn = ids([1, 2], temperature=1.0, seed=3)
    assert ids([1, 2], temperature=1.0, seed=np.int64(3)) == ids([1, 2], temperature=1.0, seed=[3]) == drawn
    assert ids([1, 2], temperature=1.0, seed=None) == ids([1, 2], temperature=1.0, seed=0)
    assert ids([1, 2], stop=None, top_k=None) == ids([1, 2])


def test_settings_are_numbers_of_any_kind():
    expected = ids([1, 2], temperature=0.5, top_k=3, seed=3)
    for half in (np.float32(0.5), jnp.float32(0.5), np.array(0.5)):
        assert ids([1, 2], temperature=half, top_k=np.int32(3), seed=3) == expected


@pytest.mark.parametrize(
    ("prompts", "more", "message"),
    [
        ({"input_ids": [1, 2]}, {}, "mapping with input_ids"),
        ([1, 2], {"temperature": "0.7"}, "temperature is '0.7', expected a number"),
        ([1, 2], {"top_p": True}, "top_p is True, expected a number"),
        ([1, 2], {"top_k": 1.5}, "top_k is 1.5, expected a whole number"),
        ([1, 2], {"seed": -1}, "seed is -1, expected within"),
        ([{"input_ids": [1, 2]}, [1]], {}, "no tokenizer"),
        ([{"role": "user", "content": "hi"}], {}, "no tokenizer"),
        ("hi", {}, "no tokenizer"),
        ([[0.5]], {}, "expected whole numbers"),
        ([[1]], {"batch_size": -1}, "batch_size is -1"),
        ([[1]], {"seed": [1, 2]}, "2 seeds were given for 1 prompts"),
        ([[1], []], {}, "prompt 1"),
        ([[1]], {"stop": "x"}, "stop strings need a tokenizer"),
        ([[1]], {"stop": [5]}, "stop is "),
        ([[1]], {"stop": 5}, "stop is "),
        ([[1]], {"seed": float("nan")}, "seed is nan, expected a whole number"),
        ([[1]], {"seed": "x"}, "seed is 'x'"),
        ([[1]], {"batch_size": 1.5}, "batch_size is 1.5"),
        ([[1]], {"max_new_tokens": "5"}, "max_new_tokens is '5'"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([[1]], {"top_k": 10**12}, "top_k is 1000000000000"),
        ([[1]], {"temperature": 1j}, "temperature is 1j"),
        (None, {}, "prompts is None"),
        (5, {}, "prompts is 5"),
        (np.array(5), {}, "prompts is"),
        (b"hi", {}, "a prompt is b'hi'"),
        ([b"hi"], {}, "a prompt is b'hi'"),
        ([None], {}, "expected whole numbers"),
        ([[[1], [2, 3]]], {}, "expected whole numbers"),
        ([[True, False]], {}, "expected whole numbers"),
        ([[10**30]], {}, "expected whole numbers"),
        ([[99999]], {}, "99999"),
    ],
)
def test_what_cannot_be_a_prompt_or_a_setting_is_named(prompts, more, message):
    with pytest.raises(ValueError, match=message):
        ids(prompts, **more)


def test_one_seed_gives_each_prompt_noise_of_its_own_and_the_same_alone():
    prompts = [[1, 2], [3, 4], [1, 2]]
    assert len({seed_for(7, p) for p in prompts}) == 2
    assert seed_for(7, [1]) != seed_for(8, [1])
    together = ids(prompts, temperature=1.3, seed=7)
    assert together == [ids(p, temperature=1.3, seed=7)[0] for p in prompts]


def test_prompts_that_differ_draw_independently_with_one_seed():
    vocab, n, seeds = model().cfg.vocab_size, 32, range(6)
    prompts = [[1 + i % 8] * (1 + i // 8) for i in range(n)]
    options = {"temperature": 100.0, "top_p": 1.0, "max_new_tokens": 1}
    found = [[tokens[0] for tokens in ids(prompts, seed=seed, **options)] for seed in seeds]
    missed = (1 - 1 / vocab) ** n  # the chance that none of n even draws is a given token
    variance = vocab * missed * (1 - missed) + vocab * (vocab - 1) * ((1 - 2 / vocab) ** n - missed**2)
    distinct = np.mean([len(set(tokens)) for tokens in found])
    assert abs(distinct - vocab * (1 - missed)) < 4 * np.sqrt(variance / len(seeds))
    assert found[1][::8] == [ids(p, seed=1, **options)[0][0] for p in prompts[::8]]


def test_a_prompt_and_the_same_with_a_zero_behind_it_have_noise_of_their_own():
    assert len({seed_for(7, p) for p in ([], [0], [5], [5, 0], [5, 0, 0], [0, 5])}) == 6


FILE = {"temperature": 0.01, "top_k": 1, "do_sample": True, "top_p": None, "max_new_tokens": 9}


def test_settings_are_those_given_then_of_the_checkpoint_then_the_defaults():
    found, said = settings(FILE, {"temperature": None, "top_k": None, "min_p": 0.1}, top_p=0.5)
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0.01, 1, 0.5, 0.1)
    assert found.max_new_tokens == 9
    assert "temperature 0.01, top_k 1, max_new_tokens 9 (options come first)" in said
    given, said = settings(FILE, {"temperature": 0.5, "top_k": 2, "max_new_tokens": 3}, max_new_tokens=7)
    assert (given.temperature, given.top_k, given.max_new_tokens, said) == (0.5, 2, 3, "")
    assert settings({}, {"temperature": None}) == (Sampling(), "")


def test_a_file_that_does_not_sample_is_greedy_unless_a_temperature_is_given():
    greedy = {"temperature": 0.6, "do_sample": False}
    assert settings(greedy, {"temperature": None})[0].temperature == 0
    assert settings(greedy, {"temperature": 0.7})[0].temperature == 0.7


def test_settings_of_a_file_that_cannot_be_honoured_are_named_and_others_are_used():
    file = {
        "repetition_penalty": 1.2,
        "num_beams": 4,
        "temperature": "hot",
        "top_p": 2,
        "top_k": 5,
        "bos_token_id": 7,
    }
    assert settings({"eos_token_id": [1, "x"]}, {})[1].endswith('not honoured: eos_token_id [1, "x"]')
    off = {
        "eos_token_id": [1, 2],
        "repetition_penalty": 1.0,
        "num_beams": 1,
        "no_repeat_ngram_size": 0,
        "suppress_tokens": None,
    }
    found, said = settings(file, {})
    assert (found.top_k, found.temperature) == (5, Sampling().temperature)
    lost = 'not honoured: num_beams 4, temperature "hot", top_p 2'
    assert said == f"generation_config.json: repetition_penalty 1.2, top_k 5 (options come first); {lost}"
    assert found.repetition_penalty == 1.2
    assert settings(off | {"transformers_version": "4.40"}, {}) == (Sampling(), "")


def test_stop_strings_of_a_file_end_a_text_where_there_is_a_tokenizer():
    file = {"stop_strings": ["###"]}
    assert settings(file, {"stop": None})[0].stop == ("###",)
    assert settings(file, {"stop": ("x",)})[0].stop == ("x",)
    assert settings(file, {}, strings=False)[0].stop == ()


def test_the_engine_is_kept_for_the_same_weights_and_refuses_to_change_in_use():
    one = engine_for(model(), 3)
    assert engine_for(model(), 4) is one  # both have four slots
    assert isinstance(one, Engine)
    other = random_model(tiny_config("llama", num_hidden_layers=1), dtype=jnp.bfloat16)
    assert engine_for(other) is not one


@given(st.permutations(range(9)))
@hypothesis(deadline=None)
def test_results_come_in_order_however_they_are_made(order):
    assert list(in_order((i, i) for i in order)) == list(range(9))


class Letters:
    """A letter for every token."""

    def decode(self, ids, skip_special=True):
        return "".join(chr(ord("a") + i) for i in ids)


@given(
    tokens=st.lists(st.integers(0, 2), max_size=20),
    stops=st.lists(st.text("abc", min_size=1, max_size=3), max_size=2),
    cuts=st.sets(st.integers(0, 20)),
)
@hypothesis(deadline=None)
def test_text_ends_before_the_first_stop_string_and_pieces_never_take_anything_back(tokens, stops, cuts):
    whole, text = Letters().decode(tokens), Text(Letters(), tuple(stops))
    parts = [0, *sorted(cut for cut in cuts if cut < len(tokens)), len(tokens)]
    kept, pieces, found = 0, "", False
    for begin, end in itertools.pairwise(parts):
        more, found = text.feed(tokens[begin:end])
        kept += more
        pieces += text.piece()
        if found:
            break
    text.end()
    pieces += text.piece()
    ends = [n for n in range(len(whole) + 1) if any(whole[:n].endswith(s) for s in stops)]
    assert found == bool(ends)
    assert kept == (ends[0] if ends else len(tokens))
    before = whole[: ends[0]] if ends else whole
    assert text.text == pieces == before[: min([before.find(s) for s in stops if s in before], default=None)]
