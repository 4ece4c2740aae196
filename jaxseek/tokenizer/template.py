"""Examine chat templates: text, variables, the parts that they leave out, where a reply begins.

A built-in form (chat.py) stands for a model's own template only where both write the `PROBES` alike, and for
conversations with tool calls where both write the `TOOL_PROBES` alike.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxseek.storage.place import place
from jaxseek.tokenizer.chat import TEMPLATES, THINK, Message, TokenizerError
from jaxseek.tokenizer.template_process import TemplateFault, template_variables

_ASK, _CALL = {"role": "user", "content": " 1+1? \n"}, {"name": "add", "arguments": '{"a": 1}'}
_SAY = {"role": "assistant", "content": "<think>\nOne\n</think>\n\n 2 "}
_SYSTEM = {"role": "system", "content": " Be brief. \n"}
# Conversations that a form and a chat_template must write alike for the one to stand for the other.
PROBES: tuple[list[dict[str, Any]], ...] = (
    [_ASK],
    [_SYSTEM, _ASK],
    [_SYSTEM, _ASK, {"role": "assistant", "content": " 2 "}, _ASK],
    [_ASK, _SAY],
    [_ASK, _SAY, _ASK],
)
_CALLS = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": _CALL}]}
TOOL_PROBES = ([_ASK, _CALLS], [_ASK, _CALLS, {"role": "tool", "content": " 2 "}])
_OURS = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
SWITCHES = frozenset(("thinking", "enable_thinking"))  # variables by which templates turn thinking on and off


def thinks(reply: Message) -> bool:
    """Return whether a reply begins with a thought."""
    return (reply.get("content") or "").lstrip().startswith(THINK)


def mode_for(template: str | None, reply: Message) -> bool | None:
    """Return the `thinking` by which a built-in form's prompt goes on with this reply."""
    if thinks(reply):
        return True if template == "deepseek_v3_1" else None
    return False if template == "deepseek_distill" else None


def after_prompt(template: str | None, reply: str, tail: str) -> str:
    """Return the text of a reply after a prompt that ends in `tail`, which may have opened its thought."""
    if tail.rstrip().endswith(THINK) and reply.lstrip().startswith(THINK):
        reply = reply.lstrip().removeprefix(THINK)
        reply = reply.removeprefix("\n") if tail.endswith("\n") else reply
    return f" {reply}" if template == "deepseek_v2" else reply  # its prompt ends in "Assistant:"


def cut(render: Callable[[list[Message]], list[str]], messages: Sequence[Message]) -> list[str]:
    """Return the segments of a conversation up to the end of its last message's content.

    Empty where the template does not write that content whole, as one that drops thoughts does not.
    """
    *before, last = messages
    tag = uuid.uuid4().hex
    segments = render([*before, {**last, "content": last["content"] + tag}])
    for n, segment in reversed(list(enumerate(segments))):
        begun, found, _ = segment.rpartition(tag)
        if found:
            kept = [*segments[:n], begun]
            return kept if "".join(kept).endswith(last["content"]) else []
    return []


NEEDED = ("tools", "documents", "tool_calls", "tool messages")  # without which a model would answer blindly


def parts(
    messages: Sequence[Message], tools: Any, documents: Any
) -> Iterator[tuple[str, tuple[list[Message], bool, Any, Any]]]:
    """Yield the parts of a conversation beside its texts: their name, and what to render without each."""
    every: list[Message] = list(messages)
    for role in ("system", "tool"):
        rest = [m for m in every if m["role"] != role]
        if len(rest) < len(every):
            yield f"{role} messages", (rest, True, tools, documents)
    for key in dict.fromkeys(k for m in every for k in m if m[k] is not None):
        if key not in ("role", "content", "prefix"):
            rest: list[Message] = [{k: v for k, v in m.items() if k != key} for m in every]
            yield key, (rest, True, tools, documents)
    if tools:
        yield "tools", (every, True, None, documents)
    if documents:
        yield "documents", (every, True, tools, None)


def variables(source: str) -> frozenset[str]:
    """Return the variables that a Jinja template reads. Raises TokenizerError where it cannot be parsed."""
    try:
        return template_variables(source)
    except TemplateFault as fault:
        raise TokenizerError(f"the model's chat_template cannot be parsed: it {fault}") from None


def check_variables(source: str, given: Mapping[str, Any]) -> None:
    """Raise TokenizerError for variables that a Jinja template does not read."""
    if taken := sorted(given.keys() & {"messages", "tools", "documents"}):
        raise TokenizerError(f"{taken[0]} is no variable to set: give it as the argument of that name")
    known = variables(source)
    if unknown := sorted(given.keys() - known):
        own = ", ".join(sorted(n for n in known - _OURS if not n.endswith("_token"))) or "none"
        raise TokenizerError(f"the chat template has no variable {', '.join(unknown)}; it has {own}")


def template_text(given: str | Path, own: Collection[str] = ()) -> str:
    """Return the text of a Jinja template that is given itself, or as a file. Raises TokenizerError."""
    if isinstance(given, str) and ("{%" in given or "{{" in given):
        return given
    try:
        return place(given).read_text(encoding="utf-8")
    except FileNotFoundError:
        known = ", ".join((*own, *TEMPLATES))
        raise TokenizerError(
            f"template is {str(given)!r}, which is no file; expected one, the text of a Jinja template, or "
            f"a name: {known}, jinja"
        ) from None
    except UnicodeError as error:
        raise TokenizerError(f"{given}: not a text file in UTF-8 ({error})") from None
