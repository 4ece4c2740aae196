"""Which chat template is used, what it gets, what it leaves out, and where a reply begins."""

import json
from pathlib import Path

import pytest
import tokenizers

from jaxseek.engine.text import encode
from jaxseek.tokenizer import chat
from jaxseek.tokenizer.chat import TokenizerError
from jaxseek.tokenizer.tokenizer import Tokenizer

BOS, EOS, USER, BOT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
MARKS = [str(mark) for mark in vars(chat).values() if isinstance(mark, chat.Mark)]
NO_THINK = [mark for mark in MARKS if mark not in ("<think>", "</think>")]
ASK = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "add"}}]

# Jinja in the wording of the released families.
SYSTEM = "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
CALL = (
    "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>' + c.function.name + '\\n```json\\n' "
)
CALL += "+ c.function.arguments + '\\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'"
R1 = (
    SYSTEM
    + "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    + "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] }}"
    + "{% for c in m.tool_calls or [] %}{{ "
    + CALL
    + " }}{% endfor %}{{ eos_token }}"
    + "{% elif m.role == 'tool' %}{{ '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + m.content + "
    + "'<｜tool▁output▁end｜><｜tool▁outputs▁end｜>' }}{% endif %}{% endfor %}"
    + "{% if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<｜Assistant｜>' }}{% endif %}"
)
DISTILL = R1.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\\n' }}")
V3 = R1.replace(".split('</think>')[-1]", "")
V3_1 = (
    SYSTEM
    + "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    + "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜></think>' + m.content.split('</think>', 1)[-1] }}"
    + "{{ eos_token }}{% endif %}{% endfor %}"
    + "{% if add_generation_prompt and messages[-1].role == 'user' %}"
    + "{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}"
)
V2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}{% elif m.role == 'system' %}"
    "{{ m.content + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CHATML = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
CHATML += "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"


def made(folder, template=None, marks=MARKS, **config):
    """A tokenizer of bytes and DeepSeek's control tokens, with this chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tok = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.add_tokens([tokenizers.AddedToken(m, special=m in (BOS, EOS), normalized=False) for m in marks])
    tok.save(str(folder / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": EOS, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | config), "utf-8")
    return Tokenizer.from_dir(folder)


@pytest.fixture
def load(tmp_path):
    return lambda *args, **config: made(tmp_path / "tokenizer", *args, **config)


def shown(tokenizer, *args, **options):
    return tokenizer.decode(tokenizer.render_chat(*args, **options), skip_special=False)


# ---- Which template.


@pytest.mark.parametrize(
    ("template", "marks", "name"),
    [
        (V2, NO_THINK, "deepseek_v2"), (V3, NO_THINK, "deepseek_v3"), (R1, MARKS, "deepseek_r1"),
        (DISTILL, MARKS, "deepseek_distill"), (V3_1, MARKS, "deepseek_v3_1"),
    ],
)  # fmt: skip
def test_a_built_in_form_stands_for_a_template_that_writes_the_same(load, template, marks, name):
    assert load(template, marks).template == name


@pytest.mark.parametrize(
    "template",
    [
        R1.replace("{{ bos_token }}", "{{ bos_token }}Be kind."), R1.replace(".split('</think>')[-1]", ""),
        R1.replace("{{ bos_token }}", ""), R1.replace("m.content", "(m.content | trim)"),
        R1.replace("'<｜User｜>' +", "'<｜User｜>\\n' +"), R1.replace("{{ eos_token }}", ""),
        DISTILL.replace("<think>\\n", "<think>"), V3_1.replace("if thinking", "if not thinking"),
        V2.replace("'User: '", "'### User: '"), CHATML, "{{ raise_exception('no') }}", "{% if %}", "",
    ],
)  # fmt: skip
def test_a_template_that_writes_anything_else_is_used_itself(load, template):
    tokenizer = load(template)
    assert tokenizer.template == ("jinja" if template else "deepseek_r1")
    if template in (CHATML, DISTILL.replace("<think>\\n", "<think>")):
        assert shown(tokenizer, ASK) == ("[user]Hi" + EOS + "[assistant]" if template == CHATML else
                                         BOS + USER + "Hi" + BOT + "<think>")  # fmt: skip


def test_a_form_serves_tool_calls_only_where_it_writes_them_alike(load):
    calls = {
        "role": "assistant",
        "content": "",
        "tool_calls": [TOOLS[0] | {"function": {"name": "f", "arguments": "{}"}}],
    }
    as_released = f"{BOS}{USER}Hi{BOT}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
    assert shown(load(R1), [*ASK, calls]).startswith(as_released)
    other = load(R1.replace("c.function.name", "c.function.name + '!'"))
    assert other.template == "deepseek_r1"
    assert shown(other, [*ASK, calls]).startswith(as_released.replace("f\n", "f!\n"))


def test_a_template_is_given_by_name_as_text_or_as_a_file(load, tmp_path):
    tokenizer = load(R1)
    (tmp_path / "own.jinja").write_text(CHATML, "utf-8")
    for given in (CHATML, tmp_path / "own.jinja", str(tmp_path / "own.jinja")):
        assert shown(tokenizer, ASK, template=given) == f"[user]Hi{EOS}[assistant]"
        assert shown(Tokenizer.from_dir(tmp_path / "tokenizer", template=given), ASK).startswith("[user]Hi")
    assert shown(tokenizer, ASK, template="deepseek_v2") == f"{BOS}User: Hi\n\nAssistant:"
    assert shown(tokenizer, ASK, template="jinja") == shown(tokenizer, ASK)
    with pytest.raises(TokenizerError, match=r"template is 'nowhere.jinja', which is no file; expected one"):
        tokenizer.render_chat(ASK, template="nowhere.jinja")


def test_named_templates_of_a_checkpoint_are_found_and_that_for_tools_is_used(load, tmp_path):
    listed = [
        {"name": "default", "template": CHATML},
        {"name": "tool_use", "template": "{{ tools[0].function.name }}"},
    ]
    tokenizer = load(listed)
    assert shown(tokenizer, ASK, tools=TOOLS) == "add"
    (tmp_path / "tokenizer" / "additional_chat_templates").mkdir()
    (tmp_path / "tokenizer" / "additional_chat_templates" / "rag.jinja").write_text("{{ documents[0].text }}")
    (tmp_path / "tokenizer" / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'older' }}"}))
    tokenizer = Tokenizer.from_dir(tmp_path / "tokenizer")
    assert shown(tokenizer, ASK, documents=[{"text": "found"}], template="rag") == "found"
    assert shown(tokenizer, ASK) == "older"
    tokenizer.save(tmp_path / "copy")
    assert shown(Tokenizer.from_dir(tmp_path / "copy"), ASK, template="rag", documents=[{"text": "a"}]) == "a"


# ---- Variables, tools, keys.


def test_variables_reach_the_template_and_unknown_ones_are_errors(load):
    tokenizer = load("{{ style }}{% if enable_thinking is false %}{{ '!' }}{% endif %}")
    both = {"style": "<｜User｜>", "enable_thinking": False}
    ids = tokenizer.render_chat(ASK, chat_template_kwargs=both)
    assert tokenizer.decode(ids) == "<｜User｜>!"
    assert tokenizer.token_id(USER) not in ids  # text of a user stays text
    with pytest.raises(TokenizerError, match="no variable stile; it has enable_thinking, style"):
        tokenizer.render_chat(ASK, chat_template_kwargs={"stile": 1})
    r1 = load(R1)
    assert shown(r1, ASK, chat_template_kwargs={"enable_thinking": True}).endswith("<think>\n")
    with pytest.raises(TokenizerError, match="no variable style"):
        r1.render_chat(ASK, chat_template_kwargs={"style": 1})


@pytest.mark.parametrize("template", [CHATML, R1, V2, None])
@pytest.mark.parametrize("given", [{"tools": TOOLS}, {"documents": [{"text": "a"}]}])
def test_tools_and_documents_that_a_template_does_not_write_are_errors(load, template, given):
    with pytest.raises(TokenizerError, match=f"writes no {next(iter(given))}|no fixed wording for"):
        load(template).render_chat(ASK, **given)


def test_what_tools_are_is_checked_and_names_of_arguments_are_no_variables(load):
    tokenizer = load("{{ tools }}{{ messages }}")
    for tools in (["f"], {"name": "f"}, [print]):
        with pytest.raises(TokenizerError, match=r"tools are .* expected a list of dicts"):
            tokenizer.render_chat(ASK, tools=tools)
    with pytest.raises(TokenizerError, match="messages is no variable to set"):
        tokenizer.render_chat(ASK, chat_template_kwargs={"messages": []})


def test_of_several_templates_without_a_default_one_is_to_be_named(load):
    tokenizer = load([{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "{{ tools }}b"}])
    assert tokenizer.template is None
    with pytest.raises(TokenizerError, match="no chat template; pass template= one of rag, tool_use"):
        tokenizer.render_chat(ASK)
    assert shown(tokenizer, ASK, template="rag") == "a"
    assert shown(tokenizer, ASK, tools=TOOLS).endswith("b")


def test_tools_that_the_own_template_writes_are_rendered_by_it_though_a_form_stands_for_it(load):
    tokenizer = load("{{ tools | tojson if tools else '' }}" + R1)
    assert tokenizer.template == "deepseek_r1"
    assert shown(tokenizer, ASK, tools=TOOLS).startswith(json.dumps(TOOLS) + BOS)


def test_messages_of_tools_that_a_template_leaves_out_are_an_error_and_of_the_system_a_warning(load, caplog):
    only_users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    tokenizer = load(only_users)
    with pytest.raises(TokenizerError, match="writes no tool messages"):
        tokenizer.render_chat([*ASK, {"role": "tool", "content": "2"}])
    assert shown(tokenizer, [{"role": "system", "content": "Be brief."}, *ASK]) == "Hi"
    assert caplog.messages == ["the chat template does not write system messages: the model does not see it"]


def test_keys_of_messages_reach_the_template_and_one_that_it_ignores_is_told_once(load, caplog):
    named = [ASK[0] | {"name": "Ann", "id": 7}]
    tokenizer = load("{% for m in messages %}{{ (m.name or '') + m.content }}{% endfor %}")
    for _ in range(2):
        assert shown(tokenizer, named) == "AnnHi"
    assert caplog.messages == ["the chat template does not write id: the model does not see it"]
    tokenizer = load(R1)
    assert shown(tokenizer, named) == shown(tokenizer, ASK)
    assert len(caplog.messages) == 3


# ---- The beginning of a reply.


def continued(tokenizer, reply, **keys):
    return tokenizer.decode(encode(tokenizer, [*ASK, {"role": "assistant", "content": reply} | keys]), False)


@pytest.mark.parametrize(
    ("template", "reply", "rendered"),
    [
        (CHATML, "Let me see: ", f"[user]Hi{EOS}[assistant]Let me see: "),
        (CHATML, "<｜User｜>", f"[user]Hi{EOS}[assistant]<｜User｜>"),
        (R1, "So", f"{BOS}{USER}Hi{BOT}So"),
        (R1, "<think>\na\n</think>\n\nSo", f"{BOS}{USER}Hi{BOT}<think>\na\n</think>\n\nSo"),
        (DISTILL, "So", f"{BOS}{USER}Hi{BOT}So"),
        (DISTILL, "<think>\na", f"{BOS}{USER}Hi{BOT}<think>\na"),
        (V3_1, "So", f"{BOS}{USER}Hi{BOT}</think>So"),
        (V3_1, "<think>a", f"{BOS}{USER}Hi{BOT}<think>a"),
        ("{{ '' }}" + V3_1.replace("{{ bos_token }}", "!"), "<think>a", f"!{USER}Hi{BOT}<think>a"),
        (DISTILL.replace("{{ bos_token }}", "!"), "<think>a</think>S", f"!{USER}Hi{BOT}<think>\na</think>S"),
        (V2, "So", f"{BOS}User: Hi\n\nAssistant: So"),
    ],
)  # fmt: skip
def test_a_chat_that_ends_with_the_assistant_goes_on_there(load, template, reply, rendered):
    tokenizer = load(template, NO_THINK if template == V2 else MARKS)
    assert continued(tokenizer, reply) == continued(tokenizer, reply, prefix=True) == rendered
    ended = tokenizer.render_chat([*ASK, {"role": "assistant", "content": reply}])
    assert tokenizer.decode(
        encode(tokenizer, [*ASK, {"role": "assistant", "content": reply, "prefix": False}])
    ) == (tokenizer.decode(ended))
    begun = encode(tokenizer, [*ASK, {"role": "assistant", "content": reply}])
    assert tokenizer.opened_think(begun) == ("<think>" in reply and "</think>" not in reply)
    user = tokenizer.token_id(USER)
    assert begun.count(user) == (0 if template in (CHATML, V2) else 1)


def test_a_prefix_belongs_to_the_last_message_of_the_assistant(load):
    tokenizer = load(R1)
    for talk in ([ASK[0] | {"prefix": True}], [{"role": "assistant", "content": "a", "prefix": True}, *ASK]):
        with pytest.raises(TokenizerError, match="has a prefix; only the last message"):
            encode(tokenizer, talk)


def test_what_is_continued_is_the_assistants_text(load):
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    for talk in (ASK, [*ASK, calls]):
        with pytest.raises(TokenizerError, match="not the assistant's text"):
            load(R1).render_chat(talk, continue_final_message=True)


def test_a_mode_that_a_template_cannot_switch_is_told_once(load, caplog):
    tokenizer = load(CHATML)
    for _ in range(2):
        assert tokenizer.render_chat(ASK, thinking=False) == tokenizer.render_chat(ASK)
    (said,) = caplog.messages
    assert said == "the chat template has no switch for thinking: thinking=False has no effect"


def test_a_chat_may_bring_tools_of_its_own_and_text_may_not(load):
    tokenizer = load("{{ tools[0].function.name if tools else '' }}{{ messages[0].content }}")
    assert tokenizer.decode(encode(tokenizer, {"messages": ASK, "tools": TOOLS})) == "addHi"
    other = [{"function": {"name": "sub"}}]
    assert tokenizer.decode(encode(tokenizer, {"messages": ASK, "tools": TOOLS}, tools=other)) == "addHi"
    assert tokenizer.decode(encode(tokenizer, ASK, tools=other)) == "subHi"
    with pytest.raises(ValueError, match="tools belong to a chat"):
        encode(tokenizer, "Hi", tools=TOOLS)
    with pytest.raises(ValueError, match="mapping with messages, seed; expected text"):
        encode(tokenizer, {"messages": ASK, "seed": 1})


def test_a_template_file_that_is_no_text_is_named(load, tmp_path):
    Path(tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="bytes: not a text file in UTF-8"):
        load(R1).render_chat(ASK, template=tmp_path / "bytes")
