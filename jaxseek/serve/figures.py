"""Figures for Prometheus: load, latencies, tokens."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from jaxseek.serve.engine_thread import Job

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_WHOLE = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Figures:
    """The figures behind /metrics; the engine's thread writes them."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.running = Gauge("jaxseek_requests_running", "Requests that have a slot", registry=registry)
        self.waiting = Gauge("jaxseek_requests_waiting", "Requests without a slot", registry=registry)
        self.ends = Counter("jaxseek_requests", "Requests that ended", ["finish_reason"], registry=registry)
        self.refused = Counter("jaxseek_refused", "Requests refused", ["status"], registry=registry)
        self.prompt = Counter("jaxseek_prompt_tokens", "Tokens of prompts", registry=registry)
        self.new = Counter("jaxseek_generated_tokens", "New tokens", registry=registry)
        self.first = Histogram(
            "jaxseek_time_to_first_token_seconds", "From arrival", buckets=_FIRST, registry=registry
        )
        self.each = Histogram(
            "jaxseek_time_per_token_seconds",
            "Of an answer after its first token",
            buckets=_EACH,
            registry=registry,
        )
        self.whole = Histogram(
            "jaxseek_request_seconds", "From arrival to end", buckets=_WHOLE, registry=registry
        )
        self._first_at: dict[int, float] = {}

    def load(self, running: int, waiting: int) -> None:
        """Note what the engine has."""
        self.running.set(running)
        self.waiting.set(waiting)

    def tokens(self, job: Job, first: bool, count: int) -> None:
        """Note new tokens of a job."""
        self.new.inc(count)
        if first:
            self.prompt.inc(len(job.request.prompt))
            self._first_at[id(job)] = now = time.perf_counter()
            self.first.observe(now - job.begun)

    def ended(self, job: Job, reason: str) -> None:
        """Note the end of a job."""
        now = time.perf_counter()
        self.ends.labels(reason).inc()
        self.whole.observe(now - job.begun)
        begun = self._first_at.pop(id(job), None)
        if begun is not None and job.told > 1:
            self.each.observe((now - begun) / (job.told - 1))

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)
