"""A problem, and an answer sampled for it, as they pass between tasks, rollouts and rewards.

Standard library only, since the processes that compute rewards import it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Problem:
    """A prompt (text or a chat), the reference answer, and the record it was made from."""

    prompt: str | Messages
    answer: str
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A sampled reply: its whole text, including `<think>` and `</think>` as written, and how it ended.

    `thinking` is the text before `</think>` (None without that mark), and `final` the text after it, or the
    whole text. `finish_reason` is "stop" or "length".
    """

    problem: Problem
    text: str
    thinking: str | None
    final: str
    tokens: int
    finish_reason: str
