"""Chats on the command line: templates, their variables, tools, rows of a file; the checkpoint's settings."""

import json

import pytest

from jaxseek.cli.main import main, parser
from jaxseek.cli.prompts import as_chats, encode_prompts, read_prompts
from jaxseek.cli.shared import WrongUse, rendering
from jaxseek.config.model import ModelConfig
from jaxseek.model.deepseek import DeepSeek
from jaxseek.tokenizer.tokenizer import Tokenizer, train_sentencepiece
from jaxseek_convert import save_hf

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEMPLATE = (
    "{{ tools | tojson if tools else '' }}{{ style }}{{ documents[0].text if documents else '' }}"
    "{% for m in messages %}{{ '(' + m.role + ')' + m.content + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '(assistant)' }}{% endif %}"
)
TOOLS = [{"function": {"name": "add"}}]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A tiny model whose tokenizer brings TEMPLATE and whose generation_config.json asks for four tokens."""
    folder = tmp_path_factory.mktemp("chatty")
    train_sentencepiece(["(user) (assistant) hello there. " * 50], 300, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    raw = {"model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 32}
    raw |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512}
    cfg = ModelConfig.from_hf(raw).replace(generation={"max_new_tokens": 4, "num_beams": 2, "top_k": 3})
    save_hf(DeepSeek.init(cfg), folder / "hf", tokenizer=Tokenizer.from_dir(folder))
    return folder / "hf"


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    (tmp_path / "half.json").write_text("{")
    (tmp_path / "table.json").write_text('{"name": "add"}')
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}!")


def prompts(chatty, *argv):
    """Texts of the prompts of `jaxseek generate chatty ARGV`."""
    args = parser().parse_args(["generate", str(chatty), *argv])
    how, tokenizer = rendering(args), Tokenizer.from_dir(chatty)
    found = as_chats(read_prompts(args.prompt, args.file), args.chat, args.system, how)
    return [tokenizer.decode(ids) for ids in encode_prompts(found, tokenizer, 320, how)]


def test_templates_variables_and_tools_reach_the_prompt(chatty, files):
    chat = ("--chat", "-p", "hello")
    assert prompts(chatty, *chat) == ["(user)hello.(assistant)"]
    assert prompts(chatty, *chat, "--tools", "tools.json") == [json.dumps(TOOLS) + "(user)hello.(assistant)"]
    for value, shown in (("x", "x"), ("5", "5"), ("a=b", "a=b"), ('"5"', "5"), ("false", "False")):
        assert prompts(chatty, *chat, "--template-arg", f"style={value}") == [
            f"{shown}(user)hello.(assistant)"
        ]
    assert prompts(chatty, *chat, "--template", "own.jinja") == ["hello!"]
    assert prompts(chatty, *chat, "--template", "deepseek_v2") == ["User: hello\n\nAssistant:"]
    assert prompts(chatty, *chat, "--system", "there") == ["(system)there.(user)hello.(assistant)"]


def test_a_row_brings_tools_documents_and_variables_and_may_begin_the_reply(chatty, files, tmp_path):
    ask, begun = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "he"}
    rows = [
        {"messages": [ask], "tools": TOOLS, "chat_template_kwargs": {"style": "s"}},
        {"messages": [ask], "documents": [{"text": "there"}]},
        {"messages": [ask, begun]},
        {"messages": [ask, begun | {"prefix": True}]},
        {"messages": [ask, begun | {"prefix": False}]},
        {"prompt": "hello"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert prompts(chatty, "-f", "rows.jsonl") == [
        json.dumps(TOOLS) + "s(user)hello.(assistant)",
        "there(user)hello.(assistant)",
        "(user)hello.(assistant)he",
        "(user)hello.(assistant)he",
        "(user)hello.(assistant)he.(assistant)",
        "hello",
    ]
    assert prompts(chatty, "-f", "rows.jsonl", "--system", "x")[0] == (
        json.dumps(TOOLS) + "s(system)x.(user)hello.(assistant)"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}], "tools": {"a": 1}}, "line 1: tools are"),
        ({"messages": [{"role": "user", "content": "a"}], "documents": ["a"]}, "line 1: documents are"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": 5}, "expected an object"),
        (
            {"messages": [{"role": "user", "content": "a", "prefix": True}]},
            "line 1: message 0 .user. has a prefix",
        ),
        ({"prompt": "a", "tools": TOOLS}, "line 1: tools belong to messages"),
        (
            {"messages": [{"role": "system", "content": "a"}]},
            "a system message of its own; leave --system out",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_told_by_its_line(chatty, files, tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        prompts(chatty, "-f", "rows.jsonl", *(("--system", "x") if "leave --system" in message else ()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--tools", "tools.json"], WrongUse, "there is none; add --chat"),
        (["--system", "x"], WrongUse, "there is none; add --chat"),
        (["--no-think"], WrongUse, "there is none; add --chat"),
        (["--chat", "--template-arg", "style"], WrongUse, "--template-arg is 'style', expected NAME=VALUE"),
        (["--chat", "--template-arg", "stile=1"], ValueError, "-p: the chat template has no variable stile"),
        (["--chat", "--template", "nowhere"], ValueError, "-p: template is 'nowhere', which is no file"),
        (["--chat", "--tools", "half.json"], ValueError, "half.json: not valid JSON"),
        (
            ["--chat", "--tools", "table.json"],
            ValueError,
            "table.json: tools are .* expected a list of dicts",
        ),
        (["--chat", "--tools", "nowhere"], OSError, "nowhere"),
        (
            ["--chat", "--template", "own.jinja", "--tools", "tools.json"],
            ValueError,
            "-p: .* writes no tools",
        ),
    ],
)
def test_an_option_that_cannot_take_effect_is_an_error(chatty, files, options, error, message):
    with pytest.raises(error, match=message):
        prompts(chatty, "-p", "hello", *options)


def test_settings_of_the_checkpoint_hold_and_are_told_in_a_line(chatty, capsys):
    def answer(*more):
        assert main(["generate", str(chatty), "--chat", "-p", "hello", "--json", *more]) == 0
        out, err = capsys.readouterr()
        (said,) = [line for line in err.splitlines() if "generation_config.json" in line]
        return json.loads(out), said

    answered, said = answer()
    assert answered["tokens"] == 4
    lost = "not honoured: num_beams 2"
    assert said == f"generation_config.json: max_new_tokens 4, top_k 3 (options come first); {lost}"
    answered, said = answer("-n", "2", "--top-k", "1")
    assert answered["tokens"] == 2
    assert said == f"generation_config.json: {lost}"


def test_chat_tells_what_is_wrong_before_the_first_turn_and_continues(chatty, files, capsys, monkeypatch):
    assert main(["chat", str(chatty), "--template", "own.jinja", "--tools", "tools.json"]) == 1
    assert "the chat template writes no tools" in capsys.readouterr().err
    lines = iter(["hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert not main(["chat", str(chatty), "-n", "2", "--template-arg", "style=x"])
