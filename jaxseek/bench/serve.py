"""Throughput and latencies of a server with the OpenAI interface, ours or another, at several loads."""

from __future__ import annotations

import http.client
import json
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlparse

import numpy as np

from jaxseek.config.model import ConfigError


@dataclass
class _Load:
    """Measurements of one load: seconds to each first token and between tokens, tokens, requests, errors."""

    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    tokens: int = 0
    requests: int = 0
    errors: list[str] = field(default_factory=list)


def bench_serve(
    url: str,
    clients: Sequence[int] = (1, 8, 32),
    seconds: float = 30.0,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    model: str | None = None,
    key: str | None = None,
    as_json: bool = False,
) -> list[dict[str, Any]]:
    """Have so many clients at a time ask for streamed completions, one after another, for so many seconds.

    A prompt has `prompt_tokens` words and an answer `new_tokens` tokens at most, each times 0.25 to 1.75 and
    the same in every run. Requests under way at the end are waited for. Prints a table or a line of JSON and
    returns its rows. Raises ConfigError if the server cannot be reached or answers with errors alone.
    """
    where = urlparse(url if "//" in url else f"http://{url}")
    if where.scheme not in ("http", "https") or not where.hostname:
        raise ConfigError(f"the server is {url!r}, expected an address such as http://localhost:8000")
    model = model or _first_model(where, key)
    rows = []
    for number in clients:
        load, start = _Load(), time.perf_counter()
        end = start + seconds
        asked = {"where": where, "key": key, "model": model, "sizes": (prompt_tokens, new_tokens)}
        threads = [
            threading.Thread(target=_client, args=(i, end, load), kwargs=asked, daemon=True)
            for i in range(number)
        ]
        for thread in threads:
            thread.start()
        print(f"{number} clients for {seconds:g} s", end="\r", file=sys.stderr, flush=True)
        for thread in threads:
            thread.join()
        if not load.first:
            raise ConfigError(f"{url} gave no answer: {load.errors[0] if load.errors else 'nothing came'}")
        took = time.perf_counter() - start
        rows.append(
            {"clients": number, "requests": load.requests, "errors": len(load.errors)}
            | {"tokens_per_second": load.tokens / took}
            | {f"first_token_p{p}": float(np.percentile(load.first, p)) for p in (50, 90, 99)}
            | {f"each_token_p{p}": float(np.percentile(load.each or [0.0], p)) for p in (50, 90, 99)}
        )
    if as_json:
        print(json.dumps({"url": url, "model": model, "rows": rows}))
    else:
        _report(url, str(model), rows)
    return rows


def _connection(where: Any) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
    return kind(where.netloc, timeout=600)


def _headers(key: str | None) -> dict[str, str]:
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _first_model(where: Any, key: str | None) -> str:
    connection = _connection(where)
    try:
        connection.request("GET", f"{where.path.rstrip('/')}/v1/models", headers=_headers(key))
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise ConfigError(
                f"{where.geturl()} answers {response.status}: {body[:200].decode(errors='replace')}"
            )
        return json.loads(body)["data"][0]["id"]
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(f"{where.geturl()} cannot be reached: {error}") from None
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"{where.geturl()} does not list its models as OpenAI's interface does") from None
    finally:
        connection.close()


def _client(
    number: int, end: float, load: _Load, where: Any, key: str | None, model: str, sizes: tuple[int, int]
) -> None:
    draw = random.Random(number)
    while time.perf_counter() < end and len(load.errors) < 100:
        words, new = (max(1, round(n * draw.uniform(0.25, 1.75))) for n in sizes)
        prompt = " ".join(draw.choice(("one", "two", "three", "four", "five")) for _ in range(words))
        body = {
            "model": model, "prompt": prompt, "max_tokens": new, "temperature": 0.7,
            "seed": draw.getrandbits(31), "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        connection = _connection(where)
        try:
            _ask(connection, where, json.dumps(body), _headers(key), load)
        except (OSError, http.client.HTTPException, ValueError) as error:
            load.errors.append(str(error) or type(error).__name__)
        finally:
            connection.close()


def _ask(connection: Any, where: Any, body: str, headers: dict[str, str], load: _Load) -> None:
    start, first, tokens = time.perf_counter(), None, 0
    connection.request("POST", f"{where.path.rstrip('/')}/v1/completions", body, headers)
    response = connection.getresponse()
    if response.status != 200:
        raise ValueError(f"status {response.status}: {response.read(500).decode(errors='replace')}")
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise ValueError(event["error"].get("message", "an error in the stream"))
        if event.get("choices") and first is None:
            first = time.perf_counter()
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    if first is None:
        raise ValueError("the stream had no token")
    load.first.append(first - start)
    load.tokens, load.requests = load.tokens + tokens, load.requests + 1
    if tokens > 1:
        load.each.append((time.perf_counter() - first) / (tokens - 1))


def _report(url: str, model: str, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from jaxseek.machine.terminal import PlainConsole

    table = Table("clients", "requests", "errors", "tok/s", title=f"{model} at {url}")
    for name in ("first token p50", "p90", "p99", "each token p50", "p90", "p99"):
        table.add_column(name, justify="right")
    for row in rows:
        latencies = [
            f"{1000 * row[f'{kind}_token_p{p}']:.0f} ms" for kind in ("first", "each") for p in (50, 90, 99)
        ]
        counts = [str(row[name]) for name in ("clients", "requests", "errors")]
        table.add_row(*counts, f"{row['tokens_per_second']:.1f}", *latencies)
    PlainConsole().print(table)
