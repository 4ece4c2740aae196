import pytest

from jaxseek.serve.engine_thread import Update
from jaxseek.serve.replies import Chat
from jaxseek.serve.tools import Call, ToolCalls
from jaxseek.tokenizer.chat import CALL, CALL_END, CALLS, CALLS_END, SEP

V3 = f'function{SEP}weather\n```json\n{{"city": "Oslo"}}\n```'
V31 = f'weather{SEP}{{"city": "Oslo"}}'


def split(text, size):
    parser = ToolCalls()
    parts = [p for i in range(0, len(text), size) for p in parser.feed(text[i : i + size])] + parser.flush()
    said = "".join(p for p in parts if isinstance(p, str))
    return said, [(c.name, c.arguments) for c in parts if isinstance(c, Call)]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("form", [V3, V31])
def test_calls_are_found_in_both_forms_however_the_text_is_cut(form, size):
    text = f"Let me look.{CALLS}{CALL}{form}{CALL_END}\n{CALL}{form}{CALL_END}{CALLS_END}"
    assert split(text, size) == ("Let me look.", [("weather", '{"city": "Oslo"}')] * 2)


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    "text", ["2 < 3 and <｜tool", f"{CALLS}{CALL}weather{SEP}{{", "no call", f"a{CALLS[:5]}b"]
)
def test_text_that_is_no_whole_call_is_said_as_it_is(text, size):
    assert split(text, size) == (text, [])


def test_a_body_without_a_separator_is_text():
    said, calls = split(f"{CALLS}{CALL}weather{CALL_END}{CALLS_END}", 3)
    assert calls == []
    assert "weather" in said


class Words:
    """A tokenizer whose only end is <end>."""

    eos_ids = (7,)

    def decode(self, ids, skip_special=True):
        return "<end>" if list(ids) == [7] else "word"


def test_a_chat_has_reasoning_content_and_calls_apart_and_ends_with_the_reason_tool_calls():
    chat = Chat(0, Words(), opened=True, with_tools=True)
    pieces = ["I ", "think</thi", "nk>So: ", f"{CALLS}{CALL}{V31}{CALL_END}{CALLS_END}<end>"]
    deltas = [chat.take(Update(piece)) for piece in pieces]
    assert chat.take(Update("", finish_reason="stop"))["finish_reason"] == "tool_calls"
    message = chat.whole()["message"]
    assert message["reasoning_content"] == "I think"
    assert message["content"].strip() == "So:"
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    streamed = [d["delta"] for d in deltas if d]
    assert "".join(d.get("reasoning_content", "") for d in streamed) == "I think"
    assert [c["id"] for d in streamed for c in d.get("tool_calls", [])] == [message["tool_calls"][0]["id"]]
