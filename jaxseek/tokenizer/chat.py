"""Render chat templates as segments, and split replies into reasoning and answer.

A template yields marks, which are its own, and plain strings, which are untrusted. The tokenizer encodes a
mark as its control token and a string as text, so that no message can forge a role, an end of sentence or a
tool result. Adjacent strings are encoded as one run, so the ids equal those of the whole rendered prompt.

The DeepSeek templates follow the releases (spec: model cards and tokenizer_config.json) and fix three bugs of
those files: a single V3 tool call is closed, and a second round of R1 tool calls or tool results opens its
block again. A model that brings a `chat_template` is rendered with it; one of these forms stands for it only
where both write the `PROBES` alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from jaxseek.tokenizer.template_process import TemplateFault, run_template

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": str, "tool_calls": optional list}"""

ROLES = ("system", "user", "assistant", "tool")


class TokenizerError(ValueError):
    """A tokenizer file, template or message cannot be used; says what was given and what to do."""


class UnusableTokenizer(TokenizerError):
    """A tokenizer is of an unknown kind, damaged, or another model's; the weights may be whole."""


class Mark(str):
    """The text of a control token; only templates create marks."""


BOS, EOS = Mark("<｜begin▁of▁sentence｜>"), Mark("<｜end▁of▁sentence｜>")
USER, ASSISTANT = Mark("<｜User｜>"), Mark("<｜Assistant｜>")
THINK, THINK_END = Mark("<think>"), Mark("</think>")
CALLS, CALLS_END = Mark("<｜tool▁calls▁begin｜>"), Mark("<｜tool▁calls▁end｜>")
CALL, CALL_END = Mark("<｜tool▁call▁begin｜>"), Mark("<｜tool▁call▁end｜>")
OUTPUTS, OUTPUTS_END = Mark("<｜tool▁outputs▁begin｜>"), Mark("<｜tool▁outputs▁end｜>")
OUTPUT, OUTPUT_END = Mark("<｜tool▁output▁begin｜>"), Mark("<｜tool▁output▁end｜>")
SEP = Mark("<｜tool▁sep｜>")
FIM_BEGIN, FIM_HOLE, FIM_END = Mark("<｜fim▁begin｜>"), Mark("<｜fim▁hole｜>"), Mark("<｜fim▁end｜>")

_R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: "
)


# ---- The DeepSeek templates: (messages, add_generation_prompt, thinking) -> segments.


def _v2(messages: Sequence[Message], generate: bool, thinking: bool | None) -> Iterator[str]:
    """DeepSeek LLM, Math, MoE, V2: plain-text roles (V2 tokenizer_config.json)."""
    yield BOS
    for message in messages:
        match message["role"]:
            case "system":
                yield message["content"] + "\n\n"
            case "user":
                yield f"User: {message['content']}\n\n"
            case "assistant":
                yield f"Assistant: {_plain(message, 'deepseek_v2')}"
                yield EOS
            case role:
                raise TokenizerError(f"deepseek_v2 has no form for a {role!r} message; leave it out")
    if generate:
        yield "Assistant:"


def _v3(messages: Sequence[Message], generate: bool, thinking: bool | None) -> Iterator[str]:
    """V3, V3-0324 and V2.5."""
    yield from _roles(messages, generate, opening=(), keep=lambda text: text, between_outputs="\n")


def _r1(messages: Sequence[Message], generate: bool, thinking: bool | None) -> Iterator[str]:
    """R1: V3 without the thoughts of earlier turns; `thinking` ends the prompt with `<think>`."""
    opening = (THINK, "\n") if thinking else ()
    yield from _roles(messages, generate, opening, keep=_after_last_thought, between_outputs="")


def _distill(messages: Sequence[Message], generate: bool, thinking: bool | None) -> Iterator[str]:
    """R1-Distill and later R1 releases: R1 that opens `<think>` unless `thinking` is False."""
    yield from _r1(messages, generate, thinking is not False)


def _roles(
    messages: Sequence[Message],
    generate: bool,
    opening: Sequence[str],
    keep: Callable[[str], str],
    between_outputs: str,
) -> Iterator[str]:
    """Common form of V3 and R1; a reply after tool results does not open a new turn."""
    yield BOS
    yield _system(messages)
    turns = [message for message in messages if message["role"] != "system"]
    for before, message, after in zip([None, *turns], turns, [*turns[1:], None]):
        follows_tool = before is not None and before["role"] == "tool"
        match message["role"]:
            case "user":
                yield from (USER, message["content"])
            case "assistant":
                if not follows_tool:
                    yield ASSISTANT
                yield keep(message.get("content") or "")
                for index, (kind, name, arguments) in enumerate(_tool_calls(message)):
                    yield "\n" if index else CALLS
                    yield from (CALL, kind, SEP, f"{name}\n```json\n{arguments}\n```", CALL_END)
                if message.get("tool_calls"):
                    yield CALLS_END
                yield EOS
            case "tool":
                yield between_outputs if follows_tool else OUTPUTS
                yield from (OUTPUT, message["content"], OUTPUT_END)
                if after is None or after["role"] != "tool":
                    yield OUTPUTS_END
    if generate and not (turns and turns[-1]["role"] == "tool"):
        yield from (ASSISTANT, *opening)


def _v3_1(messages: Sequence[Message], generate: bool, thinking: bool | None) -> Iterator[str]:
    """V3.1, V3.1-Terminus and V3.2-Exp: each new turn opens or closes `<think>`; history has no thoughts."""
    yield BOS
    yield _system(messages)
    role_before = None
    for message in messages:
        match message["role"]:
            case "system":
                continue
            case "user":
                yield from (USER, message["content"])
            case "assistant":
                if role_before == "user":
                    yield from (ASSISTANT, THINK_END)
                yield (message.get("content") or "").split(THINK_END, 1)[-1]
                if message.get("tool_calls"):
                    yield CALLS
                    for _, name, arguments in _tool_calls(message):
                        yield from (CALL, name, SEP, arguments, CALL_END)
                    yield CALLS_END
                yield EOS
            case "tool":
                yield from (OUTPUT, message["content"], OUTPUT_END)
        role_before = message["role"]
    if generate and role_before == "user":
        yield from (ASSISTANT, THINK if thinking else THINK_END)


def _r1_zero(messages: Sequence[Message], generate: bool, thinking: bool | None) -> Iterator[str]:
    """R1-Zero: one question to a base model, as a plain-text conversation (R1 paper, table 1)."""
    if len(messages) != 1 or messages[0]["role"] != "user":
        roles = [message["role"] for message in messages]
        raise TokenizerError(f"r1_zero takes exactly one user message, not {roles}")
    yield from split_marks(_R1_ZERO, (THINK, THINK_END))
    yield messages[0]["content"] + (". Assistant:" if generate else "")


def _system(messages: Sequence[Message]) -> str:
    return "\n\n".join(message["content"] for message in messages if message["role"] == "system")


def _after_last_thought(text: str) -> str:
    return text.rsplit(THINK_END, 1)[-1]


def _plain(message: Message, template: str) -> str:
    if message.get("tool_calls"):
        raise TokenizerError(f"{template} has no form for tool calls; send their text as content instead")
    return message["content"]


def _tool_calls(message: Message) -> Iterator[tuple[str, str, str]]:
    """Yield (type, name, arguments as JSON text) of each tool call, which has the OpenAI form."""
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            expected = '{"type": "function", "function": {"name": ..., "arguments": ...}}'
            raise TokenizerError(f"tool call {call!r} is not of the form {expected}")
        arguments = function.get("arguments", "{}")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        yield str(call.get("type", "function")), function["name"], arguments


# name -> (template, supported values of `thinking`)
TEMPLATES: dict[str, tuple[Callable[..., Iterator[str]], tuple[bool | None, ...]]] = {
    "deepseek_v2": (_v2, (None, False)),
    "deepseek_v3": (_v3, (None, False)),
    "deepseek_r1": (_r1, (None, False, True)),
    "deepseek_distill": (_distill, (None, False, True)),
    "deepseek_v3_1": (_v3_1, (None, False, True)),
    "r1_zero": (_r1_zero, (None, True)),
}


def render(
    template: str,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    thinking: bool | None = None,
) -> list[str]:
    """Render a conversation with a named template; `Mark`s are control tokens, other segments text."""
    if template not in TEMPLATES:
        raise TokenizerError(f"unknown chat template {template!r}; known: {', '.join(TEMPLATES)}, jinja")
    segments, modes = TEMPLATES[template]
    if thinking not in modes:
        raise TokenizerError(f"{template} has no thinking={thinking} mode; it takes {modes}")
    check_messages(messages)
    return list(segments(messages, add_generation_prompt, thinking))


def check_messages(messages: Sequence[Message]) -> None:
    """Raise TokenizerError unless every message has a known role and text content."""
    if not messages:
        raise TokenizerError("the conversation is empty; give at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise TokenizerError(f"message {index} is {message!r}; expected a dict with a role of {ROLES}")
        content = message.get("content")
        if message.get("prefix") and (message["role"] != "assistant" or index < len(messages) - 1):
            raise TokenizerError(
                f"message {index} ({message['role']}) has a prefix; only the last message can be the "
                "beginning of a reply, and it is the assistant's"
            )
        if content is None and message["role"] == "assistant" and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            raise TokenizerError(
                f"message {index} ({message['role']}) has content {content!r}; expected a string "
                "(only an assistant message with tool_calls may go without)"
            )


def check_tables(name: str, value: Any) -> None:
    """Raise TokenizerError unless tools or documents are a list of tables, as templates read them."""
    if not isinstance(value, list | tuple) or not all(isinstance(table, Mapping) for table in value):
        form = '{"type": "function", "function": {"name": ...}}' if name == "tools" else '{"title", "text"}'
        text = repr(value)
        text = text if len(text) <= 60 else text[:57] + "..."
        raise TokenizerError(f"{name} are {text}, expected a list of dicts such as {form}")


def detect(tokens: Collection[str], bos: str | None) -> str | None:
    """Tell the template of a tokenizer that brings none by its control tokens; None if they do not say."""
    if bos != BOS:
        return None
    if USER not in tokens:
        return "deepseek_v2"
    if THINK not in tokens:
        return "deepseek_v3"
    return "deepseek_v3_1" if "<｜search▁begin｜>" in tokens else "deepseek_r1"


# ---- Jinja: the template is trusted, messages are not.


def render_jinja(
    source: str,
    messages: Sequence[Message],
    control: Collection[str],
    given: Mapping[str, Any],
    **variables: Any,
) -> list[str]:
    """Render a conversation with a model's own `chat_template`, as transformers does, and split it at marks.

    `given` are the user's variables, such as tools and documents; `variables` are our own.
    If a message or tool spells one of the `control` tokens, the token's first character is replaced by a
    private one while the template runs, and restored in the output. Other messages reach the template
    unchanged, so its tests, splits and trims work. `<think>` and `</think>` in assistant messages stay, since
    templates look for them. Limit: a template that cuts messages and joins the parts could assemble a control
    token; templates are trusted not to.
    """
    check_messages(messages)
    messages = [{k: v for k, v in m.items() if v is not None or k == "content"} for m in messages]
    everything = source + json.dumps([messages, dict(given)], ensure_ascii=False, default=str)
    private = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in everything)
    masks = {first: next(private) for first in sorted({token[0] for token in control})}
    unmask = str.maketrans({mask: first for first, mask in masks.items()})
    unthinking = set(control) - {THINK, THINK_END}
    hidden = [_hide(m, unthinking if m["role"] == "assistant" else control, masks) for m in messages]
    try:
        given = {"tools": None, "documents": None, **{k: _hide(v, control, masks) for k, v in given.items()}}
        text = run_template(source, {**variables, **given, "messages": hidden})
    except TemplateFault as fault:
        raise TokenizerError(f"the model's chat_template {fault}") from None
    return [s if isinstance(s, Mark) else s.translate(unmask) for s in split_marks(text, control)]


def split_marks(text: str, control: Collection[str]) -> Iterator[str]:
    """Split trusted text into segments, with each control token (the longest match) as a Mark."""
    start = 0
    for match in re.finditer(_any_of(control), text):
        yield text[start : match.start()]
        yield Mark(match[0])
        start = match.end()
    yield text[start:]


def _any_of(tokens: Collection[str]) -> str:
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"


def _hide(value: Any, tokens: Collection[str], masks: Mapping[str, str]) -> Any:
    """Mask the first character of each of `tokens` in the strings of `value`.

    A token that begins at the end of a string is masked too, since the template's text might complete it.
    """
    if isinstance(value, Mapping):
        return {_hide(k, tokens, masks): _hide(v, tokens, masks) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hide(item, tokens, masks) for item in value]
    if not isinstance(value, str) or masks.keys().isdisjoint(value):
        return value
    whole, end, longest = re.compile(_any_of(tokens)), value.rstrip(), max(map(len, tokens), default=0)

    def spelled(i: int) -> bool:
        begun = len(end) - i < longest and any(token.startswith(end[i:]) for token in tokens)
        return begun or whole.match(value, i) is not None

    return "".join(masks[char] if char in masks and spelled(i) else char for i, char in enumerate(value))


# ---- Replies.


class ReasoningSplitter:
    """Splits a streamed reply into its reasoning and its answer.

    Text before `</think>` is reasoning, text after it is the answer. A reply contains `<think>` only if the
    prompt did not end with it; a reply that does not start with a thought is all answer. White space next to
    the tags is dropped. Tags may be split across pieces.
    """

    def __init__(self, prompt_opened_think: bool):
        self._state = "reasoning" if prompt_opened_think else "start"
        self._after_tag = prompt_opened_think
        self._buffer = ""

    def feed(self, piece: str) -> list[tuple[str, str]]:
        """Return the text that is certain after `piece`, as ("reasoning" | "answer", text) in order."""
        text, self._buffer = self._buffer + piece, ""
        if self._state == "start":
            reply = text.lstrip()
            if reply != THINK and THINK.startswith(reply):
                self._buffer = text
                return []
            self._after_tag = reply.startswith(THINK)
            self._state = "reasoning" if self._after_tag else "answer"
            text = reply.removeprefix(THINK) if self._after_tag else text
        if self._state == "answer":
            return self._part(text)
        thought, closed, answer = text.partition(THINK_END)
        sure = len(thought[: len(thought) - (0 if closed else begun(thought, THINK_END))].rstrip())
        parts = self._part(thought[:sure])
        if not closed:
            self._buffer = thought[sure:]
            return parts
        self._state, self._after_tag = "answer", True
        return parts + self._part(answer)

    def flush(self) -> list[tuple[str, str]]:
        """Return the text held back, at the end of the reply."""
        text, self._buffer = self._buffer, ""
        return self._part(text)

    def _part(self, text: str) -> list[tuple[str, str]]:
        if self._after_tag:
            text = text.lstrip()
            self._after_tag = not text
        return [("reasoning" if self._state == "reasoning" else "answer", text)] if text else []


def begun(text: str, tag: str) -> int:
    """Return the length of the longest suffix of `text` that begins `tag`."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)


def split_reasoning(text: str, prompt_opened_think: bool) -> tuple[str, str]:
    """Split a whole reply into (reasoning, answer); see ReasoningSplitter for the rule."""
    splitter = ReasoningSplitter(prompt_opened_think)
    parts = splitter.feed(text) + splitter.flush()
    reasoning, answer = ("".join(t for k, t in parts if k == kind) for kind in ("reasoning", "answer"))
    return reasoning, answer
