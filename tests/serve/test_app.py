"""The server, asked by the openai client as it is and by sockets that misbehave."""

import contextlib
import http.client
import json
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlparse

import openai
import pytest
from served import model_and_tokenizer, served

from jaxseek.bench.serve import bench_serve
from jaxseek.config.model import ConfigError
from jaxseek.engine.engine import Engine
from jaxseek.engine.generate import request, seed_for
from jaxseek.engine.sampling import Sampling
from jaxseek.serve.schema import CompletionRequest
from jaxseek.tokenizer.chat import split_reasoning

HI = [{"role": "user", "content": "the fox"}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return model_and_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def running(pair):
    with served(*pair, queue=40, body_bytes=100_000, body_seconds=1.5) as (server, url):
        yield server, url


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running[1]}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def alone(pair, ids, seed=0, new=12, **settings):
    model, tokenizer = pair
    sampling = Sampling(max_new_tokens=new, seed=seed_for(seed, ids), **settings)
    (answer,) = Engine(model, 1).answers([request(model, tokenizer, ids, sampling)])
    return answer


def idle(server):
    """Wait until nothing is left in the engine."""
    for _ in range(200):
        if not server.engine.busy and not server.open:
            return True
        time.sleep(0.05)
    return False


def post(url, body, path="/v1/chat/completions", headers=()):
    with contextlib.closing(http.client.HTTPConnection(urlparse(url).netloc, timeout=60)) as connection:
        connection.request("POST", path, body, {"Content-Type": "application/json", **dict(headers)})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


# -------------------------------------------------------------------- answers


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.8, "seed": 5}])
def test_a_chat_is_what_the_engine_says_alone_whole_and_streamed(client, pair, settings):
    ids = pair[1].render_chat(HI)
    own = {"temperature": 0.0} if settings["temperature"] == 0 else {"temperature": 0.9, "top_p": 0.8}
    expected = alone(pair, ids, settings.get("seed", 0), **own)
    whole = client.chat.completions.create(model="tiny", messages=HI, max_tokens=12, **settings)
    assert whole.choices[0].message.content == split_reasoning(expected.text, False)[1]
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), len(expected.tokens))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(
        client.chat.completions.create(model="tiny", messages=HI, max_tokens=12, **settings, **options)
    )
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason


def test_thinking_is_apart_where_it_is_asked_for(client, pair):
    expected = alone(pair, pair[1].render_chat(HI, thinking=True), temperature=0.0)
    found = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=12, temperature=0, extra_body={"thinking": {"type": "enabled"}}
    )
    reasoning, said = split_reasoning(expected.text, True)
    assert found.choices[0].message.reasoning_content == reasoning
    assert reasoning
    assert (found.choices[0].message.content or "") == said


def test_completions_take_texts_and_tokens_with_their_log_probabilities(client, pair):
    ids = pair[1].encode("the quick")
    expected = alone(pair, ids, temperature=0.0, new=6)
    for prompt in ("the quick", ids, ["the quick", "the quick"]):
        found = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=6, temperature=0, logprobs=1
        )
        for choice in found.choices:
            assert choice.text == expected.text
            assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    echo = {"model": "tiny", "prompt": "the quick", "max_tokens": 6, "temperature": 0, "echo": True}
    assert client.completions.create(**echo).choices[0].text == "the quick" + expected.text
    scored = client.completions.create(**echo, logprobs=2).choices[0].logprobs
    assert scored.token_logprobs[0] is None
    assert len(scored.tokens) == len(scored.top_logprobs) == len(ids) + 6
    assert scored.token_logprobs[len(ids) :] == pytest.approx(expected.logprobs, abs=1e-5)


def test_biases_penalties_and_the_likeliest_tokens(client, pair):
    wanted = pair[1].encode("fox", bos=False)[-1]
    asked = {"model": "tiny", "messages": HI, "max_tokens": 4, "temperature": 0, "logprobs": True}
    found = client.chat.completions.create(**asked, top_logprobs=3, logit_bias={str(wanted): 100})
    content = found.choices[0].logprobs.content
    assert {c.token for c in content} == {pair[1].decode([wanted], skip_special=False)}
    assert all(len(c.top_logprobs) == 3 and c.top_logprobs[0].logprob >= c.logprob for c in content)
    less = {"frequency_penalty": 2, "presence_penalty": 2, "logit_bias": {str(wanted): 10}}
    other = client.chat.completions.create(**asked, **less)
    assert len({c.token for c in other.choices[0].logprobs.content}) > 1


def test_a_message_that_was_begun_goes_on(running, pair):
    begun = {"role": "assistant", "content": "brown"}
    ids = pair[1].render_chat([*HI, begun], continue_final_message=True, add_generation_prompt=False)
    assert pair[1].decode(ids, skip_special=False).endswith("brown")
    expected = alone(pair, ids, temperature=0.0)
    for options in (
        {"messages": [*HI, begun | {"prefix": True}]},
        {"messages": [*HI, begun], "continue_final_message": True},
    ):
        status, found = post(running[1], json.dumps({"max_tokens": 12, "temperature": 0} | options))
        assert status == 200
        assert found["choices"][0]["message"]["content"] == expected.text


def test_many_clients_get_what_each_would_get_alone(client, pair):
    texts = [
        f"{word} {n}" for n in range(6) for word in ("fox", "the lazy dog jumps over", "a b c d e f " * 6)
    ]

    def ask(n):
        own = {"temperature": 0 if n % 2 else 0.8, "seed": n, "top_p": 0.9}
        return client.completions.create(model="tiny", prompt=texts[n], max_tokens=3 + n, n=1 + n % 2, **own)

    with ThreadPoolExecutor(len(texts)) as pool:
        found = list(pool.map(ask, range(len(texts))))
    for n, one in enumerate(found):
        for i, choice in enumerate(one.choices):
            ids, warm = pair[1].encode(texts[n]), 0.0 if n % 2 else 0.8
            expected = alone(pair, ids, n + i, new=3 + n, temperature=warm, top_p=0.9)
            assert choice.text == expected.text


def test_streamed_log_probabilities_are_those_of_every_token(client):
    asked = {"model": "tiny", "messages": HI, "max_tokens": 30, "temperature": 0, "logprobs": True}
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    parts = [c.choices[0].logprobs for c in client.chat.completions.create(**asked, stream=True)]
    told = [one.logprob for part in parts if part for one in part.content]
    assert told == pytest.approx([one.logprob for one in whole], abs=1e-5)


def test_the_models_own_settings_hold_unless_a_request_says_otherwise(running):
    server, _ = running
    generation = server.engine.model.cfg.generation
    generation |= {"repetition_penalty": 1.5, "temperature": 0.3, "top_k": 7}
    try:
        body = CompletionRequest(prompt="x", temperature=0.9)
        (found,) = server.jobs(body, [[3, 4]], 4)
    finally:
        generation.clear()
    sampling = found.sampling
    assert (sampling.repetition_penalty, sampling.temperature, sampling.top_k) == (1.5, 0.9, 7)


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": HI, "colour": 1}, "colour: is not a field"),
        ({"messages": HI, "temperature": -1}, "temperature"),
        ({"messages": HI, "max_tokens": 0}, "max_tokens"),
        ({"messages": HI, "n": 10**6}, "n: "),
        ({"messages": HI, "presence_penalty": 9}, "presence_penalty"),
        ({"messages": HI, "logit_bias": {"100000": 1}}, "100000"),
        ({"messages": HI, "logit_bias": {"x": 1}}, "logit_bias"),
        ({"messages": HI, "top_logprobs": 2}, "top_logprobs is given without logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": "dog " * 400}]}, "leaves no room"),
        ({"messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tool"),
        ({"messages": HI, "stream_options": {}}, "stream_options"),
        ({"messages": HI, "seed": 2**70}, "seed"),
        ({}, "messages"),
        ([], "dictionary"),
    ],
)
def test_a_request_that_is_not_right_is_told_by_its_field(running, body, said):
    status, found = post(running[1], json.dumps(body))
    assert status == 400
    assert said in found["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"messages": "\xff"}', b"[" * 50_000, b'{"messages": NaN}', b"nul\x00", b'"\\ud800"'],
)
def test_a_body_that_is_no_json_is_refused(running, body):
    assert post(running[1], body)[0] == 400


def test_other_models_paths_and_methods_are_refused(client, running):
    with pytest.raises(openai.NotFoundError, match="'gpt' is not here, but 'tiny'"):
        client.chat.completions.create(model="gpt", messages=HI)
    assert post(running[1], b"{}", "/v2")[0] == 404
    assert post(running[1], b"{}", "/v1/models")[0] == 405


def test_a_large_body_and_a_slow_one_are_refused(running):
    assert post(running[1], b" " * 200_000)[0] == 413
    host, port = urlparse(running[1]).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in slow.recv(1000)


def test_more_answers_than_may_wait_are_refused(running):
    status, found = post(running[1], json.dumps({"messages": HI, "n": 100}))
    assert status == 429
    assert found["error"]["type"] == "rate_limit_error"


def test_filling_in_needs_a_tokenizer_that_has_marks_for_it(running):
    status, found = post(running[1], json.dumps({"prompt": "a", "suffix": "b"}), "/v1/completions")
    assert status == 400
    assert "fim" in found["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_takes_too_long_is_ended(pair, stream):
    with served(*pair, timeout=0.05) as (server, url):
        body = json.dumps({"messages": HI, "max_tokens": 240, "temperature": 0, "stream": stream})
        with contextlib.closing(http.client.HTTPConnection(urlparse(url).netloc, timeout=60)) as connection:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            said = response.read().decode()
        assert response.status == (200 if stream else 504)
        assert "not whole within 0.05 s" in said
        assert idle(server)


def test_a_key_is_asked_for(pair):
    with served(*pair, keys=("right",)) as (_, url):
        body = json.dumps({"messages": HI, "max_tokens": 1})
        assert post(url, body)[0] == 401
        assert post(url, body, headers={"Authorization": "Bearer wrong"})[0] == 401
        assert post(url, body, headers={"Authorization": "Bearer right"})[0] == 200


# -------------------------------------------------------------------- clients that leave, and the rest


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(running, stream):
    server, url = running
    host, port = urlparse(url).netloc.split(":")
    asked = {"messages": HI, "max_tokens": 240, "stream": stream, "n": 20}  # of which four run at a time
    body = json.dumps(asked).encode()
    before = server.figures.ends.labels("cancelled")._value.get()
    with socket.create_connection((host, int(port)), timeout=20) as leaver:
        leaver.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        if stream:
            leaver.recv(200)
        else:
            for _ in range(100):
                if server.engine.busy:
                    break
                time.sleep(0.01)
    assert idle(server)
    assert server.figures.ends.labels("cancelled")._value.get() > before


def test_tokens_there_and_back_and_figures(running, client, pair):
    status, found = post(running[1], json.dumps({"prompt": "the fox"}), "/tokenize")
    assert (status, found["tokens"]) == (200, pair[1].encode("the fox"))
    status, back = post(running[1], json.dumps({"tokens": found["tokens"][1:]}), "/detokenize")
    assert (status, back["prompt"]) == (200, "the fox")
    assert post(running[1], json.dumps({"tokens": [10**6]}), "/detokenize")[0] == 400
    with urllib.request.urlopen(f"{running[1]}/metrics") as response:
        text = response.read().decode()
    assert "jaxseek_generated_tokens_total" in text
    assert "jaxseek_time_to_first_token_seconds_bucket" in text
    assert [m.id for m in client.models.list()] == ["tiny"]


def test_bench_reports_tokens_latencies_and_a_server_that_is_not_there(running, capsys):
    (row,) = bench_serve(running[1], (2,), 0.3, 8, 4, as_json=True)
    assert row["errors"] == 0
    assert row["requests"] >= 2
    assert 0 < row["first_token_p50"] <= row["first_token_p99"]
    assert json.loads(capsys.readouterr().out)["model"] == "tiny"
    with pytest.raises(ConfigError, match="cannot be reached"):
        bench_serve("http://127.0.0.1:9", (1,), 0.1)


def test_stopping_waits_for_answers_that_are_under_way(pair):
    done = {}

    def ask(url):
        done["answer"] = post(url, json.dumps({"messages": HI, "max_tokens": 200, "temperature": 0}))

    with served(*pair) as (server, url):
        thread = threading.Thread(target=ask, args=(url,))
        thread.start()
        for _ in range(200):
            if server.engine.busy:
                break
            time.sleep(0.01)
    thread.join()
    assert done["answer"][0] == 200
