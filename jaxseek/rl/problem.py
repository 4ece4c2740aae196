"""What passes between tasks, rollouts and rewards: a problem, and an answer that was sampled for it.

Standard library only: the processes that compute rewards read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Problem:
    """A prompt (text, or a chat), the answer it should get, and the record it was made of."""

    prompt: str | Messages
    answer: str
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A sampled reply: its whole text, with `<think>` and `</think>` as written, and how it ended.

    `thinking` is what stands before `</think>` (None where there is no such mark) and `final` what follows
    it, else the whole text. `finish_reason` is "stop" or "length".
    """

    problem: Problem
    text: str
    thinking: str | None
    final: str
    tokens: int
    finish_reason: str
