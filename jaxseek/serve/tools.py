"""Tool calls in the text of a reply, found as it streams.

DeepSeek writes each call between marks (tokenizer/chat.py): V3 and R1 as `function<sep>NAME` and a fenced
JSON block of the arguments; V3.1 and V3.2-Exp as `NAME<sep>ARGUMENTS`.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass, field

from jaxseek.tokenizer.chat import CALL, CALL_END, CALLS, CALLS_END, SEP, begun

_FENCED = re.compile(
    r"\s*function" + re.escape(SEP) + r"(?P<name>[^\n]*)\n```json\n(?P<args>.*?)\n?```\s*", re.S
)
_BARE = re.compile(r"\s*(?P<name>.*?)" + re.escape(SEP) + r"(?P<args>.*)", re.S)


@dataclass(frozen=True)
class Call:
    """A call of a tool; `arguments` are the JSON text that the model wrote, which may be no JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def to_json(self) -> dict:
        """The call as the interface has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class ToolCalls:
    """Splits text into what is said and the calls in it. Text that only looks like a call is said."""

    def __init__(self) -> None:
        self._buffer, self._inside = "", False

    def feed(self, piece: str) -> list[str | Call]:
        """Return the text and the calls that are certain after `piece`, in order."""
        self._buffer += piece
        found: list[str | Call] = []
        while True:
            if not self._inside:
                said, opened, rest = self._buffer.partition(CALLS)
                if not opened:
                    sure = len(said) - begun(said, CALLS)
                    self._buffer = said[sure:]
                    return [*found, said[:sure]] if sure else found
                found += [said] if said.strip() else []
                self._buffer, self._inside = rest, True
            body, closed, rest = self._buffer.partition(CALL_END)
            ends = self._buffer.find(CALLS_END)
            if ends >= 0 and (not closed or ends < len(body)):
                self._buffer, self._inside = self._buffer[ends + len(CALLS_END) :], False
                continue
            if not closed:
                return found
            found.append(_call(body))
            self._buffer = rest

    def flush(self) -> list[str | Call]:
        """Return the rest at the end of the reply: a call that is cut off is text."""
        text, self._buffer = self._buffer, ""
        return [CALLS * self._inside + text] if text.strip() else []


def _call(body: str) -> str | Call:
    text = body.strip().removeprefix(CALL)
    match = _FENCED.fullmatch(text) or _BARE.fullmatch(text)
    return Call(match["name"].strip(), match["args"].strip()) if match else body + CALL_END
